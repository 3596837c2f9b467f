"""The report: parsed as a browser would, and compared with the files it was made from."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ple_jax.core.errors import UserError
from ple_jax.reports import drawing, formats, run_page

HOSTILE = '<script>alert("x")</script> & </div> {{ 7 * 7 }} \u2028 "quoted"'
VOID = {"meta", "br", "rect", "line", "path", "link", "img"}


class Page(HTMLParser):
    """Tags with their attributes, texts with the classes they stand in, and a check that every tag is closed."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []  # classes or tag of the enclosing element, text
        self.open: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "data":
            self.rows[-1][-1] = dict(attrs)["value"]
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class", tag)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        if not self.open:  # the line breaks around <html>
            return
        self.texts.append((self.open[-1][1], text))
        if self.open[-1][0] in ("td", "th"):
            self.rows[-1][-1] += text.strip()

    def inside(self, name: str) -> list[str]:
        return [text for where, text in self.texts if name in where.split()]


def response(kind: str, text: str, reward: float, weight: float | None = None) -> dict:
    return {"kind": kind, "sample": 0, "tokens": [5], "text": text, "finished": True, "reward": reward,
            "score": reward, "weight": weight, "principled": kind == "principled"}  # fmt: skip


def rollout(i: int, responses: list[dict], decision: str = "", margin: float | None = None) -> dict:
    return {"query_id": f"q{i}", "prompt": f"prompt {i}", "tau": 0.2, "responses": responses, "margin": margin,
            "decision": decision}  # fmt: skip


def jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


METRICS = [
    {"iteration": 0, "heldout_reward": 0.123456789, "kl": None},
    {"iteration": 1, "heldout_reward": 0.4, "reward_plain": 0.1, "reward_principled": 0.5, "ranked_share": 0.75,
     "tau": 0.2, "generated_tokens": 123456, "grad_norm": 1e-07, "kl": 0.25},
    {"iteration": 2, "heldout_reward": 0.8, "reward_plain": 0.3, "reward_principled": 0.7, "ranked_share": 0.5,
     "tau": 0.18000000000000002, "generated_tokens": 246912, "grad_norm": 2.5, "kl": None},
]  # fmt: skip


@pytest.fixture
def workdir(tmp_path):
    jsonl(tmp_path / "metrics.jsonl", METRICS)
    config = {"algorithm": "ple", "model": {"path": "smollm2-135m"}, "ple": {"tau_0": "inf"}, "algorithm_kwargs": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "environment.json").write_text(json.dumps({"jax": "0.10.2", "cores": 2, "flags": "<none>"}))
    (tmp_path / "summary.json").write_text(json.dumps({
        "algorithm": "ple", "backend": "jax", "seed": 3, "heldout_reward_before": 0.123456789,
        "heldout_reward_after": 0.8, "heldout_gain_ci95": [0.5, 0.85], "iterations": 2, "generated_tokens": 246912,
        "training_tokens": 1000, "wall_seconds": 272.4, "peak_memory_bytes": 2576980378,
    }))  # fmt: skip
    for iteration, word in ((0, "early"), (1, "middle"), (2, "late")):
        rows = [rollout(i, [response("plain", f"{word} {i}", i / 100)]) for i in range(14)]
        jsonl(tmp_path / f"evaluations/iter_{iteration:04d}.jsonl", rows)
    for iteration in (0, 1):
        both = [response("plain", f"bad {iteration}", 0.1), response("principled", f"good {iteration}", 0.6, 0.7)]
        pairs = [rollout(i, both, "ranked" if i % 2 else "blended", 0.5) for i in range(12)]
        jsonl(tmp_path / f"rollouts/iter_{iteration:04d}.jsonl", pairs)
    (tmp_path / "rollouts" / "iter_0002.partial.jsonl").write_text("torn")
    return tmp_path


def page(workdir: Path) -> Page:
    return Page(run_page.write(workdir).read_text(encoding="utf-8"))


