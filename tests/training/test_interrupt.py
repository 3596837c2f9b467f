"""Signals wherever they come, and what children that are forked must not keep of a run."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import LAST_RESORT

from ple_jax.core.errors import UserError
from ple_jax.training.run import Clock
from ple_jax.training.workdir import lock

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
RUN = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from ple_jax.training.interrupt import Stop
from ple_jax.training.workdir import lock

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts tests in the background ignores it

def own_signals(_):
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] + [signal.set_wakeup_fd(-1)]

def forever(_):
    at_work.release()
    time.sleep(600)

context = multiprocessing.get_context("fork")
# a pool that is terminated before its workers have something to do may wait for them for ever
at_work = context.Semaphore(0)
"""


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-c", RUN + code, *arguments]
    return subprocess.Popen(program, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_pool_that_is_terminated_stops_no_run(tmp_path):
    """Its workers die of the signal, as anywhere else, and the run hears nothing of it."""
    code = """
try:
    with lock(Path(sys.argv[1])), Stop(at_once=True), Stop() as stop:
        for _ in range(3):
            pool = context.Pool(2)
            found = pool.map(own_signals, range(2))
            assert found == [[signal.SIG_DFL, signal.default_int_handler, -1]] * 2, found
            pool.map_async(forever, range(2))
            at_work.acquire(), at_work.acquire()
            pool.terminate()
            pool.join()
        time.sleep(0.3)
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)  # the run's own are heard as before, after the last safe point too
        time.sleep(0.3)
except KeyboardInterrupt:
    print("stopped")
"""
    process = python(code, str(tmp_path))
    said, error = process.communicate(timeout=LAST_RESORT)
    assert (said, process.returncode) == ("stopped\n", 0), error
    assert error.count("stopping at the next safe point") == 1


def test_workers_that_outlive_a_killed_run_do_not_hold_its_directory(tmp_path):
    code = """
with lock(Path(sys.argv[1])), Stop():
    with context.Pool(2) as pool:
        pool.map_async(forever, range(2))
        print(*(worker.pid for worker in pool._pool), flush=True)
        time.sleep(600)
"""
    process = python(code, str(tmp_path))
    workers = [int(pid) for pid in process.stdout.readline().split()]
    with pytest.raises(UserError, match=f"in use by process {process.pid} on {socket.gethostname()};"), lock(tmp_path):
        pass
    process.kill()
    process.wait()
    try:
        assert all(Path(f"/proc/{pid}").exists() for pid in workers)
        with lock(tmp_path):
            pass
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(number, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refused)
    says = rf"{tmp_path} cannot be locked \(.*{os.strerror(number)}\): give another --workdir, on a file system that has lo"
    with pytest.raises(UserError, match=says), lock(tmp_path):
        pass


PLACES = {  # what is going on -> the function that is called then, whose call the signal comes before
    "importing": "importlib:import_module",
    "reading records": "ple_jax.modes:read_inputs",
    "writing the adapter": "ple_jax.export.write:write_adapter",
    "merging": "ple_jax.modes:write.write_merged",
    "writing the report": "ple_jax.modes:run_page.write",
}
DRIVER = """
import functools, importlib, os, signal, sys, time
from ple_jax import main

module, _, path = sys.argv.pop(1).partition(":")
owner = importlib.import_module(module)
*parents, name = path.split(".")
for parent in parents:
    owner = getattr(owner, parent)
function = getattr(owner, name)

def call(*args, **kwargs):
    setattr(owner, name, function)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    return function(*args, **kwargs)

setattr(owner, name, call)
main.cli()
"""


@pytest.mark.parametrize(
    "place", [name if name in ("importing",) else pytest.param(name, marks=pytest.mark.slow) for name in PLACES]
)
def test_a_stop_is_said_wherever_it_comes(place, tmp_path):
    arguments = [PLACES[place], "--config", str(ROOT / "configs" / "tiny.py"), "--workdir", str(tmp_path / "run")]
    arguments += ["--backend=torch", "--config.iterations=1"]
    if place == "merging":
        rows = "".join(f'{{"prompt": "q {i}", "chosen": "yes {i}", "rejected": "no"}}\n' for i in range(8))
        (tmp_path / "pairs.jsonl").write_text(rows)
        (tmp_path / "others.jsonl").write_text(rows.replace("q ", "other "))
        arguments += ["--config.algorithm=reward", f"--config.task.train={tmp_path / 'pairs.jsonl'}"]
        arguments += [f"--config.task.heldout={tmp_path / 'others.jsonl'}"]
    program = [sys.executable, "-c", DRIVER, *arguments]
    ended = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, timeout=LAST_RESORT)
    said = ended.stderr.strip().splitlines()
    assert ended.returncode == 128 + signal.SIGTERM and "give the same command again to continue" in said[-1], ended.stderr
    assert "Traceback" not in ended.stderr and not (tmp_path / "run" / "report.html").exists()
    if place != "importing":
        again = subprocess.run(
            [sys.executable, "-m", "ple_jax.main", *arguments[1:]], env=ENVIRONMENT, capture_output=True, text=True
        )
        assert again.returncode == 0 and (tmp_path / "run" / "report.html").exists(), again.stderr


@pytest.mark.slow
def test_a_training_goes_on_when_nobody_reads_what_it_says(tmp_path):
    config = ROOT / "configs" / "tiny.py"
    command = f"{sys.executable} -m ple_jax.main --config {config} --workdir {tmp_path} --backend=torch"
    line = f"({command} --config.iterations=1; echo code $? >&2) 2> {tmp_path / 'said'} | head -1"
    found = subprocess.run(["bash", "-c", line], env=ENVIRONMENT, capture_output=True, text=True)
    assert found.stdout.count("\n") == 1 and (tmp_path / "said").read_text() == "code 0\n"
    assert (tmp_path / "summary.json").exists()


def test_a_clock_that_is_set_back_makes_no_negative_seconds(monkeypatch):
    clock = Clock()
    clock.lap()  # counted from the start of the process
    for hour in range(3):
        monkeypatch.setattr(time, "time", lambda hour=hour: 1e9 - 3600 * hour)
        assert 0 <= clock.lap() < 600
