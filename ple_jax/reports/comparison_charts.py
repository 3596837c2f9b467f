"""The charts and matrices of a comparison, laid out from what comparison.json holds.

Methods are told apart by their number first, which stands in every chart, then by colour (eight of them, at least 25 apart
in CIELAB for normal, red-blind and green-blind sight, light and dark) and, from the ninth on, by dashes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ple_jax.reports import drawing
from ple_jax.reports.comparison_tables import REWARDS, decimals, p_value

COLOURS = 8
_AXES = (
    ("queries", "queries seen"),
    ("generated_tokens", "tokens generated"),
    ("training_tokens", "tokens trained on"),
    ("reward_calls", "reward calls"),
    ("seconds", "seconds, without evaluation"),
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 320, 52, 40, 12, 34


class Mark(NamedTuple):
    """A method in the charts: its number from 1, its name, its colour's number and its dashes'."""

    number: int
    label: str
    colour: int
    dash: int


class Strip(NamedTuple):
    """One method's mean, interval and seeds in one reward; places in percent of the width."""

    tip: str
    mean: float
    low: float
    high: float
    dots: list[tuple[float, str]]  # one a seed: place, tip


class Strips(NamedTuple):
    """A reward of all methods, on one axis."""

    title: str
    cells: list[Strip | None]
    ticks: list[tuple[float, str]]
    zero: float | None  # the baseline's mean


class Point(NamedTuple):
    """One method in a scatter plot, in SVG units."""

    mark: Mark
    tip: str
    x: float
    y: float
    across: tuple[float, float]  # the interval of x
    along: tuple[float, float]  # of y
    seeds: list[tuple[float, float, str]]


class Line(NamedTuple):
    """One method's curve: the mean over seeds and every seed, as SVG paths; `level`: nothing was spent along this axis."""

    mark: Mark
    path: str
    seeds: list[str]
    dots: list[tuple[float, float, str]]
    end: tuple[float, float]
    label: float  # where its number stands, spread so that none hides another
    level: bool


class Chart(NamedTuple):
    """A plot of points or of lines, laid out in SVG units."""

    title: str
    note: str
    xticks: list[tuple[float, str]]
    yticks: list[tuple[float, str]]
    points: list[Point]
    lines: list[Line]


def marks(result: Mapping[str, Any]) -> list[Mark]:
    return [Mark(i + 1, method["label"], i % COLOURS, i // COLOURS % 3) for i, method in enumerate(result["methods"])]


def strips(result: Mapping[str, Any]) -> Iterator[Strips]:
    """Mean, interval and seeds of each reward."""
    for measure, name in REWARDS.items():
        methods = [method if measure in method["measures"] else None for method in result["methods"]]
        values = [x for m in methods if m for x in (*_bounds(m, measure), *_of_seeds(m, measure))]
        if not values:
            continue
        at, ticks = _scale(values, 3, 97)
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
        yield Strips(name.capitalize(), cells, ticks, None if own is None else at(own))


def _bounds(method: Mapping[str, Any], measure: str) -> tuple[float, float]:
    low, high = method["intervals"].get(measure) or (None, None)
    mean = method["measures"][measure]
    return (mean, mean) if low is None or high is None else (low, high)


def scatter(result: Mapping[str, Any]) -> Iterator[Chart]:
    """Each reward against KL."""
    for measure, name in REWARDS.items():
        shown = [
            (mark, method)
            for mark, method in zip(marks(result), result["methods"], strict=True)
            if {measure, "kl"} <= method["measures"].keys()
        ]
        if not shown:
            continue
        x, xticks = _scale([v for _, m in shown for v in (*_bounds(m, "kl"), *_of_seeds(m, "kl"))], LEFT + 8, WIDTH - RIGHT)
        y, yticks = _scale(
            [v for _, m in shown for v in (*_bounds(m, measure), *_of_seeds(m, measure))], HEIGHT - BOTTOM, TOP
        )
        points = []
        for mark, method in shown:
            means, (left, right), (low, high) = method["measures"], _bounds(method, "kl"), _bounds(method, measure)
            seeds = [
                (x(run["measures"]["kl"]), y(run["measures"][measure]), f"{mark.label}, seed {run['seed']}")
                for run in method["runs"]
            ]
            tip = f"{mark.label}: {name} {means[measure]:.4g}, KL {means['kl']:.4g} nats per response"
            across, along = (x(left), x(right)), (y(low), y(high))
            points.append(Point(mark, tip, x(means["kl"]), y(means[measure]), across, along, seeds))
        yield Chart(name.capitalize(), "against KL, nats per response", xticks, yticks, points, [])


def _of_seeds(method: Mapping[str, Any], measure: str) -> list[float]:
    return [run["measures"][measure] for run in method["runs"]]


def curves(result: Mapping[str, Any]) -> Iterator[Chart]:
    """Held-out reward against what was spent, one chart for each kind of it that any method spent."""
    for axis, unit in _AXES:
        drawn = [
            (mark, runs)
            for mark, method in zip(marks(result), result["methods"], strict=True)
            if (runs := [_columns(run, axis) for run in method["runs"] if axis in run["curve"] and run["curve"][axis]])
        ]
        everything = [x for _, runs in drawn for columns in runs for x, _ in columns.values()]
        if not everything or max(everything) <= 0:
            continue
        at_x, xticks = _scale([0, *everything], LEFT + 8, WIDTH - RIGHT)
        at_y, yticks = _scale([y for _, runs in drawn for run in runs for _, y in run.values()], HEIGHT - BOTTOM, TOP)
        lines = []
        for mark, runs in drawn:
            shared = [iteration for iteration in runs[0] if all(iteration in run for run in runs)]
            mean = {i: tuple(sum(run[i][k] for run in runs) / len(runs) for k in (0, 1)) for i in shared}
            if not mean:
                continue
            level = max(x for run in runs for x, _ in run.values()) <= 0
            if level:  # its last value, across
                last = at_y(list(mean.values())[-1][1])
                places, each, dots = [(at_x(0), last), (float(WIDTH - RIGHT), last)], [], []
            else:
                places = [(at_x(x), at_y(y)) for x, y in mean.values()]
                each = [_path((at_x(x), at_y(y)) for x, y in run.values()) for run in runs] if len(runs) > 1 else []
                tips = [f"{mark.label}: {y:.4g} after {_short(x)} {unit} (iteration {i})" for i, (x, y) in mean.items()]
                dots = [(x, y, tip) for (x, y), tip in zip(places, tips, strict=True)]
            lines.append(Line(mark, _path(places), each, dots, places[-1], places[-1][1], level))
        spread = _spread([line.end[1] for line in lines], TOP + 4, HEIGHT - BOTTOM - 4, 15)
        lines = [line._replace(label=y) for line, y in zip(lines, spread, strict=True)]
        yield Chart("Held-out reward", f"against {unit}", xticks, yticks, [], lines)


def _columns(run: Mapping[str, Any], axis: str) -> dict[int, tuple[float, float]]:
    """Iteration -> (spent, reward)."""
    columns = run["curve"]
    return dict(zip(columns["iteration"], zip(columns[axis], columns["heldout_reward"], strict=True), strict=True))


def _scale(values: Sequence[float], start: float, end: float) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """From values to places between start and end, and round ticks that enclose the values."""
    ticks = drawing.round_ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]

    def at(value: float) -> float:
        return round(start + (end - start) * (value - low) / (high - low), 1)

    return at, [(at(tick), _short(tick)) for tick in ticks]


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.4g}"


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in points)


