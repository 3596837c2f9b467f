"""The tensors of a model: their names and shapes, and how they are fused into the decoder's kernels."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from ple_jax.models.config import ModelConfig
from ple_jax.models.families import FAMILIES, Family, Module


def module_shapes(c: ModelConfig) -> Iterator[tuple[str, Module, int, int]]:
    """Yields every linear module inside the layers, but for a mixture's experts: path, `Module`, input size, output size."""
    family = FAMILIES[c.family]
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    inputs = {"qkv": c.hidden_size, "o": heads, "gate_up": c.hidden_size, "down": c.intermediate_size}
    outputs = {"q": heads, "k": kv, "v": kv, "o": c.hidden_size, "down": c.hidden_size}
    outputs |= dict.fromkeys(("gate", "up"), c.intermediate_size)
    for layer in range(c.num_layers):
        for module in family.modules:
            out = sum(outputs[part] for part in module.parts)
            yield f"{family.layers}.{layer}.{module.name}", module, inputs[module.kernel], out


def has_bias(c: ModelConfig, kernel: str) -> bool:
    """Says whether the modules of a kernel (qkv, o, gate_up or down) have a bias."""
    return {"qkv": c.qkv_bias, "o": c.o_bias, "gate_up": c.mlp_bias, "down": c.mlp_bias}[kernel]


def expected_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns every weight's shape, under Hugging Face's name and in its layout: linear [out, in] (GPT-2: [in, out])."""
    family, hidden = FAMILIES[c.family], c.hidden_size
    affine = ("weight", "bias") if c.norm == "layer" else ("weight",)
    shapes: dict[str, tuple[int, ...]] = {f"{family.embed}.weight": (c.vocab_size, hidden)}
    if c.learned_positions:
        shapes[f"{family.positions}.weight"] = (c.max_positions, hidden)
    for layer in range(c.num_layers):
        shapes |= {f"{family.layers}.{layer}.{n}.{kind}": (hidden,) for n in family.norms.values() for kind in affine}
        for ours, theirs in family.qk_norms.items():
            heads = {"q_norm": c.num_heads, "k_norm": c.num_kv_heads}[ours] if c.qk_norm == "all" else 1
            shapes[f"{family.layers}.{layer}.{theirs}.weight"] = (heads * c.head_dim,)
    for path, module, inp, out in module_shapes(c):
        shapes[f"{path}.weight"] = (inp, out) if family.transposed else (out, inp)
        if has_bias(c, module.kernel):
            shapes[f"{path}.bias"] = (out,)
    for layer in range(c.num_layers):
        shapes |= {f"{family.layers}.{layer}.{name}.weight": shape for name, shape in _expert_shapes(c)}
    shapes |= {f"{family.norm}.{kind}": (hidden,) for kind in affine}
    if not c.tie_embeddings:
        shapes[f"{family.head}.weight"] = (c.vocab_size, hidden)
    return shapes


def _expert_shapes(c: ModelConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yields the names, below the layer, and the shapes [out, in] of one layer's router and experts, if it has any."""
    inner, outer = (c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size)
    for kind, name in FAMILIES[c.family].experts.items():
        if kind == "router":
            yield name, (c.experts, c.hidden_size)
        else:
            yield from ((name.format(i), outer if kind == "down" else inner) for i in range(c.experts))


def active_weights(c: ModelConfig) -> int:
    """Counts the weights in the layers' matmuls that one token uses. Of a mixture's experts only the token's own count."""
    experts = c.hidden_size * (c.experts + c.experts_per_token * 3 * c.intermediate_size)
    return sum(inp * out for *_, inp, out in module_shapes(c)) + c.num_layers * experts


def attention_reach(c: ModelConfig) -> float:
    """Returns how many positions a token attends to when attention takes as many operations as its matmuls with weights."""
    return active_weights(c) / (2 * c.num_layers * c.num_heads * c.head_dim)


def stack_experts(c: ModelConfig, kind: str, get: Callable[[str], np.ndarray]) -> np.ndarray:
    """Returns one leaf of `backend.experts.Experts`: the router [in, experts], or one kernel of all experts.

    A kernel is [experts, in, out].

    Args:
        kind: router, gate, up or down.
        get: maps a module's name below the layer to its weight [out, in].
    """
    name = FAMILIES[c.family].experts[kind]
    if kind == "router":
        return get(name).T
    return np.stack([get(name.format(i)).T for i in range(c.experts)])


def fuse(c: ModelConfig, kernel: str, modules: Mapping[str, Any]) -> Any:
    """Fuses the arrays of modules into the layout of the decoder's kernel, with zeros for modules that are not given.

    Args:
        kernel: qkv, o, gate_up or down.
        modules: by module name, an array [..., out of that module], in numpy or JAX: a weight [in, out], a bias [out], or
            LoRA's b [rank, out]. At least one is needed.

    Returns:
        An array [..., out of the kernel]. qkv is [..., kv_heads * (group + 2) * head_dim]: for every KV head its query
        heads, then k, then v, so that a shard holds whole heads. gate_up is [..., 2 or 1, intermediate]. o and down are
        unchanged.
    """
    family = FAMILIES[c.family]
    parts: dict[str, Any] = {}
    for module in family.modules:
        if module.kernel == kernel and module.name in modules:
            parts |= _parts(c, family, module, modules[module.name])
    if kernel in parts:
        return parts[kernel]
    wanted = {"q": c.group, "k": 1, "v": 1} if kernel == "qkv" else {"gate": 1, "up": 1} if c.gated else {"up": 1}
    like = next(iter(parts.values()))
    xp = array_namespace(like)

    def zeros(n: int) -> Any:
        return xp.zeros((*like.shape[:-2], n, like.shape[-1]), dtype=like.dtype)

    joined = xp.concat([parts[p] if p in parts else zeros(n) for p, n in wanted.items()], axis=-2)
    return xp.reshape(joined, (*joined.shape[:-3], -1)) if kernel == "qkv" else joined


def _parts(c: ModelConfig, family: Family, module: Module, x: Any) -> dict[str, Any]:
    """Splits a module's output dimension into its parts.

    q, k and v are [..., kv_head, n, head_dim], gate and up [..., 1, intermediate]; o and down are unchanged.
    """
    xp, before = array_namespace(x), x.shape[:-1]
    if module.kernel in ("o", "down"):
        return {module.kernel: x}
    if module.kernel == "gate_up":
        x = xp.reshape(x, (*before, len(module.parts), c.intermediate_size))
        return {part: x[..., i : i + 1, :] for i, part in enumerate(module.parts)}
    if family.interleaved:
        x = xp.reshape(x, (*before, c.num_kv_heads, 3, c.head_dim))
        return {part: x[..., i : i + 1, :] for i, part in enumerate(module.parts)}
    heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
    parts, start = {}, 0
    for part in module.parts:
        end = start + heads[part] * c.head_dim
        parts[part] = xp.reshape(x[..., start:end], (*before, c.num_kv_heads, -1, c.head_dim))
        start = end
    return parts
