"""The simulated NPU: built on first use, and scripts that run on it.

    simulator.run("import torch, torch_npu; print(torch.ones(3, device='npu').sum())")

The device is PyTorch's PrivateUse1 renamed, which a process can do once and not undo: so tests use it in subprocesses alone.
There `import torch_npu` finds path/torch_npu, which has the names of the real one.
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

from patience import LAST_RESORT

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SOURCE = HERE / "simulator.cpp"
LIBRARIES = ("-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python")
FLAGS = ("-std=c++20", "-O0", "-shared", "-fPIC", "-w")


def unavailable() -> str:
    """Why the simulator cannot be built here; empty if it can."""
    if sys.platform != "linux":
        return "the simulated NPU is for Linux"
    if not shutil.which("g++"):
        return "the simulated NPU needs a C++ compiler: g++"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the simulated NPU needs Python's headers: Python.h"
    return ""


def build() -> Path:
    """The compiled simulator: taken from the cache, or made (half a minute) by one process while the others wait."""
    key = "\n".join([SOURCE.read_text(), *FLAGS, version("torch"), sysconfig.get_config_var("SOABI")])
    library = ROOT / ".pytest_cache" / "npu" / hashlib.sha256(key.encode()).hexdigest()[:16] / "_C.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            torch = Path(importlib.util.find_spec("torch").origin).parent
            headers = [torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_path("include")]
            arguments = [*FLAGS, *(f"-isystem{folder}" for folder in headers), SOURCE, f"-L{torch / 'lib'}", *LIBRARIES]
            partial = library.with_suffix(".partial")
            compiled = subprocess.run(["g++", *arguments, "-o", partial], capture_output=True, text=True)
            if compiled.returncode:
                raise RuntimeError(f"the simulated NPU does not compile:\n{compiled.stderr[-5000:]}")
            partial.rename(library)
    return library


def environment(**others: str) -> dict[str, str]:
    """Of a process in which `import torch_npu` gives the simulated NPU, and the project and these tests can be imported."""
    tests = HERE.parent
    folders = [folder for folder in sorted(tests.iterdir()) if folder.is_dir() and folder != HERE]
    path = [*map(str, [HERE / "path", ROOT, tests, *folders]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)} | others


def run(
    script: str, *, ranks: int = 1, env: Mapping[str, str] | None = None, check: bool = True, timeout: float = LAST_RESORT
) -> subprocess.CompletedProcess[str]:
    """Runs a script where there are NPUs; on several ranks by torchrun.

    Args:
        env: variables to add. NPU_SIM_DEVICES, NPU_SIM_MEMORY (bytes) and NPU_SIM_FUSED=1 are the simulator's.
        check: raise if the script fails, with all that it printed.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "script.py")
        file.write_text(textwrap.dedent(script))
        command = [sys.executable, *launch, str(file)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=environment(**env or {}), **pipes) as process:
            try:
                output, errors = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.terminate()  # on which torchrun ends its ranks
                output, errors = process.communicate()
    if check and process.returncode:
        raise AssertionError(f"exit code {process.returncode}\n{output}\n{errors}")
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def inside(*, ranks: int = 1, **env: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Makes a test run where there are NPUs: pytest's process starts one, or one a rank, that calls the function itself."""

    def decorate(test: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(test)
        def start() -> None:
            run(f"import torch_npu, {test.__module__} as tests\ntests.{test.__name__}.__wrapped__()", ranks=ranks, env=env)

        return start

    return decorate
