"""Whether a response is the record's answer, word for word: 1 or 0."""

from collections.abc import Sequence
from typing import Any

from ple_jax.core.types import Reward
from ple_jax.rewards import accepted

VERSION = "1"  # another one with every change of the values


def make(*, column: str = "completion", strict: bool = False) -> Reward:
    """1 where the response is the answer of the record, or one of its answers, where that is a list.

    Args:
        column: of the record, with the answer; `completion` is what config.task.format takes for it.
        strict: whether case and blanks count.
    """

    def shape(text: str) -> str:
        return text if strict else " ".join(text.split()).casefold()

    def reward(prompts: Sequence[str], responses: Sequence[str], /, **fields: Sequence[Any]) -> list[float]:
        answers = [set(map(shape, accepted(value))) for value in fields[column]]
        return [float(shape(response) in right) for response, right in zip(responses, answers, strict=True)]

    return Reward("exact", reward, version=f"{VERSION} {column} {strict}", scale=(0.0, 1.0), reads=(column,))
