"""LoRA inside jit: the fusion of an adapter (`ple_jax.models.adapters`) for the decoder, DoRA's norms. arXiv:2106.09685.

Layers are stacked, and q, k, v (gate, up) fused, only here. The adapter that is trained, saved and exported is neither.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ple_jax.backend import sharding
from ple_jax.backend.model import LowRank, Model
from ple_jax.backend.quantize import QArray, dequantize
from ple_jax.models import families, layout
from ple_jax.models.adapters import Adapter, Lora
from ple_jax.models.config import ModelConfig

_KERNELS = ("qkv", "o", "gate_up", "down")


def magnitudes(model: Model, base: Any, adapter: Adapter, lora: Lora) -> Adapter:
    """Returns a DoRA adapter with the norms of W + scale A B as its magnitudes, on the host.

    Before it is trained, it computes what LoRA computes.

    Args:
        base: the weights as the model holds them, rounded and quantised as they are.
    """

    @jax.jit
    def norms(base: Any, adapter: Adapter) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for layer, kernel, paths in _adapted(model.config, adapter):
            low = _low_rank(model.config, kernel, paths, adapter, lora)
            # fusing only moves numbers about, so its transpose moves them back
            modules = {name: adapter[path]["m"] for name, path in paths.items()}
            back = jax.linear_transpose(lambda m, kernel=kernel: layout.fuse(model.config, kernel, m), modules)
            (split,) = back(_norm(_weight(model, base, layer, kernel), low))
            found |= {paths[name]: norm for name, norm in split.items()}
        return found

    found = sharding.fetch(norms(base, adapter))
    return {path: {**module, "m": found[path]} for path, module in adapter.items()}


def fuse(model: Model, adapter: Adapter, lora: Lora, *, base: Any = None, dropout: tuple[Array, Array] | None = None) -> Any:
    """Fuses an adapter into the decoder's own layout: `{"layers": ...}`, or `{}` for an empty adapter.

    The layers are a list of one {kernel: LowRank} each, or, if they are scanned, one such dict of stacked arrays.

    Args:
        base: the model's weights, which DoRA needs for the norms of its directions.
        dropout: a key and the numbers of the tokens (`Packed.number`). Without it the adapter's inputs are not dropped.
    """
    if not adapter:
        return {}
    layers: list[dict[str, LowRank]] = [{} for _ in range(model.config.num_layers)]
    for layer, kernel, paths in _adapted(model.config, adapter):
        low = _low_rank(model.config, kernel, paths, adapter, lora)
        if lora.dora:
            m = layout.fuse(model.config, kernel, {name: adapter[path]["m"] for name, path in paths.items()})
            norm = _norm(_weight(model, base, layer, kernel), low)
            # zero where a module is not adapted, or where its weights are zero: W x + A B x as they are
            low = low._replace(gain=jnp.where(m == 0, 1.0, m) / jnp.where(m == 0, 1.0, norm))
        if dropout is not None and lora.dropout:
            key = jax.random.fold_in(dropout[0], layer * len(_KERNELS) + _KERNELS.index(kernel))
            low = low._replace(dropout=(key, dropout[1], jnp.float32(lora.dropout)))
        layers[layer][kernel] = low
    if not model.scan:
        return {"layers": layers}
    kernels = [kernel for kernel in _KERNELS if any(kernel in layer for layer in layers)]
    return {"layers": {kernel: _stack_layers([layer.get(kernel) for layer in layers]) for kernel in kernels}}


def fold(model: Model, base: Any, adapter: Adapter, lora: Lora) -> Any:
    """Computes the base's kernels with the adapter merged in, rounded to their dtype, by layer and name, for `folded`.

    Args:
        base: the model's weights, none of them quantised.
    """

    def kernel(part: tuple[Array, LowRank]) -> Array:
        whole, low = part
        out = whole.astype(jnp.float32) + jnp.tensordot(low.down, low.up, 1)
        return (out if low.gain is None else out * jnp.expand_dims(low.gain, 0)).astype(whole.dtype)

    def layer(base: Any, low: Mapping[str, LowRank]) -> dict[str, Array]:
        # one layer of a stack after the other: in float32 there are never more
        each = functools.partial(jax.lax.map, kernel) if model.scan else kernel
        return {name: each((base[name]["kernel"], low[name])) for name in low}

    fused = fuse(model, adapter, lora, base=base).get("layers", [])
    if model.scan:
        return layer(base["layers"], fused) if fused else {}
    return {i: layer(base["layers"][i], low) for i, low in enumerate(fused)}


def folded(base: Any, kernels: Any) -> Any:
    """Returns the base with its kernels replaced by those that `fold` computed; all other arrays are the base's."""

    def layer(own: Any, kernels: Mapping[str, Array]) -> Any:
        return {**own, **{name: {**own[name], "kernel": kernel} for name, kernel in kernels.items()}}

    layers, scanned = base["layers"], not all(isinstance(key, int) for key in base["layers"])
    new = layer(layers, kernels) if scanned else {i: layer(layers[i], kernels.get(i, {})) for i in layers}
    return {**base, "layers": new}


