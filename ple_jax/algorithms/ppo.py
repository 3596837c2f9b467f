"""PPO (arXiv:1707.06347) for language models (arXiv:1909.08593, arXiv:2203.02155): a token is an action, values are learned.

`ppo.samples` plain responses are sampled for every query. A token's reward is -coefficient * (log-ratio to the reference),
and the response's own reward is added at its last token. Advantages are computed by GAE from a value head, which is trained
beside the adapter on the same hidden states. The objectives of both are clipped, so that an iteration's responses serve
`optimizer.epochs` passes. Whitening is over an optimiser batch. The head starts at zero and is never exported.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from ple_jax import losses
from ple_jax.algorithms import Context, Needs
from ple_jax.algorithms._parts import importance, measured, pack_all, plain_samples, scores
from ple_jax.core.types import Array, Batch, Loss, Outputs, Rollout, Slot
from ple_jax.formulas.advantages import adaptive_kl, gae, kl_penalised, missing_eos_penalty, whiten

__all__ = ["batch", "collect", "control", "controller", "label", "make_loss", "needs", "prepare"]


def collect(config: Any) -> tuple[Slot, ...]:
    """Asks for `ppo.samples` plain responses."""
    return plain_samples(config.ppo.samples)


def label(rollouts: Sequence[Rollout], context: Context) -> list[Rollout]:
    """Marks every rollout as "sampled", as every response is learned from; the margin is best minus mean score."""
    return measured(rollouts, "sampled")


def batch(rollouts: Sequence[Rollout], context: Context) -> Batch:
    """Packs one optimiser batch of all responses; k = ppo.samples.

    Its data, float32: `scores` and `finished` [query, k]; `valid` [query]; and `normaliser` [query, k], the mean response
    length of the batch in tokens.
    """
    packed = pack_all(rollouts, context.config)
    lengths = packed.response_mask.sum(-1)
    data = {
        "scores": scores(rollouts).astype(np.float32),
        "finished": np.array([[r.finished for r in rollout.responses] for rollout in rollouts], np.float32),
        "normaliser": np.full(lengths.shape, lengths.mean(), np.float32),
    }
    return packed._replace(data=packed.data | data)


def needs(config: Any) -> Needs:
    """Returns the needs: the reference, a value head, and the policy and its values before the iteration's first step."""
    return Needs(reference=True, old_logprobs=True, head="value")


def prepare(batch: Batch, context: Context) -> Batch:
    """Adds `advantages` and `returns` [query, k, response_len], `kl_response` [query, k] and `kl_coefficient` [query].

    `kl_response` is the k1 estimate of the KL to the reference, summed over the tokens of a response, in nats.
    `kl_coefficient` is the coefficient that the KL penalty in the rewards was computed with.
    """
    options, data, mask = context.config.ppo, batch.data, batch.response_mask
    coefficient = context.controller["kl_coefficient"]
    old, reference = data["old_logprobs"], data["reference_logprobs"]
    score = missing_eos_penalty(data["scores"], data["finished"] > 0, penalty=options.missing_eos_penalty)
    rewards = kl_penalised(score, old, reference, mask, coefficient=coefficient, estimator=options.kl_estimator)
    if options.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(data["old_values"], rewards, mask, gamma=options.gamma, lam=options.lam)
    if options.whiten_advantages:
        advantages = whiten(advantages, mask)
    kl = losses.masked_sum(losses.kl_estimate(np.float64(old), np.float64(reference), kind="k1"), mask)
    added = {
        "advantages": advantages,
        "returns": returns,
        "kl_response": kl.astype(np.float32),
        "kl_coefficient": np.full(len(kl), coefficient, np.float32),
    }
    return batch._replace(data=data | added)


def controller(config: Any) -> dict[str, float]:
    """Returns what is carried from one iteration to the next, at the start: the coefficient of the KL penalty."""
    return {"kl_coefficient": config.ppo.kl_coefficient}


def control(controller: Mapping[str, float], metrics: Mapping[str, float], config: Any) -> Mapping[str, float]:
    """Returns the KL coefficient of the next iteration.

    An adaptive coefficient follows the KL at which this iteration's responses were sampled; a fixed one stays.
    """
    options = config.ppo
    if options.kl == "fixed":
        return controller
    responses = config.queries_per_iteration * options.samples
    coefficient = adaptive_kl(
        controller["kl_coefficient"],
        metrics["kl_response"],
        responses,
        target=options.kl_target,
        horizon=options.kl_horizon,
    )
    return {"kl_coefficient": coefficient}


def make_loss(config: Any) -> Loss:
    """Returns the loss `losses.ppo` + ppo.value_weight * `losses.clipped_value`, each the mean over a query's responses.

    Metrics: `policy_loss` and `value_loss`, the two parts; `clipped` and `value_clipped`, the shares of tokens whose ratio
    or value was clipped; `kl_response`, nats to the reference per response when they were sampled (k1); `kl_coefficient`.
    """
    options = config.ppo
    clip, value_clip, weight = options.clip, options.value_clip, options.value_weight
    cap = config.sampling.importance_cap

    def loss(outputs: Outputs, batch: Batch) -> tuple[Array, dict[str, Array]]:
        data, mask = batch.data, batch.response_mask
        policy, clipped = losses.ppo(
            outputs.logprobs, data["old_logprobs"], data["advantages"], mask,
            clip_low=clip, clip_high=clip, normaliser=data["normaliser"], weights=importance(batch, cap),
        )  # fmt: skip
        error, value_clipped = losses.clipped_value(
            outputs.values, data["old_values"], data["returns"], mask, clip=value_clip
        )
        value = losses.masked_sum(error, mask) / data["normaliser"]
        return (policy + weight * value).mean(-1), {
            "policy_loss": policy.mean(-1),
            "value_loss": value.mean(-1),
            "clipped": clipped.mean(-1),
            "value_clipped": losses.masked_mean(array_namespace(value).astype(value_clipped, value.dtype), mask).mean(-1),
            "kl_response": data["kl_response"].mean(-1),
            "kl_coefficient": data["kl_coefficient"],
        }

    return loss
