"""Several budgets: which answers stand in which view, curves and areas worked out by hand, the page of all of them."""

import csv
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_compare import compare, const, write_run
from test_run_page import Page

from ple_jax.core.errors import Damaged, UserError
from ple_jax.core.files import read_json, write_json
from ple_jax.evaluation import frontier
from ple_jax.evaluation.entries import Found, expand, views
from ple_jax.reports import frontier as drawn

# ---------------------------------------------------------------- curves


KL, REWARD = np.array([0.0, 2.0, 1.0, 6.0]), np.array([0.1, 0.5, 9.0, 0.9])


def test_a_curve_is_read_where_it_first_gets_to_a_budget():
    assert frontier.at(KL, REWARD, 1.0) == pytest.approx(0.3)  # and not the 9 of a later evaluation that went back
    assert frontier.at(KL, REWARD, 4.0) == pytest.approx(0.7)  # from the furthest before: 2 nats to 6
    assert frontier.at(KL, REWARD, 6.0) == 0.9 and math.isnan(frontier.at(KL, REWARD, 6.1))
    assert frontier.at(KL, np.where(KL == 2, np.nan, REWARD), 4.0) == pytest.approx(9.0 - 8.1 * 3 / 5)
    assert math.isnan(frontier.at(np.array([]), np.array([]), 1.0))


def test_an_area_is_the_mean_reward_on_the_way():
    assert frontier.area(KL, REWARD, 2.0) == pytest.approx(0.3)
    assert frontier.area(KL, REWARD, 4.0) == pytest.approx((0.3 * 2 + 0.6 * 2) / 4)
    assert math.isnan(frontier.area(KL, REWARD, 7.0)) and math.isnan(frontier.area(KL[:1], REWARD[:1], 0.5))


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(-1, 1)), min_size=1, max_size=12), st.floats(0.01, 50))
def test_what_is_read_lies_between_what_was_measured(points, limit):
    kl, reward = np.array([(0.0, 0.0), *points]).T
    for found in (frontier.at(kl, reward, limit), frontier.area(kl, reward, limit)):
        assert math.isnan(found) == (kl.max() < limit)
        assert math.isnan(found) or reward.min() - 1e-9 <= found <= reward.max() + 1e-9


# ---------------------------------------------------------------- views


def point(iteration, kl, reward, *, step=None, within=False, **more):
    return {
        "iteration": iteration, "step": 6 * iteration if step is None else step, "within": within, "reward": reward,
        "kl": kl, "kl_low": kl, "kl_high": kl, "second": reward / 2, "generated_tokens": 100 * iteration,
        "training_tokens": 7, "seconds": 1.5, **more,
    }  # fmt: skip


def budgeted(workdir, answers, *, points, best, seed=0, algorithm="ple", lr=1e-3):
    """A finished run of 5 iterations; `answers` are {file of responses: reward of all of them}."""
    for file, reward in answers.items():
        folder, iteration = file.split("/")
        write_run(workdir, const(reward, samples=2), seed=seed, algorithm=algorithm, overrides={"optimizer.lr": lr},
                  settings={"iteration": int(iteration)}, kl=const(1.0, samples=2))  # fmt: skip
        made, wanted = workdir / "responses" / "trained", workdir / "responses" / folder
        wanted.mkdir(exist_ok=True)
        for name in (".json", ".jsonl", ".scores.jsonl"):
            (made / f"iter_0005{name}").rename(wanted / f"iter_{int(iteration):04d}{name}")
    summary = read_json(workdir / "summary.json")
    write_json(workdir / "summary.json", {**summary, "points": points, "best": best})
    return workdir


POINTS = [point(0, 0.0, 0.1), point(1, 3.0, 0.3), point(1, 5.0, 0.4, step=9, within=True), point(5, 9.0, 0.9)]
BEST = {"kl_4": POINTS[1], "kl_8": POINTS[2]}
ANSWERS = {"trained/1": 0.25, "trained_step_9/1": 0.45, "trained/5": 0.85}


def named(*entries):
    return {(one.view, f"{one.folder.name}/{one.iteration}") for one in expand(map(str, entries)).found}


EVERYTHING = {("kl_4", "trained/1"), ("kl_8", "trained_step_9/1"), ("newest", "trained/5")}


