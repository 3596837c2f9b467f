"""The comparison: numbers beside ones worked out by hand, the page parsed as a browser would."""

import csv
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from ml_collections import ConfigDict, FrozenConfigDict
from scipy import stats
from test_run_page import HOSTILE, Page

from configs import default
from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import UserError
from ple_jax.core.files import read_json, write_json
from ple_jax.core.types import Response, Rollout
from ple_jax.evaluation import compare as comparing
from ple_jax.evaluation import numbers as of_methods
from ple_jax.evaluation import win_rates
from ple_jax.evaluation.entries import Found, expand
from ple_jax.evaluation.methods import labelled, read
from ple_jax.formulas import intervals
from ple_jax.reports import comparison_charts, comparison_files, drawing, formats
from ple_jax.training import journal

COSTS = {"queries": 10, "generated_tokens": 1000, "prompt_tokens": 50, "principle_tokens": 7, "reward_calls": 20,
         "training_tokens": 3000, "flops": 5_000_000, "evaluation_tokens": 9, "wall_seconds": 60.5,
         "peak_memory_bytes": 2**30, "seconds": {"generate": 8.0, "score": 1.0, "prepare": 2.0, "update": 16.0,
                                                "evaluate": 32.0}}  # fmt: skip


def write_run(
    workdir, rewards, *, second=None, kl=None, texts=None, seed=0, policy="trained", principled=False, algorithm="ple",
    trainer="own", overrides=None, costs=None, lines=None, summary=True, settings=None, prompts=None, inputs=None,
):  # fmt: skip
    """A work directory with responses: `rewards`, `second`, `kl` and `texts` are [query][sample]."""
    config = default.get_config()
    config.update_from_flattened_dict(overrides or {})
    config.algorithm, config.trainer, config.seed = algorithm, trainer, seed
    tree = config.to_dict()
    for mode in ("generate", "compare", "export"):
        del tree[mode]
    workdir.mkdir(parents=True, exist_ok=True)
    kept = {"format": 2, "backend": "jax", **tree, "inputs": inputs or {"train": "a", "model": "m"}}
    write_json(workdir / "config.json", kept)
    iteration = 5 if policy == "trained" else 0
    folder = workdir / "responses" / (policy + ("_principled" if principled else ""))
    kept = {
        "algorithm": algorithm, "trainer": trainer, "backend": "jax", "seed": seed, "iteration": iteration, "policy": policy,
        "principled": principled, "principles": None, "model": "tiny", "adapter": None, "data": "test",
        "data_digest": "d1", "queries": len(rewards), "samples": len(rewards[0]), "max_new_tokens": 4,
        "sampling": {"temperature": 1.0}, "reward": "vader", "reward_version": "1",
        "second_reward": None if second is None else "words",
    }  # fmt: skip
    rows, scores = [], []
    for q, values in enumerate(rewards):
        said = [f"text {q}.{s}" if texts is None else texts[q][s] for s in range(len(values))]
        responses = tuple(
            Response((5, 6), True, "plain", s, said[s], math.nan if r is None else r) for s, r in enumerate(values)
        )
        rows.append(Rollout(f"q{q}", f"prompt {q}" if prompts is None else prompts[q], (1, 2), responses))
        scores.append({
            "query_id": f"q{q}", "reference": "", **({} if second is None else {"second": second[q]}),
            "logprob": [-2.0] * len(values), "base_logprob": [-2.0] * len(values),
            "kl": [0.0] * len(values) if kl is None else kl[q], "reference_logprob": None, "reference_tokens": 0,
        })  # fmt: skip
    journal.write(folder / f"iter_{iteration:04d}.jsonl", rows)
    write_json(folder / f"iter_{iteration:04d}.json", {**kept, **(settings or {})})
    path = folder / f"iter_{iteration:04d}.scores.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in scores))
    if policy == "trained":
        spent = {**COSTS, **(costs or {})}
        if lines is None:
            lines = curve_lines([0.1, 0.5], spent["generated_tokens"])
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if summary:
            write_json(workdir / "summary.json", {"iterations": 5, "seed": seed, **spent})
    return folder


