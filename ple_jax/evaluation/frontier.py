"""Runs as curves of reward against KL: what a method reaches at a KL budget, and what it has on the way there.

A curve consists of a run's evaluations on the dev split, in the order of training, at which KL is larger than at all before.
Reward is then a function of KL, which is taken to be linear between two evaluations. What a method has at a budget is the
mean over the seeds that reach it, with an interval over these seeds.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from ple_jax.evaluation.entries import POINTS, Found, budget
from ple_jax.evaluation.methods import Method, config, progress
from ple_jax.formulas import intervals
from ple_jax.training.points import metric

COLUMNS = ("iteration", "step", "within", "kl", "kl_low", "kl_high", "reward", "second", "generated_tokens", "seconds")


class Curve(NamedTuple):
    """The evaluations of one run, with its label, seed and learning rate."""

    label: str
    seed: int
    lr: float | None
    points: list[Mapping[str, Any]]  # as `training.points.Point`, in the order of training

    def values(self, name: str) -> Float64[np.ndarray, " point"]:
        return np.array([math.nan if (v := point.get(name)) is None else v for point in self.points], np.float64)


def rising(kl: Float64[np.ndarray, " point"], value: Float64[np.ndarray, " point"]) -> tuple[np.ndarray, np.ndarray]:
    """Keeps the points at which KL is larger than at all points before; points without a finite value are dropped.

    Returns:
        KL and value of the points that are kept.
    """
    known = np.isfinite(kl) & np.isfinite(value)
    kl, value = kl[known], value[known]
    before = np.maximum.accumulate(np.concatenate([[-np.inf], kl[:-1]])) if len(kl) else kl
    return kl[kl > before], value[kl > before]


def at(kl: Float64[np.ndarray, " point"], value: Float64[np.ndarray, " point"], limit: float) -> float:
    """Computes the value where the curve first reaches `limit` nats; nan where it does not.

    Examples:
        >>> at(np.array([0.0, 4.0, 3.0, 8.0]), np.array([0.0, 1.0, 9.0, 3.0]), 6.0)
        2.0
    """
    x, y = rising(kl, value)
    return float(np.interp(limit, x, y)) if len(x) and x[0] <= limit <= x[-1] else math.nan


def area(kl: Float64[np.ndarray, " point"], value: Float64[np.ndarray, " point"], limit: float) -> float:
    """Computes the mean value between the curve's first point and `limit` nats: the area under it divided by its width.

    It is nan where the curve ends before `limit`.

    Examples:
        >>> area(np.array([0.0, 4.0, 8.0]), np.array([0.0, 1.0, 1.0]), 8.0)
        0.75
    """
    x, y = rising(kl, value)
    if not len(x) or not x[0] < limit <= x[-1]:
        return math.nan
    inside = x < limit
    x, y = np.append(x[inside], limit), np.append(y[inside], np.interp(limit, x, y))
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def of(found: Sequence[Found], views: Mapping[str, Sequence[Method]], seed: int) -> dict[str, Any]:
    """Collects the curves of all runs and, for every view with a budget, what each of its methods has there.

    Args:
        found: all entries, including those that name evaluations alone.
        views: the methods of every view.
        seed: of the resampling for intervals.

    Returns:
        "runs", with the evaluations of every run as columns, and "budgets", a row for each method and budget. Its "start" is
        the number of runs of which no evaluation after the first was chosen, so that the start model answers for them.
    """
    members = {
        (view, method.label): {run.workdir for run in method.runs if run.trained}
        for view, methods in views.items()
        for method in methods
    }
    starts = {(view, method.label): _starts(method) for view, methods in views.items() for method in methods}
    labels = {workdir: label for (_, label), workdirs in members.items() for workdir in sorted(workdirs)}
    labels |= {one.workdir: one.label for one in found if one.view == POINTS and one.workdir not in labels}
    curves = {workdir: curve for workdir, label in labels.items() if (curve := _curve(workdir, label)).points}
    runs = [
        {
            **{name: getattr(curve, name) for name in ("label", "seed", "lr")},
            "folder": str(workdir),
            "views": [view for (view, _), workdirs in members.items() if workdir in workdirs],
            **{name: [point.get(name) for point in curve.points] for name in COLUMNS},
        }
        for workdir, curve in curves.items()
    ]
    budgets = []
    for (view, label), workdirs in members.items():
        own, limit = [curves[workdir] for workdir in sorted(workdirs) if workdir in curves], budget(view)
        if own and not math.isnan(limit):
            row = {"view": view, "budget": limit, "method": label, "start": starts[view, label]}
            budgets.append({**row, **_at_budget(own, limit, seed)})
    return {"runs": runs, "budgets": budgets}


def _starts(method: Method) -> int:
    return sum(run.point is not None and run.point["step"] == 0 for run in method.runs)


def _curve(workdir: Path, label: str) -> Curve:
    (summary, lines), own = progress(workdir), config(workdir)
    points = summary.get("points") or [_of_line(line) for line in lines if line.get(metric("kl")) is not None]
    return Curve(label, own.get("seed", 0), own.get("optimizer.lr"), points)


def _of_line(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the evaluation in a line of metrics.jsonl, for a run that is not finished."""
    measured = {name: line.get(metric(name)) for name in ("kl", "kl_low", "kl_high", "reward", "second")}
    spent = {name: line[f"total_{name}"] for name in ("generated_tokens", "seconds")}
    return {"iteration": line["iteration"], **measured, **spent}


def _at_budget(curves: Sequence[Curve], limit: float, seed: int) -> dict[str, Any]:
    """Counts the seeds that reach a budget, and computes reward, second reward and area there, with their intervals."""
    row: dict[str, Any] = {"runs": len(curves)}
    row["reached"] = sum(not math.isnan(at(curve.values("kl"), curve.values("reward"), limit)) for curve in curves)
    for name, measured, key in (("reward", at, "reward"), ("second", at, "second"), ("area", area, "reward")):
        found = np.array([measured(curve.values("kl"), curve.values(key), limit) for curve in curves])
        known = found[~np.isnan(found)]
        low, high = intervals.bootstrap_ci(known, seed=seed) if len(known) > 1 else (math.nan, math.nan)
        row |= {name: float(known.mean()) if len(known) else math.nan, f"{name}_low": low, f"{name}_high": high}
    return row
