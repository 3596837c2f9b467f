"""What this machine's processor is, whether it computes in bfloat16, and how many cores and how much memory there are."""

import os
import platform
from pathlib import Path
from typing import Any

from ple_jax.core import identity

# of Linux; elsewhere little is known
CPUINFO, MEMINFO, STATUS = Path("/proc/cpuinfo"), Path("/proc/meminfo"), Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup")
# not avx512_bf16: with that alone, products of [64, 576] and [576, 3072] took 1.8 times as long in bfloat16 as in float32 in
# XLA, and 1.5 times in torch (docs/speed.md)
_BFLOAT16 = "amx_bf16"


def bfloat16() -> bool:
    """Says whether the processor multiplies bfloat16 faster than float32, as those with AMX do."""
    return any(_BFLOAT16 in line.split() for line in _lines("flags"))


def digest() -> str:
    """Returns 12 hex digits for the processor's kind and features: machine code for one may be wrong on another."""
    said = _lines("flags", "Features", "model name", "CPU part") or {platform.machine(), platform.processor()}
    return identity.digest(["\n".join(sorted(said)).encode()])[:12]


def named() -> str:
    """Returns the processor's name and `digest`: virtual machines of different processors often have one name."""
    said = next((line.partition(":")[2].strip() for line in _of(CPUINFO) if line.startswith("model name")), "")
    return f"{said or platform.processor() or platform.machine()} ({digest()})"


def environment(kind: str) -> dict[str, Any]:
    """Returns what environment.json says of this machine's processor, for a run on devices of a kind: "cpu", "gpu" ...

    Which processor it is has a say in results only where it computes them.
    """
    return {**({"processor": named()} if kind == "cpu" else {}), "cores": cores()}


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int | None:
    """Returns the bytes that programs can still have, also within a container's limit; None if the system does not say."""
    found = [int(line.split()[1]) * 1024 for line in _of(MEMINFO) if line.startswith("MemAvailable:")]
    limit, used = ("".join(_of(CGROUP / name)).strip() for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        cached = [int(line.split()[1]) for line in _of(CGROUP / "memory.stat") if line.startswith("inactive_file ")]
        found.append(int(limit) - int(used) + sum(cached))  # files that were read, which make room
    return max(0, min(found)) if found else None


def resident(field: str) -> int:
    """Returns the bytes that this process has in memory, on Linux: "VmRSS" for now, "VmHWM" for the most so far."""
    return next(int(line.split()[1]) * 1024 for line in _of(STATUS) if line.startswith(field))


def _lines(*begin: str) -> set[str]:
    return {line for line in _of(CPUINFO) if line.startswith(begin)}


def _of(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
