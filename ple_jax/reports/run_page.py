"""The report of a run: one self-contained HTML file, made only from the files of its work directory."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ple_jax.core import conversation
from ple_jax.core.config import flatten
from ple_jax.core.errors import UserError
from ple_jax.core.files import read_json, read_jsonl, write_text
from ple_jax.reports.drawing import STYLE, duration, number, readable_bytes, round_ticks

SAMPLES = 10  # held-out queries shown before and after
PAIRS = 4  # training rollouts shown of each decision
RESPONSES = 4  # responses shown of one rollout

# title, note, metrics (a trailing * stands for the kinds of response), whether the axis is a share
_CHARTS = (
    ("Reward", "mean per response, untransformed", ("heldout_reward", "heldout_reward_*", "reward_*"), False),
    ("Ranked share", "of the training pairs", ("ranked_share", "negative_margin_share"), True),
    ("Margin and threshold", "units of the (transformed) reward", ("margin", "tau"), False),
    ("KL to the reference", "nats per token", ("heldout_kl", "kl"), False),
    ("Response length", "tokens", ("length_*",), False),
    ("Log-probability", "nats per token, under the plain prompt", ("lp_*",), False),
    ("Active hinge", "share of the ranked pairs", ("hinge_active_before", "hinge_active_after"), True),
    ("Distinct-2", "distinct bigrams over bigrams", ("distinct_2_*",), True),
    ("Pair accuracy", "share of pairs whose preferred response scores higher", ("heldout_accuracy", "train_accuracy"), True),
    ("Pair loss", "nats per pair; 0.693 is chance", ("heldout_log_loss", "train_loss"), False),
)
_LABELS = {
    "heldout_reward": "held-out",
    "ranked_share": "ranked",
    "negative_margin_share": "negative margin",
    "heldout_kl": "held-out",
    "kl": "training responses",
    "hinge_active_before": "before the update",
    "hinge_active_after": "after the update",
    "heldout_accuracy": "held-out",
    "heldout_log_loss": "held-out",
    "train_accuracy": "training",
    "train_loss": "training",
}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 230, 48, 14, 12, 30


def write(workdir: Path) -> Path:
    """Writes `workdir/report.html` and returns its path.

    Reads config.json, summary.json, environment.json, metrics.jsonl, rollouts/ and evaluations/; whatever a run does
    not have is left out of the page. The page needs no network and no script.

    Args:
        workdir: a work directory with at least metrics.jsonl.

    Raises:
        UserError: there is no metrics.jsonl.
    """
    import jinja2

    if not (workdir / "metrics.jsonl").exists():
        raise UserError(f"no metrics.jsonl in {str(workdir)!r}: give the --workdir of a run")
    metrics = read_jsonl(workdir / "metrics.jsonl", torn=True)  # a run may be writing it
    evaluations = sorted((workdir / "evaluations").glob("iter_????.jsonl"))
    rollouts = sorted((workdir / "rollouts").glob("iter_????.jsonl"))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "duration": duration, "bytes": readable_bytes}
    html = environment.from_string(_PAGE).render(
        style=STYLE,
        name=workdir.resolve().name,
        summary=read_json(workdir / "summary.json") or {},
        config=flatten(read_json(workdir / "config.json") or {}, whole=()),
        environment=read_json(workdir / "environment.json") or {},
        charts=list(charts(metrics)),
        metrics=metrics,
        keys=list(dict.fromkeys(key for line in metrics for key in line if key != "iteration")),
        samples=_samples(evaluations),
        pairs=_pairs(_rollouts(rollouts[-1])) if rollouts else {},
        shown=PAIRS,
        responses=RESPONSES,
        frame={"width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "top": _TOP, "bottom": _HEIGHT - _BOTTOM},
    )
    path = workdir / "report.html"
    write_text(path, html, errors="replace")  # a byte-level model may emit a lone surrogate
    return path


class Series(NamedTuple):
    """One line of a chart: its label, its colour's number, its points (iteration, value) as they were logged."""

    label: str
    colour: int
    points: list[tuple[int, float]]
    path: str  # of an SVG <path>
    dots: list[tuple[float, float]]  # in SVG units


class Band(NamedTuple):
    """What appears over one iteration of a chart under the pointer."""

    iteration: int
    x: float
    left: float
    width: float
    tip: float  # left edge of the box
    rows: list[tuple[int, str, float]]  # colour, label, value


