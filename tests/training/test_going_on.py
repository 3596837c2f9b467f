"""What a run says when it cannot go on works when it is done: every advice is followed here, as a user would follow it."""

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from configs import tiny as tiny_config
from ple_jax import modes
from ple_jax.core.errors import UserError
from ple_jax.core.files import read_json, write_json
from ple_jax.models import peft
from ple_jax.training import journal, loop, opening
from torch_ascend.backend import TorchBackend

REWARD = """
def reward(prompts, responses, timeout=1):
    return [{value} for p, r in zip(prompts, responses)]
"""
GOOD = "sum(c.islower() for c in r) / 8"


@pytest.fixture
def mine(tmp_path) -> Path:
    (tmp_path / "mine.py").write_text(REWARD.format(value=GOOD))
    return tmp_path / "mine.py"


def config(**changes: Any) -> FrozenConfigDict:
    c = tiny_config.get_config()
    c.sinks = ()
    for key, value in changes.items():
        *parents, name = key.split("__")
        node = c
        for parent in parents:
            node = node[parent]
        node[name] = ConfigDict(value) if isinstance(value, dict) else value
    return FrozenConfigDict(c)


def train(workdir: Path, *accept: str, **changes: Any) -> None:
    assert modes.train(config(**{"iterations": 2, **changes}), workdir, "torch", accept) == 0


def own(file: Path, **kwargs: Any) -> dict[str, Any]:
    return {"reward__name": f"{file}:reward", "reward__kwargs": kwargs}


def outcome(path: Path) -> dict[str, bytes]:
    found = [path / "adapter" / "adapter_model.safetensors"]
    found += [file for name in ("rollouts", "evaluations") for file in (path / name).iterdir()]
    return {str(file.relative_to(path)): file.read_bytes() for file in found}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def sampled(monkeypatch) -> list[int]:
    """Responses asked for, a number for every call."""
    rows, generate = [], TorchBackend.generate

    def counting(self, prompts, *args, **kwargs):
        rows.append(len(prompts) - len(kwargs["known"]))
        return generate(self, prompts, *args, **kwargs)

    monkeypatch.setattr(TorchBackend, "generate", counting)
    return rows


# ---------------------------------------------------------------- a mended reward


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("1 / 0 if p == 'blue sky' else " + GOOD, "reward .*mine.py:reward' failed on .* responses: ZeroDivisionError"),
        pytest.param("'high' if p == 'blue sky' else " + GOOD, "gave str 'high' for .* 'blue sky'", marks=pytest.mark.slow),
        pytest.param("float('nan') if p == 'blue sky' else " + GOOD, "not finite for 1 of 8", marks=pytest.mark.slow),
    ],
    ids=["an exception", "a text", "nan"],
)
def test_a_mended_reward_goes_on(broken, says, mine, tmp_path, sampled):
    """`blue sky` is drawn in the second iteration first: the one before it is done by then."""
    mine.write_text(REWARD.format(value=broken))
    with pytest.raises(UserError, match=f"{says}.*mend it and give the same command again with --accept=reward: what was"):
        train(tmp_path / "run", **own(mine))
    first, asked = (tmp_path / "run" / "rollouts" / "iter_0000.jsonl").read_bytes(), sum(sampled)
    stored = values(tmp_path / "run")
    mine.write_text(REWARD.format(value=GOOD))
    says = r"differing in inputs.reward \(the content\); to go on with it as it is now, add --accept=reward;"
    with pytest.raises(UserError, match=says):
        train(tmp_path / "run", **own(mine))
    assert sum(sampled) == asked and values(tmp_path / "run") == stored
    train(tmp_path / "run", "reward", **own(mine))
    assert sum(sampled) == asked + 8  # the last evaluation alone: what was sampled is kept
    assert (tmp_path / "run" / "rollouts" / "iter_0000.jsonl").read_bytes() == first
    assert stored.items() <= values(tmp_path / "run").items()  # the other version's are left alone
    kept = read_json(tmp_path / "run" / "config.json")
    (change,) = kept["changed"]
    assert change["after"] == 1 and change["inputs.reward"][1] == kept["inputs"]["reward"] != change["inputs.reward"][0]
    # as it is recorded, nobody needs to vouch for it again, and nothing more is recorded
    train(tmp_path / "run", **own(mine))
    assert read_json(tmp_path / "run" / "config.json") == kept
    # it gives what it gave where it was right, so the run ends as one that never failed
    train(tmp_path / "whole", **own(mine))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def values(path: Path) -> dict[str, float]:
    with sqlite3.connect(path / "rewards.sqlite") as database:
        return dict(database.execute("SELECT key, value FROM answer").fetchall())