def curve_lines(held, generated=1000, seconds=100.0):
    """Evenly spaced evaluations up to iteration 5, and what had been spent by then."""
    last = len(held) - 1
    return [
        {"iteration": 5 * i // last, "heldout_reward": y, "total_queries": 10 * i, "total_training_tokens": 300 * i,
         "total_generated_tokens": generated * i // last, "total_reward_calls": 20 * i, "total_seconds": seconds * i / last}
        for i, y in enumerate(held)
    ]  # fmt: skip


def options(**compare):
    config = default.get_config()
    config.compare.update(ConfigDict({"judge_samples": 1} | compare))
    return FrozenConfigDict(config)


def compare(root, entries, name="out", **changes):
    out = root / name
    out.mkdir(exist_ok=True)
    for result in comparing.results([str(entry) for entry in entries], out, config=options(**changes), backend="jax"):
        comparison_files.write(result, out)
    return json.loads((out / "comparison.json").read_text())


def table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def numbers(row, *keys):
    return [float(row[key]) for key in keys]


def const(value, queries=2, samples=1):
    return [[value] * samples for _ in range(queries)]


def by(rows, **what):
    (row,) = (row for row in rows if all(row[key] == value for key, value in what.items()))
    return row


# ---------------------------------------------------------------- means, intervals, costs


@pytest.fixture
def two(tmp_path):
    """A baseline and a method of two seeds each, with responses that have no reward."""
    write_run(tmp_path / "a0", [[1.0, None], [0.0, 4.0]], second=[[1.0, 2.0], [None, 6.0]], kl=const(2.0, samples=2))
    write_run(tmp_path / "a1", [[2.0, 4.0], [0.0, 1.0]], second=[[0.0, 0.0], [1.0, 1.0]], kl=const(3.0, samples=2), seed=1)
    write_run(tmp_path / "b0", [[5.0, 5.0], [3.0, 1.0]], second=[[0.5, 0.5], [0.5, 0.5]], algorithm="raft",
              costs={"wall_seconds": 100.5})  # fmt: skip
    write_run(tmp_path / "b1", [[7.0, 7.0], [math.inf, None]], second=[[2.5, 2.5], [2.5, 2.5]], algorithm="raft", seed=1)
    return tmp_path


def students(values) -> list[float]:
    """The 95% interval of a mean."""
    return list(stats.ttest_1samp(values, 0.0).confidence_interval(0.95))


def test_means_are_over_seeds_of_queries_of_samples(two):
    # a: seed 0 (1 + 2) / 2 (all responses together would give 5/3), seed 1 (3 + 0.5) / 2; b: (5 + 2) / 2 and 7
    result = compare(two, [two / "a0", two / "a1", two / "b?"])
    rows = table(two / "out" / "table.csv")
    assert [row["method"] for row in rows] == ["ple", "raft"] and [row["seeds"] for row in rows] == ["0 1", "0 1"]
    assert [float(row["reward"]) for row in rows] == [(1.5 + 1.75) / 2, (3.5 + 7) / 2]
    assert [float(row["reward_second"]) for row in rows] == [((1.5 + 6) / 2 + 0.5) / 2, 1.5]
    assert [float(row["kl"]) for row in rows] == [2.5, 0.0]
    assert [float(row["bad_reward"]) for row in rows] == [1 / 8, 1 / 4]
    assert [float(row["bad_reward_second"]) for row in rows] == [1 / 8, 0.0]
    seeds = table(two / "out" / "seeds.csv")
    assert [(row["method"], row["seed"], float(row["reward"])) for row in seeds] == [
        ("ple", "0", 1.5), ("ple", "1", 1.75), ("raft", "0", 3.5), ("raft", "1", 7.0)]  # fmt: skip
    assert seeds[2]["folder"] == str(two / "b0" / "responses" / "trained")
    for method, row in zip(result["methods"], rows, strict=True):
        assert method["measures"]["reward"] == float(row["reward"])
        assert method["intervals"]["reward"] == numbers(row, "reward_low", "reward_high")
    assert result["methods"][0]["by_query"]["reward"] == [[1.0, 2.0], [3.0, 0.5]]
    assert result["methods"][1]["by_query"]["reward"] == [[5.0, 2.0], [7.0, None]]


def test_intervals_and_tests_are_those_of_the_seed_by_query_matrix(two):
    result = compare(two, [two / "a?", two / "b?"])
    a, b = np.array([[1.0, 2.0], [3.0, 0.5]]), np.array([[5.0, 2.0], [7.0, np.nan]])
    assert result["methods"][0]["intervals"]["reward"] == list(intervals.clustered_ci(a, seed=0))
    (row,) = (row for row in table(two / "out" / "tests.csv") if row["measure"] == "reward")
    expected = intervals.paired(b, a, seed=0)
    assert (row["method"], row["against"], row["seeds"]) == ("raft", "ple", "0 1")
    assert numbers(row, "difference", "low", "high", "p") == list(expected)
    assert expected.difference == (4 + 0 + 4) / 3
    # the seeds' means are 2 and 4, the queries' 4 and 0: variance 1 + 4, of 1 / (1/25 + 16/25) degrees
    assert float(row["p"]) == pytest.approx(2 * stats.t.sf(8 / 3 / math.sqrt(5), 25 / 17), abs=1e-6)
    assert row["p_holm"] == row["p"] and not any("p_seeds" in key for key in row)


def test_an_interval_of_seeds_that_agree_on_all_queries_is_students_of_the_seeds(tmp_path):
    for seed, value in enumerate((1.0, 2.0, 4.0)):
        write_run(tmp_path / f"a{seed}", const(value, 8), seed=seed)
    (method,) = compare(tmp_path, [tmp_path / "a*"])["methods"]
    assert method["measures"]["reward"] == pytest.approx(7 / 3)
    assert method["intervals"]["reward"] == pytest.approx(students([1.0, 2.0, 4.0]))


def test_costs_are_of_the_summary_and_of_a_start_model_nothing(two):
    write_run(two / "s", const(0.0, samples=2), policy="start")
    compare(two, [two / "b?", two / "s"])
    raft, start = table(two / "out" / "table.csv")
    keys = ("generated_tokens", "principle_tokens", "reward_calls", "training_tokens", "flops", "peak_memory_bytes")
    assert numbers(raft, *keys) == [COSTS[key] for key in keys]
    assert numbers(raft, "wall_seconds", "train_seconds", "evaluate_seconds") == [80.5, 8 + 1 + 2 + 16, 32.0]
    assert numbers(start, "generated_tokens", "training_tokens", "reward_calls", "flops", "wall_seconds") == [0] * 5
    assert start["peak_memory_bytes"] == "" and start["heldout_area"] == ""


def test_costs_of_an_unfinished_run_are_those_of_its_newest_line(two):
    write_run(two / "c", const(1.0, samples=2), algorithm="grpo", summary=False)
    result = compare(two, [two / "c"])
    row = table(two / "out" / "table.csv")[0]
    keys = ("generated_tokens", "training_tokens", "reward_calls", "queries", "train_seconds")
    assert numbers(row, *keys) == [1000, 300, 20, 10, 100.0]
    assert "grpo, seed 0: training is not finished; the responses are of iteration 5" in result["warnings"]


def test_one_query_and_one_seed_have_no_p(tmp_path):
    write_run(tmp_path / "x", [[1.0, 2.0]])
    write_run(tmp_path / "y", [[4.0, 3.0]])
    compare(tmp_path, [f"x={tmp_path / 'x'}", f"y={tmp_path / 'y'}"])
    (row,) = (row for row in table(tmp_path / "out" / "tests.csv") if row["measure"] == "reward")
    assert abs(float(row["difference"])) == 2.0 and row["p"] == ""


# ---------------------------------------------------------------- tests between methods


def test_differences_are_methods_minus_the_baseline_wherever_it_stands(tmp_path):
    for name, value in (("x", 1.0), ("y", 4.0), ("z", 2.0)):
        write_run(tmp_path / name, const(value, 4), second=const(-value, 4))
    entries = [f"{name}={tmp_path / name}" for name in "xyz"]
    assert [row["label"] for row in compare(tmp_path, entries, baseline="y")["methods"]] == ["x", "y", "z"]
    found = {(r["measure"], r["method"], r["against"]): float(r["difference"]) for r in table(tmp_path / "out/tests.csv")}
    assert found == {
        ("reward", "x", "y"): -3.0, ("reward", "z", "y"): -2.0, ("reward", "z", "x"): 1.0,
        ("reward_second", "x", "y"): 3.0, ("reward_second", "z", "y"): 2.0, ("reward_second", "z", "x"): -1.0,
    }  # fmt: skip
    rows = table(tmp_path / "out" / "table.csv")
    assert [row["reward_difference"] for row in rows] == ["-3.0", "", "-2.0"]
    assert [row["reward_difference_low"] for row in rows] == ["-3.0", "", "-2.0"]
    text = (tmp_path / "out" / "table.md").read_text().split("**Second")[0].splitlines()
    shown = [line.split("|")[4].strip().split(" ")[0] for line in text if line[:3] in ("| x", "| y", "| z")]
    assert shown == ["-3.00", "baseline", "-2.00"]


def test_p_values_are_adjusted_for_all_pairs_of_one_measure_and_for_the_differences_of_a_column(tmp_path):
    rng = np.random.default_rng(1)
    values = {name: rng.normal(mean, 1, 12) for name, mean in (("x", 0.0), ("y", 0.4), ("z", 0.9))}
    for name, row in values.items():
        write_run(tmp_path / name, row[:, None].tolist(), second=rng.normal(0, 1, (12, 1)).tolist())
    rows = [
        row for row in compare(tmp_path, [f"{name}={tmp_path / name}" for name in "xyz"])["tests"]
        if row["measure"] == "reward"
    ]  # fmt: skip
    assert [(row["method"], row["against"]) for row in rows] == [("y", "x"), ("z", "x"), ("z", "y")]
    for row in rows:
        alone = intervals.paired(values[row["method"]][None], values[row["against"]][None], seed=0)
        assert (row["difference"], row["p"]) == (alone.difference, alone.p)
    smallest, middle, largest = sorted(rows, key=lambda row: row["p"])
    assert smallest["p"] < middle["p"] < largest["p"] < 1
    assert smallest["p_holm"] == 3 * smallest["p"]
    assert middle["p_holm"] == max(2 * middle["p"], 3 * smallest["p"])
    assert largest["p_holm"] == max(largest["p"], 2 * middle["p"], 3 * smallest["p"])
    to_baseline = sorted(rows[:2], key=lambda row: row["p"])
    assert to_baseline[0]["p_against"] == min(1, 2 * to_baseline[0]["p"])
    assert to_baseline[1]["p_against"] == max(to_baseline[1]["p"], min(1, 2 * to_baseline[0]["p"]))
    assert rows[2]["p_against"] == rows[2]["p"]  # the only difference to y
    shown = (tmp_path / "out" / "table.md").read_text()
    assert "p adjusted for the 2 differences (Holm)" in shown and f"| {formats.p_value(rows[1]['p_against'])} |" in shown
    written = by(table(tmp_path / "out" / "table.csv"), method="z")
    assert float(written["reward_p_against"]) == pytest.approx(rows[1]["p_against"])


def test_methods_with_other_seeds_are_tested_on_those_that_both_have(tmp_path):
    for seed, value in ((0, 1.0), (1, 2.0), (2, 9.0)):
        write_run(tmp_path / f"a{seed}", const(value, 3), seed=seed)
    for seed, value in ((2, 5.0), (1, 4.0), (3, 100.0)):
        write_run(tmp_path / f"b{seed}", const(value, 3), seed=seed, algorithm="raft")
    write_run(tmp_path / "c", const(0.0, 3), seed=7, algorithm="grpo")
    result = compare(tmp_path, [tmp_path / "a?", tmp_path / "b?", tmp_path / "c"])
    row = by(result["tests"], measure="reward", method="raft", against="ple")
    # seeds 1 and 2: (4 - 2 + 5 - 9) / 2
    assert (row["seeds"], row["difference"]) == ([1, 2], -1.0)
    assert (row["low"], row["high"]) == pytest.approx(students([2.0, -4.0]))
    assert result["methods"][1]["seeds"] == [1, 2, 3] and result["methods"][1]["measures"]["reward"] == 109 / 3
    none = by(result["tests"], measure="reward", method="grpo", against="ple")
    assert (none["seeds"], none["difference"], none["p"], none["p_holm"]) == ([], None, None, None)
    lacks = [warning for warning in result["warnings"] if "lacks" in warning]
    assert [warning.split(":")[0] for warning in lacks] == [
        "ple lacks seeds 3, 7", "raft lacks seeds 0, 7", "grpo lacks seeds 0, 1, 2, 3"]  # fmt: skip
    assert row["p_holm"] == row["p"]  # the pairs without a test do not count


def test_what_lengths_alone_would_give_has_the_sign_of_a_minus_b():
    def method(lengths: list[int], values: list[float]) -> SimpleNamespace:
        answered = [SimpleNamespace(responses=[SimpleNamespace(tokens=(0,) * n) for n in lengths])]
        run = SimpleNamespace(seed=0, generated=SimpleNamespace(rollouts=answered))
        return SimpleNamespace(trained=True, runs=[run], values={"reward": np.array([[values]])})

    a, b = method([8, 10], [5.0, 6.0]), method([2, 4], [0.0, 1.0])
    assert (of_methods.by_length(a, b, "reward"), of_methods.by_length(b, a, "reward")) == (3.0, -3.0)


def test_the_one_run_of_a_start_model_stands_beside_every_seed(tmp_path):
    write_run(tmp_path / "s", const(1.0, 3), policy="start", seed=5)
    for seed, value in enumerate((1.0, 2.0, 4.0)):
        write_run(tmp_path / f"a{seed}", const(value, 3), seed=seed)
    for entries, sign in (([tmp_path / "s", tmp_path / "a?"], 1), ([tmp_path / "a?", tmp_path / "s"], -1)):
        result = compare(tmp_path, entries)
        (row,) = (row for row in result["tests"] if row["measure"] == "reward")
        low, high = students([0.0, 1.0, 3.0])
        assert row["difference"] == sign * 4 / 3
        assert sorted((sign * row["low"], sign * row["high"])) == pytest.approx([low, high])
        assert row["seeds"] == [0, 1, 2]
        win = by(result["wins"], method="ple", against="start")
        assert (win["win"], win["tie"], win["judged"]) == (2 / 3, 1 / 3, 9)
        assert result["warnings"] == [next(w for w in result["warnings"] if "second reward" in w)]
        assert "start: one run, which stands beside every seed of the others" in result["notes"]


def test_a_start_model_that_was_sampled_with_several_seeds_is_paired_by_them(tmp_path):
    for seed, (start, trained) in enumerate(((1.0, 2.0), (10.0, 20.0))):
        write_run(tmp_path / f"s{seed}", const(start, 3), policy="start", seed=seed)
        write_run(tmp_path / f"a{seed}", const(trained, 3), seed=seed)
    (row,) = (r for r in compare(tmp_path, [tmp_path / "s?", tmp_path / "a?"])["tests"] if r["measure"] == "reward")
    assert row["difference"] == 5.5 and (row["low"], row["high"]) == pytest.approx(students([1.0, 10.0]))


# ---------------------------------------------------------------- win rates


def test_win_rates_by_the_stored_rewards(tmp_path):
    write_run(tmp_path / "x", [[1.0, 9.0], [2.0, 9.0], [3.0, 9.0], [None, 9.0], [5.0, 9.0]], second=const(0.0, 5, 2))
    write_run(tmp_path / "y", [[2.0, 0.0], [2.0, 0.0], [2.5, 0.0], [1.0, 0.0], [6.0, 0.0]], second=const(1.0, 5, 2))
    entries = [f"x={tmp_path / 'x'}", f"y={tmp_path / 'y'}"]
    result = compare(tmp_path, entries)
    rows = {(row["method"], row["against"]): row for row in table(tmp_path / "out" / "wins.csv")}
    assert set(rows) == {("y", "x"), ("x", "y")}
    # first samples: y wins twice, one tie, loses once, and once x has no reward
    assert numbers(rows["y", "x"], "win", "tie", "loss", "win_rate", "judged", "failed") == [0.5, 0.25, 0.25, 0.625, 4, 1]
    assert numbers(rows["x", "y"], "win", "tie", "loss", "win_rate", "judged", "failed") == [0.25, 0.25, 0.5, 0.375, 4, 1]
    low, high = 0.0, 1.0  # Student's interval of four such rates is wider than all rates
    assert students([1.0, 0.5, 0.0, 1.0])[0] < low and students([1.0, 0.5, 0.0, 1.0])[1] > high
    assert numbers(rows["y", "x"], "low", "high") == [low, high]
    assert numbers(rows["x", "y"], "low", "high") == [1 - high, 1 - low]
    assert "the judge gave no verdict on 1 of 5 pairs" in result["warnings"]
    assert float(table(tmp_path / "out" / "table.csv")[1]["win_rate"]) == 0.625
    assert not (tmp_path / "out" / "judgements.sqlite").exists() and result["judge"]["symmetric"] is True

    tied = by(compare(tmp_path, entries, judge_kwargs={"tie": 0.5})["wins"], method="y", against="x")
    assert (tied["win"], tied["tie"], tied["loss"]) == (0.5, 0.5, 0.0)
    assert default.get_config().compare.judge_samples == 0  # all of them
    for samples in (2, 0):
        more = by(compare(tmp_path, entries, judge_samples=samples)["wins"], method="y", against="x")
        assert (more["judged"], more["loss"]) == (9, 6 / 9)
    assert "on 2 responses to each of 5 queries" in (tmp_path / "out" / "table.md").read_text()
    second = by(compare(tmp_path, entries, judge_kwargs={"which": "second"})["wins"], method="y", against="x")
    assert (second["win"], second["judged"]) == (1.0, 5)


def test_the_interval_of_a_turned_pair_is_mirrored(tmp_path):
    write_run(tmp_path / "x", [[float(q == 5)] for q in range(6)])
    write_run(tmp_path / "y", const(0.5, 6))  # wins 5 of 6
    wins = compare(tmp_path, [f"x={tmp_path}/x", f"y={tmp_path}/y"])["wins"]
    one, other = by(wins, method="y", against="x"), by(wins, method="x", against="y")
    low = students([1.0] * 5 + [0.0])[0]
    assert 0 < low < 0.5
    assert (one["low"], one["high"]) == pytest.approx((low, 1.0))
    assert (other["low"], other["high"]) == pytest.approx((0.0, 1 - low))
    assert other["win_rate"] == pytest.approx(1 / 6)


JUDGE = """
import json
LOG = {log!r}
def longer(prompts, first, second, sign=1):
    with open(LOG, "a") as file:
        for asked in zip(prompts, first, second):
            file.write(json.dumps(asked) + "\\n")
    return [sign * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second)]
def polite(prompts, first, second):
    return [1.0] * len(first)
def silent(prompts, first, second):
    return [float("nan")] * len(first)
"""


@pytest.fixture
def judged(tmp_path):
    """Two methods of two seeds, four queries and two samples; a text says of which method, seed, query and sample it is."""
    (tmp_path / "mine.py").write_text(JUDGE.format(log=str(tmp_path / "log")))
    for name in ("xx", "y"):
        for seed in (0, 1):
            texts = [[f"{name}:{seed}:{q}:{s}" for s in (0, 1)] for q in range(4)]
            write_run(tmp_path / f"{name}{seed}", const(0.0, 4, 2), second=const(0.0, 4, 2), texts=texts, seed=seed)
    return tmp_path


def pairs_of(root):
    return [json.loads(line) for line in (root / "log").read_text().splitlines()]


def test_a_judge_sees_both_orders_of_responses_to_one_query_seed_and_sample(judged):
    entries = [f"xx={judged}/xx?", f"y={judged}/y?"]
    result = compare(judged, entries, judge=f"{judged}/mine.py:longer", judge_samples=2)
    asked = pairs_of(judged)
    assert len(asked) == len({tuple(a) for a in asked}) == 2 * 2 * 4 * 2
    for prompt, first, second in asked:
        assert first.split(":")[1:] == second.split(":")[1:] and prompt == f"prompt {first.split(':')[2]}"
        assert {first.split(":")[0], second.split(":")[0]} == {"xx", "y"}
    row = by(result["wins"], method="xx", against="y")
    assert (row["win_rate"], row["low"], row["high"], row["judged"], row["consistency"]) == (1.0, 1.0, 1.0, 16, 1.0)
    assert by(result["wins"], method="y", against="xx")["win_rate"] == 0.0
    compare(judged, entries, judge=f"{judged}/mine.py:longer", judge_samples=2)
    assert len(pairs_of(judged)) == len(asked)  # nothing is asked twice


def test_as_many_queries_are_judged_as_asked_for_and_more_include_fewer(judged):
    entries = [f"xx={judged}/xx0", f"y={judged}/y0"]
    seen = []
    for count in (2, 3):
        result = compare(judged, entries, name=f"out{count}", judge=f"{judged}/mine.py:longer", judge_queries=count)
        assert result["judge"]["queries"] == count and by(result["wins"], method="xx", against="y")["judged"] == count
        seen.append({prompt for prompt, _, _ in pairs_of(judged)})
        (judged / "log").unlink()
    assert seen[0] < seen[1] and len(seen[1]) == 3


def test_queries_are_drawn_by_seed_each_number_of_them_from_the_next():
    drawn = [win_rates.judged_queries(20, count, 3) for count in range(1, 21)]
    assert [len(some) for some in drawn] == list(range(1, 21)) and win_rates.judged_queries(20, 0, 3) == list(range(20))
    assert all(some == sorted(some) and set(some) < set(more) for some, more in itertools.pairwise(drawn))
    assert drawn[9] not in (list(range(10)), win_rates.judged_queries(20, 10, 4))


def test_a_judge_that_prefers_a_position_shows(judged):
    entries = [f"xx={judged}/xx?", f"y={judged}/y?"]
    result = compare(judged, entries, judge=f"{judged}/mine.py:polite")
    for row in result["wins"]:
        assert (row["win_rate"], row["tie"], row["position_bias"], row["consistency"]) == (0.5, 1.0, 1.0, 0.0)
    text = (judged / "out" / "comparison.html").read_text()
    assert "Over all pairs the position bias is +1.00" in text and "both orders agree on 0%" in text


def test_a_judge_without_a_verdict_shows(judged):
    result = compare(judged, [f"xx={judged}/xx?", f"y={judged}/y?"], judge=f"{judged}/mine.py:silent")
    assert "the judge gave no verdict on 8 of 8 pairs" in result["warnings"]
    assert by(result["wins"], method="y", against="xx")["win_rate"] is None
    assert "Win rates" not in Page((judged / "out" / "comparison.html").read_text()).inside("h2")


def test_headers_of_a_judge_are_not_written_down(judged):
    kwargs = {"name": "letters", "kwargs": {"letters": "y", "headers": {"Authorization": "secret"}}, "headers": "secret"}
    config = options(judge_kwargs=kwargs)
    about = win_rates.about(
        win_rates.Stored("reward", 0.0), config, [comparing.Method("", [], {"reward": np.zeros((1, 2, 1))})]
    )
    assert "secret" not in json.dumps(about) and about["kwargs"] == {"name": "letters", "kwargs": {"letters": "y"}}


def test_a_reward_that_is_named_judges(judged):
    kwargs = {"name": "letters", "kwargs": {"letters": "y"}}
    result = compare(judged, [f"xx={judged}/xx?", f"y={judged}/y?"], judge_kwargs=kwargs)
    assert by(result["wins"], method="y", against="xx")["win_rate"] == 1.0 and result["judge"]["symmetric"] is True


# ---------------------------------------------------------------- names


def labels(entries):
    return [run.label for run in labelled([read(found) for found in expand(map(str, entries)).found])]


def test_labels_are_the_algorithm_and_what_else_tells_methods_apart(tmp_path):
    one = const(1.0)
    write_run(tmp_path / "a0", one, seed=0)
    write_run(tmp_path / "a1", one, seed=1, overrides={"eval.every": 3, "model.layers": "scan", "checkpoint.keep": 9})
    write_run(tmp_path / "b", one, overrides={"ple.tau_0": math.inf})
    write_run(tmp_path / "c", one, overrides={"ple.alpha": 1.0, "ple.rank": "sigmoid"})
    write_run(tmp_path / "d", one, algorithm="dpo")
    write_run(tmp_path / "e", one, algorithm="dpo", trainer="trl")
    write_run(tmp_path / "f", one, algorithm=str(tmp_path / "my_variant.py"))
    write_run(tmp_path / "g", one, policy="start", overrides={"ple.tau_0": 0.7, "optimizer.lr": 0.5})
    write_run(tmp_path / "h", one, policy="start", principled=True)
    write_run(tmp_path / "a0", one, principled=True)
    assert labels([*(tmp_path / name for name in ("a0", "a1", "b", "c", "d", "e", "f", "g", "h")),
                   tmp_path / "a0/responses/trained_principled"]) == [
        "ple", "ple", "ple ple.tau_0=inf", "ple ple.alpha=1.0 ple.rank=sigmoid", "dpo", "dpo (trl)", "my_variant", "start",
        "start + principles", "ple + principles"]  # fmt: skip


def test_the_plain_label_is_that_of_the_most_usual_config_or_of_the_first(tmp_path):
    for name, alpha in (("a", 1.0), ("b", 0.9)):
        write_run(tmp_path / name, const(1.0), overrides={"ple.alpha": alpha})
    write_run(tmp_path / "c", const(1.0), overrides={"ple.tau_0": 0.5})
    paths = [tmp_path / name for name in "abc"]
    assert labels(paths) == ["ple ple.alpha=1.0", "ple", "ple ple.tau_0=0.5"]
    assert labels(paths[:2]) == ["ple", "ple ple.alpha=0.9"]


def test_start_models_of_other_weights_are_told_apart_and_others_are_not(tmp_path):
    for name, overrides in (("a", {}), ("b", {"model.path": "smollm2-135m"}), ("c", {"lora.rank": 2})):
        write_run(tmp_path / name, const(1.0), policy="start", seed="abc".index(name),
                  overrides={"model.path": "tiny", **overrides})  # fmt: skip
    assert labels([tmp_path / name for name in "abc"]) == ["start", "start model.path=smollm2-135m", "start"]


@pytest.mark.parametrize("limit", [0, 100])
def test_digests_of_records_that_a_seed_chooses_make_no_other_method(tmp_path, limit):
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", const(1.0), seed=seed, overrides={"task.max_train": limit},
                  inputs={"train": f"digest{seed}"})  # fmt: skip
    assert labels([tmp_path / "a*"]) == (["ple", "ple"] if limit else ["ple", "ple inputs.train=digest1"])