class Chart(NamedTuple):
    """A line chart, laid out in SVG units."""

    title: str
    note: str
    share: bool
    series: list[Series]
    xticks: list[tuple[float, int]]
    yticks: list[tuple[float, str]]
    bands: list[Band]


def charts(metrics: list[dict[str, Any]]) -> Iterator[Chart]:
    """Lays out the charts for which there are numbers.

    Args:
        metrics: the lines of metrics.jsonl; missing and null values leave gaps that the line bridges.
    """
    keys = list(dict.fromkeys(key for line in metrics for key in line))
    # every kind of response has a length; a suffix that is no kind (lp_plain_before, reward_calls) is no line
    lengths = [key.removeprefix("length_") for key in keys if key.startswith("length_")]
    kinds = dict.fromkeys(["plain", "principled", *lengths])
    # colours follow the kind of response, the same in every chart; 0 is the held-out set and whatever has no kind
    colours = {kind: 1 + i for i, kind in enumerate(kinds)}
    last = max(line["iteration"] for line in metrics)

    def x(iteration: float) -> float:
        return round(_LEFT + 10 + (_WIDTH - _LEFT - _RIGHT - 20) * iteration / max(last, 1), 1)

    for title, note, patterns, share in _CHARTS:
        found: dict[str, list[tuple[int, float]]] = {}
        for pattern in patterns:
            for key in [pattern.replace("*", kind) for kind in kinds] if "*" in pattern else [pattern]:
                if points := [(line["iteration"], line[key]) for line in metrics if line.get(key) is not None]:
                    found[key] = points
        if not found:
            continue
        values = [value for points in found.values() for _, value in points]
        ticks = [0.0, 0.25, 0.5, 0.75, 1.0] if share else round_ticks(min(values), max(values))
        low, high = ticks[0], ticks[-1]

        def y(value: float, low: float = low, high: float = high) -> float:
            return round(_TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low), 1)

        series = []
        for i, (key, points) in enumerate(found.items()):
            prefix = next((p[:-1] for p in patterns if p.endswith("*") and key.startswith(p[:-1])), "")
            kind = key.removeprefix(prefix)
            label = _LABELS.get(key, f"held-out, {kind}" if prefix == "heldout_reward_" else kind)
            colour = 5 if prefix == "heldout_reward_" else colours.get(kind, 0) if prefix else 2 * i
            dots = [(x(iteration), y(value)) for iteration, value in points]
            path = "M" + "L".join(f"{a} {b}" for a, b in dots)
            series.append(Series(label, colour % 6, points, path, dots))

        bands = []
        step = x(1) - x(0)
        for iteration in sorted({iteration for points in found.values() for iteration, _ in points}):
            rows = [(s.colour, s.label, dict(s.points)[iteration]) for s in series if iteration in dict(s.points)]
            at = x(iteration)
            tip = at + 8 if at < _WIDTH / 2 else at - 188
            bands.append(Band(iteration, at, at - step / 2, step, tip, rows))
        every = max(1, math.ceil(last / 10))
        yield Chart(
            title,
            note,
            share,
            series,
            [(x(i), i) for i in range(0, last + 1, every)],
            [(y(t), f"{t:.0%}" if share else f"{t:g}") for t in ticks],
            bands,
        )


