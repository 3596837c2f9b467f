"""On-policy self-distillation: the principles are the teacher's privileged context (TRL's experimental SDFT; also OPSD).

Of all methods here its idea is the closest to PLE's: the policy answers the plain prompt and is pulled, token by token of
its own answer, towards what it would say with the principles in its prompt. No reward is used. `losses.distillation` says
where TRL's version differs.
"""

from collections.abc import Sequence
from typing import Any

from ple_jax import losses
from ple_jax.algorithms import Context, Needs
from ple_jax.algorithms._imitation import batch, marked
from ple_jax.algorithms._parts import all_plain as learned
from ple_jax.algorithms._parts import importance
from ple_jax.core.types import Array, Batch, Loss, Outputs, Rollout, Slot

__all__ = ["batch", "collect", "label", "learned", "make_loss", "needs"]


def collect(config: Any) -> tuple[Slot, ...]:
    """Asks for one plain response."""
    return (Slot("plain"),)


def label(rollouts: Sequence[Rollout], context: Context) -> list[Rollout]:
    return marked(rollouts, [0] * len(rollouts), "distilled")


def needs(config: Any) -> Needs:
    """Returns the needs: log-probabilities of the policy before the iteration's first step.

    They are taken after the plain prompt and, as the teacher's, after the principled one.
    """
    return Needs(old_logprobs=True, teacher=True)


def make_loss(config: Any) -> Loss:
    """Returns the loss `losses.distillation`.

    Metrics: `teacher_gap`, teacher minus policy in nats per token, and `clipped`, the share of clipped tokens.
    """
    clip = {"clip_low": config.self_distillation.clip, "clip_high": config.self_distillation.clip}
    cap = config.sampling.importance_cap

    def loss(outputs: Outputs, batch: Batch) -> tuple[Array, dict[str, Array]]:
        data, mask, logprobs = batch.data, batch.response_mask[:, 0], outputs.logprobs[:, 0]
        teacher, old = data["teacher_logprobs"][:, 0], data["old_logprobs"][:, 0]
        weights = importance(batch, cap)
        value, clipped = losses.distillation(
            logprobs, teacher, old, mask, normaliser=data["normaliser"], weights=weights[:, 0] if cap else 1.0, **clip
        )
        return value, {"teacher_gap": losses.mean_logprob(teacher - logprobs, mask), "clipped": clipped}

    return loss
