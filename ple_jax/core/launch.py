"""Finds out how the processes of a run were started: by flags, variables, or a launcher that JAX knows. Imports no jax."""

import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

from ple_jax.core.errors import UserError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_FLAGS = ("--coordinator", "--processes", "--process")
# of launchers that JAX knows: how many processes there are, and what else is set where it started this one
_LAUNCHERS = {
    "SLURM_NTASKS": ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"),
    "OMPI_COMM_WORLD_SIZE": ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_RANK"),
    "MEGASCALE_NUM_SLICES": ("MEGASCALE_COORDINATOR_ADDRESS",),
}
_GOOGLE = "0x1ae0"  # maker of a PCI device
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # with commas


class Given(NamedTuple):
    """The address of process 0, the number of processes, and the number of this one; all None if JAX is to find out."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def given(coordinator: str | None, processes: int | None, process: int | None) -> Given | None:
    """Returns what flags or environment variables say of the processes; None if this process is the only one.

    Raises:
        UserError: something is missing or malformed, or there is no process of this number.
    """
    found = [_said(i, flag) for i, flag in enumerate((coordinator, processes, process))]
    if found[1] == "1" or (not any(found) and not _launched()):
        if found[1] != "1" and os.environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
            raise UserError(
                f"Open MPI started {os.environ['OMPI_COMM_WORLD_SIZE']} processes, and this version of it does not say where"
                f" the first is: give {', '.join(_FLAGS)}, or --processes=1 for processes that know nothing of one another"
            )
        return None
    if not any(found):
        return Given()
    if missing := [i for i, value in enumerate(found) if not value]:
        i = missing[0]
        raise UserError(f"of several processes each is told three things: {_FLAGS[i]} (or {VARIABLES[i]}) is missing")
    count, own = (_whole(i, str(found[i])) for i in (1, 2))
    if not 0 <= own < count:
        raise UserError(f"--process={own}: {count} processes are numbered 0 to {count - 1}")
    if ":" not in str(found[0]):
        raise UserError(f"--coordinator={found[0]} must be HOST:PORT, of process 0")
    return Given(str(found[0]), count, own)


def _said(i: int, flag: Any) -> str | None:
    return str(flag) if flag is not None else os.environ.get(VARIABLES[i])


def _whole(i: int, value: str) -> int:
    if not value.isdecimal():
        raise UserError(f"{_FLAGS[i]}={value} (or {VARIABLES[i]}) must be a whole number")
    return int(value)


def _launched() -> bool:
    """Says whether a launcher that JAX knows started several processes."""
    for count, others in _LAUNCHERS.items():
        if os.environ.get(count, "1") != "1" and all(name in os.environ for name in others):
            return True
    if any("," in os.environ.get(name, "") for name in _TPU_HOSTS):
        return True
    # a machine of Google's with TPUs, where the hosts of a slice know of one another by their metadata
    vendors = (file.read_text().strip() for file in Path("/sys/bus/pci/devices").glob("*/vendor"))
    wanted = "tpu" in os.environ.get("JAX_PLATFORMS", "tpu").split(",") and "TPU_SKIP_MDS_QUERY" not in os.environ
    return wanted and bool(importlib.util.find_spec("libtpu")) and _GOOGLE in vendors


def number(process: int | None) -> int:
    """Returns the number of this process, as far as it can be known without JAX; 0 if it is the only one.

    Args:
        process: the flag --process, if it is given.
    """
    names = (VARIABLES[2], "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID")
    found = [os.environ[name] for name in names if os.environ.get(name, "").isdecimal()]
    return process if process is not None else int(found[0]) if found else 0
