"""The work directory: who may write to it, which config it belongs to, and how its files are written.

config.json  environment.json  metrics.jsonl  bad_records.jsonl  rollouts/  evaluations/  quarantine/  rewards.sqlite
checkpoints/  best/  warm_up/  adapter/  reward_model/  responses/  judgement.json  tensorboard/  serving/
report.html  summary.json (written last: it marks a finished run)
"""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from ple_jax.core import backends, commits, identity
from ple_jax.core.config import AUTO, differing, flatten
from ple_jax.core.errors import Damaged, UserError
from ple_jax.core.files import plain, read_json
from ple_jax.core.forks import in_children
from ple_jax.core.identity import ACCEPTED, EXECUTION, FORMAT, LENGTH, comparable
from ple_jax.core.secrets import redacted

SUMMARY = "summary.json"
_SAME = "where this is the command that began the run"
_FILES = (
    "rollouts", "evaluations", "checkpoints", "best", "warm_up", "adapter", "reward_model", "responses", "metrics.jsonl",
    "summary.json", "report.html",
)  # fmt: skip


@contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Holds the lock of a work directory inside the context, so that only one process writes to it.

    The kernel frees the lock when the process ends, however it ends. Children that the process forks do not hold it.

    Raises:
        UserError: if another process holds it, of this host or another one, or the folder cannot be written or locked.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = (workdir / ".lock").open("a+", errors="replace")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error}") from error
    with handle, in_children(handle.close):  # a lock of flock is the open file's: what stays open keeps it
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            host, colon, process = handle.read().strip().rpartition(":")
            who = f"{process or 'unknown'}{f' on {host}' if colon else ''}"
            raise UserError(
                f"--workdir={workdir} is in use by process {who}; wait for it, stop it, or give another --workdir"
            ) from None
        except OSError as error:
            raise UserError(
                f"--workdir={workdir} cannot be locked ({error}): give another --workdir, on a file system that has locks,"
                " or mount this one with them"
            ) from error
        handle.truncate(0)
        handle.write(f"{socket.gethostname()}:{os.getpid()}\n")
        handle.flush()
        yield


def begun(config: Any, workdir: Path, backend: str) -> Any:
    """Returns the config with what the machine and the day decide filled in, as it was when the directory's run began.

    Chat templates ask for the day, and a run that goes on tomorrow must have the prompts that it began with. Likewise a run
    that goes on elsewhere must have the same dtype, and the numbers that were fitted to a memory. What no run has decided
    yet is decided now, also where a mode that trains nothing has left the config.json of another config.
    """
    flat = flatten(config.to_dict())
    fit = [key for key in AUTO if flat[key] == "auto"]
    if config.task.date is not None and config.model.dtype != "auto" and not fit:
        return config
    kept = recorded(workdir) or {}
    if not _work(workdir) and not _is_of(kept, config, backend):
        kept = {}
    whole = ConfigDict(config.to_dict())
    if whole.task.date is None:
        whole.task.date = kept.get("task", {}).get("date") or today().isoformat()
    if whole.model.dtype == "auto":
        whole.model.dtype = kept.get("model", {}).get("dtype") or backends.load(backend).fast_dtype(config)
    before = flatten(kept)
    with whole.ignore_type():
        whole.update_from_flattened_dict({key: before[key] for key in fit if key in before})
    return FrozenConfigDict(whole)


def _is_of(kept: Mapping[str, Any], config: Any, backend: str) -> bool:
    """Says whether a config.json has all that a config says, and differs only in what is decided when a run begins."""
    wanted = plain(identity.run_keys(config, backend, {}))
    given, names = flatten(wanted), ("inputs", "changed", "algorithm_kwargs")  # a variant's own knobs are filled in
    differ = [key for key in differing(identity.completed(kept, wanted), wanted) if key.split(".")[0] not in names]
    return all(given.get(key) in (None, "auto") and key in ("task.date", "model.dtype", *AUTO) for key in differ)


def today() -> date:
    """Returns the date by this machine's clock."""
    return date.today()


def recorded(workdir: Path) -> dict[str, Any] | None:
    """Reads config.json. Returns None if there is none.

    Raises:
        Damaged: if it is not the config of a run.
        UserError: if it is that of a run of another format.
    """
    remedy = f"put a copy of it back, or, {_SAME}, remove it and add --accept=config"
    found = redacted(read_json(workdir / "config.json", remedy=remedy))
    if found is None:
        return None
    if (kind := found.get("format", 1)) != FORMAT and type(kind) is int:  # the first one had no key of this name
        raise identity.other_format(f"{workdir} holds a run", kind)
    parts = ("inputs", "model", "reward", "task")
    says = [f"{key} is no object" for key in parts if not isinstance(found.get(key, {}), dict)]
    known = identity.known_keys()
    says += [f"{key[:40]!r} is none of its keys" for key in found if key not in known]
    if says := says or ["it has no format"] * (kind != FORMAT):
        raise Damaged(f"{workdir / 'config.json'} is damaged, or no config of a run ({says[0]}); {remedy}")
    return found


