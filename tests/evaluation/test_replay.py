"""Replays of journals, and the first difference of two runs: of real runs of the tiny model, and of planted ones."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from ple_jax import modes
from ple_jax.configs import tiny
from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import UserError
from ple_jax.core.files import read_jsonl, write_jsonl
from ple_jax.core.types import Response, Rollout
from ple_jax.data.queries import load_queries
from ple_jax.evaluation import differences, journal_records, replay
from ple_jax.main import parse
from ple_jax.training import journal

COMMAND = ["ple_jax", "--mode=replay", "--workdir"]


def config(**changes: Any) -> FrozenConfigDict:
    c = tiny.get_config()
    c.iterations, c.sinks, c.ple.tau_0 = 2, (), 0.05
    c.update_from_flattened_dict(changes)
    return FrozenConfigDict(c)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "w"
    modes.train(config(), workdir, "jax")
    return workdir


@pytest.fixture
def copy(run, tmp_path) -> Path:
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def replayed(workdir: Path, *overrides: str) -> dict[str, Any]:
    return replay.replay(parse([*COMMAND, str(workdir), *overrides]).config, workdir, "jax")


def decisions(folder: Path) -> list[str]:
    return [r.decision for path in sorted(folder.glob("iter_*.jsonl")) for r in journal.read(path)]


# ---------------------------------------------------------------- replays


def test_an_unchanged_replay_is_the_run_bit_by_bit(copy, capsys):
    result = replayed(copy)
    assert result["same"] and not result["changed"] and not result["sampled_otherwise"]
    assert [row["same"] for row in result["iterations"]] == [True, True]
    for path in sorted((copy / "rollouts").glob("iter_*.jsonl")):
        assert (copy / "replay" / "rollouts" / path.name).read_bytes() == path.read_bytes()
    assert modes.replay(parse([*COMMAND, str(copy)]).config, copy, "jax") == 0
    assert "every score, margin, decision and weight is as it was, bit by bit" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "dpo", "raft", "ppo", "context_distillation"])
def test_replays_of_other_algorithms_are_as_they_were(algorithm, tmp_path):
    changes = {"dpo.samples": 2} if algorithm == "dpo" else {}
    modes.train(config(algorithm=algorithm, iterations=1, **changes), tmp_path / "w", "jax")
    assert replayed(tmp_path / "w")["same"]


def test_one_bit_of_a_weight_is_seen(copy):
    path = copy / "rollouts" / "iter_0001.jsonl"
    first, *others = journal.read(path)
    moved = first.responses[0]._replace(weight=float(np.nextafter(first.responses[0].weight, 2)))
    journal.write(path, [first._replace(responses=(moved, *first.responses[1:])), *others])
    result = replayed(copy)
    assert [row["same"] for row in result["iterations"]] == [True, False] and not result["same"]
    assert result["iterations"][1]["weights_moved"] == 1


def test_another_threshold(copy):
    result = replayed(copy, "--config.ple.tau_0=0.5", "--config.ple.alpha=0.5")
    assert result["changed"] == {"ple.tau_0": [0.05, 0.5], "ple.alpha": [0.9, 0.5]} and not result["same"]
    assert [row["tau"] for row in result["iterations"]] == [[0.05, 0.5], [0.05 * 0.9, 0.25]]
    rollouts = [journal.read(path) for path in sorted((copy / "rollouts").glob("iter_*.jsonl"))]
    wanted = [["blended", "ranked"][r.margin > tau] for some, tau in zip(rollouts, (0.5, 0.25), strict=True) for r in some]
    assert decisions(copy / "replay" / "rollouts") == wanted != decisions(copy / "rollouts")
    flips = read_jsonl(copy / "replay" / "flips.jsonl")
    assert len(flips) == sum(sum(row["flips"].values()) for row in result["iterations"]) > 0
    assert all(flip["decision"] == ["ranked", "blended"] and flip["margin"][0] <= flip["tau"][1] for flip in flips)
    *_, last = replay.said(result)
    moved = sum(row["weights_moved"] for row in result["iterations"])
    assert (
        last == f"{len(flips)} of {sum(map(len, rollouts))} pairs are decided otherwise, and {moved} weights are other ones"
    )


def test_a_threshold_that_decides_nothing_otherwise(copy):
    result = replayed(copy, "--config.ple.tau_0=0.0500001")
    *_, last = replay.said(result)
    assert not result["same"] and last.startswith(
        "every pair is decided as it was, with the same weights, though thresholds"
    )


def test_inf_survives_the_config_of_the_run(tmp_path):
    modes.train(config(iterations=1, **{"ple.tau_0": math.inf}), tmp_path / "w", "jax")
    result = replayed(tmp_path / "w")
    assert result["same"] and result["iterations"][0]["tau"] == [math.inf, math.inf]


def test_another_reward(copy):
    result = replayed(copy, "--config.reward.name=length", "--config.reward.kwargs={'target': 3}")
    for path in sorted((copy / "replay" / "rollouts").glob("iter_*.jsonl")):
        for rollout in journal.read(path):
            for r in rollout.responses:
                assert r.reward == -abs(len(r.text.split()) - 3) / 3
    assert set(result["changed"]) == {"reward.name", "reward.kwargs"}
    line = "".join((copy / "rollouts" / "iter_0000.jsonl").read_text())
    assert '"reward": -' not in line  # the run's own is as it was


def mixed(prompts, responses, id):
    """nan for some; reads what the run's own reward did not."""
    assert all(isinstance(name, str) for name in id)
    return [math.nan if name.endswith("7") else float(len(r)) for r, name in zip(responses, id, strict=True)]