def _rollouts(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal, prompts as text."""

    def text(prompt: str | list[dict[str, Any]]) -> str:
        return prompt if isinstance(prompt, str) else conversation.render(prompt).strip()

    return [{**line, "prompt": text(line["prompt"])} for line in read_jsonl(path)]


def _samples(evaluations: list[Path]) -> dict[str, Any]:
    """The first held-out queries in file order, each with the first response before and after."""
    if not evaluations:
        return {}
    before, after = _rollouts(evaluations[0]), {line["query_id"]: line for line in _rollouts(evaluations[-1])}
    rows = [
        (line["prompt"], line["responses"][0], after[line["query_id"]]["responses"][0])
        for line in before
        if line["query_id"] in after
    ]
    return {"rows": rows[:SAMPLES], "total": len(rows), "iteration": int(evaluations[-1].stem.split("_")[1])}


def _pairs(rollouts: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Decision -> its rollouts, in file order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout["decision"] or "collected", []).append(rollout)
    return dict(sorted(groups.items(), reverse=True))  # ranked before blended

_PAGE = """\
{%- macro show(value, share) %}{{ "%.1f%%"|format(100 * value) if share else value|number(3) }}{% endmacro %}
{%- macro response(label, r) %}
<div><div class="head"><b>{{ label }}</b><span>reward {{ r.reward|number(3) }}
{%- if r.weight is number %} · weight {{ r.weight|number(3) }}{% endif %}
{{- "" if r.finished else " · cut off" }}</span>
</div><div class="response" dir="auto">{{ r.text|trim or "(empty)" }}</div></div>
{% endmacro %}
{%- macro table(title, values) %}
<div><h2>{{ title }}</h2><div class="card scroll"><table class="pairs"><tbody>
{% for key, value in values.items() %}<tr><th scope="row">{{ key }}</th><td>{{ value }}</td></tr>
{% endfor %}</tbody></table></div></div>
{% endmacro %}
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ name }} · report</title><style>{{ style|safe }}</style></head><body><main>
<h1>{{ (summary.algorithm or config.algorithm or "run")|upper }} · {{ name }}</h1>
<p class="soft">{% for part in [config["model.path"], config["task.train"], config["reward.name"], config.principles,
 summary.backend] if part %}{{ part }} · {% endfor %}seed {{ summary.seed|default(config.seed) }}</p>
<div class="grid tiles">
{% if summary.heldout_reward_after is number %}
<div class="card tile lead"><b>{{ summary.heldout_reward_before|number(3) }} →
{{ summary.heldout_reward_after|number(3) }}</b><span>held-out reward:
{{ "%+.3f"|format(summary.heldout_reward_after - summary.heldout_reward_before) }}
{%- if summary.heldout_gain_ci95 %}, 95% interval {{ "%+.3f to %+.3f"|format(*summary.heldout_gain_ci95) }}{% endif %}
</span></div>
{% endif %}
{% if summary.heldout_accuracy is number %}
<div class="card tile lead"><b>{{ show(summary.heldout_accuracy, true) }}</b><span>of {{ summary.heldout_examples|number }}
held-out pairs in the right order, 95% interval {{ show(summary.heldout_accuracy_ci95[0], true) }} to
{{ show(summary.heldout_accuracy_ci95[1], true) }}</span></div>
{% endif %}
{% if summary.wall_seconds is number %}{% set count = summary.iterations|default(summary.steps) %}
<div class="card tile"><b>{{ summary.wall_seconds|duration }}</b>
<span>wall time, {{ count }} {{ "step" if summary.steps else "iteration" }}{{ "" if count == 1 else "s" }}</span></div>
{%- endif %}
{% if summary.generated_tokens is number %}<div class="card tile"><b>{{ summary.generated_tokens|number }}</b>
<span>tokens generated</span></div>{% endif %}
{% if summary.training_tokens is number %}<div class="card tile"><b>{{ summary.training_tokens|number }}</b>
<span>tokens trained on</span></div>{% endif %}
{% if summary.peak_memory_bytes is number %}<div class="card tile"><b>{{ summary.peak_memory_bytes|bytes }}</b>
<span>peak memory</span></div>{% endif %}
</div>
<h2>Curves</h2><p class="note">By iteration; 0 is the model before training. Rewards of training responses are those of
the policy that sampled them, before that iteration's update.</p>
<div class="grid two">
{% for chart in charts %}
<figure class="card chart" style="margin:0"><h3>{{ chart.title }} <span class="soft" style="font-weight:400">
{{- chart.note }}</span></h3>
<div class="legend">{% for s in chart.series %}<span class="k{{ s.colour }}"><i></i>{{ s.label }}
<b>{{ show(s.points[-1][1], chart.share) }}</b></span>{% endfor %}</div>
<svg viewBox="0 0 {{ frame.width }} {{ frame.height }}" role="img" aria-label="{{ chart.title }} by iteration">
{% for y, label in chart.yticks %}<line class="gridline" x1="{{ frame.left }}" x2="{{ frame.width }}" y1="{{ y }}"
 y2="{{ y }}"/><text x="{{ frame.left - 8 }}" y="{{ y + 4 }}" text-anchor="end">{{ label }}</text>
{% endfor %}
{% for x, label in chart.xticks %}<text x="{{ x }}" y="{{ frame.bottom + 18 }}" text-anchor="middle">{{ label }}</text>
{% endfor %}
{% for s in chart.series %}<g class="k{{ s.colour }}"><path class="line" d="{{ s.path }}"/>
{% for x, y in s.dots %}<circle class="dot" cx="{{ x }}" cy="{{ y }}"
 r="{{ 3.5 if s.dots|length < 40 else 2 }}"/>{% endfor %}</g>
{% endfor %}
{% for band in chart.bands %}<g class="band"><rect class="hit" x="{{ band.left }}" y="0" width="{{ band.width }}"
 height="{{ frame.bottom }}"/><g><line x1="{{ band.x }}" x2="{{ band.x }}" y1="{{ frame.top }}"
 y2="{{ frame.bottom }}"/>