def test_the_headline_is_the_summary(workdir):
    text = " ".join(" ".join(t for _, t in page(workdir).texts).split())
    assert "PLE · " in text and "smollm2-135m · jax · seed 3" in text
    assert "0.123 → 0.8 held-out reward: +0.677, 95% interval +0.500 to +0.850" in text
    for words in ("4 min 32 s wall time, 2 iterations", "246,912 tokens generated", "1,000 tokens trained on",
                  "2.40 GiB peak memory"):  # fmt: skip
        assert words in text


def evaluated(**more):
    return {
        "iteration": 0, "step": 0, "within": False, "reward": 0.1, "second": 0.2, "kl": 0.0, "kl_low": 0.0, "kl_high": 0.0,
        "kl_token": 0.0, "length": 24.0, "truncated": 0.5, "distinct_2": 0.92, "repetition": 0.0, "perplexity": 32.0,
        "overlap": 0.01, **more,
    }  # fmt: skip


def test_what_should_make_one_doubt_it_stands_beside_the_headline(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    best = evaluated(iteration=2, reward=0.8, second=0.1, kl=12.5, kl_low=11.0, kl_high=14.0, perplexity=250.0, overlap=0.25,
                     distinct_2=0.7, gain_ci95=[0.6, 0.8], gain_by_length=0.05,
                     responses="evaluations/iter_0002.jsonl")  # fmt: skip
    summary |= {"best": {"any": best}, "points": [evaluated(), best]}
    (workdir / "summary.json").write_text(json.dumps(summary))
    rows = {row[0]: row[1:] for row in page(workdir).rows if row}
    assert rows["KL to the start, nats a response"] == ["0", "12.5 (11 to 14)"]
    assert rows["second reward, which training never sees"] == ["0.2", "0.1"]
    assert rows["perplexity under the start"] == ["32", "250"] and rows["Distinct-2"] == ["0.92", "0.7"]
    assert rows["trigrams that stand in the principles"] == ["1.0%", "25.0%"] and rows["cut off"] == ["50.0%", "50.0%"]
    assert rows["of the gain in reward, what length alone would give"] == ["", "+0.050 of +0.700"]
    # of a run of an earlier version what it does not have is left out
    for point in (best, summary["points"][0]):
        del point["perplexity"], point["second"]
    (workdir / "summary.json").write_text(json.dumps(summary))
    rows = {row[0]: row[1:] for row in page(workdir).rows if row}
    assert "perplexity under the start" not in rows and "Distinct-2" in rows


def test_what_differs_from_the_defaults_comes_first(workdir):
    config = {"format": 2, "backend": "jax", "ple": {"tau_0": 0.3, "alpha": 0.9}, "lora": {"targets": ["all-linear"]},
              "inputs": {"train": "d1"}}  # fmt: skip
    (workdir / "config.json").write_text(json.dumps(config))
    given = {"ple.tau_0": 0.3, "ple.alpha": 0.9, "backend": "jax", "lora.targets": ["all-linear"],
             "model.dtype": "float32", "task.date": "2026-11-30", "reward.kwargs.target": 3}  # fmt: skip
    assert run_page.different(given) == {"ple.tau_0": 0.3, "reward.kwargs.target": 3}  # not what the machine filled in
    keys = [row[0] for row in page(workdir).rows if row]
    listed = [key for key in keys if key in ("ple.tau_0", "format", "backend", "ple.alpha", "lora.targets", "inputs.train")]
    assert listed[0] == "ple.tau_0" and len(listed) == 6


def test_the_table_holds_the_exact_numbers(workdir):
    rows = {row[0]: row[1:] for row in page(workdir).rows if row and row[0] in {k for m in METRICS for k in m}}
    assert set(rows) == {key for line in METRICS for key in line} - {"iteration"}
    for key, cells in rows.items():
        assert cells == [repr(line[key]) if line.get(key) is not None else "–" for line in METRICS]


def test_config_and_environment_are_listed(workdir):
    rows = page(workdir).rows
    for row in (["model.path", "smollm2-135m"], ["ple.tau_0", "inf"], ["algorithm_kwargs", "{}"], ["jax", "0.10.2"],
                ["flags", "<none>"]):  # fmt: skip
        assert row in rows


def test_samples_are_the_first_in_file_order_before_and_after(workdir):
    seen = page(workdir)
    assert seen.inside("response")[:20] == [f"{word} {i}" for i in range(10) for word in ("early", "late")]
    assert seen.inside("prompt")[:10] == [f"prompt {i}" for i in range(10)]
    notes = " ".join(" ".join(seen.inside("note")).split())
    assert "The first 10 of 14 held-out queries in file order, the first response to each: not selected." in notes
    assert "After is iteration 2." in notes
    within = workdir / "evaluations" / "step_000003"
    within.mkdir()
    shutil.copy(workdir / "evaluations" / "iter_0002.jsonl", within / "iter_0001.jsonl")
    kept = json.loads((workdir / "summary.json").read_text())
    best = evaluated(iteration=1, step=3, within=True, gain_ci95=[0.6, 0.8], gain_by_length=0.05,
                     responses="evaluations/step_000003/iter_0001.jsonl")  # fmt: skip
    (workdir / "summary.json").write_text(json.dumps(kept | {"best": {"any": best}, "points": [evaluated(), best]}))
    try:
        assert "After is step 3." in " ".join(" ".join(page(workdir).inside("note")).split())
    finally:
        (workdir / "summary.json").write_text(json.dumps(kept))
        shutil.rmtree(within)


def test_training_pairs_are_those_of_the_last_iteration_by_decision(workdir):
    seen = page(workdir)
    assert seen.inside("h2")[2:4] == ["Training: ranked", "Training: blended"]
    assert seen.inside("response")[20:] == ["bad 1", "good 1"] * 8
    assert seen.inside("prompt")[10:] == [f"prompt {i}" for i in (1, 3, 5, 7, 0, 2, 4, 6)]
    spans = " ".join(" ".join(seen.inside("span")).split())
    assert "margin 0.5 · tau 0.2" in spans and "reward 0.6 · weight 0.7" in spans
    assert "not preferred · reward 0.1" in spans and " preferred · reward 0.6" in spans


@pytest.mark.parametrize(
    ("kinds", "scores", "decision", "roles"),
    [
        (["plain", "principled"], [0.1, 0.6], "ranked", ["not preferred", "preferred"]),
        (["plain", "principled"], [0.6, 0.1], "ranked", ["preferred", "not preferred"]),  # of selection symmetric
        (["plain", "principled", "principled"], [0.1, 0.3, 0.6], "ranked", ["not preferred", "not compared", "preferred"]),
        (["plain"] * 4, [0.3, 0.9, 0.1, 0.4], "ranked", ["not compared", "preferred", "not preferred", "not compared"]),
        (["plain", "principled"], [0.1, 0.6], "blended", ["", ""]),
        (["completion", "rejected"], [None, None], "ranked", ["", ""]),
    ],
)
def test_of_a_ranked_pair_it_says_which_was_preferred(kinds, scores, decision, roles):
    found = rollout(0, [response(kind, "a", score) for kind, score in zip(kinds, scores, strict=True)], decision)
    assert run_page.roles(found) == roles


def test_every_text_is_escaped(workdir):
    row = rollout(0, [response("<b>kind", HOSTILE, 0.5)], "<i>decision", 0.1) | {"prompt": HOSTILE, "query_id": "<q>"}
    jsonl(workdir / "evaluations/iter_0000.jsonl", [row])
    jsonl(workdir / "evaluations/iter_0002.jsonl", [row])
    jsonl(workdir / "rollouts/iter_0001.jsonl", [row])
    jsonl(workdir / "metrics.jsonl", [*METRICS, {"iteration": 3, "reward_<u>": 1.0, "length_<u>": 2.0}])
    (workdir / "config.json").write_text(json.dumps({"principles": HOSTILE, "<s>": HOSTILE}))
    seen = page(workdir)
    assert {tag for tag, _ in seen.tags}.isdisjoint({"script", "u", "s", "q"})
    assert seen.inside("prompt") == [HOSTILE] * 2
    assert seen.inside("response") == [HOSTILE] * 3
    assert ["<s>", HOSTILE.strip()] in seen.rows
    assert "Training: <i>decision" in seen.inside("h2")


def test_nothing_is_loaded_from_anywhere(workdir):
    seen = page(workdir)
    html = (workdir / "report.html").read_text()
    assert not {tag for tag, _ in seen.tags} & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not [attrs for _, attrs in seen.tags if attrs.keys() & {"src", "href", "srcset", "action", "background"}]
    assert not re.search(r"https?:|//[a-z]|url\(|@import", html)
    assert ("meta", {"http-equiv": "Content-Security-Policy",
                     "content": "default-src 'none'; style-src 'unsafe-inline'"}) in seen.tags  # fmt: skip
    assert "prefers-color-scheme: dark" in html


def test_a_lone_surrogate_does_not_stop_the_report(workdir):
    (workdir / "config.json").write_text('{"principles": "a\\ud800b"}')
    assert ["principles", "a?b"] in page(workdir).rows


def test_only_metrics_are_needed_and_one_iteration_is_enough(tmp_path):
    jsonl(tmp_path / "metrics.jsonl", [{"iteration": 1, "reward_plain": 0.5}])
    seen = page(tmp_path)
    assert seen.inside("h2") == ["Curves", "Metrics", "Config", "Environment"]
    assert sum(tag == "svg" for tag, _ in seen.tags) == 1


def test_a_run_with_no_number_at_all_has_no_chart(tmp_path):
    jsonl(tmp_path / "metrics.jsonl", [{"iteration": 0}])
    assert not [tag for tag, _ in page(tmp_path).tags if tag == "svg"]


def test_other_algorithms_bring_kinds_and_decisions_of_their_own(tmp_path):
    metrics = [
        {"iteration": i, "reward_plain": 0.1, "reward_sampled": 0.2, "length_sampled": 3.0, "reward_calls": 96}
        for i in (1, 2)
    ]
    jsonl(tmp_path / "metrics.jsonl", metrics)
    answers = [response("sampled", f"answer {i}", 0.1) for i in range(9)]
    jsonl(tmp_path / "rollouts/iter_0001.jsonl", [rollout(0, answers)])
    seen = page(tmp_path)
    rewards, lengths = run_page.charts(metrics)
    assert [line.mark.label for line in rewards.lines] == ["plain", "sampled"]
    assert [line.mark.colour for line in lengths.lines] == [rewards.lines[1].mark.colour]
    assert "Training: collected" in seen.inside("h2")
    assert seen.inside("response") == [f"answer {i}" for i in range(4)]
    assert "and 5 more" in seen.inside("soft")


def test_a_colour_means_one_thing():
    """A kind of response has its colour in every chart, what is held out has one, and the rest that of text."""
    line = {"iteration": 1, "heldout_reward": 1.0, "heldout_reward_principled": 0.5, "reward_plain": 0.1,
            "reward_principled": 0.2, "ranked_share": 0.5, "negative_margin_share": 0.1, "margin": 0.1, "tau": 0.2,
            "heldout_kl_response": 3.0, "heldout_kl": 0.1, "kl": 0.2, "length_plain": 5.0, "length_principled": 6.0,
            "lp_plain": -2.0, "lp_principled": -1.0, "sampler_gap": 1e-6, "sampler_gap_max": 2e-6}  # fmt: skip
    meanings = {}
    for chart in run_page.charts([line | {"iteration": 0}, line]):
        seen = [(one.mark.colour, one.mark.dash) for one in chart.lines]
        assert len(set(seen)) == len(seen)  # told apart within a chart
        for one in chart.lines:
            meanings.setdefault(one.mark.colour, set()).add(one.mark.label)
    kinds = {label: colour for colour, labels in meanings.items() for label in labels}
    for label in ("held-out", "held-out, principled", "plain", "principled"):
        assert meanings[kinds[label]] == {label}
    rest = {"ranked", "negative margin", "margin", "tau", "training responses", "mean", "largest"}
    assert meanings[kinds["tau"]] == rest


def test_a_line_that_would_cover_another_is_dashed():
    def line(colour, *ys):
        places = [(10.0 * i, y, "") for i, y in enumerate(ys)]
        return drawing.Line(drawing.Mark(1, "", colour, 0), "", places)

    flat, same, apart, near = line(0, 5, 5, 5), line(1, 5, 5, 5), line(2, 5, 5, 9), line(3, 6, 6, 6)
    assert [one.mark.dash for one in drawing.told_apart([flat, same, apart, near])] == [0, 1, 0, 2]
    assert [one.mark.dash for one in drawing.told_apart([flat, apart])] == [0, 0]


def test_without_metrics_the_error_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match="no metrics.jsonl in .*: give the --workdir of a run"):
        run_page.write(tmp_path)


