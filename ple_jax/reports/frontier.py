"""A comparison at several budgets: a table for each of them, and the curves of all runs, reward against KL."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ple_jax.reports import drawing
from ple_jax.reports.comparison_charts import FRAME
from ple_jax.reports.comparison_tables import REWARDS, Table, adjusted, against_baseline, tested, written
from ple_jax.reports.drawing import Chart, Frame, Line, Mark, Scale
from ple_jax.reports.formats import MISSING, decimals, interval, is_number, number

SMALL = Frame(480, 220, left=52, right=466, top=12, bottom=186)
_BEYOND = 1.5  # times the largest budget: as far as the curves are drawn
_COLUMNS = {"reward": "reward", "reward_second": "second"}  # measure of answers -> of evaluations


def title(view: str) -> str:
    """Returns the title of a view, which says what it compares."""
    if view.startswith("kl_"):
        return f"Within {view.removeprefix('kl_')} nats a response"
    return {"best": "The best of each run", "newest": "At equal tokens"}.get(view, "All answers")


# ---------------------------------------------------------------- tables


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Lays out what the curves of the dev split say at the budgets, and a table for each view, of its answers to the test.

    At equal KL are the curves alone: a run is evaluated now and then, and its best within a budget may be far below it.
    """
    return _on_curves(result["frontier"]) + [_of_view(view, result["frontier"]) for view in result["views"]]


_HEAD = (
    "KL", "training reward", "difference", "p", "by length", "second reward", "perplexity", "cut off", "Distinct-2",
    "repetition", "overlap",
)  # fmt: skip
_TEXTS = ("perplexity", "truncated", "distinct_2", "repetition", "overlap")
_TOKENS = {"generated_tokens": "generated", "principle_tokens": "principles", "training_tokens": "trained on"}


def _of_view(view: Mapping[str, Any], frontier: Mapping[str, Any]) -> Table:
    name, methods = view["view"], view["methods"]
    reached = {row["method"]: row for row in frontier["budgets"] if row["view"] == name}
    digits = {key: decimals(m["measures"].get(key) for m in methods) for key in (*REWARDS, "kl")}
    rows = []
    for method in methods:
        label, measured = method["label"], method["measures"]
        rates = {run["lr"] for run in frontier["runs"] if run["label"] == label and name in run["views"]} - {None}
        gets = _gets(reached[label]) if label in reached else MISSING
        spans = {key: interval(measured.get(key), method["intervals"].get(key), d) for key, d in digits.items()}
        against = against_baseline(view, "reward", label, digits["reward"])
        texts = [number(measured.get(key), 3) for key in _TEXTS]
        known = [", ".join(f"{rate:g}" for rate in sorted(rates)) or MISSING, *([gets] if reached else [])]
        tokens = [] if reached else [written(key, measured.get(key)) for key in _TOKENS]
        rows.append([label, *known, spans["kl"], spans["reward"], *against, spans["reward_second"], *texts, *tokens])
    head = ["method", "rate", *(["seeds that get there"] if reached else []), *_HEAD]
    return Table(name, title(name), _note(view, bool(reached)), [*head, *([] if reached else _TOKENS.values())], rows)


def _gets(row: Mapping[str, Any]) -> str:
    """Says how many seeds get as far as a budget, and for how many of them the start model answers nevertheless."""
    return f"{row['reached']} of {row['runs']}" + (f", {row['start']} as the start" if row["start"] else "")


_CHOSEN = {
    "best": "The best evaluation of each run on the dev split answers the test split",
    "newest": "The last policy of each run answers the test split",
}


def _note(view: Mapping[str, Any], budget: bool) -> str:
    chosen = _CHOSEN.get(
        view["view"],
        "The best evaluation of each run within the budget on the dev split answers the test split; a run that never gets as"
        " far as the budget stands with the best that it has, and one of which no evaluation within it is better than the"
        " first answers as the start model",
    )
    p = f", {adjusted(n)}" if (n := tested(view, "reward")) else ""
    tokens = (
        ""
        if budget
        else " Tokens until then: sampled, added to prompts by the principles, and trained on; what trains on data that were"
        " made before samples none."
    )
    return (
        f"{chosen}. Means over seeds with 95% intervals, seeds and queries both draws; KL to the start in nats per"
        f" response, of these answers; difference to {view['baseline']} on the same seeds and queries{p}; by length: what of"
        " it the lengths of the responses alone would give; perplexity under the base model; overlap: the share of trigrams"
        f" that stand in the principles.{tokens}"
    )


