"""Lets a judge compare the responses of pairs of methods, and computes win rates."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ple_jax.core.answers import Cache
from ple_jax.core.errors import UserError
from ple_jax.core.secrets import redacted
from ple_jax.evaluation import judges, load_judge
from ple_jax.evaluation.methods import Method, mean
from ple_jax.evaluation.numbers import beside, seeds
from ple_jax.formulas import intervals


class Stored(NamedTuple):
    """A judge that prefers the response with the higher reward, as it is stored beside the responses."""

    measure: str
    tie: float  # largest difference that is one


def open_judge(methods: Sequence[Method], config: Any, backend: str) -> judges.Judge | Stored:
    """Makes the judge that config.compare asks for.

    Judge "reward" without a reward's name in judge_kwargs loads none: the rewards stored beside the responses decide, the
    training reward or with {"which": "second"} the second one.

    Raises:
        UserError: there is no such judge, it does not take these judge_kwargs, no response has the stored reward, or queries
            have fewer responses than config.compare.judge_samples.
    """
    options = config.compare
    kwargs, samples = options.judge_kwargs.to_dict(), methods[0].values["reward"].shape[-1]
    if options.judge_samples > samples:
        raise UserError(f"config.compare.judge_samples is {options.judge_samples}, and every query has {samples} responses")
    if options.judge != "reward" or "name" in kwargs:
        return load_judge.load_judge(options.judge, kwargs, backend=backend)
    which, tie = kwargs.get("which", "training"), kwargs.get("tie", 0.0)
    number = isinstance(tie, int | float) and not isinstance(tie, bool) and 0 <= tie < math.inf
    if set(kwargs) - {"which", "tie"} or which not in ("training", "second") or not number:
        raise UserError(
            f"config.compare.judge_kwargs is {kwargs!r}, and of judge 'reward' it may have which ('training' or 'second': a"
            " stored reward) and tie (a difference of at least 0), or the name, kwargs and tie of a reward to load"
        )
    measure = "reward_second" if which == "second" else "reward"
    if all(np.isnan(method.values[measure]).all() for method in methods):
        raise UserError(f"config.compare.judge_kwargs is {kwargs!r}, and no response has that reward: generate them with it")
    return Stored(measure, float(tie))


def judged(
    pairs: Sequence[tuple[Method, Method]], judge: judges.Judge | Stored, config: Any, out: Path
) -> list[dict[str, Any]]:
    """Computes win rates of every pair of methods, each seen from either side: a row for every ordered pair.

    Of each pair of runs that `beside` makes, sample i of the one to a query is compared with sample i of the other. Every
    answer of a judge is kept in judgements.sqlite. The interval of a rate is over seeds and queries.
    """
    options, rows = config.compare, []
    with Cache(out / "judgements.sqlite") as cache:
        for a, b in pairs:
            both, queries = beside(a, b), judged_queries(a.values["reward"].shape[1], options.judge_queries, config.seed)
            samples = options.judge_samples or a.values["reward"].shape[-1]
            cells = [(i, j, q, s) for i, j in both for q in queries for s in range(samples)]
            found = _verdicts(judge, a, b, cells, cache)
            if not isinstance(judge, Stored):  # which takes its time
                print(f"judged {a.label} against {b.label}: {len(cells)} pairs of responses", flush=True)
            rate = mean(found.combined.reshape(len(both), len(queries), samples)) / 2 + 0.5
            low, high = np.clip(intervals.clustered_ci(rate, seed=config.seed), 0.0, 1.0).tolist()
            for method, against, outcomes, interval in (
                (a, b, found, (low, high)),
                (b, a, _turned(found), (1 - high, 1 - low)),
            ):
                who: dict[str, Any] = {"method": method.label, "against": against.label, "seeds": seeds(a, b)}
                rows.append({**who, **judges.win_rate(outcomes), "low": interval[0], "high": interval[1]})
    return rows


def judged_queries(queries: int, count: int, seed: int) -> list[int]:
    """Draws the queries that are judged, `count` of them or, if that is 0, all, and returns their numbers in file order.

    They are drawn by seed, since files may be sorted. A larger number of them includes those of a smaller one.
    """
    return sorted(np.random.default_rng(seed).permutation(queries)[: count or None].tolist())


def _verdicts(
    judge: judges.Judge | Stored, a: Method, b: Method, cells: Sequence[tuple[int, int, int, int]], cache: Cache
) -> judges.Outcomes:
    """Returns the judge's verdicts on pairs of responses, given as (run of a, run of b, query, sample)."""
    if isinstance(judge, Stored):
        one = np.array([a.values[judge.measure][i, q, s] for i, _, q, s in cells], np.float64)
        other = np.array([b.values[judge.measure][j, q, s] for _, j, q, s in cells], np.float64)
        said = np.where(np.abs(one - other) <= judge.tie, 0.0, np.sign(one - other))  # nan stays nan
        return judges.Outcomes(said, said, said)
    prompts = [a.runs[i].generated.rollouts[q].prompt for i, _, q, _ in cells]
    first = [a.runs[i].generated.rollouts[q].responses[s].text for i, _, q, s in cells]
    second = [b.runs[j].generated.rollouts[q].responses[s].text for _, j, q, s in cells]
    records = [a.runs[i].generated.rollouts[q].record for i, _, q, _ in cells]
    return judges.compare(judge, prompts, first, second, records=records, cache=cache)


def _turned(found: judges.Outcomes) -> judges.Outcomes:
    """Returns the same verdicts from the view of the other response.

    Where the one was shown first, the other was shown second.
    """
    return judges.Outcomes(-found.second, -found.first, -found.combined)


def about(judge: judges.Judge | Stored, config: Any, methods: Sequence[Method]) -> dict[str, Any]:
    """Describes the judge in the words of the config, without headers and queries of addresses, which may hold a key."""

    def shown(kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {k: shown(v) if isinstance(v, Mapping) else v for k, v in kwargs.items() if k != "headers"}

    options, queries = config.compare, methods[0].values["reward"].shape[1]
    return {
        "name": options.judge,
        "kwargs": redacted(shown(options.judge_kwargs.to_dict())),
        "symmetric": isinstance(judge, Stored) or judge.symmetric,
        "queries": min(options.judge_queries or queries, queries),
        "samples": options.judge_samples or methods[0].values["reward"].shape[-1],
    }
