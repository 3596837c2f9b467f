"""The page of a comparison: self-contained HTML, all of it from what comparison.json holds."""

from collections.abc import Mapping, Sequence
from typing import Any

from ple_jax.core.config import flatten
from ple_jax.reports import comparison_charts, drawing
from ple_jax.reports.comparison_tables import Table, described, every_seed, interval, judge


def html(result: Mapping[str, Any], found: Sequence[Table]) -> str:
    """One page that needs no network and no script."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": drawing.number}
    own = flatten({"settings": result["settings"], "judge": {k: v for k, v in result["judge"].items() if k != "kwargs"}})
    return environment.from_string(_PAGE).render(
        style=drawing.STYLE + _STYLE,
        result=result,
        line=described(result),
        judge=judge(result),
        in_all=judge_in_all(result),
        verdicts=verdicts(result),
        tables={table.name: table for table in found},
        marks=comparison_charts.marks(result),
        by_label={mark.label: mark for mark in comparison_charts.marks(result)},
        strips=list(comparison_charts.strips(result)),
        scatter=list(comparison_charts.scatter(result)),
        curves=list(comparison_charts.curves(result)),
        wins=comparison_charts.wins(result),
        differences=list(comparison_charts.differences(result)),
        seeds=every_seed(result),
        settings={**own, "judge.kwargs": result["judge"]["kwargs"]},
        frame={
            "width": comparison_charts.WIDTH,
            "height": comparison_charts.HEIGHT,
            "left": comparison_charts.LEFT,
            "right": comparison_charts.WIDTH - comparison_charts.RIGHT,
            "bottom": comparison_charts.HEIGHT - comparison_charts.BOTTOM,
        },
    )  # fmt: skip


def verdicts(result: Mapping[str, Any]) -> list[list[str]]:
    """Every method against the baseline: the judge's verdicts, and of one with positions how far it can be trusted."""
    baseline, symmetric = result["baseline"], result["judge"]["symmetric"]
    rows = []
    for row in result["wins"]:
        if row["against"] == baseline and row["win_rate"] is not None:
            bias = [] if symmetric else [_signed(row["position_bias"]), _share(row["consistency"])]
            rate = interval(row["win_rate"], (row["low"], row["high"]), 3)
            counts = [f"{row[key]:,.0f}" for key in ("judged", "failed")]
            rows.append([row["method"], *(_share(row[key]) for key in ("win", "tie", "loss")), rate, *bias, *counts])
    return rows


def judge_in_all(result: Mapping[str, Any]) -> str:
    """Position bias and consistency over all pairs of methods, in words; nothing of a judge without positions."""
    rows = [row for row in result["wins"] if row["judged"] and row["position_bias"] is not None]
    if result["judge"]["symmetric"] or not rows:
        return ""
    weight = sum(row["judged"] for row in rows)
    bias, agree = (
        sum(row["judged"] * (row[key] or 0.0) for row in rows) / weight for key in ("position_bias", "consistency")
    )
    return f"Over all pairs the position bias is {_signed(bias)} (1: the first wins); both orders agree on {agree:.0%}."


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