def test_points_lie_where_the_numbers_say():
    (chart,) = run_page.charts([{"iteration": i, "ranked_share": v} for i, v in enumerate((0.0, None, 0.5, 1.0, 0.25))])
    (line,) = chart.lines
    said = [(band.title, text) for band in chart.bands for _, text in band.rows]
    assert said == [("iteration 0", "0.0%"), ("iteration 2", "50.0%"), ("iteration 3", "100.0%"), ("iteration 4", "25.0%")]
    (x0, bottom, _), (x2, middle, _), (x3, top, _), (x4, _, _) = line.dots
    assert line.path == f"M{x0} {bottom}L{x2} {middle}L{x3} {top}L{x4} {line.dots[3][1]}"
    assert middle == pytest.approx((top + bottom) / 2, abs=0.1)  # coordinates have one decimal
    assert (x2 - x0, x3 - x0) == pytest.approx(((x4 - x0) / 2, (x4 - x0) * 3 / 4), abs=0.1)
    assert chart.yticks == [(bottom, "0%"), (pytest.approx((bottom * 3 + top) / 4, abs=0.1), "25%"), (middle, "50%"),
                            (pytest.approx((bottom + top * 3) / 4, abs=0.1), "75%"), (top, "100%")]  # fmt: skip
    assert [band.x for band in chart.bands] == [x0, x2, x3, x4]


