"""Small parts of which several algorithms are made."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from ple_jax import losses
from ple_jax.algorithms import Context
from ple_jax.core.batches import pack, response_width
from ple_jax.core.errors import UserError
from ple_jax.core.types import Batch, Response, Rollout, Slot


def plain_samples(count: int) -> tuple[Slot, ...]:
    """So many responses to the plain prompt."""
    return tuple(Slot("plain", sample=sample) for sample in range(count))


def scores(rollouts: Sequence[Rollout]) -> Float64[np.ndarray, "query k"]:
    """Of every response."""
    return np.array([[r.score for r in rollout.responses] for rollout in rollouts], np.float64)


def all_plain(rollout: Rollout, config: Any) -> list[Response]:
    """The responses to the plain prompt, the record's own among them."""
    return [response for response in rollout.responses if not response.principled]


def normaliser(context: Context) -> float:
    """C, tokens: what a summed log-probability is divided by, of an earlier sample than the one that is trained on.

    Raises:
        UserError: the context was made without one.
    """
    if not context.mean_length > 0:  # nan too
        raise UserError(
            f"the context's mean_length is {context.mean_length}: give the mean tokens of an earlier sample's responses,"
            " Context(config, mean_length=...)"
        )
    return context.mean_length


def extremes(rollout: Rollout) -> list[Response]:
    """The worst and the best of the plain responses, by reward, the first of equals; nothing where none has a reward."""
    plain = [r for r in rollout.responses if not r.principled and not math.isnan(r.reward)]
    return [choose(plain, key=lambda r: r.reward) for choose in (min, max)] if plain else []


def importance(batch: Batch, cap: float, *, whole: bool = False) -> Any:
    """`losses.truncated_importance` of the tokens, or of whole responses; 1 where config.sampling.importance_cap is 0."""
    if not cap:
        return 1.0
    policy, sampler, mask = batch.data["old_logprobs"], batch.data["sampler_logprobs"], batch.response_mask
    if not whole:
        return losses.truncated_importance(policy, sampler, mask, cap=cap)
    policy, sampler = (losses.sum_logprob(x, mask) for x in (policy, sampler))
    return losses.truncated_importance(policy, sampler, mask.any(-1), cap=cap)


def measured(rollouts: Sequence[Rollout], decision: str) -> list[Rollout]:
    """The rollouts with one decision for all; margin is best minus mean score."""
    return [
        rollout._replace(margin=float(own.max() - own.mean()), decision=decision)
        for rollout, own in zip(rollouts, scores(rollouts), strict=True)
    ]


def pack_picks(rollouts: Sequence[Rollout], picks: Sequence[Sequence[int]], config: Any) -> Batch:
    """`core.batches.pack` in the shapes of config.sampling, and of the records' own answers, which may be longer."""
    longest = max(len(rollout.responses[i].tokens) for rollout, some in zip(rollouts, picks, strict=True) for i in some)
    width = response_width(longest, new=config.sampling.max_new_tokens, most=config.task.max_answer_tokens)
    return pack(rollouts, picks, prompt_multiple=config.sampling.bucket, response_len=width)


def pack_all(rollouts: Sequence[Rollout], config: Any) -> Batch:
    """All responses of every query, in the order in which they were collected."""
    return pack_picks(rollouts, [range(len(rollout.responses)) for rollout in rollouts], config)