def test_a_work_directory_stands_for_the_checkpoints_that_have_answered(tmp_path):
    run = budgeted(tmp_path / "a", ANSWERS, points=POINTS, best=BEST)
    assert named(run) == EVERYTHING
    assert named(f"{run}@kl_8") == {("kl_8", "trained_step_9/1")} and named(f"x={run}@newest") == {("newest", "trained/5")}
    assert named(f"{run}@best") == {("best", "trained_step_9/1")}
    (run / "responses" / "trained_step_9" / "iter_0001.scores.jsonl").unlink()
    assert named(run) == EVERYTHING - {("kl_8", "trained_step_9/1")}
    says = r"no answers of its checkpoint 'kl_8' \(it has answers of kl_4, newest\); .* --config.checkpoint.use=kl_8"
    with pytest.raises(UserError, match=says):
        expand([f"{run}@kl_8"])
    with pytest.raises(UserError, match="is a folder of responses, and @kl_4 goes with a work directory"):
        expand([f"{run}/responses/trained@kl_4"])
    # without a budget it is the newest answers, as of a run of an earlier version
    write_json(run / "summary.json", {"iterations": 5, "best": {"any": POINTS[1]}, "points": POINTS})
    assert named(run) == {("", "trained/None")}


def test_what_not_all_have_answered_with_is_left_out_and_said(tmp_path):
    """And a checkpoint that was never meant, whose answers are the very file of another one, makes no table."""
    run = budgeted(tmp_path / "a", ANSWERS, points=POINTS, best=BEST)
    last = POINTS[:2] + [point(5, 7.0, 0.9)]
    other = budgeted(tmp_path / "b", {"trained/5": 0.9}, points=last, best={"kl_4": last[1], "kl_8": last[2]}, seed=1)
    found = expand([str(run), str(other)])
    assert {(one.view, one.folder.parent.parent.name) for one in found.found} == {
        (view, name) for view in ("kl_8", "newest") for name in "ab"
    }
    assert found.left_out == [f"kl_4 is left out: {other} has not answered"]
    # nothing in common
    scores = other / "responses" / "trained" / "iter_0005.scores.jsonl"
    scores.rename(scores.with_name("iter_0002.scores.jsonl"))
    with pytest.raises(UserError, match=r"no checkpoint with which all runs have answered; \S+/b has not with 'kl_4' \(its"):
        expand([str(run), str(other)])


def test_a_trained_policy_of_which_the_checkpoint_is_not_said_stands_in_no_budget(tmp_path):
    """What a run without budgets has got to is not what it has at 4 nats."""
    run = budgeted(tmp_path / "a", ANSWERS, points=POINTS, best=BEST)
    write_run(tmp_path / "free", const(1.0, samples=2), seed=1)
    found = expand([str(run), str(tmp_path / "free")])
    assert [one.view for one in found.found] == ["newest", "newest"]
    assert found.left_out == [f"{view} is left out: {tmp_path}/free has not answered" for view in ("kl_4", "kl_8")]
    with pytest.raises(UserError, match=r"free/responses/trained does not say of which checkpoint it is"):
        expand([f"{run}@kl_4", str(tmp_path / "free" / "responses" / "trained")])
    write_run(tmp_path / "s", const(0.0, samples=2), policy="start")
    assert ("", "start/None") in named(f"{run}@kl_4", tmp_path / "s")


def test_checkpoints_within_iterations_alone_are_found(tmp_path):
    best = {"kl_4": point(0, 3.0, 0.3, step=3, within=True), "kl_8": POINTS[2]}
    answers = {"trained_step_3/0": 0.2, "trained_step_9/1": 0.4}
    run = budgeted(tmp_path / "a", answers, points=POINTS, best=best)
    assert not (run / "responses" / "trained").exists() or not any((run / "responses" / "trained").iterdir())
    assert named(run) == {("kl_4", "trained_step_3/0"), ("kl_8", "trained_step_9/1")}


def test_answers_under_the_principles_stand_beside_any_budget(tmp_path):
    run = budgeted(tmp_path / "a", ANSWERS, points=POINTS, best=BEST)
    write_run(tmp_path / "b", const(0.3, samples=2), principled=True)
    assert ("", "trained_principled/None") in named(f"{run}@kl_4", tmp_path / "b")


