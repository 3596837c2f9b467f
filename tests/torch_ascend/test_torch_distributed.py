"""Several processes: the result does not depend on their number, nor on how the base is spread over them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import journals
import numpy as np
import pytest
import torch
from patience import LAST_RESORT
from safetensors.numpy import load_file

from configs import default
from configs import tiny as tiny_config
from ple_jax.core.errors import UserError
from ple_jax.models import weights
from torch_ascend import backend, sharding
from torch_ascend import device as devices

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
TINY = (
    f"--config {ROOT / 'configs' / 'tiny.py'} --backend=torch --config.model.device=cpu --config.optimizer.micro_queries=4"
)
MESHES = {
    "one": (1, ""),
    "two": (2, "--config.mesh.data=2"),
    "four": (4, "--config.mesh.data=4"),
    "spread": (2, "--config.mesh.fsdp=2 --config.model.remat=full"),
    "both": (4, "--config.mesh.data=2 --config.mesh.fsdp=2"),
}


def forked(fail: str = "", **runs: tuple[int, str]) -> tuple[dict[str, list[int]], str]:
    """Exit codes of every run's processes, and what they wrote to stderr."""
    arguments = [f"{name}={ranks}:{line}" for name, (ranks, line) in runs.items()]
    driver = [sys.executable, str(ROOT / "tests" / "ranks.py"), *arguments]
    result = subprocess.run(driver, env=ENVIRONMENT | {"FAIL": fail}, capture_output=True, text=True, timeout=LAST_RESORT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


def curve(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


DROPOUT = "--config.lora.dropout=0.3 --config.iterations=1"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    wanted = {name: (ranks, f"{TINY} --workdir {folder / name} {mesh}") for name, (ranks, mesh) in MESHES.items()}
    wanted["dropped"] = (1, f"{TINY} --workdir {folder / 'dropped'} {DROPOUT}")
    wanted["dropped_two"] = (2, f"{TINY} --workdir {folder / 'dropped_two'} {DROPOUT} --config.mesh.data=2")
    codes, says = forked(**wanted)
    assert codes == {name: [0] * ranks for name, (ranks, _) in wanted.items()}, says
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MESHES if name != "one"])
def test_the_number_of_processes_changes_nothing(name, runs):
    for kind in ("rollouts", "evaluations"):
        files = sorted(file.name for file in (runs / "one" / kind).iterdir())
        assert sorted(file.name for file in (runs / name / kind).iterdir()) == files
        for file in files:
            journals.assert_the_same(runs / name / kind / file, runs / "one" / kind / file)
    one, several = curve(runs / "one"), curve(runs / name)
    for a, b in zip(one[1:], several[1:], strict=True):
        keys = [k for k in a if "second" not in k]
        np.testing.assert_allclose([a[k] for k in keys], [b[k] for k in keys], rtol=1e-5, atol=1e-5)
    a, b = (load_file(runs / n / "adapter" / "adapter_model.safetensors") for n in ("one", name))
    assert max(abs(a[k] - b[k]).max() for k in a) < 1e-4
    assert max(abs(a[k]).max() for k in a) > 1e-3  # it was trained


