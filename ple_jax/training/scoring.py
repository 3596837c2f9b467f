"""Scores responses, and leaves out rollouts without a finite reward."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ple_jax import rewards
from ple_jax.algorithms import Algorithm, Context
from ple_jax.core.answers import AGAIN, Cache
from ple_jax.core.errors import UserError
from ple_jax.core.types import Response, Reward, Rollout
from ple_jax.training.journal import write
from ple_jax.training.run import Session


def sorted_out(
    rollouts: Sequence[Rollout], name: str, config: Any, reward: Reward, session: Session
) -> tuple[list[Rollout], list[Rollout]]:
    """Scores rollouts, and leaves out those that cannot be used (`quarantine`).

    Returns:
        All rollouts with their rewards, and those of them that can be used, with their scores too.
    """
    scored = score(rollouts, reward, session)
    kept = quarantine(scored, name, reward, session, limit=config.reward.max_bad_share)
    return scored, transformed(kept, config.reward)


def score(rollouts: Sequence[Rollout], reward: Reward, session: Session) -> list[Rollout]:
    """Fills in the rewards, which are told the plain query whatever the prompt was; nan where a reward is not finite."""
    session.progress.phase("score", 1)
    scored = filled(rollouts, reward, session.cache)
    session.progress.advance(1)
    return scored


def filled(rollouts: Sequence[Rollout], reward: Reward, cache: Cache | None) -> list[Rollout]:
    """Returns the rollouts with their responses' rewards and the parts of these; a reward that is not finite becomes nan."""
    found = given(rollouts, reward, cache)
    values, at = np.where(np.isfinite(found.values), found.values, np.nan), iter(range(len(found.values)))

    def fill(response: Response) -> Response:
        i = next(at)
        parts = {name: float(part[i]) for name, part in found.parts.items()}
        return response._replace(reward=float(values[i]), parts=parts)

    return [rollout._replace(responses=tuple(fill(r) for r in rollout.responses)) for rollout in rollouts]


def values(rollouts: Sequence[Rollout], reward: Reward, session: Session) -> list[np.ndarray]:
    """Computes a reward that nothing is trained on, for every response of every rollout.

    Returns:
        An array [response] for every rollout; values that are not finite stay as they are.
    """
    found = given(rollouts, reward, session.cache).values
    return np.split(found, np.cumsum([len(rollout.responses) for rollout in rollouts])[:-1])


def given(rollouts: Sequence[Rollout], reward: Reward, cache: Cache | None) -> rewards.Scored:
    """Computes a reward for every response of every rollout, one after the other; takes what it can from the cache."""
    asked = [(rollout, response.text) for rollout in rollouts for response in rollout.responses]
    prompts, records = [rollout.prompt for rollout, _ in asked], [rollout.record for rollout, _ in asked]
    return rewards.score(reward, prompts, [text for _, text in asked], records=records, cache=cache)


def quarantine(rollouts: Sequence[Rollout], name: str, reward: Reward, session: Session, *, limit: float) -> list[Rollout]:
    """Returns the rollouts whose rewards are all finite. The others go to quarantine/`name`.jsonl with their texts.

    Args:
        limit: the largest share of the others, config.reward.max_bad_share.

    Raises:
        UserError: if there are more of them, or no rollout is left.
    """
    good = [rollout for rollout in rollouts if not any(math.isnan(r.reward) for r in rollout.responses)]
    bad = [rollout for rollout in rollouts if any(math.isnan(r.reward) for r in rollout.responses)]
    path = session.workdir / "quarantine" / f"{name}.jsonl"
    if not bad:
        path.unlink(missing_ok=True)  # of an attempt before, with a reward that was mended since
        return good
    write(path, bad)
    first = bad[0]
    text = next(r.text for r in first.responses if math.isnan(r.reward))
    why = next(filter(None, (part.failure() for part in rewards.leaves(reward))), "")
    what = f"gave nothing ({why})" if why else "is not finite"
    again = "mend the server and give the same command again: what was sampled is kept" if why else AGAIN
    says = (
        f"reward {reward.name} {what} for {len(bad)} of {len(rollouts)} queries ({path}), such as prompt"
        f" {first.prompt[:80]!r}, response {text[:80]!r}"
    )
    if len(bad) > limit * len(rollouts) or not good:
        raise UserError(
            f"{says}; that is more than reward.max_bad_share={limit}: {again}; or raise --config.reward.max_bad_share"
        )
    session.progress.log(f"{says}; they are left out")
    return good


def labelled_again(rollouts: Sequence[Rollout], algorithm: Algorithm, context: Context) -> list[Rollout]:
    """Returns scored rollouts as the algorithm labels them now: nothing of an earlier label is left when it is asked."""
    bare = [r._replace(responses=tuple(x._replace(weight=math.nan) for x in r.responses)) for r in rollouts]
    bare = [rollout._replace(tau=math.nan, margin=math.nan, decision="") for rollout in bare]
    return algorithm.label(transformed(bare, context.config.reward), context)


def transformed(rollouts: Sequence[Rollout], options: Any) -> list[Rollout]:
    """Fills in the scores: the rewards less their length penalties, transformed with statistics of all of them.

    Args:
        options: config.reward.
    """
    scores = iter(rewards.transform(net_rewards(rollouts, options.length_penalty), options.transform))
    return [
        rollout._replace(responses=tuple(r._replace(score=float(next(scores))) for r in rollout.responses))
        for rollout in rollouts
    ]


def net_rewards(rollouts: Sequence[Rollout], penalty: float) -> np.ndarray:
    """Computes the reward of every response less a penalty for each of its tokens: [response], in order.

    A reward that grows with length is optimised by length first (Singhal et al., arXiv:2310.03716).
    """
    return np.array([r.reward - penalty * len(r.tokens) for rollout in rollouts for r in rollout.responses])
