"""Direct preference optimisation (arXiv:2305.18290) and IPO (arXiv:2310.12036), offline or iterative.

Offline (`dpo.samples` = 0), it trains on the records' chosen and rejected answers. Iterative, with n samples, it trains on
best and worst of n plain responses by reward, drawn anew in every iteration; the reference stays where the run began.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from ple_jax import losses
from ple_jax.algorithms import Context, Needs
from ple_jax.algorithms._parts import pack_picks, plain_samples
from ple_jax.core.errors import UserError
from ple_jax.core.types import Array, Batch, Loss, Outputs, Rollout, Slot

__all__ = ["batch", "collect", "label", "make_loss", "measures", "needs"]


def collect(config: Any) -> tuple[Slot, ...]:
    """Asks for the record's rejected and chosen answers, or for `dpo.samples` plain responses.

    Raises:
        UserError: `dpo.samples` is 1.
    """
    if config.dpo.samples == 1:
        raise UserError("config.dpo.samples is 1: a pair needs two responses; 0 takes the records' own pairs")
    if config.dpo.samples:
        return plain_samples(config.dpo.samples)
    return Slot("rejected", source="rejected"), Slot("chosen", source="completion")


def label(rollouts: Sequence[Rollout], context: Context) -> list[Rollout]:
    """Decides "ranked", or "dropped" where no response is better than another; the winner of a ranked pair has weight 1.

    `margin` is the winner's score minus the loser's. Pairs of the records are always ranked, whatever their margin.
    """
    labelled, config = [], context.config
    for rollout in rollouts:
        loser, winner = _pair(rollout, config)
        margin = rollout.responses[winner].score - rollout.responses[loser].score
        ranked = not config.dpo.samples or margin > 0
        responses = [r._replace(weight=float(ranked and i == winner)) for i, r in enumerate(rollout.responses)]
        decision = "ranked" if ranked else "dropped"
        labelled.append(rollout._replace(responses=tuple(responses), margin=margin, decision=decision))
    return labelled


def _pair(rollout: Rollout, config: Any) -> tuple[int, int]:
    """Returns the indices of the loser and the winner among the responses."""
    if not config.dpo.samples:
        return 0, 1
    scores = [r.score for r in rollout.responses]
    return int(np.argmin(scores)), int(np.argmax(scores))


def batch(rollouts: Sequence[Rollout], context: Context) -> Batch:
    """Packs one optimiser batch of pairs (loser, winner); k = 2.

    Its data, float32, one value per query: `kept`, a factor on the loss, which is 0 for dropped pairs and makes the mean
    over the batch the mean over the kept pairs; `valid`, which is 1.
    """
    packed = pack_picks(rollouts, [_pair(rollout, context.config) for rollout in rollouts], context.config)
    kept = np.array([rollout.decision == "ranked" for rollout in rollouts], np.float32)
    return packed._replace(data=packed.data | {"kept": kept * len(kept) / max(kept.sum(), 1)})


def needs(config: Any) -> Needs:
    return Needs(reference=True)


def make_loss(config: Any) -> Loss:
    """Returns the loss that `dpo.loss` names.

    Metrics: `ranked`, and of the implicit reward `reward_accuracy` and `reward_margin` (nats); all 0 for a dropped pair.
    """
    options = config.dpo
    beta, smoothing, kind = options.beta, options.label_smoothing, options.loss
    # IPO's target is per token, as TRL has it
    likelihood = losses.mean_logprob if kind == "ipo" else losses.sum_logprob

    def loss(outputs: Outputs, batch: Batch) -> tuple[Array, dict[str, Array]]:
        xp = array_namespace(outputs.logprobs)
        policy = likelihood(outputs.logprobs, batch.response_mask)
        reference = likelihood(batch.data["reference_logprobs"], batch.response_mask)
        pair = policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1]
        if kind == "ipo":
            value = losses.ipo(*pair, beta=beta)
        else:
            value = losses.dpo(*pair, beta=beta, label_smoothing=smoothing)
        margin = beta * ((policy[:, 1] - reference[:, 1]) - (policy[:, 0] - reference[:, 0]))
        kept = batch.data["kept"]
        ranked = xp.astype(kept > 0, value.dtype)
        return value * kept, {
            "ranked": ranked,
            "reward_accuracy": ranked * xp.astype(margin > 0, value.dtype),
            "reward_margin": ranked * margin,
        }

    return loss


def measures(means: Mapping[str, float], before: Mapping[str, Array], after: Mapping[str, Array]) -> dict[str, float]:
    """Returns the loss's metrics, with those of the implicit reward as means over the pairs that were kept; 0 of none.

    The loss may be a variant's, which has others.
    """
    kept = means.get("ranked") or 1.0
    return {**means, **{name: means[name] / kept for name in ("reward_accuracy", "reward_margin") if name in means}}
