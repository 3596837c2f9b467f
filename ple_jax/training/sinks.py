"""Sinks, which metrics go to. A sink is a plain callable `(metrics, step) -> None`; any function of your own is one too.

The sink of an experiment tracker also has a method `samples`, which shows texts of an evaluation. A tracker's own
environment variables (WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME, TRACKIO_PROJECT ...) take precedence over what it is given
here.
"""

import hashlib
import importlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ple_jax.core import files
from ple_jax.core.config import flatten
from ple_jax.core.errors import UserError
from ple_jax.core.types import Sink


def make(names: Sequence[str], workdir: Path, config: dict[str, Any]) -> list[Sink]:
    """Opens the named sinks.

    Args:
        names: some of "jsonl", "tensorboard", "wandb", "mlflow", "trackio".
        workdir: the run's work directory; the local sinks write into it.
        config: the resolved config, nested; the experiment trackers record it.

    Returns:
        One sink per name, in order. Sinks flush on every call: a killed run loses no finished iteration.

    Raises:
        UserError: if a name is unknown, or the package of a tracker is not installed.
    """
    check(names)
    workdir.mkdir(parents=True, exist_ok=True)
    return [_SINKS[name](workdir, config) for name in names]


@contextmanager
def opened(names: Sequence[str], workdir: Path, config: dict[str, Any]) -> Iterator[list[Sink]]:
    """Opens the named sinks as `make` does, and tells trackers where the run has ended well.

    Of a run that is stopped they hear nothing: some go on only with what has not ended.
    """
    sinks = make(names, workdir, config)
    yield sinks
    for sink in sinks:
        if isinstance(sink, Tracker):
            sink.close()


def check(names: Sequence[str]) -> None:
    """Raises a UserError for an unknown name, or a package that is not installed. It opens nothing."""
    for name in names:
        if name not in _SINKS:
            raise UserError(f"unknown sink {name!r}: choose from {', '.join(_SINKS)}")
        if name != "jsonl" and name not in sys.modules and importlib.util.find_spec(name) is None:
            raise UserError(f"sink {name!r} is not installed: run `pip install {name}`")


def line(metrics: Mapping[str, float], step: int) -> dict[str, Any]:
    """Returns the line of metrics.jsonl for these metrics; values that are not finite become None."""
    finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}  # JSON has no NaN
    # a numpy scalar becomes the Python number that it holds
    return json.loads(json.dumps({"iteration": step, **finite}, default=lambda scalar: scalar.item()))


_PROJECT, _TABLE = "ple_jax", "heldout_samples"  # what it is called there


class Tracker:
    """The sink of an experiment tracker, which can show tables too."""

    def __init__(self, log: Sink, table: Callable[[list[Mapping[str, Any]], int], None], close: Callable[[], object]):
        self._log, self._table, self.close = log, table, close

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        self._log(_finite(metrics), step)

    def samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Shows texts of an evaluation: rows with the same keys (prompt, response, reward ...)."""
        self._table([{"iteration": step, **row} for row in rows], step)


def show_samples(sinks: Sequence[Sink], rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Gives texts of an evaluation to the sinks that can show them."""
    for sink in sinks:
        if rows and (samples := getattr(sink, "samples", None)) is not None:
            samples(rows, step)


def _jsonl(workdir: Path, config: dict[str, Any]) -> Sink:
    path = workdir / "metrics.jsonl"
    return lambda metrics, step: files.append_line(path, json.dumps(line(metrics, step)))


def _tensorboard(workdir: Path, config: dict[str, Any]) -> Sink:
    # TensorBoard's own record format and messages: unlike tensorboardX, which imports torch wherever it is installed.
    # Its EventFileWriter would add a thread, and a queue that can lose the last iteration of a killed run.
    writer = _package("tensorboard.summary.writer.record_writer", "tensorboard").RecordWriter
    event = _package("tensorboard.compat.proto.event_pb2", "tensorboard")
    summary = _package("tensorboard.compat.proto.summary_pb2", "tensorboard").Summary
    folder = workdir / "tensorboard"
    folder.mkdir(exist_ok=True)
    # TensorBoard reads files by their names: this one comes last even where the clock was set back
    stamps = (file.name.split(".")[3] for file in folder.glob("events.out.tfevents.*.*"))
    newest = max((int(stamp) for stamp in stamps if stamp.isdecimal()), default=-1)
    path = folder / f"events.out.tfevents.{max(time.time_ns(), newest + 1):020d}.{os.getpid()}"

    def sink(metrics: dict[str, float], step: int) -> None:
        values = [summary.Value(tag=key, simple_value=value) for key, value in metrics.items()]
        events = [event.Event(wall_time=time.time(), step=step, summary=summary(value=values))]
        if not path.exists():
            start = event.SessionLog(status=event.SessionLog.START)  # drops what older files hold from this step on
            header = event.Event(wall_time=time.time(), file_version="brain.Event:2")
            events = [header, event.Event(wall_time=time.time(), step=step, session_log=start), *events]
        with path.open("ab") as file:
            for record in events:
                writer(file).write(record.SerializeToString())

    return sink


