"""One decoder for every family, in Flax NNX; everything outside sees only the pure `Model.apply`.

Weights of a layer that read the same input are fused at load: q, k, v into `qkv` and gate, up into `gate_up` (see
`ple_jax.models.layout.fuse`). Adapters stay canonical (see `ple_jax.backend.lora`) and arrive here fused the same way.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Bool, Float, Int

from ple_jax.backend import dots
from ple_jax.backend import quantize as quantization
from ple_jax.backend.attention import Attention, attention_of, cache_length
from ple_jax.backend.dots import MATMULS
from ple_jax.backend.experts import Experts
from ple_jax.backend.quantize import QArray, project
from ple_jax.models import families, layout, slices
from ple_jax.models.config import LayerKind, ModelConfig

Tree = Any  # a pytree of arrays


class Cache(NamedTuple):
    """A KV cache: a tuple of [row, kv_head, position, head_dim], one per layer, or one stack of all layers when scanned."""

    key: Any
    value: Any

    @property
    def length(self) -> int:
        """The number of positions that there is room for."""
        return jax.tree.leaves(self)[0].shape[-2]


class LayerCache(NamedTuple):
    """One layer's keys and values: arrays of its own, or the stacks of all layers, which are not taken apart for it."""

    key: Array
    value: Array
    layer: Int[Array, ""] | None = None  # its number in the stacks

    def written(self, k: Array, v: Array, index: Any) -> "LayerCache":
        """Returns the cache with new keys and values written from position `index` on.

        With one token per row, `index` may be [row]: each row's token is then written at its own position.
        """

        def write(whole: Array, part: Array) -> Array:
            layer = () if self.layer is None else (self.layer,)
            if jnp.ndim(index):
                at = (*layer, jnp.arange(part.shape[0]), slice(None), index)
                return whole.at[at].set(part[:, :, 0], mode="promise_in_bounds", unique_indices=True)
            return jax.lax.dynamic_update_slice(whole, part if not layer else part[None], (*layer, 0, 0, index, 0))

        return self._replace(key=write(self.key, k), value=write(self.value, v))

    def read(
        self, start: Any, size: int, rows: slice = slice(None)
    ) -> tuple[Float[Array, "row kv size dim"], Float[Array, "row kv size dim"]]:
        """Returns the keys and values of `size` positions from `start` on, of the given rows."""

        def part(whole: Array) -> Array:
            first, end, _ = rows.indices(whole.shape[-4])
            sizes = end - first, whole.shape[-3], size, whole.shape[-1]
            if self.layer is None:
                return jax.lax.dynamic_slice(whole, (first, 0, start, 0), sizes)
            return jax.lax.dynamic_slice(whole, (self.layer, first, 0, start, 0), (1, *sizes))[0]

        return part(self.key), part(self.value)

    @property
    def length(self) -> int:
        """The number of positions that there is room for."""
        return self.key.shape[-2]


class LowRank(NamedTuple):
    """A fused adapter of one matmul: gain * (x @ kernel + dropout(x) @ down @ up); the scale is already in `up`."""

    down: Float[Array, "inp rank"]
    up: Float[Array, "rank *out"]
    gain: Float[Array, "*out"] | None = None  # DoRA's magnitude over the norm of its direction
    dropout: tuple[Array, Int[Array, "row time"], Array] | None = None  # key, numbers of the tokens, rate


class Kind(NamedTuple):
    """What one kind of layer needs in a call: cosines and sines of the rotary angles, and the attention mask."""

    cos: Float[Array, "row time half"]
    sin: Float[Array, "row time half"]
    mask: Bool[Array, "row time source"]


class Reading(NamedTuple):
    """Where a call writes to a cache, and how far it reads it."""

    index: Any  # where it writes: from there on, or of one token a row, each at its own place
    reach: Int[Array, "#row"] | int | None  # of one token a row: how many positions are read


