"""Where a run stands: kept in a checkpoint and taken up again; and runs of the format before this one."""

import json

import pytest

from ple_jax.core.errors import UserError
from ple_jax.core.identity import FORMAT
from ple_jax.training.costs import Costs
from ple_jax.training.journal import read
from ple_jax.training.run import Clock, Session
from ple_jax.training.state import State, changed, commit, newest
from ple_jax.training.workdir import check_config


class Backend:
    """Keeps what it is given, as JSON does."""

    def save(self, path, step, meta, *, keep):
        self.kept = json.dumps(meta)

    def restore(self, path):
        return json.loads(self.kept) if hasattr(self, "kept") else None


def test_a_state_is_taken_up_as_it_was(tmp_path):
    backend, session = Backend(), Session(tmp_path, [], 1, None, None, None, Clock())
    assert newest(backend, tmp_path) is None
    spent = Costs(queries=5).took("update", 0.1)
    lines = ({"iteration": 0, "heldout_reward": 0.1 + 0.2, "kl": None},)
    state = State({"jax": "0"}, 3, 12, costs=spent, controller={"kl": 0.1 + 0.2}, metrics={"loss": 1.0}, lines=lines)
    kept = commit(state, backend, session)
    assert kept.wall_seconds > 0 and kept.peak_memory_bytes > 0 and state.wall_seconds == 0
    assert newest(backend, tmp_path) == kept
    assert json.loads(backend.kept)["format"] == FORMAT == 2


def test_a_checkpoint_of_format_1_is_read():
    backend = Backend()
    counters = {"queries": 4, "generated_tokens": 9, "seconds": {"update": 1.5}}
    backend.kept = json.dumps({"iteration": 2, "step": 6, "wall_seconds": 3.0, "metrics": {}, "environment": {}} | counters)
    state = newest(backend, None)
    assert (state.iteration, state.step, state.costs.queries, state.costs.seconds) == (2, 6, 4, {"update": 1.5})


def test_another_environment_is_named():
    assert changed({"jax": "1"}, {"jax": "1"}) == ""
    assert "jax '1' -> '2'" in changed({"jax": "1"}, {"jax": "2"})
    assert "processes None -> 2" in changed({}, {"processes": 2}) and "processor 'a' -> 'b'" in changed(
        {"processor": "a"}, {"processor": "b"})  # fmt: skip
    assert changed({"jax": "1"}, {"jax": "1", "processor": "a"}) == ""  # of a state that is too old to name it


OLD = {
    "backend": "jax", "seed": 0, "sft": {"data": None, "epochs": 1, "lr": 1e-4},
    "reward_model": {"train": "lora", "epochs": 1, "max_tokens": 9, "eval_every": 50},
    "inputs": {"train": "a", "reward": "digest of a file", "sft": "c"},
}  # fmt: skip
NEW = {
    "format": 2, "backend": "jax", "seed": 0, "warm_up": {"data": None, "epochs": 1, "lr": 1e-4},
    "reward_model": {"train": "lora", "max_tokens": 9}, "offline": {"epochs": 1, "eval_every": 50},
    "inputs": {"train": "a", "reward": "a version", "warm_up": "c"},
}  # fmt: skip


def old_run(workdir, *, finished: bool, **changes):
    (workdir / "config.json").write_text(json.dumps(OLD | changes))
    (workdir / "metrics.jsonl").write_text("")
    if finished:
        (workdir / "summary.json").write_text("{}")


def test_a_finished_run_of_format_1_is_still_its_configs(tmp_path):
    old_run(tmp_path, finished=True)
    check_config(tmp_path, NEW)
    with pytest.raises(UserError, match="belongs to another config, differing in seed"):
        check_config(tmp_path, NEW | {"seed": 1})


@pytest.mark.parametrize(("finished", "changes"), [(False, {}), (True, {"format": 3})])
def test_a_run_that_cannot_go_on_is_refused_in_one_line(tmp_path, finished, changes):
    old_run(tmp_path, finished=finished, **changes)
    with pytest.raises(UserError, match=f"holds a run of format {changes.get('format', 1)}, and this version goes on with"):
        check_config(tmp_path, NEW)


def test_a_directory_without_any_work_may_change_hands(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD))
    check_config(tmp_path, NEW | {"seed": 1})


def test_a_journal_of_format_1_tells_who_gave_a_response_by_its_kind(tmp_path):
    response = {"sample": 0, "tokens": [1], "text": "", "finished": True, "reward": 1.0, "score": None, "weight": None}
    line = {"query_id": "a", "prompt": "p", "prompt_tokens": [1], "tau": None, "margin": None, "decision": ""}
    kinds = {"plain": (False, "policy"), "principled": (True, "policy"), "chosen": (False, "completion"),
             "reference": (False, "completion"), "rejected": (False, "rejected")}  # fmt: skip
    line["responses"] = [response | {"kind": kind} for kind in kinds]
    (tmp_path / "iter_0000.jsonl").write_text(json.dumps(line) + "\n")
    (rollout,) = read(tmp_path / "iter_0000.jsonl")
    assert [(r.principled, r.source) for r in rollout.responses] == list(kinds.values())
    assert [r.own for r in rollout.responses] == [True, False, False, False, False]
