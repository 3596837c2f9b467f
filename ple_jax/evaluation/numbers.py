"""The numbers of a comparison: measures, costs, curves and tests of every method."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ple_jax.evaluation import describe, frontier, harness
from ple_jax.evaluation.methods import MEASURED, Entry, Method, mean
from ple_jax.formulas import intervals
from ple_jax.formulas.texts import gain_by_length
from ple_jax.training import costs

TESTED = ("reward", "reward_second")


def described(methods: Sequence[Method], seed: int) -> list[dict[str, Any]]:
    """Computes all measures of every method, costs included: those of every seed, and their means over seeds."""
    budget = common_budget(methods)
    rows = []
    for method in methods:
        means = {key: mean(method.by_query(key)) for key in MEASURED}  # one a seed
        runs = []
        for i, run in enumerate(method.runs):
            values = {**describe.describe(run.generated), **{key: float(means[key][i]) for key in MEASURED}, **spent(run)}
            if "reward_second" in values:
                values["bad_reward_second"] = float(np.isnan(method.values["reward_second"][i]).mean())
            values["heldout_area"] = area(run.lines, budget)
            values |= tax(run)
            kept = {key: value for key, value in values.items() if not math.isnan(value)}
            where = {"seed": run.seed, "folder": str(run.folder), "iteration": run.generated.settings["iteration"]}
            runs.append({**where, "measures": kept, "curve": curve(run.lines)})
        shared = [key for key in runs[0]["measures"] if all(key in run["measures"] for run in runs)]
        spans = {key: intervals.clustered_ci(method.by_query(key), seed=seed) for key in MEASURED}
        rows.append(
            {
                "label": method.label,
                "trained": method.trained,
                "seeds": [run.seed for run in method.runs],
                "measures": {key: float(np.mean([run["measures"][key] for run in runs])) for key in shared},
                "intervals": {key: interval for key, interval in spans.items() if key in shared},
                "runs": runs,
                "by_query": {key: method.by_query(key).tolist() for key in TESTED},
            }
        )
    return rows


TAX, CHANGE = "tax ", "tax change "  # how measures of tasks begin: the value, and how far it is from that before training


def tax(run: Entry) -> dict[str, float]:
    """Reads what --mode=harness found of exactly the policy that gave the responses.

    Names begin with `TAX` for values, and with `CHANGE` for differences from the value before training.
    """
    found = {}
    for row in harness.of_workdir(run.workdir, run.point) if run.point or not run.trained else ():
        own = row["settings"]  # figures of other settings have a name, and a column, of their own
        name = f"{row['task']} {row['measure']}" + (f", first {own['answers_to']}" if own["answers_to"] else "")
        name += "" if own["fewshot"] is None else f", {own['fewshot']} shots"
        if (value := row["after"] if run.trained else row["before"]) is not None:
            found[TAX + name] = value
        if run.trained and row["difference"] is not None:
            found[CHANGE + name] = row["difference"]
    return found


def spent(run: Entry) -> dict[str, float]:
    """Returns what training had cost when it had made the policy that gave the responses.

    For the last policy of a run the costs are from summary.json, for one at the end of another iteration and for that of an
    unfinished run from metrics.jsonl, and for one within an iteration, of which fewer are known, from its evaluation. A base
    model's costs are 0. Those of a start with an adapter are not known: {}.
    """
    if not run.trained:
        known = run.generated.settings["adapter"] is None
        return dict.fromkeys((*costs.COUNTERS, "wall_seconds"), 0) if known else {}
    if run.point is not None and run.earlier:
        own = [line for line in run.lines if line["iteration"] == run.point["iteration"] and "total_seconds" in line]
        if own and not run.point["within"]:
            return _totals(own[-1])
        names = {"generated_tokens": "generated_tokens", "training_tokens": "training_tokens", "seconds": "train_seconds"}
        return {name: run.point[key] for key, name in names.items() if run.point.get(key) is not None}
    if not run.summary:
        return _totals(last(run.lines))
    phases = run.summary.get("seconds", {})
    found = {**run.summary, **{f"{phase}_seconds": value for phase, value in phases.items()}}
    if phases:
        found["train_seconds"] = sum(value for phase, value in phases.items() if phase != "evaluate")
    wanted = (*costs.COUNTERS, "train_seconds", "wall_seconds", "evaluation_tokens", "peak_memory_bytes")
    return {key: found[key] for key in (*wanted, *(f"{phase}_seconds" for phase in phases)) if key in found}


def _totals(line: Mapping[str, Any]) -> dict[str, float]:
    """Returns the counters in a line of metrics.jsonl by their names in summary.json; {} if it has none."""
    totals = {key.removeprefix("total_"): value for key, value in line.items() if key.startswith("total_")}
    return {"train_seconds": totals.pop("seconds"), **totals} if totals else {}


def last(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return lines[-1] if lines else {}


_AXES = ("queries", "generated_tokens", "training_tokens", "reward_calls", "seconds")


def curve(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns the held-out reward at every evaluation of a run, and what had been spent until then, as columns."""
    evaluated = [line for line in lines if line.get("heldout_reward") is not None]
    columns = {"iteration": "iteration", "heldout_reward": "heldout_reward", **{axis: f"total_{axis}" for axis in _AXES}}
    return {
        name: [line[key] for line in evaluated] for name, key in columns.items() if all(key in line for line in evaluated)
    }


