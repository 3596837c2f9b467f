"""The charts and matrices of a comparison, laid out from what comparison.json holds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ple_jax.reports import drawing
from ple_jax.reports.comparison_tables import REWARDS
from ple_jax.reports.drawing import Chart, Frame, Line, Mark, Point, Scale
from ple_jax.reports.formats import decimals, number, p_value, short

_AXES = (
    ("queries", "queries seen"),
    ("generated_tokens", "tokens generated"),
    ("training_tokens", "tokens trained on"),
    ("reward_calls", "reward calls"),
    ("seconds", "seconds, without evaluation"),
)
FRAME = Frame(520, 320, left=52, right=480, top=12, bottom=286)


class Strip(NamedTuple):
    """One method's mean, interval and seeds in one reward, with positions in percent of the width."""

    tip: str
    mean: float
    low: float
    high: float
    dots: list[tuple[float, str]]  # one a seed: place, tip


class Strips(NamedTuple):
    """One reward of all methods, on a common axis."""

    title: str
    cells: list[Strip | None]
    ticks: list[tuple[float, str]]
    zero: float | None  # the baseline's mean


def marks(result: Mapping[str, Any]) -> list[Mark]:
    """Returns a mark for each method; its number appears in every chart."""
    return [drawing.mark(i, method["label"]) for i, method in enumerate(result["methods"])]


def strips(result: Mapping[str, Any]) -> Iterator[Strips]:
    """Lays out each reward of all methods: mean, interval and seeds."""
    for measure, name in REWARDS.items():
        methods = [method if measure in method["measures"] else None for method in result["methods"]]
        values = [x for m in methods if m for x in (*_bounds(m, measure), *_of_seeds(m, measure))]
        if not values:
            continue
        along = drawing.scale(values, 7, 93)  # room for the first and the last label
        at = along.at
        cells: list[Strip | None] = []
        for method in methods:
            if method is None:
                cells.append(None)
                continue
            mean, (low, high) = method["measures"][measure], _bounds(method, measure)
            dots = [(at(r["measures"][measure]), f"seed {r['seed']}: {r['measures'][measure]:.4g}") for r in method["runs"]]
            tip = f"{method['label']}: {name} {mean:.4g}, 95% interval {low:.4g} to {high:.4g}"
            cells.append(Strip(tip, at(mean), at(low), at(high), dots))
        own = next((m["measures"][measure] for m in methods if m and m["label"] == result["baseline"]), None)
        yield Strips(name.capitalize(), cells, along.labels(), None if own is None else at(own))


def _bounds(method: Mapping[str, Any], measure: str) -> tuple[float, float]:
    low, high = method["intervals"].get(measure) or (None, None)
    mean = method["measures"][measure]
    return (mean, mean) if low is None or high is None else (low, high)


def scatter(result: Mapping[str, Any]) -> Iterator[Chart]:
    """Lays out a scatter plot of each reward against KL."""
    for measure, name in REWARDS.items():
        shown = [
            (mark, method)
            for mark, method in zip(marks(result), result["methods"], strict=True)
            if {measure, "kl"} <= method["measures"].keys()
        ]
        if not shown:
            continue
        x, y = (
            drawing.scale([v for _, m in shown for v in (*_bounds(m, key), *_of_seeds(m, key))], start, end)
            for key, start, end in (("kl", FRAME.left + 8, FRAME.right), (measure, FRAME.bottom, FRAME.top))
        )
        points = [_point(mark, method, measure, name, x, y) for mark, method in shown]
        note = "against KL, nats per response"
        yield Chart(name.capitalize(), note, FRAME, x.labels(), y.labels(), points=points)


def _point(mark: Mark, method: Mapping[str, Any], measure: str, name: str, x: Scale, y: Scale) -> Point:
    means, (left, right), (low, high) = method["measures"], _bounds(method, "kl"), _bounds(method, measure)
    seeds = [
        (x.at(run["measures"]["kl"]), y.at(run["measures"][measure]), f"{mark.label}, seed {run['seed']}")
        for run in method["runs"]
    ]
    tip = f"{mark.label}: {name} {means[measure]:.4g}, KL {means['kl']:.4g} nats per response"
    across, along = (x.at(left), x.at(right)), (y.at(low), y.at(high))
    return Point(mark, tip, x.at(means["kl"]), y.at(means[measure]), across, along, seeds)


def _of_seeds(method: Mapping[str, Any], measure: str) -> list[float]:
    return [run["measures"][measure] for run in method["runs"]]


Columns = dict[int, tuple[float, float]]  # iteration -> (spent, reward)


def curves(result: Mapping[str, Any]) -> Iterator[Chart]:
    """Lays out held-out reward against what was spent, one chart for each kind of cost that any method had."""
    for axis, unit in _AXES:
        drawn = [
            (mark, runs)
            for mark, method in zip(marks(result), result["methods"], strict=True)
            if (runs := [_columns(run, axis) for run in method["runs"] if axis in run["curve"] and run["curve"][axis]])
        ]
        everything = [x for _, runs in drawn for columns in runs for x, _ in columns.values()]
        if not everything or max(everything) <= 0:
            continue
        x = drawing.scale([0, *everything], FRAME.left + 8, FRAME.right)
        y = drawing.scale([y for _, runs in drawn for run in runs for _, y in run.values()], FRAME.bottom, FRAME.top)
        lines = drawing.numbered([line for mark, runs in drawn if (line := _line(mark, runs, x, y, unit))], FRAME)
        yield Chart("Held-out reward", f"against {unit}", FRAME, x.labels(), y.labels(), lines)


