"""A toy reward for the tiny config: the share of some letters among a response's characters, which any model can learn."""

from collections.abc import Sequence

from ple_jax.core.errors import UserError
from ple_jax.core.types import Reward
from ple_jax.rewards import WHERE

VERSION = "1"  # another one with every change of the values


def make(*, letters: str = "aeiou") -> Reward:
    """Returns a reward that is the share of `letters` among the characters of the response, and 0 for an empty response.

    Raises:
        UserError: if there are no letters, since every response would have the same share of them.
    """
    if not letters:
        raise UserError(f"{WHERE} letters = '': give at least one letter")

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [sum(c in letters for c in response) / max(len(response), 1) for response in responses]

    return Reward("letters", reward, version=f"{VERSION} {letters}", scale=(0.0, 1.0))
