"""Removes from configs, before they are written or shown, keys in addresses and paths that tell about this machine."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from ple_jax.core.errors import UserError

# an address: scheme, perhaps who asks, the server and its path, perhaps a query or a fragment
_ADDRESS = re.compile(r"\b(https?://)(?:[^\s/?#'\"<>]*@)?([^\s?#'\"<>]*)((?:[?#][^\s'\"<>]*)?)", re.IGNORECASE)
_NO_KEY = 3  # characters: what is so short is none


def redacted(value: Any) -> Any:
    """Removes what may be secret from the addresses in a value or text: users, passwords, queries, fragments.

    >>> redacted({"url": "https://me:secret@host:80/score?key=abc", "batch": 8})
    {'url': 'https://host:80/score', 'batch': 8}
    """
    return _each(value, lambda text: _ADDRESS.sub(r"\1\2", text))


def shown(value: Any, most: int = 300) -> str:
    """Formats a value for an error message: redacted, and cut off after `most` characters."""
    try:
        text = repr(redacted(value))
    except (RecursionError, ValueError):  # Python writes no number of more than 4,300 digits
        return f"too large a {type(value).__name__} to be shown"
    return text if len(text) <= most else f"{text[:most]} ..."


def sent_in(url: str, headers: Mapping[str, str]) -> set[str]:
    """Returns what may be secret in a request, both as it is and as it is spelled in an address.

    These are its headers, its query, and the values in the query. Very short texts are left out: they are no keys, and
    would be found in every number.
    """
    query = urlsplit(url).query
    values = [value for part in query.split("&") for value in (part, part.partition("=")[2])]
    spelled = {form for text in (query, *values) for form in (text, unquote(text), quote(text, safe="!#$%&'()*+,/:;=?@[]~"))}
    keys = {value.removeprefix("Bearer ") for value in headers.values()}
    return {text for text in spelled | keys | {value for _, value in parse_qsl(query)} if len(text) > _NO_KEY}


def hidden(text: str, secrets: Iterable[str]) -> str:
    """Replaces every secret in a text by "***"."""
    for secret in sorted(secrets, key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, "***")
    return text


def from_environment(name: str, setting: str) -> str:
    """Reads a key from an environment variable.

    Args:
        setting: the config key that names the variable, for the error, which never shows the variable's value.

    Raises:
        UserError: the variable is not set, or its value cannot be sent in a header.
    """
    value = os.environ.get(name, "").strip() if name.isidentifier() else ""
    if not value:
        raise UserError(f"{setting}: the environment variable {name!r} is not set; export it with the key")
    if not (value.isascii() and value.isprintable()):
        raise UserError(
            f"{setting}: the environment variable {name!r} holds a line break, or another character that no header takes"
        )
    return value


def portable(value: Any) -> Any:
    """Makes a value or a text fit for other machines.

    Absolute paths become relative to the current folder or, outside of it, are cut to their last part.
    """
    return _each(value, lambda text: _portable(text) if text.startswith(("/", "~")) else text)


def _portable(text: str) -> str:
    path, here = Path(text), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """Returns the value with every text in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_each(k, change): _each(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_each(v, change) for v in value)
    return value
