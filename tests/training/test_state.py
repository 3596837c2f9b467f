"""Where a run stands: kept in a checkpoint and taken up again; and runs of the format before this one."""

import json

import pytest

from ple_jax.core.errors import UserError
from ple_jax.core.identity import FORMAT
from ple_jax.training.costs import Costs
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


@pytest.mark.parametrize("meta", [{}, {"format": 3}])
def test_a_checkpoint_of_another_format_is_refused(tmp_path, meta):
    backend = Backend()
    backend.kept = json.dumps({"iteration": 2, "step": 6, "environment": {}, **meta})
    with pytest.raises(UserError, match=r"holds a checkpoint of format (None|3), and this version reads format 2"):
        newest(backend, tmp_path)


def test_another_environment_is_named():
    assert changed({"jax": "1"}, {"jax": "1"}) == ""
    assert "jax '1' -> '2'" in changed({"jax": "1"}, {"jax": "2"})
    assert "processes None -> 2" in changed({}, {"processes": 2})


KEPT = {"format": 2, "backend": "jax", "seed": 0, "inputs": {"train": "a"}}


@pytest.mark.parametrize("kind", [1, 3])
def test_a_run_of_another_format_is_refused_in_one_line(tmp_path, kind):
    kept = {**KEPT, "format": kind} if kind > 1 else {key: value for key, value in KEPT.items() if key != "format"}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=f"holds a run of format {kind}, and this version reads format 2"):
        check_config(tmp_path, KEPT)


def test_a_directory_without_any_work_may_change_hands(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(KEPT))
    check_config(tmp_path, KEPT | {"seed": 1})
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="belongs to another config, differing in seed"):
        check_config(tmp_path, KEPT | {"seed": 1})