def test_a_reward_that_reads_what_the_run_did_not_keep(copy):
    result = replayed(copy, f"--config.reward.name={__file__}:mixed", "--config.reward.kwargs={}")
    assert sum(row["left_out"] for row in result["iterations"]) > 0
    assert all(not r.query_id.endswith("7") for p in (copy / "replay" / "rollouts").glob("*") for r in journal.read(p))


def test_a_reward_scores_no_answer_to_what_it_refuses(copy, monkeypatch):
    refused = {rollout.query_id for rollout in journal.read(copy / ROLLOUTS)[:2]}
    says = {True: "no number", False: ""}
    monkeypatch.setattr(replay.prompting, "refusal", lambda reward, query: says[query.id in refused])
    result = replayed(copy, "--config.reward.name=length", "--config.reward.kwargs={'target': 3}")
    assert sum(row["left_out"] for row in result["iterations"]) >= 2
    kept = {r.query_id for path in (copy / "replay" / "rollouts").glob("*") for r in journal.read(path)}
    assert kept and not kept & refused


def test_transform_and_selection(copy):
    result = replayed(
        copy, "--config.reward.transform=zscore", "--config.ple.selection=symmetric", "--config.ple.blend=best"
    )
    assert set(result["changed"]) == {"reward.transform", "ple.selection", "ple.blend"}
    for path in (copy / "replay" / "rollouts").glob("*"):
        scores = np.array([[x.score for x in r.responses] for r in journal.read(path)])
        assert scores.mean() == pytest.approx(0) and scores.std() == pytest.approx(1)


def test_what_had_a_part_in_sampling_is_warned_of(copy):
    result = replayed(copy, "--config.sampling.temperature=0.5", "--config.optimizer.lr=1.0")
    assert result["sampled_otherwise"] == {"sampling.temperature": [1.0, 0.5]} and result["same"]
    assert next(replay.said(result)).startswith("warning: sampling.temperature had a part in what was sampled")


