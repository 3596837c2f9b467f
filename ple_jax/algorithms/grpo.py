"""GRPO (arXiv:2402.03300) and its relatives Dr. GRPO and DAPO: rewards compared within the samples of a query.

`grpo.samples` plain responses are sampled for every query. The advantage of a response is its reward compared with the
others', the same for all of its tokens. The surrogate is clipped, so that an iteration's responses serve
`optimizer.epochs` passes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ple_jax import losses
from ple_jax.algorithms import Context, Needs
from ple_jax.algorithms._parts import importance, pack_all, plain_samples, scores
from ple_jax.core.types import Array, Batch, Loss, Outputs, Rollout, Slot
from ple_jax.formulas.advantages import group_advantages

__all__ = ["batch", "collect", "label", "make_loss", "needs"]


def collect(config: Any) -> tuple[Slot, ...]:
    """Asks for `grpo.samples` plain responses."""
    return plain_samples(config.grpo.samples)


def label(rollouts: Sequence[Rollout], context: Context) -> list[Rollout]:
    """Sets the weights of the responses to their advantages, and the margin to best minus mean score.

    The decision is "compared", or "dropped" where all scores are equal and nothing is learned.
    """
    found = scores(rollouts)
    weights = group_advantages(found, kind="dr_grpo" if context.config.grpo.loss == "dr_grpo" else "grpo")
    return [
        rollout._replace(
            margin=float(own.max() - own.mean()),
            decision="compared" if own.max() > own.min() else "dropped",
            responses=tuple(r._replace(weight=float(w)) for r, w in zip(rollout.responses, row, strict=True)),
        )
        for rollout, own, row in zip(rollouts, found, weights, strict=True)
    ]


def batch(rollouts: Sequence[Rollout], context: Context) -> Batch:
    """Packs one optimiser batch of all responses; k = grpo.samples.

    Its data, float32: `advantages` [query, k]; `normaliser` [query, k], the tokens by which a response's loss is divided
    (`losses.grpo`); `valid` [query], which is 1.
    """
    config = context.config
    packed, limit = pack_all(rollouts, config), config.sampling.max_new_tokens
    lengths = packed.response_mask.sum(-1)
    normaliser = {"grpo": lengths, "dr_grpo": np.full_like(lengths, limit), "dapo": np.full(lengths.shape, lengths.mean())}
    data = {
        "advantages": np.array([[r.weight for r in rollout.responses] for rollout in rollouts], np.float32),
        "normaliser": np.maximum(normaliser[config.grpo.loss], 1).astype(np.float32),
    }
    return packed._replace(data=packed.data | data)


def needs(config: Any) -> Needs:
    """Returns the needs: the policy before the iteration's first step, and the reference where grpo.beta is not 0."""
    return Needs(reference=config.grpo.beta > 0, old_logprobs=True)


def make_loss(config: Any) -> Loss:
    """Returns the loss `losses.grpo`, mean over a query's responses; metric `clipped`, the share of clipped tokens."""
    options, cap = config.grpo, config.sampling.importance_cap
    beta, clip = options.beta, {"clip_low": options.clip_low, "clip_high": options.clip_high}

    def loss(outputs: Outputs, batch: Batch) -> tuple[Array, dict[str, Array]]:
        data = batch.data
        value, clipped = losses.grpo(
            outputs.logprobs, data["old_logprobs"], data.get("reference_logprobs"), data["advantages"], batch.response_mask,
            beta=beta, normaliser=data["normaliser"], weights=importance(batch, cap), **clip,
        )  # fmt: skip
        return value.mean(-1), {"clipped": clipped.mean(-1)}

    return loss
