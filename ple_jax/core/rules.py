"""What a key of a config may hold: the rules that make up the table in `config.py`, and an algorithm's own (RULES).

A rule takes a value and returns what it must be instead, in words, or "" if the value is fine.
"""

import contextlib
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from ple_jax.core.errors import suggestion
from ple_jax.core.secrets import shown

Rule = Callable[[Any], str]  # value -> what it must be instead, or "" where it is fine


def is_number(value: Any) -> bool:
    """Says whether a value is a number that float64 has room for: not True or False, and not 10**400."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and isinstance(float(value), float)
    except OverflowError:
        return False


def whole(low: int, high: float = math.inf) -> Rule:
    """Returns a rule that accepts a whole number from `low` on and below `high`."""
    says = f"a whole number, at least {low}" + (f" and below {high}" if high < math.inf else "")
    return lambda v: "" if type(v) is int and low <= v < high else says


def real(test: Callable[[float], bool], says: str, *, infinite: bool = False) -> Rule:
    """Returns a rule that accepts a number that passes `test`; `says` is what it must be, in words.

    The infinities are accepted only if `infinite` is set; NaN is not accepted.
    """
    # NaN fails here: it is not finite, and no comparison with it holds
    return lambda v: "" if is_number(v) and test(v) and (infinite or math.isfinite(v)) else f"a number {says}"


def choice(*options: str) -> Rule:
    """Returns a rule that accepts one of the options."""
    return lambda v: "" if v in options else f"one of {', '.join(options)}{suggestion(str(v), options)}"


def auto_or(rule: Rule) -> Rule:
    """Returns a rule that accepts "auto" and what `rule` accepts."""
    return lambda v: "" if v == "auto" or not (says := rule(v)) else f"auto or {says}"


def many(each: Rule, *, empty: bool = False) -> Rule:
    """Returns a rule that accepts a tuple (or list) of what `each` accepts, and an empty one if `empty` is set."""

    def rule(value: Any) -> str:
        if not isinstance(value, tuple | list) or not (value or empty):
            return "a tuple" if empty else "a tuple with at least one entry"
        wrong = next(((v, says) for v in value if (says := each(v))), None)
        return f"a tuple such as \"('a','b')\", where its entry {wrong[0]!r} must be {wrong[1]}" if wrong else ""

    return rule


def optional(rule: Rule) -> Rule:
    """Returns a rule that accepts None and what `rule` accepts."""
    return lambda value: "" if value is None else rule(value)


def flag(value: Any) -> str:
    """Checks that a value is True or False; returns "" or what it must be instead."""
    return "" if isinstance(value, bool) else "True or False"


def text(value: Any) -> str:
    """Checks that a value is a text that is not empty; returns "" or what it must be instead."""
    return "" if isinstance(value, str) and value else "a name"


def written(value: Any) -> str:
    """Checks that no text in a value of any type has a NUL or a lone surrogate, which no file can hold.

    It returns "" or what the value must be instead.
    """
    if isinstance(value, Mapping):
        return next((says for pair in value.items() for part in pair if (says := written(part))), "")
    if isinstance(value, list | tuple):
        return next((says for part in value if (says := written(part))), "")
    fine = not isinstance(value, str) or ("\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value))
    return "" if fine else "a text that can be written down: without NUL and lone surrogates"


def mapping(value: Any) -> str:
    """Checks that a value is a dictionary; returns "" or what it must be instead."""
    return "" if isinstance(value, Mapping) else "an object"


def day(value: Any) -> str:
    """Checks that a value is a date, YYYY-MM-DD; returns "" or what it must be instead."""
    try:
        return "" if isinstance(value, str) and date.fromisoformat(value).isoformat() == value else "a day, YYYY-MM-DD"
    except ValueError:
        return "a day, YYYY-MM-DD"


def free(value: Any) -> str:
    """Checks that a value is a dictionary of plain values, by name; returns "" or what it must be instead."""
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
    """Returns a rule that accepts one of the `known` names, or a path.

    Args:
      known: names that need no path.
      file: what a path leads to, in words; without it paths are not allowed.
      folder: whether a path may lead to a folder.
      code: whether `package.module`, `package.module:function`, `file.py` and `file.py:function` are allowed.
    """

    def rule(value: Any) -> str:
        if not isinstance(value, str):
            return f"one of {', '.join(known)}"
        if value in known or (file and value and (os.path.isfile(value) or (folder and os.path.isdir(value)))):
            return ""
        module = value.split(":", 1)[0]
        if code and module.endswith(".py"):
            missing = f"an existing Python file (looked in {Path.cwd()}){_beside(module)}"
            return "" if os.path.isfile(module) else missing
        # only the first part is looked up: finding a submodule would import its package
        if code and ("." in module or ":" in value) and all(part.isidentifier() for part in module.split(".")):
            root = module.split(".", 1)[0]
            found = root in sys.modules or importlib.util.find_spec(root) is not None  # a script's __main__ has no spec
            return "" if found else f"a dotted path into an installed package; {root!r} is not one"
        if file and _is_path(value):
            return f"an existing {file} (looked in {Path.cwd()}), or one of {', '.join(known)}{_beside(value)}"
        more = "a Python file, a dotted path" if code else f"the path of a {file}"
        return f"one of {', '.join(known)}, or {more}{suggestion(value, known)}"

    return rule


def _beside(path: str) -> str:
    """Suggests a file of the same suffix that lies where a path should be, as the end of a sentence; "" if none is near."""
    with contextlib.suppress(OSError, ValueError):  # of a path that is none
        wanted = Path(path)
        return suggestion(path, (str(file) for file in sorted(wanted.parent.glob(f"*{wanted.suffix}"))), files=True)
    return ""


def patterns(each: Rule) -> Rule:
    """Returns a rule that accepts a tuple of pairs: a regular expression, and what `each` accepts."""
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
    """Says why a value that was read is not an object of these keys; returns "" if it is one.

    A key that is needed may be missing, or a key may have a value that its rule does not accept.
    """
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
