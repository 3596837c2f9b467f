"""Several processes, one per device, as torchrun starts them: how they hear of calls, and how rows are spread and gathered.

`ple_jax.core.together` says who leads and what the others do.

Rows (prompts to complete, queries of a pass) are spread over all processes in order. The base is on every device
(mesh.data), or its layers are spread over mesh.fsdp of them (FSDP2); adapters are on every device.
"""

import contextlib
import datetime
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous

from ple_jax.core import together
from ple_jax.core.errors import UserError
from torch_ascend import device as devices

_FITS = 0.8  # share of a device's memory that a base may take before it is sharded
_WAIT = datetime.timedelta(days=30)  # for process 0, which may score for hours
_TOGETHER = datetime.timedelta(hours=2)  # for a collective
_SAID, _READ = "error", "read"  # what process 0 ends with, in the store, and who has read it
_HEARD = datetime.timedelta(seconds=5)  # for either


class World(NamedTuple):
    """This process's place among those that torchrun started."""

    rank: int = 0
    size: int = 1
    control: Any = None  # the group in which process 0 says what to do: gloo, of bytes


ALONE = World()
_world = ALONE  # of this process, as torchrun started it


def world() -> World:
    """Returns this process's place among those that torchrun started."""
    return _world


# ---------------------------------------------------------------- one leads


class _Gloo:
    """The `together.Control` in which process 0 tells the others what to do: bytes, broadcast in a group for that."""

    def __init__(self, own: World, store: Any):
        self.rank, self.size, self._group, self._store = own.rank, own.size, own.control, store

    def tell(self, message: bytes) -> None:
        dist.broadcast_object_list([message], 0, group=self._group)

    def told(self) -> bytes:
        box: list[Any] = [None]
        dist.broadcast_object_list(box, 0, group=self._group)
        return box[0]

    def leaving(self, error: BaseException) -> None:
        """Tells the others process 0's error. As it goes, the others' collectives fail, and they end."""
        self._store.set(_SAID, str(error))
        with contextlib.suppress(dist.DistStoreError):  # those that are in a collective do not read it
            self._store.wait([f"{_READ}/{rank}" for rank in range(1, self.size)], _HEARD)  # the store may go with it

    def failed(self, error: BaseException, *, known: bool) -> None:
        if isinstance(error, RuntimeError) and re.search(
            "connection (closed|reset)|socket|broken pipe", str(error), re.IGNORECASE
        ):
            print(f"process {self.rank}: another process is gone", file=sys.stderr)
            sys.exit(1)
        if isinstance(error, UserError) and not self._said(error, known):
            print(f"error: process {self.rank}: {error}", file=sys.stderr)

    def _said(self, error: UserError, known: bool) -> bool:
        """Says whether process 0 reports this error, too.

        It may have found nothing amiss, and be in a collective, or be gone.
        """
        try:
            self._store.wait([_SAID], _HEARD)
            said = self._store.get(_SAID).decode()
            self._store.set(f"{_READ}/{self.rank}", "")
        except dist.DistError:
            return known
        return known or said == str(error)


@contextlib.contextmanager
def processes(config: Any) -> Iterator[bool]:
    """Opens a context that is True in process 0, which leads, and False in the others (see `together.led`).

    If there is only one process, it is True at once.

    Raises:
        UserError: the mesh does not have as many devices as there are processes, or torchrun did not start these.
    """
    global _world
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError("WORLD_SIZE is set and LOCAL_RANK is not: start the processes with torchrun, which sets both")
    mesh_size(config.mesh, size)
    if size == 1:
        yield True
        return
    device = devices.resolve(config.model.device)
    own = devices.capabilities(device).collectives
    backends = own if own == "gloo" else f"cpu:gloo,{device.type}:{own}"
    store, rank, _ = next(rendezvous("env://", timeout=_TOGETHER))
    dist.init_process_group(backends, timeout=_TOGETHER, rank=rank, world_size=size, store=store)
    _world = World(rank, size, dist.new_group(backend="gloo", timeout=_WAIT))
    if _world.rank:
        # a stop is process 0's business: it finishes what it has in hand, and then tells
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    with together.led(_Gloo(_world, dist.PrefixStore("ple_jax", store))) as leads:
        yield leads
    dist.destroy_process_group()
    _world = ALONE


# ---------------------------------------------------------------- the base


