"""What this machine's processor is, whether it computes in bfloat16, and how much memory is free or taken."""

import platform
from pathlib import Path

from ple_jax.core import identity

# of Linux; elsewhere little is known
CPUINFO, MEMINFO, STATUS = Path("/proc/cpuinfo"), Path("/proc/meminfo"), Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup")
_BFLOAT16 = frozenset({"amx_bf16", "avx512_bf16"})


def bfloat16() -> bool:
    """Whether it multiplies bfloat16 faster than float32: by AMX or AVX512-BF16."""
    return bool(_BFLOAT16 & {flag for line in _lines("flags") for flag in line.split()})


def digest() -> str:
    """12 digits that stand for the processor's kind and all it can do: machine code for one may be wrong on another."""
    said = _lines("flags", "Features", "model name", "CPU part") or {platform.machine(), platform.processor()}
    return identity.digest(["\n".join(sorted(said)).encode()])[:12]


def free_memory() -> int | None:
    """Bytes that programs can still have, in this container too; None where the system does not say."""
    found = [int(line.split()[1]) * 1024 for line in _of(MEMINFO) if line.startswith("MemAvailable:")]
    limit, used = ("".join(_of(CGROUP / name)).strip() for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        found.append(int(limit) - int(used))
    return max(0, min(found)) if found else None


def resident(field: str) -> int:
    """Bytes of this process in memory, of Linux: "VmRSS", now, or "VmHWM", the most there were."""
    return next(int(line.split()[1]) * 1024 for line in _of(STATUS) if line.startswith(field))


def _lines(*begin: str) -> set[str]:
    return {line for line in _of(CPUINFO) if line.startswith(begin)}


def _of(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