def _on_curves(frontier: Mapping[str, Any]) -> list[Table]:
    """Lays out the dev split's reward where a curve crosses a budget, and its mean on the way there."""
    budgets = list(dict.fromkeys(row["view"] for row in frontier["budgets"]))
    rows: dict[str, list[str]] = {}
    for row in frontier["budgets"]:
        cells = rows.setdefault(row["method"], [MISSING] * (3 * len(budgets)))
        spans = [
            interval(row[key], (row[f"{key}_low"], row[f"{key}_high"]), 3) if is_number(row[key]) else MISSING
            for key in ("reward", "second", "area")
        ]
        if 0 < row["reached"] < row["runs"]:
            spans[0] += f", {row['reached']} of {row['runs']}"
        at = 3 * budgets.index(row["view"])
        cells[at : at + 3] = spans
    if not rows:
        return []
    names = [f"{what} at {view.removeprefix('kl_')}" for view in budgets for what in ("reward", "second", "area")]
    note = (
        "The dev split, on which rates were chosen too: the reward, and the second one, where a run's curve first gets to a"
        " budget, linear between two evaluations; area: the mean reward on the way there. Means over the seeds that get"
        " there (some of them where it is said), with 95% intervals over these seeds (Student); a dash where none does."
    )
    cells_of = [[label, *cells] for label, cells in rows.items()]
    return [Table("curves", "At equal KL, on the curves of the dev split", note, ["method", *names], cells_of)]


# ---------------------------------------------------------------- charts


def labels(result: Mapping[str, Any]) -> list[str]:
    """Returns the labels of all methods, in the order in which they are named."""
    named = [method["label"] for view in result["views"] for method in view["methods"]]
    return list(dict.fromkeys([*named, *(run["label"] for run in result["frontier"]["runs"])]))


def marks(result: Mapping[str, Any]) -> dict[str, Mark]:
    return {label: drawing.mark(i, label) for i, label in enumerate(labels(result))}


def charts(result: Mapping[str, Any]) -> Iterator[Chart]:
    """Lays out each reward against KL, with one line for each method.

    It is the mean over the method's runs that stand in the table of the largest budget.
    """
    for measure, name in REWARDS.items():
        if drawn := _Drawn.of(result, measure, FRAME):
            lines = drawing.numbered([drawn.line(label, numbered=True) for label in drawn.means], FRAME)
            yield drawn.chart(name.capitalize(), "against KL, nats per response; dev split", lines)


def every_run(result: Mapping[str, Any]) -> Iterator[Chart]:
    """Lays out the training reward of all runs, with one chart for each method.

    It shows the method's own runs, of every rate and seed, in front of the means of the others.
    """
    if (drawn := _Drawn.of(result, "reward", SMALL)) is None:
        return
    for label, mark in marks(result).items():
        own = [run for run in result["frontier"]["runs"] if run["label"] == label]
        if own:
            others = [drawn.line(other)._replace(quiet=True, dots=[]) for other in drawn.means if other != label]
            lines = [*others, *(drawn.run(run, mark) for run in own)]
            rates = sorted({run["lr"] for run in own if run["lr"] is not None})
            said = f"rates {', '.join(f'{rate:g}' for rate in rates)}; " if rates else ""
            yield drawn.chart(f"{mark.number} {label}", f"{said}{len(own)} runs", lines)


