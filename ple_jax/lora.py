"""LoRA as pure functions: init, fuse (for the decoder), stack, merge, unmerge. arXiv:2106.09685.

An adapter is a dict `{module path: {"a": [in, rank], "b": [rank, out]}}` under Hugging Face's module paths, fp32; DoRA
adds a magnitude "m": [out]. That is what is trained, saved and exported; stacking layers and fusing q, k, v (gate, up)
happens inside jit.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ple_jax.core import peft
from ple_jax.core.config import UserError, suggestion
from ple_jax.core.peft import patterned
from ple_jax.models import families
from ple_jax.models.config import ModelConfig
from ple_jax.models.decoder import LowRank, Model

Adapter = dict[str, dict[str, Array]]
_KERNELS = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class Lora:
    """Which modules are adapted, and how strongly; the terms and the meaning are PEFT's LoraConfig's."""

    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] = ("all-linear",)  # or names of modules: "q_proj", "attn.c_proj"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # regular expression at a path's end -> its own rank
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False  # scale by alpha / sqrt(rank), arXiv:2312.03732
    dora: bool = False  # train a magnitude and a direction, arXiv:2402.09353
    dropout: float = 0.0  # of the adapter's input, while training; q, k, v (gate, up) share one draw

    def rank_of(self, path: str) -> int:
        return patterned(self.rank_pattern, path, self.rank)

    def scale_of(self, path: str) -> float:
        """What B A is multiplied by."""
        rank = self.rank_of(path)
        return patterned(self.alpha_pattern, path, self.alpha) / (rank**0.5 if self.rslora else rank)


def resolve(config: ModelConfig, targets: str | Sequence[str]) -> list[str]:
    """Names of the adapted modules below their layer ("self_attn.q_proj"), in the family's order.

    Raises:
        UserError: a target that names no linear module of this family.
    """
    known = [module.name for module in families.FAMILIES[config.family].modules]
    if "all-linear" in targets:
        return known
    for target in [targets] if isinstance(targets, str) else targets:
        if not any(_ends_with(name, target) for name in known):
            short = sorted({name.rsplit(".", 1)[-1] for name in known})
            raise UserError(
                f"lora.targets names {target!r}, which is no linear module of {config.family}: {', '.join(short)}"
                f"{suggestion(target, short)}, or all-linear"
            )
    wanted = (targets,) if isinstance(targets, str) else targets
    return [name for name in known if any(_ends_with(name, target) for target in wanted)]


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def init(config: ModelConfig, lora: Lora, *, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """A fresh adapter, on the host: `a` as PEFT initialises it (uniform with Kaiming's bound for a=sqrt(5)), `b` zero.

    Every module's noise depends on (seed, its path) alone, not on how layers are arranged. DoRA's magnitudes start at
    the norms of the base weights: `magnitudes`.
    """
    targets = resolve(config, lora.targets)
    adapter = {}
    for path, module, inp, out in families.module_shapes(config):
        if module.name in targets:
            noise = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(path.encode())])))
            bound, rank = inp**-0.5, lora.rank_of(path)
            a = noise.uniform(-bound, bound, (inp, rank)).astype(np.float32)
            adapter[path] = {"a": a, "b": np.zeros((rank, out), np.float32)}
            if lora.dora:
                adapter[path]["m"] = np.ones((out,), np.float32)
    return adapter


def count(adapter: Adapter) -> int:
    """Number of trained parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapter))


def fuse(model: Model, adapter: Adapter, lora: Lora, *, base: Any = None, dropout: Array | None = None) -> Any:
    """The adapter in the decoder's own layout: `{"layers": [...]}`, a list of {kernel: LowRank}, or one stacked dict.

    The scale is multiplied into `up`. Modules of one fused kernel share a `down` of concatenated columns; their `up` is
    block-structured. An empty adapter gives `{}`.

    Args:
        base: the model's weights, which DoRA needs for the norms of its directions.
        dropout: a key; the adapter's inputs are dropped with it, and not without.
    """
    if not adapter:
        return {}
    layers = [_fuse_layer(model.config, adapter, lora, i) for i in range(model.config.num_layers)]
    if lora.dropout and dropout is not None:
        rate = jnp.float32(lora.dropout)
        layers = [
            {k: low._replace(dropout=(jax.random.fold_in(dropout, i * len(_KERNELS) + _KERNELS.index(k)), rate))
             for k, low in layer.items()}
            for i, layer in enumerate(layers)
        ]  # fmt: skip
    if model.scan:
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
        if lora.dora:
            norm = jax.vmap(_direction_norm)
            stacked = {k: _gained(low, norm(base["layers"][k]["kernel"], low.down, low.up)) for k, low in stacked.items()}
        return {"layers": stacked}
    if lora.dora:
        layers = [
            {k: _gained(low, _direction_norm(weights[k]["kernel"], low.down, low.up)) for k, low in layer.items()}
            for layer, weights in zip(layers, _by_layer(base), strict=True)
        ]
    return {"layers": layers}


def _by_layer(base: Any) -> list[Any]:
    layers = base["layers"]
    return [layers[i] for i in sorted(layers)] if isinstance(layers, dict) else list(layers)


