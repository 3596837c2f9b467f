"""RAFT, reward-ranked fine-tuning (arXiv:2304.06767): of `raft.samples` responses the best by reward is imitated."""

from collections.abc import Sequence
from typing import Any

from ple_jax.algorithms import Context
from ple_jax.algorithms._imitation import batch, make_loss, marked
from ple_jax.algorithms._parts import extremes, measured, plain_samples, scores
from ple_jax.core.types import Response, Rollout, Slot

__all__ = ["batch", "collect", "label", "learned", "make_loss"]


def collect(config: Any) -> tuple[Slot, ...]:
    """`raft.samples` plain responses."""
    return plain_samples(config.raft.samples)


def label(rollouts: Sequence[Rollout], context: Context) -> list[Rollout]:
    """The best response of every query gets weight 1, the first of equals; margin is best minus mean, in reward."""
    return measured(marked(rollouts, scores(rollouts).argmax(1).tolist(), "best"), "best")


def learned(rollout: Rollout, config: Any) -> list[Response]:
    """The best of the plain responses, by reward."""
    return extremes(rollout)[1:]
