"""Several JAX processes, one per host or one per device: how they find one another, hear of calls, and are ended.

`jax.distributed` starts a service in process 0, through which all processes learn of one another's devices; arrays and
programs span all of them. `ple_jax.core.together` says who leads and what the others do. Calls travel through that service's
key-value store, so that a process that waits for one holds no device.

Every process reports there that it is alive, and what went wrong in it. A thread of process 0 reads these reports. If
another process failed or is gone, it says so, once, and ends the program. If another process was asked to stop, process 0
stops, as a scheduler may tell any of them first.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from ple_jax.core import launch, together
from ple_jax.core.errors import UserError, of_the_machine
from ple_jax.core.secrets import redacted

_GRACE = {"heartbeat_timeout_seconds": 60, "shutdown_timeout_seconds": 60}  # JAX's own, which is behind ours
_BEAT, _SILENT = 1.0, 15.0  # seconds between two signs of life, and without one until a process is taken for dead
_POLL = 10_000  # milliseconds of one wait for a message
_LAG = 60.0  # seconds after which NFS has looked again for what it did not find
_SWEEP, _SWEPT = 64, 2**26  # messages, and bytes of them, after which those that all have read are removed
_CALLS, _STATE = "ple_jax/calls", "ple_jax/state"  # in the store
# what is said of a collective whose other end is gone
_OTHERS = re.compile("gloo|nccl|collective|connection|peer|unavailable|aborted|deadline", re.IGNORECASE)


@contextlib.contextmanager
def processes(asked: launch.Given, workdir: Path, *, stop: Callable[[int], None]) -> Iterator[bool]:
    """Opens a context that is True in process 0, which leads, and False in the others (see `together.led`).

    If there is only one process, it is True at once.

    Args:
        workdir: must be the same folder for all processes.
        stop: called with the number of a signal that another process was sent; asks this process to stop.

    Raises:
        UserError: the processes do not find one another, or `workdir` is not the same folder for all of them.
    """
    _connect(asked)
    if jax.process_count() == 1:  # of a slice with one host
        yield True
        return
    control = _Store(jax.process_index(), jax.process_count(), stop)
    try:
        with control.watched(), together.led(control) as leads:
            if leads:
                _check_shared(workdir)
            yield leads
    finally:
        jax.distributed.shutdown()  # all of them together


def _connect(asked: launch.Given) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # else compilers on GPUs share their trials, and one that finds its program in its own cache leaves the others waiting
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_shard_autotuning=false".lstrip()
    if asked.process == 0:
        print(f"waiting for {asked.processes} processes at {asked.coordinator}", file=sys.stderr, flush=True)
    elif number := launch.number(asked.process):
        of = "" if asked.processes is None else f" of {asked.processes}"
        where = "process 0" if asked.coordinator is None else asked.coordinator  # JAX finds out where a launcher has put it
        print(f"process {number}{of}: looking for {where}; process 0 says all else", file=sys.stderr, flush=True)
    # it would take SIGTERM for itself
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(asked.coordinator, asked.processes, asked.process, **_GRACE)
    except (RuntimeError, ValueError, OSError) as error:
        brief = str(error).strip().splitlines()[0][:300]
        where = f" at {asked.coordinator}" if asked.coordinator else ""
        raise UserError(
            f"the processes did not find one another{where} ({brief}): start all of them, with one --coordinator, whose port"
            " is free and open, and numbers of their own; --processes=1 runs this one alone"
        ) from error


@together.together
def _check_shared(workdir: Path) -> None:
    """Raises a UserError unless `workdir` is one folder for all processes, since all of them write checkpoints."""
    token = f"{os.getpid()}-{time.time_ns()}"
    mark = workdir / ".together"

    def write() -> str:
        workdir.mkdir(parents=True, exist_ok=True)
        mark.write_text(token, encoding="utf-8")
        return token

    wanted = together.from_first(write)
    seen = shows(mark, wanted)
    _client().wait_at_barrier("ple_jax/shown", 24 * 3600 * 1000)  # a collective would not wait for one that lags
    everywhere = all(_everywhere(seen))
    if together.rank() == 0:
        mark.unlink(missing_ok=True)
    if not everywhere:
        raise UserError(
            f"--workdir={workdir} is not the same folder for all processes: give one on a file system that all hosts mount"
        )


def shows(mark: Path, token: str) -> bool:
    """Says whether a file that process 0 has written holds this text here, after waiting for a file system that lags."""
    until = time.monotonic() + _LAG
    while True:
        with contextlib.suppress(OSError):
            os.listdir(mark.parent)  # makes NFS ask its server for the names in the folder
            if mark.read_text(encoding="utf-8") == token:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(_BEAT)


def _everywhere(value: bool) -> list[bool]:
    from jax.experimental import multihost_utils

    return [bool(x) for x in multihost_utils.process_allgather(value)]


# ---------------------------------------------------------------- messages and signs of life


class _Store:
    """The `together.Control` that keeps messages in the store of JAX's coordination service."""

    def __init__(self, rank: int, size: int, stop: Callable[[int], None]):
        self.rank, self.size, self._stop = rank, size, stop
        self._sent, self._swept, self._kept = 0, 0, 0  # messages, those of them that were removed, bytes of the others
        self._client = _client()
        self._over = threading.Event()  # the watch has ended
        self._verdict = threading.Lock()  # whoever has it says what went wrong
        self._stopping = False  # whether another process was asked to stop, and this one knows

    # ------------------------------------------------------------ Control

    def tell(self, message: bytes) -> None:
        self._client.key_value_set_bytes(f"{_CALLS}/{self._sent}", message)
        self._counted(len(message))

    def told(self) -> bytes:
        while True:
            try:
                message = self._client.blocking_key_value_get_bytes(f"{_CALLS}/{self._sent}", _POLL)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                continue
            self._counted(len(message))
            return message

    def leaving(self, error: BaseException) -> None:
        """Tells the others that process 0 ends with an error.

        If the error only follows from another process's failure, the cause of that failure is reported instead.
        """
        self._wait_if_another_failed(error)
        self._verdict.acquire()
        self._client.key_value_set(f"{_STATE}/ended", "1")
        self._wait_until_left()
        _forget()

    def failed(self, error: BaseException, *, known: bool) -> None:
        if known:  # process 0 says it, and that this is the end
            time.sleep(_SILENT)
            os._exit(0)
        self._wait_if_another_failed(error)
        brief = str(error) if isinstance(error, UserError) else of_the_machine(error)  # what a user can mend
        whole = "" if brief else "".join(traceback.format_exception(error))
        told = {"process": self.rank, "host": socket.gethostname(), "says": brief or repr(error), "whole": whole}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone
            self._client.key_value_set(f"{_STATE}/failed", json.dumps(told))
        time.sleep(2 * _BEAT)  # until process 0 has read it
        os._exit(1)

    def _wait_if_another_failed(self, error: BaseException) -> None:
        """Waits if the error says that the other end of a collective is gone.

        Meanwhile the watch of process 0 finds out which process that was, reports it and ends all processes.
        """
        cause = error.__cause__ or error  # a reward that is computed by all is blamed for what is none of its own
        if not isinstance(cause, UserError) and _OTHERS.search(str(cause)):
            time.sleep(_SILENT + 5 * _BEAT)

    def _counted(self, size: int) -> None:
        """Counts a message. Now and then all processes wait for one another, and messages that all have read are removed."""
        self._sent, self._kept = self._sent + 1, self._kept + size
        if self._sent - self._swept < _SWEEP and self._kept < _SWEPT:
            return
        self._client.wait_at_barrier(f"ple_jax/read/{self._sent}", 24 * 3600 * 1000)
        if self.rank == 0:
            for number in range(self._swept, self._sent):
                self._client.key_value_delete(f"{_CALLS}/{number}")
        self._swept, self._kept = self._sent, 0

    # ------------------------------------------------------------ the watch

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Opens a context in which this process reports that it is alive, and hears of the others."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        if self.rank:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._asked_to_stop)
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _asked_to_stop(self, number: int, frame: object) -> None:
        """Passes the signal on to process 0, which stops: it finishes what it has in hand, and then tells the others."""
        # in a thread: a handler must not wait for what the interrupted code may hold
        threading.Thread(target=self._put, args=("stop", str(number)), daemon=True).start()

    def _put(self, name: str, value: str) -> None:
        self._client.key_value_set(f"{_STATE}/{name}", value, allow_overwrite=True)

    def _watch(self) -> None:
        beats, since = 0, {rank: (0, time.monotonic()) for rank in range(self.size)}
        looked = time.monotonic()
        while not self._over.wait(_BEAT):
            beats += 1
            if time.monotonic() - looked > _SILENT / 3:  # this process was suspended, and the others could not be heard
                since = {rank: (-1, time.monotonic()) for rank in range(self.size)}
            looked = time.monotonic()
            try:
                self._put(f"alive/{self.rank}", str(beats))
                found = dict(self._client.key_value_dir_get(f"{_STATE}/"))
            except jax.errors.JaxRuntimeError:
                continue  # process 0 is gone, or is leaving: JAX says so, and ends this one
            if self.rank:
                if f"{_STATE}/ended" in found:
                    os._exit(0)  # process 0 carries the code: a launcher ends all at the first that is not 0
                continue
            self._read(found, since)

    def _read(self, found: Mapping[str, str], since: dict[int, tuple[int, float]]) -> None:
        """Reads the reports of the other processes, and ends all processes if one has failed or no longer reports.

        If one was asked to stop, this process is asked to stop.
        """
        if said := found.get(f"{_STATE}/failed"):
            told = json.loads(said)
            says = f"process {told['process']} of {self.size} ({told['host']}): {told['says']}"
            self._end(says, 1 if told["whole"] else 2, told["whole"])
        if (stop := found.get(f"{_STATE}/stop")) and not self._stopping:
            self._stopping = True
            self._stop(int(stop))
        now = time.monotonic()
        for rank in range(1, self.size):
            beats = int(found.get(f"{_STATE}/alive/{rank}", "0"))
            since[rank] = since[rank] if beats == since[rank][0] else (beats, now)
            if now - since[rank][1] > _SILENT:
                says = f"process {rank} of {self.size} is gone: it was killed, or its host or the network failed"
                self._end(says, os.EX_TEMPFAIL)  # a code of its own: starting again helps, where it does not after a mistake

    def _end(self, says: str, code: int, whole: str = "") -> None:
        """Reports why, and ends all processes: the main thread may be in a collective that never ends."""
        if not self._verdict.acquire(blocking=False):
            return
        line = redacted(" ".join(says.split()))
        print(f"{whole}error: {line}; what was finished is kept: start all again", file=sys.stderr, flush=True)
        self._client.key_value_set(f"{_STATE}/ended", "1")
        self._wait_until_left()
        os._exit(code)

    def _wait_until_left(self) -> None:
        """Waits until the others have read that this is the end.

        JAX would end one that is left behind, with a page of its own words.
        """
        time.sleep(3 * _BEAT)


def _client() -> Any:
    # JAX has no public way to its coordination service's store; Orbax takes this one too
    from jax._src.distributed import global_state

    return global_state.client


def _forget() -> None:
    """Makes JAX forget the other processes, after a failure that rules out a common end.

    Then nothing waits for that end, or is torn down, when the interpreter exits.
    """
    from jax._src.distributed import global_state

    for part in (global_state.client, global_state.service):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(part))  # torn down, the one would take the other for a failure
    global_state.client = global_state.service = None
