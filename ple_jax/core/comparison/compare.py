"""The comparison of methods: the responses of several runs to one set of queries, under one evaluation, whatever made them.

What is estimated. A method's mean is the mean over its seeds of means over queries of means over samples; responses without
a finite reward are left out and counted. Intervals and tests resample seeds and queries (`statistics`): what is shared by a
seed or a query does not pass for evidence. Methods are tested against each other on the same queries and the same seeds;
where one has fewer seeds, on those that both have. A start model was not trained and has no seed in that sense: its one
run stands beside every seed of the others, whose spread it then does not add to. p-values are adjusted for all pairs of
methods of one measure, also those that nobody had asked about (Holm 1979).
"""

import csv
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ple_jax.core import costs, judges, metrics, statistics
from ple_jax.core import workdir as files
from ple_jax.core.comparison import page
from ple_jax.core.comparison import tables as layout
from ple_jax.core.comparison.runs import MEASURED, SAME, Method, Run, check, expand, group, labelled, mean, method_keys, read
from ple_jax.core.config import UserError, suggestion
from ple_jax.core.rewards._cache import Cache
from ple_jax.core.transcripts import Conversation, render

TESTED = ("reward", "reward_second")
_TOLERANCE = 0.1  # of generated tokens, within which budgets are called equal
_RESAMPLES = 10_000


def run(entries: Sequence[str], out: Path, *, config: Any, backend: str) -> Path:
    """Compares runs and writes table.md, .csv and .tex, seeds.csv, tests.csv, wins.csv, comparison.json and comparison.html.

    Prints the tables and whatever speaks against the comparison (unequal budgets, missing seeds ...).

    Args:
        entries: `path` or `label=path`, globs allowed: a work directory or a folder of its responses. Methods keep the
            order in which they are named.
        out: an existing folder.
        config: its `seed` (of resampling) and `compare`.
        backend: what a judge computes with, if it is a model.

    Returns:
        The page's path.

    Raises:
        UserError: there is nothing to read, or what is there cannot be compared.
    """
    if (out / "config.json").exists():
        raise UserError(f"--workdir={out} holds a run; give a folder of its own to the comparison")
    runs = labelled([read(label, path) for label, path in expand(entries)])
    check(runs)
    methods = group(runs)
    labels = [method.label for method in methods]
    baseline = labels[0] if config.compare.baseline is None else config.compare.baseline
    if baseline not in labels:
        raise UserError(
            f"config.compare.baseline is {baseline!r} but must be one of {', '.join(map(repr, labels))}"
            f"{suggestion(baseline, labels)}"
        )
    # the baseline comes first: every difference to it is "method - baseline"
    ordered = sorted(methods, key=lambda method: method.label != baseline)
    pairs = [(method, against) for against, method in itertools.combinations(ordered, 2)]
    judge = load_judge(methods, config, backend)
    result: dict[str, Any] = {
        "baseline": baseline,
        "settings": settings(methods),
        "judge": about(judge, config, methods),
        "warnings": warnings(methods),
        "notes": notes(methods),
        "methods": described(methods, config.seed),
        "tests": tests(pairs, config.seed),
        "examples": examples(methods, config.compare.examples),
    }
    if not isinstance(judge, Stored):  # it may take hours: all else is there before
        _kept({**result, "wins": []}, out)
    wins = judged(pairs, judge, config, out)
    return _kept({**result, "wins": wins, "warnings": [*result["warnings"], *undecided(wins)]}, out)


def _kept(result: dict[str, Any], out: Path) -> Path:
    files.write_json(out / "comparison.json", result)
    return write(json.loads((out / "comparison.json").read_text(encoding="utf-8")), out)


# ---------------------------------------------------------------- numbers


