"""A reward for sentiment: VADER's compound score, from -1 (negative) to 1 (positive). Hutto and Gilbert, ICWSM 2014."""

from collections.abc import Sequence
from importlib import metadata

from ple_jax import prompts
from ple_jax.core.extras import need
from ple_jax.core.types import Reward

VERSION = "1"  # another one with every change of the values


def make(*, with_prompt: bool = False) -> Reward:
    """Returns a reward that scores the response alone or, with `with_prompt`, prompt and response together.

    Raises:
        UserError: if the package vaderSentiment is not installed.
    """
    need("vader", "reward 'vader'")
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()

    def reward(queries: Sequence[str], responses: Sequence[str]) -> list[float]:
        texts = responses
        if with_prompt:
            texts = [q + prompts.completion(q, r, chat=False) for q, r in zip(queries, responses, strict=True)]
        return [analyzer.polarity_scores(text)["compound"] for text in texts]

    version = f"{VERSION} {metadata.version('vaderSentiment')} {with_prompt=}"
    return Reward("vader", reward, version=version, scale=(-1.0, 1.0))