@pytest.mark.slow
def test_dropout_does_not_depend_on_their_number(runs):
    one, two = curve(runs / "dropped")[1], curve(runs / "dropped_two")[1]
    np.testing.assert_allclose(two["loss"], one["loss"], atol=1e-5)
    assert abs(one["loss"] - curve(runs / "one")[1]["loss"]) > 1e-4  # something was dropped


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_in_a_step_ends_them_all(rank, tmp_path):
    codes, says = forked(fail=str(rank), run=(2, f"{TINY} --workdir {tmp_path / 'w'} --config.mesh.data=2"))
    assert codes["run"][rank] == 2 and 0 not in codes["run"], says
    assert "not enough memory (DefaultCPUAllocator: out of memory)" in says
    if rank == 0:
        assert "process 1: another process is gone" in says and "Traceback" not in says


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_another_number_of_processes(tmp_path, runs):
    """Under torchrun itself: SIGTERM in the middle is one line and a resumable directory."""
    workdir = tmp_path / "run"
    line = [*TINY.split(), "--workdir", str(workdir), "--config.mesh.data=2", "--config.iterations=40"]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "ple_jax.main",
        *line,
    ]
    with subprocess.Popen(launch, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + LAST_RESORT
        while not (workdir / "rollouts" / "iter_0000.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        says, _ = process.communicate(timeout=LAST_RESORT)
    assert "stopped; nothing finished is lost" in says and not (workdir / "summary.json").exists(), says
    done = len(curve(workdir))
    codes, says = forked(again=(1, f"{TINY} --workdir {workdir} --config.iterations=40"))
    assert codes == {"again": [0]}, says
    assert done < len(curve(workdir)) == 41
    for i in range(3):
        name = f"rollouts/iter_{i:04d}.jsonl"
        journals.assert_the_same(workdir / name, runs / "one" / name)


@pytest.mark.slow
def test_what_a_user_can_mend_is_one_line_of_the_first_process(tmp_path):
    line = f"{TINY} --workdir {tmp_path / 'w'}"
    codes, says = forked(
        mesh=(2, line),
        # found after the others have begun to wait
        model=(2, f"{line} --config.mesh.data=2 --config.model.path={tmp_path}"),
        # found by all of them
        targets=(2, f"{line} --config.mesh.data=2 --config.lora.targets=\"('nope',)\""),
    )
    assert codes == {"mesh": [2, 2], "model": [2, 0], "targets": [2, 2]}, says
    assert says.count("lora.targets names 'nope'") == 1
    assert "config.mesh is data 1 x fsdp 1, and 2 processes were started" in says
    assert f"{tmp_path / 'config.json'} does not exist" in says
    assert "Traceback" not in says


@pytest.mark.slow
def test_a_damaged_checkpoint_is_one_line(tmp_path, runs):
    shutil.copytree(runs / "one", tmp_path / "w")
    (tmp_path / "w" / "summary.json").unlink()
    for file in (tmp_path / "w" / "checkpoints").glob("*/state.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    codes, says = forked(damaged=(2, f"{TINY} --workdir {tmp_path / 'w'} --config.mesh.data=2"))
    assert codes == {"damaged": [2, 2]}, says
    assert says.count("is damaged") == 1 and "Traceback" not in says


def test_a_mesh_must_be_of_as_many_devices_as_there_are_processes():
    mesh = default.get_config().mesh
    sharding.mesh_size(mesh, 1)
    with pytest.raises(UserError, match=r"set --config.mesh.data=8 .* or --config.mesh.fsdp=8"):
        sharding.mesh_size(mesh, 8)
    mesh.tensor = 2
    with pytest.raises(UserError, match="no tensor parallelism"):
        sharding.mesh_size(mesh, 2)


@pytest.mark.parametrize(
    ("size", "data", "fsdp", "chosen"),
    [(40, 8, 1, (8, 1)), (60, 8, 1, (1, 8)), (100, 4, 2, (4, 2)), (110, 4, 2, (1, 8)), (1000, 1, 8, (1, 8))],
)
def test_a_base_that_does_not_fit_is_spread(size, data, fsdp, chosen):
    *got, note = sharding.choose({"data": data, "fsdp": fsdp}, size * 2**30, 64 * 2**30)
    assert tuple(got) == chosen
    assert bool(note) == (chosen != (data, fsdp)) and (not note or f"mesh.fsdp={data * fsdp}" in note)
    assert sharding.choose({"data": data, "fsdp": fsdp}, size * 2**30, None) == (data, fsdp, "")


def test_all_processes_decide_by_the_smallest_device(monkeypatch):
    """Where each went by its own, one would spread the base and wait for another that does not."""
    seen = []

    def choose_place(config, shape, device, able, memory, world):
        seen.append(memory)
        raise UserError("far enough")

    def all_gather(parts, values, group):
        for part, given in zip(parts, (values, torch.tensor([30])), strict=True):
            part.copy_(given)

    monkeypatch.setattr(backend, "choose_place", choose_place)
    monkeypatch.setattr(sharding, "world", lambda: sharding.World(0, 2))
    monkeypatch.setattr(sharding.dist, "all_gather", all_gather)
    for memory in (40, 20, None):
        monkeypatch.setattr(devices, "total_memory", lambda device, memory=memory: memory)
        with pytest.raises(UserError, match="far enough"):
            backend.build(tiny_config.get_config(), weights.load("tiny"))
    assert seen == [30, 20, None]


def test_a_quantised_base_that_does_not_fit_is_not_told_to_stay_whole():
    config, loaded = tiny_config.get_config(), weights.load("tiny")
    config.model.quantize, config.mesh.data = "int8", 8
    device = torch.device("cpu")
    with pytest.raises(UserError, match=r"the base in int8 takes 0\.0 GiB, .* a smaller one, --config.model.quantize=nf4"):
        backend.choose_place(config, loaded.config, device, devices.capabilities(device), 10_000, sharding.ALONE)
