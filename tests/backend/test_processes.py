"""JAX in several processes: one mesh over 1, 2 and 4 gives the same; whatever ends one ends all, and is said once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from patience import LAST_RESORT
from safetensors.numpy import load_file

from ple_jax.backend import processes
from ple_jax.core import launch
from ple_jax.core.errors import UserError

ROOT = Path(__file__).parents[2]
SHORT = (
    f"--config {ROOT / 'configs' / 'tiny.py'} --config.optimizer.micro_queries=4 --config.sinks=() --config.iterations=1"
    " --config.task.max_heldout=4"
)
TWO = f"{SHORT} --config.mesh.data=2"
MESHES = {
    "data": "--config.mesh.data=4",
    "spread": "--config.mesh.data=2 --config.mesh.fsdp=2",
    "tensor": "--config.mesh.fsdp=2 --config.mesh.tensor=2",
}


def hosts(fail: str = "", kill: str = "", **runs: tuple[str, str]) -> tuple[dict[str, list[int]], str]:
    """Exit codes of every run's processes, and what they wrote."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "FAIL": fail, "KILL": kill}
    for name in launch.VARIABLES:
        environment.pop(name, None)
    arguments = [f"{name}={size}:{line}" for name, (size, line) in runs.items()]
    driver = [sys.executable, str(ROOT / "tests" / "hosts.py"), *arguments]
    result = subprocess.run(driver, env=environment, capture_output=True, text=True, timeout=LAST_RESORT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


def assert_the_same(one: Path, other: Path) -> None:
    """Journals to the byte where nothing was rounded otherwise; losses and adapters nearly."""
    for kind in ("rollouts", "evaluations"):
        files = sorted(path.name for path in (one / kind).glob("*.jsonl"))
        assert files and files == sorted(path.name for path in (other / kind).glob("*.jsonl"))
        for file in files:
            for mine, theirs in zip(*(lines(run / kind / file) for run in (one, other)), strict=True):
                assert [r["tokens"] for r in mine["responses"]] == [r["tokens"] for r in theirs["responses"]]
                assert (mine["query_id"], mine["decision"]) == (theirs["query_id"], theirs["decision"])
    for mine, theirs in zip(lines(one / "metrics.jsonl"), lines(other / "metrics.jsonl"), strict=True):
        keys = [key for key, value in mine.items() if isinstance(value, float) and "second" not in key]
        np.testing.assert_allclose([mine[k] for k in keys], [theirs[k] for k in keys], rtol=1e-5, atol=1e-5)
    mine, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    assert max(abs(mine[name] - theirs[name]).max() for name in mine) < 1e-4
    assert max(abs(mine[name]).max() for name in mine) > 1e-3  # it was trained


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_process_says_whom_it_looks_for(tmp_path, monkeypatch, capsys):
    def alone(*_, **__):
        raise RuntimeError("nobody is there")

    monkeypatch.setattr(jax.distributed, "initialize", alone)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # as it was, afterwards
    for name in launch.VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def said(*asked):
        with pytest.raises(UserError, match="did not find one another"):
            processes.processes(launch.Given(*asked), tmp_path, stop=print).__enter__()
        return capsys.readouterr().err

    assert said("host0:1", 2, 0) == "waiting for 2 processes at host0:1\n"
    assert said("host0:1", 2, 1) == "process 1 of 2: looking for host0:1; process 0 says all else\n"
    monkeypatch.setenv("SLURM_PROCID", "3")  # JAX finds out the rest
    assert said() == "process 3: looking for process 0; process 0 says all else\n"


@pytest.fixture(scope="module")
def alone_and_two(tmp_path_factory):
    """One run of one process with two devices, and of two with one each."""
    folder = tmp_path_factory.mktemp("two")
    codes, said = hosts(
        alone=("1x2", f"{TWO} --workdir {folder / 'alone'}"),
        two=("2x1", f"{TWO} --workdir {folder / 'two'}"),
    )
    assert codes == {"alone": [0], "two": [0, 0]}, said
    return folder


@pytest.mark.slow
def test_two_processes_are_as_one(alone_and_two):
    assert_the_same(alone_and_two / "alone", alone_and_two / "two")
    assert json.loads((alone_and_two / "two" / "environment.json").read_text())["processes"] == 2
    assert not (alone_and_two / "two" / ".together").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_one_mesh_over_one_two_and_four_processes(mesh, tmp_path):
    """And on the first mesh one of the four is told to stop; two go on."""
    sizes = {"of_1": "1x4", "of_2": "2x2", "of_4": "4x1"}
    line = f"{SHORT} {MESHES[mesh]} --workdir"
    codes, said = hosts(**{name: (size, f"{line} {tmp_path / name}") for name, size in sizes.items()})
    assert codes == {"of_1": [0], "of_2": [0] * 2, "of_4": [0] * 4}, said
    assert_the_same(tmp_path / "of_1", tmp_path / "of_2")
    assert_the_same(tmp_path / "of_1", tmp_path / "of_4")
    if mesh != "data":
        return
    run = f"{line} {tmp_path / 'run'}"
    codes, said = hosts(kill="3:SIGTERM", run=("4x1", run))  # one that does not lead: all stop at a safe point
    assert codes["run"][0] == 143 and codes["run"][1:] == [0] * 3, said
    assert said.count("stopped; nothing finished is lost") == 1
    assert not (tmp_path / "run" / "summary.json").exists()
    codes, said = hosts(run=("2x2", run))
    assert codes == {"run": [0] * 2}, said
    assert_the_same(tmp_path / "of_1", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_is_killed_ends_all_and_loses_nothing(process, alone_and_two, tmp_path):
    run = f"{TWO} --workdir {tmp_path / 'run'}"
    codes, said = hosts(kill=f"{process}:SIGKILL", run=("2x1", run))
    assert codes["run"][process] == -9 and codes["run"][1 - process] != 0
    if process:
        assert codes["run"][0] == os.EX_TEMPFAIL
        assert said.count("error: process 1 of 2 is gone: it was killed, or its host or the network failed") == 1, said
        assert "Traceback" not in said
    codes, said = hosts(run=("2x1", run))
    assert codes == {"run": [0, 0]}, said
    assert_the_same(tmp_path / "run", alone_and_two / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fail", "code", "says"),
    [
        ("1:memory", 2, "): not enough memory (RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes.); lower"),
        ("1:mend", 2, "): the disk of this host is missing; what was finished is kept: start all again"),
        ("1:bug", 1, "): KeyError('a bug'); what was finished is kept"),
        ("0:mend", 2, "error: the disk of this host is missing"),
    ],
)
def test_what_fails_in_one_process_is_said_once(fail, code, says, tmp_path):
    found, said = hosts(fail=fail, run=("2x1", f"{TWO} --workdir {tmp_path}"))
    assert found["run"][0] == code and found["run"][1] in (0, 1), said
    assert said.count(says) == 1 and said.count("error: ") == 1, said
    assert said.count("Traceback") == ("bug" in fail)
    if fail.startswith("1"):
        assert "error: process 1 of 2 (" in said


@pytest.mark.slow
def test_mistakes_of_several_processes_are_said_once(tmp_path):
    (tmp_path / "broken").mkdir()
    codes, said = hosts(
        mesh=("2x1", f"{SHORT} --workdir {tmp_path / 'mesh'}"),
        chat=("2x1", f"{SHORT} --mode=chat --workdir {tmp_path / 'chat'}"),
    )
    assert codes == {"mesh": [2, 0], "chat": [2, 2]}, said
    assert said.count("is of 1 devices, and 2 processes have 2 (cpu), of which none may be idle") == 1
    assert "--mode=chat is one process: start it alone" in said


@pytest.mark.parametrize(("after", "waited"), [(0, 0), (30, 30), (90, 61)])
def test_a_mark_that_another_host_has_written_is_waited_for(after, waited, tmp_path, monkeypatch):
    """On NFS this host may have remembered for up to a minute that there is no such file."""
    seconds, mark, read = [], tmp_path / ".together", Path.read_text
    mark.write_text("token")

    def late(self, **options):
        if sum(seconds) < after:
            raise FileNotFoundError
        return read(self, **options)

    monkeypatch.setattr(processes, "time", SimpleNamespace(sleep=seconds.append, monotonic=lambda: sum(seconds)))
    monkeypatch.setattr(Path, "read_text", late)
    assert processes.shows(mark, "token") == (after <= waited) and sum(seconds) == waited
    assert not processes.shows(mark, "of another folder")


# ---------------------------------------------------------------- how they were started


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """Nothing that a launcher sets, whatever started the tests."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "MEGASCALE_", "TPU_", "JAX_COORD", "JAX_NUM_P", "JAX_PROCESS")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_alone():
    assert launch.given(None, None, None) is None and launch.given(None, 1, None) is None
    assert launch.number(None) == 0 and launch.number(3) == 3


def test_flags_or_variables(started):
    assert launch.given("a:1", 2, 1) == launch.Given("a:1", 2, 1)
    for name, value in zip(launch.VARIABLES, ("b:2", "4", "3"), strict=True):
        started.setenv(name, value)
    assert launch.given(None, None, None) == launch.Given("b:2", 4, 3) and launch.number(None) == 3
    assert launch.given("a:1", 8, 7) == launch.Given("a:1", 8, 7)
    assert launch.given(None, 1, None) is None


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a,b", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"},
        {"OMPI_MCA_orte_hnp_uri": "1;tcp://a:1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
        {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"},
    ],
)
def test_launchers_that_jax_knows(variables, started):
    for name, value in variables.items():
        started.setenv(name, value)
    assert launch.given(None, None, None) == launch.Given() and launch.number(None) == 1
    assert launch.given(None, 1, None) is None
    for name in variables:
        if "NTASKS" in name or "SIZE" in name:
            started.setenv(name, "1")
            assert launch.given(None, None, None) is None


def test_an_open_mpi_that_says_too_little_is_named(started):
    started.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="Open MPI started 4 processes.*--coordinator, --processes, --process, or --"):
        launch.given(None, None, None)
    assert launch.given(None, 1, None) is None and launch.given("a:1", 4, 0) == launch.Given("a:1", 4, 0)


def test_a_batch_script_without_srun_is_one_process(started):
    started.setenv("SLURM_JOB_ID", "7")
    started.setenv("SLURM_NTASKS", "8")
    assert launch.given(None, None, None) is None


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("a:1", None, None), r"--processes \(or JAX_NUM_PROCESSES\) is missing"),
        ((None, 2, 0), r"--coordinator \(or JAX_COORDINATOR_ADDRESS\) is missing"),
        (("a:1", 2, None), r"--process \(or JAX_PROCESS_ID\) is missing"),
        (("a:1", 2, 2), "--process=2: 2 processes are numbered 0 to 1"),
        (("a", 2, 0), "--coordinator=a must be HOST:PORT"),
        (("a:1", "two", 0), r"--processes=two \(or JAX_NUM_PROCESSES\) must be a whole number"),
    ],
)
def test_mistakes(flags, says):
    with pytest.raises(UserError, match=says):
        launch.given(*flags)
