"""A reward on length: it falls with the relative distance from `target` words, or with the words beyond `limit` words."""

import math
from collections.abc import Sequence

from ple_jax.core.errors import UserError
from ple_jax.core.types import Reward
from ple_jax.formulas import texts
from ple_jax.rewards import WHERE

VERSION = "2"  # another one with every change of the values


def make(*, target: int | None = None, limit: int | None = None) -> Reward:
    """Returns the reward -|words - target| / target, or -max(words - limit, 0) / limit, for the words of a response.

    Args:
        target: the best number of words; 20 if neither is given.
        limit: instead of a target, the number of words up to which the reward is 0.

    Raises:
        UserError: if both are given, or one is below 1.
    """
    if target is not None and limit is not None:
        raise UserError(f"{WHERE} target = {target} and limit = {limit}: give one of them")
    name, words = ("limit", limit) if limit is not None else ("target", 20 if target is None else target)
    if words < 1:
        raise UserError(f"{WHERE} {name} = {words}: give at least 1 word")

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        beyond = [texts.word_count(response) - words for response in responses]
        return [-(abs(n) if name == "target" else max(n, 0)) / words for n in beyond]

    return Reward("length", reward, version=f"{VERSION} {name} {words}", scale=(-math.inf, 0.0))