def test_what_training_never_sees_makes_no_other_method(tmp_path):
    for seed, second in enumerate(({}, {"second": "a"}, {"second": "b"})):
        write_run(tmp_path / f"a{seed}", const(1.0), seed=seed, inputs={"train": "t", **second})
    assert labels([tmp_path / "a*"]) == ["ple"] * 3


def test_entries_are_labels_globs_folders_of_responses_and_paths_with_an_equals_sign(tmp_path, monkeypatch):
    for name in ("b", "a", "sweep/lr=0.1", "sweep/lr=0.2"):
        write_run(tmp_path / name, const(1.0))
    write_run(tmp_path / "a", const(1.0), policy="start")
    monkeypatch.chdir(tmp_path)
    found = expand(["tuned = sweep/lr=0.1", "sweep/lr=0.2", "X=[ab]", "a/responses/start"]).found
    assert [(one.label, str(one.folder)) for one in found] == [
        ("tuned", "sweep/lr=0.1/responses/trained"), ("", "sweep/lr=0.2/responses/trained"),
        ("X", "a/responses/trained"), ("X", "b/responses/trained"), ("", "a/responses/start")]  # fmt: skip


def test_a_work_directory_without_trained_responses_gives_its_only_other_ones(tmp_path):
    write_run(tmp_path / "s", const(1.0), policy="start")
    assert expand([str(tmp_path / "s")]).found == [Found("", tmp_path / "s" / "responses" / "start", None, "")]
    write_run(tmp_path / "s", const(1.0), policy="start", principled=True)
    with pytest.raises(UserError, match="responses holds start, start_principled; name one of them in --runs: .*/start$"):
        expand([str(tmp_path / "s")])


