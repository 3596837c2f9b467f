"""Whether the last number of a response is that of the record's answer: 1 or 0."""

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
    """1 where the last number of the response equals the last one of the record's answer, or of one of its answers.

    An answer may be a number, or a text that ends with one, as GSM8K's "... #### 1,234" do; a record without any is left
    out.

    Args:
        column: of the record, with the answer; `completion` is what config.task.format takes for it.
        tolerance: largest difference of equal numbers, by itself or as a share of the larger one.

    Raises:
        UserError: the tolerance is below 0, or not finite.
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
    """The last number that stands in a text; None where there is none, or one that is too large."""
    found = [float(number.translate(_LEFT_OUT)) for number in _NUMBER.findall(text)[-1:]]
    return found[0] if found and math.isfinite(found[0]) else None


def _numbers(value: Any) -> list[float]:
    return [number for answer in accepted(value) if (number := last_number(answer)) is not None]
