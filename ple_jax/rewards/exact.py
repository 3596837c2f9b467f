"""A reward that is 1 if a response is the record's answer, word for word, and 0 otherwise."""

from collections.abc import Sequence
from typing import Any

from ple_jax.core.types import Reward
from ple_jax.rewards import accepted

VERSION = "2"  # another one with every change of the values


def make(*, column: str = "completion", strict: bool = False) -> Reward:
    """Returns a reward that is 1 if the response is the record's answer, or one of a list of answers, and 0 otherwise.

    A record without any answer is left out.

    Args:
        column: the record's field with the answer; `completion` is what config.task.format takes for the answer.
        strict: whether case and whitespace count.
    """

    def shape(text: str) -> str:
        return text if strict else " ".join(text.split()).casefold()

    def reward(prompts: Sequence[str], responses: Sequence[str], /, **fields: Sequence[Any]) -> list[float]:
        answers = [set(map(shape, accepted(value))) for value in fields[column]]
        return [float(shape(response) in right) for response, right in zip(responses, answers, strict=True)]

    def refuses(prompt: str, /, **fields: Any) -> str:
        return "" if accepted(fields[column]) else f"has no answer in its `{column}`"

    version = f"{VERSION} {column} {strict}"
    return Reward("exact", reward, version=version, scale=(0.0, 1.0), reads=(column,), refuses=refuses)
