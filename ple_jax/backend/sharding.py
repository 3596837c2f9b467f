"""Where every array lives: one mesh (data, fsdp, tensor) and one table of rules. One device is the trivial mesh."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from ple_jax.core.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # rows of a batch are spread over both
_SPREAD = (AXES, ("data", "fsdp"), ("fsdp", "tensor"), ("data",), ("fsdp",), ("tensor",))  # what is read, the most first

# leaf name -> mesh axis of each dimension (layers stacked by scanning have one more in front, never sharded)
RULES: dict[str, tuple[str | None, ...]] = {
    "embed": ("tensor", "fsdp"),
    "head": ("tensor", "fsdp"),
    "positions": (None, "fsdp"),
    "norm/scale": (None,),
    "norm/bias": (None,),
    "layers/qkv/kernel": ("fsdp", "tensor"),
    "layers/o/kernel": ("tensor", "fsdp"),
    "layers/gate_up/kernel": ("fsdp", None, "tensor"),
    "layers/down/kernel": ("tensor", "fsdp"),
    "layers/qkv/bias": ("tensor",),
    "layers/o/bias": (None,),
    "layers/gate_up/bias": (None, "tensor"),
    "layers/down/bias": (None,),
    "layers/experts/router": ("fsdp", None),
    "layers/experts/gate": (None, "fsdp", "tensor"),
    "layers/experts/up": (None, "fsdp", "tensor"),
    "layers/experts/down": (None, "tensor", "fsdp"),
    "lora/a": ("fsdp", None),
    "lora/b": (None, "fsdp"),
    "lora/m": (None,),
}
_NORMS = ("pre_attention_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm", "q_norm", "k_norm")
RULES |= {f"layers/{norm}/{leaf}": (None,) for norm in _NORMS for leaf in ("scale", "bias")}
_HEADS = ("layers/qkv/kernel", "layers/qkv/bias", "layers/o/kernel")


def devices() -> list[jax.Device]:
    """Returns the devices that JAX finds; of all processes, where there are several.

    Raises:
        UserError: there are none of the kind that JAX_PLATFORMS names, or they cannot be used.
    """
    try:
        return jax.devices()
    except (AssertionError, RuntimeError) as error:  # JAX asserts that there is one, where no GPU is visible
        why, kind = (str(error) or "none is visible").splitlines()[0], jax.config.jax_platforms
        if kind is None:  # what is installed for them does not fit the driver, say
            raise UserError(f"JAX cannot use this machine's devices ({why}); see docs/install.md") from error
        says = f"JAX finds no device of JAX_PLATFORMS={kind!r} ({why}); JAX for GPUs is the extra `cuda`, docs/install.md"
        raise UserError(says) from error


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Makes a mesh of the first data * fsdp * tensor devices; several processes must take all of their devices.

    Raises:
        UserError: there are fewer devices, or with several processes not exactly as many.
    """
    needed, found = data * fsdp * tensor, devices()
    if jax.process_count() > 1 and needed != len(found):
        raise UserError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} is of {needed} devices, and {jax.process_count()} processes"
            f" have {len(found)} ({found[0].platform}), of which none may be idle: set --config.mesh.*, or, where"
            " processes of one host see the same devices, JAX_LOCAL_DEVICE_IDS of each"
        )
    if needed > len(found):
        cpus = "; JAX sees CPUs alone: for GPUs install the extra `cuda`" * (found[0].platform == "cpu")
        raise UserError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} needs {needed} devices, there are {len(found)}"
            f" ({found[0].platform}); lower --config.mesh.*{cpus}"
        )
    # Auto: the compiler propagates shardings; jax.make_mesh's default (Explicit) would ask for one at every operation
    return Mesh(np.array(found[:needed]).reshape(data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def spec(name: str, shape: tuple[int, ...], mesh: Mesh, *, kv_heads: int) -> PartitionSpec:
    """Returns the `PartitionSpec` of one leaf by its rule.

    An axis that does not divide its dimension is left out: that dimension is replicated. The parts of a quantised kernel,
    values and scales, have its rank and its rule. Attention is sharded by whole KV heads, so it is replicated over `tensor`
    where that does not divide `kv_heads`.

    Raises:
        KeyError: there is no rule for this name.
    """
    if name not in RULES:
        raise KeyError(f"no sharding rule for parameter {name!r}; add it to ple_jax.backend.sharding.RULES")
    rule = RULES[name]
    axes: list[Any] = [None] * (len(shape) - len(rule)) + list(rule)
    if name in _HEADS and kv_heads % mesh.shape["tensor"]:
        axes = [None if axis == "tensor" else axis for axis in axes]
    return PartitionSpec(*(a if a and size % mesh.shape[a] == 0 else None for a, size in zip(axes, shape, strict=True)))


def put(x: Any, where: Sharding) -> jax.Array:
    """Puts a host array on its devices. Every process has the whole of it, and places what its own devices hold."""
    if where.is_fully_addressable:
        return jax.device_put(x, where)
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])


def fetch(tree: Any) -> Any:
    """Fetches arrays to the host, as numpy and whole. All processes must call it if arrays are spread over processes."""
    return jax.device_get(jax.tree.map(_local, tree))


def own(x: jax.Array) -> Any:
    """Returns a number that every device holds, in a form with which this process can compute alone."""
    return x if x.is_fully_addressable else np.asarray(x.addressable_data(0))


