"""The pictures of the documentation, drawn from the tables that stand in it, so that a picture and its numbers cannot part.

    .venv/bin/python scripts/draw_docs.py
    .venv/bin/python scripts/draw_docs.py --runs runs/quickstart,runs/quickstart_1
    .venv/bin/python scripts/draw_docs.py --kept docs/evidence/quickstart

The first line writes docs/images: quickstart.svg from the table of docs/quickstart.md, methods.svg from that of
docs/results.md, rooms.svg from the imports of the sources. The second one prints the table of docs/quickstart.md from
finished runs, one for each seed, to be pasted; the third one that of docs/results.md, from the runs of a comparison that
are kept.
"""

import argparse
import json
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
INK, SOFT, RULE, COLOURS = "#1d2126", "#626b76", "#e4e5e3", ("#0f7b6c", "#c2601a", "#3b6fb5")
_MISSING = "–"
_BUDGET, _MOST_KL = 20.0, 30.0  # nats a response: the quickstart's config.eval.max_kl, and the end of the axis
_KEPT = (4.0, 16.0)  # nats a response: the budgets of the comparison that is kept
_INTERVAL = re.compile(r"(-?[\d.]+) \((-?[\d.]+) to (-?[\d.]+)\)")


# ---------------------------------------------------------------- tables


def read_table(page: Path, first: str) -> list[dict[str, str]]:
    """The rows of the table of a Markdown page whose first column is called `first`, by the names of the columns."""
    lines = iter(page.read_text(encoding="utf-8").splitlines())
    header = next((line for line in lines if line.startswith(f"| {first} |")), None)
    if header is None:
        raise ValueError(f"{page} has no table whose first column is {first!r}")
    next(lines)  # the rule below the header
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(_cells(header), _cells(line), strict=True)))
    return rows


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _mean_and_interval(cell: str) -> tuple[float, float, float]:
    """`0.902 (0.856 to 0.949)` -> its three numbers."""
    match = _INTERVAL.fullmatch(cell)
    if match is None:
        raise ValueError(f"{cell!r} must read like 0.902 (0.856 to 0.949)")
    mean, low, high = map(float, match.groups())
    return mean, low, high


