"""Civility: 1 minus the probability that a response is profane, by alt-profanity-check's linear model of English words."""

from collections.abc import Sequence
from importlib import metadata

import numpy as np

from ple_jax.core.extras import need
from ple_jax.core.types import Reward

VERSION = "1"  # another one with every change of the values


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

    version = f"{VERSION} {metadata.version('alt-profanity-check')}"
    return Reward("toxicity", reward, version=version, scale=(0.0, 1.0))