def test_that_nothing_but_the_start_is_within_a_budget_is_said(tmp_path, capsys):
    budgeted(tmp_path / "a", {"trained/0": 0.1}, points=POINTS, best={"kl_1": POINTS[0]})
    result = compare(tmp_path, [f"{tmp_path}/a@kl_1"])
    says = "ple, seed 0: no evaluation after the first one was chosen: these are the start model's answers"
    assert says in result["warnings"]
    assert not any("nothing is sampled while it trains" in note for note in result["notes"])


def test_a_path_may_hold_an_at_sign(tmp_path):
    run = budgeted(tmp_path / "a@kl_4" / "b", ANSWERS, points=POINTS, best=BEST)
    assert named(run) == EVERYTHING == named(f"x={run}")
    assert named(f"{run}@newest") == {("newest", "trained/5")} == named(f"x={run}@newest")


def test_points_are_no_answers_and_need_a_label(tmp_path):
    run = budgeted(tmp_path / "a", ANSWERS, points=POINTS, best=BEST)
    with pytest.raises(UserError, match="a@points needs the label of its method: LABEL="):
        expand([f"{run}@points"])
    with pytest.raises(UserError, match="--runs names no answers"):
        expand([f"x={run}@points"])


def test_views_are_budgets_ascending_and_the_newest_last():
    found = [Found(name, None, None, name) for name in ("newest", "kl_12", "", "points", "best", "kl_4")]
    assert views(found) == ["kl_4", "kl_12", "best", "newest"]
    assert views(found[2:3]) == [""]


def test_a_summary_of_another_shape_is_named(tmp_path):
    run = budgeted(tmp_path / "a", ANSWERS, points=POINTS, best=BEST)
    write_json(run / "summary.json", {"iterations": 5, "best": {"kl_4": {"iteration": "1", "step": 6, "within": False}}})
    with pytest.raises(Damaged, match="summary.json is damaged"):
        expand([str(run)])


# ---------------------------------------------------------------- a comparison at several budgets


@pytest.fixture
def made(tmp_path, capsys):
    """PLE at two seeds, of which the second never gets to 8 nats; RAFT at a rate of its own, and its curve at another."""
    budgeted(tmp_path / "ple0", ANSWERS, points=POINTS, best=BEST)
    short = POINTS[:2] + [point(5, 6.0, 0.5)]
    budgeted(tmp_path / "ple1", {"trained/1": 0.35, "trained/5": 0.55}, points=short, seed=1,
             best={"kl_4": short[1], "kl_8": short[2]})  # fmt: skip
    budgeted(tmp_path / "raft0", ANSWERS, points=POINTS, best=BEST, algorithm="raft", lr=3e-3)
    budgeted(tmp_path / "tried", {"trained/5": 0.0}, points=POINTS, best=BEST, algorithm="raft", lr=1e-2)
    write_run(tmp_path / "s", const(0.05, samples=2), policy="start")
    entries = [tmp_path / "ple0", tmp_path / "ple1", tmp_path / "raft0", tmp_path / "s", f"raft={tmp_path}/tried@points"]
    result = compare(tmp_path, entries)
    return tmp_path / "out", result, capsys.readouterr().out


def test_every_budget_has_its_own_answers(made):
    out, result, said = made
    assert [view["view"] for view in result["views"]] == ["kl_4", "kl_8", "newest"]
    rewards = {
        view["view"]: {method["label"]: method["measures"]["reward"] for method in view["methods"]}
        for view in result["views"]
    }
    assert rewards["kl_4"] == pytest.approx({"ple": 0.3, "raft": 0.25, "start": 0.05})
    assert rewards["kl_8"] == pytest.approx({"ple": 0.5, "raft": 0.45, "start": 0.05})
    assert rewards["newest"] == pytest.approx({"ple": 0.7, "raft": 0.85, "start": 0.05})
    # each with files of its own, whose costs are those until that evaluation
    costs = {
        view: read_json(out / view / "comparison.json")["methods"][0]["runs"][0]["measures"]["generated_tokens"]
        for view in rewards
    }
    assert costs == {"kl_4": 100, "kl_8": 100, "newest": 1000}
    assert "nan" not in said and "nan" not in (out / "table.tex").read_text()
    assert "Within 8 nats a response: ple: 1 of 2 runs never get to 8 nats a response, and stand with less" in said
    assert "unequal budgets" not in said.partition("At equal tokens: ")[0]


