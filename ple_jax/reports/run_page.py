"""The report of a run: one self-contained HTML file, made only from the files of its work directory."""

import importlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ple_jax.core import conversation
from ple_jax.core.config import chosen, flatten
from ple_jax.core.errors import UserError
from ple_jax.core.files import read_json, read_jsonl, write_text
from ple_jax.core.secrets import redacted
from ple_jax.evaluation import harness
from ple_jax.reports import drawing, formats, pages
from ple_jax.reports.drawing import Band, Chart, Frame, Line, Mark, Scale
from ple_jax.reports.formats import MISSING

SAMPLES = 10  # held-out queries shown before and after
PAIRS = 4  # training rollouts shown of each decision
RESPONSES = 4  # responses shown of one rollout
FRAME = Frame(480, 230, left=52, right=466, top=12, bottom=200)

Points = list[tuple[int, float]]  # iteration, value


class Panel(NamedTuple):
    """A chart of the page: its metrics, where a trailing * stands for the kinds of response."""

    title: str
    note: str
    metrics: tuple[str, ...]
    share: bool = False  # whether its axis goes from 0% to 100%


PANELS = (
    Panel("Reward", "mean per response, untransformed", ("heldout_reward", "heldout_reward_*", "reward_*")),
    Panel("Reward by data set", "held-out, mean per response, untransformed", ("heldout_reward/*",)),
    Panel("Ranked share", "of the training pairs", ("ranked_share", "negative_margin_share"), share=True),
    Panel("Margin and threshold", "units of the (transformed) reward", ("margin", "tau")),
    Panel("KL to the start", "nats per response, held-out", ("heldout_kl_response",)),
    Panel("KL to the start", "nats per token", ("heldout_kl", "kl")),
    Panel("Sampler and trainer", "log-probabilities of sampled tokens apart, nats", ("sampler_gap", "sampler_gap_max")),
    Panel("Response length", "tokens", ("length_*",)),
    Panel("Log-probability", "nats per token, under the plain prompt", ("lp_*",)),
    Panel("Active hinge", "share of the ranked pairs", ("hinge_active_before", "hinge_active_after"), share=True),
    Panel("Distinct-2", "distinct bigrams over bigrams", ("distinct_2_*",), share=True),
    Panel(
        "Pair accuracy", "share of pairs whose preferred response scores higher", ("heldout_accuracy", "train_accuracy"),
        share=True,
    ),
    Panel("Pair loss", "nats per pair; 0.693 is chance", ("heldout_log_loss", "train_loss")),
)  # fmt: skip
_LABELS = {
    "heldout_reward": "held-out",
    "ranked_share": "ranked",
    "negative_margin_share": "negative margin",
    "heldout_kl": "held-out",
    "heldout_kl_response": "held-out",
    "kl": "training responses",
    "sampler_gap": "mean",
    "sampler_gap_max": "largest",
    "hinge_active_before": "before the update",
    "hinge_active_after": "after the update",
    "heldout_accuracy": "held-out",
    "heldout_log_loss": "held-out",
    "train_accuracy": "training",
    "train_loss": "training",
}
# colours of kinds of response, the same in every chart, and that of what is of no kind: a second such line is dashed
_HELDOUT, _HELDOUT_KIND, _OF_KINDS, _NO_KIND = 0, 5, (1, 2, 3, 6, 7), 4
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def write(workdir: Path) -> Path:
    """Writes `workdir/report.html` and returns its path.

    Reads config.json, summary.json, environment.json, metrics.jsonl, rollouts/ and evaluations/; whatever a run does
    not have is left out of the page. The page needs no network and no script.

    Args:
        workdir: a work directory with at least metrics.jsonl.

    Raises:
        UserError: there is no metrics.jsonl.
    """
    if not (workdir / "metrics.jsonl").exists():
        raise UserError(f"no metrics.jsonl in {str(workdir)!r}: give the --workdir of a run")
    path = workdir / "report.html"
    write_text(path, html(workdir), errors="replace")  # a byte-level model may emit a lone surrogate
    return path


