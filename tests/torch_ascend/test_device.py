"""Devices: which one a name means, what is said where it is not there, and what is set before torch is imported."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import torch_ascend
from ple_jax.core.errors import UserError
from torch_ascend import device

ROOT = Path(__file__).parents[2]
NO_CANN = "libhccl.so: cannot open shared object file: No such file or directory. Please check that cann is installed."
OTHER_TORCH = "/usr/lib/torch_npu/lib/libtorch_npu.so: undefined symbol: _ZN3c106detail14torchCheckFailEv"


def fake(folder: Path, source: str) -> Path:
    """A folder with a package torch_npu, which torch would import by itself, as the wheel's metadata asks."""
    (folder / "torch_npu").mkdir()
    (folder / "torch_npu" / "__init__.py").write_text(source)
    metadata = folder / "torch_npu-2.13.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return folder


class Accelerator(types.SimpleNamespace):
    """What torch.cuda and torch.npu are to `resolve`."""

    def __init__(self, count: int):
        super().__init__(current=None)
        self.count = count

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count

    def set_device(self, index: int) -> None:
        self.current = index


@pytest.fixture
def machine(monkeypatch):
    """Makes this one of so many CUDA devices and NPUs (None: torch-npu is not installed)."""

    def make(*, cuda: int = 0, npu: int | None = None) -> dict[str, Accelerator]:
        found = {"cuda": Accelerator(cuda)}
        if npu is not None:  # what importing torch_npu does
            found["npu"] = Accelerator(npu)
        for kind, accelerator in found.items():
            monkeypatch.setattr(torch, kind, accelerator, raising=False)
        return found

    monkeypatch.delattr(torch, "npu", raising=False)
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return make


# ---------------------------------------------------------------- which one


@pytest.mark.parametrize(
    ("there", "name", "means"),
    [
        ({}, "auto", "cpu"),
        ({}, "cpu", "cpu"),
        ({"cuda": 2}, "auto", "cuda:0"),
        ({"cuda": 2}, "cpu", "cpu"),
        ({"cuda": 2, "npu": 0}, "auto", "cuda:0"),
        ({"cuda": 2, "npu": 8}, "cuda", "cuda:0"),
    ],
)
def test_a_name_means_a_device(there, name, means, machine):
    found = machine(**there)
    assert str(device.resolve(name)) == means
    assert [kind for kind, accelerator in found.items() if accelerator.current == 0] == [means[:-2]] * (means != "cpu")


def test_an_npu_comes_first(machine, monkeypatch):
    found = machine(cuda=2, npu=8)
    monkeypatch.setattr(torch, "device", lambda kind, index: f"{kind}:{index}")  # torch knows no npu before torch_npu
    assert device.resolve("auto") == device.resolve("npu") == "npu:0"
    assert found["npu"].current == 0 and found["cuda"].current is None


def test_every_process_has_its_own(machine, monkeypatch):
    found = machine(cuda=4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device.resolve("auto") == torch.device("cuda", 3) and found["cuda"].current == 3
    monkeypatch.setenv("LOCAL_RANK", "4")
    for name in ("auto", "cuda"):
        with pytest.raises(UserError, match="process 4 of this machine has no cuda device.*there are 4.*--nproc-per-node=4"):
            device.resolve(name)
    assert device.resolve("cpu") == torch.device("cpu")  # of which there is no end


def test_an_environment_names_what_numbers_depend_on(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(fake(tmp_path, ""))
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "8.5.0"))
    found = device.versions(types.SimpleNamespace(type="npu"))
    assert found == {"torch_npu": "2.13.0", "cann": "8.5.0"} and device.versions(torch.device("cpu")) == {}


# ---------------------------------------------------------------- what is missing


def test_a_name_that_is_none(machine):
    machine()
    with pytest.raises(UserError, match="device 'gpu' is none of auto, npu, cuda, cpu"):
        device.resolve("gpu")


def test_no_cuda(machine):
    machine(npu=8)
    with pytest.raises(UserError, match="device 'cuda' is not here: torch sees no CUDA device.*nvidia-smi.*or auto"):
        device.resolve("cuda")


def test_no_wheel(machine, monkeypatch):
    machine(cuda=1)
    monkeypatch.setattr(device, "TORCH_NPU", device.import_torch_npu())
    with pytest.raises(UserError, match=r"device 'npu' needs the package torch-npu.*pip install 'ple_jax\[ascend\]'"):
        device.resolve("npu")
    assert device.passed_over("auto") == []


