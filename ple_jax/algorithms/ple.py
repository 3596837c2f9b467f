"""Progressively Label Enhancement (arXiv:2408.02599, Alg. 1): principled above plain responses, or both by their rewards.

A variant is a file that starts with `from ple_jax.algorithms.ple import *` and overrides one of the functions below.
`config` is the whole configuration (configs/default.py); the formulas live in `losses`, `formulas.pairing` and
`formulas.threshold`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from ple_jax import losses
from ple_jax.algorithms import Context, Needs
from ple_jax.algorithms._parts import extremes, normaliser, pack_picks, plain_samples, valued
from ple_jax.core.errors import UserError
from ple_jax.core.types import Array, Batch, Loss, Outputs, Response, Rollout, Slot
from ple_jax.formulas import pairing, threshold

__all__ = ["batch", "collect", "label", "learned", "make_loss", "measures", "needs", "schedule"]


def collect(config: Any) -> tuple[Slot, ...]:
    """Asks for one plain response and `ple.candidates` principled ones.

    With selection=percentile it asks for `ple.samples` plain responses instead.
    """
    if config.ple.selection == "percentile":
        return plain_samples(config.ple.samples)
    return Slot("plain", False), *(Slot("principled", True, sample) for sample in range(config.ple.candidates))


def schedule(config: Any) -> Callable[[int], float]:
    """Returns the schedule of the threshold, iteration -> tau, that the config names (`formulas.threshold.make`)."""
    return threshold.make(
        config.ple.schedule, tau_0=config.ple.tau_0, alpha=config.ple.alpha, iterations=config.iterations
    )


# one piece: its docstring says what every case gives
def label(rollouts: Sequence[Rollout], context: Context) -> list[Rollout]:
    """Decides every pair of an iteration (Alg. 1): fills in tau, margin, decision and the weights of the responses.

    Args:
      rollouts: all queries of the iteration, with responses in the order of `collect`, each with its score.
      context: its tau, in units of the score, which selection=percentile does not use; its iteration, which selects the
        share of selection=percentile (the last share serves all later iterations); and ple.selection, ple.blend and their
        options of its config.

    Returns:
      The same rollouts, labelled. `margin` is the score of the principled response minus that of the plain one. Of several
      principled responses only the best counts (the first of equal ones); the others have weight 0. "blended" pairs carry
      the blend weights; the responses of "ranked" pairs have weight 0, as they are not blended.
      With selection=percentile `margin` is best minus worst score, and the decision is "ranked", or "dropped" where the
      best is no better than the worst. The best response carries the weight of its pair; all others have weight 0.

    Raises:
      UserError: ple.selection or ple.blend is unknown.
    """
    ple, tau = context.config.ple, context.tau
    scores = np.array([[r.score for r in rollout.responses] for rollout in rollouts], np.float64)
    if ple.selection == "percentile":
        margin = scores.max(axis=1) - scores.min(axis=1)
        share = ple.percentile[min(context.iteration, len(ple.percentile) - 1)]
        pair = pairing.percentile(margin, share=share, temperature=ple.percentile_temperature)
        decision = np.where(pair > 0, "ranked", "dropped")
        weights = pair[:, None] * (np.arange(scores.shape[1]) == scores.argmax(axis=1)[:, None])
    else:
        query, best = np.arange(len(scores)), 1 + scores[:, 1:].argmax(1)
        pair = np.stack([scores[:, 0], scores[query, best]], 1)
        margin = pair[:, 1] - pair[:, 0]
        ranked = _ranked(ple.selection, margin, tau)
        decision = np.where(ranked, "ranked", "blended")
        blended = pairing.blend_weights(ple.blend, pair, temperature=ple.blend_temperature) * ~ranked[:, None]
        weights = np.zeros_like(scores)
        weights[:, 0], weights[query, best] = blended.T
    return [
        rollout._replace(
            tau=tau,
            margin=float(margin[i]),
            decision=str(decision[i]),
            responses=tuple(r._replace(weight=float(w)) for r, w in zip(rollout.responses, weights[i], strict=True)),
        )
        for i, rollout in enumerate(rollouts)
    ]


def _ranked(selection: str, margin: np.ndarray, tau: float) -> np.ndarray:
    match selection:
        case "threshold":
            return pairing.threshold(margin, tau)
        case "symmetric":
            return pairing.symmetric(margin, tau)
    raise UserError(f"ple.selection = {selection!r}: choose threshold, symmetric or percentile")


def needs(config: Any) -> Needs:
    """Returns the needs: the reference, where the ranking loss is DPO's or there is a KL term."""
    return Needs(reference=config.ple.rank == "dpo" or config.ple.kl_weight > 0)