def test_methods_keep_the_order_of_the_entries_and_runs_that_of_their_seeds(tmp_path):
    for name, seed in (("z", 3), ("a", 1), ("m", 2), ("z2", 0)):
        write_run(tmp_path / name, const(float(seed)), second=const(0.0), seed=seed)
    entries = [f"last={tmp_path}/z", f"first={tmp_path}/a", f"middle={tmp_path}/m", f"last={tmp_path}/z2"]
    result = compare(tmp_path, entries)
    assert [method["label"] for method in result["methods"]] == ["last", "first", "middle"]
    assert [run["seed"] for run in result["methods"][0]["runs"]] == [0, 3]
    for file in ("table.csv", "seeds.csv"):
        found = [row["method"] for row in table(tmp_path / "out" / file)]
        assert list(dict.fromkeys(found)) == ["last", "first", "middle"]
    seen = Page((tmp_path / "out" / "comparison.html").read_text())
    assert [row[0] for row in seen.rows if row and row[0]][1:4] == ["last", "first", "middle"]
    assert seen.inside("key")[:3] == ["1", "2", "3"]
    assert [line.split("|")[1].strip() for line in (tmp_path / "out/table.md").read_text().splitlines() if "[" in line] == [
        "last", "first", "middle"] * 2  # fmt: skip