def test_no_npu(machine):
    machine(cuda=1, npu=0)
    assert "but no device" in device.passed_over("auto")[0]
    with pytest.raises(UserError, match="device 'npu' is not here: torch-npu and CANN are, but no device; see npu-smi info"):
        device.resolve("npu")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (f"ImportError({NO_CANN!r})", r"CANN, whose libraries are not found \(libhccl\.so.*: source .*/set_env\.sh"),
        (f"ImportError({OTHER_TORCH!r})", r"fits torch TORCH, and the installed one does not import \(.*undefined symbol"),
        ("RuntimeError('torch_npu 2.10.0\\nwants torch 2.10')", r"that fits torch TORCH.*import \(torch_npu 2\.10\.0 wants"),
    ],
    ids=["no CANN", "another torch", "another error"],
)
def test_a_wheel_that_does_not_import(error, says, machine, monkeypatch, tmp_path):
    machine()
    monkeypatch.delitem(sys.modules, "torch_npu")
    monkeypatch.syspath_prepend(fake(tmp_path, f"raise {error}\n"))
    monkeypatch.setattr(device, "TORCH_NPU", device.import_torch_npu())
    says = "device 'npu' needs .*" + says.replace("TORCH", re.escape(torch.__version__))
    with pytest.raises(UserError, match=says) as raised:
        device.resolve("npu")
    assert "\n" not in str(raised.value)
    assert device.resolve("auto") == torch.device("cpu")
    (warning,) = device.passed_over("auto")  # not in silence
    assert "torch-npu is installed, and device 'npu' needs " in warning and device.passed_over("cpu") == []
    assert importlib.util.find_spec("torch_npu") is None  # nobody else stumbles over it


@pytest.mark.slow
def test_one_line_of_a_real_command(tmp_path):
    """With the wheel and without CANN: importing torch would fail, and transformers, had they not been told to leave it."""
    broken = fake(tmp_path, f"raise ImportError({NO_CANN!r})\n")
    environment = {k: v for k, v in os.environ.items() if k not in torch_ascend.ENVIRONMENT}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{broken}"

    def python(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], env=environment | changes, cwd=tmp_path, capture_output=True, text=True
        )

    command = ["-m", "ple_jax.main", f"--config={ROOT}/configs/tiny.py", "--mode=plan", "--backend=torch"]
    refused = python(*command, "--config.model.device=npu")
    assert (refused.returncode, refused.stdout) == (2, "") and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("error: device 'npu' needs CANN, whose libraries are not found (libhccl.so")
    assert "libhccl.so" in python("-c", "import torch").stderr  # the pitfall is there
    found = python("-c", "from torch_ascend import reward_model, device; print(device.resolve('auto'))")
    assert found.stdout == "cpu\n", found.stderr


# ---------------------------------------------------------------- what is set before torch is imported


def environment_of(**given: str) -> dict[str, str]:
    """The environment that torch finds, in a process that was started with `given`."""
    code = (
        "import sys, os, json\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': print(json.dumps(dict(os.environ))); raise SystemExit\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import torch_ascend.device\n"
    )
    ours = {*torch_ascend.ENVIRONMENT, "PYTORCH_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    environment = {k: v for k, v in os.environ.items() if k not in ours} | {"PYTHONPATH": str(ROOT)} | given
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    return {name: found[name] for name in ours if name in found}


def test_the_environment_is_set_before_torch_is_imported():
    segments = "expandable_segments:True"
    assert environment_of() == torch_ascend.ENVIRONMENT | {
        "PYTORCH_NPU_ALLOC_CONF": segments, "PYTORCH_CUDA_ALLOC_CONF": segments
    }  # fmt: skip
    assert torch_ascend.ENVIRONMENT["TASK_QUEUE_ENABLE"] == "2"
    assert torch_ascend.ENVIRONMENT["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"


def test_what_the_user_set_stays():
    given = {"TASK_QUEUE_ENABLE": "1", "HCCL_DETERMINISTIC": "false", "PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:64"}
    found = environment_of(**given)
    assert {name: found[name] for name in given} == given
    assert found["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


def test_the_allocators_new_name_excludes_the_old_ones():
    found = environment_of(PYTORCH_ALLOC_CONF="max_split_size_mb:64")
    assert found["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"
    assert not {"PYTORCH_NPU_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & found.keys()


# ---------------------------------------------------------------- what it can do


def test_a_cpu():
    cpu = torch.device("cpu")
    assert device.capabilities(cpu).collectives == "gloo" and device.capabilities(cpu).steps_per_sync == 1
    assert device.total_memory(cpu) is None and device.description(cpu) == "cpu"


def test_accelerators_are_asked_rarely():
    for kind, collectives in {"cuda": "nccl", "npu": "hccl"}.items():
        able = device.CAPABILITIES[kind]
        assert able.collectives == collectives and able.steps_per_sync == 16


def test_only_one_file_knows_torch_npu():
    importing = [
        path.name for path in (ROOT / "torch_ascend").rglob("*.py")
        if any(line.strip().startswith(("import torch_npu", "from torch_npu")) or "import_module(\"torch_npu" in line
               for line in path.read_text().splitlines())
    ]  # fmt: skip
    assert importing == ["device.py"]
