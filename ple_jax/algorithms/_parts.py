"""Small parts that several algorithms share."""

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
    """Returns the slots that ask for `count` responses to the plain prompt."""
    return tuple(Slot("plain", sample=sample) for sample in range(count))


def scores(rollouts: Sequence[Rollout]) -> Float64[np.ndarray, "query k"]:
    """Returns the score (the transformed reward) of every response."""
    return np.array([[r.score for r in rollout.responses] for rollout in rollouts], np.float64)


def all_plain(rollout: Rollout, config: Any) -> list[Response]:
    """Returns the responses to the plain prompt, including the record's own answers."""
    return [response for response in rollout.responses if not response.principled]


def normaliser(context: Context) -> float:
    """Returns C, by which summed log-probabilities are divided: the mean response length of an earlier sample, in tokens.

    Raises:
        UserError: the context was made without a mean length.
    """
    if not context.mean_length > 0:  # nan too
        raise UserError(
            f"the context's mean_length is {context.mean_length}: give the mean tokens of an earlier sample's responses,"
            " Context(config, mean_length=...)"
        )
    return context.mean_length


def valued(response: Response) -> float:
    """Returns the score of a response, by which it is chosen, or its reward where nothing has a score: held-out queries."""
    return response.reward if math.isnan(response.score) else response.score


def extremes(rollout: Rollout) -> list[Response]:
    """Returns the worst and the best of the plain responses by score (`valued`), of equal ones the first.

    The list is empty where no plain response has a reward.
    """
    plain = [r for r in rollout.responses if not r.principled and not math.isnan(valued(r))]
    return [choose(plain, key=valued) for choose in (min, max)] if plain else []


def importance(batch: Batch, cap: float, *, whole: bool = False) -> Any:
    """Computes `losses.truncated_importance` of every token, or of every response if `whole`.

    The result is 1 where `cap` (config.sampling.importance_cap) is 0.
    """
    if not cap:
        return 1.0
    policy, sampler, mask = batch.data["old_logprobs"], batch.data["sampler_logprobs"], batch.response_mask
    if not whole:
        return losses.truncated_importance(policy, sampler, mask, cap=cap)
    policy, sampler = (losses.sum_logprob(x, mask) for x in (policy, sampler))
    return losses.truncated_importance(policy, sampler, mask.any(-1), cap=cap)


def measured(rollouts: Sequence[Rollout], decision: str) -> list[Rollout]:
    """Returns the rollouts, all with the same decision, and with the margin: best minus mean score."""
    return [
        rollout._replace(margin=float(own.max() - own.mean()), decision=decision)
        for rollout, own in zip(rollouts, scores(rollouts), strict=True)
    ]


def pack_picks(rollouts: Sequence[Rollout], picks: Sequence[Sequence[int]], config: Any) -> Batch:
    """Packs the picked responses with `core.batches.pack`, in the shapes of config.sampling.

    The response arrays are wider where the records' own answers are longer.
    """
    longest = max(len(rollout.responses[i].tokens) for rollout, some in zip(rollouts, picks, strict=True) for i in some)
    width = response_width(longest, new=config.sampling.max_new_tokens, most=config.task.max_answer_tokens)
    return pack(rollouts, picks, prompt_multiple=config.sampling.bucket, response_len=width)


def pack_all(rollouts: Sequence[Rollout], config: Any) -> Batch:
    """Packs all responses of every query, in the order in which they were collected."""
    return pack_picks(rollouts, [range(len(rollout.responses)) for rollout in rollouts], config)