def _flat(kernel: Float[Array, "inp *out"] | QArray) -> Float[Array, "inp outputs"] | QArray:
    return jax.tree.map(lambda part: part.reshape(part.shape[0], -1), kernel)


class Linear(nnx.Module):
    """A frozen linear module: a kernel [in, *out], a bias where the family has one, and an adapter's low-rank term.

    Args:
        whole: whether the kernel is on one device. All outputs are then one dimension: with [in, *out] the backward pass
            would need a transposed copy.
    """

    def __init__(self, shape: tuple[int, ...], bias: bool, dtype: Any, *, whole: bool):
        self.whole = whole
        self.kernel = nnx.Param(jnp.zeros(shape, dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros(shape[1:], dtype))

    def __call__(self, x: Float[Array, "row time inp"], lora: LowRank | None) -> Float[Array, "row time *out"]:
        kernel = self.kernel[...]
        shape = (*x.shape[:-1], *kernel.shape[1:])
        if self.whole:
            kernel = _flat(kernel)
        y = project(x, kernel) if isinstance(kernel, QArray) else dots.project(x, kernel)
        if lora is not None:  # the adapter is fp32 whatever the base is
            y = y + dots.low_rank(self._dropped(x, lora), lora.down, _flat(lora.up) if self.whole else lora.up)
        y = y.reshape(shape)
        if lora is not None and lora.gain is not None:
            y = jnp.expand_dims(lora.gain, (0, 1)) * y
        if hasattr(self, "bias"):
            y = y + jnp.expand_dims(self.bias[...], (0, 1)).astype(y.dtype)
        return checkpoint_name(y.astype(x.dtype), MATMULS)

    def _dropped(self, x: Float[Array, "row time inp"], lora: LowRank) -> Float[Array, "row time inp"]:
        if lora.dropout is None:
            return x
        key, number, rate = lora.dropout
        # a key for every token: its noise is the same wherever it lies, however many devices there are
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(number.reshape(-1))
        drops = jax.vmap(lambda key: jax.random.bernoulli(key, rate, x.shape[-1:]))(keys)
        return jnp.where(drops.reshape(x.shape), 0, x / (1 - rate).astype(x.dtype))


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last `len(shape)` dimensions, in fp32."""

    def __init__(self, c: ModelConfig, shape: tuple[int, ...], dtype: Any):
        self.scale = nnx.Param(jnp.ones(shape, dtype))
        self.kind, self.eps = c.norm, c.norm_eps
        if c.norm == "layer":
            self.bias = nnx.Param(jnp.zeros(shape, dtype))

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        scale = self.scale[...].astype(jnp.float32)
        axes, before = tuple(range(-scale.ndim, 0)), tuple(range(x.ndim - scale.ndim))
        h = x.astype(jnp.float32)
        if self.kind == "layer":
            h = h - h.mean(axes, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axes, keepdims=True) + self.eps)
        h = h * jnp.expand_dims(scale + 1 if self.kind == "rms_plus_one" else scale, before)
        if self.kind == "layer":
            h = h + jnp.expand_dims(self.bias[...].astype(jnp.float32), before)
        return h.astype(x.dtype)


def rope(positions: Int[Array, "row time"], kind: LayerKind, longest: int) -> tuple[Array, Array]:
    """Computes cos and sin of the rotary angles (RoFormer, arXiv:2104.09864), in fp32.

    Each is [row, time, rotated dimensions / 2]. They are looked up in a table, since XLA would compute them again in every
    layer: it fuses them into what reads them.

    Args:
        positions: below `longest`, except for those of padding.
    """
    angles = np.arange(longest, dtype=np.float32)[:, None] * np.asarray(kind.frequencies, np.float32)
    tables = (f(angles) * np.float32(kind.rope_scale) for f in (np.cos, np.sin))
    return tuple(jnp.take(jnp.asarray(table), positions, axis=0, mode="clip") for table in tables)


def _rotate(x: Float[Array, "row time kv group dim"], cos: Array, sin: Array) -> Array:
    """Rotates the first 2 * cos.shape[-1] dimensions, and leaves the others as they are."""
    half = cos.shape[-1]
    if half == 0:
        return x
    cos, sin = cos[:, :, None, None], sin[:, :, None, None]
    a, b, rest = jax.lax.split(x, (half, half, x.shape[-1] - 2 * half), x.ndim - 1)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    turned = [(a * cos - b * sin).astype(x.dtype), (b * cos + a * sin).astype(x.dtype)]
    return jnp.concatenate([*turned, rest], -1)


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Block(nnx.Module):
    def __init__(self, c: ModelConfig, dtype: Any, attention: Attention, mesh: Mesh | None):
        self.c, (self.attend, self.attend_cache) = c, attention
        whole = mesh is None or mesh.size == 1
        for name in c.norms:
            setattr(self, name, Norm(c, (c.hidden_size,), dtype))
        self.qkv = Linear((c.hidden_size, c.num_kv_heads * (c.group + 2) * c.head_dim), c.qkv_bias, dtype, whole=whole)
        if c.qk_norm != "none":
            together = c.qk_norm == "all"
            self.q_norm = Norm(c, (c.num_kv_heads, c.group, c.head_dim) if together else (c.head_dim,), dtype)
            self.k_norm = Norm(c, (c.num_kv_heads, 1, c.head_dim) if together else (c.head_dim,), dtype)
        self.o = Linear((c.num_heads * c.head_dim, c.hidden_size), c.o_bias, dtype, whole=whole)
        if c.experts:
            self.experts = Experts(c, dtype, _ACTIVATIONS[c.activation], mesh)
        else:
            self.gate_up = Linear((c.hidden_size, 1 + c.gated, c.intermediate_size), c.mlp_bias, dtype, whole=whole)
            self.down = Linear((c.intermediate_size, c.hidden_size), c.mlp_bias, dtype, whole=whole)

    def attention(
        self, x: Array, lora: dict, kind: Kind, cache: LayerCache | None, prefix: LayerCache | None, reading: Reading
    ) -> tuple:
        c = self.c
        rows, time, _ = x.shape
        qkv = self.qkv(x, lora.get("qkv")).reshape(rows, time, c.num_kv_heads, c.group + 2, c.head_dim)
        # split and not sliced: the gradient of slices is a sum of padded arrays
        q, k, v = jax.lax.split(qkv, (c.group, 1, 1), 3)
        if c.qk_norm != "none":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (_rotate(part, kind.cos, kind.sin) for part in (q, k))
        # [row, kv, time, dim]: with time before kv, attention over the cache was 5x slower on CPU
        q = q.transpose(0, 2, 3, 1, 4)
        k, v = (part.squeeze(3).transpose(0, 2, 1, 3) for part in (k, v))
        if cache is not None:
            cache = cache.written(k, v, reading.index)
        how = {"mask": kind.mask, "scale": c.query_scale, "softcap": c.attention_softcap}
        if cache is not None and jnp.ndim(reading.index):
            before = None if prefix is None else prefix.read(0, prefix.length)
            out = self.attend_cache(q, cache.read, length=cache.length, reach=reading.reach, prefix=before, **how)
        else:
            source = (k, v) if cache is None else cache.read(0, kind.mask.shape[2])
            out = self.attend(q, *source, causal=True, **how)
        return self.o(out.transpose(0, 3, 1, 2, 4).reshape(rows, time, -1), lora.get("o")), cache

    def mlp(self, x: Array, lora: dict) -> Array:
        if self.c.experts:
            return self.experts(x)
        # checkpoint: what the activation is made of need not be written for the backward pass, its input is there
        h = jax.checkpoint(self._activated)(self.gate_up(x, lora.get("gate_up")))
        return self.down(h, lora.get("down"))

    def _activated(self, gate_up: Float[Array, "row time gated inner"]) -> Float[Array, "row time inner"]:
        gate, *up = (part.squeeze(2) for part in jax.lax.split(gate_up, (1,) * gate_up.shape[2], 2))
        h = _ACTIVATIONS[self.c.activation](gate)
        return h * up[0] if up else h

    def _norm(self, name: str, x: Array) -> Array:
        return getattr(self, name)(x) if name in self.c.norms else x

    def __call__(self, x: Array, lora: dict, kind: Kind, *caches: Any) -> tuple:
        attended, cache = self.attention(self._norm("pre_attention_norm", x), lora, kind, *caches)
        after = x + self._norm("post_attention_norm", attended)
        fed = self.mlp(self._norm("pre_mlp_norm", x if self.c.parallel else after), lora)
        return after + self._norm("post_mlp_norm", fed), cache


class Decoder(nnx.Module):
    """Embedding, layers (a list, or one block with stacked weights), final norm, and the head [vocab, hidden]."""

    def __init__(self, c: ModelConfig, dtype: Any, scan: bool, attention: Attention, mesh: Mesh | None):
        self.embed = nnx.Param(jnp.zeros((c.vocab_size, c.hidden_size), dtype))
        if c.learned_positions:
            self.positions = nnx.Param(jnp.zeros((c.max_positions, c.hidden_size), dtype))
        if scan:
            self.layers = nnx.vmap(lambda _: Block(c, dtype, attention, mesh))(jnp.zeros(c.num_layers))
        else:
            self.layers = nnx.List([Block(c, dtype, attention, mesh) for _ in range(c.num_layers)])
        self.norm = Norm(c, (c.hidden_size,), dtype)
        if not c.tie_embeddings:
            self.head = nnx.Param(jnp.zeros((c.vocab_size, c.hidden_size), dtype))


@dataclass(frozen=True, eq=False)
class Model:
    """The decoder as pure functions on two pytrees: `base` (frozen) and a fused adapter (`ple_jax.backend.lora.fuse`)."""

    config: ModelConfig
    scan: bool
    remat: str  # none | dots | full: what the backward pass recomputes
    graph: nnx.GraphDef
    shapes: Tree  # of the base: nested dicts of jax.ShapeDtypeStruct
    mesh: Mesh | None = None

    @staticmethod
    def create(
        config: ModelConfig,
        *,
        dtype: Any = jnp.float32,
        scan: bool,
        remat: str = "none",
        attention: str = "xla",
        mesh: Mesh | None = None,
    ) -> "Model":
        """Creates a decoder without weights; `attention` is one of `ple_jax.backend.attention`'s implementations."""
        functions = attention_of(attention, mesh)
        graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype, scan, functions, mesh)))
        return Model(config, scan, remat, graph, nnx.to_pure_dict(state), mesh)

    def _bind(self, base: Tree) -> Decoder:
        # a quantised kernel is a pytree of its own, in the place of an array
        params = jax.tree.map(nnx.Param, base, is_leaf=lambda x: isinstance(x, QArray))
        return nnx.merge(self.graph, nnx.State(params))

    def apply(
        self,
        base: Tree,
        lora: Tree,
        tokens: Int[Array, "row time"],
        *,
        positions: Int[Array, "row time"],
        mask: Bool[Array, "row time source"],
        cache: Cache | None = None,
        index: Int[Array, ""] | Int[Array, " row"] | int = 0,
        source_positions: Int[Array, "row source"] | None = None,
        prefix: Cache | None = None,
        reach: Int[Array, "#row"] | int | None = None,
    ) -> tuple[Float[Array, "row time hidden"], Any]:
        """Computes the final hidden states, after the last norm.

        Returns them, and the given `cache` with this call's keys and values in it, or None without one.

        Args:
            lora: a fused adapter from `ple_jax.backend.lora.fuse`, or `{}` for the base alone.
            positions: position of every token; that of padding does not matter.
            mask: which source positions a token may attend to. Without a cache source = time, and nothing after a token is
                visible; with one it is the prefix, then as many positions of the cache, from the first on, as are read.
            index: where in the cache this call writes: from there on, or with one token per row at a position per row.
            source_positions: position of everything in `mask`; a sliding window over a cache raises ValueError without it.
            prefix: keys and values of one row, to which all rows may attend in a call with one token per row.
            reach: with an `index` per row, how many positions of the cache a row attends to, at most.
        """
        decoder = self._bind(base)
        x = self._embedded(decoder, tokens, positions)
        kinds = self._kinds(positions, mask, cache, source_positions)

        def layer(block: Block, x: Array, lora: dict, kind: Kind, *caches: LayerCache | None) -> tuple:
            return block(x, lora, kind, *caches, Reading(index, reach))

        if self.remat != "none" and cache is None:
            layer = self._rematerialised(layer)
        run = self._scanned if self.scan else self._unrolled
        x, cache = run(decoder, layer, x, lora.get("layers"), kinds, cache, prefix)
        return decoder.norm(x), cache

    def _embedded(self, decoder: Decoder, tokens: Array, positions: Array) -> Float[Array, "row time hidden"]:
        c = self.config
        x = decoder.embed[...][tokens]
        if c.embed_scale != 1.0:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        if c.learned_positions:  # padding may lie anywhere
            x = x + decoder.positions[...][jnp.clip(positions, 0, c.max_positions - 1)]
        return x

    def _kinds(self, positions: Array, mask: Array, cache: Cache | None, source_positions: Array | None) -> list[Kind]:
        """Computes what differs between the kinds of layers: the rotary angles, and what a window leaves of the mask."""
        kinds = self.config.kinds
        if cache is not None and source_positions is None and any(k.window for k in kinds):
            raise ValueError("a sliding window over a cache needs source_positions")
        back = positions[:, :, None] - (positions if source_positions is None else source_positions)[:, None]
        return [Kind(*rope(positions, k, mask.shape[-1]), mask & (back < k.window) if k.window else mask) for k in kinds]

    def _scanned(
        self, decoder: Decoder, layer: Callable, x: Array, loras: Tree, kinds: list[Kind], *caches: Cache | None
    ) -> tuple[Array, Cache | None]:
        """Computes all layers with one compiled body, over stacks of their weights, adapters and caches."""
        graph, stacked = nnx.split(decoder.layers)
        every, (cache, prefix) = jax.tree.map(lambda *x: jnp.stack(x), *kinds), caches

        def step(carry: tuple, part: tuple) -> tuple:
            (x, cache), (state, lora, i, number) = carry, part
            kind = kinds[0] if len(kinds) == 1 else jax.tree.map(lambda x: x[i], every)
            own, before = (None if c is None else LayerCache(c.key, c.value, number) for c in (cache, prefix))
            x, own = layer(nnx.merge(graph, state), x, lora, kind, own, before)
            # carried, and not given and returned a layer at a time, which would copy all of it
            return (x, None if own is None else Cache(own.key, own.value)), None

        pattern, layers = jnp.asarray(self.config.pattern, jnp.int32), jnp.arange(self.config.num_layers)
        return jax.lax.scan(step, (x, cache), (stacked, loras or {}, pattern, layers))[0]

    def _unrolled(
        self, decoder: Decoder, layer: Callable, x: Array, loras: Tree, kinds: list[Kind], *caches: Cache | None
    ) -> tuple[Array, Cache | None]:
        """Computes one layer after the other, each with its own weights, adapter and cache."""

        # jit: traced and differentiated once, and not for every layer
        @functools.partial(jax.jit, static_argnums=0)
        def run(graph: nnx.GraphDef, state: Any, *given: Any) -> tuple:
            return layer(nnx.merge(graph, state), *given)

        new = []
        for i, block in enumerate(decoder.layers):
            kind, own = kinds[self.config.pattern[i]], [LayerCache(c.key[i], c.value[i]) if c else None for c in caches]
            x, kv = run(*nnx.split(block), x, loras[i] if loras else {}, kind, *own)
            new.append(kv)
        return x, Cache(tuple(own.key for own in new), tuple(own.value for own in new)) if caches[0] else None

    def _rematerialised(self, layer: Callable) -> Callable:
        """Makes a layer keep for the backward pass only its input ("full"), or also its weight matmuls' results ("dots")."""
        policy = jax.checkpoint_policies.save_only_these_names(MATMULS) if self.remat == "dots" else None

        def run(block: Block, x: Array, lora: dict, kind: Kind, *nothing: None) -> tuple:
            graph, state = nnx.split(block)

            def body(state: Any, x: Array, lora: dict, kind: Kind) -> Array:
                return layer(nnx.merge(graph, state), x, lora, kind, *nothing)[0]

            return jax.checkpoint(body, policy=policy)(state, x, lora, kind), None

        return run

    def head(self, base: Tree) -> Float[Array, "vocab hidden"]:
        """Returns the output matrix; it is the embedding itself where they are tied."""
        return base["embed"] if self.config.tie_embeddings else base["head"]

    def logits(self, base: Tree, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        """Computes the logits in fp32, soft-capped where the family says so."""
        return head_logits(self.head(base), hidden, softcap=self.config.logits_softcap)

    def empty_cache(self, rows: int, length: int, dtype: Any) -> Cache:
        """Returns a cache of zeros with room for at least `length` positions, in whole blocks where it is read in blocks."""
        c = self.config
        shape = (rows, c.num_kv_heads, cache_length(length), c.head_dim)
        if self.scan:
            return Cache(*(jnp.zeros((c.num_layers, *shape), dtype) for _ in range(2)))
        return Cache(*(tuple(jnp.zeros(shape, dtype) for _ in range(c.num_layers)) for _ in range(2)))


def copied(cache: Cache, part: Cache, chosen: Int[Array, " begun"], rows: Int[Array, " begun"]) -> Cache:
    """Returns a cache in which `rows` begin with what the `chosen` rows of `part` hold.

    Row numbers that are not in the cache are left out.
    """

    def put(whole: Array, part: Array) -> Array:
        axis = whole.ndim - 4  # after the layers of a stack
        at = (*[slice(None)] * axis, rows, slice(None), slice(0, part.shape[-2]))
        return whole.at[at].set(jnp.take(part, chosen, axis=axis), mode="drop")

    return jax.tree.map(put, cache, part)


def head_logits(
    head: Float[Array, "vocab hidden"], hidden: Float[Array, "*batch hidden"], *, softcap: float | None
) -> Float[Array, "*batch vocab"]:
    """Computes logits in fp32, soft-capped if `softcap` is given."""
    logits = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def quantized_axis(name: str) -> int | None:
    """Returns the input dimension of a weight that a quantised base quantises; None for other weights."""
    return {"kernel": 0, "gate": 1, "up": 1, "down": 1}.get(name.rsplit("/", 1)[-1])


# one piece: half of it says what every argument means
def fill(
    model: Model,
    weights: Mapping[str, np.ndarray],
    put: Callable[[str, np.ndarray], Array],
    *,
    quantize: str = "none",
    place: Callable[[str, tuple[int, ...], int, Callable[[slices.Index], np.ndarray]], Array] | None = None,
) -> Tree:
    """Builds the base pytree from weights under Hugging Face's names.

    Each weight is read, fused, cast (or quantised) and placed before the next one is read: the host holds the tensors of one
    kernel of one layer, never a stack of layers.

    Args:
        put: `put(name, array)` places one array on the devices; names are those of `ple_jax.backend.sharding`:
            "layers/qkv/kernel" ... A scanned layer's arrays are placed like an unrolled one's, and then written into their
            stack, which is sharded in the same way.
        quantize: "int8" or "nf4" for the kernels of the layers (see `ple_jax.backend.quantize`), whose values and scales are
            placed under the kernel's name; "none" leaves everything in the model's dtype.
        place: `place(name, shape, axis, read)` places an array of which only parts are read, by `read(index)`, fastest where
            they are cut along `axis`. It is used instead of `put` if devices belong to several processes. Kernels that are
            quantised are still read whole, since a scale covers all inputs.
    """
    c, dtype = model.config, model.shapes["embed"].dtype

    def one(path: list[str], layer: int, own: list[str], shape: tuple[int, ...]) -> Tree:
        name = "/".join(part for part in path if not part.isdigit())
        if place is not None and (quantize == "none" or quantized_axis(name) is None):

            def read(index: slices.Index) -> np.ndarray:
                found = slices.part(c, weights, tuple(own), layer, index, shape)
                return np.ascontiguousarray(found, dtype)

            axis = slices.spread_axis(c, tuple(own), len(shape))
            return jax.block_until_ready(place(name, shape, axis, read))
        whole = weights[slices.top(c, own)] if path[0] != "layers" else _layer(c, weights, layer, own)
        return _placed(put, dtype, quantize, name, whole, shape)

    def leaf(keys: tuple, leaf: jax.ShapeDtypeStruct) -> Tree:
        path = [str(k.key) for k in keys]
        if path[0] != "layers":
            return one(path, 0, path, leaf.shape)
        if not model.scan:
            return one(path, int(path[1]), path[2:], leaf.shape)
        parts = (one(path, i, path[1:], leaf.shape[1:]) for i in range(c.num_layers))
        return _stack(parts, c.num_layers)

    return jax.tree_util.tree_map_with_path(leaf, model.shapes)


def _placed(put: Callable, dtype: Any, quantize: str, name: str, array: np.ndarray, shape: tuple[int, ...]) -> Tree:
    """Puts one weight on the devices, in the model's dtype or quantised."""
    if quantize != "none" and (axis := quantized_axis(name)) is not None:
        parts = quantization.quantize(array.reshape(shape), quantize, axis=axis)
    else:
        parts = np.ascontiguousarray(array.reshape(shape), dtype)
    # transfers are asynchronous: without waiting, every array still under way would be on the host at once
    return jax.block_until_ready(jax.tree.map(lambda part: put(name, part), parts))


def _stack(parts: Iterable[Tree], count: int) -> Tree:
    """Stacks pytrees like `jnp.stack`, but takes one after the other and writes it in place.

    No more than one of them exists beside the stack.
    """
    stack = None
    for i, part in enumerate(parts):
        if stack is None:
            shardings = jax.tree.map(lambda x: _stacked(x.sharding), part)
            stack = jax.jit(_zeros, static_argnums=1, out_shardings=shardings)(part, count)
            write = jax.jit(_write, donate_argnums=0, out_shardings=shardings)
        stack = jax.block_until_ready(write(stack, part, jnp.int32(i)))
    return stack


def _zeros(part: Tree, count: int) -> Tree:
    return jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), part)


def _write(stack: Tree, part: Tree, i: Int[Array, ""]) -> Tree:
    return jax.tree.map(lambda s, p: jax.lax.dynamic_update_index_in_dim(s, p, i, 0), stack, part)


def _stacked(sharding: Sharding) -> Sharding:
    """Returns the sharding with one more dimension in front, which is not sharded."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return sharding


def _layer(c: ModelConfig, weights: Mapping[str, np.ndarray], layer: int, path: list[str]) -> np.ndarray:
    """Returns one weight of one layer in the decoder's layout, made from Hugging Face's tensors."""
    part, kind = path
    family = families.FAMILIES[c.family]

    def get(name: str) -> np.ndarray:
        return weights[f"{family.layers}.{layer}.{name}.{slices.SUFFIX.get(kind, 'weight')}"]

    if part == "experts":
        return layout.stack_experts(c, kind, get)
    norms = {**family.norms, **family.qk_norms}
    if part in norms:
        return get(norms[part])
    modules = {m.name: get(m.name) for m in family.modules if m.kernel == part}
    if kind == "kernel" and not family.transposed:
        modules = {name: weight.T for name, weight in modules.items()}
    return layout.fuse(c, part, modules)
