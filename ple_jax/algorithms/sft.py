"""Supervised fine-tuning on the records' own answers, through the same loop: an iteration trains on the queries it draws.

Answers are as long as they are, whatever is sampled: up to task.max_answer_tokens, where they are cut, without EOS then.
"""

from collections.abc import Sequence
from typing import Any

from ple_jax.algorithms import Context
from ple_jax.algorithms._imitation import batch, make_loss, marked
from ple_jax.algorithms._parts import all_plain as learned
from ple_jax.core.types import Rollout, Slot

__all__ = ["batch", "collect", "label", "learned", "make_loss"]


def collect(config: Any) -> tuple[Slot, ...]:
    """Nothing is sampled: the record's completion is the response."""
    return (Slot("reference", source="completion"),)


def label(rollouts: Sequence[Rollout], context: Context) -> list[Rollout]:
    return marked(rollouts, [0] * len(rollouts), "imitated")