# ---------------------------------------------------------------- refusals and warnings


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data_digest": "d2"}, "data_digest is d1 and d2"),
        ({"samples": 9}, "samples is 1 and 9"),
        ({"max_new_tokens": 5}, "max_new_tokens is 4 and 5"),
        ({"sampling": {"temperature": 0.5}}, r'sampling is {"temperature": 1.0} and {"temperature": 0.5}'),
        ({"reward": "letters"}, "reward is vader and letters"),
        ({"reward_version": "2"}, "reward_version is 1 and 2"),
        ({"second_reward": "other"}, "second_reward is words and other"),
        ({"second_reward_version": "2"}, "second_reward_version is 1 and 2"),
    ],
)
def test_responses_under_other_conditions_are_refused(tmp_path, change, says):
    write_run(tmp_path / "a", const(1.0), second=const(1.0), settings={"second_reward_version": "1"})
    write_run(tmp_path / "b", const(1.0), second=const(1.0), algorithm="raft", settings=change)
    with pytest.raises(UserError) as error:
        compare(tmp_path, [tmp_path / "a", tmp_path / "b"])
    assert f"{says}; give --mode=generate the same for both" in str(error.value)
    assert all(str(tmp_path / name / "responses" / "trained") in str(error.value) for name in "ab")


def test_other_queries_are_refused(tmp_path):
    write_run(tmp_path / "a", const(1.0, 2))
    write_run(tmp_path / "b", const(1.0, 3), algorithm="raft")
    with pytest.raises(UserError, match="/a/.* and .*/b/.* cannot be compared: they answer other queries"):
        compare(tmp_path, [tmp_path / "a", tmp_path / "b"])


def refused(root, name):
    """Entries, changes of config.compare, and what is said of them."""
    a, b = root / "a", root / "b"
    return {
        "nothing": ([], {}, "--runs names no answers"),
        "no folder": ([root / "nowhere"], {}, "nowhere' is no folder, nor a pattern that fits one"),
        "empty": ([""], {}, "'' is no folder"),
        "only a label": (["label="], {}, "'label=' is no folder"),
        "no responses": ([root / "empty"], {}, "empty holds no responses; write them first: --workdir .* --mode=generate"),
        "twice": ([a, b, root / "?"], {}, "/a/responses/trained twice"),
        "same seed": ([f"x={a}", f"x={b}"], {}, "labelled 'x', and both have seed 0; tell them apart: --runs LABEL="),
        "start and trained": ([f"x={a}", f"x={root / 's'}"], {}, "labelled 'x', and only one of them was trained"),
        "baseline": ([a, b], {"baseline": "pel"}, "baseline is 'pel' but must be one of 'ple', 'raft'; did you mean 'ple'"),
        "samples": ([a, b], {"judge_samples": 2}, "judge_samples is 2, and every query has 1 responses"),
        "which": ([a, b], {"judge_kwargs": {"which": "third"}}, "judge_kwargs is {'which': 'third'}, and of judge 'reward'"),
        "tie": ([a, b], {"judge_kwargs": {"tie": -1.0}}, "tie .a difference of at least 0"),
        "key": ([a, b], {"judge_kwargs": {"wich": "second"}}, "judge_kwargs is {'wich'"),
        "no second": ([a, b], {"judge_kwargs": {"which": "second"}}, "no response has that reward"),
        "judge": ([a, b], {"judge": "nobody"}, "nobody"),
    }[name]


@pytest.mark.parametrize("name", [
    "nothing", "no folder", "empty", "only a label", "no responses", "twice", "same seed", "start and trained", "baseline",
    "samples", "which", "tie", "key", "no second", "judge",
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(tmp_path, name):
    write_run(tmp_path / "a", const(1.0))
    write_run(tmp_path / "b", const(1.0), algorithm="raft")
    write_run(tmp_path / "s", const(1.0), policy="start", seed=1)
    (tmp_path / "empty").mkdir()
    entries, changes, says = refused(tmp_path, name)
    with pytest.raises(UserError, match=says):
        compare(tmp_path, entries, **changes)
    assert not (tmp_path / "out" / "comparison.json").exists()


def test_the_folder_of_a_run_is_refused(tmp_path):
    write_run(tmp_path / "a", const(1.0))
    with pytest.raises(UserError, match="a holds a run; give a folder of its own"):
        compare(tmp_path, [tmp_path / "a"], name="a")


def clean(root, **changes):
    """Two methods of two seeds with nothing to be said against them, but for `changes` of the second seed of the second."""
    for name, algorithm in (("a", "ple"), ("b", "raft")):
        for seed in (0, 1):
            more = changes if (name, seed) == ("b", 1) else {}
            values = more.pop("rewards", const(1.0, samples=2))
            write_run(root / f"{name}{seed}", values,
                      **{"second": const(0.0, samples=2), "algorithm": algorithm, "seed": seed} | more)  # fmt: skip
    return compare(root, [f"ple={root}/a?", f"raft={root}/b?"])["warnings"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, []),
        ({"costs": {"generated_tokens": 802}}, []),  # the mean of raft's seeds counts: 901, within a tenth of 1000
        ({"costs": {"generated_tokens": 790}},
         ["unequal budgets: ple generated 1,000 tokens while it trained, and raft 895 (90%)"]),
        ({"costs": {"generated_tokens": 1400}},
         ["unequal budgets: raft generated 1,200 tokens while it trained, and ple 1,000 (83%)"]),
        ({"seed": 2}, ["ple lacks seed 2: it is tested on the seeds that both methods have, its mean is over its own",
                       "raft lacks seed 1: it is tested on the seeds that both methods have, its mean is over its own"]),
        ({"second": None}, ["no second reward of raft"]),
        ({"rewards": [[1.0, None], [2.0, 3.0]]},
         ["12.5% of the responses of raft have no training reward and are left out of it"]),
        ({"second": [[1.0, 2.0], [None, None]]},
         ["25.0% of the responses of raft have no second reward and are left out of it"]),
        ({"summary": False}, ["raft, seed 1: training is not finished; the responses are of iteration 5"]),
        ({"costs": {"iterations": 8}}, ["raft, seed 1: the responses are of iteration 5, the costs of all 8"]),
        ({"overrides": {"optimizer.lr": 0.5, "ple.alpha": 1.0}},
         ["the runs of raft differ in more than their seeds: optimizer.lr, ple.alpha"]),
        ({"inputs": {"train": "a", "model": "m", "warm_up": "x"}, "settings": {"kl": "start"}},
         ["the runs of raft differ in more than their seeds: inputs.warm_up",
          "the runs start from different policies (model.adapter, warm_up.data): each KL is to its own start"]),
        ({"inputs": {"train": "a", "model": "m", "adapter": "x"}},
         ["the runs of raft differ in more than their seeds: inputs.adapter",
          "the runs start from different policies (model.adapter, warm_up.data): each KL is to its own start",
          "raft, seed 1: KL is to the base, by an earlier version; delete these responses and give --mode=generate again"]),
        ({"settings": {"model": "other"}},
         ["the base models differ: so do those under which perplexity and KL are measured"]),
    ],
)  # fmt: skip
def test_what_weakens_a_comparison_is_said(tmp_path, capsys, change, says):
    assert clean(tmp_path, **change) == says
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("warning")] == [f"warning: {text}" for text in says]
    shown = Page((tmp_path / "out" / "comparison.html").read_text()).inside("li")
    assert shown[: len(says)] == says


def test_a_key_that_a_run_is_too_old_to_have_makes_no_other_method(tmp_path):
    """It was made as the key's default says; with another value it is another method."""
    for seed, cap in (("0", None), ("1", 0.0), ("2", 3.0)):
        run = tmp_path / f"a{seed}"
        write_run(run, const(1.0), seed=int(seed), overrides={} if cap is None else {"sampling.importance_cap": cap})
        kept = read_json(run / "config.json")
        if cap is None:
            del kept["sampling"]["importance_cap"]
        write_json(run / "config.json", kept)
    compare(tmp_path, [tmp_path / "a0", tmp_path / "a1", tmp_path / "a2"])
    assert [row["method"] for row in table(tmp_path / "out" / "table.csv")] == ["ple", "ple sampling.importance_cap=3.0"]
    result = compare(tmp_path, [f"x={tmp_path / name}" for name in ("a0", "a1")], name="named")
    assert not any("differ in more than their seeds" in text for text in result["warnings"])