def common_budget(methods: Sequence[Method]) -> float:
    """Returns the number of generated tokens that all runs which sample during training have reached.

    It is nan if no run samples.
    """
    totals = [last(run.lines).get("total_generated_tokens", 0) for method in methods for run in method.runs if run.trained]
    return min((total for total in totals if total > 0), default=math.nan)


def area(lines: Sequence[Mapping[str, Any]], budget: float) -> float:
    """Computes the mean held-out reward over the first `budget` generated tokens.

    It is the area under the piecewise linear curve, divided by its width, and tells a method that learns sooner from one
    that only ends as high. It is nan where the curve does not reach that far.
    """
    columns = curve(lines)
    x, y = (np.array(columns.get(key, []), np.float64) for key in ("generated_tokens", "heldout_reward"))
    return frontier.area(x, y, budget) if len(x) == len(y) else math.nan


def beside(a: Method, b: Method) -> list[tuple[int, int]]:
    """Matches the runs of two methods that have the same seed, and returns pairs of their numbers.

    The one run of a start model is paired with every run of the other.
    """
    if not a.trained and len(a.runs) == 1:
        return [(0, j) for j in range(len(b.runs))]
    if not b.trained and len(b.runs) == 1:
        return [(i, 0) for i in range(len(a.runs))]
    return [(i, j) for i, one in enumerate(a.runs) for j, other in enumerate(b.runs) if one.seed == other.seed]


def seeds(a: Method, b: Method) -> list[int]:
    """Returns the seed of each pair of `beside`; with the one run of a start model, that of the other run."""
    of = b if not a.trained and len(a.runs) == 1 else a
    return [of.runs[i if of is a else j].seed for i, j in beside(a, b)]


def by_length(a: Method, b: Method, measure: str) -> float:
    """Computes what of the difference a - b the lengths of the responses alone would give.

    It is taken over the runs that `beside` pairs, and in units of the reward; see `formulas.texts.gain_by_length`.
    """
    both = beside(a, b)
    sides = [(b, sorted({j for _, j in both})), (a, sorted({i for i, _ in both}))]
    rewards = [method.values[measure][runs].ravel() for method, runs in sides]
    lengths = [
        [len(r.tokens) for i in runs for rollout in method.runs[i].generated.rollouts for r in rollout.responses]
        for method, runs in sides
    ]
    return gain_by_length(rewards, lengths)


def tests(pairs: Sequence[tuple[Method, Method]], seed: int) -> list[dict[str, Any]]:
    """Tests the difference of every pair of methods in both rewards.

    A row has the difference with its interval, the p-value, and the p-value adjusted (Holm) for all pairs, "p_holm", and for
    the pairs with the same `against`, "p_against": of a baseline, the differences to it. Pairs without a common seed, or
    without the reward, have no test: their numbers are nan.
    """
    rows: list[dict[str, Any]] = []
    for measure in TESTED:
        found: list[dict[str, Any]] = []
        for a, b in pairs:
            both = np.array(beside(a, b), int).reshape(-1, 2)
            one, other = a.by_query(measure)[both[:, 0]], b.by_query(measure)[both[:, 1]]
            tested = intervals.paired(one, other, seed=seed)
            what = {"measure": measure, "method": a.label, "against": b.label, "seeds": seeds(a, b)}
            found.append({**what, **tested._asdict(), "by_length": by_length(a, b, measure)})
        for name, families in (("p_holm", [found]), ("p_against", _families(found))):
            for family in families:
                adjusted = intervals.holm([row["p"] for row in family])
                for row, p in zip(family, adjusted, strict=True):
                    row[name] = p
        rows += found
    return rows


def _families(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    names = dict.fromkeys(row["against"] for row in rows)
    return [[row for row in rows if row["against"] == name] for name in names]