def check_config(workdir: Path, wanted: Mapping[str, Any], *, accept: Sequence[str] = ()) -> dict[str, Any]:
    """Checks a directory in which nothing is to be trained, and returns the contents for its config.json.

    They are what config.json holds already, or in a directory without work what is `wanted`.

    Args:
        accept: the changes that the user vouches for, some of `identity.ACCEPTED`.

    Raises:
        UserError: if the directory belongs to another config; the message names the keys that differ.
    """
    return _compared(workdir, wanted, accept)[0] or dict(wanted)


def going_on(
    workdir: Path,
    wanted: Mapping[str, Any],
    *,
    accept: Sequence[str] = (),
    check_length: Callable[[Mapping[str, Any], int], None] = lambda found, done: None,
) -> dict[str, Any]:
    """Returns the contents for config.json where training begins or goes on.

    They are what is `wanted`, and under "changed" what was changed since the run began: after how many iterations, from what
    and to what.

    Args:
        accept: as in `check_config`.
        check_length: (config.json, finished iterations) -> raises a UserError if the run cannot be as long as is wanted.

    Raises:
        UserError: as `check_config`.
    """
    found, keys = _compared(workdir, wanted, accept)
    done = max(commits.steps(workdir / "checkpoints"), default=0)
    if found is None:
        gone = [{"after": done, "config.json": "was gone"}] if _work(workdir) else []
        return {**wanted, **({"changed": gone} if gone else {})}
    if any(key in LENGTH for key in keys):
        check_length(found, done)
    before, after = flatten(found), flatten(plain(wanted))
    new = {"after": done} | {key: [before.get(key), after.get(key)] for key in keys}
    changed = [*found.get("changed", []), *([new] if keys else [])]
    return {**wanted, **({"changed": changed} if changed else {})}


def changed_since(workdir: Path, iteration: int) -> set[str]:
    """Returns the keys that were changed when `iteration` iterations were finished, as config.json has them."""
    return {key for change in _changes(workdir, iteration) for key in change}


def was_its_end(workdir: Path, iteration: int) -> bool:
    """Says whether a run that was made longer ended at this iteration before, and so was evaluated there."""
    return any(change.get("iterations", [None])[0] == iteration for change in _changes(workdir, iteration))


def _changes(workdir: Path, after: int) -> list[Mapping[str, Any]]:
    """Returns what config.json says was changed when `after` iterations were finished."""
    return [change for change in (recorded(workdir) or {}).get("changed", []) if change["after"] == after]


def _compared(workdir: Path, wanted: Mapping[str, Any], accept: Sequence[str]) -> tuple[dict[str, Any] | None, list[str]]:
    """Reads config.json of a directory with work in it, and finds the keys that differ from those wanted.

    Returns None and no keys if there is no config.json, or no work.

    Raises:
        UserError: if keys differ that must not, or there is work but no config.json.
    """
    found, work = recorded(workdir), _work(workdir)
    if found is None and work and "config" not in accept:
        raise UserError(
            f"--workdir={workdir} holds {work[0]} but no config.json; give an empty folder, or, {_SAME}, add --accept=config"
        )
    # without any work in it a directory may change hands: a mistake that was mended should not need another one
    if found is None or not work:
        return None, []
    found = identity.completed(found, wanted)
    if second := wanted.get("inputs", {}).get("second"):  # which runs of an earlier version do not have
        found = {**found, "inputs": {"second": second} | found.get("inputs", {})}
    day = wanted.get("task", {}).get("date")
    if day and not found.get("task", {}).get("date"):  # of no known day
        found = {**found, "task": {**found.get("task", {}), "date": day}}
    keys = differing(*map(comparable, ({k: v for k, v in found.items() if k != "changed"}, plain(wanted))))
    keys = [key for key in keys if day or key != "task.date"]  # where none is asked for it is that of the run
    vouched = [key for name in accept for key in ACCEPTED[name]]
    if refused := [key for key in keys if key not in (*EXECUTION, *LENGTH, *vouched)]:
        names = ", ".join(f"{key} (the content)" if key.startswith("inputs.") else key for key in refused)
        says = f"--workdir={workdir} belongs to another config, differing in {names}; {_remedy(refused)}"
        raise UserError(f"{says} (its config.json has its own)")
    return found, keys


def _remedy(refused: Sequence[str]) -> str:
    mended = {name for name, keys in ACCEPTED.items() for key in refused if key in keys}
    if all(any(key in ACCEPTED[name] for name in mended) for key in refused):
        return f"to go on with it as it is now, add --accept={','.join(sorted(mended))}; or give another --workdir"
    return "give the same config or another --workdir"


def _work(workdir: Path) -> list[str]:
    return [name for name in _FILES if (workdir / name).exists()]


def summary(workdir: Path) -> dict[str, Any]:
    """Reads summary.json. Returns an empty dict if there is none or it is damaged, as --mode=train makes it again."""
    try:
        found = read_json(workdir / SUMMARY) or {}
    except Damaged:
        return {}
    return found if {"algorithm", "seed"} <= found.keys() else {}
