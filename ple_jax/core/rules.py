"""What a key of a config may hold: small rules, of which the table in `config.py` is made, and an algorithm's own (RULES).

A rule takes a value and gives what it must be instead, in words, or "" where it is fine.
"""

import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from ple_jax.core.errors import suggestion
from ple_jax.core.secrets import shown

Rule = Callable[[Any], str]  # value -> what it must be instead, or "" where it is fine


def is_number(value: Any) -> bool:
    """Whether it is one, and one that float64 has room for: not 10**400."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and isinstance(float(value), float)
    except OverflowError:
        return False


def whole(low: int, high: float = math.inf) -> Rule:
    """A whole number from `low` on, and below `high`."""
    says = f"a whole number, at least {low}" + (f" and below {high}" if high < math.inf else "")
    return lambda v: "" if type(v) is int and low <= v < high else says


def real(test: Callable[[float], bool], says: str, *, infinite: bool = False) -> Rule:
    """A number that passes `test`; `says` is what it must be."""
    # NaN fails here: it is not finite, and no comparison with it holds
    return lambda v: "" if is_number(v) and test(v) and (infinite or math.isfinite(v)) else f"a number {says}"


def choice(*options: str) -> Rule:
    """One of the options."""
    return lambda v: "" if v in options else f"one of {', '.join(options)}{suggestion(str(v), options)}"


def auto_or(rule: Rule) -> Rule:
    """ "auto", or what `rule` allows."""
    return lambda v: "" if v == "auto" or not (says := rule(v)) else f"auto or {says}"


def many(each: Rule, *, empty: bool = False) -> Rule:
    """A tuple of what `each` allows."""

    def rule(value: Any) -> str:
        if not isinstance(value, tuple | list) or not (value or empty):
            return "a tuple" if empty else "a tuple with at least one entry"
        wrong = next(((v, says) for v in value if (says := each(v))), None)
        return f"a tuple such as \"('a','b')\", where its entry {wrong[0]!r} must be {wrong[1]}" if wrong else ""

    return rule


def optional(rule: Rule) -> Rule:
    """Unset, or what `rule` allows."""
    return lambda value: "" if value is None else rule(value)


def flag(value: Any) -> str:
    """True or False."""
    return "" if isinstance(value, bool) else "True or False"


def text(value: Any) -> str:
    """A text that is not empty."""
    return "" if isinstance(value, str) and value else "a name"


def written(value: Any) -> str:
    """Of whatever type: no text in it has a NUL, or half a character that no file can hold."""
    if isinstance(value, Mapping):
        return next((says for pair in value.items() for part in pair if (says := written(part))), "")
    if isinstance(value, list | tuple):
        return next((says for part in value if (says := written(part))), "")
    fine = not isinstance(value, str) or ("\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value))
    return "" if fine else "a text that can be written down: without NUL and lone surrogates"


def mapping(value: Any) -> str:
    """A dictionary."""
    return "" if isinstance(value, Mapping) else "an object"


def day(value: Any) -> str:
    """A date, YYYY-MM-DD."""
    try:
        return "" if isinstance(value, str) and date.fromisoformat(value).isoformat() == value else "a day, YYYY-MM-DD"
    except ValueError:
        return "a day, YYYY-MM-DD"


def free(value: Any) -> str:
    """A dictionary of plain values, by name."""
    says = "a dictionary of plain values without NaN, by argument name: \"{'k': 1}\""
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        return says
    try:
        json.dumps(value, allow_nan=False)
        return ""
    except (TypeError, ValueError):
        return says


def _is_path(value: str) -> bool:
    return "/" in value or bool(Path(value).suffix)


def named(known: list[str], *, file: str = "", folder: bool = False, code: bool = False) -> Rule:
    """One of the `known` names, or a path.

    Args:
      known: names that need no path.
      file: what a path leads to, in words; without it paths are not allowed.
      folder: whether it may lead to a folder.
      code: whether `package.module`, `package.module:function`, `file.py` and `file.py:function` are allowed.
    """

    def rule(value: Any) -> str:
        if not isinstance(value, str):
            return f"one of {', '.join(known)}"
        if value in known or (file and value and (os.path.isfile(value) or (folder and os.path.isdir(value)))):
            return ""
        module = value.split(":", 1)[0]
        if code and module.endswith(".py"):
            return "" if os.path.isfile(module) else f"an existing Python file (looked in {Path.cwd()})"
        # only the first part is looked up: finding a submodule would import its package
        if code and ("." in module or ":" in value) and all(part.isidentifier() for part in module.split(".")):
            found = importlib.util.find_spec(module.split(".", 1)[0]) is not None
            return "" if found else f"a dotted path into an installed package; {module.split('.', 1)[0]!r} is not one"
        if file and _is_path(value):
            return f"an existing {file} (looked in {Path.cwd()}), or one of {', '.join(known)}"
        more = "a Python file, a dotted path" if code else f"the path of a {file}"
        return f"one of {', '.join(known)}, or {more}{suggestion(value, known)}"

    return rule


def patterns(each: Rule) -> Rule:
    """Pairs of a regular expression and what `each` allows."""
    says = "a tuple of (regular expression, value) pairs: \"(('mlp.down_proj', 16),)\""  # ConfigDict has no keys with dots

    def rule(value: Any) -> str:
        if not isinstance(value, tuple | list) or not all(isinstance(v, tuple | list) and len(v) == 2 for v in value):
            return says
        for key, number in value:
            try:
                re.compile(key)
            except (TypeError, re.error, OverflowError, RecursionError) as error:
                return f"{says}; {key!r} is no regular expression ({error})"
            if wrong := each(number):
                return f"{says}, where {key!r} must have {wrong}"
        return ""

    return rule


def misshapen(value: Any, rules: Mapping[str, Rule], *, needed: Collection[str] = ()) -> str:
    """Why a value that was read is no object of these keys: one that is needed is missing, or has another kind of value."""
    if not isinstance(value, Mapping):
        return f"it is no object: {shown(value, 40)}"
    if missing := [key for key in needed if key not in value]:
        return f"it has no {missing[0]}"
    wrong = ((key, says) for key, rule in rules.items() if key in value and (says := rule(value[key])))
    return next((f"{key} is {shown(value[key], 40)} but must be {says}" for key, says in wrong), "")


# float32 makes 0 of what is much smaller, and of a step's size nothing is left then
positive = real(lambda v: 1e-30 <= v <= 1e9, "above 0 (from 1e-30) and at most 1e9")
# what multiplies or divides numbers of usual size without overflow in float32
scale = real(lambda v: 1e-6 <= v <= 1e6, "from 1e-6 to 1e6")
coefficient = real(lambda v: 0 <= v <= 1e6, "from 0 to 1e6")
not_negative = real(lambda v: 0 <= v <= 1e30, "of at least 0 and at most 1e30")
share = real(lambda v: 0 <= v <= 1, "from 0 to 1")
