"""Loads code that a config names: a module of the package, or the user's own, as a Python file or a dotted path."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from ple_jax.core.config import find
from ple_jax.core.errors import UserError, suggestion
from ple_jax.core.rules import is_number, written
from ple_jax.core.secrets import shown

# a config that names a reward has options of it, which stay where only the name is overridden
OF_ANOTHER = '; --config.reward.kwargs="{}" leaves out those that were meant for another reward'


def built_in(room: str, name: str) -> ModuleType | None:
    """Imports the module that a plain name in a config stands for, ple_jax/ROOM/NAME.py; returns None if there is none."""
    return importlib.import_module(f"ple_jax.{room}.{name}") if find(room, ".py", name) else None


def load_module(name: str, key: str) -> ModuleType:
    """Imports the module of a file such as `my_variant.py`, or of a dotted path.

    Args:
        key: the config key that names it, for the error.

    Raises:
        UserError: it does not import, whatever the reason.
    """
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        if spec is None or spec.loader is None:
            raise ImportError(f"{name} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.path.append(str(Path(name).resolve().parent))  # for what lies beside it
        sys.modules.setdefault(spec.name, module)  # where dataclasses and pickle look a module up
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the code is the user's: anything may come out of it
        raise UserError(f"config.{key} {name!r} does not import: {type(error).__name__}: {error}") from error


class Function(NamedTuple):
    """A function of the user's own, as `load_function` returns it."""

    call: Callable[..., Any]
    source: list[str]  # that it depends on, as `source` gives it
    asks: tuple[str, ...]  # its arguments without a default that nobody has given


def load_function(name: str, key: str, *, given: Sequence[str], kwargs: Mapping[str, Any], known: Sequence[str]) -> Function:
    """Loads the function `package.module:function` or `file.py:function`.

    Args:
        key: the config key that names it, for errors.
        given: the names of the positional arguments that it is called with.
        kwargs: the keyword arguments that it is called with.
        known: the names that `key` may have instead.

    Raises:
        UserError: there is no such function, its module does not import, or it cannot be called this way.
    """
    file, _, function = name.partition(":")
    if not function:
        raise UserError(
            f"config.{key} {name!r} is not one of {', '.join(known)}{suggestion(name, known)};"
            " a function of your own is package.module:function or file.py:function"
        )
    module = load_module(file, key)
    found = getattr(module, function, None)
    if not callable(found):
        there = [own for own, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"config.{key} {name!r}: {file} has no function {function!r}{suggestion(function, there)}")
    asks = _without_a_value(found, len(given), kwargs)
    try:
        inspect.signature(found).bind(*([] for _ in given), **kwargs, **dict.fromkeys(asks))
    except TypeError as error:
        says = f"config.{key} {name!r} is not called as ({', '.join(given)}, **kwargs): {error}"
        raise UserError(says + OF_ANOTHER * bool(kwargs and key == "reward.name")) from error
    return Function(found, source(module, found), asks)


def _without_a_value(function: Callable[..., Any], given: int, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of arguments, after the first `given`, that have neither a default nor a value in `kwargs`."""
    found = list(inspect.signature(function).parameters.values())
    first = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:given]
    others = [p for p in found if p not in first and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return tuple(p.name for p in others if p.default is p.empty and p.name not in kwargs)


def check_types(function: Callable[..., Any], kwargs: Mapping[str, Any], where: str) -> None:
    """Raises a UserError for the first value whose type is not the one in the function's annotations.

    Args:
        where: the config key that holds the arguments, for the error.
    """
    hints = get_type_hints(function)
    for name, value in kwargs.items():
        if says := written(value):
            raise UserError(f"{where} {name} = {shown(value, 80)}: give {says}")
        if name in hints and not _fits(value, hints[name]):
            raise UserError(f"{where} {name} = {shown(value, 80)}: give {_spelled(hints[name])}")


def _fits(value: Any, hint: Any) -> bool:
    """Says whether a value from a config is of a type.

    Plain types, and those made of them, are checked; any other type accepts everything.
    """
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (UnionType, Union):
        return any(_fits(value, one) for one in inner)
    if kind is int:
        return type(value) is int
    if kind is float:
        return is_number(value)
    if kind in (str, bool, NoneType):
        return isinstance(value, kind)
    if kind is Mapping:
        return isinstance(value, Mapping) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if kind is Sequence:
        return isinstance(value, list | tuple) and all(_fits(x, inner[0]) for x in value)
    return True


def _spelled(hint: Any) -> str:
    """Returns a type as a user would say it, such as "a whole number"."""
    words = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", NoneType: "None"}
    if hint in words:
        return words[hint]
    if get_origin(hint) in (UnionType, Union):
        return " or ".join(map(_spelled, get_args(hint)))
    return {Mapping: "a dictionary", Sequence: "a list of texts"}.get(get_origin(hint), "another value")


def source(module: ModuleType, function: Callable[..., Any]) -> list[str]:
    """Returns the contents, in hex, of the file that a function is taken from and of the one that defines it, sorted."""
    try:
        defined = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # an object that can be called
        defined = None
    files = {file for file in (getattr(module, "__file__", None), defined) if file is not None}
    return sorted(Path(file).read_bytes().hex() for file in files)
