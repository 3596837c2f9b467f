"""Attention behind one switch: einsums anywhere, cuDNN's fused kernel on NVIDIA GPUs, the splash kernel on TPUs.

All take the same arguments and a boolean mask per row, so left padding, sliding windows and packed rows
[prompt | response 1 | ... | response K] need nothing special. The fused kernels never hold [time, source] scores.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from ple_jax.backend.sharding import BATCH, row_multiple
from ple_jax.core.batches import round_up
from ple_jax.core.errors import UserError

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
_FASTEST = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}  # by platform; elsewhere xla
_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
_PARTS = 4  # of long causal rows: of the scores 3 / 8 are left out, and a program has four times the attention in it
_LANES = 128  # the kernels work on tiles of this many positions
# positions of a cache: those that are read at once, and how many may be, block or not. On two cores with AVX2 30 layers of
# 16 rows over 80 positions take 10 ms at once and 25 in blocks, 64 rows over 320 take 260 and 195
BLOCK, AT_ONCE = 32, 256
_ROWS = 16  # whose blocks are read together, as far as one of them goes: of 8 a position takes half as long again
_UNSEEN = -1e30  # a score, not -inf: queries that see nothing must not give NaN

Read = Callable[[Any, int, slice], tuple[Array, Array]]


class Attention(NamedTuple):
    """The two attention functions of a model, bound to an implementation and a mesh: `attend` and `attend_cache`."""

    attend: Callable[..., Array]
    attend_cache: Callable[..., Array]


def attention_of(implementation: str, mesh: Mesh | None) -> Attention:
    """Returns `attend` and `attend_cache`, bound to one of `IMPLEMENTATIONS` and to a mesh (None: one device)."""
    alone = mesh is None or mesh.size == 1  # rows of several devices are not taken apart
    of_cache = partial(attend_cache, looped=loops(mesh), together=_ROWS if alone else None)
    return Attention(partial(attend, implementation=implementation, mesh=mesh), of_cache)


def loops(mesh: Mesh | None) -> bool:
    """Says whether `attend_cache` reads blocks in a loop, which it does on CPUs alone.

    On an accelerator the host would be asked after every block whether there is another one.
    """
    return (jax.devices() if mesh is None else list(mesh.devices.flat))[0].platform == "cpu"


def cache_length(positions: int) -> int:
    """Returns the number of positions to allocate for a cache: whole blocks, if it is so long that it is read in blocks."""
    return positions if positions <= AT_ONCE else round_up(positions, BLOCK)


def choose(setting: str, *, platform: str, dtype: Any, softcap: float | None, head_dim: int) -> str:
    """Returns the implementation for `attend`: for "auto" the platform's fused kernel where the model allows it, else "xla".

    Args:
        setting: "auto" or one of `IMPLEMENTATIONS`.
        platform: of the devices that will run it: "cpu", "gpu" or "cuda", "rocm", "tpu".
        dtype: of queries, keys and values.
        softcap: the model's soft cap of attention scores, if it has one.
        head_dim: size of one head.

    Raises:
        UserError: the setting is unknown, or it names an implementation that cannot work on this platform or for this model.
    """
    if setting == "auto":
        fastest = _FASTEST.get(platform, "xla")
        # cuDNN takes heads above 128 on Hopper and later only, which the platform's name does not tell
        unsure = fastest == "cudnn" and head_dim > 128
        return "xla" if unsure or _obstacle(fastest, platform, dtype, softcap, head_dim) else fastest
    if setting not in IMPLEMENTATIONS:
        raise UserError(f"attention={setting!r} is unknown; choose auto, {', '.join(IMPLEMENTATIONS)}")
    if obstacle := _obstacle(setting, platform, dtype, softcap, head_dim):
        raise UserError(f"attention={setting!r} {obstacle}; set it to auto or xla")
    return setting


def _obstacle(implementation: str, platform: str, dtype: Any, softcap: float | None, head_dim: int) -> str:
    """Returns why an implementation cannot work on a platform or for a model; an empty string if it can."""
    if implementation == "xla":
        return ""
    if _FASTEST.get(platform) != implementation:
        return f"needs {'an NVIDIA GPU' if implementation == 'cudnn' else 'a TPU'}, but the devices are {platform!r}"
    if implementation == "splash":
        return ""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 or float16, not {jnp.dtype(dtype).name}"
    if softcap is not None:
        return f"cannot cap scores, which this model does (at {softcap:g})"
    if head_dim % 8 or head_dim > 256:
        return f"takes a head size that is a multiple of 8 up to 256, not {head_dim}"
    return ""


def attend(
    q: Float[Array, "row kv group time dim"],
    k: Float[Array, "row kv source dim"],
    v: Float[Array, "row kv source dim"],
    *,
    mask: Bool[Array, "row time source"],
    scale: float,
    softcap: float | None = None,
    implementation: str,
    causal: bool = False,
    mesh: Mesh | None = None,
) -> Float[Array, "row kv group time dim"]:
    """Computes softmax(cap tanh(scale q k / cap)) v over the visible source positions; scores and softmax are in fp32.

    A query that sees nothing (it only fills the shape) gets a finite but arbitrary result. A call with one query per row
    (decoding) always takes the einsums: it has no [time, source] scores to save.

    Args:
        q: queries, grouped by the KV head they share.
        mask: which source positions a query sees.
        softcap: cap of the scores before the mask; Gemma 2, arXiv:2408.00118.
        causal: whether the mask hides everything after a query, the last query being the last of the source. The einsums may
            then skip most of what is hidden.
        implementation: what `choose` returned, or "splash_interpret": the TPU kernel emulated, for tests on CPU.
        mesh: the mesh if a fused kernel runs inside jit over several devices; the compiler cannot partition it by itself.

    Raises:
        ValueError: the implementation is unknown, or it is cuDNN and there is a soft cap.
    """
    if implementation == "xla" or q.shape[3] == 1:
        return (_in_parts if causal else _einsum)(q, k, v, mask, scale=scale, softcap=softcap)
    match implementation:
        case "cudnn" if softcap is None:
            kernel = partial(_cudnn, scale=scale)
        case "splash" | "splash_interpret":
            kernel = partial(_splash, scale=scale, softcap=softcap, interpret=implementation == "splash_interpret")
        case _:
            raise ValueError(f"no attention {implementation!r} with softcap={softcap}; resolve the setting with choose()")
    return _on_shards(partial(_in_tiles, kernel), mesh)(q, k, v, mask)


def attend_cache(
    q: Float[Array, "row kv group 1 dim"], read: Read, *, length: int, reach: Int[Array, "#row"] | int,
    mask: Bool[Array, "row 1 source"], scale: float, softcap: float | None = None, looped: bool, together: int | None = None,
    prefix: tuple[Float[Array, "1 kv before dim"], Float[Array, "1 kv before dim"]] | None = None,
) -> Float[Array, "row kv group 1 dim"]:  # fmt: skip
    """Computes `attend` for one token of every row, over a KV cache and over a prefix that is held once for all rows.

    A cache of more than `AT_ONCE` positions is read in blocks, in their order, as far as `reach` says. A block of which
    nothing is visible adds zeros, so more room in the cache, or a longer row beside one, changes no bit of a row's result.

    Args:
        read: (start, size, rows) -> keys and values of these positions, [row, kv, size, dim] each.
        length: positions of the cache, as `cache_length` returns them.
        reach: how many of them are read, at least all that a row sees. Without a loop only an int, for all rows, is used.
        mask: which positions a query sees: first those of the prefix, then those of the cache; none beyond its end.
        looped: whether small blocks are read in a loop, where loops cost little; else `AT_ONCE` positions at a time.
        together: number of rows that share a loop, up to their largest reach; all rows share one if it does not divide them.
    """
    before = 0 if prefix is None else prefix[0].shape[2]
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, before + length - mask.shape[2])))[:, :, None]
    found = _Part(jnp.full((*q.shape[:3], 1), _UNSEEN), jnp.zeros((*q.shape[:3], 1)), jnp.zeros(q[:, :, :, 0].shape))
    if prefix is not None:
        found = _of_prefix(q[:, :, :, 0], *prefix, mask[..., :before], scale=scale, softcap=softcap)

    def block(start: Array | int, found: _Part, size: int = BLOCK, rows: slice = slice(None)) -> _Part:
        seen = jax.lax.dynamic_slice_in_dim(mask[rows], before + start, size, 3)
        return _joined(found, _part_of(q[rows, :, :, 0], *read(start, size, rows), seen, scale=scale, softcap=softcap))

    if looped and length > AT_ONCE:
        reached = (jnp.broadcast_to(jnp.asarray(reach, jnp.int32), len(q)) + BLOCK - 1) // BLOCK
        size = together if together and len(q) % together == 0 else len(q)
        found = _in_blocks(block, found, reached, [slice(first, first + size) for first in range(0, len(q), size)])
    else:
        for start in range(0, min(length, reach) if isinstance(reach, int) else length, AT_ONCE):
            found = block(start, found, min(AT_ONCE, length - start))
    # a row that is done may read nothing, and is computed: its nan would stay in the cache, where another response goes on
    return (found.out / jnp.where(found.total == 0, 1, found.total)).astype(q.dtype)[:, :, :, None]


def _in_blocks(block: Callable, found: "_Part", reached: Int[Array, " row"], parts: Sequence[slice]) -> "_Part":
    """Adds to `found` the blocks that the rows have reached, in a loop for each group of rows in `parts`."""
    done = []
    for rows in parts:
        step = partial(lambda i, found, rows: block(i * BLOCK, found, rows=rows), rows=rows)
        own = jax.tree.map(lambda x, rows=rows: x[rows], found)
        done.append(jax.lax.fori_loop(0, reached[rows].max(), step, own))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *done)


def _of_prefix(q: Array, k: Array, v: Array, seen: Array, *, scale: float, softcap: float | None) -> "_Part":
    """Computes the attention of all rows to a prefix whose keys and values are held once."""
    if q.dtype == jnp.float32:
        return _part_of(q, k[0], v[0], seen, scale=scale, softcap=softcap)
    # one row of all their queries: a CPU has no dot of bfloat16 whose batch lies between other dimensions
    rows, kv, group, dim = q.shape
    together = q.transpose(1, 0, 2, 3).reshape(1, kv, rows * group, dim)
    each = jnp.broadcast_to(seen, (rows, 1, group, seen.shape[-1])).reshape(1, 1, rows * group, -1)
    found = _part_of(together, k, v, each, scale=scale, softcap=softcap)
    return _Part(*(x.reshape(kv, rows, group, -1).transpose(1, 0, 2, 3) for x in found))


class _Part(NamedTuple):
    """The attention to some of the source positions, in float32, not yet divided by the sum of its weights."""

    largest: Float[Array, "row kv group 1"]  # of the scores
    total: Float[Array, "row kv group 1"]
    out: Float[Array, "row kv group dim"]


def _part_of(q: Array, k: Array, v: Array, seen: Array, *, scale: float, softcap: float | None) -> _Part:
    """Computes partial attention to keys and values [row, kv, source, dim], or [kv, source, dim] if all rows share them."""
    source = "bksd" if k.ndim == 4 else "ksd"
    scores = _dot(f"bkgd,{source}->bkgs", q, k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen, scores, jnp.float32(_UNSEEN))
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    return _Part(largest, weights.sum(-1, keepdims=True), _dot(f"bkgs,{source}->bkgd", weights.astype(q.dtype), v))


def _joined(a: _Part, b: _Part) -> _Part:
    """Merges two partial attentions. One that sees nothing adds zeros to the other."""
    largest = jnp.maximum(a.largest, b.largest)
    x, y = jnp.exp(a.largest - largest), jnp.exp(b.largest - largest)
    return _Part(largest, a.total * x + b.total * y, a.out * x + b.out * y)


def _in_parts(q: Array, k: Array, v: Array, mask: Array, *, scale: float, softcap: float | None) -> Array:
    """Computes causal attention of long rows, one part of the queries after the other.

    Each part attends to the source only up to its own end. What precedes all queries is always included.
    """
    time, before = q.shape[3], k.shape[2] - q.shape[3]
    parts = max(1, min(_PARTS, time // _LANES))
    ends = [time * (i + 1) // parts for i in range(parts)]
    attend = partial(_einsum, scale=scale, softcap=softcap)
    out = [
        attend(x, k[:, :, :s], v[:, :, :s], mask[:, end - x.shape[3] : end, :s])
        for x, end, s in zip(jnp.split(q, ends[:-1], 3), ends, [before + end for end in ends], strict=True)
    ]
    return jnp.concatenate(out, 3)


def _einsum(q: Array, k: Array, v: Array, mask: Array, *, scale: float, softcap: float | None) -> Array:
    rows, kv, _, _, dim = q.shape
    # [row, kv, group * time, dim]: one matmul per KV head; any other order was up to 5x slower on CPU
    return _softmax(q.reshape(rows, kv, -1, dim), k, v, mask, scale, softcap).astype(q.dtype).reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _softmax(q: Array, k: Array, v: Array, mask: Array, scale: float, softcap: float | None) -> Array:
    """Computes softmax(q k) v for queries [row, kv, group * time, dim], in float32.

    Arrays as large as [time, source] are written and read as rarely as possible: weights are divided by their sum after the
    multiplication with v, and only they (and the tanh of a soft cap) are kept for the gradient.
    """
    return _softmax_forward(q, k, v, mask, scale, softcap)[0]


def _softmax_forward(q: Array, k: Array, v: Array, mask: Array, scale: float, softcap: float | None) -> tuple[Array, Any]:
    scores = _dot("bkqd,bksd->bkqs", q, k) * scale
    cap = None
    if softcap is not None:
        cap = jnp.tanh(scores / softcap)
        scores = softcap * cap
    rows, kv, queries, source = scores.shape
    seen = jnp.broadcast_to(mask[:, None, None], (rows, kv, queries // mask.shape[1], *mask.shape[1:])).reshape(scores.shape)
    scores = jnp.where(seen, scores, jnp.float32(_UNSEEN))
    exponentials = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = exponentials.sum(-1, keepdims=True)
    weights = exponentials.astype(q.dtype)
    out = _dot("bkqs,bksd->bkqd", weights, v) / total
    return out, (q, k, v, weights, out, total, cap)


def _softmax_backward(scale: float, softcap: float | None, saved: Any, g: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, weights, out, total, cap = saved
    g = g / total
    narrow = g.astype(q.dtype)
    to_v = _dot("bkqs,bkqd->bksd", weights, narrow)
    to_weights = _dot("bkqd,bksd->bkqs", narrow, v)
    to_scores = weights.astype(jnp.float32) * (to_weights - (g * out).sum(-1, keepdims=True)) * scale
    if cap is not None:
        to_scores = to_scores * (1 - cap * cap)
    to_scores = to_scores.astype(q.dtype)
    to_q, to_k = _dot("bkqs,bksd->bkqd", to_scores, k), _dot("bkqs,bkqd->bksd", to_scores, q)
    return to_q.astype(q.dtype), to_k.astype(k.dtype), to_v.astype(v.dtype), None


_softmax.defvjp(_softmax_forward, _softmax_backward)


def _on_shards(kernel: Callable, mesh: Mesh | None) -> Callable:
    """Wraps a kernel to run on each device's own rows and KV heads. A dimension that does not divide is not split."""
    if mesh is None or mesh.size == 1:
        return kernel

    def run(q: Array, k: Array, v: Array, mask: Array) -> Array:
        rows = BATCH if q.shape[0] % row_multiple(mesh) == 0 else None
        heads = "tensor" if q.shape[1] % mesh.shape["tensor"] == 0 else None
        spec = PartitionSpec(rows, heads)
        # a kernel's outputs do not say over which axes they vary, which is what check_vma would verify
        sharded = jax.shard_map(
            kernel, mesh=mesh, in_specs=(spec, spec, spec, PartitionSpec(rows)), out_specs=spec, check_vma=False
        )
        return sharded(q, k, v, mask)

    return run