class _Drawn:
    """The curves of one measure, drawn in one frame."""

    def __init__(self, result: Mapping[str, Any], column: str, frame: Frame):
        runs = [run for run in result["frontier"]["runs"] if any(map(is_number, run[column]))]
        budgets = {row["view"]: row["budget"] for row in result["frontier"]["budgets"]}
        largest = max((kl for run in runs for kl in run["kl"] if is_number(kl)), default=0.0)
        self.end = min(largest, _BEYOND * max(budgets.values())) if budgets else largest
        self.column, self.frame, self.marks = column, frame, marks(result)
        last = max(budgets, key=budgets.__getitem__) if budgets else result["views"][0]["view"]
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for run in runs:
            if last in run["views"]:
                groups.setdefault(run["label"], []).append(run)
        self.means = {label: found for label, own in groups.items() if len(found := _mean(own, column)) > 1}
        shown = [y for run in runs for x, y in _pairs(run, column) if x <= self.end]
        self.x = drawing.scale([0.0, self.end], frame.left + 8, frame.right)
        self.y = drawing.scale(shown, frame.bottom, frame.top)
        self.rules = [(self.x.at(limit), f"{limit:g} nats") for limit in budgets.values()]

    @classmethod
    def of(cls, result: Mapping[str, Any], measure: str, frame: Frame) -> "_Drawn | None":
        """Prepares the curves of a measure; None if no run has such a curve."""
        column = _COLUMNS[measure]
        runs = result["frontier"]["runs"]
        long = [run for run in runs if len(_pairs(run, column)) > 1 and max(x for x, _ in _pairs(run, column)) > 0]
        return cls(result, column, frame) if long else None

    def line(self, label: str, *, numbered: bool = False) -> Line:
        places = cut(self.means[label], self.end)
        return self._drawn(self.marks[label], places, label, numbered=numbered)

    def run(self, run: Mapping[str, Any], mark: Mark) -> Line:
        rate = "" if run["lr"] is None else f", rate {run['lr']:g}"
        return self._drawn(mark, cut(_pairs(run, self.column), self.end), f"{mark.label}{rate}, seed {run['seed']}")

    def _drawn(self, mark: Mark, places: Sequence[tuple[float, float]], says: str, *, numbered: bool = False) -> Line:
        dots = [(self.x.at(x), self.y.at(y), f"{says}: {y:.3f} at {x:.3g} nats") for x, y in places]
        end = dots[-1][:2]
        return Line(mark, drawing.path(dot[:2] for dot in dots), dots, end=end if numbered else None, label=end[1])

    def chart(self, title: str, note: str, lines: Sequence[Line]) -> Chart:
        scales: tuple[Scale, Scale] = (self.x, self.y)
        return Chart(title, note, self.frame, scales[0].labels(), scales[1].labels(), lines, rules=self.rules)


def _pairs(run: Mapping[str, Any], column: str) -> list[tuple[float, float]]:
    found = zip(run["kl"], run[column], strict=True)
    return [(x, y) for x, y in found if is_number(x) and is_number(y)]


def _mean(runs: Sequence[Mapping[str, Any]], column: str) -> list[tuple[float, float]]:
    """Computes the mean KL and the mean value of each evaluation that all runs have."""
    each = [dict(zip(_places(run), zip(run["kl"], run[column], strict=True), strict=True)) for run in runs]
    shared = [place for place in each[0] if all(all(map(is_number, of.get(place, (None,)))) for of in each)]
    found = [np.mean([of[place] for of in each], axis=0) for place in shared]
    return [(float(x), float(y)) for x, y in found]


def _places(run: Mapping[str, Any]) -> list[tuple[int, int | None]]:
    """Returns where each evaluation was made: after how many iterations, and at which step if within the next one."""
    columns = zip(run["iteration"], run["step"], run["within"], strict=True)
    return [(iteration, step if within else None) for iteration, step, within in columns]


def cut(places: Sequence[tuple[float, float]], end: float) -> list[tuple[float, float]]:
    """Returns a curve up to where it first leaves the chart, at `end`."""
    kept: list[tuple[float, float]] = []
    for x, y in places:
        if x > end:
            if kept:
                before, value = kept[-1]
                kept.append((end, value + (y - value) * (end - before) / (x - before)))
            break
        kept.append((x, y))
    return kept
