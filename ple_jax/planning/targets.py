"""Devices to compile for, which need not be there: slices of TPUs through libtpu, or simulated CPU devices."""

import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ple_jax.backend import sharding
from ple_jax.core.errors import UserError, suggestion


class Chip(NamedTuple):
    """One device of a TPU generation."""

    hbm: float  # GiB that the compiler grants a program
    options: Mapping[str, str] = MappingProxyType({})  # for get_topology_desc


# hbm is the limit that libtpu 0.0.42 names when it refuses a program: the chip's memory as documented by Google Cloud
# (32, 16, 95, 32 and 192 GiB) less what the runtime keeps. A v4 chip is one device, a tpu7x chip is two.
CHIPS = {
    "v4": Chip(30.75, {"chip_config_name": "megacore"}),
    "v5e": Chip(15.75),
    "v5p": Chip(95.74),
    "v6e": Chip(31.25),
    "tpu7x": Chip(94.75),
}

# without these libtpu asks the metadata server of a cloud machine where it runs, writes logs, and takes a lock
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # of the machine it would run on; the topology asked for is another matter
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Target(NamedTuple):
    """Devices to compile for, which need not exist."""

    name: str
    devices: Sequence[Any]
    chip: Chip | None  # None: memory is not limited
    platform: str  # what layers=auto goes by
    note: str


def open_target(topology: str) -> Target:
    """The devices of `v5e:2x4`, `v5p:2x2x2` ... or `cpu:8`.

    To be called before jax has made its own devices: what executes is the CPU, whatever else the machine has.

    Raises:
        UserError: not a topology, or one that the TPU compiler does not know.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", topology)
    kinds = ("cpu", *CHIPS)
    if match is None or match[1] not in kinds:
        given = topology.split(":", 1)[0]
        raise UserError(
            f"--topology={topology} is not known; give KIND:CHIPS, KIND one of {', '.join(kinds)}:"
            f" v5e:2x4, v5p:2x2x2, cpu:8{suggestion(given, kinds)}"
        )
    kind, count = match[1], math.prod(map(int, match[2].split("x")))
    if not count:
        raise UserError(f"--topology={topology} has no chips")
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
        return Target(topology, _simulated(count), None, "cpu", "compiled for simulated CPU devices")
    if importlib.util.find_spec("libtpu") is None:
        note = (
            "libtpu is not installed: compiled for simulated CPU devices instead, whose compiler lays out memory and"
            " places collectives in its own way: an estimate (pip install 'ple_jax[tpu]' brings the TPU's compiler)"
        )
        return Target(topology, _simulated(count), CHIPS[kind], "tpu", note)
    return Target(topology, _tpu(topology, CHIPS[kind]), CHIPS[kind], "tpu", "compiled by the TPU's own compiler, libtpu")


def _tpu(topology: str, chip: Chip) -> Sequence[Any]:
    from jax.experimental import topologies
    from jax.experimental.compilation_cache import compilation_cache

    # what is compiled without the device cannot be read back from a cache on disk
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(topology, platform="tpu", **chip.options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology}: the TPU compiler refuses it ({str(error).splitlines()[0]})") from error


def _simulated(count: int) -> Sequence[Any]:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # this process has made its devices already; they may be enough
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(f"{count} simulated devices are asked for and there are {len(devices)}; start a new process")
    return devices[:count]


def make_mesh(target: Target, *, data: int, fsdp: int, tensor: int) -> Mesh:
    """The config's mesh over all devices of the target.

    Raises:
        UserError: it does not take exactly these devices.
    """
    devices = target.devices
    if data * fsdp * tensor != len(devices):
        rest, over = divmod(len(devices), data * tensor)
        fits = f"--config.mesh.fsdp={rest}"
        if over:
            fits = f"--config.mesh.data=1 --config.mesh.tensor=1 --config.mesh.fsdp={len(devices)}"
        raise UserError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} is {data * fsdp * tensor} devices, --topology={target.name}"
            f" has {len(devices)}; set {fits}"
        )
    return Mesh(np.array(devices).reshape(data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