def _columns(run: Mapping[str, Any], axis: str) -> Columns:
    columns = run["curve"]
    return dict(zip(columns["iteration"], zip(columns[axis], columns["heldout_reward"], strict=True), strict=True))


def _line(mark: Mark, runs: Sequence[Columns], x: Scale, y: Scale, unit: str) -> Line | None:
    """Lays out a method's mean over the iterations that all its seeds have, and a thin line for every seed.

    It is None where there is no such iteration.
    """
    shared = [iteration for iteration in runs[0] if all(iteration in run for run in runs)]
    mean = {i: tuple(sum(run[i][k] for run in runs) / len(runs) for k in (0, 1)) for i in shared}
    if not mean:
        return None
    if max(spent for run in runs for spent, _ in run.values()) <= 0:  # a level: its last value, across
        last = y.at(list(mean.values())[-1][1])
        places = [(x.at(0), last), (float(FRAME.right), last)]
        return Line(mark, drawing.path(places), [], level=True, end=places[-1], label=last)
    dots = [
        (x.at(spent), y.at(reward), f"{mark.label}: {reward:.4g} after {short(spent)} {unit} (iteration {i})")
        for i, (spent, reward) in mean.items()
    ]
    each = [drawing.path((x.at(a), y.at(b)) for a, b in run.values()) for run in runs] if len(runs) > 1 else []
    end = dots[-1][:2]
    return Line(mark, drawing.path(dot[:2] for dot in dots), dots, thin=each, end=end, label=end[1])


# ---------------------------------------------------------------- matrices


class Cell(NamedTuple):
    """A cell that compares a row's method with a column's.

    It has a text, the share of the colour in percent, whether the row's method is ahead, and the details.
    """

    text: str
    share: int
    ahead: bool
    tip: str
    strong: bool = False


class Matrix(NamedTuple):
    title: str
    note: str
    rows: list[tuple[Mark, list[Cell | None]]]


def wins(result: Mapping[str, Any]) -> Matrix | None:
    """Lays out the matrix of win rates; None where nothing was judged."""
    cells = {(row["method"], row["against"]): win_cell(row) for row in result["wins"] if row["win_rate"] is not None}
    note = (
        "Percent of the pairs of responses that the row's method wins against the column's, ties half; bold where the 95%"
        " interval leaves out 50"
    )
    return Matrix("Win rates", note, _matrix(result, cells)) if cells else None


def differences(result: Mapping[str, Any]) -> Iterator[Matrix]:
    """Lays out a matrix of all differences between methods, for each reward."""
    for measure, name in REWARDS.items():
        rows = [row for row in result["tests"] if row["measure"] == measure and row["difference"] is not None]
        if not rows:
            continue
        widest = max(abs(row["difference"]) for row in rows) or 1.0
        digits = decimals(row["difference"] for row in rows)
        cells = {}
        for row in rows:
            cells[row["method"], row["against"]] = _difference(row, 1, widest, digits)
            cells[row["against"], row["method"]] = _difference(row, -1, widest, digits)
        note = "The row's mean minus the column's, on the same seeds and queries; bold where the adjusted p is below 0.05"
        yield Matrix(f"Differences in {name}", note, _matrix(result, cells))


def _matrix(result: Mapping[str, Any], cells: Mapping[tuple[str, str], Cell]) -> list[tuple[Mark, list[Cell | None]]]:
    return [(row, [cells.get((row.label, column.label)) for column in marks(result)]) for row in marks(result)]


def win_cell(row: Mapping[str, Any]) -> Cell:
    rate, known = row["win_rate"], row["low"] is not None
    tip = f"{row['method']} against {row['against']}: {_verdicts(row)}"
    strong = known and not row["low"] <= 0.5 <= row["high"]
    return Cell(f"{100 * rate:.0f}", round(abs(rate - 0.5) * 140), rate > 0.5, tip, strong)


def _verdicts(row: Mapping[str, Any]) -> str:
    low, high = ("–" if row[key] is None else f"{row[key]:.1%}" for key in ("low", "high"))
    return (
        f"win {row['win']:.1%}, tie {row['tie']:.1%}, loss {row['loss']:.1%}; win rate {row['win_rate']:.1%},"
        f" 95% interval {low} to {high}; position bias {number(row['position_bias'], 2)}, consistency"
        f" {number(row['consistency'], 2)}; {row['judged']:,.0f} judged, {row['failed']:,.0f} without a verdict"
    )


def _difference(row: Mapping[str, Any], sign: int, widest: float, digits: int) -> Cell:
    value = sign * row["difference"]
    low, high = sorted(sign * row[key] for key in ("low", "high"))
    pair = (row["method"], row["against"])[::sign]
    tip = (
        f"{pair[0]} - {pair[1]}: {value:+.4g}, 95% interval {low:+.4g} to {high:+.4g}, p {p_value(row['p'])}, adjusted for"
        f" all pairs {p_value(row['p_holm'])}; seeds {', '.join(map(str, row['seeds']))}"
    )
    strong = row["p_holm"] is not None and row["p_holm"] < 0.05  # of one query and one seed there is no p
    return Cell(f"{value:+.{digits}f}", round(70 * abs(value) / widest), value > 0, tip, strong)
