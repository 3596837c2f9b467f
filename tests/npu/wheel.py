"""The real torch_npu on a machine without CANN: its wheel unpacked, and every call that it makes into CANN stubbed.

It proves operators' names, arguments, shapes, dtypes and devices, never a number. The wheel is no part of any environment:
TORCH_NPU_WHEEL names one, or refresh_schemas.py has put it into the cache.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

from patience import LAST_RESORT

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".pytest_cache" / "torch_npu"
# one library stands for all that torch_npu links
LIBRARIES = ("ascendcl", "acl_op_compiler", "hccl", "ge_runner", "graph", "acl_tdt_channel")
_CANN = r"((?:acl(?!nn)|Hccl|Msprof|rt[A-Z])\w+)"


def wanted() -> str:
    """The version that fits the installed torch."""
    return version("torch").partition("+")[0]


def find() -> Path | None:
    """The wheel for this torch, Python and machine."""
    if named := os.environ.get("TORCH_NPU_WHEEL"):
        return Path(named)
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return next(CACHE.glob(f"torch_npu-{wanted()}*-{python}-{python}-*{os.uname().machine}.whl"), None)


def unavailable() -> str:
    """Why the wheel cannot be looked at here; empty if it can."""
    wheel = find()
    if wheel is None:
        return f"no wheel of torch-npu {wanted()}: set TORCH_NPU_WHEEL, or run tests/npu/refresh_schemas.py"
    if not wheel.exists():
        return f"TORCH_NPU_WHEEL={wheel} is not there"
    if absent := [tool for tool in ("gcc", "nm") if not shutil.which(tool)]:
        return f"stubs of CANN need {' and '.join(absent)}"
    return ""


def run(script: str, *arguments: str) -> str:
    """What a script of fake_cann prints where torch_npu can be imported."""
    folder = _unpacked(find())
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "LD_LIBRARY_PATH": str(folder / "cann"),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    command = [sys.executable, str(HERE / "fake_cann" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LAST_RESORT)
    if done.returncode:
        raise AssertionError(f"{script}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def _unpacked(wheel: Path) -> Path:
    """The wheel's files and the stubs; made by one process while the others wait."""
    folder = CACHE / wheel.stem
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(partial)
            _stub(partial)
            partial.rename(folder)
    return folder


def _stub(folder: Path) -> None:
    libraries = [str(path) for path in folder.glob("torch_npu/**/*.so")]
    linked = subprocess.run(["nm", "-D", "--undefined-only", *libraries], capture_output=True, text=True, check=True).stdout
    called = set(re.findall(rf" U {_CANN}", linked))
    for library in libraries:  # some it looks up by name
        called |= {name.decode() for name in re.findall(rf"\0{_CANN}(?=\0)".encode(), Path(library).read_bytes())}
    written = (HERE / "fake_cann" / "cann.c").read_text()
    rest = sorted(name for name in called if f"{name}(" not in written)
    cann = folder / "cann"
    cann.mkdir()
    source = cann / "cann.c"
    source.write_text(written + "".join(f"long {name}(void) {{ return 0; }}\n" for name in rest))
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", cann / "libcann.so", source], check=True)
    for library in LIBRARIES:
        (cann / f"lib{library}.so").symlink_to("libcann.so")
