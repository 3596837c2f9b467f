"""The work directory: who may write to it, which config it belongs to, and how its files are written.

config.json  environment.json  metrics.jsonl  bad_records.jsonl  rollouts/  evaluations/  quarantine/  rewards.sqlite
checkpoints/  warm_up/  adapter/  reward_model/  responses/  judgement.json  tensorboard/  serving/
report.html  summary.json (written last: it marks a finished run)
"""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ple_jax.core.config import differing
from ple_jax.core.errors import Damaged, UserError
from ple_jax.core.files import plain, read_json
from ple_jax.core.identity import EXECUTION, FORMAT, upgraded

SUMMARY = "summary.json"
_FILES = (
    "rollouts", "evaluations", "checkpoints", "warm_up", "adapter", "reward_model", "responses", "metrics.jsonl",
    "summary.json", "report.html",
)  # fmt: skip


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


def check_config(workdir: Path, wanted: Mapping[str, Any]) -> None:
    """Raises a UserError unless the directory is new or its config.json is the `wanted` one; names the differing keys."""
    found = read_json(workdir / "config.json", remedy="put a copy of it back, or give another --workdir")
    work = [name for name in _FILES if (workdir / name).exists()]
    if found is not None and work and found.get("format", 1) != FORMAT:
        found = _upgraded(found, wanted, workdir)
    if found is None:
        if work:
            raise UserError(f"--workdir={workdir} holds {work[0]} but no config.json; give an empty folder")
    # without any work in it a directory may change hands: a mistake that was mended should not need another one
    elif work and (keys := [key for key in differing(found, plain(wanted)) if key not in EXECUTION]):
        raise UserError(
            f"--workdir={workdir} belongs to another config, differing in {', '.join(keys)};"
            " give the same config or another --workdir"
        )


def summary(workdir: Path) -> dict[str, Any]:
    """What summary.json says; nothing where there is none, or a damaged one: --mode=train makes it again."""
    try:
        return read_json(workdir / SUMMARY) or {}
    except Damaged:
        return {}


def _upgraded(found: Mapping[str, Any], wanted: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """The config of a finished run of format 1 as it would be written today.

    Raises:
        UserError: the run is not finished, or of a later format: it cannot go on here.
    """
    if found.get("format", 1) > FORMAT or not (workdir / "summary.json").exists():
        raise UserError(
            f"--workdir={workdir} holds a run of format {found.get('format', 1)}, and this version goes on with format"
            f" {FORMAT}: finish it with the version that began it, or give another --workdir"
        )
    now = upgraded(found)
    inputs = {**now["inputs"], "reward": wanted["inputs"].get("reward")}  # versions of rewards were digests of files
    return {**now, "inputs": {k: v for k, v in inputs.items() if v is not None}}
