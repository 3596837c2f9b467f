"""One decoder for the Llama family, in Flax NNX; everything outside sees only the pure `Model.apply`.

Weights of a layer that read the same input are fused at load: q, k, v into `qkv` [hidden, kv_heads * (group + 2) * head_dim]
(for every KV head its query heads, then k, then v, so that a shard holds whole heads) and gate, up into `gate_up`
[hidden, 2, intermediate]. Adapters stay canonical (see `ple_jax.lora`) and arrive here fused the same way.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ple_jax.models.config import ModelConfig

Tree = Any  # a pytree of arrays


class Cache(NamedTuple):
    """Keys and values: per layer a tuple of [row, kv_head, position, head_dim], or stacked over layers when scanned."""

    key: Any
    value: Any


class LowRank(NamedTuple):
    """A fused adapter of one matmul: x @ down @ up is added to its output; the scale is already in `up`."""

    down: Float[Array, "inp rank"]
    up: Float[Array, "rank *out"]


_LONGEST_SUM = 1024


def _project(x: Array, kernel: Array, lora: LowRank | None) -> Array:
    size = kernel.shape[0]
    if size > _LONGEST_SUM and x.dtype == jnp.float32:
        # XLA's CPU kernels add up in one fp32 accumulator: halves are as exact as torch (SmolLM2's logits: 5e-5, not 14e-5)
        half = size // 2
        y = jnp.tensordot(x[..., :half], kernel[:half], 1) + jnp.tensordot(x[..., half:], kernel[half:], 1)
    else:
        y = jnp.tensordot(x, kernel, 1)
    if lora is not None:  # the adapter is fp32 whatever the base is
        delta = jnp.tensordot(jnp.tensordot(x.astype(lora.down.dtype), lora.down, 1), lora.up, 1)
        y = y + delta.astype(y.dtype)
    return y


class RMSNorm(nnx.Module):
    def __init__(self, size: int, eps: float, dtype: Any):
        self.scale = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + self.eps)
        scale = self.scale[...]
        return jnp.expand_dims(scale, range(x.ndim - 1)) * h.astype(x.dtype)


def rope(positions: Int[Array, "row time"], head_dim: int, theta: float) -> tuple[Array, Array]:
    """cos and sin of the rotary angles, each [row, time, head_dim / 2], fp32. RoFormer, arXiv:2104.09864."""
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    angle = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequency)[None, None]
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x: Float[Array, "row time kv group dim"], cos: Array, sin: Array) -> Array:
    cos, sin = cos[:, :, None, None], sin[:, :, None, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Block(nnx.Module):
    def __init__(self, c: ModelConfig, dtype: Any):
        group = c.num_heads // c.num_kv_heads
        self.c = c
        self.input_norm = RMSNorm(c.hidden_size, c.norm_eps, dtype)
        self.qkv = nnx.Param(jnp.zeros((c.hidden_size, c.num_kv_heads * (group + 2) * c.head_dim), dtype))
        self.o = nnx.Param(jnp.zeros((c.num_heads * c.head_dim, c.hidden_size), dtype))
        self.post_norm = RMSNorm(c.hidden_size, c.norm_eps, dtype)
        self.gate_up = nnx.Param(jnp.zeros((c.hidden_size, 2, c.intermediate_size), dtype))
        self.down = nnx.Param(jnp.zeros((c.intermediate_size, c.hidden_size), dtype))

    def attention(self, x: Array, lora: dict, angles: tuple, mask: Array, cache: tuple | None, index: Any) -> tuple:
        c = self.c
        rows, time, _ = x.shape
        group = c.num_heads // c.num_kv_heads
        qkv = _project(x, self.qkv[...], lora.get("qkv")).reshape(rows, time, c.num_kv_heads, group + 2, c.head_dim)
        rotated = _rotate(qkv[..., :-1, :], *angles)
        # [row, kv, time, dim]: with time before kv, attention over the cache was 5x slower on CPU
        q = rotated[..., :-1, :].transpose(0, 2, 3, 1, 4).reshape(rows, c.num_kv_heads, group * time, c.head_dim)
        k = rotated[..., -1, :].transpose(0, 2, 1, 3)
        v = qkv[..., -1, :].transpose(0, 2, 1, 3)
        if cache is not None:
            k = jax.lax.dynamic_update_slice(cache[0], k, (0, 0, index, 0))
            v = jax.lax.dynamic_update_slice(cache[1], v, (0, 0, index, 0))
        scores = jnp.einsum("bkqd,bksd->bkqs", q, k, preferred_element_type=jnp.float32) * c.head_dim**-0.5
        scores = scores.reshape(rows, c.num_kv_heads, group, time, -1)
        # a large negative number, not -inf: rows that only fill the shape may see nothing at all, and must not give NaN
        scores = jnp.where(mask[:, None, None], scores, jnp.float32(-1e30))
        weights = jax.nn.softmax(scores, -1).astype(x.dtype).reshape(rows, c.num_kv_heads, group * time, -1)
        out = jnp.einsum("bkqs,bksd->bkqd", weights, v)
        out = out.reshape(rows, c.num_kv_heads, group, time, c.head_dim).transpose(0, 3, 1, 2, 4)
        return _project(out.reshape(rows, time, -1), self.o[...], lora.get("o")), (k, v)

    def mlp(self, x: Array, lora: dict) -> Array:
        gate_up = _project(x, self.gate_up[...], lora.get("gate_up"))
        return _project(jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :], self.down[...], lora.get("down"))

    def __call__(self, x: Array, lora: dict, angles: tuple, mask: Array, cache: tuple | None, index: Any) -> tuple:
        attended, cache = self.attention(self.input_norm(x), lora, angles, mask, cache, index)
        x = x + attended
        return x + self.mlp(self.post_norm(x), lora), cache


class Decoder(nnx.Module):
    """Embedding, layers (a list, or one block with stacked weights), final norm, and the head [vocab, hidden]."""

    def __init__(self, c: ModelConfig, dtype: Any, scan: bool):
        self.embed = nnx.Param(jnp.zeros((c.vocab_size, c.hidden_size), dtype))
        if scan:
            self.layers = nnx.vmap(lambda _: Block(c, dtype))(jnp.zeros(c.num_layers))
        else:
            self.layers = nnx.List([Block(c, dtype) for _ in range(c.num_layers)])
        self.norm = RMSNorm(c.hidden_size, c.norm_eps, dtype)
        if not c.tie_embeddings:
            self.head = nnx.Param(jnp.zeros((c.vocab_size, c.hidden_size), dtype))


@dataclass(frozen=True, eq=False)
class Model:
    """The decoder as pure functions on two pytrees: `base` (frozen) and a fused adapter (`ple_jax.lora.fuse`)."""

    config: ModelConfig
    scan: bool
    remat: str  # none | dots | full: what the backward pass recomputes
    graph: nnx.GraphDef
    shapes: Tree  # of the base: nested dicts of jax.ShapeDtypeStruct

    @staticmethod
    def create(config: ModelConfig, *, dtype: Any = jnp.float32, scan: bool, remat: str = "none") -> "Model":
        graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype, scan)))
        return Model(config, scan, remat, graph, nnx.to_pure_dict(state))

    def _bind(self, base: Tree) -> Decoder:
        return nnx.merge(self.graph, nnx.State(jax.tree.map(nnx.Param, base)))

    def apply(
        self,
        base: Tree,
        lora: Tree,
        tokens: Int[Array, "row time"],
        *,
        positions: Int[Array, "row time"],
        mask: Bool[Array, "row time source"],
        cache: Cache | None = None,
        index: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "row time hidden"], Cache | None]:
        """Final hidden states (after the last norm), and the cache with this call's keys and values written.

        Args:
            lora: a fused adapter from `ple_jax.lora.fuse`, or `{}` for the base alone.
            positions: rotary position of every token; of padding it does not matter.
            mask: which source positions a token may attend to (source = time without a cache, its length with one).
            index: where in the cache this call writes.
        """
        decoder = self._bind(base)
        x = decoder.embed[...][tokens]
        angles = rope(positions, self.config.head_dim, self.config.rope_theta)

        def layer(block: Block, x: Array, lora: dict, cache: tuple | None) -> tuple:
            return block(x, lora, angles, mask, cache, index)

        if self.remat != "none" and cache is None:
            layer = self._rematerialised(layer)
        if self.scan:
            graph, stacked = nnx.split(decoder.layers)

            def step(x: Array, part: tuple) -> tuple:
                state, lora, cache = part
                x, new = layer(nnx.merge(graph, state), x, lora, cache)
                return x, new if cache is not None else None

            x, new = jax.lax.scan(step, x, (stacked, lora.get("layers", {}), tuple(cache) if cache else None))
            cache = Cache(*new) if cache else None
        else:
            loras = lora.get("layers", [{}] * self.config.num_layers)
            new = []
            for i, block in enumerate(decoder.layers):
                x, kv = layer(block, x, loras[i], (cache.key[i], cache.value[i]) if cache else None)
                new.append(kv)
            cache = Cache(tuple(k for k, _ in new), tuple(v for _, v in new)) if cache else None
        return decoder.norm(x), cache

    def _rematerialised(self, layer: Callable) -> Callable:
        """The layer, keeping for the backward pass its input ("full") or the results of its weight matmuls ("dots")."""
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == "dots" else None

        def run(block: Block, x: Array, lora: dict, cache: None) -> tuple:
            graph, state = nnx.split(block)
            body = jax.checkpoint(lambda state, x, lora: layer(nnx.merge(graph, state), x, lora, None)[0], policy=policy)
            return body(state, x, lora), None

        return run

    def head(self, base: Tree) -> Float[Array, "vocab hidden"]:
        """The output matrix; the embedding itself where they are tied."""
        return base["embed"] if self.config.tie_embeddings else base["head"]

    def logits(self, base: Tree, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        """fp32 logits."""
        return jnp.einsum("...d,vd->...v", hidden, self.head(base), preferred_element_type=jnp.float32)

    def empty_cache(self, rows: int, length: int, dtype: Any) -> Cache:
        c = self.config
        shape = (rows, c.num_kv_heads, length, c.head_dim)
        if self.scan:
            return Cache(*(jnp.zeros((c.num_layers, *shape), dtype) for _ in range(2)))
        return Cache(*(tuple(jnp.zeros(shape, dtype) for _ in range(c.num_layers)) for _ in range(2)))


def fill(model: Model, weights: Mapping[str, np.ndarray], put: Callable[[str, np.ndarray], Array]) -> Tree:
    """The base pytree from weights under Hugging Face's names.

    `put(name, array)` places one leaf on the devices; names are those of `ple_jax.sharding`: "layers/qkv", "embed" ...
    """
    c = model.config
    dtype = model.shapes["embed"].dtype

    def leaf(keys: tuple, _: jax.ShapeDtypeStruct) -> Array:
        path = [str(k.key) for k in keys]
        name = "/".join(part for part in path if not part.isdigit())
        if path[0] != "layers":
            array = weights[_TOP[path[0]]]
        elif model.scan:
            array = np.stack([_fused(c, weights, i, path[1]) for i in range(c.num_layers)])
        else:
            array = _fused(c, weights, int(path[1]), path[2])
        return put(name, np.ascontiguousarray(array, dtype))

    return jax.tree_util.tree_map_with_path(leaf, model.shapes)


_TOP = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}


def _fused(c: ModelConfig, weights: Mapping[str, np.ndarray], layer: int, part: str) -> np.ndarray:
    """One fused kernel [in, ...] of one layer from Hugging Face's tensors ([out, in])."""

    def get(name: str) -> np.ndarray:
        return weights[f"model.layers.{layer}.{name}.weight"]

    match part:
        case "input_norm":
            return get("input_layernorm")
        case "post_norm":
            return get("post_attention_layernorm")
        case "qkv":
            q, k, v = (
                get(f"self_attn.{n}_proj").reshape(c.num_kv_heads, -1, c.head_dim, c.hidden_size) for n in ("q", "k", "v")
            )
            return np.concatenate([q, k, v], 1).reshape(-1, c.hidden_size).T
        case "o":
            return get("self_attn.o_proj").T
        case "gate_up":
            return np.stack([get("mlp.gate_proj").T, get("mlp.up_proj").T], 1)
        case _:
            return get("mlp.down_proj").T


def module_shapes(c: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """Every linear module inside the layers: its Hugging Face path, input size, output size."""
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    sizes = {
        "self_attn.q_proj": (c.hidden_size, heads),
        "self_attn.k_proj": (c.hidden_size, kv),
        "self_attn.v_proj": (c.hidden_size, kv),
        "self_attn.o_proj": (heads, c.hidden_size),
        "mlp.gate_proj": (c.hidden_size, c.intermediate_size),
        "mlp.up_proj": (c.hidden_size, c.intermediate_size),
        "mlp.down_proj": (c.intermediate_size, c.hidden_size),
    }
    for layer in range(c.num_layers):
        for name, (inp, out) in sizes.items():
            yield f"model.layers.{layer}.{name}", inp, out
