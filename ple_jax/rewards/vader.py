"""Sentiment: VADER's compound score, from -1 (negative) to 1 (positive). Hutto and Gilbert, ICWSM 2014."""

from collections.abc import Sequence
from importlib.metadata import version

from ple_jax import prompts
from ple_jax.core.errors import UserError
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

    def reward(queries: Sequence[str], responses: Sequence[str]) -> list[float]:
        texts = responses
        if with_prompt:
            texts = [q + prompts.completion(q, r, chat=False) for q, r in zip(queries, responses, strict=True)]
        return [analyzer.polarity_scores(text)["compound"] for text in texts]

    return Reward("vader", reward, version=f"{version('vaderSentiment')} {with_prompt=}", scale=(-1.0, 1.0))
