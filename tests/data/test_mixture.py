"""Several data sets as one: how they are read, drawn and reported."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from ple_jax import modes
from ple_jax.configs import default, tiny
from ple_jax.core.config import validate
from ple_jax.core.errors import UserError
from ple_jax.core.types import Query, Response, Rollout
from ple_jax.data import mixture
from ple_jax.data.load import load_data
from ple_jax.data.queries import draw, load_queries
from ple_jax.training import journal
from ple_jax.training.measures import gains_of_sets, mean_rewards


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def config(tmp_path: Path, sets: dict[str, dict[str, Any]], **changes: Any) -> FrozenConfigDict:
    c = tiny.get_config()
    c.sinks, c.iterations = (), 2
    c.task.sets = sets
    c.update_from_flattened_dict(changes)
    return FrozenConfigDict(c)


@pytest.fixture
def two(tmp_path) -> dict[str, dict[str, Any]]:
    """Sets of 12 and 30 records, with columns and formats of their own."""
    a = [{"prompt": f"a {i}", "n": i} for i in range(12)]
    b = [{"text": f"bee number {i} is a bee", "n": i} for i in range(30)]
    held_a, held_b = ([{**r, key: f"held {r[key]}"} for r in some[:4]] for some, key in ((a, "prompt"), (b, "text")))
    return {
        "a": {"train": write(tmp_path / "a.jsonl", *a), "heldout": write(tmp_path / "ha.jsonl", *held_a)},
        "b": {
            "train": write(tmp_path / "b.jsonl", *b), "heldout": write(tmp_path / "hb.jsonl", *held_b), "weight": 3.0,
            "format": "imdb", "words": (2, 3), "max_train": 20,
        },
    }  # fmt: skip


def test_each_set_is_read_by_its_own_keys(tmp_path, two):
    found = load_data(config(tmp_path, two), reads=("n", "set"))
    assert Counter(mixture.set_of(q.id) for q in found.train) == {"a": 12, "b": 20} and len(found.heldout) == 8
    assert found.train[0] == Query("a/a:1", "a 0", record={"n": 0, "set": "a"})
    assert (
        found.train[-1].prompt.startswith("bee number")
        and found.train[-1].completion
        and found.train[-1].record["set"] == "b"
    )
    assert not found.bad["train"]
    assert [mixture.set_of(q.id) for q in found.heldout[:4]] == ["a", "b", "a", "b"]  # the first are of all


@pytest.mark.parametrize(
    ("weights", "n", "counts"),
    [((1, 1), 8, (4, 4)), ((1, 3), 8, (2, 6)), ((1.0, 1.0, 1.0), 8, (3, 3, 2)), ((0.7, 0.2, 0.1), 9, (6, 2, 1)),
     ((1e9, 1e9), 2, (1, 1))],
)  # fmt: skip
def test_counts_go_by_weight(weights, n, counts, tmp_path):
    sets = {f"s{i}": {"train": "x", "heldout": "y", "weight": w} for i, w in enumerate(weights)}
    found = mixture.counts(config(tmp_path, sets, queries_per_iteration=n))
    assert tuple(found.values()) == counts and sum(counts) == n


def test_a_set_that_would_never_come(tmp_path, two):
    two["a"]["weight"] = 0.01
    with pytest.raises(UserError, match=r"sets\['a'\] has a weight of 0.01, and an iteration of 8 queries none"):
        mixture.counts(config(tmp_path, two))
    two["a"]["weight"] = 20.0
    with pytest.raises(UserError, match=r"iteration draws 14 train queries of config.task.sets\['a'\], and there are 12"):
        modes.train(config(tmp_path, two, queries_per_iteration=16, **{"optimizer.batch_queries": 4}), tmp_path / "w", "jax")


def test_more_queries_than_there_are_name_a_number_that_is_taken(tmp_path):
    data = tmp_path / "q.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"q {i}"}) + "\n" for i in range(13)))
    c = default.get_config()
    c.queries_per_iteration, c.optimizer.batch_queries = 24, 4
    queries = load_queries(str(data)).queries
    with pytest.raises(UserError, match="24 but there are 13 train queries; use at most 12, the largest multiple of"):
        mixture.draw_queries(c, queries, 0)
    c.optimizer.batch_queries, c.queries_per_iteration = 24, 24  # no multiple fits
    with pytest.raises(UserError, match="use at most 13$"):
        mixture.draw_queries(c, queries, 0)


def test_drawing_takes_every_query_of_a_set_once_before_any_again(tmp_path, two):
    c, queries = config(tmp_path, two), load_data(config(tmp_path, two)).train
    drawn = [mixture.draw_queries(c, queries, i) for i in range(12)]
    for some in drawn:
        assert (
            Counter(mixture.set_of(q.id) for q in some) == {"a": 2, "b": 6} and len(set(some := [q.id for q in some])) == 8
        )
    of_a = [q.id for some in drawn for q in some if q.id.startswith("a/")]
    assert Counter(of_a[:12]) == dict.fromkeys({q.id for q in queries if q.id.startswith("a/")}, 1)
    assert any(mixture.set_of(some[0].id) == "a" for some in drawn) and any(
        mixture.set_of(some[0].id) == "b" for some in drawn
    )
    assert drawn[3] == mixture.draw_queries(c, queries, 3) != drawn[4]
    one = config(tmp_path, {})
    assert mixture.draw_queries(one, queries, 3) == draw(queries, 8, seed=0, iteration=3)


def by_name(prompts, responses, set):
    return [{"a": 1.0, "b": 10.0}[name] + len(r) / 100 for r, name in zip(responses, set, strict=True)]


@pytest.mark.slow
def test_a_run_says_what_each_set_gained(tmp_path, two):
    c, work = config(tmp_path, two, **{"reward.name": f"{__file__}:by_name", "reward.kwargs": {}}), tmp_path / "w"
    modes.train(c, work, "jax")
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        rollouts = journal.read(work / "evaluations" / f"iter_{line['iteration']:04d}.jsonl")
        means = dict(zip((r.query_id for r in rollouts), mean_rewards(rollouts), strict=True))
        for name in ("a", "b"):
            own = [value for query, value in means.items() if query.startswith(f"{name}/")]
            assert line[f"heldout_reward/{name}"] == pytest.approx(np.mean(own)) and len(own) == 4
            assert line[f"heldout_kl_response/{name}"] >= 0
        kl = np.mean([line[f"heldout_kl_response/{name}"] for name in "ab"])
        assert line["heldout_kl_response"] == pytest.approx(kl)
    assert 1 <= lines[1]["reward_plain/a"] < 2 < 10 <= lines[1]["reward_principled/b"] < 11
    assert lines[1]["ranked_share"] == pytest.approx(lines[1]["ranked_share/a"] / 4 + lines[1]["ranked_share/b"] * 3 / 4)
    best = json.loads((work / "summary.json").read_text())["best"]["any"]
    assert set(best["sets"]) == {"a", "b"} and best["sets"]["b"]["queries"] == 4
    assert best["sets"]["b"]["before"] == pytest.approx(lines[0]["heldout_reward/b"])
    assert best["sets"]["b"]["after"] == pytest.approx(lines[best["iteration"]]["heldout_reward/b"])
    page = (work / "report.html").read_text()
    assert 'id="sets"' in page and "Reward by data set" in page
    modes.generate(c, work, "jax")
    settings = json.loads((work / "responses" / "trained" / f"iter_{best['iteration']:04d}.json").read_text())
    assert settings["data"] == "a, b" and settings["queries"] == 8


def test_the_gain_of_a_set_is_after_less_before(tmp_path, two):
    for iteration, rewards in enumerate(({"a": 0.0, "b": 1.0}, {"a": 0.5, "b": 0.0})):
        rollouts = [
            Rollout(f"{name}/{i}", "q", (1,), (Response((2,), True, "plain", 0, "x", reward + i / 10),))
            for name, reward in rewards.items()
            for i in range(3)
        ]
        journal.write(tmp_path / "evaluations" / f"iter_{iteration:04d}.jsonl", rollouts)
    found = gains_of_sets(config(tmp_path, two), tmp_path, 1)
    assert found["a"]["gain_ci95"] == pytest.approx([0.5, 0.5]) and found["b"]["gain_ci95"] == pytest.approx([-1, -1])
    assert (found["a"]["before"], found["a"]["after"]) == pytest.approx((0.1, 0.6))


def test_a_column_that_one_set_lacks_is_none_there(tmp_path, two):
    found = load_data(config(tmp_path, two), reads=("set", "completion"))
    assert {q.record["completion"] for q in found.train if q.id.startswith("a/")} == {None}
    assert all(q.record["completion"] for q in found.train if q.id.startswith("b/"))
    with pytest.raises(UserError, match="no record of config.task.sets has a `label`, and the reward reads it"):
        load_data(config(tmp_path, two), reads=("label",))
    two["a"]["heldout"] = write(tmp_path / "labelled.jsonl", {"prompt": "held", "label": 1})
    assert {q.record["label"] for q in load_data(config(tmp_path, two), heldout_reads=("label",)).train} == {None}


def test_queries_of_generate_are_counted_over_all_sets(tmp_path, two):
    from ple_jax.evaluation.responses import evaluation_set

    found = evaluation_set(config(tmp_path, two, **{"generate.max_queries": 5}), reads=("set",))
    assert len(found.queries) == 5 and {q.record["set"] for q in found.queries} == {"a", "b"}
    other = {"generate.data": "tiny_heldout", "generate.max_queries": 3}
    found = evaluation_set(config(tmp_path, two, **other), reads=("set",))
    assert [q.record for q in found.queries] == [{"set": ""}] * 3


def test_weights_are_refused_where_every_record_is_taken(tmp_path, two):
    from ple_jax.training.opening import read_inputs

    with pytest.raises(UserError, match=r"sets\['b'\] has a weight, and algorithm 'reward' takes every record"):
        read_inputs(config(tmp_path, two, algorithm="reward"), "jax")


def test_seeds_that_choose_within_a_set_are_of_one_method():
    from ple_jax.core.identity import method_keys

    kept = {"task.sets": {"a": {"max_train": 5}}, "inputs.train": "x", "inputs.heldout": "y", "seed": 0}
    assert "inputs.train" not in method_keys(kept) and "inputs.train" in method_keys(kept | {"task.sets": {}})


def test_a_plan_says_what_an_iteration_has(tmp_path, two, capsys):
    modes.plan(config(tmp_path, two), tmp_path, "jax")
    out = capsys.readouterr().out
    assert "32 of a 12, b 20" in out and "8 queries: a 2, b 6" in out


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        ({"a": 3}, "a dictionary, name -> keys of the set"),
        ({"a/b": {"train": "tiny_train", "heldout": "tiny_heldout"}}, "'a/b' is none"),
        ({"a": {"train": "tiny_train"}}, "'a' has no heldout"),
        ({"a": {"train": "tiny_train", "heldout": "tiny_heldout", "wieght": 1.0}}, "'wieght' of 'a' is none; did you mean"),
        ({"a": {"train": "nowhere.jsonl", "heldout": "tiny_heldout"}}, "whose train is"),
        ({"a": {"train": "tiny_train", "heldout": "tiny_heldout", "weight": 0.0}}, "whose weight is"),
        ({"a": {"train": "tiny_train", "heldout": "tiny_heldout", "format": "xml"}}, "whose format is"),
    ],
)
def test_sets_that_are_none(sets, says, tmp_path):
    with pytest.raises(UserError, match=says):
        validate(config(tmp_path, sets))
    validate(config(tmp_path, {"a": {"train": "tiny_train", "heldout": "tiny_heldout", "weight": 1}}))