def _local(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return x
    if not x.is_fully_replicated:
        x = _moved(x, replicated(x.sharding.mesh))
    return x.addressable_data(0)


def _moved(x: jax.Array, there: NamedSharding) -> jax.Array:
    return jax.jit(_same, out_shardings=there)(x)


def _same(x: Any) -> Any:
    return x


def put_weight(mesh: Mesh, *, kv_heads: int) -> Callable[[str, np.ndarray], jax.Array]:
    """Returns the `put(name, array)` of `ple_jax.backend.model.fill`, which puts each weight in its place on the mesh."""

    def place(name: str, array: np.ndarray) -> jax.Array:
        return put(array, NamedSharding(mesh, spec(name, array.shape, mesh, kv_heads=kv_heads)))

    return place


def place_weight(mesh: Mesh, *, kv_heads: int) -> Callable[..., jax.Array] | None:
    """Returns the `place(name, shape, axis, read)` of `ple_jax.backend.model.fill`; None where one process has all devices.

    Every device reads a share of its own, along the axis in which that is one piece of a file; from there the shares go to
    their places over the network. So all processes together read every weight once, whatever the mesh.
    """
    if not mesh.is_multi_process:
        return None

    def place(name: str, shape: tuple[int, ...], axis: int, read: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
        there = NamedSharding(mesh, spec(name, shape, mesh, kv_heads=kv_heads))
        axes = next((some for some in _SPREAD if shape[axis] % math.prod(mesh.shape[a] for a in some) == 0), ())
        shares = NamedSharding(mesh, PartitionSpec(*[None] * axis, axes or None))
        found: dict[tuple, np.ndarray] = {}  # devices that hold the same

        def once(index: tuple[slice, ...]) -> np.ndarray:
            key = tuple((s.start, s.stop) for s in index)
            if key not in found:
                found[key] = read(index)
            return found[key]

        return _moved(jax.make_array_from_callback(shape, shares, once), there)

    return place


def gathered(name: str, x: jax.Array, mesh: Mesh) -> jax.Array:
    """Gathers a leaf along `fsdp`, inside jit: every device has it whole along that axis, and still split along `tensor`."""
    axes = (None if axis == "fsdp" else axis for axis in spec(name, x.shape, mesh, kv_heads=1))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))


def rows(mesh: Mesh, ndim: int) -> NamedSharding:
    """Returns the sharding of a batch: the first dimension over `data` and `fsdp`; a scalar is on every device."""
    return NamedSharding(mesh, PartitionSpec(BATCH, *[None] * (ndim - 1)) if ndim else PartitionSpec())


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def adapter(tree: Any, mesh: Mesh) -> Any:
    """Returns NamedShardings of an adapter, or of a tree whose leaves end in "a", "b" or "m" like one (its Adam moments).

    All other leaves are on every device.
    """

    def leaf(path: tuple, x: Any) -> NamedSharding:
        name = getattr(path[-1], "key", None)
        if name not in ("a", "b", "m"):
            return replicated(mesh)
        return NamedSharding(mesh, spec(f"lora/{name}", x.shape, mesh, kv_heads=1))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def put_rows(mesh: Mesh, tree: Any) -> Any:
    """Puts host arrays on the devices, their rows spread over the batch axes."""
    return jax.tree.map(lambda x: put(x, rows(mesh, np.ndim(x))), tree)


def decoded_rows(tree: Any, mesh: Mesh) -> Any:
    """Returns NamedShardings of what is decoded: rows over `data` and `fsdp`, KV heads of caches over `tensor`.

    A row that is held once for all rows (a prefix) is on every device.
    """

    def leaf(x: Any) -> NamedSharding:
        if x.ndim < 4:
            return rows(mesh, x.ndim)
        heads = "tensor" if x.shape[-3] % mesh.shape["tensor"] == 0 else None
        spread = BATCH if x.shape[-4] % row_multiple(mesh) == 0 else None
        return NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 4), spread, heads, None, None))

    return jax.tree.map(leaf, tree)


def kernels(tree: Any, mesh: Mesh, kv_heads: int) -> Any:
    """Returns the NamedShardings of kernels by their names, which are those of the base's own kernels."""

    def leaf(path: tuple, x: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(f"layers/{path[-1].key}/kernel", x.shape, mesh, kv_heads=kv_heads))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def row_multiple(mesh: Mesh) -> int:
    """Returns the number of which the rows of a batch must be a multiple."""
    return math.prod(mesh.shape[a] for a in BATCH)


def notes(mesh: Mesh, *, kv_heads: int) -> list[str]:
    """Returns what a user should know about this mesh, one line each."""
    tensor = mesh.shape["tensor"]
    if kv_heads % tensor:
        return [f"{kv_heads} KV heads do not divide over tensor={tensor}: attention is replicated over that axis"]
    return []


def idle(mesh: Mesh) -> list[str]:
    """Returns a line if accelerators are there that the mesh leaves out and a larger `data` would take."""
    there, rest = devices(), mesh.size // mesh.shape["data"]
    most = len(there) // rest
    if most <= mesh.shape["data"] or there[0].platform == "cpu":
        return []
    are = "is" if mesh.size == 1 else "are"
    return [f"{mesh.size} of {len(there)} devices {are} used: --config.mesh.data={most} takes {most * rest}"]