def _spread(places: Sequence[float], low: float, high: float, gap: float) -> list[float]:
    """The places, moved until they are `gap` apart (less where there is no room), in order and between low and high."""
    order = sorted(range(len(places)), key=places.__getitem__)
    gap = min(gap, (high - low) / max(len(places) - 1, 1))
    found = list(places)
    at = low - gap
    for i in order:
        at = found[i] = max(found[i], at + gap)
    at = high + gap
    for i in reversed(order):
        at = found[i] = round(min(found[i], at - gap), 1)
    return found


# ---------------------------------------------------------------- matrices


class Cell(NamedTuple):
    """A row's method against a column's: text, share of the colour in percent, whether it is ahead, and the details."""

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
    """Win rates; None where nothing was judged."""
    cells = {(row["method"], row["against"]): _win(row) for row in result["wins"] if row["win_rate"] is not None}
    note = (
        "Percent of the pairs of responses that the row's method wins against the column's, ties half; bold where the 95%"
        " interval leaves out 50"
    )
    return Matrix("Win rates", note, _matrix(result, cells)) if cells else None


def differences(result: Mapping[str, Any]) -> Iterator[Matrix]:
    """All differences in each reward."""
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


def _win(row: Mapping[str, Any]) -> Cell:
    rate, known = row["win_rate"], row["low"] is not None
    tip = f"{row['method']} against {row['against']}: {_verdicts(row)}"
    strong = known and not row["low"] <= 0.5 <= row["high"]
    return Cell(f"{100 * rate:.0f}", round(abs(rate - 0.5) * 140), rate > 0.5, tip, strong)


def _verdicts(row: Mapping[str, Any]) -> str:
    low, high = ("–" if row[key] is None else f"{row[key]:.1%}" for key in ("low", "high"))
    return (
        f"win {row['win']:.1%}, tie {row['tie']:.1%}, loss {row['loss']:.1%}; win rate {row['win_rate']:.1%},"
        f" 95% interval {low} to {high}; position bias {drawing.number(row['position_bias'], 2)}, consistency"
        f" {drawing.number(row['consistency'], 2)}; {row['judged']:,.0f} judged, {row['failed']:,.0f} without a verdict"
    )


def _difference(row: Mapping[str, Any], sign: int, widest: float, digits: int) -> Cell:
    value = sign * row["difference"]
    low, high = sorted(sign * row[key] for key in ("low", "high"))
    pair = (row["method"], row["against"])[::sign]
    tip = (
        f"{pair[0]} - {pair[1]}: {value:+.4g}, 95% interval {low:+.4g} to {high:+.4g}, p {p_value(row['p'])}, adjusted"
        f" {p_value(row['p_holm'])}, of the seeds alone {p_value(row['p_seeds'])}; seeds {', '.join(map(str, row['seeds']))}"
    )
    return Cell(f"{value:+.{digits}f}", round(70 * abs(value) / widest), value > 0, tip, row["p_holm"] < 0.05)
