"""Sentiment: VADER's compound score, from -1 (negative) to 1 (positive). Hutto and Gilbert, ICWSM 2014."""

from collections.abc import Sequence

from ple_jax.core.config import UserError
from ple_jax.core.types import Reward


def make(*, with_prompt: bool = False) -> Reward:
    """Scores the response alone, or prompt and response together.

    Raises:
        UserError: the package vaderSentiment is not installed.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError("reward 'vader' needs a package: run `pip install vaderSentiment`") from error
    analyzer = SentimentIntensityAnalyzer()

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        texts = [p + r if with_prompt else r for p, r in zip(prompts, responses, strict=True)]
        return [analyzer.polarity_scores(text)["compound"] for text in texts]

    return reward
