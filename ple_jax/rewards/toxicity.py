"""A reward for civility: 1 minus the probability of profanity, by alt-profanity-check's linear model of English words."""

from collections.abc import Sequence
from importlib import metadata

import numpy as np

from ple_jax.core.extras import need
from ple_jax.core.types import Reward

VERSION = "1"  # another one with every change of the values


def make() -> Reward:
    """Returns the reward, which goes from 0 (surely profane) to 1; an empty response gets 1.

    Raises:
        UserError: if the package alt-profanity-check is not installed.
    """
    need("toxicity", "reward 'toxicity'")
    from profanity_check import predict_prob

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        said = [bool(response.strip()) for response in responses]
        return np.where(said, 1.0 - predict_prob(responses), 1.0).tolist()

    version = f"{VERSION} {metadata.version('alt-profanity-check')}"
    return Reward("toxicity", reward, version=version, scale=(0.0, 1.0))
