"""The page of --mode=probe, made from what probe.json holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ple_jax.core.files import write_text
from ple_jax.reports import drawing, formats, pages
from ple_jax.reports.drawing import Band, Chart, Frame, Line, Mark, Scale
from ple_jax.reports.formats import MISSING

FRAME = Frame(480, 230, left=52, right=466, top=12, bottom=200)
# a series of the curve, and what it is of
_SERIES = {"ranked": "principled against plain", "by_chance": "plain against plain, by chance alone"}
_HEAD = ("prompt", "reward", "lift", "adds to the others", "prompt tokens", "response tokens", "cut off", "overlap")


def write(found: Mapping[str, Any], said: Sequence[str], workdir: Path) -> Path:
    """Writes `workdir/probe.html` and returns its path.

    Args:
        found: what probe.json holds, where None stands for what is not finite.
        said: the findings, a sentence each.
    """
    rows, tau = found["prompts"], found["threshold"]
    whole = next(row for row in rows if row["name"] == "all")
    page = pages.render(
        "probe.html",
        name=workdir.resolve().name,
        found=found,
        said=said,
        lift=formats.interval(whole["lift"]["mean"], (whole["lift"]["low"], whole["lift"]["high"]), 3, "+"),
        suggested=MISSING if tau["suggested"] is None else f"{tau['suggested']:g}",
        head=[*_HEAD, "second reward"] if "second" in whole else _HEAD,
        rows=[_row(row) for row in rows],
        charts=[_curve(tau, found["selection"])],
        tip_width=drawing.TIP,
    )
    path = workdir / "probe.html"
    write_text(path, page, errors="replace")  # a byte-level model may emit a lone surrogate
    return path


def _row(row: Mapping[str, Any]) -> list[str]:
    def difference(key: str) -> str:
        of = row[key]
        return MISSING if of is None else formats.interval(of["mean"], (of["low"], of["high"]), 3, "+")

    numbers = (formats.number(row[key], 3) for key in ("prompt_tokens", "length"))
    shares = (formats.share(row[key]) for key in ("truncated", "overlap"))
    second = [formats.number(row["second"], 3)] if "second" in row else []
    return [row["about"], formats.number(row["reward"], 3), *map(difference, ("lift", "adds")), *numbers, *shares, *second]


def _curve(tau: Mapping[str, Any], selection: str | None) -> Chart:
    """Lays out the share of the pairs above every threshold."""
    grid = [row["tau"] for row in tau["curve"]]
    across = drawing.scale([grid[0], grid[-1]], FRAME.left + 8, FRAME.right)
    up = Scale(0, 1, FRAME.bottom, FRAME.top, (0.0, 0.25, 0.5, 0.75, 1.0))
    lines = []
    for i, (key, label) in enumerate(_SERIES.items()):
        if places := [(across.at(row["tau"]), up.at(row[key]), "") for row in tau["curve"] if row[key] is not None]:
            lines.append(Line(Mark(i + 1, label, i, 0), drawing.path(place[:2] for place in places), places))
    thresholds = selection in ("threshold", "symmetric")
    named = (("ple.tau_0", tau["tau_0"]), ("suggested", tau["suggested"])) if thresholds else ()
    rules = [(across.at(at), f"{name} {at:g}") for name, at in named if formats.is_number(at) and grid[0] <= at <= grid[-1]]
    labels = up.labels(lambda tick: formats.share(tick, 0))
    lines = drawing.told_apart(lines)
    bands = _bands(tau["curve"], lines, across)
    title, note = "Share of pairs above a threshold", "the margin of scores, sample by sample"
    return Chart(title, note, FRAME, across.labels(), labels, lines, bands=bands, rules=rules)


def _bands(curve: Sequence[Mapping[str, Any]], lines: Sequence[Line], across: Scale) -> list[Band]:
    step, keys = across.at(curve[1]["tau"]) - across.at(curve[0]["tau"]), list(_SERIES)
    return [
        drawing.band(
            f"threshold {row['tau']:.3g}", across.at(row["tau"]), step, FRAME,
            [(line.mark, formats.share(row[keys[line.mark.number - 1]])) for line in lines],
        )
        for row in curve
    ]  # fmt: skip
