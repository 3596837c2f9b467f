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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ple_jax.core.conversation import Conversation, render
from ple_jax.core.errors import UserError, suggestion
from ple_jax.core.files import write_json, write_text
from ple_jax.evaluation.caveats import notes, undecided, warnings
from ple_jax.evaluation.methods import MEASURED, SAME, Method, check, expand, group, labelled, read
from ple_jax.evaluation.numbers import TESTED, described, tests
from ple_jax.evaluation.win_rates import Stored, about, judged, open_judge
from ple_jax.reports import comparison_page
from ple_jax.reports import comparison_tables as layout


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
    judge = open_judge(methods, config, backend)
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
    write_json(out / "comparison.json", result)
    return write(json.loads((out / "comparison.json").read_text(encoding="utf-8")), out)


# ---------------------------------------------------------------- numbers




# ---------------------------------------------------------------- win rates




# ---------------------------------------------------------------- what speaks against it




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
        "comparison.html": comparison_page.html(result, tables),
    }
    for name, text in texts.items():
        write_text(out / name, text)
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