_STYLE = """
:root{--m0:#1f6fd6;--m1:#d9580d;--m2:#07a469;--m3:#c44693;--m4:#24303d;--m5:#66150d;--m6:#4816f2;--m7:#4d0377;
--ahead:#3b82d6;--behind:#e08a3c}
@media(prefers-color-scheme:dark){:root{--m0:#6aa8ff;--m1:#ff8f3f;--m2:#aaed99;--m3:#de4b7a;--m4:#e6e8ea;--m5:#df1f34;
--m6:#6655fe;--m7:#bb3da0;--ahead:#3f83d8;--behind:#c9742a}}
.m0{--k:var(--m0)}.m1{--k:var(--m1)}.m2{--k:var(--m2)}.m3{--k:var(--m3)}.m4{--k:var(--m4)}.m5{--k:var(--m5)}
.m6{--k:var(--m6)}.m7{--k:var(--m7)}
.key{display:inline-flex;align-items:center;justify-content:center;min-width:20px;height:20px;padding:0 3px;
border-radius:10px;background:var(--k);color:var(--card);font:600 11px/1 system-ui,sans-serif;font-style:normal;
margin-right:8px;vertical-align:1px;white-space:nowrap}
.names{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;margin:0 0 14px}.names .key{margin-right:6px}
.warnings{border-color:var(--behind);margin-top:24px}.warnings ul,.notes{margin:6px 0 0;padding-left:20px}
.data th:first-child{text-align:left}
.data td,.data th{padding:5px 9px}.data th:first-child{padding-left:18px}
.data tbody th{min-width:200px;max-width:300px;white-space:normal;overflow-wrap:break-word}
.data td:last-child,.data th:last-child{padding-right:18px}
.strips td.plot{width:42%;padding:0 8px;min-width:150px}.strips thead th{text-align:center}
.strips svg{height:28px;margin:0;overflow:visible}
.strips tr>*{padding-top:0;padding-bottom:0}.strips tr.axis svg{height:22px}
.range{stroke:var(--k);stroke-width:2}.mean{fill:var(--k)}.seed{fill:var(--card);stroke:var(--k);stroke-width:1.5}
.zero{stroke:var(--soft);stroke-dasharray:2 3}
.disc{fill:var(--k);stroke:var(--card);stroke-width:1.5}.number{fill:var(--card);font-weight:600;font-size:10px;
text-anchor:middle;pointer-events:none}
.thin{fill:none;stroke:var(--k);stroke-width:1;opacity:.35}.leader{stroke:var(--k);stroke-width:1;opacity:.5}
.hit{fill:none;stroke:transparent;stroke-width:12}.d1 .line{stroke-dasharray:7 4}.d2 .line{stroke-dasharray:2 4}
.level .line{stroke-dasharray:1 5}.method{transition:opacity .15s}svg:hover .method{opacity:.25}
svg .method:hover{opacity:1}
.matrix td,.matrix thead th{text-align:center;padding:5px 8px;min-width:44px}.matrix td.on{color:var(--ink);
background:color-mix(in srgb,var(--side) var(--share),var(--card))}.matrix .key{margin-right:0}
.matrix tbody th .key{margin-right:8px}.ahead{--side:var(--ahead)}.behind{--side:var(--behind)}
@media(max-width:640px){main{padding:24px 14px 48px}.chart svg{font-size:15px}.number{font-size:12px}
th,td{padding:5px 9px}.data th:first-child{padding-left:12px}
.data tbody th{min-width:110px;max-width:38vw}}
"""