def test_what_cannot_be_replayed(copy, tmp_path):
    with pytest.raises(
        UserError, match="has 2 responses a query .plain, principled., and config.algorithm 'grpo' asks for 4"
    ):
        replayed(copy, "--config.algorithm=grpo")
    with pytest.raises(UserError, match="holds no run"):
        parse([*COMMAND, str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="holds no run"):
        replay.replay(config(), tmp_path / "nothing", "jax")
    for path in (copy / "rollouts").glob("*"):
        path.unlink()
    with pytest.raises(UserError, match="holds no finished iteration"):
        replayed(copy)
    with pytest.raises(UserError, match="--against=x goes with --mode=replay"):
        parse(["ple_jax", "--config=tiny", "--workdir=w", "--against=x"])
    with pytest.raises(UserError, match="--against=x .* not with --config=tiny"):
        parse([*COMMAND, "w", "--against=x", "--config=tiny"])
    with pytest.raises(UserError, match="compares two runs as they are: leave '--config.seed=1' out"):
        parse([*COMMAND, "w", "--against=x", "--config.seed=1"])


def reconfigured_json(workdir: Path, **groups: dict[str, Any]) -> None:
    kept = json.loads((workdir / "config.json").read_text())
    kept.pop("digest")
    for group, values in groups.items():
        kept[group] = kept[group] | values if isinstance(values, dict) else values
    (workdir / "config.json").write_text(json.dumps(kept))


def test_what_a_run_has_read_may_be_gone(copy):
    gone = {"train": "gone.jsonl", "heldout": "gone.jsonl", "sets": {"a": {"train": "gone", "heldout": "g", "subsets": []}}}
    reconfigured_json(
        copy, task=gone, model={"path": "/gone", "device": "cuda"}, backend="torch", sampling={"server": "vllm"}
    )
    run = parse([*COMMAND, str(copy)])
    assert run.backend == "torch"
    result = replay.replay(run.config, copy, run.backend)
    assert result["same"] and not result["sampled_otherwise"]


def test_an_unchanged_replay_asks_no_reward(copy):
    reconfigured_json(copy, reward={"name": "nowhere.py:gone", "kwargs": {"url": "http://h/score"}})
    assert replayed(copy)["same"]
    with pytest.raises(UserError, match="config.task.train is 'gone.jsonl' but must be"):  # what is given is checked
        parse([*COMMAND, str(copy), "--config.task.train=gone.jsonl"])


def test_a_run_under_way_is_not_disturbed(copy):
    from ple_jax.training.workdir import lock

    with lock(copy):
        assert modes.replay(parse([*COMMAND, str(copy)]).config, copy, "jax") == 0


def test_what_was_left_out_comes_back_with_another_reward(copy):
    path = copy / "rollouts" / "iter_0000.jsonl"
    first, *others = journal.read(path)
    bad = tuple(r._replace(reward=math.nan, score=math.nan, weight=math.nan) for r in first.responses)
    journal.write(path, others)
    (copy / "quarantine").mkdir()
    journal.write(copy / "quarantine" / path.name, [first._replace(responses=bad, decision="", margin=math.nan)])
    row = replayed(copy, "--config.reward.name=length", "--config.reward.kwargs={}")["iterations"][0]
    assert row["queries"] == 8 and any(flip.startswith("left out -> ") for flip in row["flips"])
    ranked = [rollout.decision == "ranked" for rollout in others]
    assert row["ranked"][0] == np.mean(ranked)
    assert replayed(copy)["iterations"][0]["queries"] == 7 and replayed(copy)["same"]


# ---------------------------------------------------------------- records


def test_records_are_read_by_our_own_formats(copy):
    replayed(copy)
    needs = {"preference": "pair", "sft": "completion", "prompt_completion": "completion"}
    sizes = {}
    for name, need in needs.items():
        found = load_queries(str(copy / "replay" / f"{name}.jsonl"), needs=need)
        assert not found.bad
        sizes[name] = len(found.queries)
    rollouts = [r for path in (copy / "rollouts").glob("iter_*.jsonl") for r in journal.read(path)]
    assert sizes["prompt_completion"] == sum(bool(x.text.strip()) for r in rollouts for x in r.responses)
    assert sizes["preference"] == sum(r.decision == "ranked" for r in rollouts) > 0
    assert sizes["sft"] == len(rollouts)


PAIR = (
    Response((1,), True, text=" no", reward=0.0, score=0.0, weight=0.0),
    Response((2,), True, "principled", text=" yes", reward=1.0, score=1.0, weight=0.0, principled=True),
)


@pytest.mark.parametrize("chat", [False, True])
def test_records_of_texts_and_turns(chat):
    from ple_jax import algorithms

    c, talk = config(**{"task.chat": chat}), Conversation([{"role": "user", "content": "So?"}], ({"name": "f"},))
    rollouts = [
        Rollout("a", "So", (1,), PAIR, margin=1.0, decision="ranked"),
        Rollout("b", talk, (1,), PAIR, margin=1.0, decision="blended"),
        Rollout("c", "So", (1,), (PAIR[0]._replace(text=""), PAIR[1]), margin=1.0, decision="ranked"),
    ]
    found = journal_records.of({3: rollouts}, algorithms.load("ple"), c)
    turn = [{"role": "user", "content": "So"}] if chat else "So"
    yes, no = ([{"role": "assistant", "content": text.strip()}] if chat else text for text in (" yes", " no"))
    assert found["preference"] == [{"id": "3/a", "prompt": turn, "chosen": yes, "rejected": no, "margin": 1.0}]
    assert [row["completion"] for row in found["sft"]] == [yes, [{"role": "assistant", "content": "yes"}], yes]
    assert found["sft"][1]["prompt"] == [{"role": "user", "content": "So?"}] and found["sft"][1]["tools"] == [{"name": "f"}]
    assert [row["id"] for row in found["prompt_completion"]] == [
        "3/a/plain/0", "3/a/principled/0", "3/b/plain/0", "3/b/principled/0", "3/c/principled/0",
    ]  # fmt: skip


def test_the_records_own_pairs_stay_as_they_are():
    from ple_jax import algorithms

    given = (
        Response((1,), True, "chosen", text="good", reward=0.0, score=0.0, source="completion"),
        Response((2,), True, "rejected", text="bad", reward=1.0, score=1.0, source="rejected"),
    )
    rollouts = [Rollout("a", "So", (1,), given, margin=-1.0, decision="ranked")]
    found = journal_records.of({0: rollouts}, algorithms.load("dpo"), config(algorithm="dpo"))
    assert [(row["chosen"], row["rejected"]) for row in found["preference"]] == [("good", "bad")]
    assert found["sft"][0]["completion"] == "good" and found["prompt_completion"] == []


def test_of_the_best_of_several_the_pair_is_best_and_worst():
    from ple_jax import algorithms

    given = tuple(PAIR[0]._replace(sample=i, text=f"{score}", score=score) for i, score in enumerate((0.5, 1.0, 0.0)))
    rollouts = [Rollout("a", "So", (1,), given, margin=0.5, decision="best")]
    found = journal_records.of({0: rollouts}, algorithms.load("raft"), config(algorithm="raft"))
    assert [(row["chosen"], row["rejected"]) for row in found["preference"]] == [("1.0", "0.0")]
    assert [row["completion"] for row in found["sft"]] == ["1.0"]


def test_trl_reads_the_records(copy):
    from datasets import load_dataset
    from trl import data_utils

    replayed(copy)
    for name, columns in (("preference", {"prompt", "chosen", "rejected"}), ("sft", {"prompt", "completion"})):
        rows = load_dataset(
            "json", data_files=str(copy / "replay" / f"{name}.jsonl"), split="train", cache_dir=str(copy / "cache")
        )
        assert columns <= set(rows.column_names) and not data_utils.is_conversational(rows[0])


# ---------------------------------------------------------------- the first difference


def planted(workdir: Path, name: str, change: Any, *, at: int = 3) -> None:
    """Changes one rollout of a journal, and all that follows from it there is left alone."""
    path = workdir / name
    rollouts = journal.read(path)
    rollouts[at] = change(rollouts[at])
    journal.write(path, rollouts)


def response(change: Any) -> Any:
    return lambda rollout: rollout._replace(responses=(rollout.responses[0], change(rollout.responses[1])))


def reconfigured(workdir: Path) -> None:
    reconfigured_json(workdir, ple={"rank_weight": 0.5})


def another_loss(workdir: Path) -> None:
    lines = read_jsonl(workdir / "metrics.jsonl")
    lines[2]["loss"] = float(np.nextafter(lines[2]["loss"], 9))
    lines[2]["seconds_update"] = 1e9
    write_jsonl(workdir / "metrics.jsonl", lines)


ROLLOUTS = "rollouts/iter_0001.jsonl"
PLANTED = {
    "config": (reconfigured, "ple.rank_weight"),
    "prompt": (lambda w: planted(w, ROLLOUTS, lambda r: r._replace(prompt_tokens=(*r.prompt_tokens, 7))), "tokens"),
    "noise": (lambda w: planted(w, ROLLOUTS, response(lambda x: x._replace(noise="00000000"))), "principled response 0"),
    "token": (
        lambda w: planted(w, ROLLOUTS, response(lambda x: x._replace(tokens=(*x.tokens[:2], 5, *x.tokens[3:])))),
        "token 2",
    ),
    "reward": (
        lambda w: planted(w, ROLLOUTS, response(lambda x: x._replace(reward=x.reward + 1e-15))),
        "principled response 0",
    ),
    "decision": (lambda w: planted(w, ROLLOUTS, lambda r: r._replace(decision="dropped")), "decision"),
    "loss": (another_loss, "metrics of iteration 2, loss"),
}


@pytest.mark.parametrize("quantity", PLANTED)
def test_a_planted_difference_is_found(quantity, run, copy, capsys):
    plant, where = PLANTED[quantity]
    plant(copy)
    found = differences.of(run, copy)
    assert [difference.quantity for difference in found] == [quantity]
    assert where in found[0].where and found[0].one != found[0].other
    if quantity not in ("config", "loss"):
        query = journal.read(run / ROLLOUTS)[3].query_id
        assert found[0].where.startswith(f"iteration 2, query {query!r}")  # as its metrics say
    modes.replay(config(), run, "jax", against=copy)
    assert capsys.readouterr().out.strip() == str(found[0])


def test_the_earliest_difference_is_told(run, copy):
    another_loss(copy)
    planted(copy, ROLLOUTS, response(lambda x: x._replace(reward=2.0)), at=0)
    planted(copy, ROLLOUTS, response(lambda x: x._replace(tokens=(*x.tokens[:-1], 5))), at=5)  # before any reward
    assert [found.quantity for found in differences.of(run, copy)] == ["token"]
    planted(copy, "evaluations/iter_0001.jsonl", lambda r: r._replace(responses=(r.responses[0]._replace(reward=3.0),)))
    found = differences.of(run, copy)
    assert found[0].quantity == "reward" and found[0].where.startswith("evaluation 1")


def test_a_run_differs_nowhere_from_itself_nor_from_one_that_was_computed_otherwise(run, copy, capsys):
    assert differences.of(run, run) == []
    reconfigured_json(copy, model={"remat": "full"})
    assert differences.of(run, copy) == []
    modes.replay(config(), run, "jax", against=copy)
    assert "no difference" in capsys.readouterr().out


def test_another_seed_is_another_noise(run, tmp_path):
    modes.train(config(seed=1), tmp_path / "w", "jax")
    found = differences.of(run, tmp_path / "w")
    assert [(d.quantity, d.where) for d in found][0] == ("config", "seed")
    assert found[-1].quantity == "noise" and found[-1].where.startswith("evaluation 0")


def test_another_rate_shows_first_in_what_the_loss_says(run, tmp_path):
    modes.train(config(**{"optimizer.lr": 2e-2}), tmp_path / "w", "jax")
    found = differences.of(run, tmp_path / "w")
    assert [d.quantity for d in found] == ["config", "loss"] and "iteration 1" in found[1].where


def test_offline_runs_and_evaluations_within_an_iteration(run, copy, tmp_path):
    for folder, loss in ((tmp_path / "a", 0.5), (tmp_path / "b", 0.9)):
        folder.mkdir()
        shutil.copy(run / "config.json", folder)
        write_jsonl(folder / "metrics.jsonl", [{"iteration": 0}, {"iteration": 10, "loss": loss, "seconds": loss}])
    assert [(d.quantity, d.one, d.other) for d in differences.of(tmp_path / "a", tmp_path / "b")] == [("loss", 0.5, 0.9)]
    shutil.copytree(run, tmp_path / "c")
    for folder in (copy, tmp_path / "c"):
        shutil.copytree(folder / "evaluations", folder / "evaluations" / "step_000001")
    planted(copy, "evaluations/step_000001/iter_0001.jsonl", lambda r: r._replace(responses=()))
    assert differences.of(copy, tmp_path / "c")[0].where.startswith("evaluation at step 000001")


def test_a_query_that_one_run_left_out_differs_in_its_reward(run, copy):
    path = copy / ROLLOUTS
    rollouts = journal.read(path)
    bad = tuple(r._replace(reward=math.nan) for r in rollouts[2].responses)
    journal.write(path, [r for i, r in enumerate(rollouts) if i != 2])
    (copy / "quarantine").mkdir()
    journal.write(copy / "quarantine" / path.name, [rollouts[2]._replace(responses=bad)])
    found = differences.of(run, copy)
    assert [d.quantity for d in found] == ["reward"] and repr(rollouts[2].query_id) in found[0].where


def test_a_config_of_an_earlier_version_has_the_defaults(run, copy):
    kept = json.loads((copy / "config.json").read_text())
    kept.pop("digest")
    del kept["task"]["sets"]
    (copy / "config.json").write_text(json.dumps(kept))
    assert differences.of(run, copy) == []


def test_a_shorter_run(run, copy):
    for name in ("rollouts/iter_0001.jsonl", "evaluations/iter_0002.jsonl"):
        (copy / name).unlink()
    found = differences.of(run, copy)
    assert [(d.quantity, d.one, d.other) for d in found] == [("length", "there", "not there")]
    with pytest.raises(UserError, match="holds no run: give two work directories"):
        differences.of(run, copy / "nothing")