def _fuse_layer(c: ModelConfig, adapter: Adapter, lora: Lora, layer: int) -> dict[str, LowRank]:
    family = families.FAMILIES[c.family]
    fused = {}
    for kernel in _KERNELS:
        paths = {m.name: f"{family.layers}.{layer}.{m.name}" for m in family.modules if m.kernel == kernel}
        present = {name: adapter[path] for name, path in paths.items() if path in adapter}
        if not present:
            continue
        down = jnp.concatenate([m["a"] for m in present.values()], 1)
        up = [families.fuse(c, kernel, {name: m["b"] * lora.scale_of(paths[name])}) for name, m in present.items()]
        gain = None
        if lora.dora:
            # where a module is not adapted its gain is one: a magnitude of zero stands for that until the norm is known
            gain = families.fuse(c, kernel, {name: m["m"] for name, m in present.items()})
        fused[kernel] = LowRank(down, jnp.concatenate(up, 0), gain)
    return fused


def _direction_norm(kernel: Array, down: Array, up: Array) -> Float[Array, "*out"]:
    """||W + A B|| of every output, fp32, without A B itself; a constant to the gradient (arXiv:2402.09353, section 4.3)."""
    w, a, b = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (kernel, down, up))
    cross = (jnp.tensordot(a.T, w, 1) * b).sum(0)
    square = (jnp.tensordot(a.T @ a, b, 1) * b).sum(0)
    return jnp.sqrt((w * w).sum(0) + 2 * cross + square)


def _gained(low: LowRank, norm: Array) -> LowRank:
    return low._replace(gain=jnp.where(low.gain == 0, 1.0, low.gain / norm))


# ---------------------------------------------------------------- on the host: weights under Hugging Face's names


def merge_one(config: ModelConfig, weight: np.ndarray, module: Mapping[str, np.ndarray], scale: float) -> np.ndarray:
    """One weight in Hugging Face's layout with its module added, computed in fp32, in the weight's own dtype."""
    arrays = peft.Module(np.asarray(module["a"]).T, np.asarray(module["b"]).T, module.get("m"))
    transposed = families.FAMILIES[config.family].transposed
    return peft.merge(weight, arrays, scale=scale, fan_in_fan_out=transposed).astype(weight.dtype)


def merge(config: ModelConfig, weights: Mapping[str, np.ndarray], adapter: Adapter, lora: Lora) -> dict[str, np.ndarray]:
    """Weights under Hugging Face's names with the adapter added, in fp32, then cast back to each tensor's dtype."""
    merged = dict(weights)
    for path, module in adapter.items():
        name = f"{path}.weight"
        merged[name] = merge_one(config, merged[name], module, lora.scale_of(path))
    return merged


def unmerge(config: ModelConfig, weights: Mapping[str, np.ndarray], adapter: Adapter, lora: Lora) -> dict[str, np.ndarray]:
    """The inverse of `merge`, to rounding.

    Raises:
        ValueError: a DoRA adapter, whose merge forgets the norms it started from.
    """
    if any("m" in module for module in adapter.values()):
        raise ValueError("a merged DoRA adapter cannot be taken out again: keep the base weights")
    unmerged = dict(weights)
    for path, module in adapter.items():
        name = f"{path}.weight"
        unmerged[name] = merge_one(config, unmerged[name], module, -lora.scale_of(path))
    return unmerged


def magnitudes(config: ModelConfig, weights: Mapping[str, np.ndarray], adapter: Adapter, lora: Lora) -> Adapter:
    """A DoRA adapter whose magnitudes are the norms of W + scale * B A, so that it changes nothing where b is zero."""
    transposed = families.FAMILIES[config.family].transposed
    out = {}
    for path, module in adapter.items():
        bare = {"a": module["a"], "b": module["b"]}
        whole = merge_one(config, np.asarray(weights[f"{path}.weight"], np.float32), bare, lora.scale_of(path))
        out[path] = {**bare, "m": np.sqrt((whole * whole).sum(0 if transposed else 1))}
    return out


def stack(adapters: Sequence[tuple[Adapter, Lora]]) -> tuple[dict[str, dict[str, Any]], Lora]:
    """Several adapters as one whose update is the sum of theirs; the order does not matter. Ranks add up.

    Returns:
        The adapter, and settings under which its scale is one everywhere.

    Raises:
        ValueError: a DoRA adapter among them: its update is not a sum.
    """
    if any(lora.dora for _, lora in adapters):
        raise ValueError("DoRA adapters do not add up; merge them into the weights one after the other")
    stacked: dict[str, dict[str, Any]] = {}
    for path in dict.fromkeys(path for adapter, _ in adapters for path in adapter):
        own = [(adapter[path], lora.scale_of(path)) for adapter, lora in adapters if path in adapter]
        stacked[path] = {
            "a": np.concatenate([np.asarray(m["a"]) for m, _ in own], 1),
            "b": np.concatenate([np.asarray(m["b"]) * np.float32(scale) for m, scale in own], 0),
        }
    ranks = {re.escape(path): module["b"].shape[0] for path, module in stacked.items()}
    return stacked, Lora(rank=1, alpha=1.0, rank_pattern=ranks, alpha_pattern=ranks)


_PEFT = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}


def to_peft(adapter: Adapter) -> dict[str, np.ndarray]:
    """PEFT's names and layout: lora_A [rank, in], lora_B [out, rank], lora_magnitude_vector [out]."""
    return {
        f"base_model.model.{path}.{_PEFT[kind]}": np.ascontiguousarray(np.asarray(array).T)
        for path, module in adapter.items()
        for kind, array in module.items()
    }


def from_peft(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The inverse of `to_peft`."""
    adapter: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        kind = next(kind for kind, suffix in _PEFT.items() if name.endswith(suffix))
        path = name.removeprefix("base_model.model.").removesuffix(f".{_PEFT[kind]}")
        adapter.setdefault(path, {})[kind] = np.ascontiguousarray(tensor.T)
    return adapter
