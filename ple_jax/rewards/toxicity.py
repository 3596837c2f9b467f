"""Civility: 1 minus the probability that a response is profane, by alt-profanity-check's linear model of English words."""

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from ple_jax.core.extras import need
from ple_jax.core.types import Reward


def make() -> Reward:
    """From 0 (surely profane) to 1; 1 for an empty response.

    Raises:
        UserError: the package alt-profanity-check is not installed.
    """
    need("toxicity", "reward 'toxicity'")
    from profanity_check import predict_prob

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        said = [bool(response.strip()) for response in responses]
        return np.where(said, 1.0 - predict_prob(responses), 1.0).tolist()

    return Reward("toxicity", reward, version=version("alt-profanity-check"), scale=(0.0, 1.0))
