"""A reward that is 1 if a response is JSON that a schema allows, one for all or the record's own, and 0 otherwise."""

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ple_jax.core.answers import digest
from ple_jax.core.errors import UserError
from ple_jax.core.extras import need
from ple_jax.core.types import Reward
from ple_jax.rewards import WHERE, fenced_block

VERSION = "2"  # another one with every change of the values


def make(schema: str | Mapping[str, Any] | None = None, *, column: str | None = None, fenced: bool = True) -> Reward:
    """Returns a reward that is 1 if the whole response is JSON that a schema (https://json-schema.org) allows, else 0.

    Args:
        schema: the schema of all responses: a .json file, the text of one, or a dictionary, of which a config takes only
            simple ones; {} allows any JSON.
        column: instead of `schema`, the record's field with a schema of its own: an object, or its text.
        fenced: whether JSON may also be in a block between ```, of which the last counts.

    Raises:
        UserError: if neither a schema nor a column is given, or both; if it is no schema; if the package jsonschema is not
            installed.
    """
    need("json_schema", "reward 'json_schema'")
    if (schema is None) == (column is None):
        raise UserError(f"{WHERE} of reward 'json_schema': give a schema, or the column of the record that has one")
    fixed = None if schema is None else _read(schema)
    if fixed is not None and (wrong := _wrong(fixed)):
        raise UserError(f"{WHERE} schema is no JSON schema: {wrong}")

    def reward(prompts: Sequence[str], responses: Sequence[str], /, **fields: Sequence[Any]) -> list[float]:
        wanted = [fixed] * len(responses) if column is None else map(_schema, fields[column])
        return [float(_valid(*one, fenced=fenced)) for one in zip(responses, wanted, strict=True)]

    def refuses(prompt: str, /, **fields: Any) -> str:
        wrong = "" if column is None else _wrong(fields[column])
        return f"has no JSON schema in its `{column}`: {wrong}" if wrong else ""

    version = f"{VERSION} {metadata.version('jsonschema')} {digest(fixed, column, fenced)}"
    reads = () if column is None else (column,)
    return Reward("json_schema", reward, version=version, scale=(0.0, 1.0), reads=reads, refuses=refuses)


def _read(schema: str | Mapping[str, Any]) -> Any:
    """Reads the schema that the options give, as plain JSON data: a config turns lists into tuples."""
    if not isinstance(schema, str):
        return json.loads(json.dumps(schema))
    try:
        return json.loads(Path(schema).read_text(encoding="utf-8") if schema.endswith(".json") else schema)
    except (OSError, ValueError) as error:
        raise UserError(f"{WHERE} schema = {schema[:80]!r} is neither a .json file nor JSON: {error}") from error


def _valid(response: str, schema: Any, *, fenced: bool) -> bool:
    text = fenced_block(response, ("json", "jsonc", "json5"), or_none=True) if fenced else None
    try:
        value = json.loads(response if text is None else text, parse_constant=_no_json)
        return _validator(schema).is_valid(value)
    except (ValueError, RecursionError, OverflowError):
        return False


def _no_json(name: str) -> Any:
    raise ValueError(f"{name} is Python's, not JSON's")


def _schema(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _validator(schema: Any) -> Any:
    import jsonschema
    from referencing import Registry

    return jsonschema.validators.validator_for(schema)(schema, registry=Registry())  # which fetches nothing


def _wrong(schema: Any) -> str:
    """Says why a schema is invalid, or refers to something that is not in it; returns "" if it can be used."""
    import jsonschema

    try:
        found = _schema(schema)
        jsonschema.validators.validator_for(found).check_schema(found)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        return f"{error}"[:80]
    except jsonschema.SchemaError as error:
        return error.message[:80]
    return next((f"it refers to {ref!r}, which is not in it" for ref in _references(found) if not _there(found, ref)), "")


def _references(schema: Any) -> Iterator[str]:
    for key, value in (
        schema.items() if isinstance(schema, Mapping) else enumerate(schema if isinstance(schema, list) else ())
    ):
        if key in ("$ref", "$dynamicRef") and isinstance(value, str):
            yield value
        else:
            yield from _references(value)


def _there(schema: Any, reference: str) -> bool:
    from referencing import Registry, Resource, exceptions
    from referencing.jsonschema import DRAFT202012

    resource = Resource.from_contents(schema, default_specification=DRAFT202012)
    try:
        Registry().with_resource("", resource).resolver().lookup(reference)
    except exceptions.Unresolvable:
        return False
    return True