def _in_tiles(kernel: Callable, q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Calls a kernel with lengths padded to whole tiles, and with a mask in which every query sees something.

    Splash demands both (it divides by the sum of the weights). cuDNN's backward gave NaN for lengths of 64 modulo 128 when a
    query saw nothing: https://github.com/pytorch/pytorch/issues/196678
    """
    time, source = mask.shape[1:]
    more_time, more_source = -time % _LANES, -source % _LANES
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, more_time), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more_source), (0, 0))) for x in (k, v))
    mask = jnp.pad(mask, ((0, 0), (0, more_time), (0, more_source)))
    first = jnp.arange(source + more_source)[None, None] == 0
    return kernel(q, k, v, mask | (~mask.any(-1, keepdims=True) & first))[:, :, :, :time]


def _cudnn(q: Array, k: Array, v: Array, mask: Array, *, scale: float) -> Array:
    rows, kv, group, time, dim = q.shape
    query = q.transpose(0, 3, 1, 2, 4).reshape(rows, time, kv * group, dim)
    key, value = (x.transpose(0, 2, 1, 3) for x in (k, v))
    out = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], scale=scale, implementation="cudnn")
    return out.reshape(rows, time, kv, group, dim).transpose(0, 2, 3, 1, 4)


def _splash(q: Array, k: Array, v: Array, mask: Array, *, scale: float, softcap: float | None, interpret: bool) -> Array:
    # Pallas takes long to import, and only TPUs need it
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

    rows, kv, group, time, dim = q.shape
    queries, keys = (next(b for b in (512, 384, 256, 128) if length % b == 0) for length in mask.shape[1:])
    sizes = splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
    )
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel has no scale of its own

    def one_row(q: Array, k: Array, v: Array, mask: Array) -> Array:
        # is_dynamic_mask is a Python bool among the arrays, and the kernel branches on it: not under jit
        forward, backward = (
            process(mask[None], (queries, keys))[0]._replace(is_dynamic_mask=None)
            for process in (mask_info.process_dynamic_mask, mask_info.process_dynamic_mask_dkv)
        )
        kernel = splash.SplashAttentionKernel(
            forward,
            forward,
            backward,
            block_sizes=sizes,
            is_mqa=False,
            save_residuals=False,
            mask_value=splash.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=softcap,
            residual_checkpoint_name=None,
            mask_function=None,
            interpret=interpret,
        )
        return kernel(q.reshape(kv * group, time, dim), k, v)

    return jax.vmap(one_row)(q, k, v, mask).reshape(q.shape)