def test_what_a_start_with_an_adapter_cost_is_unknown(tmp_path):
    write_run(tmp_path / "a", const(1.0), policy="start")
    write_run(tmp_path / "b", const(1.0), policy="start", settings={"adapter": "somewhere"})
    compare(tmp_path, [f"base={tmp_path / 'a'}", f"tuned={tmp_path / 'b'}"])
    assert [row["generated_tokens"] for row in table(tmp_path / "out" / "table.csv")] == ["0.0", ""]


def test_the_principles_of_a_start_are_those_that_stood_in_the_prompt(tmp_path):
    """Whatever the directory's config says by now."""
    for name, principles in (("a", "concise"), ("b", "honest")):
        write_run(tmp_path / name, const(1.0), policy="start", principled=True, settings={"principles": principles})
    compare(tmp_path, [tmp_path / "a", tmp_path / "b"])
    labels = [row["method"] for row in table(tmp_path / "out" / "table.csv")]
    assert labels == ["start + principles", "start + principles principles=honest"]


def test_starts_with_other_principles_of_one_name_are_no_seeds_of_one_method(tmp_path):
    """What settings of earlier versions do not say is as the directory's config has it."""
    given = {"principles": "mine.txt", "principles_per_query": 0, "principles_digest": "d"}
    how = {"policy": "start", "principled": True}
    for seed, changed in enumerate(({}, {"principles_per_query": 2}, {"principles_digest": "e"})):
        write_run(tmp_path / str(seed), const(1.0), **how, seed=seed, settings={**given, **changed})
    inputs = {"train": "a", "model": "m", "principles": "d"}
    changed = {"settings": {"principles": "mine.txt"}, "overrides": {"principles": "mine.txt"}, "inputs": inputs}
    write_run(tmp_path / "3", const(1.0), **how, seed=3, **changed)
    compare(tmp_path, [tmp_path / str(seed) for seed in range(4)])
    found = {row["method"]: row["seeds"] for row in table(tmp_path / "out" / "table.csv")}
    assert found == {
        "start + principles": "0 3", "start + principles principles_per_query=2": "1",
        "start + principles principles_digest=e": "2",
    }  # fmt: skip


def test_sampling_that_kl_does_not_hold_for_is_said(tmp_path):
    for temperature, said in ((1.0, False), (0.5, True)):
        drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        write_run(tmp_path / f"a{temperature}", const(1.0), settings={"sampling": drawn})
        found = compare(tmp_path, [tmp_path / f"a{temperature}"], name=f"out{temperature}")["notes"]
        assert any("sampled with temperature 0.5; KL" in note for note in found) == said


def test_a_line_that_is_still_being_written_is_no_line(tmp_path):
    write_run(tmp_path / "a", const(1.0))
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "heldo')
    compare(tmp_path, [tmp_path / "a"])


def test_a_second_reward_that_gave_nothing_was_asked_for_nevertheless(tmp_path):
    for name, algorithm in (("a", "ple"), ("b", "raft")):
        write_run(tmp_path / name, const(1.0), second=const(None), algorithm=algorithm)
    found = compare(tmp_path, [tmp_path / "a", tmp_path / "b"])["warnings"]
    assert "no second reward of ple, raft" in found and not any("generate.second_reward" in text for text in found)


def test_a_second_reward_that_the_first_run_lacks_is_named(tmp_path):
    write_run(tmp_path / "a", const(1.0))
    write_run(tmp_path / "b", const(1.0), second=const(0.5), algorithm="raft")
    result = compare(tmp_path, [tmp_path / "a", tmp_path / "b"])
    assert result["settings"]["second_reward"] == "words" and "no second reward of ple" in result["warnings"]
    assert [row.get("reward_second") for row in table(tmp_path / "out" / "table.csv")] == ["", "0.5"]


def test_one_seed_and_no_second_reward_are_said(tmp_path):
    write_run(tmp_path / "a", const(1.0))
    write_run(tmp_path / "b", const(1.0), algorithm="raft", costs={"generated_tokens": 0})
    result = compare(tmp_path, [tmp_path / "a", tmp_path / "b"])
    alone = "has one seed: its intervals and tests say nothing of how another would have gone"
    assert result["warnings"] == [
        f"ple {alone}", f"raft {alone}",
        "no second reward: over-optimisation of the training reward would not show (--config.generate.second_reward)",
    ]  # fmt: skip
    # one that samples nothing has no budget to be compared, and that is said too
    told = "raft: nothing is sampled while it trains; compare the tokens that it was trained on"
    assert result["notes"] == [told]
    mine = compare(tmp_path, [tmp_path / "a", tmp_path / "b"], name="mine", note="Rewards of 0.62.")["notes"]
    assert mine == ["Rewards of 0.62.", told] and mine[0] in (tmp_path / "mine" / "comparison.html").read_text()
    assert not any(key.startswith("reward_second") for key in table(tmp_path / "out" / "table.csv")[0])
    assert "Second reward" not in Page((tmp_path / "out" / "comparison.html").read_text()).inside("h2")


# ---------------------------------------------------------------- curves


def test_the_area_is_the_mean_reward_over_the_tokens_that_all_have_generated(tmp_path):
    # 0 at 0 tokens, 1 at 400: over the first 200 the line's mean is 0.25; the other rises to 0.8 in its first 100 tokens
    write_run(tmp_path / "a", const(1.0), lines=curve_lines([0.0, 0.5, 1.0], 400))
    write_run(tmp_path / "b", const(1.0), algorithm="raft", lines=curve_lines([0.0, 0.8, 0.8], 200))
    write_run(tmp_path / "c", const(1.0), algorithm="sft", lines=curve_lines([0.0, 0.8], 0))
    compare(tmp_path, [tmp_path / name for name in "abc"])
    areas = [row["heldout_area"] for row in table(tmp_path / "out" / "table.csv")]
    assert [float(area) for area in areas[:2]] == pytest.approx([0.25, (0.4 * 100 + 0.8 * 100) / 200]) and areas[2] == ""


def test_curves_lie_where_the_numbers_say(tmp_path):
    lines = curve_lines([0.0, 0.4, 1.0])
    lines.insert(1, {"iteration": 1, "total_generated_tokens": 77})  # a line without an evaluation
    write_run(tmp_path / "a0", const(1.0), lines=lines)
    write_run(tmp_path / "a1", const(1.0), seed=1, lines=curve_lines([0.0, 0.2, 0.6], 2000))
    write_run(tmp_path / "b", const(1.0), algorithm="sft", lines=curve_lines([0.0, 0.5, 0.4], 0))
    write_run(tmp_path / "s", const(1.0), policy="start")
    result = compare(tmp_path, [tmp_path / "a?", tmp_path / "b", tmp_path / "s"])
    found = {chart.note: chart for chart in comparison_charts.curves(result)}
    assert list(found) == [f"against {unit}" for unit in ("queries seen", "tokens generated", "tokens trained on",
                                                          "reward calls", "seconds, without evaluation")]  # fmt: skip
    chart = found["against tokens generated"]
    ple, sft = chart.lines
    x, y = ({label: place for place, label in ticks} for ticks in (chart.xticks, chart.yticks))
    # means of both seeds: 0, 0.3 after 750 tokens, 0.8 after 1500
    (x0, y0, _), (x1, y1, tip), (x2, y2, _) = ple.dots
    assert (x0, y0) == (x["0"], y["0"]) and x2 == x["1500"] and y2 == y["0.8"]
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 == pytest.approx(y0 + (y2 - y0) * 3 / 8, abs=0.1)
    assert tip == "ple: 0.3 after 750 tokens generated (iteration 2)"
    assert len(ple.thin) == 2 and ple.thin[1].endswith(f"{x['2000']} {y['0.6']}")
    # what generates nothing is a level at its end, not at its best
    assert sft.level and not sft.dots and sft.path.startswith(f"M{x['0']} {y['0.4']}L") and sft.path.endswith(f" {y['0.4']}")
    assert not found["against queries seen"].lines[1].level