def batch(rollouts: Sequence[Rollout], context: Context) -> Batch:
    """Packs labelled rollouts, all queries at once, into one optimiser batch.

    Row 0 of a query is its plain response and row 1 its (best) principled one. But ranked pairs with selection=symmetric,
    and all pairs with selection=percentile, are in the order (loser, winner).

    Returns:
      A Batch with k = 2 and this data, float32, one value per query unless said otherwise:
        ranked: 1 for ranked pairs, 0 for the others.
        weights: [query, 2] blend weights; 0 on ranked pairs.
        pair_weights: factor on the ranking loss. It is 1, except with selection=percentile (`pairing.batch_weights`),
          where dropped pairs have 0 and the others make up for them.
        normaliser: the context's mean length, in tokens; 1 with length_norm=response.
        swapped: 1 where row 0 is the principled response.
        valid: 1 for every query.

    Raises:
      UserError: a response has no tokens, or ple.length_norm or ple.percentile_weights is unknown.
    """
    ple = context.config.ple
    picks = [_order(rollout, ple.selection) for rollout in rollouts]
    packed = pack_picks(rollouts, picks, context.config)
    ranked = np.array([rollout.decision == "ranked" for rollout in rollouts])
    weights = np.array([[r.responses[i].weight for i in pick] for r, pick in zip(rollouts, picks, strict=True)])
    pair_weights = np.ones(len(rollouts))
    swapped = np.array([pick[0] > pick[1] for pick in picks])
    if ple.selection == "percentile":
        pair_weights = pairing.batch_weights(weights[:, 1], how=ple.percentile_weights)
        weights, swapped = np.zeros_like(weights), np.zeros_like(swapped)
    if ple.length_norm not in ("mean", "response"):
        raise UserError(f"ple.length_norm = {ple.length_norm!r}: choose mean or response")
    length = normaliser(context) if ple.length_norm == "mean" else 1.0
    data = {
        "ranked": ranked,
        "weights": weights,
        "pair_weights": pair_weights,
        "normaliser": np.full(len(rollouts), length),
        "swapped": swapped,
    }
    return packed._replace(data=packed.data | {name: value.astype(np.float32) for name, value in data.items()})


def learned(rollout: Rollout, config: Any) -> Sequence[Response]:
    """Returns the responses that a step would learn from: plain and principled ones.

    With several `ple.candidates` only the best principled one counts, by score (`_parts.valued`). With selection=percentile
    the responses are the worst and the best of the plain ones.
    """
    if config.ple.selection == "percentile":
        return extremes(rollout)
    guided = [r for r in rollout.responses if r.principled]
    if config.ple.candidates == 1 or not guided:
        return rollout.responses
    best = max(guided[: config.ple.candidates], key=lambda r: -math.inf if math.isnan(valued(r)) else valued(r))
    return [*[r for r in rollout.responses if not r.principled][:1], best]  # of an evaluation there may be more


def _order(rollout: Rollout, selection: str) -> tuple[int, int]:
    """Returns the indices of the responses that become row 0 and row 1."""
    scores = [r.score for r in rollout.responses]
    if selection == "percentile":
        return int(np.argmin(scores)), int(np.argmax(scores))
    best = 1 + int(np.argmax(scores[1:]))
    # under `threshold` a ranked margin is never negative
    return (best, 0) if rollout.decision == "ranked" and rollout.margin < 0 else (0, best)


