"""What this machine's processor is, and whether it computes in bfloat16."""

import platform
from pathlib import Path

from ple_jax.core import identity

CPUINFO = Path("/proc/cpuinfo")  # of Linux; elsewhere little is known
_BFLOAT16 = frozenset({"amx_bf16", "avx512_bf16"})


def bfloat16() -> bool:
    """Whether it multiplies bfloat16 faster than float32: by AMX or AVX512-BF16."""
    return bool(_BFLOAT16 & {flag for line in _lines("flags") for flag in line.split()})


def digest() -> str:
    """12 digits that stand for the processor's kind and all it can do: machine code for one may be wrong on another."""
    said = _lines("flags", "Features", "model name", "CPU part") or {platform.machine(), platform.processor()}
    return identity.digest(["\n".join(sorted(said)).encode()])[:12]


def _lines(*begin: str) -> set[str]:
    try:
        return {line for line in CPUINFO.read_text().splitlines() if line.startswith(begin)}
    except OSError:
        return set()