def test_methods_that_all_generate_nothing_have_no_curve_against_it(tmp_path):
    write_run(tmp_path / "b", const(1.0), algorithm="sft", lines=curve_lines([0.0, 0.5, 0.4], 0))
    write_run(tmp_path / "c", const(1.0), algorithm="dpo", lines=[])
    notes = [chart.note for chart in comparison_charts.curves(compare(tmp_path, [tmp_path / "b", tmp_path / "c"]))]
    assert "against tokens generated" not in notes and "against queries seen" in notes


def test_points_and_strips_lie_where_the_numbers_say(tmp_path):
    for seed, (reward, kl) in enumerate(((1.0, 4.0), (3.0, 8.0))):
        write_run(tmp_path / f"a{seed}", const(reward), kl=const(kl), seed=seed)
    write_run(tmp_path / "s", const(0.0), kl=const(0.0), policy="start")
    result = compare(tmp_path, [tmp_path / "s", tmp_path / "a?"])
    result["methods"][1]["intervals"] = {"reward": [1.0, 3.0], "kl": [4.0, 8.0]}
    (chart,) = comparison_charts.scatter(result)
    start, ple = chart.points
    x, y = ({label: place for place, label in ticks} for ticks in (chart.xticks, chart.yticks))
    assert x["0"] < x["8"] and y["0"] > y["3"]  # to the right, and up
    assert (start.x, start.y) == (x["0"], y["0"]) and (ple.x, ple.y) == (x["6"], y["2"])
    assert ple.across == (x["4"], x["8"]) and ple.along == (y["1"], y["3"])
    assert [seed[:2] for seed in ple.seeds] == [(x["4"], y["1"]), (x["8"], y["3"])]
    assert ple.tip == "ple: training reward 2, KL 6 nats per response"
    (strip,) = comparison_charts.strips(result)
    at = {label: place for place, label in strip.ticks}
    assert strip.zero == at["0"] < at["3"]
    cell = strip.cells[1]
    assert (cell.mean, cell.low, cell.high) == (at["2"], at["1"], at["3"])
    assert cell.dots == [(at["1"], "seed 0: 1"), (at["3"], "seed 1: 3")]


@given(st.lists(st.floats(0, 300), min_size=1, max_size=30))
@example([0.0] * 22)  # whose gaps, 300 / 21, are all rounded the same way
def test_numbers_beside_curves_never_cover_one_another(places):
    found = drawing.spread(places, 0, 300, 15)
    order = sorted(range(len(places)), key=places.__getitem__)
    gap = min(15, 300 / max(len(places) - 1, 1))
    assert all(found[b] - found[a] >= gap - 0.2 for a, b in zip(order, order[1:], strict=False))
    assert all(-0.1 <= place <= 300.1 for place in found)
    if all(b - a >= 15.1 for a, b in zip(sorted(places), sorted(places)[1:], strict=False)):
        assert found == pytest.approx(places, abs=0.1)  # nothing is moved that need not be


def test_every_method_has_a_mark_of_its_own():
    found = comparison_charts.marks({"methods": [{"label": str(i)} for i in range(24)]})
    assert [mark.number for mark in found] == list(range(1, 25))
    assert len({(mark.colour, mark.dash) for mark in found}) == 24


# of linear RGB, full strength: Machado, Oliveira and Fernandes (2009), doi:10.1109/TVCG.2009.113
SIGHTS = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour):
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    xyz = XYZ @ rgb / XYZ.sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize(("scheme", "card"), [(0, "#ffffff"), (1, "#1c2024")])
def test_colours_are_told_apart_by_most_and_numbers_on_them_are_read(scheme, card):
    css = (Path(drawing.__file__).parent / "templates" / "style.css").read_text().split("prefers-color-scheme: dark")[scheme]
    colours = [re.search(rf"--k{i}: (#[0-9a-f]{{6}})", css)[1] for i in range(drawing.COLOURS)]
    assert f"--card: {card};".replace("ffffff", "fff") in css
    for matrix in SIGHTS.values():
        seen = [lab(np.clip(np.array(matrix) @ linear(colour), 0, 1)) for colour in colours]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 25
    for colour in colours:  # WCAG's contrast ratio
        lightest, darkest = sorted((float(XYZ[1] @ linear(c)) for c in (colour, card)), reverse=True)
        assert (lightest + 0.05) / (darkest + 0.05) > 3


# ---------------------------------------------------------------- what is written


def rich(root, text=HOSTILE, queries=10):
    """Three methods, one of three seeds, with hostile texts everywhere; their entries."""
    texts = [[f"{text} {q}.{s}" for s in range(2)] for q in range(queries)]
    rng = np.random.default_rng(0)
    prompts = [text, Conversation([{"role": "user", "content": text}]), *(f"prompt {q}" for q in range(2, queries))]
    for seed in range(3):
        values = rng.normal(seed / 9, 1, (3, queries, 2)).tolist()
        write_run(root / f"a{seed}", values[0], second=values[1], kl=np.abs(values[2]).tolist(), texts=texts, seed=seed,
                  prompts=prompts)  # fmt: skip
    for name, more in (("b", {"algorithm": "raft"}), ("s", {"policy": "start"})):
        values = rng.normal(0, 1, (2, queries, 2)).tolist()
        write_run(root / name, values[0], second=values[1], texts=texts, prompts=prompts, **more)
    return [f"<i>A_&|%={root}/a?", f"b={root}/b", root / "s"]


def test_every_text_is_escaped_and_the_page_is_well_formed(tmp_path):
    result = compare(tmp_path, rich(tmp_path))
    assert result["methods"][0]["label"] == "<i>A_&|%"
    seen = Page((tmp_path / "out" / "comparison.html").read_text(encoding="utf-8"))  # checks that every tag is closed
    assert "script" not in {tag for tag, _ in seen.tags}
    assert seen.inside("response")[:3] == [f"{HOSTILE} 0.0"] * 3
    assert seen.inside("prompt")[:2] == [HOSTILE, f"Human: {HOSTILE}"]
    assert "<i>A_&|%" in seen.inside("b") and "<i>A_&|%" in seen.inside("title")[1]


def test_nothing_is_loaded_from_anywhere(tmp_path):
    compare(tmp_path, rich(tmp_path, "plain"))
    html = (tmp_path / "out" / "comparison.html").read_text()
    seen = Page(html)
    assert not {tag for tag, _ in seen.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "use"}
    assert not [attrs for _, attrs in seen.tags if attrs.keys() & {"src", "href", "srcset", "action", "background"}]
    assert not [name for _, attrs in seen.tags for name in attrs if name.startswith("on")]
    assert not re.search(r"https?:|//[a-z]|url\(|@import", html)
    assert ("meta", {"http-equiv": "Content-Security-Policy",
                     "content": "default-src 'none'; style-src 'unsafe-inline'"}) in seen.tags  # fmt: skip
    assert "prefers-color-scheme: dark" in html


def test_the_page_shows_every_seed_every_matrix_and_samples_that_nobody_selected(tmp_path):
    result = compare(tmp_path, rich(tmp_path, "text"), examples=4)
    seen = Page((tmp_path / "out" / "comparison.html").read_text())
    strips, scatter = 2 * (3 + 1 + 1), 2 * (3 + 1 + 1)  # two rewards, five runs
    assert sum(tag == "circle" and attrs["class"] == "seed" for tag, attrs in seen.tags) == strips + scatter
    assert seen.inside("h2") == ["Training reward", "Second reward", "Every seed", "Reward against KL", "Win rates", "Texts",
                                 "Curves", "Costs of training", "Differences in training reward",
                                 "Differences in second reward", "Side by side", "Runs", "Settings"]  # fmt: skip
    assert seen.inside("response") == [f"text {q}.0" for q in range(4) for _ in range(3)]
    cells = [attrs["title"] for tag, attrs in seen.tags if tag == "td" and "title" in attrs]
    assert len(cells) == 3 * 6  # three matrices of three methods
    verdicts = [row for row in seen.rows if len(row) == 7 and row[1][-1:] == "%"]  # against the baseline alone
    assert [row[0] for row in verdicts] == ["b", "start"] and verdicts[0][5:] == ["10", "0"]
    row = by(result["wins"], method="b", against="start")
    (tip,) = (tip for tip in cells if tip.startswith("b against start: "))
    assert tip.startswith(f"b against start: win {row['win']:.1%}, tie {row['tie']:.1%}, loss {row['loss']:.1%}; win rate"
                          f" {row['win_rate']:.1%}, 95% interval {row['low']:.1%} to {row['high']:.1%}")  # fmt: skip
    assert tip.endswith("; 10 judged, 0 without a verdict")
    assert [row for row in seen.rows if row[:2] == ["settings.data", "test"]]


