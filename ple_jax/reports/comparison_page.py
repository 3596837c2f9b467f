"""The page of a comparison: self-contained HTML, all of it from what comparison.json holds."""

from collections.abc import Mapping, Sequence
from typing import Any

from ple_jax.core.config import flatten
from ple_jax.reports import comparison_charts, drawing, formats, frontier, pages
from ple_jax.reports.comparison_tables import Table, described, every_seed, judge


def html(result: Mapping[str, Any], found: Sequence[Table]) -> str:
    """Renders the page of a comparison, which needs no network and no script."""
    own = flatten({"settings": result["settings"], "judge": {k: v for k, v in result["judge"].items() if k != "kwargs"}})
    marks = comparison_charts.marks(result)
    return pages.render(
        "comparison.html",
        result=result,
        line=described(result),
        judge=judge(result),
        in_all=judge_in_all(result),
        verdicts=verdicts(result),
        tables={table.name: table for table in found},
        marks=marks,
        by_label={mark.label: mark for mark in marks},
        tip_width=drawing.TIP,
        strips=list(comparison_charts.strips(result)),
        scatter=list(comparison_charts.scatter(result)),
        frontier=list(frontier.charts({"views": [result], "frontier": result["frontier"]})),
        curves=list(comparison_charts.curves(result)),
        wins=comparison_charts.wins(result),
        differences=list(comparison_charts.differences(result)),
        seeds=every_seed(result),
        settings={**own, "judge.kwargs": result["judge"]["kwargs"]},
    )


def of_views(result: Mapping[str, Any], found: Sequence[Table]) -> str:
    """Renders the main page of a comparison at several budgets; each has a page of its own in its folder."""
    views = [(view["view"], frontier.title(view["view"]), view) for view in result["views"]]
    marks = frontier.marks(result)
    return pages.render(
        "budgets.html",
        views=views,
        line=described(result["views"][0]),
        settings=result["views"][0]["settings"],
        tables=found,
        marks=list(marks.values()),
        by_label=marks,
        tip_width=drawing.TIP,
        charts=list(frontier.charts(result)),
        runs=list(frontier.every_run(result)),
    )


def verdicts(result: Mapping[str, Any]) -> list[list[str]]:
    """Makes a row of text for every method that was judged against the baseline: the judge's verdicts.

    If the order of responses may matter to the judge, the row also says how far it can be trusted.
    """
    baseline, symmetric = result["baseline"], result["judge"]["symmetric"]
    rows = []
    for row in result["wins"]:
        if row["against"] == baseline and row["win_rate"] is not None:
            bias = [] if symmetric else [formats.signed(row["position_bias"]), formats.share(row["consistency"])]
            rate = formats.interval(row["win_rate"], (row["low"], row["high"]), 3)
            counts = [f"{row[key]:,.0f}" for key in ("judged", "failed")]
            rows.append([row["method"], *(formats.share(row[key]) for key in ("win", "tie", "loss")), rate, *bias, *counts])
    return rows


def judge_in_all(result: Mapping[str, Any]) -> str:
    """Says in words what position bias and consistency are over all pairs of methods.

    The text is empty for a judge to which the order of responses means nothing.
    """
    rows = [row for row in result["wins"] if row["judged"] and row["position_bias"] is not None]
    if result["judge"]["symmetric"] or not rows:
        return ""
    weight = sum(row["judged"] for row in rows)
    bias, agree = (
        sum(row["judged"] * (row[key] or 0.0) for row in rows) / weight for key in ("position_bias", "consistency")
    )
    agreed = formats.share(agree, 0)
    return f"Over all pairs the position bias is {formats.signed(bias)} (1: the first wins); both orders agree on {agreed}."
