"""Devices: which ones there are, what they can do, how full they are. The only file that may import torch_npu."""

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ple_jax.core.errors import UserError


@dataclass(frozen=True)
class Capabilities:
    """What a kind of device can do."""

    collectives: str  # backend of torch.distributed
    # tokens decoded between two questions whether all responses have ended: each waits for the device
    steps_per_sync: int
    mixed_matmul: bool = False  # torch.mm takes bfloat16 and gives float32
    strided: bool = True  # attention reads a part of a cache where it is (of NPUs nobody knows here: it may be copied)
    records: bool = False  # operators can be recorded once and repeated (tried on CUDA; NPUs may, but nobody has tried here)


CAPABILITIES = {
    "cpu": Capabilities("gloo", steps_per_sync=1),
    "cuda": Capabilities("nccl", steps_per_sync=16, mixed_matmul=True, records=True),
    "npu": Capabilities("hccl", steps_per_sync=16, strided=False),
}
_INSTALL = "pip install 'ple_jax[ascend]' (torch-npu has torch's version number)"


def resolve(name: str = "auto") -> torch.device:
    """Returns the device that `name` means, and makes it the current one.

    If torchrun started several processes, it is this process's own device.

    Args:
        name: cpu, cuda or npu; auto is an Ascend NPU where there is one, else a CUDA device, else the CPU.

    Raises:
        UserError: the name is unknown, or there is no device of that kind, or none for this process. For an NPU the message
            says what is missing: wheel, CANN or driver.
    """
    # str() is "": nothing is missing
    checks: dict[str, Callable[[], str]] = {"npu": _missing_npu, "cuda": _missing_cuda, "cpu": str}
    if name not in ("auto", *checks):
        raise UserError(f"device {name!r} is none of auto, {', '.join(checks)}")
    if name != "auto" and (missing := checks[name]()):
        raise UserError(f"device {name!r} {missing}; or take another device, such as cpu, or auto")
    kind = next(kind for kind in checks if not checks[kind]()) if name == "auto" else name
    if kind == "cpu":
        return torch.device("cpu")
    index, there = int(os.environ.get("LOCAL_RANK", "0")), module(kind).device_count()
    if index >= there:
        raise UserError(
            f"process {index} of this machine has no {kind} device of its own: there are {there}; start"
            f" --nproc-per-node={there}, or look at ASCEND_RT_VISIBLE_DEVICES and CUDA_VISIBLE_DEVICES"
        )
    module(kind).set_device(index)
    return torch.device(kind, index)


def _missing_cuda() -> str:
    if torch.cuda.is_available():
        return ""
    return "is not here: torch sees no CUDA device (a CPU wheel of torch, or no driver; see nvidia-smi)"


_NO_PACKAGE = "needs the package torch-npu"


def import_torch_npu() -> str:
    """Imports torch_npu; returns why that is impossible, or an empty string."""
    if importlib.util.find_spec("torch_npu") is None:
        return f"{_NO_PACKAGE}, which is not installed: {_INSTALL}"
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # it raises what its libraries raise
        # transformers imports what it finds, and would fail with it, whatever the device is
        sys.modules["torch_npu"] = None  # type: ignore[assignment]
        reason = " ".join(str(error).split())[:200]
        if "cannot open shared object" in reason:  # of a wheel for another torch the linker misses a symbol instead
            return f"needs CANN, whose libraries are not found ({reason}): source .../ascend-toolkit/set_env.sh first"
        return (
            f"needs a torch-npu that fits torch {torch.__version__}, and the installed one does not import ({reason}):"
            f" {_INSTALL}"
        )
    return ""


TORCH_NPU = import_torch_npu()


def _missing_npu() -> str:
    """Returns why there is no NPU, or an empty string if there is one."""
    if not hasattr(torch, "npu"):
        return TORCH_NPU
    if not torch.npu.is_available():
        return "is not here: torch-npu and CANN are, but no device; see npu-smi info (driver, firmware, container options)"
    return ""


def passed_over(name: str) -> list[str]:
    """Returns a warning if `auto` took another device although torch-npu is installed; else nothing."""
    missing = _missing_npu()
    if name != "auto" or not missing or missing.startswith(_NO_PACKAGE):
        return []
    return [f"warning: torch-npu is installed, and device 'npu' {missing}; config.model.device 'auto' took another one"]


def versions(device: torch.device) -> dict[str, str]:
    """Returns what numbers on an NPU depend on beside torch: the versions of torch-npu and, where it is told, of CANN."""
    if device.type != "npu":
        return {}
    with contextlib.suppress(PackageNotFoundError):
        folder = Path(os.environ.get("ASCEND_HOME_PATH", "unknown")).resolve()  # .../ascend-toolkit/VERSION
        return {"torch_npu": version("torch-npu"), "cann": str(getattr(torch.version, "cann", None) or folder.name)}
    return {}


def module(kind: str) -> Any:
    """Returns `torch.npu` or `torch.cuda`, for a device of that kind."""
    return getattr(torch, kind)


def capabilities(device: torch.device) -> Capabilities:
    return CAPABILITIES[device.type]


def recording_memory() -> Any:
    """Returns a memory pool for the temporary tensors of recordings, no two of which may be replayed at once."""
    return torch.cuda.graph_pool_handle()


def record(call: Callable[[], None], memory: Any) -> Callable[[], None]:
    """Makes a recording of what `call` does on the device; returns a function that replays it in one launch.

    `call` must have run once before. Its tensors stay where they are in memory, and nothing in it may wait for the device.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory):  # recorded, not run
        call()
    return graph.replay


@contextlib.contextmanager
def profile(device: torch.device, folder: Path) -> Iterator[None]:
    """Opens a context whose operators are traced, to a file in `folder` for TensorBoard, chrome://tracing or Perfetto."""
    profiler = importlib.import_module("torch_npu").profiler if device.type == "npu" else torch.profiler
    with profiler.profile(on_trace_ready=profiler.tensorboard_trace_handler(str(folder))):
        yield


def total_memory(device: torch.device) -> int | None:
    """Returns the bytes of an accelerator's memory; None for the CPU, whose limit we cannot know."""
    return None if device.type == "cpu" else int(module(device.type).get_device_properties(device).total_memory)


def free_memory(device: torch.device) -> int:
    """Returns the bytes of an accelerator's memory that no process has taken."""
    return int(module(device.type).mem_get_info(device)[0])


def description(device: torch.device) -> str:
    """Returns a device's model, such as "Ascend910B3", "NVIDIA H100 80GB HBM3" or "cpu"."""
    return "cpu" if device.type == "cpu" else str(module(device.type).get_device_name(device))
