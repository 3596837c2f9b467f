"""Sampling in rows that are refilled: `begin` reads prompts into some rows, and `decode` draws one token of each at a time.

`ple_jax.core.refill` says which prompts go where. Sampling noise comes in as data, one uniform number per row and token, and
is turned into a token by inverting the CDF: a response depends on its own uniforms and not on its row.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from ple_jax.backend.model import Cache, Model, copied
from ple_jax.core.batches import bucket
from ple_jax.core.types import Sampling

_BLOCK = 128


def filter_probabilities(
    p: Float32[Array, "row vocab"], *, top_k: int, top_p: float, min_p: float
) -> Float32[Array, "row vocab"]:
    """Zeroes what top-k, then top-p (nucleus, arXiv:1904.09751), then min-p (arXiv:2407.01082) leave out.

    `p` need not sum to 1. Ties with the last token kept are kept. Nothing is sorted: non-negative floats are ordered as
    their bits are, so the cut is found exactly by 31 bisections over the bits (a full sort took 170x longer on CPU).
    """
    if top_k:
        p = _cut(p, lambda kept: kept.astype(jnp.int32).sum(-1) >= min(top_k, p.shape[-1]))
    if top_p < 1:
        total = p.sum(-1)
        p = _cut(p, lambda kept: jnp.where(kept, p, 0.0).sum(-1) >= jnp.float32(top_p) * total)
    if min_p:
        p = jnp.where(p >= jnp.float32(min_p) * p.max(-1, keepdims=True), p, 0.0)
    return p


def _cut(p: Float32[Array, "row vocab"], enough: Any) -> Float32[Array, "row vocab"]:
    """Keeps the entries p >= t, for the largest t at which what is kept is still `enough`, and zeroes the others."""
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)

    def bisect(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        ok = enough(bits >= middle[:, None])
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    low = jnp.zeros(p.shape[:1], jnp.int32)  # keeping everything is enough
    high = jax.lax.bitcast_convert_type(jnp.full(p.shape[:1], jnp.inf, jnp.float32), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, bisect, (low, high))
    return jnp.where(bits >= low[:, None], p, 0.0)


def invert_cdf(p: Float32[Array, "row vocab"], u: Float32[Array, " row"]) -> Int32[Array, " row"]:
    """Returns the token at quantile `u` in [0, 1) of the unnormalised distribution `p`, in vocabulary order.

    It looks first among the sums of blocks of 128, then inside one block: 4 ms where one cumsum over 64 x 49152 takes 14.
    """
    rows, vocab = p.shape
    blocks = jnp.pad(p, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
    block, rest = _pick(blocks.sum(-1), u)
    token, _ = _pick(jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0], rest)
    return block * _BLOCK + token


def _pick(p: Float32[Array, "row n"], u: Float32[Array, " row"]) -> tuple[Int32[Array, " row"], Float32[Array, " row"]]:
    """Returns the index of the entry at quantile u, and the quantile inside that entry."""
    upper = jnp.cumsum(p, -1)
    target = u * upper[:, -1]
    # rounding may put the target at or above the last sum: the last entry with any mass is meant
    last = p.shape[-1] - 1 - jnp.argmax(jnp.flip(p > 0, -1), -1)
    index = jnp.minimum((upper <= target[:, None]).astype(jnp.int32).sum(-1), last.astype(jnp.int32))
    mass = jnp.take_along_axis(p, index[:, None], -1)[:, 0]
    below = jnp.take_along_axis(upper, index[:, None], -1)[:, 0] - mass
    inside = jnp.clip((target - below) / jnp.maximum(mass, jnp.float32(1e-38)), 0.0, jnp.float32(1 - 2**-24))
    return index, inside


class Drawn(NamedTuple):
    """A token of every row, and its log-probability under softmax(logits / temperature), before any filter."""

    token: Int32[Array, " row"]
    logprob: Float32[Array, " row"]  # nats


def sample_token(logits: Float32[Array, "row vocab"], u: Float32[Array, " row"], *, sampling: Sampling) -> Drawn:
    """Draws one token per row: at quantile `u` of the filtered distribution, or the argmax at temperature 0.

    Log-probabilities are those of softmax(logits / temperature), and at temperature 0 those of temperature 1.
    """
    below = (logits - logits.max(-1, keepdims=True)) / jnp.float32(sampling.temperature or 1.0)
    p = jnp.exp(below)
    if sampling.temperature == 0:
        token = jnp.argmax(logits, -1).astype(jnp.int32)
    else:
        token = invert_cdf(filter_probabilities(p, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p), u)
    return Drawn(token, jnp.take_along_axis(below, token[:, None], -1)[:, 0] - jnp.log(p.sum(-1)))


class Rows(NamedTuple):
    """The rows that are decoded together. Each holds its current response, or the last one that ended in it."""

    cache: Cache  # of a row's own prompt and response, from position 0 on
    filled: Int32[Array, " row"]  # how many positions are written
    shared: Bool[Array, " row"]  # whether the prefix stands before them
    token: Int32[Array, " row"]  # drawn last; not written yet
    length: Int32[Array, " row"]  # tokens drawn
    done: Bool[Array, " row"]
    uniforms: Float32[Array, "row new"]
    out: Drawn  # "row new" each; 0 after the end


def empty_rows(model: Model, count: int, room: int, new: int, dtype: Any) -> Rows:
    """Returns `count` rows in which nothing has begun, each with room for `room` positions and `new` sampled tokens."""
    numbers, no, noise = jnp.zeros(count, jnp.int32), jnp.zeros(count, bool), jnp.zeros((count, new), jnp.float32)
    out = Drawn(jnp.zeros((count, new), jnp.int32), noise)
    return Rows(model.empty_cache(count, room, dtype), numbers, no, numbers, numbers, ~no, noise, out)


def read_prefix(model: Model, base: Any, lora: Any, prefix: Int32[Array, " prefix_len"]) -> Cache:
    """Computes the keys and values of a prefix, held as one row, to which all rows that share the prefix attend."""
    return _read(model, base, lora, None, prefix[None], jnp.array([len(prefix)]))[1]


def begin(
    model: Model,
    base: Any,
    lora: Any,
    prefix: Cache | None,
    rows: Rows,
    tokens: Int32[Array, "prompt length"],
    lengths: Int32[Array, " prompt"],
    prompt: Int32[Array, " begun"],
    row: Int32[Array, " begun"],
    uniforms: Float32[Array, "begun new"],
    *,
    sampling: Sampling,
) -> Rows:
    """Reads the prompts of a `Group`, and draws the first token of every response to them. Pure.

    Args:
        lora: a fused adapter (`ple_jax.backend.lora.fuse`).
        prefix: the result of `read_prefix` if the prompts follow the prefix, else None.
        sampling: static in a jit, as the model is.
    """
    hidden, cache = _read(model, base, lora, prefix, tokens, lengths)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], 1)[:, 0]
    drawn = sample_token(model.logits(base, last)[prompt], uniforms[:, 0], sampling=sampling)
    first, begun = jnp.arange(uniforms.shape[1]) == 0, len(row)
    ends = _ends(drawn.token, sampling) | (len(first) == 1)
    out = Drawn(*(jnp.where(first, x[:, None], 0) for x in drawn))
    numbers = lengths[prompt], jnp.full(begun, prefix is not None), drawn.token, jnp.ones(begun, jnp.int32)
    written = rows[1:], (*numbers, ends, uniforms, out)
    # a row that is not there is one where nothing begins
    put = jax.tree.map(lambda whole, part: whole.at[row].set(part, mode="drop"), *written)
    return Rows(copied(rows.cache, cache, prompt, row), *put)


def _read(
    model: Model, base: Any, lora: Any, prefix: Cache | None, tokens: Array, lengths: Array
) -> tuple[Float[Array, "prompt length hidden"], Cache]:
    """Computes the hidden states of prompts, padded on the right, and their keys and values, without those of the prefix."""
    count, length = tokens.shape
    before = 0 if prefix is None else prefix.length
    cache = model.empty_cache(count, before + length, base["embed"].dtype)
    if prefix is not None:
        cache = jax.tree.map(_spread, cache, prefix)
    source = jnp.broadcast_to(jnp.arange(before + length)[None], (count, before + length))
    position = source[:, before:]
    mask = (source[:, None] <= position[:, :, None]) & (source < before + lengths[:, None])[:, None]
    hidden, cache = model.apply(
        base, lora, tokens, positions=position, mask=mask, cache=cache, index=before, source_positions=source
    )
    return hidden, jax.tree.map(lambda x: x[..., before : before + length, :], cache)


def _spread(whole: Array, part: Array) -> Array:
    """Returns a cache in which every row begins with the single row of `part`."""
    part = jnp.broadcast_to(part, (*whole.shape[:-2], *part.shape[-2:]))
    return jax.lax.dynamic_update_slice(whole, part, (0,) * whole.ndim)


def _ends(token: Int32[Array, " row"], sampling: Sampling) -> Bool[Array, " row"]:
    return (token[:, None] == jnp.asarray(sampling.eos, jnp.int32)[None]).any(-1)


def decode(
    model: Model,
    base: Any,
    lora: Any,
    prefix: Cache | None,
    rows: Rows,
    free: Int32[Array, ""],
    steps: Int32[Array, ""],
    *,
    sampling: Sampling,
    unasked: int = 1,
    within: int | None = None,
) -> Rows:
    """Decodes until at least `free` rows are done, or for `steps` steps. Pure; arguments as in `begin`.

    Args:
        unasked: steps between two checks of what is done; if a device has to be asked, the host waits for the answer.
        within: number of cache positions that no row exceeds in this call; an accelerator reads no more than these.
    """

    def going(state: tuple[Array, Rows]) -> Array:
        return (state[0] < steps) & (state[1].done.sum(dtype=jnp.int32) < free)

    def some(state: tuple[Array, Rows]) -> tuple[Array, Rows]:
        step = functools.partial(_step, model, base, lora, prefix, sampling, within)
        return state[0] + unasked, jax.lax.fori_loop(0, unasked, lambda _, rows: step(rows), state[1])

    return jax.lax.while_loop(going, some, (jnp.int32(0), rows))[1]


def _step(
    model: Model, base: Any, lora: Any, prefix: Cache | None, sampling: Sampling, within: int | None, rows: Rows
) -> Rows:
    """Writes the last token of every row to the cache and draws the next one; a row that is done stays as it is."""
    before, new = 0 if prefix is None else prefix.length, rows.uniforms.shape[1]
    places = jnp.arange(rows.cache.length)[None]
    start, live = before * rows.shared.astype(jnp.int32), ~rows.done
    seen = jnp.broadcast_to(rows.shared[:, None], (len(start), before)), places <= rows.filled[:, None]
    source = jnp.broadcast_to(jnp.arange(before)[None], (len(start), before)), start[:, None] + places
    hidden, cache = model.apply(
        base,
        lora,
        rows.token[:, None],
        positions=(start + rows.filled)[:, None],
        mask=jnp.concatenate(seen, 1)[:, None],
        cache=rows.cache,
        index=rows.filled,
        source_positions=jnp.concatenate(source, 1),
        prefix=prefix,
        reach=within or jnp.where(live, rows.filled + 1, 0),
    )
    u = jnp.take_along_axis(rows.uniforms, jnp.minimum(rows.length, new - 1)[:, None], 1)[:, 0]
    drawn = sample_token(model.logits(base, hidden[:, 0]), u, sampling=sampling)
    here = (jnp.arange(new)[None] == rows.length[:, None]) & live[:, None]
    more = live.astype(jnp.int32)
    done = rows.done | _ends(drawn.token, sampling) | (rows.length + 1 >= new)
    out = Drawn(*(jnp.where(here, x[:, None], old) for old, x in zip(rows.out, drawn, strict=True)))
    token = jnp.where(live, drawn.token, rows.token)
    return Rows(cache, rows.filled + more, rows.shared, token, rows.length + more, done, rows.uniforms, out)


# ---------------------------------------------------------------- one token at a time, for a person who waits


_PROMPT_BUCKET, _CACHE_BUCKET = 64, 256  # smallest sizes compiled for; a conversation that grows doubles them


def stream(
    model: Model,
    base: Any,
    lora: Any,
    prompt: Int32[np.ndarray, " prompt_len"],
    uniforms: Float32[np.ndarray, " max_new"],
    *,
    sampling: Sampling,
) -> Iterator[int]:
    """Yields one response token by token as it is sampled, until EOS (yielded too) or `max_new` tokens.

    Shapes come in buckets, so that the turns of a conversation share their compiled programs.

    Args:
        lora: a fused adapter (`ple_jax.backend.lora.fuse`), or `{}` for the base alone.
        uniforms: the noise of every token, in [0, 1).
    """
    length, new = len(prompt), len(uniforms)
    padded = np.zeros((1, bucket(length, _PROMPT_BUCKET)), np.int32)
    padded[0, :length] = prompt
    options = sampling._replace(max_new_tokens=0, eos=())  # neither needs another compilation
    size = bucket(length + new, _CACHE_BUCKET)
    token, cache = _first(model, base, lora, padded, np.int32(length), uniforms[:1], size=size, sampling=options)
    for i in range(1, new + 1):
        yield (chosen := int(token[0]))
        if chosen in sampling.eos or i == new:
            return
        index = np.int32(length + i - 1)
        token, cache = _next(model, base, lora, token, index, cache, uniforms[i : i + 1], sampling=options)


@functools.partial(jax.jit, static_argnames=("model", "size", "sampling"))
def _first(
    model: Model,
    base: Any,
    lora: Any,
    prompt: Int32[Array, "1 padded"],
    length: Int32[Array, ""],
    u: Float32[Array, " 1"],
    *,
    size: int,
    sampling: Sampling,
) -> tuple[Int32[Array, " 1"], Cache]:
    """Prefills a right-padded prompt and draws the first token.

    What padding leaves in the cache is overwritten before anything may see it.
    """
    index = jnp.arange(prompt.shape[1])[None]
    mask = (index <= index[0][:, None])[None]
    cache = model.empty_cache(1, size, base["embed"].dtype)
    hidden, cache = model.apply(
        base,
        lora,
        prompt,
        positions=jnp.minimum(index, length - 1),
        mask=mask,
        cache=cache,
        source_positions=index,
    )
    last = jax.lax.dynamic_index_in_dim(hidden, length - 1, 1, keepdims=False)
    return sample_token(model.logits(base, last), u, sampling=sampling).token, cache


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="cache")
def _next(
    model: Model,
    base: Any,
    lora: Any,
    token: Int32[Array, " 1"],
    index: Int32[Array, ""],
    cache: Cache,
    u: Float32[Array, " 1"],
    *,
    sampling: Sampling,
) -> tuple[Int32[Array, " 1"], Cache]:
    """Draws the token after `token`, which stands at position `index`."""
    size = cache.length
    mask = (jnp.arange(size) <= index)[None, None]
    hidden, cache = model.apply(
        base,
        lora,
        token[:, None],
        positions=index[None, None],
        mask=mask,
        cache=cache,
        index=index[None],
        source_positions=jnp.arange(size)[None],
        reach=index[None] + 1,
    )
    return sample_token(model.logits(base, hidden[:, 0]), u, sampling=sampling).token, cache
