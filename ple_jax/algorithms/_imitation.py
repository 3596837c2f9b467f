"""Shared parts of supervised fine-tuning, context distillation and RAFT: the likelihood of one response per query."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ple_jax import losses
from ple_jax.algorithms import Context
from ple_jax.algorithms._parts import normaliser, pack_picks
from ple_jax.core.types import Array, Batch, Loss, Outputs, Rollout


def marked(rollouts: Sequence[Rollout], picks: Sequence[int], decision: str) -> list[Rollout]:
    """Returns the rollouts with the given decision, with weight 1 on the picked response of each and 0 on the others."""
    return [
        rollout._replace(
            decision=decision,
            responses=tuple(r._replace(weight=float(i == pick)) for i, r in enumerate(rollout.responses)),
        )
        for rollout, pick in zip(rollouts, picks, strict=True)
    ]


def batch(rollouts: Sequence[Rollout], context: Context) -> Batch:
    """Packs one optimiser batch of the responses with weight 1; k = 1.

    Its data, float32, one value per query: `normaliser`, the context's mean length in tokens; `valid`, which is 1.
    """
    picks = [(int(np.argmax([r.weight for r in rollout.responses])),) for rollout in rollouts]
    packed = pack_picks(rollouts, picks, context.config)
    return packed._replace(data=packed.data | {"normaliser": np.full(len(rollouts), normaliser(context), np.float32)})


def make_loss(config: Any) -> Loss:
    """Returns the cross-entropy loss `losses.nll`, in nats per token of an average response; metric `lp`, nats per token."""

    def loss(outputs: Outputs, batch: Batch) -> tuple[Array, dict[str, Array]]:
        logprobs, mask = outputs.logprobs[:, 0], batch.response_mask[:, 0]
        value = losses.nll(logprobs, mask, normaliser=batch.data["normaliser"])
        return value, {"lp": losses.mean_logprob(logprobs, mask)}

    return loss