def html(workdir: Path) -> str:
    """Renders the report of a run and returns its text."""
    metrics = read_jsonl(workdir / "metrics.jsonl", torn=True)  # a run may be writing it
    files = ("summary", "config", "environment")
    summary, config, environment = (read_json(workdir / f"{name}.json") or {} for name in files)
    config = flatten(redacted(config), whole=())  # of an earlier version it may hold a key
    changed = different(config)
    budget, best = next(reversed(summary.get("best", {}).items()), ("", None))
    evaluations = sorted((workdir / "evaluations").glob("iter_????.jsonl"))
    rollouts = sorted((workdir / "rollouts").glob("iter_????.jsonl"))
    sets = ", ".join(dict.fromkeys(key.split(".")[2] for key in config if key.startswith("task.sets.")))
    about = [config.get("model.path"), sets or config.get("task.train")]
    if "steps" not in summary:  # an offline algorithm reads neither
        about += [config.get("reward.name"), config.get("principles")]
    tax, tax_of = harness.newest(workdir, best)
    return pages.render(
        "run.html",
        name=workdir.resolve().name,
        about=[*about, summary.get("backend")],
        summary=summary,
        config={key: value for key, value in config.items() if key not in changed},
        changed=changed,
        algorithm=config.get("algorithm"),
        seed=config.get("seed"),
        doubts=list(doubts(summary, best)),
        tax=tax,
        tax_of=tax_of,
        environment=environment,
        charts=list(charts(metrics)),
        tip_width=drawing.TIP,
        metrics=metrics,
        keys=list(dict.fromkeys(key for line in metrics for key in line if key != "iteration")),
        best=best,
        within=f" within {budget.removeprefix('kl_')} nats" if budget.startswith("kl_") else "",
        newest=config.get("checkpoint.use") == "newest",
        samples=_samples(workdir, evaluations, best),
        pairs=_pairs(_rollouts(rollouts[-1])) if rollouts else {},
        shown=PAIRS,
        responses=RESPONSES,
    )


