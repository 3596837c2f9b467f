"""Context distillation (arXiv:2112.00861, section 2): fine-tuning on the principled response, without the principles.

PLE without any reward: what is left when neither ranks nor weights are taken from it.
"""

from collections.abc import Sequence
from typing import Any

from ple_jax.algorithms import Context
from ple_jax.algorithms._imitation import batch, make_loss, marked
from ple_jax.core.types import Response, Rollout, Slot

__all__ = ["batch", "collect", "label", "learned", "make_loss"]


def collect(config: Any) -> tuple[Slot, ...]:
    """One response, from the prompt with the principles in it; training sees the plain one."""
    return (Slot("principled", True),)


def label(rollouts: Sequence[Rollout], context: Context) -> list[Rollout]:
    return marked(rollouts, [0] * len(rollouts), "imitated")


def learned(rollout: Rollout, config: Any) -> list[Response]:
    """The principled responses."""
    return [response for response in rollout.responses if response.principled]
