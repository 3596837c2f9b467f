"""The work directory: who may write to it, which config it belongs to, and how its files are written.

config.json  environment.json  metrics.jsonl  bad_records.jsonl  rollouts/  evaluations/  quarantine/  rewards.sqlite
checkpoints/  adapter/  reward_model/  responses/  judgement.json  tensorboard/  serving/
report.html  summary.json (written last: it marks a finished run)
"""

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ple_jax.core.config import EXECUTION, UserError, differing

_FILES = (
    "rollouts", "evaluations", "checkpoints", "adapter", "reward_model", "responses", "metrics.jsonl", "summary.json",
    "report.html",
)  # fmt: skip


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Atomically; NaN and infinities become null and "inf"."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(_plain(value), file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's content; None if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged, or no file of a run ({error}); give another --workdir") from error


@contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """One writer per work directory. The kernel frees the lock when the process ends, however it ends.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = (workdir / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error}") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise UserError(
                f"--workdir={workdir} is in use by process {handle.read().strip() or 'unknown'};"
                " wait for it, stop it, or give another --workdir"
            ) from None
        handle.truncate(0)
        handle.write(f"{os.getpid()}\n")
        handle.flush()
        yield


def check(workdir: Path, wanted: Mapping[str, Any]) -> None:
    """Raises a UserError unless the directory is new or its config.json is the `wanted` one; names the differing keys."""
    found = read_json(workdir / "config.json")
    work = [name for name in _FILES if (workdir / name).exists()]
    if found is None:
        if work:
            raise UserError(f"--workdir={workdir} holds {work[0]} but no config.json; give an empty folder")
    # without any work in it a directory may change hands: a mistake that was mended should not need another one
    elif work and (keys := [key for key in differing(found, _plain(wanted)) if key not in EXECUTION]):
        raise UserError(
            f"--workdir={workdir} belongs to another config, differing in {', '.join(keys)};"
            " give the same config or another --workdir"
        )
