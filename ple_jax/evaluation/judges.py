"""Judges, which say which of two responses to a prompt is better; their questions in both orders, and win rates.

A verdict is a float: 1 if the first response is better, 0 if neither is, -1 if the second is, nan if there is none.
`load_judge` makes a judge; `compare` asks it what the cache does not hold yet; `win_rate` counts its verdicts.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from ple_jax import rewards
from ple_jax.core import answers
from ple_jax.core.answers import Cache, Incomplete, digest, key
from ple_jax.core.errors import UserError
from ple_jax.core.types import Reward

WHERE = "config.compare.judge_kwargs"
_AGAIN = "mend it and give the same command again: what one of the same version judged is kept"

Decide = Callable[..., Sequence[float]]


@dataclass(frozen=True)
class Judge:
    """A judge of pairs of responses: `decide` takes (prompts, first, second) and returns one verdict for each pair.

    The fields of the record that it `reads` are given to it by name, a value for each pair, as for rewards.
    """

    name: str
    version: str  # another one wherever equal texts may get other verdicts: stored verdicts go by name and version
    decide: Decide
    symmetric: bool = False  # the order of the two means nothing to it: the other one is not asked
    batch: int = 16  # questions of one call; what finished calls said is kept when a later one fails
    reads: tuple[str, ...] = ()  # of the record, as `Reward.reads`


class Outcomes(NamedTuple):
    """A judge's verdicts on pairs (a, b), as a sees them: 1 if a is better, 0 for a tie, -1 if b is better, nan for none."""

    first: Float64[np.ndarray, " n"]  # a was shown first
    second: Float64[np.ndarray, " n"]  # a was shown second
    combined: Float64[np.ndarray, " n"]  # sign of their mean: orders that disagree are a tie; of one alone where one is nan


# ---------------------------------------------------------------- a reward as the judge


@dataclass(frozen=True)
class _Higher:
    """Decides for the response with the higher reward.

    With a cache each response is scored once, however many others it meets.
    """

    reward: Reward
    tie: float
    cache: Cache | None = None

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], /, **fields: Any) -> list[float]:
        records = [dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True)] or [{}] * len(prompts)
        try:
            found = rewards.score(
                self.reward, [*prompts, *prompts], [*first, *second], records=[*records, *records], cache=self.cache
            )
        except Incomplete as error:  # whose values are of responses, and no verdicts
            raise UserError(str(error)) from error
        a, b = np.split(np.where(np.isfinite(found.values), found.values, np.nan), 2)
        return np.where(np.abs(a - b) <= self.tie, 0.0, np.sign(a - b)).tolist()


