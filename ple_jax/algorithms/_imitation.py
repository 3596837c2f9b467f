"""What supervised fine-tuning, context distillation and RAFT share: likelihood of one response of every query."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ple_jax import losses
from ple_jax.algorithms import Context
from ple_jax.algorithms._parts import normaliser, pack_picks
from ple_jax.core.types import Array, Batch, Loss, Outputs, Rollout


def marked(rollouts: Sequence[Rollout], picks: Sequence[int], decision: str) -> list[Rollout]:
    """The rollouts with weight 1 on the picked response of each and 0 on the others."""
    return [
        rollout._replace(
            decision=decision,
            responses=tuple(r._replace(weight=float(i == pick)) for i, r in enumerate(rollout.responses)),
        )
        for rollout, pick in zip(rollouts, picks, strict=True)
    ]


def batch(rollouts: Sequence[Rollout], context: Context) -> Batch:
    """One optimiser batch of the responses with weight 1, k = 1.

    Its data, float32 per query: `normaliser`, the context's mean length in tokens; `valid`, 1.
    """
    picks = [(int(np.argmax([r.weight for r in rollout.responses])),) for rollout in rollouts]
    packed = pack_picks(rollouts, picks, context.config)
    return packed._replace(data=packed.data | {"normaliser": np.full(len(rollouts), normaliser(context), np.float32)})


def make_loss(config: Any) -> Loss:
    """Cross-entropy of a response, in nats per token of an average one (`losses.nll`); metric `lp`, nats per token."""

    def loss(outputs: Outputs, batch: Batch) -> tuple[Array, dict[str, Array]]:
        logprobs, mask = outputs.logprobs[:, 0], batch.response_mask[:, 0]
        value = losses.nll(logprobs, mask, normaliser=batch.data["normaliser"])
        return value, {"lp": losses.mean_logprob(logprobs, mask)}

    return loss
