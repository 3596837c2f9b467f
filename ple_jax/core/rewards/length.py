"""Length: 0 at `target` words, and falling by the relative distance from it."""

from collections.abc import Sequence

from ple_jax.core.config import UserError
from ple_jax.core.types import Reward


def make(*, target: int = 20) -> Reward:
    """-|words - target| / target of the response.

    Raises:
        UserError: target is below 1.
    """
    if target < 1:
        raise UserError(f"config.reward.kwargs target = {target}: give at least 1 word")

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [-abs(len(response.split()) - target) / target for response in responses]

    return reward