def test_an_earlier_checkpoint_has_the_costs_of_its_iteration_and_is_said(tmp_path, capsys):
    """What its line of metrics.jsonl says; of one within an iteration the evaluation says less."""
    lines = [{"iteration": i, "heldout_reward": 0.1, "total_seconds": 10.0 * i, "total_generated_tokens": 100 * i,
              "total_reward_calls": 20 * i, "total_flops": 7 * i} for i in range(6)]  # fmt: skip
    for name, algorithm, best in (("ple", "ple", POINTS[1]), ("raft", "raft", POINTS[3])):
        run = budgeted(tmp_path / name, ANSWERS, points=POINTS, best={"any": best}, algorithm=algorithm)
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = [f"{tmp_path}/ple/responses/trained", f"{tmp_path}/raft/responses/trained"]
    (tmp_path / "ple" / "responses" / "trained" / "iter_0005.scores.jsonl").unlink()
    result = compare(tmp_path, answers)
    (ple, raft) = (method["runs"][0]["measures"] for method in result["methods"])
    assert (ple["generated_tokens"], ple["reward_calls"], ple["flops"], ple["train_seconds"]) == (100, 20, 7, 10.0)
    assert raft["generated_tokens"] == 1000
    said = capsys.readouterr().out
    assert "raft generated 1,000 tokens while it trained up to the checkpoint that answered, and ple 100 (10%)" in said
    assert "not the last checkpoint answered but the best within the budget, of iteration ple 1 of 5\n" in said


def test_an_unfinished_seed_stands_beside_one_whose_earlier_checkpoint_answered(tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 1)):
        budgeted(tmp_path / name, ANSWERS, points=POINTS, best={"any": POINTS[1]}, seed=seed)
    (tmp_path / "b" / "summary.json").unlink()
    (tmp_path / "a" / "responses" / "trained" / "iter_0005.scores.jsonl").unlink()
    compare(tmp_path, [f"{tmp_path}/{name}/responses/trained" for name in "ab"])
    said = capsys.readouterr().out
    assert "not the last checkpoint answered but the best within the budget, of iteration ple 1 of 5\n" in said
    assert "ple, seed 1: training is not finished" in said