def test_what_is_vouched_for_is_said_where_the_scales_may_differ(mine, tmp_path, capsys):
    train(tmp_path / "run", iterations=1, **own(mine))
    mine.write_text(REWARD.format(value="len(r)"))
    capsys.readouterr()
    train(tmp_path / "run", "reward", **own(mine))
    assert "warning: after iteration 1 the reward is another version than before" in capsys.readouterr().out
    found = lines(tmp_path / "run" / "metrics.jsonl")
    assert found[2]["heldout_reward"] > 1 > found[1]["reward_plain"]


def test_other_inputs_are_not_vouched_for(mine, tmp_path):
    train(tmp_path / "run", iterations=1, **own(mine))
    mine.write_text(REWARD.format(value="len(r)"))
    says = r"differing in inputs.reward \(the content\), seed; give the same config or another --workdir"
    with pytest.raises(UserError, match=says):
        train(tmp_path / "run", seed=1, **own(mine))
    with pytest.raises(UserError, match="differing in seed; give the same config"):
        train(tmp_path / "run", "reward", "algorithm", seed=1, **own(mine))


@pytest.mark.slow
def test_a_mended_algorithm_goes_on(tmp_path):
    variant = tmp_path / "variant.py"
    good = "from ple_jax.algorithms.ple import *\n"
    first = "ple.label(rollouts, context) if context.iteration == 0 else 1 / 0"
    variant.write_text(f"{good}from ple_jax.algorithms import ple\n\ndef label(rollouts, context):\n    return {first}\n")
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", algorithm=str(variant))
    variant.write_text(good)
    says = r"differing in inputs.algorithm \(the content\); to go on with it .*, add --accept=algorithm;"
    with pytest.raises(UserError, match=says):
        train(tmp_path / "run", algorithm=str(variant))
    train(tmp_path / "run", "algorithm", algorithm=str(variant))
    train(tmp_path / "whole", algorithm=str(variant))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


