"""Sinks: what is on disk after each call, read back by independent readers."""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event

from configs import tiny as tiny_config
from ple_jax import modes
from ple_jax.core.errors import UserError
from ple_jax.training import sinks


def lines(path: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().split("\n")[:-1]]


def test_jsonl_appends_a_line_a_call_and_writes_null_for_what_json_has_not(tmp_path):
    (sink,) = sinks.make(["jsonl"], tmp_path / "new", {})
    sink({"tau": 0.1, "kl": math.nan, "generated_tokens": 7}, 0)
    sink({"tau": math.inf, "loss": np.float32(0.5), "n": np.int64(3)}, 1)
    assert lines(tmp_path / "new" / "metrics.jsonl") == [
        {"iteration": 0, "tau": 0.1, "kl": None, "generated_tokens": 7},
        {"iteration": 1, "tau": None, "loss": 0.5, "n": 3},
    ]


def test_jsonl_is_on_disk_after_every_call(tmp_path):
    program = (
        "import os, pathlib, sys; from ple_jax.training import sinks;"
        "s, t = sinks.make(['jsonl', 'tensorboard'], pathlib.Path(sys.argv[1]), {});"
        "[f({'x': 1.5}, 3) for f in (s, t)]; os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert lines(tmp_path / "metrics.jsonl") == [{"iteration": 3, "x": 1.5}]
    assert scalars(tmp_path, "x") == [(3, 1.5)]


def scalars(workdir: Path, tag: str) -> list[tuple[int, float]]:
    reader = EventAccumulator(str(workdir / "tensorboard"))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def test_tensorboard_reads_back_what_was_logged_and_drops_what_a_resume_repeats(tmp_path):
    (sink,) = sinks.make(["tensorboard"], tmp_path, {})
    for step, value in enumerate((0.25, 0.5, 99.0)):
        sink({"reward": value, "tau": 0.125}, step)
    (resumed,) = sinks.make(["tensorboard"], tmp_path, {})
    for step, value in ((2, 0.75), (3, 1.0)):
        resumed({"reward": value, "tau": 0.125}, step)
    assert scalars(tmp_path, "reward") == [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_tensorboard_reads_a_resumed_run_last_where_the_clock_was_set_back(tmp_path, monkeypatch):
    for now, value in ((2 * 10**18, 0.25), (10**18, 0.75)):
        monkeypatch.setattr("time.time_ns", lambda now=now: now)
        (sink,) = sinks.make(["tensorboard"], tmp_path, {})
        sink({"reward": value}, 0)
    assert scalars(tmp_path, "reward") == [(0, 0.75)]


def test_tensorboard_files_are_tfrecords_that_begin_with_the_version(tmp_path):
    (sink,) = sinks.make(["tensorboard"], tmp_path, {})
    sink({"x": 1.0}, 5)
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:  # length, its checksum, message, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert events[0].file_version == "brain.Event:2"
    assert (events[2].step, events[2].summary.value[0].tag) == (5, "x")


def test_sinks_import_neither_jax_nor_torch():
    program = (
        "import pathlib, sys, tempfile; from ple_jax.training import sinks;"
        "made = sinks.make(['jsonl', 'tensorboard'], pathlib.Path(tempfile.mkdtemp()), {});"
        "[sink({'x': 1.0}, 0) for sink in made];"
        "sys.exit(str(sorted({'jax', 'torch', 'tensorflow'} & set(sys.modules))))"
    )
    ran = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert ran.stderr.strip() == "[]"


def test_an_unknown_sink_is_named_with_the_valid_ones_and_nothing_is_opened(tmp_path):
    with pytest.raises(UserError, match="'csv': choose from jsonl, tensorboard, wandb, mlflow, trackio"):
        sinks.make(["jsonl", "csv"], tmp_path / "run", {})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_package_is_an_error_with_the_command(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    for module in [m for m in sys.modules if m.startswith(f"{name}.")]:
        monkeypatch.setitem(sys.modules, module, None)
    for variable in ("WANDB_ERROR_REPORTING", "MLFLOW_TRACKING_URI", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(variable, "set")
    with pytest.raises(UserError, match=f"pip install {name}"):
        sinks.make([name], tmp_path, {})


class Tracker(ModuleType):
    """Stands in for wandb, mlflow and trackio, which are not dependencies: records every call."""

    def __init__(self, name: str):
        super().__init__(name)
        self.calls: list[tuple] = []
        self.found: list = []  # runs
        self.artifacts: list = []
        self.known: object = "an experiment"
        self.params: dict[str, str] = {}

    def __getattr__(self, name: str):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            given = {"search_runs": self.found, "list_artifacts": self.artifacts, "get_experiment_by_name": self.known}
            if name in given:
                return given[name]
            if name == "MlflowClient":
                return self
            data = SimpleNamespace(params=self.params)
            return SimpleNamespace(log=self.log, finish=self.finish, info=SimpleNamespace(run_id="r1"), data=data)

        return call


@pytest.fixture
def tracker(request, monkeypatch):
    for variable in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(variable)
    for variable in ("WANDB_ERROR_REPORTING", "MLFLOW_TRACKING_URI", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(variable, "set")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    fake = Tracker(request.param)
    monkeypatch.setitem(sys.modules, request.param, fake)
    return fake


@pytest.mark.parametrize("tracker", ["wandb", "trackio"], indirect=True)
def test_trackers_get_the_config_and_finite_metrics_with_their_step(tracker, tmp_path):
    (sink,) = sinks.make([tracker.__name__], tmp_path, {"ple": {"tau_0": 0.2}})
    sink({"x": 1.0, "kl": math.nan}, 4)
    (init, log) = tracker.calls
    assert init[0] == "init" and init[2]["config"] == {"ple": {"tau_0": 0.2}}
    assert log == ("log", ({"x": 1.0},), {"step": 4})


@pytest.mark.parametrize("tracker", ["mlflow"], indirect=True)
def test_mlflow_goes_on_with_the_run_of_the_same_work_directory(tracker, tmp_path):
    sinks.make(["mlflow"], tmp_path, {"ple": {"tau_0": 0.2}})[0]({"x": 1.0, "kl": math.inf}, 4)
    calls = {name: (args, kwargs) for name, args, kwargs in tracker.calls}
    assert calls["start_run"][0] == (None,)
    assert calls["log_params"][0] == ({"ple.tau_0": 0.2},)
    assert calls["log_metrics"] == (({"x": 1.0},), {"step": 4, "run_id": "r1"})
    tracker.found = [SimpleNamespace(info=SimpleNamespace(run_id="r0"))]
    sinks.make(["mlflow"], tmp_path, {})
    assert [args for name, args, _ in tracker.calls if name == "start_run"] == [(None,), ("r0",)]


@pytest.mark.parametrize("tracker", ["mlflow"], indirect=True)
def test_mlflow_takes_a_parameter_once(tracker, tmp_path):
    """It refuses another value: a run that goes on with more iterations has them as tags."""
    tracker.params = {"iterations": "5", "seed": "0"}
    sinks.make(["mlflow"], tmp_path, {"iterations": 8, "seed": 0, "new": 1})
    calls = {name: args for name, args, _ in tracker.calls}
    assert calls["log_params"] == ({"new": 1},) and calls["set_tags"] == ({"changed.iterations": "8"},)


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "mlflow"], indirect=True)
def test_a_tracker_is_told_of_an_end_and_not_of_a_stop(tracker, tmp_path):
    def ended():
        return [name for name, *_ in tracker.calls].count("end_run" if tracker.__name__ == "mlflow" else "finish")

    with pytest.raises(KeyboardInterrupt), sinks.opened(["jsonl", tracker.__name__], tmp_path, {}):
        raise KeyboardInterrupt
    assert ended() == 0
    with sinks.opened(["jsonl", tracker.__name__], tmp_path, {}) as made:
        assert len(made) == 2
    assert ended() == 1


@pytest.mark.parametrize("tracker", ["wandb"], indirect=True)
def test_only_training_is_tracked(tracker, tmp_path):
    config = tiny_config.get_config()
    config.sinks, config.iterations = ("wandb",), 1
    assert modes.train(FrozenConfigDict(config), tmp_path, "torch") == 0
    assert [name for name, *_ in tracker.calls].count("init") == 1
    assert modes.generate(FrozenConfigDict(config), tmp_path, "torch") == 0
    assert [name for name, *_ in tracker.calls].count("init") == 1


ROWS = [{"prompt": "a", "response": "b", "reward": 0.5}, {"prompt": "c", "response": "", "reward": None}]
TABLE = [{"iteration": 4, **row} for row in ROWS]


@pytest.mark.parametrize("tracker", ["wandb"], indirect=True)
def test_wandb_shows_samples_as_a_table(tracker, tmp_path):
    (sink,) = sinks.make(["wandb"], tmp_path, {})
    sinks.show_samples([sink], ROWS, 4)
    calls = {name: (args, kwargs) for name, args, kwargs in tracker.calls}
    columns = ["iteration", "prompt", "response", "reward"]
    assert calls["Table"][1] == {"columns": columns, "data": [[row[c] for c in columns] for row in TABLE]}
    assert list(calls["log"][0][0]) == ["heldout_samples"] and calls["log"][1] == {"step": 4}


@pytest.mark.parametrize("tracker", ["trackio"], indirect=True)
def test_trackio_shows_samples_as_a_table(tracker, tmp_path):
    (sink,) = sinks.make(["trackio"], tmp_path, {})
    sinks.show_samples([sink], ROWS, 4)
    calls = {name: (args, kwargs) for name, args, kwargs in tracker.calls}
    frame = calls["Table"][1]["dataframe"]
    assert frame.astype(object).where(frame.notna(), None).to_dict("records") == TABLE
    assert list(calls["log"][0][0]) == ["heldout_samples"] and calls["log"][1] == {"step": 4}


@pytest.mark.parametrize("tracker", ["mlflow"], indirect=True)
def test_mlflow_keeps_a_table_of_an_iteration_once(tracker, tmp_path):
    (sink,) = sinks.make(["mlflow"], tmp_path, {})
    tracker.artifacts = []
    sinks.show_samples([sink], ROWS, 4)
    (kept,) = [(args, kwargs) for name, args, kwargs in tracker.calls if name == "log_table"]
    assert kept[0] == ({key: [row[key] for row in TABLE] for key in TABLE[0]},)
    assert kept[1] == {"artifact_file": "heldout_samples/iteration_0004.json", "run_id": "r1"}
    tracker.artifacts = [SimpleNamespace(path="heldout_samples/iteration_0004.json")]
    sinks.show_samples([sink], ROWS, 4)  # a run that goes on evaluates where it stands once more
    assert sum(name == "log_table" for name, _, _ in tracker.calls) == 1


def test_a_sink_of_ones_own_shows_no_samples_and_need_not(tmp_path):
    seen = []
    own = lambda metrics, step: seen.append((metrics, step))  # noqa: E731
    sinks.show_samples([own, *sinks.make(["jsonl", "tensorboard"], tmp_path, {})], ROWS, 4)
    assert seen == []


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "mlflow"], indirect=True)
def test_variables_of_a_tracker_stand_above_ours(tracker, tmp_path, monkeypatch):
    name = tracker.__name__
    own = {
        "wandb": {"WANDB_PROJECT": "mine", "WANDB_NAME": "it", "WANDB_RESUME": "never"},
        "trackio": {"TRACKIO_PROJECT": "mine"},
        "mlflow": {"MLFLOW_EXPERIMENT_NAME": "mine", "MLFLOW_RUN_ID": "r7"},
    }[name]
    sinks.make([name], tmp_path, {})
    before, tracker.calls = tracker.calls, []
    for variable, value in own.items():
        monkeypatch.setenv(variable, value)
    sinks.make([name], tmp_path, {})
    ours, theirs = ({call: (args, kwargs) for call, args, kwargs in calls} for calls in (before, tracker.calls))
    if name == "mlflow":
        assert ours["set_experiment"][0] == ("ple_jax",) and "set_experiment" not in theirs
        monkeypatch.delenv("MLFLOW_RUN_ID")
        sinks.make([name], tmp_path, {})
        assert ("set_experiment", ("mine",), {}) in tracker.calls
        assert ours["start_run"][0] == (None,) and "search_runs" not in theirs
        assert theirs["start_run"] == (("r7",), {})  # a run keeps its own name, and has its own experiment
        return
    assert ours["init"][1]["project"] == "ple_jax"
    assert theirs["init"][1].get("project") == ("mine" if name == "trackio" else None)  # wandb reads its own
    if name == "wandb":
        assert ours["init"][1]["name"] == tmp_path.name and {"name", "resume"} & set(theirs["init"][1]) == set()


@pytest.mark.parametrize("tracker", ["mlflow"], indirect=True)
def test_artifacts_of_our_own_mlflow_store_stay_in_the_work_directory(tracker, tmp_path, monkeypatch):
    sinks.make(["mlflow"], tmp_path, {})  # with a store of the user's
    assert "create_experiment" not in [name for name, _, _ in tracker.calls]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracker.known = None
    sinks.make(["mlflow"], tmp_path, {})
    (made,) = [(args, kwargs) for name, args, kwargs in tracker.calls if name == "create_experiment"]
    assert made == (("ple_jax",), {"artifact_location": (tmp_path / "mlflow").as_uri()})
