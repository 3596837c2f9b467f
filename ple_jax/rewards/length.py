"""Length: falling by the relative distance from `target` words, or by what a response has beyond `limit` words."""

import math
from collections.abc import Sequence

from ple_jax.core.errors import UserError
from ple_jax.core.types import Reward
from ple_jax.rewards import WHERE

VERSION = "1"  # another one with every change of the values


def make(*, target: int | None = None, limit: int | None = None) -> Reward:
    """-|words - target| / target of the response, or -max(words - limit, 0) / limit.

    Args:
        target: words; 20 if neither is given.
        limit: words, instead of a target.

    Raises:
        UserError: both are given, or one is below 1.
    """
    if target is not None and limit is not None:
        raise UserError(f"{WHERE} target = {target} and limit = {limit}: give one of them")
    name, words = ("limit", limit) if limit is not None else ("target", 20 if target is None else target)
    if words < 1:
        raise UserError(f"{WHERE} {name} = {words}: give at least 1 word")

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        beyond = [len(response.split()) - words for response in responses]
        return [-(abs(n) if name == "target" else max(n, 0)) / words for n in beyond]

    return Reward("length", reward, version=f"{VERSION} {name} {words}", scale=(-math.inf, 0.0))
