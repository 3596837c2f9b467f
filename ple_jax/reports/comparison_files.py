"""The files of a comparison: comparison.json, and tables, pages and columns of numbers that are all made from it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ple_jax.core.files import write_csv, write_json, write_text
from ple_jax.evaluation.methods import MEASURED
from ple_jax.evaluation.numbers import TESTED
from ple_jax.reports import comparison_page
from ple_jax.reports import comparison_tables as layout

_ENDS = ("_low", "_high", "_difference", "_p_holm", "_difference_low", "_difference_high")
_TESTS = ("measure", "method", "against", "seeds", "difference", "low", "high", "p", "p_holm")
_WINS = (
    "method", "against", "seeds", "win", "tie", "loss", "win_rate", "low", "high", "position_bias", "consistency", "judged",
    "failed",
)  # fmt: skip


def write(result: Mapping[str, Any], out: Path) -> Path:
    """Writes comparison.json and comparison.html, table.md, .csv and .tex, seeds.csv, tests.csv and wins.csv.

    Prints the tables and whatever speaks against the comparison (unequal budgets, missing seeds ...).

    Args:
        result: of `evaluation.compare.results`.
        out: an existing folder.

    Returns:
        The page's path.
    """
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
    print(texts["table.md"])
    for warning in kept["warnings"]:
        print(f"warning: {warning}")
    return out / "comparison.html"


def _methods(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a method: means and intervals, and of the baseline's tests and verdicts its own."""
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
                row |= {f"{key}_{part}": test[part] for part in ("difference", "p_holm")}
                row |= {f"{key}_difference_{part}": test[part] for part in ("low", "high")}
        if win := won.get(method["label"]):
            row |= {"win_rate": win["win_rate"], "win_rate_low": win["low"], "win_rate_high": win["high"]}
        rows.append(row)
    return rows


def _seeds(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a run."""
    return [
        {"method": method["label"], **{key: run[key] for key in ("seed", "folder", "iteration")}, **run["measures"]}
        for method in result["methods"]
        for run in method["runs"]
    ]


def _joined(seeds: Iterable[int]) -> str:
    return " ".join(map(str, seeds))