def described(methods: Sequence[Method], seed: int) -> list[dict[str, Any]]:
    """Every method with its measures, costs included: of every seed, and their means over seeds."""
    budget = common_budget(methods)
    rows = []
    for method in methods:
        means = {key: mean(method.by_query(key)) for key in MEASURED}  # one a seed
        runs = []
        for i, run in enumerate(method.runs):
            values = {**metrics.describe(run.generated), **{key: float(means[key][i]) for key in MEASURED}, **spent(run)}
            if "reward_second" in values:
                values["bad_reward_second"] = float(np.isnan(method.values["reward_second"][i]).mean())
            values["heldout_area"] = area(run.lines, budget)
            kept = {key: value for key, value in values.items() if not math.isnan(value)}
            where = {"seed": run.seed, "folder": str(run.folder), "iteration": run.generated.settings["iteration"]}
            runs.append({**where, "measures": kept, "curve": curve(run.lines)})
        shared = [key for key in runs[0]["measures"] if all(key in run["measures"] for run in runs)]
        intervals = {key: statistics.clustered_ci(method.by_query(key), seed=seed) for key in MEASURED}
        rows.append(
            {
                "label": method.label,
                "trained": method.trained,
                "seeds": [run.seed for run in method.runs],
                "measures": {key: float(np.mean([run["measures"][key] for run in runs])) for key in shared},
                "intervals": {key: interval for key, interval in intervals.items() if key in shared},
                "runs": runs,
                "by_query": {key: method.by_query(key).tolist() for key in TESTED},
            }
        )
    return rows


def spent(run: Run) -> dict[str, float]:
    """What training cost: from summary.json, or of an unfinished run from metrics.jsonl; a base model's is nothing.

    Of a start model with an adapter nobody here knows.
    """
    if not run.trained:
        known = run.generated.settings["adapter"] is None
        return dict.fromkeys((*costs.COUNTERS, "wall_seconds"), 0) if known else {}
    if not run.summary:
        totals = {key.removeprefix("total_"): value for key, value in _last(run.lines).items() if key.startswith("total_")}
        return {"train_seconds": totals.pop("seconds"), **totals} if totals else {}
    phases = run.summary.get("seconds", {})
    found = {**run.summary, **{f"{phase}_seconds": value for phase, value in phases.items()}}
    if phases:
        found["train_seconds"] = sum(value for phase, value in phases.items() if phase != "evaluate")
    wanted = (*costs.COUNTERS, "train_seconds", "wall_seconds", "evaluation_tokens", "peak_memory_bytes")
    return {key: found[key] for key in (*wanted, *(f"{phase}_seconds" for phase in phases)) if key in found}