def _adapted(c: ModelConfig, adapter: Adapter) -> Iterator[tuple[int, str, dict[str, str]]]:
    """Yields the layer, the kernel and {module name: path} of everything that is adapted."""
    family = families.FAMILIES[c.family]
    for layer in range(c.num_layers):
        for kernel in _KERNELS:
            paths = {m.name: f"{family.layers}.{layer}.{m.name}" for m in family.modules if m.kernel == kernel}
            if present := {name: path for name, path in paths.items() if path in adapter}:
                yield layer, kernel, present


def _low_rank(c: ModelConfig, kernel: str, paths: Mapping[str, str], adapter: Adapter, lora: Lora) -> LowRank:
    """Puts the modules of one kernel side by side: columns of `down`, and rows of `up`, zero at other modules' outputs.

    The scale is multiplied into `up`.
    """
    down = [adapter[path]["a"] for path in paths.values()]
    up = [layout.fuse(c, kernel, {name: adapter[path]["b"] * lora.scale_of(path)}) for name, path in paths.items()]
    return LowRank(jnp.concatenate(down, 1), jnp.concatenate(up, 0))


def _weight(model: Model, base: Any, layer: int, kernel: str) -> Array | QArray:
    if model.scan:
        return jax.tree.map(lambda stacked: stacked[layer], base["layers"][kernel]["kernel"])
    return base["layers"][layer][kernel]["kernel"]


def _norm(weight: Array | QArray, low: LowRank) -> Float[Array, "*out"]:
    """Computes ||W + A B|| for every output, without computing A B itself.

    It is a constant to the gradient (arXiv:2402.09353, section 4.3).
    """
    w = dequantize(weight, jnp.float32) if isinstance(weight, QArray) else weight.astype(jnp.float32)
    w, a, b = jax.lax.stop_gradient((w, low.down, low.up))
    cross = (jnp.tensordot(a.T, w, 1) * b).sum(0)
    square = (jnp.tensordot(a.T @ a, b, 1) * b).sum(0)
    return jnp.sqrt((w * w).sum(0) + 2 * cross + square)


def _stack_layers(layers: Sequence[LowRank | None]) -> LowRank:
    """Stacks one kernel of all layers, padded with zeros to the largest rank. None is a layer where it is not adapted."""
    some = next(low for low in layers if low is not None)
    none = some._replace(down=some.down[:, :0], up=some.up[:0], gain=jax.tree.map(jnp.ones_like, some.gain))
    rank = max(low.up.shape[0] for low in layers if low is not None)

    def filled(low: LowRank) -> LowRank:
        missing, outputs = rank - low.up.shape[0], [(0, 0)] * (low.up.ndim - 1)
        return low._replace(down=jnp.pad(low.down, [(0, 0), (0, missing)]), up=jnp.pad(low.up, [(0, missing), *outputs]))

    return jax.tree.map(lambda *x: jnp.stack(x), *[filled(low or none) for low in layers])
