"""Supervised fine-tuning on the records' own answers, through the same loop: an iteration trains on the queries it draws.

Answers may be longer than what is sampled. They are cut after task.max_answer_tokens tokens, and have no EOS then.
"""

from collections.abc import Sequence
from typing import Any

from ple_jax.algorithms import Context
from ple_jax.algorithms._imitation import batch, make_loss, marked
from ple_jax.algorithms._parts import all_plain as learned
from ple_jax.core.types import Rollout, Slot

__all__ = ["batch", "collect", "label", "learned", "make_loss"]


def collect(config: Any) -> tuple[Slot, ...]:
    """Asks for the record's completion as the response, so nothing is sampled."""
    return (Slot("reference", source="completion"),)


def label(rollouts: Sequence[Rollout], context: Context) -> list[Rollout]:
    return marked(rollouts, [0] * len(rollouts), "imitated")