_PAGE = """\
{%- macro key(mark) %}<i class="key m{{ mark.colour }}">{{ mark.number }}</i>{% endmacro %}
{%- macro named(label) %}{% if by_label[label] %}{{ key(by_label[label]) }}{% endif %}{{ label }}{% endmacro %}
{%- macro names() %}<div class="names">{% for mark in marks %}<span>{{ key(mark) }}{{ mark.label }}</span>
{% endfor %}</div>{% endmacro %}
{%- macro data(head, rows, id) %}
<div class="card scroll"><table class="data" id="{{ id }}"><thead><tr>{% for cell in head %}<th scope="col">{{ cell }}</th>
{%- endfor %}</tr></thead><tbody>
{% for row in rows %}<tr><th scope="row">{{ named(row[0]) }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>
{%- endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endmacro %}
{%- macro table(name) %}{% if tables[name] %}{% set found = tables[name] %}
<h2>{{ found.title }}</h2><p class="note">{{ found.note }}</p>{{ data(found.head, found.rows, name) }}
{% endif %}{% endmacro %}
{%- macro grid(matrix, more="") %}
<h2>{{ matrix.title }}</h2><p class="note">{{ matrix.note }}.{{ more }}</p>
<div class="card scroll"><table class="matrix data"><thead><tr><th></th>{% for row, _ in matrix.rows %}<th scope="col"
 title="{{ row.label }}">{{ key(row) }}</th>{% endfor %}</tr></thead><tbody>
{% for row, cells in matrix.rows %}<tr><th scope="row">{{ named(row.label) }}</th>{% for cell in cells %}
{% if cell %}<td class="on {{ "ahead" if cell.ahead else "behind" }}" style="--share:{{ cell.share }}%"
 title="{{ cell.tip }}">{% if cell.strong %}<b>{{ cell.text }}</b>{% else %}{{ cell.text }}{% endif %}</td>
{%- else %}<td class="soft">·</td>{% endif %}{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endmacro %}
{%- macro axes(chart) %}
{% for y, label in chart.yticks %}<line class="gridline" x1="{{ frame.left }}" x2="{{ frame.right }}" y1="{{ y }}"
 y2="{{ y }}"/><text x="{{ frame.left - 8 }}" y="{{ y + 4 }}" text-anchor="end">{{ label }}</text>
{% endfor %}
{% for x, label in chart.xticks %}<line class="gridline" x1="{{ x }}" x2="{{ x }}" y1="{{ frame.bottom }}"
 y2="{{ frame.bottom + 4 }}"/><text x="{{ x }}" y="{{ frame.bottom + 20 }}" text-anchor="middle">{{ label }}</text>
{% endfor %}
{% endmacro %}
{%- macro disc(mark, x, y) %}<circle class="disc" cx="{{ x }}" cy="{{ y }}" r="8"/><text class="number" x="{{ x }}"
 y="{{ y + 3.5 }}">{{ mark.number }}</text>{% endmacro %}
{%- macro plot(chart) %}
<figure class="card chart" style="margin:0"><h3>{{ chart.title }} <span class="soft" style="font-weight:400">
{{- chart.note }}</span></h3>
<svg viewBox="0 0 {{ frame.width }} {{ frame.height }}" role="img" aria-label="{{ chart.title }} {{ chart.note }}">
{{ axes(chart) }}
{% for p in chart.points %}<g class="m{{ p.mark.colour }}">
<line class="range" x1="{{ p.across[0] }}" x2="{{ p.across[1] }}" y1="{{ p.y }}" y2="{{ p.y }}"/>
<line class="range" x1="{{ p.x }}" x2="{{ p.x }}" y1="{{ p.along[0] }}" y2="{{ p.along[1] }}"/>
{% for x, y, tip in p.seeds %}<circle class="seed" cx="{{ x }}" cy="{{ y }}" r="3"><title>{{ tip }}</title></circle>
{% endfor %}</g>{% endfor %}
{# after all seeds, which would cover the numbers #}
{% for p in chart.points %}<g class="m{{ p.mark.colour }}"><title>{{ p.tip }}</title>{{ disc(p.mark, p.x, p.y) }}</g>
{% endfor %}
{% for l in chart.lines %}<g class="method m{{ l.mark.colour }} d{{ l.mark.dash }}{{ " level" if l.level }}">
<title>{{ l.mark.label }}</title>
{% for path in l.seeds %}<path class="thin" d="{{ path }}"/>{% endfor %}
<path class="line" d="{{ l.path }}"/><path class="hit" d="{{ l.path }}"/>
{% for x, y, tip in l.dots %}<circle class="dot" cx="{{ x }}" cy="{{ y }}" r="3"><title>{{ tip }}</title></circle>
{% endfor %}<line class="leader" x1="{{ l.end[0] }}" y1="{{ l.end[1] }}" x2="{{ frame.right + 22 }}" y2="{{ l.label }}"/>
{{ disc(l.mark, frame.right + 26, l.label) }}</g>
{% endfor %}
</svg></figure>
{% endmacro %}
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Comparison of {{ marks|length }} methods</title><style>{{ style|safe }}</style></head><body><main>
<h1>Comparison of {{ marks|length }} method{{ "" if marks|length == 1 else "s" }}</h1>
<p class="soft">{{ line }} Training reward {{ result.settings.reward }}
{%- if result.settings.second_reward %}, second reward {{ result.settings.second_reward }}{% endif %}. Baseline
{{ result.baseline }}.</p>
{% if result.warnings %}<div class="card warnings"><h3>Before you believe it</h3><ul>{% for text in result.warnings %}
<li>{{ text }}</li>{% endfor %}</ul></div>{% endif %}
{% if result.notes %}<ul class="notes soft">{% for text in result.notes %}<li>{{ text }}</li>{% endfor %}</ul>{% endif %}
{{ table("reward") }}{{ table("reward_second") }}
<h2>Every seed</h2><p class="note">Circles are seeds, discs their means, lines 95% intervals over seeds and queries; the
dashed line is the mean of {{ result.baseline }}.</p>
<div class="card scroll"><table class="strips data"><thead><tr><th></th>{% for strip in strips %}<th scope="col">
{{- strip.title }}</th>{% endfor %}</tr></thead><tbody>
{% for mark in marks %}{% set row = loop.index0 %}<tr><th scope="row">{{ named(mark.label) }}</th>{% for strip in strips %}
<td class="plot">{% set cell = strip.cells[row] %}{% if cell %}<svg class="m{{ mark.colour }}" role="img"
 aria-label="{{ cell.tip }}"><title>{{ cell.tip }}</title>
{% for x, _ in strip.ticks %}<line class="gridline" x1="{{ x }}%" x2="{{ x }}%" y1="0" y2="28"/>{% endfor %}
{% if strip.zero is not none %}<line class="zero" x1="{{ strip.zero }}%" x2="{{ strip.zero }}%" y1="0" y2="28"/>{% endif %}
<line class="range" x1="{{ cell.low }}%" x2="{{ cell.high }}%" y1="14" y2="14"/>
<circle class="mean" cx="{{ cell.mean }}%" cy="14" r="6"/>
{% for x, tip in cell.dots %}<circle class="seed" cx="{{ x }}%" cy="14" r="3.5"><title>{{ tip }}</title></circle>{% endfor %}
</svg>{% endif %}</td>{% endfor %}</tr>
{% endfor %}<tr class="axis"><th></th>{% for strip in strips %}<td class="plot"><svg>{% for x, label in strip.ticks %}
<text x="{{ x }}%" y="14" text-anchor="middle">{{ label }}</text>{% endfor %}</svg></td>{% endfor %}</tr></tbody></table>
</div>
{% if scatter %}<h2>Reward against KL</h2><p class="note">What a method paid in distance from the base model. A training
reward that rises with KL while the second reward does not is over-optimisation. Discs are means, lines 95% intervals,
circles seeds.</p>{{ names() }}<div class="grid two">{% for chart in scatter %}{{ plot(chart) }}{% endfor %}</div>{% endif %}
{% if wins %}
{{ grid(wins, " Judge: " ~ judge ~ ". " ~ in_all) }}
<p class="note" style="margin-top:20px">Against {{ result.baseline }}:
{{- " each pair was judged in one order, since the judge knows none" if result.judge.symmetric else " each pair was judged in
both orders, and is won where they do not contradict each other; position bias is the share of verdicts for the response
shown first minus that for the second, consistency the share of pairs on which both orders agree" }}.</p>
{{ data(["method", "win", "tie", "loss", "win rate"] + ([] if result.judge.symmetric else ["position bias", "consistency"])
 + ["judged", "no verdict"], verdicts, "verdicts") }}
{% endif %}
{{ table("texts") }}
{% if curves %}
<h2>Curves</h2><p class="note">Reward on the dev split while training, which starts at the model before training. A thick
line is the mean over seeds, thin ones are seeds; a dotted level is the end of a method that spends nothing of the kind.</p>
{{ names() }}<div class="grid two">{% for chart in curves %}{{ plot(chart) }}{% endfor %}</div>
{% endif %}
{{ table("costs") }}
{% for matrix in differences %}{{ grid(matrix) }}{% endfor %}
{% if result.examples %}
<h2>Side by side</h2><p class="note">The first {{ result.examples|length }} of {{ result.settings.queries }} queries in file
order, the first response of every method's first seed: not selected. The numbers are its rewards, the training reward
first.</p>
{% for example in result.examples %}
<div class="card sample"><div class="prompt" dir="auto">{{ example.prompt }}</div><div class="cols">
{% for r in example.responses %}
<div><div class="head"><b>{{ named(r.method) }}</b><span>{{ r.reward|number(3) }}
{%- if r.reward_second is number %} · {{ r.reward_second|number(3) }}{% endif %}
{{- "" if r.finished else " · cut off" }}</span></div>
<div class="response" dir="auto">{{ r.text|trim or "(empty)" }}</div></div>
{% endfor %}</div></div>
{% endfor %}
{% endif %}
<h2>Runs</h2><p class="note">Every seed. Exact numbers are in seeds.csv, table.csv, tests.csv, wins.csv and comparison.json.
</p>{{ data(seeds.head, seeds.rows, "seeds") }}
<h2>Settings</h2><div class="card scroll"><table class="pairs"><tbody>
{% for name, value in settings.items() %}<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</tbody></table></div>
</main></body></html>
"""