MENDED = """from ple_jax.algorithms.ple import *
from ple_jax.algorithms import ple

def {body}
"""
BROKEN = {
    # labels and evaluations within the iteration are on disk, and are those of another algorithm
    "labels": """label(rollouts, context):
    swapped = [r._replace(responses=tuple(x._replace(score=-x.score) for x in r.responses)) for r in rollouts]
    return ple.label(swapped, context)

def measures(means, before, after, ended=[]):
    ended.append(means)
    return ple.measures(means, before, after) if len(ended) < 2 else 1 / 0""",
    # the iteration has more responses to a query than are asked for afterwards
    "responses": """collect(config):
    from ple_jax.core.types import Slot
    return (*ple.collect(config), Slot("principled", True, 1))

def batch(rollouts, context):
    return 1 / 0""",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_an_iteration_that_a_broken_algorithm_has_labelled_is_labelled_again(broken, tmp_path):
    variant, good = tmp_path / "variant.py", "from ple_jax.algorithms.ple import *\n"
    how = {"algorithm": str(variant), "eval__points": 2, "optimizer__batch_queries": 2, "ple__tau_0": 0.0}
    variant.write_text(MENDED.format(body=BROKEN[broken]))
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", **how)
    begun = {file.name for file in (tmp_path / "run" / "rollouts").iterdir()}
    assert begun == {f"iter_000{i}.jsonl" for i in range(2 if broken == "labels" else 1)}
    within = {file.name for file in (tmp_path / "run" / "evaluations").glob("step_*")}
    assert within == ({"step_000002", "step_000006"} if broken == "labels" else set())
    variant.write_text(good)
    train(tmp_path / "run", "algorithm", **how)
    if broken == "labels":  # the first iteration was finished, and keeps what it has
        kept, (change,) = journal_of(tmp_path / "run", 0), read_json(tmp_path / "run" / "config.json")["changed"]
        assert change["after"] == 1 and all(r["score"] <= 0 for line in kept for r in line["responses"])
        assert all(r["score"] >= 0 for line in journal_of(tmp_path / "run", 1) for r in line["responses"])
        assert {rollout.decision for rollout in journal.read(tmp_path / "run" / "rollouts" / "iter_0001.jsonl")} > {"ranked"}
    else:
        train(tmp_path / "whole", **how)
        (step,) = (tmp_path / "run" / "evaluations").glob("step_000002/iter_0000.jsonl")
        assert step.read_bytes() == (tmp_path / "whole" / step.relative_to(tmp_path / "run")).read_bytes()
        assert journal_of(tmp_path / "run", 0) == journal_of(tmp_path / "whole", 0)
        assert journal_of(tmp_path / "run", 1) == journal_of(tmp_path / "whole", 1)


def journal_of(workdir: Path, iteration: int) -> list[dict[str, Any]]:
    return lines(workdir / "rollouts" / f"iter_{iteration:04d}.jsonl")


def test_what_was_evaluated_in_another_environment_is_evaluated_again(tmp_path, monkeypatch):
    """In that of the process before, and not only in that in which the run began."""
    host, forgot, environment = ["A"], [], TorchBackend.environment
    monkeypatch.setattr(TorchBackend, "environment", lambda self: environment(self) | {"host": host[0]})
    train(tmp_path / "run", iterations=1)
    monkeypatch.setattr(loop, "forget_within", lambda *_: forgot.append(host[0]))
    monkeypatch.setattr(loop, "one_iteration", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for number, host[0] in enumerate("ABBAA"):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", iterations=3)
        assert (number, "".join(forgot)) == (number, ("", "B", "BB", "BBA", "BBA")[number])


# ---------------------------------------------------------------- how, and not what


def test_more_bad_queries_are_allowed_after_the_fact(mine, tmp_path, sampled):
    mine.write_text(REWARD.format(value="float('nan') if p == 'blue sky' else " + GOOD))
    with pytest.raises(UserError, match="or raise --config.reward.max_bad_share"):
        train(tmp_path / "run", **own(mine))
    asked = sum(sampled)
    train(tmp_path / "run", reward__max_bad_share=0.5, **own(mine))
    assert sum(sampled) == asked + 8
    train(tmp_path / "whole", reward__max_bad_share=0.5, **own(mine))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_smaller_passes_after_memory_ran_out(tmp_path, monkeypatch):
    """The remedy of an error for too little memory; results are equal to rounding."""
    with monkeypatch.context() as patch:
        patch.setattr(TorchBackend, "update", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            train(tmp_path / "run", optimizer__micro_queries=4)
    train(tmp_path / "run", optimizer__micro_queries=1)
    train(tmp_path / "whole", optimizer__micro_queries=4)
    ours, theirs = (peft.read(tmp_path / name / "adapter")[0] for name in ("run", "whole"))
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, rtol=0, atol=1e-4)
    (change,) = read_json(tmp_path / "run" / "config.json")["changed"]
    assert change == {"after": 0, "optimizer.micro_queries": [4, 1]}


def test_a_longer_timeout_of_ones_own_function_is_no_other_reward(mine, tmp_path):
    train(tmp_path / "run", iterations=1, **own(mine, timeout=1))
    stored = values(tmp_path / "run")
    train(tmp_path / "run", iterations=2, **own(mine, timeout=60))
    assert stored.items() <= values(tmp_path / "run").items()


def test_a_second_reward_may_be_slower_or_mended(tmp_path, mine, capsys):
    """Training never sees it: other timeouts make no other run, and other options are vouched for as the first one's are."""
    mine.write_text(REWARD.format(value="len(r) / timeout").replace("timeout=1", "timeout=1, scale=1"))
    second = {"eval__second_reward": f"{mine}:reward"}
    train(tmp_path / "run", iterations=1, **second, eval__second_kwargs={"timeout": 1})
    train(tmp_path / "run", iterations=2, **second, eval__second_kwargs={"timeout": 60})
    says = "differing in eval.second_kwargs, inputs.second .*; to go on with it .*, add --accept=reward"
    with pytest.raises(UserError, match=says):
        train(tmp_path / "run", iterations=3, **second, eval__second_kwargs={"scale": 2})
    capsys.readouterr()
    train(tmp_path / "run", "reward", iterations=3, **second, eval__second_kwargs={"scale": 2})
    assert "warning: after iteration 2 the second reward is another version than before" in capsys.readouterr().out


def test_another_version_of_a_second_reward_is_vouched_for(tmp_path, mine, capsys):
    """The best policy may be chosen by it. Runs that did not write down which version they had go on as they are."""
    second = {"eval__second_reward": f"{mine}:reward"}
    train(tmp_path / "run", iterations=1, **second)
    old = read_json(tmp_path / "run" / "config.json")
    before = old["inputs"].pop("second")
    mine.write_text(REWARD.format(value="len(r)"))
    says = r"differing in inputs.second \(the content\); to go on with it as it is now, add --accept=reward;"
    with pytest.raises(UserError, match=says):
        train(tmp_path / "run", **second)
    capsys.readouterr()
    train(tmp_path / "run", "reward", **second)
    assert "warning: after iteration 1 the second reward is another version than before" in capsys.readouterr().out
    kept = read_json(tmp_path / "run" / "config.json")
    assert kept["changed"][-1]["inputs.second"] == [before, kept["inputs"]["second"]]
    write_json(tmp_path / "run" / "config.json", old, sealed=True)
    train(tmp_path / "run", iterations=3, **second)
    assert read_json(tmp_path / "run" / "config.json")["inputs"] == kept["inputs"]


# ---------------------------------------------------------------- more iterations


@pytest.mark.parametrize("finished", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["finished", "unfinished"])
def test_more_iterations_end_as_if_they_had_been_asked_for_at_once(finished, tmp_path, monkeypatch):
    if finished:
        train(tmp_path / "run", iterations=1)
        assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["iteration"] == 1
    else:
        with monkeypatch.context() as patch:
            patch.setattr(modes.write, "write_adapter", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "run", iterations=1)
    train(tmp_path / "run", iterations=3)
    train(tmp_path / "whole", iterations=3)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    summary, page = read_json(tmp_path / "run" / "summary.json"), (tmp_path / "run" / "report.html").read_text()
    whole = read_json(tmp_path / "whole" / "summary.json")
    assert summary["iterations"] == 3 and summary["heldout_reward_after"] == whole["heldout_reward_after"]
    assert summary["generated_tokens"] == whole["generated_tokens"]
    assert page.count("<h2") == (tmp_path / "whole" / "report.html").read_text().count("<h2")
    assert {"after": 1, "iterations": [1, 3]} in read_json(tmp_path / "run" / "config.json")["changed"]
    with pytest.raises(UserError, match="config.iterations is 2, and 3 are done: give at least as many"):
        train(tmp_path / "run", iterations=2)


def test_the_report_of_a_shorter_run_is_not_taken_for_that_of_the_longer_one(tmp_path, monkeypatch):
    """Where it is stopped after the summary, which marks it as finished."""
    train(tmp_path / "run", iterations=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(modes.run_page, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train(tmp_path / "run", iterations=2)
    report = tmp_path / "run" / "report.html"
    assert (tmp_path / "run" / "summary.json").exists() and not report.exists()
    train(tmp_path / "run", iterations=2)
    assert report.exists()


def test_the_former_end_of_a_longer_run_stays_one_of_its_evaluations(tmp_path):
    """It may be the best there is, and its checkpoint may have taken the place of the one before."""
    how = {"eval__every": 2, "optimizer__lr": 0.1}
    train(tmp_path / "run", iterations=3, **how)
    before = read_json(tmp_path / "run" / "summary.json")
    train(tmp_path / "run", iterations=5, **how)
    summary, best = read_json(tmp_path / "run" / "summary.json"), tmp_path / "run" / "best" / "any"
    assert [point["iteration"] for point in summary["points"]] == [0, 2, 3, 4, 5]
    assert summary["points"][:3] == before["points"]
    assert [int(kept.name) for kept in best.iterdir()] == [summary["best"]["any"]["step"]]
    assert "heldout_reward" in lines(tmp_path / "run" / "metrics.jsonl")[3]


def test_what_was_evaluated_by_hand_is_no_evaluation_of_the_run(tmp_path):
    how = {"eval__every": 2, "checkpoint__use": "newest", "checkpoint__keep": 9}
    train(tmp_path / "run", iterations=3, **how)
    (tmp_path / "run" / "summary.json").unlink()
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in ("3", "2"):  # as of a run that was stopped after its first iteration
        shutil.rmtree(checkpoints / step)
    assert modes.evaluate(config(iterations=3, **how), tmp_path / "run", "torch") == 0
    assert (tmp_path / "run" / "evaluations" / "iter_0001.jsonl").exists()
    train(tmp_path / "run", iterations=3, **how)
    assert [point["iteration"] for point in read_json(tmp_path / "run" / "summary.json")["points"]] == [0, 2, 3]


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ({"ple__schedule": "linear"}, r"depends on it \(config.ple.schedule='linear'\), of iteration 1 it was 0.1"),
        ({"ple__schedule": "cosine"}, r"config.ple.schedule='cosine'\), of iteration 1 it was 0.1 and would be 0.15"),
        ({"ple__schedule": "constant"}, None),
        ({"ple__selection": "percentile", "ple__rank": "dpo"}, None),
        ({"ple__tau_0": float("inf"), "ple__schedule": "linear"}, None),
        ({"optimizer__schedule": "linear"}, "its rates depend on how long the run is"),
    ],
    ids=str,
)
def test_a_schedule_that_spreads_over_all_iterations_takes_no_more(schedule, says):
    """Half of 0.2 after one of two iterations, and two thirds after one of three (linear); by hand for cosine too."""
    inputs = opening.read_inputs(config(iterations=3, **schedule), "torch")
    if says is None:
        opening.check_length(inputs, {"iterations": 2}, 2)
    else:
        with pytest.raises(UserError, match=says):
            opening.check_length(inputs, {"iterations": 2}, 2)


@pytest.mark.slow
def test_more_epochs_of_a_reward_model_end_as_if_they_had_been_asked_for_at_once(tmp_path):
    rows = [{"prompt": f"query {i}", "chosen": "abc" * (1 + i % 2), "rejected": f"XYZ{i}"} for i in range(12)]
    for name, some in {"train": rows[:8], "heldout": rows[8:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    settings = {f"task__{name}": str(tmp_path / f"{name}.jsonl") for name in ("train", "heldout")}
    settings |= {"algorithm": "reward", "offline__eval_every": 2}
    for name, epochs in (("run", 1), ("run", 2), ("whole", 2)):
        train(tmp_path / name, offline__epochs=epochs, **settings)
    ours, whole = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("run", "whole"))
    assert ours.read_bytes() == whole.read_bytes()
    done = read_json(tmp_path / "run" / "summary.json")
    assert (done["epochs"], done["steps"]) == (2, 4)
    with pytest.raises(UserError, match="config.offline.epochs is 1, and was 2: give at least as many"):
        train(tmp_path / "run", offline__epochs=1, **settings)


def test_what_is_to_be_removed_is_all_that_stands_in_the_way(tmp_path):
    """A checkpoint and the stored rewards."""
    train(tmp_path / "run", iterations=1)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "rewards.sqlite").write_bytes(b"not a database" * 300)
    (tmp_path / "run" / "checkpoints" / "1" / "meta.json").write_text("{}")
    shutil.rmtree(tmp_path / "run" / "rollouts")
    with pytest.raises(UserError, match=r"checkpoints/1 is damaged .*; remove that folder to go on from the one before it"):
        train(tmp_path / "run", iterations=1)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "1")
    with pytest.raises(UserError, match="rewards.sqlite is damaged .*; delete it: what it held is scored again"):
        train(tmp_path / "run", iterations=1)
    (tmp_path / "run" / "rewards.sqlite").unlink()
    train(tmp_path / "run", iterations=1)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_without_its_config_a_run_goes_on_where_the_user_vouches_for_it(tmp_path):
    train(tmp_path / "run", iterations=1)
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match="config.json is damaged.*remove it and add --accept=config"):
        train(tmp_path / "run")
    path.unlink()
    with pytest.raises(UserError, match="no config.json; give an empty folder, or, where .* add --accept=config"):
        train(tmp_path / "run")
    train(tmp_path / "run", "config")
    train(tmp_path / "whole")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert read_json(path)["changed"] == [{"after": 1, "config.json": "was gone"}]


def test_modes_that_train_nothing_leave_the_config_alone(tmp_path, capsys):
    """And take a run whatever its length is: it is that of the newest checkpoint."""
    train(tmp_path / "run", iterations=1)
    before = (tmp_path / "run" / "config.json").read_bytes()
    assert modes.evaluate(config(iterations=5, optimizer__micro_queries=1), tmp_path / "run", "torch") == 0
    assert "iteration 1: held-out reward" in capsys.readouterr().out
    assert (tmp_path / "run" / "config.json").read_bytes() == before
