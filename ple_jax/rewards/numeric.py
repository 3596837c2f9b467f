"""A reward that is 1 if the last number of a response is that of the record's answer, and 0 otherwise."""

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from ple_jax.core.errors import UserError
from ple_jax.core.types import Reward
from ple_jax.rewards import WHERE, accepted

VERSION = "2"  # another one with every change of the values
# 1,234.5 -3 -$3 .5 6.02e23; what stands between two others, as in 5-3, is no sign, and the dot of Rs.500 no point
_ONE = (
    r"(?:(?<![\w.)])[-\u2212][$\u20ac\u00a3]?)?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][-+]?\d+(?!\w))?"
)
# 3/4 is one number, and 11/30/2026 are three
_NUMBER = re.compile(rf"(?<!/)({_ONE})\s?/\s?(\d{{1,18}})(?!\d|/|\.\d)|({_ONE})")
_LEFT_OUT = str.maketrans({"\u2212": "-", ",": "", "$": "", "\u20ac": "", "\u00a3": ""})
_EQUAL = 1e-9  # largest difference of numbers that are equal


def make(*, column: str = "completion", tolerance: float | None = None) -> Reward:
    """Returns a reward that is 1 if the response and the record's answer have equal last numbers, and 0 otherwise.

    If the record has a list of answers, one of them must match. An answer may be a number, or a text that ends with one, as
    GSM8K's "... #### 1,234" do; a record without any number is left out.

    Args:
        column: the record's field with the answer; `completion` is what config.task.format takes for the answer.
        tolerance: largest difference between equal numbers, absolute or relative to the larger one. If it is None, integers
            must be the same, and other numbers may differ by 1e-9.

    Raises:
        UserError: if the tolerance is below 0, or not finite.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UserError(f"{WHERE} tolerance = {tolerance}: give a number of at least 0")

    def right(response: str, value: Any) -> bool:
        given = last_number(response)
        return given is not None and any(_equal(given, number, tolerance) for number in _numbers(value))

    def reward(prompts: Sequence[str], responses: Sequence[str], /, **fields: Sequence[Any]) -> list[float]:
        return [float(right(*one)) for one in zip(responses, fields[column], strict=True)]

    def refuses(prompt: str, /, **fields: Any) -> str:
        return "" if _numbers(fields[column]) else f"has no number in its `{column}`: {str(fields[column])[:60]!r}"

    version = f"{VERSION} {column} {tolerance!r}"
    return Reward("numeric", reward, version=version, scale=(0.0, 1.0), reads=(column,), refuses=refuses)


def last_number(text: str) -> Fraction | None:
    """Returns the last number in a text, exactly, or None if there is none, or it is too large for a float.

    Two numbers with a stroke between them are a fraction: 3/4.
    """
    for above, below, alone in _NUMBER.findall(text)[-1:]:
        written = (above or alone).translate(_LEFT_OUT)
        if math.isfinite(value := float(written)) and (not below or int(below)):
            whole = written.removeprefix("-").isdigit()  # exactly, where a float is not
            return Fraction(int(written) if whole else value) / int(below or 1)
    return None


def _equal(one: Fraction, other: Fraction, tolerance: float | None) -> bool:
    if tolerance is None and one.denominator == other.denominator == 1:
        return one == other
    near = _EQUAL if tolerance is None else tolerance
    return math.isclose(float(one), float(other), rel_tol=near, abs_tol=near)


def _numbers(value: Any) -> list[Fraction]:
    return [number for answer in accepted(value) if (number := last_number(answer)) is not None]
