"""Small parts of which several algorithms are made."""

from collections.abc import Callable, Sequence
from typing import Any

from ple_jax.core.batches import pack
from ple_jax.core.types import Batch, Rollout, Slot


def no_threshold(config: Any) -> Callable[[int], float]:
    """A schedule for algorithms without a threshold: nan, which is not logged."""
    return lambda iteration: float("nan")


def plain_samples(count: int) -> tuple[Slot, ...]:
    """So many responses to the plain prompt."""
    return tuple(Slot("plain", sample=sample) for sample in range(count))


def pack_picks(rollouts: Sequence[Rollout], picks: Sequence[Sequence[int]], config: Any) -> Batch:
    """`core.batches.pack` in the shapes of config.sampling."""
    return pack(rollouts, picks, prompt_multiple=config.sampling.bucket, response_len=config.sampling.max_new_tokens)


def pack_all(rollouts: Sequence[Rollout], config: Any) -> Batch:
    """All responses of every query, in the order in which they were collected."""
    return pack_picks(rollouts, [range(len(rollout.responses)) for rollout in rollouts], config)