def by_reward(name: str, *, kwargs: Mapping[str, Any] | None = None, tie: float = 0.0, backend: str) -> Judge:
    """Makes a judge that prefers the response with the higher reward; it has no verdict if one reward is not finite.

    Args:
        name, kwargs: of a reward, as config.reward has them.
        tie: largest difference of two rewards that is a tie.
        backend: jax or torch: what a reward model runs on.

    Raises:
        UserError: `tie` is negative or not finite, or there is no such reward.
    """
    check_tie(tie)
    reward = rewards.load(name, kwargs or {}, backend=backend)
    version, reads = digest(_versions(reward), tie), rewards.reads(reward)
    return Judge(reward.name, version, _Higher(reward, tie), symmetric=True, batch=max(1, reward.batch // 2), reads=reads)


def check_tie(tie: float) -> None:
    if not 0 <= tie < math.inf:
        raise UserError(f"{WHERE} tie = {tie}: give a difference of at least 0")


def _versions(reward: Reward) -> list[Any]:
    return [reward.name, reward.version, {name: _versions(part) for name, part in reward.parts.items()}]


# ---------------------------------------------------------------- comparing


def compare(
    judge: Judge,
    prompts: Sequence[str],
    a: Sequence[str],
    b: Sequence[str],
    *,
    records: Sequence[Mapping[str, Any]] | None = None,
    cache: Cache,
) -> Outcomes:
    """Asks a judge about every pair of responses, shown in both orders.

    Verdicts are taken from the cache. For the others the judge is asked, `judge.batch` questions at a time, and its verdicts
    are in the cache before it is asked the next ones. Equal questions are asked once, equal responses are a tie, and a
    symmetric judge is shown one order, which counts for both. A question without a verdict is not stored: the next command
    asks it again.

    Args:
        prompts, a, b: of each pair the prompt and the two responses.
        records: what is known of the record of each prompt; needed if the judge reads some of it.
        cache: where verdicts are kept.

    Raises:
        UserError: the judge failed, or gave something else than verdicts; what it said before is kept.
    """
    n, known = len(prompts), records or [{}] * len(prompts)
    if judge.symmetric:
        first = second = _verdicts(judge, prompts, a, b, known, cache)
    else:
        said = _verdicts(judge, [*prompts, *prompts], [*a, *b], [*b, *a], [*known, *known], cache)
        first, second = said[:n], 0.0 - said[n:]
    none = np.isnan(first) & np.isnan(second)
    combined = np.where(none, np.nan, np.sign(np.nan_to_num(first) + np.nan_to_num(second)))
    return Outcomes(first, second, combined)


def pair(first: str, second: str) -> str:
    """Encodes two texts as one JSON text."""
    return json.dumps([first, second])


def _verdicts(
    judge: Judge,
    prompts: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    records: Sequence[Mapping[str, Any]],
    cache: Cache,
) -> Float64[np.ndarray, " n"]:
    read = rewards.read(judge.reads, records, f"judge {judge.name!r}")
    asked = [(*of, *fields.values()) for *of, fields in zip(prompts, first, second, read, strict=True)]
    keys = [
        key(judge.name, judge.version, prompt, pair(one, other), fields)
        for prompt, one, other, fields in zip(prompts, first, second, read, strict=True)
    ]
    decide = replace(judge.decide, cache=cache) if isinstance(judge.decide, _Higher) else judge.decide
    known = answers.answered(
        {k: question for k, question in zip(keys, asked, strict=True) if question[1] != question[2]},
        rewards.by_name(decide, 3, judge.reads),
        lambda given, *columns: _checked(judge, given, len(columns[0])),
        cache=cache,
        batch=judge.batch,
        failed=lambda n: f"judge {judge.name!r} failed on {n} pairs",
        again=_AGAIN,
    )
    return np.array([known.get(k, 0.0) for k in keys], np.float64)  # equal responses were not asked about


def _checked(judge: Judge, given: Any, n: int) -> list[float]:
    try:
        raw = list(given)
        if texts := [value for value in raw if isinstance(value, str | bytes)]:  # which float() would read
            raise TypeError(f"{texts[0]!r}")
        values = [float(value) for value in raw]
    except Exception as error:  # what it gave is the user's code too
        raise UserError(f"judge {judge.name!r} gave no row of numbers ({error}); {_AGAIN}") from error
    if len(values) != n:
        raise UserError(f"judge {judge.name!r} gave {len(values)} verdicts on {n} pairs, which need one each; {_AGAIN}")
    if wrong := [value for value in values if not math.isnan(value) and value not in (1.0, 0.0, -1.0)]:
        raise UserError(
            f"judge {judge.name!r} gave {wrong[0]:g}, and a verdict is 1 (the first is better), 0 (neither), -1 (the second)"
            f" or nan (none); {_AGAIN}"
        )
    return values


def win_rate(outcomes: Outcomes) -> dict[str, float]:
    """Computes how often a won, and how far the judge can be trusted.

    win, tie, loss: shares of the pairs with a verdict; win_rate = win + tie / 2. judged, failed: numbers of pairs with and
    without a verdict. position_bias: among all single verdicts, the share for the response shown first minus the share for
    the one shown second, from -1 to 1. consistency: share of the pairs judged in both orders on which the two agree. A judge
    that always prefers the first has a win rate of 0.5, a position bias of 1 and a consistency of 0; a symmetric one has a
    position bias of 0 and a consistency of 1 by definition. Without any verdict, everything but the counts is nan.

    References:
        Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv:2306.05685, section 3.3: judges
            prefer a position; a win that needs both orders is their remedy (here one of the two may be a tie).
    """
    combined = outcomes.combined[~np.isnan(outcomes.combined)]
    shown = np.concatenate([outcomes.first, -outcomes.second])  # 1: for the response that was shown first
    agree = (outcomes.first == outcomes.second)[~np.isnan(outcomes.first) & ~np.isnan(outcomes.second)]
    win, tie, loss = (_mean(combined == value) for value in (1.0, 0.0, -1.0))
    return {
        "win": win,
        "tie": tie,
        "loss": loss,
        "win_rate": win + tie / 2,
        "position_bias": _mean(shown[~np.isnan(shown)]),
        "consistency": _mean(agree),
        "judged": float(len(combined)),
        "failed": float(len(outcomes.combined) - len(combined)),
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