# one piece: its docstring says every metric, and the loss is one formula
def make_loss(config: Any) -> Loss:
    """Returns the loss of a `batch`. It is made once per run; all that changes from step to step is in the batch's data.

    rank_weight * ranked * (L_rank + rank_sft_weight * L_sft(winner)) + blend_weight * blended * L_blend
        + kl_weight * KL

    KL is the k2 estimate of KL(policy, reference) (`losses.kl_estimate`) on the plain response, which is the policy's own.
    It is divided as likelihoods are. While the policy has not moved, its gradient is that of the KL of each token; what a
    token does to the KL of later ones is left out.

    Returns:
      A function (outputs, batch) -> (value per query, metrics per query) on numpy, JAX or torch arrays. The step's loss
      is sum(value * valid) / sum(valid) over the optimiser batch. Metrics, each 0 where it does not apply: `ranked`;
      `rank_loss`; `blend_loss`; `kl_loss` (with a kl_weight); `hinge_active`, 1 for a ranked pair whose winner does not
      lead yet, or not by the hinge's margin (divide its sum by that of `ranked`); `lp_plain` and `lp_principled`, nats per
      token, those of loser and winner with selection=percentile.

    Raises:
      UserError: ple.rank is unknown.
    """
    ple = config.ple
    rank = _rank_loss(ple.rank, margin=ple.rank_margin, beta=ple.rank_beta)
    margin = ple.rank_margin if ple.rank == "hinge" else 0.0
    likelihood = losses.mean_logprob if ple.length_norm == "response" else losses.sum_logprob
    rank_weight, rank_sft_weight, blend_weight = ple.rank_weight, ple.rank_sft_weight, ple.blend_weight
    kl_weight = ple.kl_weight

    def loss(outputs: Outputs, batch: Batch) -> tuple[Array, dict[str, Array]]:
        data, mask = batch.data, batch.response_mask
        xp = array_namespace(outputs.logprobs)
        ranked = data["ranked"]
        divisor = xp.clip(data["normaliser"], min=1.0)  # 0 on rows that only fill the shape: 0 / 0 would be nan
        lp = losses.mean_logprob(outputs.logprobs, mask)
        sumlp = likelihood(outputs.logprobs, mask)
        rank_loss = ranked * data["pair_weights"] * rank(outputs, batch)
        sft_loss = ranked * data["pair_weights"] * -sumlp[:, 1] / divisor
        blend_loss = (1 - ranked) * losses.blend(sumlp, data["weights"], normaliser=divisor)
        value = rank_weight * (rank_loss + rank_sft_weight * sft_loss) + blend_weight * blend_loss
        metrics = {
            "ranked": ranked,
            "rank_loss": rank_loss,
            "blend_loss": blend_loss,
            "hinge_active": xp.where(lp[:, 0] - lp[:, 1] + margin > 0, ranked, 0.0),
            "lp_plain": xp.where(data["swapped"] > 0, lp[:, 1], lp[:, 0]),
            "lp_principled": xp.where(data["swapped"] > 0, lp[:, 0], lp[:, 1]),
        }
        if kl_weight:
            kl = likelihood(losses.kl_estimate(outputs.logprobs, data["reference_logprobs"], kind="k2"), mask)
            metrics["kl_loss"] = xp.where(data["swapped"] > 0, kl[:, 1], kl[:, 0]) / divisor
            value = value + kl_weight * metrics["kl_loss"]
        return value, metrics

    return loss


def measures(
    means: Mapping[str, float], before: Mapping[str, Array], after: Mapping[str, Array]
) -> dict[str, float]:
    """Returns the loss's metrics, with log-probabilities after the update and shares of active hinges before and after it.

    The shares, `hinge_active_before` and `hinge_active_after`, are of the ranked pairs. A satisfied hinge teaches nothing;
    the two shares show how many the update satisfied. Log-probabilities are compared across iterations, so all of them are
    those of the policy at the end of an iteration.
    """
    found = {name: value for name, value in means.items() if name != "hinge_active"}
    found |= {name: float(np.mean(after[name])) for name in ("lp_plain", "lp_principled")}
    for when, said in (("before", before), ("after", after)):
        found[f"hinge_active_{when}"] = float(said["hinge_active"].sum() / max(said["ranked"].sum(), 1))
    return found


def _rank_loss(name: str, *, margin: float, beta: float) -> Callable[[Outputs, Batch], Array]:
    """Returns a function (outputs, batch) -> the ranking loss of every query, whether it is ranked or not.

    Raises:
        UserError: `name` is unknown.
    """

    def dpo(outputs: Outputs, batch: Batch) -> Array:
        policy = losses.sum_logprob(outputs.logprobs, batch.response_mask)
        reference = losses.sum_logprob(batch.data["reference_logprobs"], batch.response_mask)
        return losses.dpo(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], beta=beta)

    def by_length(compare: Callable[[Array, Array], Array], outputs: Outputs, batch: Batch) -> Array:
        lp = losses.mean_logprob(outputs.logprobs, batch.response_mask)
        return compare(lp[:, 0], lp[:, 1])

    match name:
        case "hinge":
            return partial(by_length, partial(losses.hinge, margin=margin))
        case "hinge_prob":
            return partial(by_length, losses.hinge_prob)
        case "sigmoid":
            return partial(by_length, partial(losses.sigmoid, beta=beta))
        case "dpo":
            return dpo
    raise UserError(f"ple.rank = {name!r}: choose hinge, hinge_prob, sigmoid or dpo")
