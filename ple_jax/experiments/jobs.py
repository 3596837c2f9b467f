"""Runs of `ple_jax.main` that are started once: what is done is not run again, a stop ends them all."""

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
from ple_jax.core.errors import UserError
from ple_jax.core.secrets import redacted
from ple_jax.training.interrupt import MESSAGE
from ple_jax.training.workdir import lock


class Job(NamedTuple):
    """One `python -m ple_jax.main` with its arguments, its work directory, and the file in it that it writes last."""

    name: str
    arguments: tuple[str, ...]
    workdir: Path
    last: str

    @property
    def result(self) -> Path:
        return self.workdir / self.last


class Outcome(NamedTuple):
    """How a job ended: exit code 0 and nothing, or another one (negative: of a signal) and the last line of its log."""

    code: int
    says: str = ""


def run(
    jobs: Sequence[Job], out: Path, *, parallel: int = 1, done: Callable[[Job], None] | None = None
) -> dict[str, Outcome]:
    """Runs what is not done yet, at most `parallel` at a time; by name how each ended, in the order of the jobs.

    What a job prints is appended to OUT/NAME.log. OUT/NAME.done holds what it was asked for when it ended well: the same
    is not run again, and of anything else `ple_jax.main` itself says whether the work directory is its own.

    Args:
        done: called with every job that has just ended well.

    Raises:
        UserError: a command line that is wrong, before anything runs.
        KeyboardInterrupt: as it came, when all that ran have stopped.
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
    """What runs at the moment, so that all of it can be stopped; `run` is called in several threads at once."""

    def __init__(self, out: Path, parallel: int):
        self._out = out
        self._cores: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
        for share in _shares(parallel):
            self._cores.put(share)
        self._running: list[subprocess.Popen[bytes]] = []
        self._stopping = threading.Event()
        self._folders: dict[Path, threading.Lock] = collections.defaultdict(threading.Lock)  # one process in each at a time

    def run(self, job: Job, wanted: str) -> tuple[Outcome, float]:
        """Runs a job to its end, and marks it as done if it ended well; how it ended, and after how many seconds."""
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
    """The cores of each of so many processes; empty where they are not parted.

    A process a core is faster than two that both use all: no operation takes two cores half the time of one.
    """
    cores = sorted(os.sched_getaffinity(0)) if parallel > 1 and hasattr(os, "sched_setaffinity") else []
    return [set(cores[i::parallel]) if len(cores) >= parallel else set() for i in range(parallel)]


def command(job: Job) -> list[str]:
    return [sys.executable, "-m", "ple_jax.main", *job.arguments]


def say(line: str) -> None:
    """A line for whoever watches, also through a pipe."""
    print(line, flush=True)


def parsed(arguments: Sequence[str]) -> entry.CommandLine:
    """What arguments of `ple_jax.main` ask for; a mistake in them is main's own error."""
    return entry.parse(["ple_jax.main", *arguments])


def asked(job: Job, out: Path) -> str:
    """All that a command line asks for, with the whole config, as text; the same wherever OUT is."""
    found = parsed(job.arguments)
    text = json.dumps({**found._asdict(), "config": redacted(found.config.to_dict())}, indent=1, default=str)
    return anywhere(text, out)


def anywhere(text: str, out: Path) -> str:
    """A text of JSON in which OUT stands for the folder of that name."""
    return text.replace(json.dumps(f"{out}/")[1:-1], "OUT/")


def mark(job: Job, out: Path) -> Path:
    """What says that a job is done."""
    return out / f"{job.name}.done"


def is_done(job: Job, out: Path, wanted: str | None = None) -> bool:
    """Whether a job has ended well, with all that it asks for today; `wanted` is `asked` of it, where that is known."""
    file = mark(job, out)
    return job.result.exists() and file.exists() and is_wanted(job, out, file.read_text(encoding="utf-8"), wanted)


def is_wanted(job: Job, out: Path, kept: str, wanted: str | None = None) -> bool:
    """Whether a mark is of what a job asks for, but for what could not be asked for when it was written."""
    today = json.loads(asked(job, out) if wanted is None else wanted)
    with contextlib.suppress(ValueError):
        return _completed(json.loads(anywhere(kept, out)), today) == today
    return False


def _completed(kept: Any, today: Any) -> Any:
    """What a mark says, with the flags and the keys that there are since, at their defaults."""
    if not isinstance(kept, Mapping) or not isinstance(kept.get("config"), Mapping):
        return kept
    flags = json.loads(json.dumps({**entry.CommandLine(ConfigDict(), Path(), "", "")._asdict(), "config": {}}, default=str))
    config = json.loads(json.dumps(identity.completed(kept["config"], today["config"]), default=str))
    return {**flags, **kept, "config": config}


def _wait_until_free(workdir: Path, stopping: threading.Event) -> None:
    """A process may have outlived the script that started it, and still be at work."""
    with contextlib.suppress(FileNotFoundError), (workdir / ".lock").open() as lock:
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
    """One process in OUT; what the user can mend, and a stop by Ctrl-C or SIGTERM, as one line and an exit code."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    # SIGINT too, though Python has a handler for it: where a shell starts this in the background, it is ignored
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out={out} is a file; give a folder, which is created if need be")
        with lock(out):
            yield
    except UserError as error:
        says = str(error)
        if says.startswith(f"--workdir={out} "):  # of the lock, in words of `ple_jax.main`
            says = says.replace("--workdir", "--out")
        print(f"error: {' '.join(says.split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(MESSAGE, file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def overrides(rest: Sequence[str]) -> tuple[str, ...]:
    """What stands after `--`: overrides of the config and nothing else.

    Raises:
        UserError: another flag, which a script gives by itself.
    """
    for argument in rest:
        if not re.match(r"--(no)?config\.", argument):
            raise UserError(f"{argument!r} after `--`: overrides of the config stand there, --config.KEY=VALUE")
    return tuple(rest)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)
