"""RAFT, reward-ranked fine-tuning (arXiv:2304.06767): of `raft.samples` responses the best is imitated."""

from collections.abc import Sequence
from typing import Any

from ple_jax.algorithms import Context
from ple_jax.algorithms._imitation import batch, make_loss, marked
from ple_jax.algorithms._parts import extremes, measured, plain_samples, scores
from ple_jax.core.types import Response, Rollout, Slot

__all__ = ["batch", "collect", "label", "learned", "make_loss"]


def collect(config: Any) -> tuple[Slot, ...]:
    """Asks for `raft.samples` plain responses."""
    return plain_samples(config.raft.samples)


def label(rollouts: Sequence[Rollout], context: Context) -> list[Rollout]:
    """Gives weight 1 to the best response of every query, of equal ones the first; the margin is best minus mean score."""
    return measured(marked(rollouts, scores(rollouts).argmax(1).tolist(), "best"), "best")


def learned(rollout: Rollout, config: Any) -> list[Response]:
    """Returns the best of the plain responses, in a list."""
    return extremes(rollout)[1:]
