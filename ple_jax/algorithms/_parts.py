"""Small parts of which several algorithms are made."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from ple_jax.core.batches import pack
from ple_jax.core.types import Batch, Rollout, Slot


def plain_samples(count: int) -> tuple[Slot, ...]:
    """So many responses to the plain prompt."""
    return tuple(Slot("plain", sample=sample) for sample in range(count))


def scores(rollouts: Sequence[Rollout]) -> Float64[np.ndarray, "query k"]:
    """Of every response."""
    return np.array([[r.score for r in rollout.responses] for rollout in rollouts], np.float64)


def measured(rollouts: Sequence[Rollout], decision: str) -> list[Rollout]:
    """The rollouts with one decision for all; margin is best minus mean score."""
    return [
        rollout._replace(margin=float(own.max() - own.mean()), decision=decision)
        for rollout, own in zip(rollouts, scores(rollouts), strict=True)
    ]


def pack_picks(rollouts: Sequence[Rollout], picks: Sequence[Sequence[int]], config: Any) -> Batch:
    """`core.batches.pack` in the shapes of config.sampling."""
    return pack(rollouts, picks, prompt_multiple=config.sampling.bucket, response_len=config.sampling.max_new_tokens)


def pack_all(rollouts: Sequence[Rollout], config: Any) -> Batch:
    """All responses of every query, in the order in which they were collected."""
    return pack_picks(rollouts, [range(len(rollout.responses)) for rollout in rollouts], config)
