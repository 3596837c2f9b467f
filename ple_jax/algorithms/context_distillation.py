"""Context distillation (arXiv:2112.00861, section 2): fine-tuning on the principled response, without the principles.

This is PLE without any reward: what is left when a reward decides neither ranks nor weights.
"""

from collections.abc import Sequence
from typing import Any

from ple_jax.algorithms import Context
from ple_jax.algorithms._imitation import batch, make_loss, marked
from ple_jax.core.types import Response, Rollout, Slot

__all__ = ["batch", "collect", "label", "learned", "make_loss"]


def collect(config: Any) -> tuple[Slot, ...]:
    """Asks for one response, sampled with the principles in the prompt; training sees the plain prompt."""
    return (Slot("principled", True),)


def label(rollouts: Sequence[Rollout], context: Context) -> list[Rollout]:
    return marked(rollouts, [0] * len(rollouts), "imitated")


def learned(rollout: Rollout, config: Any) -> list[Response]:
    """Returns the principled responses, which the loss imitates."""
    return [response for response in rollout.responses if response.principled]
