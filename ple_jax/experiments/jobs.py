"""Runs `ple_jax.main` as jobs, each in a process: a job that is done is not run again, and a stop ends all of them."""

import argparse
import collections
import contextlib
import fcntl
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ple_jax import main as entry
from ple_jax.core import identity
from ple_jax.core.config import differing
from ple_jax.core.errors import UserError
from ple_jax.core.secrets import redacted
from ple_jax.training.workdir import lock


class Job(NamedTuple):
    """One command `python -m ple_jax.main`: its arguments, its work directory, and the file that it writes there last."""

    name: str
    arguments: tuple[str, ...]
    workdir: Path
    last: str

    @property
    def result(self) -> Path:
        return self.workdir / self.last


class Outcome(NamedTuple):
    """How a job ended: exit code 0 and no text, or another code (negative for a signal) and the last line of its log."""

    code: int
    says: str = ""


def run(
    jobs: Sequence[Job], out: Path, *, parallel: int = 1, done: Callable[[Job], None] | None = None
) -> dict[str, Outcome]:
    """Executes the jobs that are not done yet, at most `parallel` at a time.

    What a job prints is appended to OUT/NAME.log. Once it has ended well, OUT/NAME.done holds what it was asked for, and the
    same is not run again. If it is asked for something else, `ple_jax.main` decides whether it may use the work directory.

    Args:
        done: called with every job that has just ended well.

    Returns:
        How each job ended, by its name, in the order of `jobs`.

    Raises:
        UserError: if a command line is wrong, before anything runs.
        KeyboardInterrupt: passed on after all running jobs were stopped.
    """
    wanted = {job.name: asked(job, out) for job in jobs}
    todo = [job for job in jobs if not is_done(job, out, wanted[job.name])]
    if len(todo) < len(jobs):
        say(f"{len(jobs) - len(todo)} of {len(jobs)} are done already")
    outcomes = {job.name: Outcome(0) for job in jobs}
    processes = _Processes(out, parallel)
    with ThreadPoolExecutor(parallel) as pool:
        try:
            futures = {pool.submit(processes.run, job, wanted[job.name]): job for job in todo}
            for number, future in enumerate(as_completed(futures), 1):
                job, (outcome, seconds) = futures[future], future.result()
                name = job.name
                outcomes[name] = outcome
                if done is not None and not outcome.code:
                    done(job)
                failed = f"exit code {outcome.code}, {outcome.says} (all of it is in {out / f'{name}.log'})"
                say(f"[{number}/{len(todo)}] {name}: {failed if outcome.code else 'done'} after {seconds:.0f} s")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # before what runs ends, and makes room for another one
            processes.stop()
            raise
    return outcomes