def _wandb(workdir: Path, config: dict[str, Any]) -> Sink:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its crash reports are telemetry
    wandb = _package("wandb", "wandb")
    given = {"project": _PROJECT, "name": workdir.name, "dir": str(workdir), "resume": "auto"}
    own = {key: value for key, value in given.items() if f"WANDB_{key.upper()}" not in os.environ}
    run = wandb.init(config=config, **own)

    def table(rows: list[Mapping[str, Any]], step: int) -> None:
        columns = list(rows[0])
        run.log({_TABLE: wandb.Table(columns=columns, data=[[row[c] for c in columns] for row in rows])}, step=step)

    return Tracker(lambda metrics, step: run.log(metrics, step=step), table, run.finish)


def _mlflow(workdir: Path, config: dict[str, Any]) -> Sink:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    store = f"sqlite:///{workdir.resolve() / 'mlflow.db'}"
    own = os.environ.setdefault("MLFLOW_TRACKING_URI", store) == store
    mlflow = _package("mlflow", "mlflow")
    if not {"MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"} & set(os.environ):  # a run has an experiment
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        if own and mlflow.get_experiment_by_name(name) is None:  # its artifacts would stand where the command was given
            mlflow.create_experiment(name, artifact_location=(workdir.resolve() / "mlflow").as_uri())
        mlflow.set_experiment(name)
    if (run_id := os.environ.get("MLFLOW_RUN_ID")) is not None:
        mlflow.start_run(run_id)  # and keeps its name
    else:
        known = mlflow.search_runs(filter_string=f"run_name LIKE '%-{_digest(workdir)}'", output_format="list")
        run_id = known[0].info.run_id if known else None
        run_id = mlflow.start_run(run_id, run_name=f"{workdir.name}-{_digest(workdir)}").info.run_id
    # what was recorded once cannot change: a run may go on with more iterations, on another mesh ...
    now, known = flatten(config, whole=()), mlflow.get_run(run_id).data.params
    mlflow.log_params({key: value for key, value in now.items() if key not in known})
    texts = {key: str(now[key]) for key in known if key in now}
    # it cuts a long one, at 500 characters or more
    if changed := {key: s for key, s in texts.items() if known[key] != (s[: len(known[key])] if len(s) > 500 else s)}:
        mlflow.set_tags({f"changed.{key}": value for key, value in changed.items()})

    def table(rows: list[Mapping[str, Any]], step: int) -> None:
        file = f"{_TABLE}/iteration_{step:04d}.json"
        there = [found.path for found in mlflow.MlflowClient().list_artifacts(run_id, _TABLE)]
        if file not in there:  # a run that goes on evaluates the iteration that it stands at again, and rows are appended
            columns = {key: [row[key] for row in rows] for key in rows[0]}
            mlflow.log_table(columns, artifact_file=file, run_id=run_id)

    return Tracker(lambda metrics, step: mlflow.log_metrics(metrics, step=step, run_id=run_id), table, mlflow.end_run)


def _trackio(workdir: Path, config: dict[str, Any]) -> Sink:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    trackio = _package("trackio", "trackio")
    name, project = f"{workdir.name}-{_digest(workdir)}", os.environ.get("TRACKIO_PROJECT", _PROJECT)
    run = trackio.init(project=project, name=name, config=config, resume="allow")

    def table(rows: list[Mapping[str, Any]], step: int) -> None:
        frame = _package("pandas", "pandas").DataFrame(rows)  # which trackio brings along
        run.log({_TABLE: trackio.Table(dataframe=frame)}, step=step)

    return Tracker(lambda metrics, step: run.log(metrics, step=step), table, run.finish)


def _digest(workdir: Path) -> str:
    """Returns a digest of the work directory's path.

    It tells work directories of the same name apart, and finds the tracker's run again after a resume.
    """
    return hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:8]


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if math.isfinite(value)}  # the trackers refuse or misdraw NaN


def _package(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"sink {package!r} is not installed ({error}): run `pip install {package}`") from error


_SINKS: dict[str, Callable[[Path, dict[str, Any]], Sink]] = {
    "jsonl": _jsonl,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
