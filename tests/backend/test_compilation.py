"""The cache of compiled programs: found again by other processes, whole after a kill, swept, and left alone by children."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from locks import as_on_nfs
from patience import LAST_RESORT

from ple_jax.backend import compilation
from ple_jax.core import processor

START = """
import sys, os, signal
from pathlib import Path
import jax, jax.numpy as jnp
from ple_jax.backend import compilation
compilation._WORTH = 0.0
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
kept = compilation.keep(Path(sys.argv[1]))
def program(i):
    return jax.jit(lambda x: jnp.sin(x) * i + i)(jnp.arange(4.0))
"""


def process(code: str, shared: Path, **popen) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", START + code, str(shared)],
        env=environment | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen,
    )  # fmt: skip


def run(code: str, shared: Path) -> str:
    child = process(code, shared)
    out, err = child.communicate(timeout=LAST_RESORT)
    assert child.returncode == 0 and "rror" not in err and "arning" not in err, err
    return out.strip()


def entries(shared: Path) -> set[str]:
    return {entry.name for entry in shared.glob("*-cache")}


def test_another_process_finds_what_one_compiled(tmp_path):
    shared = tmp_path / "programs"
    said = "before = compilation.compiled().programs; print(float(program(3).sum()), len(hits) > 0, before)"
    first = run(said, shared)
    there = entries(shared)
    second = run(said, shared)
    assert first.split()[1:] == ["False", "0"] and second.split()[1] == "True"
    assert first.split()[0] == second.split()[0] and there and entries(shared) == there
    assert not list((shared / "used").iterdir())  # each removed its own


def test_of_a_killed_process_whole_entries_stay_and_nothing_else(tmp_path):
    """Half of one, as JAX leaves it when it is killed while it writes, is in the folder of the killed process alone."""
    shared = tmp_path / "programs"
    half = """
program(1)
(compilation._open.own / "jit_half-cache").write_bytes(b"half")
os.kill(os.getpid(), signal.SIGKILL)
"""
    child = process(half, shared)
    child.communicate(timeout=LAST_RESORT)
    assert child.returncode == -signal.SIGKILL
    assert entries(shared) and "jit_half-cache" not in entries(shared)
    assert len(list((shared / "used").iterdir())) == 1
    assert run("program(1); print(len(hits) > 0)", shared) == "True"
    assert not list((shared / "used").iterdir())  # what was left of the killed one is gone too


def test_on_nfs_too_only_what_nobody_holds_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", as_on_nfs)
    own = tmp_path / "1-left"
    own.mkdir()
    with (own / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        compilation.sweep(own)
        assert own.exists()
    compilation.sweep(own)
    assert not own.exists()


@pytest.mark.slow
def test_two_processes_and_kills_while_they_write(tmp_path):
    """Whenever they are killed, every shared entry can be read: nobody warns, and all find the same."""
    shared = tmp_path / "programs"
    for pause in (0.0, 0.2, 0.5):
        before = len(entries(shared))
        two = [process("for i in range(2, 400): program(float(i))", shared) for _ in range(2)]
        while len(entries(shared)) == before:  # a round counts when it has written something, however fast the machine
            time.sleep(0.05)
        time.sleep(pause)
        for child in two:
            child.kill()
            child.communicate()
    count = len(entries(shared))
    assert count >= 3
    run(f"compilation.compiled(); [program(float(i)) for i in range(2, {count + 2})]", shared)
    assert not list((shared / "used").iterdir())


def test_a_forked_child_leaves_its_parents_folder_alone(tmp_path):
    code = """
if os.fork() == 0:
    sys.exit(0)
os.wait()
print(compilation._open.own.exists(), kept)
"""
    assert run(code, tmp_path / "programs") == "True True"


def test_a_user_without_a_home_compiles_all(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.home", home)
    assert not compilation.keep()


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    assert not compilation.keep(tmp_path / "file" / "programs")


def test_what_nobody_reads_goes(tmp_path):
    shared = tmp_path / "programs"
    run("program(1); program(2)", shared)
    old, *others = sorted(shared.glob("*-cache"))
    os.utime(old, (time.time() - 61 * 86400, time.time()))
    run("pass", shared)
    assert others and entries(shared) == {entry.name for entry in others}


def test_an_address_is_left_to_jax(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/programs")
    assert not compilation.keep()


def test_the_folder_is_of_one_jaxlib_and_processor(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = compilation.folder()
    assert found.parent == tmp_path / "ple_jax" / "programs"
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    assert compilation.folder() != found
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "given"))
    assert compilation.folder().parent == tmp_path / "given"
