"""Where metrics go. A sink is a plain callable `(metrics, step) -> None`; any function of your own is one too."""

import hashlib
import importlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ple_jax.core import files
from ple_jax.core.config import flatten
from ple_jax.core.errors import UserError
from ple_jax.core.types import Sink


def make(names: Sequence[str], workdir: Path, config: dict[str, Any]) -> list[Sink]:
    """Opens the named sinks.

    Args:
        names: of "jsonl", "tensorboard", "wandb", "mlflow", "trackio".
        workdir: the run's work directory; the local sinks write into it.
        config: the resolved config, nested; the experiment trackers record it.

    Returns:
        One sink per name, in order. Sinks flush on every call: a killed run loses no finished iteration.

    Raises:
        UserError: an unknown name, or a tracker whose package is not installed.
    """
    check(names)
    workdir.mkdir(parents=True, exist_ok=True)
    return [_SINKS[name](workdir, config) for name in names]


def check(names: Sequence[str]) -> None:
    """Raises a UserError for an unknown name, or a package that is not there; opens nothing."""
    for name in names:
        if name not in _SINKS:
            raise UserError(f"unknown sink {name!r}: choose from {', '.join(_SINKS)}")
        if name != "jsonl" and name not in sys.modules and importlib.util.find_spec(name) is None:
            raise UserError(f"sink {name!r} is not installed: run `pip install {name}`")


def line(metrics: Mapping[str, float], step: int) -> dict[str, Any]:
    """The line of metrics.jsonl for these metrics."""
    finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}  # JSON has no NaN
    # a numpy scalar becomes the Python number that it holds
    return json.loads(json.dumps({"iteration": step, **finite}, default=lambda scalar: scalar.item()))


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
    run = wandb.init(project="ple_jax", name=workdir.name, dir=str(workdir), config=config, resume="auto")
    return lambda metrics, step: run.log(_finite(metrics), step=step)


def _mlflow(workdir: Path, config: dict[str, Any]) -> Sink:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{workdir.resolve() / 'mlflow.db'}")
    mlflow = _package("mlflow", "mlflow")
    mlflow.set_experiment("ple_jax")
    known = mlflow.search_runs(filter_string=f"run_name LIKE '%-{_digest(workdir)}'", output_format="list")
    run_id = known[0].info.run_id if known else None
    run_id = mlflow.start_run(run_id, run_name=f"{workdir.name}-{_digest(workdir)}").info.run_id
    mlflow.log_params(flatten(config, whole=()))
    return lambda metrics, step: mlflow.log_metrics(_finite(metrics), step=step, run_id=run_id)


def _trackio(workdir: Path, config: dict[str, Any]) -> Sink:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    trackio = _package("trackio", "trackio")
    name = f"{workdir.name}-{_digest(workdir)}"
    run = trackio.init(project="ple_jax", name=name, config=config, resume="allow")
    return lambda metrics, step: run.log(_finite(metrics), step=step)


def _digest(workdir: Path) -> str:
    """Tells apart work directories of one name, and finds the tracker's run again after a resume."""
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