def test_of_evaluations_many_steps_apart_each_has_its_band():
    (chart,) = run_page.charts([{"iteration": i, "ranked_share": 0.5} for i in (0, 500, 1000, 1286)])
    assert [band.x for band in chart.bands] == [x for x, *_ in chart.lines[0].dots]
    assert all(band.width > 50 for band in chart.bands[:3])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_every_point_lies_within_the_frame_between_round_ticks(values):
    (chart,) = run_page.charts([{"iteration": i, "kl": value} for i, value in enumerate(values)])
    left, top, right, bottom = (getattr(chart.frame, edge) for edge in ("left", "top", "right", "bottom"))
    assert all(left <= x <= right and top <= y <= bottom for x, y, _ in chart.lines[0].dots)
    assert 0 <= left < right <= chart.frame.width and 0 <= top < bottom <= chart.frame.height
    assert 2 <= len(chart.yticks) <= 7
    assert len(chart.xticks) <= 11


@pytest.mark.parametrize("value", [0.22708333333333333, -3.3, 1e6, 0.0])
def test_values_that_differ_by_rounding_alone_are_one(value):
    """The mean of the same rewards in another order."""
    (chart,) = run_page.charts([{"iteration": i, "kl": v} for i, v in enumerate((value, np.nextafter(value, 10), value))])
    first, second, third = (y for _, y, _ in chart.lines[0].dots)
    assert first == second == third and 2 <= len(chart.yticks) <= 7


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.1235"), (1234567, "1,234,567"), (12345.6, "12,346"), (1e-7, "1e-07"), (None, "–"), ("inf", "inf")],
)
def test_numbers_for_people(value, text):
    assert formats.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.25, "4.2 s"), (59.7, "1 min 0 s"), (272.3, "4 min 32 s"), (7384, "2 h 3 min")]
)
def test_durations_for_people(seconds, text):
    assert formats.duration(seconds) == text