def _last(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return lines[-1] if lines else {}


_AXES = ("queries", "generated_tokens", "training_tokens", "reward_calls", "seconds")


def curve(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Held-out reward at every evaluation of a run, and what had been spent until then, as columns."""
    evaluated = [line for line in lines if line.get("heldout_reward") is not None]
    columns = {"iteration": "iteration", "heldout_reward": "heldout_reward", **{axis: f"total_{axis}" for axis in _AXES}}
    return {
        name: [line[key] for line in evaluated] for name, key in columns.items() if all(key in line for line in evaluated)
    }


def common_budget(methods: Sequence[Method]) -> float:
    """The generated tokens that every run which samples while it trains has got to; nan where none does."""
    totals = [_last(run.lines).get("total_generated_tokens", 0) for method in methods for run in method.runs if run.trained]
    return min((total for total in totals if total > 0), default=math.nan)


def area(lines: Sequence[Mapping[str, Any]], budget: float) -> float:
    """Mean held-out reward over the first `budget` generated tokens: area under the piecewise linear curve over its width.

    It tells a method that learns sooner from one that ends as high. nan where the curve does not reach so far.
    """
    columns = curve(lines)
    x, y = (np.array(columns.get(key, []), np.float64) for key in ("generated_tokens", "heldout_reward"))
    if not len(x) or len(x) != len(y) or not x[-1] >= budget:
        return math.nan
    inside = x < budget
    if not inside.any():
        return math.nan
    x, y = np.append(x[inside], budget), np.append(y[inside], np.interp(budget, x, y))
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def beside(a: Method, b: Method) -> list[tuple[int, int]]:
    """Which run of a stands beside which of b, by number: those of one seed; a start model's one run beside every one."""
    if not a.trained and len(a.runs) == 1:
        return [(0, j) for j in range(len(b.runs))]
    if not b.trained and len(b.runs) == 1:
        return [(i, 0) for i in range(len(a.runs))]
    return [(i, j) for i, one in enumerate(a.runs) for j, other in enumerate(b.runs) if one.seed == other.seed]


def _seeds(a: Method, b: Method) -> list[int]:
    """The seeds of `beside`; of a start model's one run those of the other."""
    of = b if not a.trained and len(a.runs) == 1 else a
    return [of.runs[i if of is a else j].seed for i, j in beside(a, b)]


def tests(pairs: Sequence[tuple[Method, Method]], seed: int) -> list[dict[str, Any]]:
    """The difference of every pair of methods in both rewards: interval, p's, and these adjusted for all pairs (Holm).

    There are enough resamples for the adjusted p to fall to 0.005. Pairs without a seed in common, or without the reward,
    have no test: their numbers are nan.
    """
    resamples = max(_RESAMPLES, 400 * len(pairs))
    rows = []
    for measure in TESTED:
        found = []
        for a, b in pairs:
            both = np.array(beside(a, b), int).reshape(-1, 2)
            one, other = a.by_query(measure)[both[:, 0]], b.by_query(measure)[both[:, 1]]
            tested = statistics.paired(one, other, seed=seed, resamples=resamples)
            what = {"measure": measure, "method": a.label, "against": b.label, "seeds": _seeds(a, b)}
            found.append({**what, **tested._asdict()})
        both_adjusted = (statistics.holm([row[key] for row in found]) for key in ("p", "p_seeds"))
        for row, p, p_seeds in zip(found, *both_adjusted, strict=True):
            rows.append({**row, "p_holm": p, "p_seeds_holm": p_seeds, "resamples": resamples})
    return rows


# ---------------------------------------------------------------- win rates


class Stored(NamedTuple):
    """Judges by a reward that is stored beside the responses."""

    measure: str
    tie: float  # largest difference that is one


def load_judge(methods: Sequence[Method], config: Any, backend: str) -> judges.Judge | Stored:
    """What config.compare asks for.

    Judge "reward" without a reward's name in judge_kwargs loads none: the rewards stored beside the responses decide, the
    training reward or with {"which": "second"} the second one.

    Raises:
        UserError: there is no such judge, or not so many samples.
    """
    options = config.compare
    kwargs, samples = options.judge_kwargs.to_dict(), methods[0].values["reward"].shape[-1]
    if options.judge_samples > samples:
        raise UserError(f"config.compare.judge_samples is {options.judge_samples}, and every query has {samples} responses")
    if options.judge != "reward" or "name" in kwargs:
        return judges.load(options.judge, kwargs, backend=backend)
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
    """Win rates of every pair of methods, each seen from either side: a row per ordered pair.

    Sample i to a query of one seed meets sample i of the other method's. Every answer of a judge is kept in
    judgements.sqlite. The interval of a rate is over seeds and queries.
    """
    options, rows = config.compare, []
    with Cache(out / "judgements.sqlite") as cache:
        for a, b in pairs:
            both, queries = beside(a, b), _drawn(a.values["reward"].shape[1], options.judge_queries, config.seed)
            samples = options.judge_samples or a.values["reward"].shape[-1]
            cells = [(i, j, q, s) for i, j in both for q in queries for s in range(samples)]
            found = _verdicts(judge, a, b, cells, cache)
            if not isinstance(judge, Stored):  # which takes its time
                print(f"judged {a.label} against {b.label}: {len(cells)} pairs of responses", flush=True)
            rate = mean(found.combined.reshape(len(both), len(queries), samples)) / 2 + 0.5
            low, high = statistics.clustered_ci(rate, seed=config.seed)
            for method, against, outcomes, interval in (
                (a, b, found, (low, high)),
                (b, a, _turned(found), (1 - high, 1 - low)),
            ):
                who: dict[str, Any] = {"method": method.label, "against": against.label, "seeds": _seeds(a, b)}
                rows.append({**who, **judges.win_rate(outcomes), "low": interval[0], "high": interval[1]})
    return rows


def _drawn(queries: int, count: int, seed: int) -> list[int]:
    """The queries that are judged, in file order: by seed, since files may be sorted; more of them include fewer."""
    return sorted(np.random.default_rng(seed).permutation(queries)[: count or None].tolist())


def _verdicts(
    judge: judges.Judge | Stored, a: Method, b: Method, cells: Sequence[tuple[int, int, int, int]], cache: Cache
) -> judges.Outcomes:
    """Of pairs of responses: (run of a, run of b, query, sample)."""
    if isinstance(judge, Stored):
        one = np.array([a.values[judge.measure][i, q, s] for i, _, q, s in cells], np.float64)
        other = np.array([b.values[judge.measure][j, q, s] for _, j, q, s in cells], np.float64)
        said = np.where(np.abs(one - other) <= judge.tie, 0.0, np.sign(one - other))  # nan stays nan
        return judges.Outcomes(said, said, said)
    prompts = [a.runs[i].generated.rollouts[q].prompt for i, _, q, _ in cells]
    first = [a.runs[i].generated.rollouts[q].responses[s].text for i, _, q, s in cells]
    second = [b.runs[j].generated.rollouts[q].responses[s].text for _, j, q, s in cells]
    return judges.compare(judge, prompts, first, second, cache=cache)


def _turned(found: judges.Outcomes) -> judges.Outcomes:
    """The same verdicts from the other's view; what was shown first to one was shown second to the other."""
    return judges.Outcomes(-found.second, -found.first, -found.combined)


def about(judge: judges.Judge | Stored, config: Any, methods: Sequence[Method]) -> dict[str, Any]:
    """The judge, in the words of the config; without headers, which may hold a key."""

    def shown(kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {k: shown(v) if isinstance(v, Mapping) else v for k, v in kwargs.items() if k != "headers"}

    options, queries = config.compare, methods[0].values["reward"].shape[1]
    return {
        "name": options.judge,
        "kwargs": shown(options.judge_kwargs.to_dict()),
        "symmetric": isinstance(judge, Stored) or judge.symmetric,
        "queries": min(options.judge_queries or queries, queries),
        "samples": options.judge_samples or methods[0].values["reward"].shape[-1],
    }


# ---------------------------------------------------------------- what speaks against it


def warnings(methods: Sequence[Method]) -> list[str]:
    """What makes the comparison weaker than it looks."""
    found = []
    trained = [method for method in methods if method.trained]
    seeds = sorted({run.seed for method in trained for run in method.runs})
    for method in methods:
        configs = [method_keys(run) for run in method.runs]
        everything = sorted({key for config in configs for key in config})
        if keys := [key for key in everything if any(config.get(key) != configs[0].get(key) for config in configs)]:
            found.append(f"the runs of {method.label} differ in more than their seeds: {', '.join(keys)}")
        for run in method.runs if method.trained else ():
            name, iteration = f"{method.label}, seed {run.seed}", run.generated.settings["iteration"]
            if not run.summary:
                found.append(f"{name}: training is not finished; the responses are of iteration {iteration}")
            elif run.summary["iterations"] != iteration:
                all_ = run.summary["iterations"]
                found.append(f"{name}: the responses are of iteration {iteration}, the costs of all {all_}")
    for method in trained:
        missing = [seed for seed in seeds if seed not in [run.seed for run in method.runs]]
        if len(method.runs) == 1:
            found.append(f"{method.label} has one seed: its intervals and tests say nothing of how another would have gone")
        if missing:
            found.append(
                f"{method.label} lacks seed{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}: it is tested on"
                " the seeds that both methods have, its mean is over its own"
            )
    if len({run.generated.settings["model"] for method in methods for run in method.runs}) > 1:
        found.append("the base models differ: so do those under which perplexity and KL are measured")
    return found + _unequal(trained) + _missing(methods)


def _unequal(methods: Sequence[Method]) -> list[str]:
    """Says which methods that sample while they train generated less than the one that generated most."""
    spent_by = {
        method.label: float(np.mean([spent(run).get("generated_tokens", 0) for run in method.runs])) for method in methods
    }
    most = max(spent_by.values(), default=0.0)
    less = {label: n for label, n in spent_by.items() if 0 < n < (1 - _TOLERANCE) * most}
    if not less:
        return []
    largest = max(spent_by, key=spent_by.__getitem__)
    listed = "; ".join(f"{label} {n:,.0f} ({n / most:.0%})" for label, n in less.items())
    return [f"unequal budgets: {largest} generated {most:,.0f} tokens while it trained, and {listed}"]


def _missing(methods: Sequence[Method]) -> list[str]:
    found = []
    without = [method.label for method in methods if np.isnan(method.values["reward_second"]).all((1, 2)).any()]
    asked = {run.generated.settings["second_reward"] for method in methods for run in method.runs} - {None}
    if len(without) == len(methods) and not asked:
        found.append(
            "no second reward: over-optimisation of the training reward would not show (--config.generate.second_reward)"
        )
    elif without:
        found.append(f"no second reward of {', '.join(without)}")
    for key, name in (("reward", "training reward"), ("reward_second", "second reward")):
        for method in methods:
            share = float(np.isnan(method.values[key]).mean())
            if 0 < share and (key == "reward" or method.label not in without):
                found.append(f"{share:.1%} of the responses of {method.label} have no {name} and are left out of it")
    return found


def undecided(wins: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says how many pairs of responses the judge gave no verdict on."""
    failed, judged = (sum(row[key] for row in wins) / 2 for key in ("failed", "judged"))  # each pair is there twice
    return [f"the judge gave no verdict on {failed:,.0f} of {failed + judged:,.0f} pairs"] if failed else []


def notes(methods: Sequence[Method]) -> list[str]:
    """What a reader should know, and nothing is wrong with."""
    found = []
    few = sorted({len(method.runs) for method in methods if method.trained and 1 < len(method.runs) < 5})
    if few:
        found.append(
            f"{' or '.join(map(str, few))} seeds show only roughly what another would do: intervals and p are too sure of it"
            " (p of the seeds alone is not), so look at every seed"
        )
    if start := [method.label for method in methods if not method.trained and len(method.runs) == 1]:
        found.append(f"{', '.join(start)}: one run, which stands beside every seed of the others")
    total = {method.label: sum(spent(run).get("generated_tokens", 1) for run in method.runs) for method in methods}
    if offline := [method.label for method in methods if method.trained and not total[method.label]]:
        found.append(f"{', '.join(offline)}: nothing is sampled while it trains; compare the tokens that it was trained on")
    drawn, plain = methods[0].runs[0].generated.settings["sampling"], {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}
    if other := [f"{key} {drawn[key]:g}" for key, value in plain.items() if drawn.get(key, value) != value]:
        found.append(f"responses were sampled with {', '.join(other)}; KL is of the untouched probabilities")
    return found


# ---------------------------------------------------------------- what is written


def settings(methods: Sequence[Method]) -> dict[str, Any]:
    """What all runs have in common."""
    runs = [run.generated for method in methods for run in method.runs]
    own = runs[0].settings
    return {
        "data": own["data"],
        "queries": len(runs[0].rollouts),
        **{key: own[key] for key in SAME if key != "second_reward"},
        "second_reward": next((s for run in runs if (s := run.settings["second_reward"]) is not None), None),
        "models": list(dict.fromkeys(run.settings["model"] for run in runs)),
    }


def examples(methods: Sequence[Method], count: int) -> list[dict[str, Any]]:
    """The first queries in file order, with the first response of every method's first seed: nothing is selected."""
    rows = []
    for q, rollout in enumerate(methods[0].runs[0].generated.rollouts[:count]):
        prompt = rollout.prompt
        text = render(prompt.messages) if isinstance(prompt, Conversation) else prompt
        responses = []
        for method in methods:
            response = method.runs[0].generated.rollouts[q].responses[0]
            values = {key: float(method.values[key][0, q, 0]) for key in TESTED}
            responses.append({"method": method.label, "text": response.text, "finished": response.finished, **values})
        rows.append({"query_id": rollout.query_id, "prompt": text.strip(), "responses": responses})
    return rows


def write(result: Mapping[str, Any], out: Path) -> Path:
    """Every file but comparison.json, made from what that holds; prints the tables and the warnings; the page's path."""
    tables = layout.tables(result)
    texts = {
        "table.md": layout.markdown(result, tables),
        "table.tex": layout.latex(result, tables),
        "comparison.html": page.html(result, tables),
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    methods, baseline = result["methods"], result["baseline"]
    measures = list(dict.fromkeys(key for method in methods for run in method["runs"] for key in run["measures"]))
    with_baseline = {(row["method"], row["measure"]): row for row in result["tests"] if baseline == row["against"]}
    won = {row["method"]: row for row in result["wins"] if baseline == row["against"]}
    rows = []
    for method in methods:
        row = {"method": method["label"], "seeds": _joined(method["seeds"]), **method["measures"]}
        for key, (low, high) in method["intervals"].items():
            row |= {f"{key}_low": low, f"{key}_high": high}
        for key in TESTED:
            if (test := with_baseline.get((method["label"], key))) and test["difference"] is not None:
                row |= {f"{key}_{part}": test[part] for part in ("difference", "p_holm", "p_seeds")}
                row |= {f"{key}_difference_{part}": test[part] for part in ("low", "high")}
        if win := won.get(method["label"]):
            row |= {"win_rate": win["win_rate"], "win_rate_low": win["low"], "win_rate_high": win["high"]}
        rows.append(row)
    ends = ("_low", "_high", "_difference", "_p_holm", "_p_seeds", "_difference_low", "_difference_high")
    extra = [f"{key}{end}" for key in MEASURED for end in ends] + ["win_rate", "win_rate_low", "win_rate_high"]
    present = [key for key in (*measures, *extra) if any(key in row for row in rows)]
    _csv(out / "table.csv", ["method", "seeds", *present], rows)
    seeds = [
        {"method": method["label"], **{key: run[key] for key in ("seed", "folder", "iteration")}, **run["measures"]}
        for method in methods
        for run in method["runs"]
    ]
    _csv(out / "seeds.csv", ["method", "seed", "folder", "iteration", *measures], seeds)
    numbers = ["difference", "low", "high", "p", "p_holm", "p_seeds", "p_seeds_holm"]
    columns = ["measure", "method", "against", "seeds", *numbers]
    _csv(out / "tests.csv", columns, [{**row, "seeds": _joined(row["seeds"])} for row in result["tests"]])
    counts = ["win", "tie", "loss", "win_rate", "low", "high", "position_bias", "consistency", "judged", "failed"]
    wins = [{**row, "seeds": _joined(row["seeds"])} for row in result["wins"]]
    _csv(out / "wins.csv", ["method", "against", "seeds", *counts], wins)
    print(texts["table.md"])
    for warning in result["warnings"]:
        print(f"warning: {warning}")
    return out / "comparison.html"


def _joined(seeds: Iterable[int]) -> str:
    return " ".join(map(str, seeds))


def _csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Numbers as exactly as they are; what is missing is empty."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
