"""Devices to compile for, which need not be there: TPU slices through libtpu, GPUs by an estimate, simulated CPU devices.

A topology is refused if no such slice exists, or if the mesh does not take its devices: a run could not start on it.
"""

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
    """A kind of chip: the memory of one device, and the slices that there are of them."""

    hbm: float  # GiB that a program may take
    most: int  # chips of the largest slice; of GPUs those of a host
    axes: int = 2  # of a slice; 1: GPUs, which have no shape
    options: Mapping[str, str] = MappingProxyType({})  # for get_topology_desc
    devices: int = 1  # that a chip is


# hbm is the limit that libtpu 0.0.42 names when it refuses a program: the chip's memory as documented by Google Cloud
# (32, 16, 95, 32 and 192 GiB) less what the runtime keeps. A v4 chip is one device, a tpu7x chip is two.
CHIPS = {
    "v4": Chip(30.75, 3072, 3, {"chip_config_name": "megacore"}),
    "v5e": Chip(15.75, 256),
    "v5p": Chip(95.74, 6144, 3),
    "v6e": Chip(31.25, 256),
    "tpu7x": Chip(94.75, 9216, 3, devices=2),
}
# 75% of what CUDA names as the total: what JAX takes of a GPU
GPUS = {"a100": Chip(0.75 * 79.1, 8, 1), "h100": Chip(0.75 * 79.18, 8, 1)}
# of Google Cloud's documentation, November 2026; of three axes, from a cube of 4x4x4 on, all multiples of 4 in rising order
_SLICES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4"),
}
_TPU_HOST = 4  # chips
_SIMULATED = (
    "an estimate: compiled for simulated CPU devices, whose compiler lays out memory and places collectives in its own way"
)
# slices of as many chips, whose compiler stands in for that of GPUs, which compiles nothing where there is none
_INSTEAD = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}

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
    hosts: int = 1  # each of which starts a process, or several


def open_target(topology: str) -> Target:
    """Returns the devices of a topology: `v5e:2x4`, `v5p:4x4x4` ..., `h100:64` or `cpu:8`.

    It must be called before jax has made its own devices: it has jax execute on the CPU, whatever else the machine has.

    Raises:
        UserError: if it is not a topology, or there is no such slice.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", topology)
    kinds = ("cpu", *CHIPS, *GPUS)
    if match is None or match[1] not in kinds:
        given = topology.split(":", 1)[0]
        raise UserError(
            f"--topology={topology} is not known; give KIND:CHIPS, KIND one of {', '.join(kinds)}:"
            f" v5e:2x4, v5p:4x4x4, h100:8, cpu:8{suggestion(given, kinds)}"
        )
    kind, shape = match[1], match[2]
    count = math.prod(map(int, shape.split("x")))
    if not count:
        raise UserError(f"--topology={topology} has no chips")
    if kind in CHIPS:
        _check_slice(topology, CHIPS[kind], shape)
    elif "x" in shape:
        raise UserError(f"--topology={topology}: of {kind} give the number of devices alone: {kind}:{count}")
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
        return Target(topology, simulated(count), None, "cpu", "compiled for simulated CPU devices")
    return _gpus(topology, GPUS[kind], count) if kind in GPUS else _slice(topology, CHIPS[kind], count)


def _slice(topology: str, chip: Chip, count: int) -> Target:
    hosts = 1 if chip.axes == 2 and count <= 8 else -(-count // _TPU_HOST)  # there are machines of 8 chips
    if importlib.util.find_spec("libtpu") is None:
        note = f"libtpu is not installed: {_SIMULATED} (pip install 'ple_jax[tpu]' brings the TPU's compiler)"
        return Target(topology, simulated(count * chip.devices), chip, "tpu", note, hosts)
    return Target(topology, _tpu(topology, chip), chip, "tpu", "compiled by the TPU's own compiler, libtpu", hosts)


def _gpus(topology: str, chip: Chip, count: int) -> Target:
    hosts, memory = -(-count // chip.most), "the memory is what JAX takes of a GPU, 75% (XLA_PYTHON_CLIENT_MEM_FRACTION)"
    if importlib.util.find_spec("libtpu") is None or count not in _INSTEAD:
        note = f"{_SIMULATED}, computes bfloat16 in copies in float32, and makes attention's scores; {memory}"
        return Target(topology, simulated(count), chip, "gpu", note, hosts)
    other = f"v5p:{_INSTEAD[count]}"
    note = f"an estimate: compiled for as many chips of a TPU, {other}, by their own compiler, libtpu; {memory}"
    return Target(topology, _tpu(other, CHIPS["v5p"]), chip, "gpu", note, hosts)


def _check_slice(topology: str, chip: Chip, shape: str) -> None:
    """Raises a UserError if there is no such slice to be had, though the compiler may compile for it."""
    sizes = [int(size) for size in shape.split("x")]
    cubes = chip.axes == 3 == len(sizes) and all(size % 4 == 0 for size in sizes) and sizes == sorted(sizes)
    if shape in _SLICES[chip.axes] or (cubes and math.prod(sizes) <= chip.most):
        return
    known = ", ".join(_SLICES[chip.axes])
    larger = f", and multiples of 4 in rising order from 4x4x4 to {chip.most:,} chips" if chip.axes == 3 else ""
    raise UserError(f"--topology={topology}: there is no such slice, only {known}{larger}; a run could not start on it")


def _tpu(topology: str, chip: Chip) -> Sequence[Any]:
    from jax.experimental import topologies
    from jax.experimental.compilation_cache import compilation_cache

    # what is compiled without the device cannot be read back from a cache on disk
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    options = {**chip.options, **({"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {})}
    try:
        return topologies.get_topology_desc(topology, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology}: the TPU compiler refuses it ({str(error).splitlines()[0]})") from error


def simulated(count: int) -> Sequence[Any]:
    """Returns so many simulated CPU devices, which a program takes for real ones.

    Raises:
        UserError: if this process has made its devices already, and they are fewer.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # this process has made its devices already; they may be enough
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(f"{count} simulated devices are asked for and there are {len(devices)}; start a new process")
    return devices[:count]


def make_mesh(target: Target, *, data: int, fsdp: int, tensor: int) -> Mesh:
    """Makes the config's mesh over all devices of the target.

    Raises:
        UserError: if the mesh does not take exactly these devices.
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