def table_of_runs(folders: Sequence[Path]) -> str:
    """Held-out reward, with its 95% bootstrap interval over queries, and KL in nats a response: the evaluated iterations of
    finished runs; a dash where one had spent its budget before.
    """
    seeds = [json.loads((folder / "summary.json").read_text(encoding="utf-8"))["seed"] for folder in folders]
    header = ["iteration", *(f"seed {seed}: {what}" for seed in seeds for what in ("reward (95%)", "KL"))]
    runs = [dict(_iterations(folder)) for folder in folders]
    evaluated = sorted({iteration for run in runs for iteration in run})
    rows = [[str(i), *(cell for run in runs for cell in run.get(i, (_MISSING, _MISSING)))] for i in evaluated]
    return _table(header, rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first, *others = (f"| {' | '.join(row)} |" for row in (header, *rows))
    return "\n".join([first, "|---" * len(header) + "|", *others])


def _iterations(folder: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    from ple_jax import intervals
    from ple_jax.core.files import read_jsonl

    for line in read_jsonl(folder / "metrics.jsonl"):
        if line.get("heldout_reward") is not None:
            rollouts = read_jsonl(folder / "evaluations" / f"iter_{line['iteration']:04d}.jsonl")
            plain = [[r["reward"] for r in rollout["responses"] if r["kind"] == "plain"] for rollout in rollouts]
            low, high = intervals.bootstrap_ci([fmean(rewards) for rewards in plain], seed=0)
            reward = f"{line['heldout_reward']:.3f} ({low:.3f} to {high:.3f})"
            yield line["iteration"], (reward, f"{line['heldout_kl_response']:.1f}")


def table_of_kept(folder: Path) -> str:
    """Returns the table of what the kept trainings of a comparison reach on the dev split: a row for each method and rate.

    Every seed has its value, in ascending order of the seeds. At a budget it is what the curve of a run has where it first
    gets there, linear between two evaluations; a dash where it never does.
    """
    from ple_jax.experiments.methods import METHODS

    runs: dict[tuple[str, str], dict[int, list[str]]] = {}
    for file in folder.glob("*__lr-*__seed-?.tar.xz"):
        method, lr, seed = file.name.removesuffix(".tar.xz").split("__")
        with tarfile.open(file) as packed:
            member = packed.extractfile(f"{file.name.removesuffix('.tar.xz')}/summary.json")
            assert member is not None
            runs.setdefault((method, lr[3:]), {})[int(seed[5:])] = _reached(json.load(member)["points"])
    header = ["what is compared", "lr", "seeds", *(f"{key} at {b:g} nats" for b in _KEPT for key in ("reward", "second"))]
    header += ["in the end", "its KL"]
    rows = []
    for method, lr in sorted(runs, key=lambda key: (list(METHODS).index(key[0]), key[1])):
        of_seeds = dict(sorted(runs[method, lr].items()))
        rows.append([method, lr, *map(", ".join, (map(str, of_seeds), *zip(*of_seeds.values(), strict=True)))])
    return _table(header, rows)


def _reached(points: Sequence[Mapping[str, float]]) -> list[str]:
    """Reward and second reward at every budget, and reward and KL at the last evaluation, of one run."""
    import numpy as np

    from ple_jax.evaluation.frontier import at

    kl, *both = (np.array([point[key] for point in points]) for key in ("kl", "reward", "second"))
    found = [f"{value:.2f}" for budget in _KEPT for key in both for value in [at(kl, key, budget)]]
    return [_MISSING if value == "nan" else value for value in found] + [f"{both[0][-1]:.2f}", f"{kl[-1]:.1f}"]


# ---------------------------------------------------------------- drawing


class Panel:
    """A pair of axes in a picture, and what is drawn in them, as lines of SVG."""

    def __init__(self, *, left: int, top: int, width: int, height: int, x: tuple[float, float], y: tuple[float, float]):
        """Args: the frame in pixels, and the values at its ends."""
        self.left, self.top, self.width, self.height, self.of_x, self.of_y = left, top, width, height, x, y
        self.svg: list[str] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.of_x, self.of_y
        across, along = (x - x0) / (x1 - x0), (y1 - y) / (y1 - y0)
        return round(self.left + self.width * across, 1), round(self.top + self.height * along, 1)

    def axes(self, title: str, below: str, xticks: Iterable[float], yticks: Iterable[float]) -> None:
        bottom = self.top + self.height
        self.text(self.left, self.top - 16, title, fill=INK, weight=600)
        self.text(self.left + self.width, bottom + 38, below, anchor="end")
        for y in yticks:
            height = self.at(self.of_x[0], y)[1]
            self.svg.append(f'<path d="M{self.left} {height}h{self.width}" stroke="{RULE}"/>')
            self.text(self.left - 8, height + 4, f"{y:g}", anchor="end")
        for x in xticks:
            self.text(self.at(x, 0)[0], bottom + 18, f"{x:g}", anchor="middle")

    def text(self, x: float, y: float, words: str, *, fill: str = SOFT, anchor: str = "start", weight: int = 400) -> None:
        self.svg.append(
            f'<text x="{x}" y="{y}" fill="{fill}" text-anchor="{anchor}" font-weight="{weight}">{escape(words)}</text>'
        )

    def line(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        """A curve with a dot at each value."""
        places = [self.at(*point) for point in points]
        path = "M" + "L".join(f"{x} {y}" for x, y in places)
        self.svg.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2.5" stroke-linejoin="round"/>')
        self.svg += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in places]

    def across(self, y: float, words: str) -> None:
        """A dotted line at one value of y."""
        height = self.at(self.of_x[0], y)[1]
        self.svg.append(f'<path d="M{self.left} {height}h{self.width}" stroke="{SOFT}" stroke-dasharray="2 3"/>')
        self.text(self.left + 4, height - 5, words)

    def names(self, ends: Mapping[str, float]) -> None:
        """The curves' names on the right, where they end or, so that all can be read, next to it."""
        from ple_jax.reports.drawing import spread

        places = [self.at(self.of_x[1], y) for y in ends.values()]
        heights = spread([y for _, y in places], self.top, self.top + self.height, 15)
        for name, (x, _), y, colour in zip(ends, places, heights, COLOURS, strict=True):
            self.text(x + 9, y + 4, name, fill=colour, weight=600)

    def band(self, low: Sequence[tuple[float, float]], high: Sequence[tuple[float, float]], colour: str) -> None:
        """The area of an interval around a curve."""
        path = "M" + "L".join(f"{x} {y}" for x, y in (self.at(*point) for point in [*low, *reversed(high)]))
        self.svg.append(f'<path d="{path}Z" fill="{colour}" opacity="0.13"/>')

    def point(self, x: float, y: tuple[float, float, float], name: str, colour: str, *, before: bool) -> None:
        """A mean with its interval along y, and its name behind or before it."""
        (across, along), (_, low), (_, high) = (self.at(x, value) for value in y)
        self.svg.append(f'<path d="M{across} {low}V{high}" stroke="{colour}" stroke-width="2" opacity="0.5"/>')
        self.svg.append(f'<circle cx="{across}" cy="{along}" r="5" fill="{colour}"/>')
        side, anchor = (-10, "end") if before else (10, "start")
        weight = 600 if colour == COLOURS[0] else 400
        self.text(across + side, along + 4, name, fill=INK, anchor=anchor, weight=weight)


def picture(panels: Sequence[Panel], title: str, *, width: int, height: int) -> str:
    """One SVG file, readable on a light and on a dark page: it brings its own ground."""
    font = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' font-family="{font}" font-size="13" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10" fill="#ffffff" stroke="{RULE}"/>',
        *(line for panel in panels for line in panel.svg),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- the pictures


def quickstart(rows: Sequence[dict[str, str]]) -> str:
    """Held-out reward and KL against the iteration, a curve for each seed."""
    seeds = [name.removesuffix(": KL") for name in rows[0] if name.endswith(": KL")]
    last, iterations = float(rows[-1]["iteration"]), [float(row["iteration"]) for row in rows]
    reward = Panel(left=48, top=52, width=340, height=218, x=(0, last), y=(-0.1, 1))
    drift = Panel(left=502, top=52, width=300, height=218, x=(0, last), y=(0, _MOST_KL))
    reward.axes("held-out reward, mean over 64 openings", "iteration", iterations, (0, 0.25, 0.5, 0.75, 1))
    drift.axes("its cost: KL to the start, nats a response", "iteration", iterations, (0, 5, 10, 15, 20, 25, 30))
    drift.across(_BUDGET, "the budget")
    known = {seed: [row for row in rows if row[f"{seed}: KL"] != _MISSING] for seed in seeds}
    curves = {seed: [_mean_and_interval(row[f"{seed}: reward (95%)"]) for row in known[seed]] for seed in seeds}
    for values, colour in zip(curves.values(), COLOURS, strict=True):  # all below the curves
        reward.band(*([(x, value[i]) for x, value in zip(iterations, values, strict=False)] for i in (1, 2)), colour)
    for (seed, values), colour in zip(curves.items(), COLOURS, strict=True):
        reward.line([(x, mean) for x, (mean, _, _) in zip(iterations, values, strict=False)], colour)
        drift.line([(x, float(row[f"{seed}: KL"])) for x, row in zip(iterations, known[seed], strict=False)], colour)
    reward.names({seed: values[-1][0] for seed, values in curves.items()})
    drift.names({seed: float(known[seed][-1][f"{seed}: KL"]) for seed in seeds})
    return picture([reward, drift], "The quickstart: held-out reward and KL by iteration", width=870, height=326)


# whose names stand left of their points, to leave room
_BEFORE = ("PLE", "context distillation", "iterative DPO", "PPO", "SFT")


def methods(rows: Sequence[dict[str, str]]) -> str:
    """Training reward against KL, a point for each method."""
    panel = Panel(left=48, top=52, width=790, height=330, x=(-1.5, 61), y=(0, 1.05))
    panel.axes("training reward in the end, mean over the seeds and its 95% interval",
               "KL to the start model, nats a response", range(0, 61, 10), (0, 0.25, 0.5, 0.75, 1))  # fmt: skip
    for row in rows:
        name = row["method"].split(",")[0]
        colour = COLOURS[0] if name == "PLE" else SOFT if name.startswith("start model") else COLOURS[1]
        y = _mean_and_interval(row["training reward (95%)"])
        panel.point(float(row["KL"]), y, name, colour, before=name in _BEFORE)
    return picture([panel], "Ten methods on the quickstart task: training reward against KL", width=870, height=440)


_COMPUTING = ("backend", "torch_ascend")  # rooms that import JAX or torch


def rooms(house: Any, order: Iterable[str]) -> str:
    """The rooms of the package in layers, each above all that it imports; a line for every import that no path implies.

    Args:
        house: the sources, as scripts/house.py reads them.
        order: the rooms from the bottom up.
    """
    order = [room for room in order if room != "the functional API"]  # a table of names, imported when they are used
    below: dict[str, set[str]] = {room: set() for room in order}
    for importer, imported, _ in house.edges:
        high, low = house.rooms[importer], house.rooms.get(imported)
        if low in below and high in below and high != low:
            below[high].add(low)
    layers: dict[str, int] = {}
    reached: dict[str, set[str]] = {}
    for room in order:  # from the bottom up
        layers[room] = 1 + max((layers[other] for other in below[room]), default=-1)
        reached[room] = below[room].union(*(reached[other] for other in below[room]))
    rows = [[room for room in order if layers[room] == layer] for layer in range(max(layers.values()) + 1)]
    panel = Panel(left=0, top=0, width=_WIDE, height=_ROW * len(rows), x=(0, _WIDE), y=(0, _ROW * len(rows)))
    places = {
        room: (_WIDE * (2 * i + 1) / (2 * len(row)), _ROW * (len(rows) - layer - 0.5))
        for layer, row in enumerate(rows)
        for i, room in enumerate(row)
    }
    for room in order:
        implied = set().union(*(reached[other] for other in below[room]))
        panel.svg += [_curve(places[room], places[other]) for other in sorted(below[room] - implied)]
    for room, (x, y) in places.items():
        panel.svg.append(f'<rect x="{x - 62}" y="{y - 16}" width="124" height="32" rx="6" fill="#f6f7f6" stroke="{SOFT}"/>')
        panel.text(x, y + 4, room, fill=INK, anchor="middle", weight=700 if room in _COMPUTING else 400)
    return picture([panel], "The rooms of ple_jax in layers, by their imports", width=_WIDE, height=_ROW * len(rows))


_WIDE, _ROW = 720, 54  # of the picture of rooms, in pixels


def _curve(high: tuple[float, float], low: tuple[float, float]) -> str:
    (x, y), (to_x, to_y) = (high[0], high[1] + 16), (low[0], low[1] - 16)
    bend = (to_y - y) / 2
    curve = f"M{x} {y}C{x} {y + bend} {to_x} {to_y - bend} {to_x} {to_y}"
    return f'<path d="{curve}" fill="none" stroke="{COLOURS[2]}" opacity="0.55"/>'


def _rooms() -> str:
    sys.path.insert(0, str(DOCS.parent))
    from scripts import house

    return rooms(house.read(DOCS.parent), house.ROOMS)


PICTURES = {
    "quickstart.svg": lambda: quickstart(read_table(DOCS / "quickstart.md", "iteration")),
    "methods.svg": lambda: methods(read_table(DOCS / "results.md", "method")),
    "rooms.svg": _rooms,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", help="work directories of the quickstart, one a seed: print their table instead")
    parser.add_argument("--kept", type=Path, help="the folder of a comparison's kept runs: print their table instead")
    given = parser.parse_args()
    if given.runs:
        print(table_of_runs([Path(folder) for folder in given.runs.split(",")]))
        return
    if given.kept:
        print(table_of_kept(given.kept))
        return
    (DOCS / "images").mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (DOCS / "images" / name).write_text(draw(), encoding="utf-8")
        print(DOCS / "images" / name)


if __name__ == "__main__":
    main()
