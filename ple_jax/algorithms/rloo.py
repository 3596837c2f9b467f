"""RLOO, REINFORCE with a leave-one-out baseline (arXiv:2402.14740): a response is one action.

`rloo.samples` plain responses are sampled for every query. The reward less `rloo.beta` times the log-ratio to the reference
is compared with the mean of the other samples'.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ple_jax import losses
from ple_jax.algorithms import Context, Needs
from ple_jax.algorithms._parts import importance, measured, pack_all, plain_samples, scores
from ple_jax.core.types import Array, Batch, Loss, Outputs, Rollout, Slot
from ple_jax.formulas.advantages import group_advantages

__all__ = ["batch", "collect", "label", "make_loss", "needs", "prepare"]


def collect(config: Any) -> tuple[Slot, ...]:
    """Asks for `rloo.samples` plain responses."""
    return plain_samples(config.rloo.samples)


def label(rollouts: Sequence[Rollout], context: Context) -> list[Rollout]:
    """Marks every rollout as "compared"; the margin is best minus mean score.

    The advantages also depend on the reference, so `prepare` computes them.
    """
    return measured(rollouts, "compared")


def batch(rollouts: Sequence[Rollout], context: Context) -> Batch:
    """Packs one optimiser batch of all responses; k = rloo.samples.

    Its data, float32: `scores` [query, k]; `valid` [query], which is 1.
    """
    packed = pack_all(rollouts, context.config)
    return packed._replace(data=packed.data | {"scores": scores(rollouts).astype(np.float32)})


def needs(config: Any) -> Needs:
    """Returns the needs: the reference, and the policy before the iteration's first step."""
    return Needs(reference=True, old_logprobs=True)


def prepare(batch: Batch, context: Context) -> Batch:
    """Adds `advantages` [query, k], once old and reference log-probabilities are there."""
    data = batch.data
    ratio = losses.sum_logprob(np.float64(data["old_logprobs"]) - data["reference_logprobs"], batch.response_mask)
    advantages = group_advantages(data["scores"] - context.config.rloo.beta * ratio, kind="rloo")
    return batch._replace(data=data | {"advantages": advantages.astype(np.float32)})


def make_loss(config: Any) -> Loss:
    """Returns the loss `losses.rloo`, mean over a query's responses; metric `clipped`, the share of clipped responses."""
    clip = {"clip_low": config.rloo.clip, "clip_high": config.rloo.clip}
    cap = config.sampling.importance_cap

    def loss(outputs: Outputs, batch: Batch) -> tuple[Array, dict[str, Array]]:
        sums = losses.sum_logprob(outputs.logprobs, batch.response_mask)
        old = losses.sum_logprob(batch.data["old_logprobs"], batch.response_mask)
        value, clipped = losses.rloo(sums, old, batch.data["advantages"], weights=importance(batch, cap, whole=True), **clip)
        return value.mean(-1), {"clipped": clipped.mean(-1)}

    return loss