def different(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of a flat config.json that `chosen` finds, those within dictionaries that are free included."""
    usual = importlib.import_module("ple_jax.configs.default").get_config().to_dict()
    usual = flatten(json.loads(json.dumps(usual)), whole=())  # tuples are lists in a file
    inner = {key: None for key in config if any(key.startswith(f"{empty}.") for empty in usual)}  # of dictionaries
    return chosen(config, {**inner, **usual})


def _three_digits(value: float) -> str:
    return formats.number(value, 3)


# of an evaluation: what it is called, its key, and how it is written
_DOUBTS = (
    ("KL to the start, nats a response", "kl", _three_digits), ("KL to the start, nats a token", "kl_token", _three_digits),
    ("second reward, which training never sees", "second", _three_digits),
    ("perplexity under the start", "perplexity", _three_digits), ("cut off", "truncated", formats.share),
    ("tokens a response", "length", _three_digits), ("Distinct-2", "distinct_2", _three_digits),
    ("repeated 4-grams", "repetition", formats.share), ("trigrams that stand in the principles", "overlap", formats.share),
)  # fmt: skip


def doubts(summary: Mapping[str, Any], best: Mapping[str, Any] | None) -> Iterator[tuple[str, str, str]]:
    """Yields what stands beside the headline: a measure's name, and its value at the first and at the best evaluation."""
    first = next(iter(summary.get("points", [])), None)
    if best is None or first is None:
        return
    for what, key, text in _DOUBTS:
        if formats.is_number(best.get(key)):
            before, after = (text(point[key]) if formats.is_number(point.get(key)) else MISSING for point in (first, best))
            around = f" ({_three_digits(best['kl_low'])} to {_three_digits(best['kl_high'])})" if key == "kl" else ""
            yield what, before, after + around
    if formats.is_number(by_length := best.get("gain_by_length")):
        gain = best["reward"] - first["reward"]
        yield "of the gain in reward, what length alone would give", "", f"{by_length:+.3f} of {gain:+.3f}"


def charts(metrics: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    """Lays out the charts for which there are numbers.

    Args:
        metrics: the lines of metrics.jsonl; missing and null values leave gaps that the line bridges.
    """
    keys = list(dict.fromkeys(key for line in metrics for key in line))
    # every kind of response has a length; a suffix that is no kind (lp_plain_before, reward_calls) is no line
    lengths = [key.removeprefix("length_") for key in keys if key.startswith("length_")]
    kinds = list(dict.fromkeys(["plain", "principled", *lengths]))
    kinds += dict.fromkeys(key.partition("/")[2] for key in keys if key.startswith("heldout_reward/"))  # data sets
    last = max(line["iteration"] for line in metrics)
    across = Scale(0, max(last, 1), FRAME.left + 10, FRAME.right - 10, range(0, last + 1, max(1, math.ceil(last / 10))))
    for panel in PANELS:
        if found := _points(metrics, panel, kinds):
            yield _chart(panel, found, kinds, across)


def _points(metrics: Sequence[Mapping[str, Any]], panel: Panel, kinds: Sequence[str]) -> dict[str, Points]:
    """Returns what was logged of each metric; metrics without any value are left out."""
    found = {}
    for pattern in panel.metrics:
        for key in [pattern.replace("*", kind) for kind in kinds] if "*" in pattern else [pattern]:
            if points := [(line["iteration"], line[key]) for line in metrics if line.get(key) is not None]:
                found[key] = points
    return found


def _chart(panel: Panel, found: Mapping[str, Points], kinds: Sequence[str], across: Scale) -> Chart:
    values = [value for points in found.values() for _, value in points]
    up = Scale(0, 1, FRAME.bottom, FRAME.top, _SHARES) if panel.share else drawing.scale(values, FRAME.bottom, FRAME.top)
    text = formats.share if panel.share else _three_digits
    lines = []
    for i, (key, points) in enumerate(found.items()):
        places = [(across.at(iteration), up.at(value)) for iteration, value in points]
        dots = [(x, y, "") for x, y in places]  # the bands say what they are
        lines.append(Line(_mark(panel, key, i, kinds), drawing.path(places), dots, text(points[-1][1])))
    lines = drawing.told_apart(lines)
    said = {line.mark: {i: text(v) for i, v in points} for line, points in zip(lines, found.values(), strict=True)}
    labels = up.labels(lambda tick: formats.share(tick, 0)) if panel.share else up.labels()
    return Chart(panel.title, panel.note, FRAME, across.labels(), labels, lines, bands=_bands(said, across))


def _mark(panel: Panel, key: str, i: int, kinds: Sequence[str]) -> Mark:
    """Chooses the mark of a metric's line, whose colour stands for a kind of response.

    A metric of no kind has the colour of text, and the second such line is dashed.
    """
    prefix = next((p[:-1] for p in panel.metrics if p.endswith("*") and key.startswith(p[:-1])), "")
    kind, label = key.removeprefix(prefix), _LABELS.get(key, key.removeprefix(prefix))
    if prefix == "heldout_reward/":
        return Mark(i + 1, label, i % drawing.COLOURS, i // drawing.COLOURS % drawing.DASHES)
    if prefix == "heldout_reward_":
        return Mark(i + 1, f"held-out, {kind}", _HELDOUT_KIND, 0)
    if key.startswith("heldout"):
        return Mark(i + 1, label, _HELDOUT, 0)
    if prefix and kind in kinds:
        at = kinds.index(kind)
        return Mark(i + 1, label, _OF_KINDS[at % len(_OF_KINDS)], at // len(_OF_KINDS) % drawing.DASHES)
    return Mark(i + 1, label, _NO_KIND, i % drawing.DASHES)


def _bands(said: Mapping[Mark, Mapping[int, str]], across: Scale) -> list[Band]:
    """Lays out a band for each iteration, with the values of every series there."""
    there = sorted({iteration for values in said.values() for iteration in values})
    between = min((b - a for a, b in itertools.pairwise(there)), default=1)  # steps of an offline algorithm
    step = across.at(between) - across.at(0)
    return [
        drawing.band(
            f"iteration {iteration}", across.at(iteration), step, FRAME,
            [(mark, values[iteration]) for mark, values in said.items() if iteration in values],
        )
        for iteration in there
    ]  # fmt: skip


def _rollouts(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a journal, with prompts as text."""

    def text(prompt: str | list[dict[str, Any]]) -> str:
        return prompt if isinstance(prompt, str) else conversation.render(prompt).strip()

    return [{**line, "prompt": text(line["prompt"])} for line in read_jsonl(path)]


def _samples(workdir: Path, evaluations: list[Path], best: Mapping[str, Any] | None) -> dict[str, Any]:
    """Reads the first held-out queries in file order, each with its first response before training and after it.

    The latter is of the best evaluation or, if there is none, of the last one.
    """
    if not evaluations:
        return {}
    last, where = evaluations[-1], f"iteration {int(evaluations[-1].stem.split('_')[1])}"
    if best is not None and "responses" in best and (file := workdir / best["responses"]).exists():
        last, where = file, f"step {best['step']}" if best["within"] else f"iteration {best['iteration']}"
    before, after = _rollouts(evaluations[0]), {line["query_id"]: line for line in _rollouts(last)}
    rows = [
        (line["prompt"], line["responses"][0], after[line["query_id"]]["responses"][0])
        for line in before
        if line["query_id"] in after
    ]
    return {"rows": rows[:SAMPLES], "total": len(rows), "where": where}


def roles(rollout: Mapping[str, Any]) -> list[str]:
    """Says of each response of a ranked rollout whether it is the preferred or the other one; of other rollouts nothing.

    The plain response meets the best principled one, and where all are of one kind the worst meets the best.
    """
    responses = rollout["responses"]
    found, scores = [""] * len(responses), [response["score"] for response in responses]
    if rollout["decision"] != "ranked" or not all(map(formats.is_number, scores)):
        return found
    guided = [i for i, response in enumerate(responses) if response["principled"]]
    plain = [i for i in range(len(responses)) if i not in guided] if guided else list(range(len(responses)))
    one, other = min(plain, key=scores.__getitem__), max(guided or plain, key=scores.__getitem__)
    winner, loser = (one, other) if scores[one] > scores[other] else (other, one)
    found[winner], found[loser] = "preferred", "not preferred"
    return [role or "not compared" for role in found]


def _pairs(rollouts: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Groups rollouts by decision, in file order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for rollout in rollouts:
        for response, role in zip(rollout["responses"], roles(rollout), strict=True):
            response["role"] = role
        groups.setdefault(rollout["decision"] or "collected", []).append(rollout)
    return dict(sorted(groups.items(), reverse=True))  # ranked before blended
