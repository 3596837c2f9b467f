"""The share of the record's tests that a response's Python code passes, from 0 to 1.

Code that a model writes is run. It runs in a process of its own (`_child.py`), in an empty folder that is removed
afterwards, with limits on time, memory and the size of files. Where the system lets a process have user namespaces (Linux,
mostly), the code has no network and no capability, it can neither stop other processes nor look into them (it sees their
names and command lines), and all processes that it started end with it. Where the system does not, a warning says so. The
code runs with the rights of the user who trains, though: it can read that user's files and write where that user may, and it
can look into the interpreter that tests it. Whoever trains a model that may seek to do harm should put the whole run into a
container.
"""

import contextlib
import functools
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ple_jax.core.errors import UserError
from ple_jax.core.types import Reward
from ple_jax.rewards import WHERE, accepted, fenced_block

VERSION = "3"  # another one with every change of the values
_CHILD = Path(__file__).with_name("_child.py")
_START = 10.0  # seconds more than the code has, for Python to start in
_READ = 1 << 20  # bytes of what a child says


# one piece: half of it says what every option means
def make(
    *,
    column: str = "tests",
    before: str | None = None,
    timeout: float = 5.0,
    memory_mb: int = 1024,
    concurrency: int | None = None,
) -> Reward:
    """Returns a reward that is the share of the record's tests that the code in a response passes.

    The code is the last block of Python between ``` in the response, or all of the response if it has none. A test is
    run after it, and passes if it raises nothing; it may be an assert or contain calls of its own. If the process that
    runs code and tests cannot be started, there is no reward.

    Args:
        column: the record's field with the tests: a text of Python (assert f(2) == 4), or a list of such texts, each of
            which is one test. Code that does not run passes none.
        before: the record's field with code that is put before that of the response: an opening that the response continues.
        timeout: seconds for code and tests together; tests that passed until then count.
        memory_mb: memory of each process, in 2^20 bytes.
        concurrency: number of responses that are tested at once; by default the number of cores.

    Raises:
        UserError: if a limit is out of range.
    """
    if not 0 < timeout <= 3600 or memory_mb < 64 or (concurrency is not None and concurrency < 1):
        raise UserError(
            f"{WHERE} timeout = {timeout}, memory_mb = {memory_mb}, concurrency = {concurrency}: give at most 3600 seconds,"
            " at least 64 MB and at least 1 at once"
        )
    reads = tuple(dict.fromkeys(name for name in (column, before) if name is not None))
    failures: list[str] = []

    def share(code: str, tests: Sequence[str]) -> float:
        try:
            passed = _passed(code, tests, seconds=timeout, megabytes=memory_mb)
        except _NotRun as error:
            failures.append(str(error))
            return math.nan
        return sum(passed) / len(passed)

    def reward(prompts: Sequence[str], responses: Sequence[str], /, **fields: Sequence[Any]) -> list[float]:
        opening = [""] * len(responses) if before is None else ["" if one is None else str(one) for one in fields[before]]
        programs = [opened + code_of(response) for opened, response in zip(opening, responses, strict=True)]
        with ThreadPoolExecutor(concurrency or os.cpu_count()) as pool:
            return list(pool.map(share, programs, map(accepted, fields[column])))

    def refuses(prompt: str, /, **fields: Any) -> str:
        return "" if any(test.strip() for test in accepted(fields[column])) else f"has no test in its `{column}`"

    python = ".".join(map(str, sys.version_info[:2]))
    version = f"{VERSION} {python} {column} {before} {timeout!r} {memory_mb}"
    return Reward(
        "code", reward, version=version, scale=(0.0, 1.0), reads=reads, refuses=refuses,
        failure=lambda: failures[-1] if failures else "",
    )  # fmt: skip


def code_of(response: str) -> str:
    """Returns the last block of Python in a response, or all of the response if there is none."""
    block = fenced_block(response, ("python", "py", "python3"))
    return response if block is None else block


class _NotRun(Exception):
    """An exception that says why the process that runs the code could not be started."""


def _passed(code: str, tests: Sequence[str], *, seconds: float, megabytes: int) -> list[bool]:
    """Says of each test whether the code passes it. Raises _NotRun if the process that runs them does not start."""
    mark = secrets.token_hex(16)  # code that writes where its process says what passed does not know it
    asked = json.dumps({"code": code, "tests": tests, "seconds": seconds, "megabytes": megabytes, "mark": mark})
    folder = tempfile.TemporaryDirectory(prefix="ple_jax_", ignore_cleanup_errors=True)
    with folder as empty, tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as wrong:
        variables = {"PATH": os.defpath, "HOME": empty, "TMPDIR": empty, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        variables |= {"LD_LIBRARY_PATH": path} if (path := os.environ.get("LD_LIBRARY_PATH")) else {}  # Python's own
        child = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_CHILD)],
            stdin=subprocess.PIPE, stdout=said, stderr=wrong, cwd=empty, env=variables, start_new_session=True,
        )  # fmt: skip
        try:
            with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
                child.communicate(asked.encode(errors="replace"), timeout=seconds + _START)
        finally:
            with contextlib.suppress(ProcessLookupError):  # it, and what it started
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        lines, errors = (_text(file).splitlines() for file in (said, wrong))
    told = [line.removeprefix(mark).strip() for line in lines if line.startswith(mark)]
    if not any(line.startswith("ready") for line in told):
        raise _NotRun(f"Python did not start within {_START:g} s: {errors[-1] if errors else 'it said nothing'}")
    if "ready alone" not in told:
        _warn()
    return [str(i) in told for i in range(len(tests))]


def _text(file: Any) -> str:
    file.seek(0)
    return file.read(_READ).decode(errors="replace")


@functools.cache
def _warn() -> None:
    """Prints, once in a process, a warning that this system has no namespaces to isolate the code in."""
    print(
        "warning: reward 'code': this system gives no process namespaces of its own, so that code which the model writes has"
        " the network, and may see and stop your other processes: run it in a container",
        file=sys.stderr,
    )