def test_examples_are_of_the_first_seed_and_the_first_sample(judged):
    result = compare(judged, [f"xx={judged}/xx1", f"xx={judged}/xx0", f"y={judged}/y?"], examples=2)
    assert [[r["text"] for r in row["responses"]] for row in result["examples"]] == [
        [f"{name}:0:{q}:0" for name in ("xx", "y")] for q in range(2)
    ]


def test_matrices_are_the_row_against_the_column(tmp_path):
    for name, value in (("x", 1.0), ("y", 4.0)):
        write_run(tmp_path / name, const(value, 4))
    result = compare(tmp_path, [f"{name}={tmp_path / name}" for name in "xy"])
    (_, (none, loses)), (_, (wins, _)) = comparison_charts.wins(result).rows
    assert none is None and (loses.text, loses.ahead, wins.text, wins.ahead) == ("0", False, "100", True)
    assert loses.strong and wins.strong and loses.share == wins.share == 70
    (matrix,) = comparison_charts.differences(result)
    assert [[cell and cell.text for cell in cells] for _, cells in matrix.rows] == [[None, "-3.00"], ["+3.00", None]]
    assert matrix.rows[1][1][0].tip.startswith("y - x: +3, 95% interval +3 to +3") and matrix.rows[1][1][0].strong
    assert matrix.rows[0][1][1].tip.startswith("x - y: -3, 95% interval -3 to -3")


@pytest.mark.parametrize(
    ("low", "high", "strong"), [(0.4, 0.55, False), (0.51, 0.7, True), (0.2, 0.49, True), (0.5, 0.5, False)]
)
def test_a_win_rate_is_bold_where_its_interval_leaves_out_a_half(low, high, strong):
    counts = {"win": 0.5, "tie": 0.0, "loss": 0.5, "position_bias": 0.0, "consistency": 1.0, "judged": 4, "failed": 0}
    row = {"method": "a", "against": "b", "win_rate": (low + high) / 2, "low": low, "high": high, **counts}
    assert comparison_charts.win_cell(row).strong is strong


def test_the_markdown_table_has_the_rewards_with_their_intervals(two, capsys):
    compare(two, [two / "a?", two / "b?"])
    text = (two / "out" / "table.md").read_text()
    assert text in capsys.readouterr().out
    lines = text.split("**Second")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line[:1] == "|"]
    assert rows[0] == ["method", "seeds", "training reward", "difference", "p", "win rate"]
    assert rows[2][:2] == ["ple", "2"] and rows[2][2].startswith("1.62 [") and rows[2][3:] == ["baseline", "–", "–"]
    assert rows[3][2].startswith("5.25 [") and rows[3][3].startswith("+2.67 [") and rows[3][5].startswith("1.000 [")
    assert rows[3][4] == f"{2 * stats.t.sf(8 / 3 / math.sqrt(5), 25 / 17):.3f}"
    widths = {len(line) for line in lines if line[:1] == "|"}
    assert len(widths) == 1  # aligned as it is printed


def test_markdown_and_latex_escape_and_have_whole_rows(tmp_path):
    compare(tmp_path, rich(tmp_path, "text"))
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert r"| &lt;i>A_&\|% |" in next(line for line in lines if "baseline" in line)
    for block in (tmp_path / "out" / "table.md").read_text().split("**")[2::2]:
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines() if line[:1] == "|"}
        assert len(counts) == 1
    tex = (tmp_path / "out" / "table.tex").read_text()
    assert r"$<$i$>$A\_\&$|$\%" in tex and tex.count(r"\toprule") == tex.count(r"\bottomrule") == tex.count(r"\midrule") == 4
    for spec, body in re.findall(r"\\begin{tabular}{(l r*|lr+)}\n\\toprule\n(.*?)\\bottomrule", tex, re.DOTALL):
        rows = [line for line in body.splitlines() if line != r"\midrule"]
        assert len(rows) == 1 + 3
        for row in rows:
            assert row.endswith(r" \\") and len(re.findall(r"(?<!\\)&", row)) == len(spec) - 1
    assert tex.count(r"\begin{tabular}{lr") == 4


@pytest.mark.parametrize(
    ("values", "digits"),
    [([0.5, 0.01], 3), ([9.99], 2), ([12.0, 1.0], 1), ([-250.0], 0), ([1e6], 0), ([0.0], 3), ([0.0012], 4), ([], 3),
     ([None, "inf", 2.0], 2)],
)  # fmt: skip
def test_numbers_of_one_column_have_as_many_decimals(values, digits):
    assert formats.decimals(values) == digits


@pytest.mark.parametrize(("p", "text"), [(None, "–"), (0.0009, "<0.001"), (0.001, "0.001"), (0.25, "0.250"), (1.0, "1.000")])
def test_p_values_for_people(p, text):
    assert formats.p_value(p) == text


def test_exact_numbers_are_in_the_csv(tmp_path):
    write_run(tmp_path / "a", [[0.1], [0.2], [0.1]])
    compare(tmp_path, [tmp_path / "a"])
    assert table(tmp_path / "out" / "table.csv")[0]["reward"] == repr((0.1 + 0.2 + 0.1) / 3)


def test_a_comparison_done_again_is_the_same(tmp_path):
    entries = rich(tmp_path, "text")
    compare(tmp_path, entries)
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    compare(tmp_path, entries)
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(first) == {"table.md", "table.csv", "table.tex", "seeds.csv", "tests.csv", "wins.csv", "comparison.json",
                          "comparison.html"}  # fmt: skip


# ---------------------------------------------------------------- files of another shape


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("summary.json", {"seconds": {}}, "it has no iterations"),
        ("summary.json", {"iterations": "5"}, "iterations is '5' but must be a whole number"),
        ("summary.json", {"iterations": 5, "seconds": 1}, "seconds is 1 but must be an object of numbers"),
        ("summary.json", {"iterations": 5, "seconds": {"train": "x"}}, "seconds is {'train': 'x'} but must be an object"),
        ("summary.json", {"iterations": 5, "queries": None}, "queries is None but must be a number"),
        ("summary.json", {"iterations": 5, "generated_tokens": [1]}, r"generated_tokens is \[1\] but must be a number"),
        ("metrics.jsonl", 1, "it is no object: 1"),
        ("metrics.jsonl", {"iteration": 1, "heldout_reward": "x"}, "heldout_reward is 'x' but must be a number"),
        ("metrics.jsonl", {"total_flops": None}, "total_flops is None but must be a number"),
        ("responses/trained/iter_0005.json", {}, "it has no algorithm"),
        ("responses/trained/iter_0005.json", {"seed": "0"}, "seed is '0' but must be a whole number"),
        ("responses/trained/iter_0005.json", {"policy": "x"}, "policy is 'x' but must be one of trained, start"),
    ],
)
def test_files_of_another_shape_are_named(tmp_path, file, content, says):
    write_run(tmp_path / "a", const(1.0))
    path = tmp_path / "a" / file
    if content and "responses" in file:
        kept = json.loads(path.read_text())
        content = {key: value for key, value in kept.items() if key != "digest"} | content
    path.write_text(json.dumps(content) + "\n")
    with pytest.raises(UserError, match=f"{path} is damaged \\({says}"):
        read(Found("", tmp_path / "a" / "responses" / "trained", None, ""))


@pytest.mark.parametrize("file", ["metrics.jsonl", *(f"responses/trained/iter_0005{end}.jsonl" for end in ("", ".scores"))])
def test_a_folder_in_the_place_of_a_file(tmp_path, file):
    write_run(tmp_path / "a", const(1.0))
    path = tmp_path / "a" / file
    path.unlink(missing_ok=True)
    path.mkdir()
    with pytest.raises(UserError, match=str(path)):
        read(Found("", tmp_path / "a" / "responses" / "trained", None, ""))


def test_an_empty_summary_is_of_an_unfinished_run(tmp_path):
    write_run(tmp_path / "a", const(1.0))
    (tmp_path / "a" / "summary.json").write_text("{}")
    assert read(Found("", tmp_path / "a" / "responses" / "trained", None, "")).summary == {}
