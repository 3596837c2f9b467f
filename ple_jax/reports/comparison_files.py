"""The files of a comparison: comparison.json, and the tables, pages and CSV files that are all made from it."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ple_jax.core.errors import Damaged
from ple_jax.core.files import plain, read_json, write_csv, write_json, write_text
from ple_jax.evaluation.frontier import COLUMNS
from ple_jax.evaluation.methods import MEASURED
from ple_jax.evaluation.numbers import TESTED
from ple_jax.reports import comparison_page, frontier
from ple_jax.reports import comparison_tables as layout

_ENDS = ("_low", "_high", "_difference", "_p_against", "_difference_low", "_difference_high")
_TESTS = ("measure", "method", "against", "seeds", "difference", "low", "high", "p", "p_against", "p_holm", "by_length")
_WINS = (
    "method", "against", "seeds", "win", "tie", "loss", "win_rate", "low", "high", "position_bias", "consistency", "judged",
    "failed",
)  # fmt: skip


_SHARED = ("comparison.json", "comparison.html", "table.md", "table.tex", "frontier.csv")
_ALONE = ("table.csv", "seeds.csv", "tests.csv", "wins.csv")  # of one view


def write(result: Mapping[str, Any], out: Path) -> Path:
    """Writes the files of a comparison, and prints its tables and warnings (unequal budgets, missing seeds ...).

    The files are comparison.json, comparison.html, table.md, table.csv, table.tex, seeds.csv, tests.csv and wins.csv. With
    several views each has all these in a folder of its own, and a page, tables and a comparison.json cover all of them. The
    curves are written to frontier.csv.

    Args:
        result: of `evaluation.compare.results`.
        out: an existing folder.

    Returns:
        The page's path.
    """
    _remove_former(out)
    if len(result["views"]) == 1:
        text = _write_view({**result["views"][0], "frontier": result["frontier"]}, out)
        warnings, notes = (result["views"][0][kind] for kind in ("warnings", "notes"))
    else:
        for view in result["views"]:
            (out / view["view"]).mkdir(exist_ok=True)
            _write_view({**view, "frontier": {"runs": [], "budgets": []}}, out / view["view"])
        text = _write_views(result, out)
        warnings, notes = (
            [f"{frontier.title(v['view'])}: {text}" for v in result["views"] for text in v[kind]]
            for kind in ("warnings", "notes")
        )
    if rows := list(_evaluations(result["frontier"])):
        write_csv(out / "frontier.csv", list(rows[0]), rows)
    print(text)
    for warning in warnings:
        print(f"warning: {warning}")
    for note in notes:
        print(f"note: {note}")
    return out / "comparison.html"


def _remove_former(out: Path) -> None:
    """Removes the files of the comparison that was in a folder before, whose views may have been others."""
    before: Mapping[str, Any] = {}
    with contextlib.suppress(Damaged):
        before = read_json(out / "comparison.json") or {}
    views = [out / str(view["view"]) for view in before.get("views", ())]
    for folder in (out, *views) if before else ():
        for name in _SHARED if folder == out and views else (*_SHARED, *_ALONE):
            if (folder / name).is_file():
                (folder / name).unlink()


def _write_views(result: Mapping[str, Any], out: Path) -> str:
    """Writes the main page, the tables and comparison.json of several views, and returns the tables as text."""
    write_json(out / "comparison.json", {**result, "views": [_numbers(view) for view in result["views"]]})
    kept = plain(result)  # what is not finite is null, as in a file
    first, tables = kept["views"][0], frontier.tables(kept)
    text = layout.markdown(first, tables)
    write_text(out / "table.md", text)
    write_text(out / "table.tex", layout.latex(first, tables))
    write_text(out / "comparison.html", comparison_page.of_views(kept, tables))
    return text


def _numbers(view: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a view without what only its own comparison.json has: the numbers of every query, and examples."""
    methods = [{key: method[key] for key in ("label", "seeds", "measures", "intervals")} for method in view["methods"]]
    return {"view": view["view"], "baseline": view["baseline"], "methods": methods, "tests": view["tests"]}


def _evaluations(curves: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a row for each evaluation of every run."""
    for run in curves["runs"]:
        for i in range(len(run["kl"])):
            whose = {"method": run["label"], "lr": run["lr"], "seed": run["seed"], "folder": run["folder"]}
            yield {**whose, **{name: run[name][i] for name in COLUMNS}}


def _write_view(result: Mapping[str, Any], out: Path) -> str:
    """Writes the files of one view, and returns its tables as text."""
    write_json(out / "comparison.json", result)
    kept = json.loads((out / "comparison.json").read_text(encoding="utf-8"))  # what is not finite is null there
    tables = layout.tables(kept)
    texts = {
        "table.md": layout.markdown(kept, tables),
        "table.tex": layout.latex(kept, tables),
        "comparison.html": comparison_page.html(kept, tables),
    }
    for name, text in texts.items():
        write_text(out / name, text)
    measures = list(dict.fromkeys(key for method in kept["methods"] for run in method["runs"] for key in run["measures"]))
    rows = _methods(kept)
    extra = [f"{key}{end}" for key in MEASURED for end in _ENDS] + ["win_rate", "win_rate_low", "win_rate_high"]
    present = [key for key in (*measures, *extra) if any(key in row for row in rows)]
    write_csv(out / "table.csv", ["method", "seeds", *present], rows)
    write_csv(out / "seeds.csv", ["method", "seed", "folder", "iteration", *measures], _seeds(kept))
    write_csv(out / "tests.csv", _TESTS, ({**row, "seeds": _joined(row["seeds"])} for row in kept["tests"]))
    write_csv(out / "wins.csv", _WINS, ({**row, "seeds": _joined(row["seeds"])} for row in kept["wins"]))
    return texts["table.md"]


def _methods(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a row for each method: means and intervals, and its test and its win rate against the baseline."""
    baseline = result["baseline"]
    with_baseline = {(row["method"], row["measure"]): row for row in result["tests"] if baseline == row["against"]}
    won = {row["method"]: row for row in result["wins"] if baseline == row["against"]}
    rows = []
    for method in result["methods"]:
        row = {"method": method["label"], "seeds": _joined(method["seeds"]), **method["measures"]}
        for key, (low, high) in method["intervals"].items():
            row |= {f"{key}_low": low, f"{key}_high": high}
        for key in TESTED:
            if (test := with_baseline.get((method["label"], key))) and test["difference"] is not None:
                row |= {f"{key}_{part}": test[part] for part in ("difference", "p_against")}
                row |= {f"{key}_difference_{part}": test[part] for part in ("low", "high")}
        if win := won.get(method["label"]):
            row |= {"win_rate": win["win_rate"], "win_rate_low": win["low"], "win_rate_high": win["high"]}
        rows.append(row)
    return rows


def _seeds(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a row for each run."""
    return [
        {"method": method["label"], **{key: run[key] for key in ("seed", "folder", "iteration")}, **run["measures"]}
        for method in result["methods"]
        for run in method["runs"]
    ]


def _joined(seeds: Iterable[int]) -> str:
    return " ".join(map(str, seeds))
