"""The parts of every chart, laid out in SVG units; `templates/kit.html` draws them.

Series are told apart by colour (`--k0` to `--k7` of templates/style.css: at least 25 apart in CIELAB for normal, red-blind
and green-blind sight, light and dark) and, from the ninth on, by dashes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ple_jax.reports.formats import short

COLOURS = 8
DASHES = 3
_NEAR = 3.0  # lines nearer than this cover one another
TIP = 214  # width of what appears under the pointer


class Frame(NamedTuple):
    """A chart's size, and the edges of the area in which it is plotted, in SVG units."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


class Scale(NamedTuple):
    """An axis, on which the value `low` lies at the position `start`, and `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]

    def at(self, value: float) -> float:
        """Returns the position of a value."""
        return round(self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low), 1)

    def labels(self, text: Callable[[float], str] = short) -> list[tuple[float, str]]:
        """Returns the positions and texts of the ticks."""
        return [(self.at(tick), text(tick)) for tick in self.ticks]


class Mark(NamedTuple):
    """How a series is marked in all charts of a page: its number from 1, its name, its colour's number and its dashes'."""

    number: int
    label: str
    colour: int
    dash: int


class Line(NamedTuple):
    """A curve: its path, and its dots (x, y, and the text that the pointer shows)."""

    mark: Mark
    path: str
    dots: Sequence[tuple[float, float, str]]
    value: str = ""  # the last one, for the legend; without it there is no legend
    thin: Sequence[str] = ()  # paths of what it is the mean of
    level: bool = False  # nothing was spent along this axis
    end: tuple[float, float] | None = None  # from where a line leads to its number, if it has one beside the plot
    label: float = 0.0  # where that stands
    quiet: bool = False  # grey: of another series than the chart is about


class Point(NamedTuple):
    """One series in a scatter plot: its mean, the intervals of x and of y, and the seeds that it is the mean of."""

    mark: Mark
    tip: str
    x: float
    y: float
    across: tuple[float, float]
    along: tuple[float, float]
    seeds: Sequence[tuple[float, float, str]]


class Band(NamedTuple):
    """What appears when the pointer is over one value of x: a box whose left edge is at `tip`."""

    title: str
    x: float
    left: float
    width: float
    tip: float
    rows: Sequence[tuple[Mark, str]]


class Chart(NamedTuple):
    """A plot of lines or of points."""

    title: str
    note: str
    frame: Frame
    xticks: Sequence[tuple[float, str]]
    yticks: Sequence[tuple[float, str]]
    lines: Sequence[Line] = ()
    points: Sequence[Point] = ()
    bands: Sequence[Band] = ()
    rules: Sequence[tuple[float, str]] = ()  # lines across x, and what they say


def mark(index: int, label: str) -> Mark:
    """Returns the mark of a page's series number `index`, counted from 0."""
    return Mark(index + 1, label, index % COLOURS, index // COLOURS % DASHES)


def scale(values: Iterable[float], start: float, end: float) -> Scale:
    """Makes an axis with round ticks that enclose the values."""
    known = list(values)
    ticks = round_ticks(min(known), max(known))
    return Scale(ticks[0], ticks[-1], start, end, ticks)


def round_ticks(low: float, high: float) -> list[float]:
    """Returns four to seven round values that enclose [low, high]."""
    span, size = high - low, max(abs(low), abs(high))
    if span <= max(1e-9 * size, 1e-300):  # equal but for rounding
        span = size if size > 1e-300 else 1.0
    unit = 10.0 ** math.floor(math.log10(span / 4))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if span / (m * unit) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def path(points: Iterable[tuple[float, float]]) -> str:
    """Returns the `d` attribute of an SVG path through the points."""
    return "M" + "L".join(f"{x} {y}" for x, y in points)


def told_apart(lines: Sequence[Line]) -> list[Line]:
    """Gives dashes to each line that would cover another one wherever both are, so that both are seen."""
    found: list[Line] = []
    for line in lines:
        places = {x: y for x, y, _ in line.dots}
        covered = [
            other for other in found
            if (shared := [abs(y - places[x]) for x, y, _ in other.dots if x in places]) and max(shared) < _NEAR
        ]  # fmt: skip
        dash = max((other.mark.dash + 1 for other in covered), default=line.mark.dash)
        found.append(line._replace(mark=line.mark._replace(dash=max(dash, line.mark.dash) % DASHES)))
    return found


def numbered(lines: Sequence[Line], frame: Frame) -> list[Line]:
    """Makes the lines distinguishable, and places their numbers beside the plot where none covers another."""
    places = spread([line.label for line in lines], frame.top + 4, frame.bottom - 4, 15)
    return [line._replace(label=place) for line, place in zip(told_apart(lines), places, strict=True)]


def band(title: str, x: float, step: float, frame: Frame, rows: Sequence[tuple[Mark, str]]) -> Band:
    """Makes a band `step` wide around x, with its box on the side on which there is room."""
    tip = x + 8 if x < frame.width / 2 else x - 8 - TIP
    return Band(title, x, x - step / 2, step, tip, rows)


def spread(places: Sequence[float], low: float, high: float, gap: float) -> list[float]:
    """Moves the places until they are `gap` apart (less where there is no room), in order and between low and high."""
    order = sorted(range(len(places)), key=places.__getitem__)
    gap = min(gap, (high - low) / max(len(places) - 1, 1))
    found = list(places)
    at = low - gap
    for i in order:
        at = found[i] = max(found[i], at + gap)
    at = high + gap
    for i in reversed(order):
        at = found[i] = min(found[i], at - gap)
    return [round(place, 1) for place in found]  # not on the way, where rounding would add up
