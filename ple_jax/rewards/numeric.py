"""A reward that is 1 if the last number of a response is that of the record's answer, and 0 otherwise."""

import math
import re
from collections.abc import Sequence
from typing import Any

from ple_jax.core.errors import UserError
from ple_jax.core.types import Reward
from ple_jax.rewards import WHERE, accepted

VERSION = "1"  # another one with every change of the values
# 1,234.5 -3 -$3 .5 6.02e23; what stands between two others, as in 5-3, is no sign
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-\u2212][$\u20ac\u00a3]?)?(?:(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][-+]?\d+(?!\w))?"
)
_LEFT_OUT = str.maketrans({"\u2212": "-", ",": "", "$": "", "\u20ac": "", "\u00a3": ""})


def make(*, column: str = "completion", tolerance: float = 1e-9) -> Reward:
    """Returns a reward that is 1 if the response and the record's answer have equal last numbers, and 0 otherwise.

    If the record has a list of answers, one of them must match. An answer may be a number, or a text that ends with one, as
    GSM8K's "... #### 1,234" do; a record without any number is left out.

    Args:
        column: the record's field with the answer; `completion` is what config.task.format takes for the answer.
        tolerance: largest difference between equal numbers, absolute or relative to the larger one.

    Raises:
        UserError: if the tolerance is below 0, or not finite.
    """
    if not 0 <= tolerance < math.inf:
        raise UserError(f"{WHERE} tolerance = {tolerance}: give a number of at least 0")

    def right(response: str, value: Any) -> bool:
        given = last_number(response)
        return given is not None and any(
            math.isclose(given, number, rel_tol=tolerance, abs_tol=tolerance) for number in _numbers(value)
        )

    def reward(prompts: Sequence[str], responses: Sequence[str], /, **fields: Sequence[Any]) -> list[float]:
        return [float(right(*one)) for one in zip(responses, fields[column], strict=True)]

    def refuses(prompt: str, /, **fields: Any) -> str:
        return "" if _numbers(fields[column]) else f"has no number in its `{column}`: {str(fields[column])[:60]!r}"

    version = f"{VERSION} {column} {tolerance!r}"
    return Reward("numeric", reward, version=version, scale=(0.0, 1.0), reads=(column,), refuses=refuses)


def last_number(text: str) -> float | None:
    """Returns the last number in a text, or None if there is none or it is too large for a float."""
    found = [float(number.translate(_LEFT_OUT)) for number in _NUMBER.findall(text)[-1:]]
    return found[0] if found and math.isfinite(found[0]) else None


def _numbers(value: Any) -> list[float]:
    return [number for answer in accepted(value) if (number := last_number(answer)) is not None]
