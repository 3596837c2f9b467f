"""LoRA as pure functions: init, fuse (for the decoder), merge. arXiv:2106.09685.

An adapter is a dict `{module path: {"a": [in, rank], "b": [rank, out]}}` under Hugging Face's module paths, fp32. That is
what is trained, saved and exported; stacking layers and fusing q, k, v (gate, up) happens inside jit.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ple_jax.models.config import ModelConfig
from ple_jax.models.decoder import LowRank, Model, module_shapes

Adapter = dict[str, dict[str, Array]]

_FUSED = {  # fused kernel -> its modules, in the kernel's order
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def init(config: ModelConfig, *, rank: int, targets: Sequence[str], seed: int) -> dict[str, dict[str, np.ndarray]]:
    """A fresh adapter, on the host: `a` as PEFT initialises it (uniform with Kaiming's bound for a=sqrt(5)), `b` zero.

    Every module's noise depends on (seed, its path) alone, not on how layers are arranged.
    """
    adapter = {}
    for path, inp, out in module_shapes(config):
        if path.rsplit(".", 1)[1] in targets:
            noise = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(path.encode())])))
            bound = inp**-0.5
            a = noise.uniform(-bound, bound, (inp, rank)).astype(np.float32)
            adapter[path] = {"a": a, "b": np.zeros((rank, out), np.float32)}
    return adapter


def count(adapter: Adapter) -> int:
    """Number of trained parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapter))


def fuse(model: Model, adapter: Adapter, scale: float) -> Any:
    """The adapter in the decoder's own layout: `{"layers": [...]}`, a list of {kernel: LowRank}, or one stacked dict.

    `scale` (alpha / rank) is multiplied into `up`. Modules of one fused kernel share a `down` of concatenated columns;
    their `up` is block-structured. An empty adapter gives `{}`.
    """
    if not adapter:
        return {}
    layers = [_fuse_layer(model.config, adapter, i, scale) for i in range(model.config.num_layers)]
    return {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers) if model.scan else layers}


def _fuse_layer(c: ModelConfig, adapter: Adapter, layer: int, scale: float) -> dict[str, LowRank]:
    fused = {}
    for kernel, modules in _FUSED.items():
        paths = [f"model.layers.{layer}.{m}" for m in modules]
        present = [(i, adapter[p]) for i, p in enumerate(paths) if p in adapter]
        if present:
            down = jnp.concatenate([m["a"] for _, m in present], 1)
            up = jnp.concatenate([_expand(c, kernel, i, m["b"]) for i, m in present], 0)
            fused[kernel] = LowRank(down, up * scale)
    return fused


def _expand(c: ModelConfig, kernel: str, part: int, b: Array) -> Array:
    """`b` [rank, out] of one module, zero elsewhere in the fused kernel's output."""
    rank = b.shape[0]
    if kernel == "qkv":
        group = c.num_heads // c.num_kv_heads
        b = b.reshape(rank, c.num_kv_heads, -1, c.head_dim)
        before, after = ((0, 2), (group, 1), (group + 1, 0))[part]
        return jnp.pad(b, ((0, 0), (0, 0), (before, after), (0, 0))).reshape(rank, -1)
    if kernel == "gate_up":
        return jnp.pad(b[:, None], ((0, 0), (part, 1 - part), (0, 0)))
    return b


def merge(weights: dict[str, np.ndarray], adapter: Adapter, scale: float) -> dict[str, np.ndarray]:
    """Weights under Hugging Face's names with the adapter added, in fp32, then cast back to each tensor's dtype."""
    merged = dict(weights)
    for path, module in adapter.items():
        name = f"{path}.weight"
        delta = scale * (np.asarray(module["a"], np.float32) @ np.asarray(module["b"], np.float32)).T
        merged[name] = (merged[name].astype(np.float32) + delta).astype(weights[name].dtype)
    return merged


def to_peft(adapter: Adapter) -> dict[str, np.ndarray]:
    """PEFT's names and layout: lora_A [rank, in], lora_B [out, rank]."""
    return {
        f"base_model.model.{path}.lora_{kind.upper()}.weight": np.ascontiguousarray(np.asarray(array).T)
        for path, module in adapter.items()
        for kind, array in module.items()
    }


def from_peft(tensors: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The inverse of `to_peft`."""
    adapter: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        path, kind = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        adapter.setdefault(path, {})[kind.lower()] = np.ascontiguousarray(tensor.T)
    return adapter