def test_the_curves_are_those_of_all_runs(made):
    out, result, _ = made
    runs = result["frontier"]["runs"]
    assert [(run["label"], run["lr"], run["seed"], run["views"]) for run in runs] == [
        ("ple", 1e-3, 0, ["kl_4", "kl_8", "newest"]), ("ple", 1e-3, 1, ["kl_4", "kl_8", "newest"]),
        ("raft", 3e-3, 0, ["kl_4", "kl_8", "newest"]), ("raft", 1e-2, 0, []),
    ]  # fmt: skip
    at = {(row["view"], row["method"]): row for row in result["frontier"]["budgets"]}
    assert at["kl_4", "ple"]["reward"] == pytest.approx((0.35 + (0.3 + 0.2 / 3)) / 2)  # 3 to 5 nats, and 3 to 6
    assert (at["kl_8", "ple"]["reached"], at["kl_8", "ple"]["runs"]) == (1, 2)
    assert at["kl_8", "ple"]["reward"] == pytest.approx(0.4 + 0.5 * 3 / 4) == at["kl_8", "raft"]["reward"]
    assert at["kl_8", "ple"]["reward_low"] is None  # of one seed nothing is known
    for row in at.values():
        assert row["reward"] is None or row["second"] == pytest.approx(row["reward"] / 2)  # as of each point
    assert at["kl_8", "raft"]["area"] == pytest.approx((0.2 * 3 + 0.35 * 2 + (0.4 + 0.775) / 2 * 3) / 8)
    with (out / "frontier.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3 + 3 and rows[2]["kl"] == "5.0" and rows[2]["step"] == "9" and rows[-1]["lr"] == "0.01"


def test_the_main_table_says_rates_and_who_gets_there(made):
    out, result, said = made
    curves, four, eight, last = drawn.tables(json.loads((out / "comparison.json").read_text()))
    assert [table.title for table in (four, eight, last)] == [
        "Within 4 nats a response", "Within 8 nats a response", "At equal tokens"]  # fmt: skip
    cells = dict(zip(eight.head, eight.rows[0], strict=True))
    assert (cells["method"], cells["rate"], cells["seeds that get there"], cells["difference"]) == (
        "ple", "0.001", "1 of 2", "baseline")  # fmt: skip
    assert dict(zip(eight.head, eight.rows[2], strict=True))["seeds that get there"] == "–"
    assert "seeds that get there" not in last.head and [row[0] for row in curves.rows] == ["ple", "raft"]
    assert [row[4].rpartition(", ")[2] for row in curves.rows] == ["1 of 2", "0.775"]  # the reward at 8 nats
    assert last.head[-3:] == ["generated", "principles", "trained on"] and eight.head[-1] == "overlap"
    assert (out / "table.md").read_text() in said


def test_what_answers_as_the_start_is_counted_beside_who_gets_there(tmp_path, capsys):
    """The only evaluation that is not beyond the budget may be the first one, whose rate and reward mean nothing."""
    for name, algorithm, best in (("ple", "ple", POINTS[0]), ("raft", "raft", POINTS[1])):
        answers = {f"trained/{best['iteration']}": 0.2}
        budgeted(tmp_path / name, answers, points=POINTS, best={"kl_4": best}, algorithm=algorithm)
    compare(tmp_path, [f"{tmp_path}/{name}@kl_4" for name in ("ple", "raft")])
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [(row["method"], row["reached"], row["start"]) for row in result["frontier"]["budgets"]] == [
        ("ple", 1, 1), ("raft", 1, 0)]  # fmt: skip
    (_, table) = drawn.tables({"views": [result], "frontier": result["frontier"]})
    assert [row[2] for row in table.rows] == ["1 of 1, 1 as the start", "1 of 1"]


def test_the_page_links_every_budget_and_draws_curves_as_far_as_they_matter(made):
    out, result, _ = made
    page = Page((out / "comparison.html").read_text())
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links == ["kl_4/comparison.html", "kl_8/comparison.html", "newest/comparison.html"]
    assert all((out / link).exists() for link in links)
    kept = json.loads((out / "comparison.json").read_text())
    training, second = drawn.charts(kept)
    x = {label: place for place, label in training.xticks}
    ple, raft = training.lines
    # the mean of both seeds, of the evaluations that both have
    assert ple.dots[0][0] == x["0"] < ple.dots[1][0] < x["4"] and ple.dots[1][1] > ple.dots[2][1]  # up is less
    assert ple.dots[1][2] == "ple: 0.300 at 3 nats" and ple.dots[2][2] == "ple: 0.700 at 7.5 nats"
    assert [label for _, label in training.rules] == ["4 nats", "8 nats"] and training.rules[0][0] == x["4"]
    everything = list(drawn.every_run(kept))
    assert [chart.title for chart in everything] == ["1 ple", "2 raft"]
    assert [line.quiet for line in everything[1].lines] == [True, False, False]  # ple's mean, and both rates of raft
    assert everything[1].lines[2].dots[0][2].startswith("raft, rate 0.01, seed 0")


def test_a_curve_ends_where_the_chart_does():
    assert drawn.cut([(0.0, 0.0), (2.0, 1.0), (6.0, 3.0), (1.0, 9.0)], 4.0) == [(0.0, 0.0), (2.0, 1.0), (4.0, 2.0)]


def test_a_baseline_that_lacks_a_budget_is_said(tmp_path, capsys):
    budgeted(tmp_path / "ple0", ANSWERS, points=POINTS, best=BEST)
    budgeted(tmp_path / "raft0", ANSWERS, points=POINTS, best=BEST, algorithm="raft")
    entries = [f"{tmp_path}/raft0@kl_4", f"{tmp_path}/ple0@kl_4", f"{tmp_path}/ple0@kl_8"]
    result = compare(tmp_path, entries, baseline="raft")
    assert [view["baseline"] for view in result["views"]] == ["raft", "ple"]
    says = "Within 8 nats a response: raft, the baseline, has no answers here: the differences are to ple"
    assert says in capsys.readouterr().out


def test_a_run_has_one_label_in_all_views(tmp_path):
    """Whichever other runs stand in them."""
    budgeted(tmp_path / "a", ANSWERS, points=POINTS, best=BEST)
    budgeted(tmp_path / "b", ANSWERS, points=POINTS, best=BEST, seed=1, lr=3e-3)
    result = compare(tmp_path, [f"{tmp_path}/a@kl_4", f"{tmp_path}/a@newest", f"{tmp_path}/b@newest"])
    labels = [[method["label"] for method in view["methods"]] for view in result["views"]]
    assert labels == [["ple"], ["ple", "ple optimizer.lr=0.003"]]


def test_a_mean_curve_is_of_evaluations_made_at_the_same_place():
    def run(*places, kl):
        columns = dict(zip(("iteration", "step", "within"), map(list, zip(*places, strict=True)), strict=True))
        return {"label": "a", "lr": None, "seed": 0, "folder": "", "views": [""], "second": [None] * len(kl), "kl": kl,
                "reward": [x / 10 for x in kl], **columns}  # fmt: skip

    whole = run((0, 0, False), (0, 3, True), (1, 6, False), (2, 12, False), kl=[0.0, 1.0, 2.0, 4.0])
    unfinished = run((0, None, None), (1, None, None), kl=[0.0, 4.0])  # of metrics.jsonl, without steps
    result = {"views": [{"view": "", "methods": []}], "frontier": {"runs": [whole, unfinished], "budgets": []}}
    (chart,) = drawn.charts(result)
    assert [dot[2] for dot in chart.lines[0].dots] == ["a: 0.000 at 0 nats", "a: 0.300 at 3 nats"]


def test_the_curve_of_an_unfinished_run_is_in_nats_a_response(tmp_path):
    lines = [
        {"iteration": i, "heldout_reward": 0.1 + i, "heldout_kl_response": 4.0 * i, "heldout_kl": 0.5 * i,
         "heldout_kl_response_low": 3.0 * i, "heldout_kl_response_high": 5.0 * i, "heldout_second": 7.0,
         "total_generated_tokens": 10 * i, "total_seconds": 1.0}
        for i in range(2)
    ]  # fmt: skip
    write_run(tmp_path / "a", const(1.0), lines=lines, summary=False)
    write_run(tmp_path / "s", const(0.05), policy="start")
    (run,) = compare(tmp_path, [f"x={tmp_path}/a", tmp_path / "s"])["frontier"]["runs"]
    assert [run[name] for name in ("kl", "kl_low", "kl_high", "reward", "second")] == [
        [0, 4], [0, 3], [0, 5], [0.1, 1.1], [7, 7],
    ]  # fmt: skip


def test_one_budget_alone_is_one_page_with_its_curve(tmp_path):
    budgeted(tmp_path / "ple0", ANSWERS, points=POINTS, best=BEST)
    result = compare(tmp_path, [f"{tmp_path}/ple0@kl_8"])
    assert result["view"] == "kl_8" and result["methods"][0]["measures"]["reward"] == 0.45
    assert not (tmp_path / "out" / "kl_8").exists() and "The way there" in (tmp_path / "out" / "comparison.html").read_text()


def test_a_comparison_takes_the_place_of_the_one_before_and_of_nothing_else(tmp_path, capsys):
    for name in "ab":
        budgeted(tmp_path / name, ANSWERS, points=POINTS, best=BEST)
    out = tmp_path / "out"
    (out / "kl_beta").mkdir(parents=True)
    own = [out / "kl_beta" / "table.csv", out / "kl_x.png"]
    for file in own:
        file.write_text("mine")
    compare(tmp_path, [f"x={tmp_path}/a", f"y={tmp_path}/b"])
    assert (out / "kl_4" / "table.csv").exists() and (out / "frontier.csv").exists()
    views = {file.relative_to(out).as_posix() for file in out.rglob("table.csv")}
    compare(tmp_path, [f"x={tmp_path}/a@kl_8", f"y={tmp_path}/b@kl_8"])
    now = {file.relative_to(out).as_posix() for file in out.rglob("table.csv")}
    assert now == {"table.csv", "kl_beta/table.csv"} != views
    compare(tmp_path, [f"x={tmp_path}/a", f"y={tmp_path}/b"])
    assert not (out / "table.csv").exists() and all(file.read_text() == "mine" for file in own)