def check_tensor(mesh: Any) -> None:
    """Raises a UserError if the mesh has a `tensor` axis, since this backend has no tensor parallelism."""
    if mesh.tensor != 1:
        raise UserError(
            f"config.mesh.tensor is {mesh.tensor}: the torch backend has no tensor parallelism; spread the base with"
            f" --config.mesh.fsdp={mesh.tensor * mesh.fsdp} --config.mesh.tensor=1"
        )


def mesh_size(mesh: Any, size: int) -> None:
    """Raises a UserError unless the mesh has as many devices as there are processes (`size`)."""
    check_tensor(mesh)
    if mesh.data * mesh.fsdp != size:
        raise UserError(
            f"config.mesh is data {mesh.data} x fsdp {mesh.fsdp}, and {size} processes were started; set"
            f" --config.mesh.data={size} (a whole base on every device) or --config.mesh.fsdp={size} (one spread over all),"
            f" or start with torchrun --nproc-per-node={mesh.data * mesh.fsdp}"
        )


def choose(mesh: Mapping[str, int], base_bytes: int, memory: int | None) -> tuple[int, int, str]:
    """Decides how the base is spread.

    Returns the number of its copies, the devices that share one, and a note if that is not what the mesh says, since a base
    that does not fit is spread over all devices.

    Args:
        memory: bytes of a device; None if unknown.
    """
    data, fsdp = mesh["data"], mesh["fsdp"]
    if memory is None or base_bytes <= _FITS * memory * fsdp or data == 1:
        return data, fsdp, ""
    size = f"{base_bytes / 2**30:.1f} GiB of base weights do not fit {fsdp} x {memory / 2**30:.1f} GiB"
    return 1, data * fsdp, f"{size}: they are spread over all {data * fsdp} devices (FSDP2), as with mesh.fsdp={data * fsdp}"


def least(world: World, memory: int | None) -> int | None:
    """Returns the fewest bytes of memory that any process has, so that all decide alike; None where they are unknown."""
    return int(gather(world, torch.tensor([memory or 0])).min()) or None


def make_mesh(device: torch.device, *, data: int, fsdp: int) -> DeviceMesh:
    """Makes the mesh over which layers are spread: one dimension, or two if there are several copies of the base."""
    if data == 1:
        return init_device_mesh(device.type, (fsdp,), mesh_dim_names=("fsdp",))
    return init_device_mesh(device.type, (data, fsdp), mesh_dim_names=("data", "fsdp"))


class Place(NamedTuple):
    """Where a process builds its part of a backend."""

    device: torch.device
    able: devices.Capabilities  # of the device
    world: World
    mesh: DeviceMesh | None = None  # over which the layers are spread; None: the base is whole
    note: str = ""  # where that is not what the config says


def shard_layer(layer: nn.Module, mesh: DeviceMesh) -> None:
    """Spreads a frozen layer (FSDP2): every device holds a part, and gathers the whole while the layer is computed."""
    fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def shard_root(decoder: nn.Module, mesh: DeviceMesh) -> None:
    """Makes the layers one unit, so that the next is gathered while one computes; what is outside them stays whole."""
    outside = {parameter for parameter in decoder.parameters() if not hasattr(parameter, "placements")}
    fully_shard(decoder, mesh=mesh, ignored_params=outside)


# ---------------------------------------------------------------- rows


def row_multiple(world: World) -> int:
    """Returns the number of which the rows of a batch must be a multiple."""
    return world.size


def own_rows(world: World, count: int) -> slice:
    """Returns the slice of a batch's rows that belongs to this process."""
    part = count // world.size
    return slice(world.rank * part, (world.rank + 1) * part)


def gather(world: World, values: Tensor) -> Tensor:
    """Gathers the rows of all processes, in order, on the CPU of each."""
    values = values.cpu()
    if world.size == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world.size)]
    dist.all_gather(parts, values.contiguous(), group=world.control)
    return torch.cat(parts)


def add_up(world: World, tensors: Sequence[Tensor]) -> None:
    """Adds up tensors of one device over all processes, in place and in one message."""
    if world.size == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def enough(world: World, free: int, done: Tensor, *, whole: bool) -> bool:
    """Says whether at least `free` rows have ended.

    With `whole` they must have ended in every process, as is necessary where a forward pass is a collective.
    """
    lacking = (done.sum() < free).to(torch.int64)
    if whole and world.size > 1:
        dist.all_reduce(lacking)
    return int(lacking) == 0