<rect class="box" x="{{ band.tip }}" y="{{ frame.top }}" width="180" height="{{ 22 + 16 * band.rows|length }}" rx="6"/>
<text x="{{ band.tip + 10 }}" y="{{ frame.top + 15 }}">iteration {{ band.iteration }}</text>
{% for colour, label, value in band.rows %}<circle class="key k{{ colour }}" cx="{{ band.tip + 13 }}"
 cy="{{ frame.top + 27 + 16 * loop.index0 }}" r="3"/><text x="{{ band.tip + 22 }}"
 y="{{ frame.top + 31 + 16 * loop.index0 }}">{{ label }} {{ show(value, chart.share) }}</text>
{% endfor %}</g></g>
{% endfor %}
</svg></figure>
{% endfor %}
</div>
{% if summary.heldout_calibration %}
<h2>Calibration</h2><p class="note">Held-out pairs by the probability that the scores give to the likelier response, and how
often it was the preferred one. Expected calibration error {{ summary.heldout_calibration_error|number(3) }}, Brier score
{{ summary.heldout_brier|number(3) }}.</p>
<div class="card scroll"><table id="calibration"><thead><tr><th scope="col">pairs</th><th scope="col">probability</th>
<th scope="col">share</th></tr></thead><tbody>{% for bin in summary.heldout_calibration %}
<tr><td>{{ bin.pairs }}</td><td>{{ show(bin.confidence, true) }}</td><td>{{ show(bin.accuracy, true) }}</td></tr>
{% endfor %}</tbody></table></div>
{% endif %}
{% if samples %}
<h2>Held-out samples, before and after</h2><p class="note">The first {{ samples.rows|length }} of {{ samples.total }}
held-out queries in file order, the first response to each: not selected. After is iteration
{{ samples.iteration }}.</p>
{% for prompt, before, after in samples.rows %}
<div class="card sample"><div class="prompt" dir="auto">{{ prompt }}</div><div class="cols">
{{ response("before", before) }}{{ response("after", after) }}</div></div>
{% endfor %}
{% endif %}
{% for decision, group in pairs.items() %}
<h2>Training: {{ decision }}</h2><p class="note">The first {{ [group|length, shown]|min }} of {{ group|length }} in the
last iteration, in file order.</p>
{% for rollout in group[:shown] %}
<div class="card sample"><div class="head"><span>query {{ rollout.query_id }}</span><span>
margin {{ rollout.margin|number(3) }} · tau {{ rollout.tau|number(3) }}</span></div>
<div class="prompt" dir="auto">{{ rollout.prompt }}</div><div class="cols">
{% for r in rollout.responses[:responses] %}{{ response(r.kind, r) }}{% endfor %}</div>
{% if rollout.responses|length > responses %}<p class="soft">and {{ rollout.responses|length - responses }} more</p>
{% endif %}</div>
{% endfor %}
{% endfor %}
<h2>Metrics</h2><p class="note">Four significant digits; the exact values are in metrics.jsonl.</p>
<div class="card scroll"><table id="metrics"><thead><tr><th></th>{% for line in metrics %}
<th scope="col">{{ line.iteration }}</th>{% endfor %}</tr></thead><tbody>
{% for key in keys %}<tr><th scope="row">{{ key }}</th>{% for line in metrics %}
<td>{% if line[key] is number %}<data value="{{ line[key] }}">{{ line[key]|number }}</data>{% else %}–{% endif %}</td>
{%- endfor %}</tr>
{% endfor %}</tbody></table></div>
<div class="grid two">{{ table("Config", config) }}{{ table("Environment", environment) }}</div>
</main></body></html>
"""