class _Processes:
    """The processes that are running, so that all of them can be stopped; `run` is called in several threads at once."""

    def __init__(self, out: Path, parallel: int):
        self._out = out
        self._cores: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
        for share in _shares(parallel):
            self._cores.put(share)
        self._running: list[subprocess.Popen[bytes]] = []
        self._stopping = threading.Event()
        self._folders: dict[Path, threading.Lock] = collections.defaultdict(threading.Lock)  # one process in each at a time

    def run(self, job: Job, wanted: str) -> tuple[Outcome, float]:
        """Executes a job, and marks it as done if it ended well; returns how it ended, and after how many seconds."""
        with self._folders[job.workdir]:
            cores = self._cores.get()
            try:
                return self._run(job, wanted, cores)
            finally:
                self._cores.put(cores)

    def _run(self, job: Job, wanted: str, cores: set[int]) -> tuple[Outcome, float]:
        _wait_until_free(job.workdir, self._stopping)
        started, log = time.monotonic(), self._out / f"{job.name}.log"
        with log.open("ab") as file:
            process = subprocess.Popen(command(job), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
            self._running.append(process)
            if cores:
                with contextlib.suppress(ProcessLookupError):  # it has ended already
                    os.sched_setaffinity(process.pid, cores)  # long before it counts them
            if self._stopping.is_set():  # between two lines of this function
                process.terminate()
            code = process.wait()
        if code == 0:
            mark(job, self._out).write_text(wanted, encoding="utf-8")
        return Outcome(code, _last_line(log) if code else ""), time.monotonic() - started

    def stop(self) -> None:
        self._stopping.set()
        for process in self._running:
            process.terminate()  # does nothing to one that has ended


def _shares(parallel: int) -> list[set[int]]:
    """Returns the cores of each of `parallel` processes; the sets are empty where cores are not divided.

    Giving each process cores of its own is faster than letting all share them: no operation is twice as fast on two cores.
    """
    cores = sorted(os.sched_getaffinity(0)) if parallel > 1 and hasattr(os, "sched_setaffinity") else []
    return [set(cores[i::parallel]) if len(cores) >= parallel else set() for i in range(parallel)]


def command(job: Job) -> list[str]:
    return [sys.executable, "-m", "ple_jax.main", *job.arguments]


def say(line: str) -> None:
    """Prints a line and flushes it, so that it is seen at once, also through a pipe."""
    print(line, flush=True)


def parsed(arguments: Sequence[str]) -> entry.CommandLine:
    """Parses arguments of `ple_jax.main`; a mistake in them raises main's own error."""
    return entry.parse(["ple_jax.main", *arguments])


def asked(job: Job, out: Path) -> str:
    """Returns all that a job's command line asks for, with the whole config, as JSON; it is the same wherever OUT is."""
    found = parsed(job.arguments)
    text = json.dumps({**found._asdict(), "config": redacted(found.config.to_dict())}, indent=1, default=str)
    return anywhere(text, out)


def anywhere(text: str, out: Path) -> str:
    """Replaces the path of the folder `out` by OUT in a text of JSON."""
    return text.replace(json.dumps(f"{out}/")[1:-1], "OUT/")


def mark(job: Job, out: Path) -> Path:
    """Returns the path of the file that marks a job as done, and holds what the job was asked for."""
    return out / f"{job.name}.done"


def is_done(job: Job, out: Path, wanted: str | None = None) -> bool:
    """Says whether a job has ended well, with all that it asks for today; `wanted` is the job's `asked`, if known."""
    file = mark(job, out)
    return job.result.exists() and file.exists() and is_wanted(job, out, file.read_text(encoding="utf-8"), wanted)


def is_wanted(job: Job, out: Path, kept: str, wanted: str | None = None) -> bool:
    """Says whether a mark is of what a job asks for today; `kept` is the content of the mark.

    Flags and keys of the config that did not exist when the mark was written count as having their defaults there.
    """
    return not differences(job, out, kept, wanted)


def differences(job: Job, out: Path, kept: str, wanted: str | None = None) -> list[str]:
    """Returns the flags and keys in which a mark, of content `kept`, differs from what the job asks for; as `is_wanted`."""
    today, before = json.loads(asked(job, out) if wanted is None else wanted), None
    with contextlib.suppress(ValueError):
        before = _completed(json.loads(anywhere(kept, out)), today)
    if before == today:
        return []
    return differing(before, today) if isinstance(before, Mapping) else ["what it asks for"]


def _completed(kept: Any, today: Any) -> Any:
    """Returns the content of a mark, to which flags and keys that exist since are added at their defaults."""
    if not isinstance(kept, Mapping) or not isinstance(kept.get("config"), Mapping):
        return kept
    flags = json.loads(json.dumps({**entry.CommandLine(ConfigDict(), Path(), "", "")._asdict(), "config": {}}, default=str))
    config = json.loads(json.dumps(identity.completed(kept["config"], today["config"]), default=str))
    return {**flags, **kept, "config": config}


def _wait_until_free(workdir: Path, stopping: threading.Event) -> None:
    """Waits until no process works in a folder: one may have outlived the script that started it."""
    # where there is no lock to wait for, the job itself says what is wrong; NFS locks only what is open for writing
    with contextlib.suppress(OSError), (workdir / ".lock").open("r+") as lock:
        while not stopping.is_set():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                stopping.wait(1.0)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


@contextlib.contextmanager
def reported(out: Path) -> Iterator[None]:
    """Locks OUT for this process, and turns errors into one line and an exit code, as `ple_jax.main` does.

    A stop, by Ctrl-C or SIGTERM, gives the exit code 130.
    """

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    # SIGINT too, though Python has a handler for it: where a shell starts this in the background, it is ignored
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with entry.one_line_errors(), _locked(out):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file; give a folder, which is created if need be")
    try:
        with lock(out):
            yield
    except UserError as error:
        if str(error).startswith(f"--workdir={out} "):  # of the lock, in words of `ple_jax.main`
            raise UserError(str(error).replace("--workdir", "--out")) from error
        raise


def overrides(rest: Sequence[str]) -> tuple[str, ...]:
    """Returns the arguments after `--`, which must all be overrides of the config.

    Raises:
        UserError: if there is another argument; other flags are set by the scripts themselves.
    """
    for argument in rest:
        if not re.match(r"--(no)?config\.", argument):
            raise UserError(f"{argument!r} after `--`: overrides of the config stand there, --config.KEY=VALUE")
    return tuple(rest)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)
