"""Sampling: prefill, then decode with a KV cache, in one compiled call per shape.

Sampling noise comes in as data, one uniform per row and step, and is turned into a token by inverting the CDF: a response
depends on its own uniforms and not on its place in a batch.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from ple_jax.backend.model import Cache, Model
from ple_jax.core.batches import bucket
from ple_jax.core.types import Sampling

_BLOCK = 128


def filter_probabilities(
    p: Float32[Array, "row vocab"], *, top_k: int, top_p: float, min_p: float
) -> Float32[Array, "row vocab"]:
    """Zeroes what top-k, then top-p (nucleus, arXiv:1904.09751), then min-p (arXiv:2407.01082) leave out.

    `p` need not sum to 1. Ties with the last token kept are kept. No sort: non-negative floats are ordered as their bits
    are, so the cut is found exactly by 31 bisections over the bits (a full sort took 170x longer on CPU).
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
    """Keeps p >= t for the largest t at which what is kept is still `enough`."""
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
    """The token at quantile `u` in [0, 1) of the unnormalised distribution `p`, in vocabulary order.

    Two levels, the sums of blocks of 128 and then inside one block: 4 ms where one cumsum over 64 x 49152 takes 14.
    """
    rows, vocab = p.shape
    blocks = jnp.pad(p, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
    block, rest = _pick(blocks.sum(-1), u)
    token, _ = _pick(jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0], rest)
    return block * _BLOCK + token


def _pick(p: Float32[Array, "row n"], u: Float32[Array, " row"]) -> tuple[Int32[Array, " row"], Float32[Array, " row"]]:
    """The entry at quantile u, and the quantile inside that entry."""
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
    """A token of every row, and its log-probability: of softmax(logits / temperature), whatever filters left out of it."""

    token: Int32[Array, " row"]
    logprob: Float32[Array, " row"]  # nats


def sample_token(logits: Float32[Array, "row vocab"], u: Float32[Array, " row"], *, sampling: Sampling) -> Drawn:
    """One token per row: argmax at temperature 0, of which log-probabilities are at 1, else the filtered distribution at
    quantile `u`.
    """
    below = (logits - logits.max(-1, keepdims=True)) / jnp.float32(sampling.temperature or 1.0)
    p = jnp.exp(below)
    if sampling.temperature == 0:
        token = jnp.argmax(logits, -1).astype(jnp.int32)
    else:
        token = invert_cdf(filter_probabilities(p, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p), u)
    return Drawn(token, jnp.take_along_axis(below, token[:, None], -1)[:, 0] - jnp.log(p.sum(-1)))


def generate(
    model: Model,
    base: Any,
    lora: Any,
    prompt: Int32[Array, "row prompt_len"],
    prompt_mask: Bool[Array, "row prompt_len"],
    prefix: Int32[Array, " prefix_len"],
    uniforms: Float32[Array, "row max_new"],
    *,
    sampling: Sampling,
) -> tuple[Int32[Array, "row max_new"], Float32[Array, "row max_new"], Int32[Array, " row"]]:
    """Responses, their tokens' log-probabilities (`Drawn`) and their lengths, a sampled EOS counted. Pure.

    Args:
        lora: a fused adapter (`ple_jax.backend.lora.fuse`).
        prompt: left-padded; every row has at least one token.
        prefix: tokens that stand before every prompt (the principles); computed once and shared by all rows.
        sampling: static in a jit, as the model is.
    """
    rows, new = uniforms.shape
    hidden, cache, sources = _prefill(model, base, lora, prompt, prompt_mask, prefix, new)
    eos = jnp.asarray(sampling.eos, jnp.int32)

    def draw(hidden: Array, u: Array) -> Drawn:
        return sample_token(model.logits(base, hidden[:, -1]), u, sampling=sampling)

    def step(state: tuple) -> tuple:
        i, drawn, cache, out, lengths, done = state
        out = _written(out, drawn, done, i)
        lengths = lengths + (~done).astype(jnp.int32)
        done = done | (drawn.token[:, None] == eos[None]).any(-1)
        hidden, cache = _decode(model, base, lora, drawn.token, i, cache, sources)
        u = jax.lax.dynamic_slice_in_dim(uniforms, jnp.minimum(i + 1, new - 1), 1, 1)[:, 0]
        return i + 1, draw(hidden, u), cache, out, lengths, done

    # the last token needs no forward pass after it: the loop makes new - 1 and the end is written below
    out = Drawn(jnp.zeros((rows, new), jnp.int32), jnp.zeros((rows, new), jnp.float32))
    state = jnp.int32(0), draw(hidden, uniforms[:, 0]), cache, out, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
    i, drawn, _, out, lengths, done = jax.lax.while_loop(lambda s: (s[0] < new - 1) & ~s[-1].all(), step, state)
    return *_written(out, drawn, done, i), lengths + (~done).astype(jnp.int32)


def _written(out: Drawn, drawn: Drawn, done: Bool[Array, " row"], i: Int32[Array, ""]) -> Drawn:
    """With the i-th token of every row, which is 0 where that has ended."""

    def write(x: Array, value: Array) -> Array:
        return jax.lax.dynamic_update_slice(x, jnp.where(done, 0, value)[:, None], (0, i))

    return Drawn(write(out.token, drawn.token), write(out.logprob, drawn.logprob))


class Sources(NamedTuple):
    """What a row attends to while it is decoded: [prefix | padded prompt | generated]."""

    there: Bool[Array, "row source"]  # of prefix and prompt
    places: Int32[Array, "row source"]  # position of each
    begin: int  # index of the first generated token
    position: Int32[Array, "row 1"]  # of the prompt's last token


def _prefill(
    model: Model, base: Any, lora: Any, prompt: Array, prompt_mask: Array, prefix: Array, new: int
) -> tuple[Float[Array, "row prompt_len hidden"], Cache, Sources]:
    """Hidden states of the prompts, and a cache with room for `new` tokens after them."""
    rows, length = prompt.shape
    shared = prefix.shape[0]
    total = shared + length + new
    cache = model.empty_cache(rows, total, base["embed"].dtype)
    if shared:
        cache = _prefill_prefix(model, base, lora, prefix, cache)
    source = jnp.concatenate([jnp.ones((rows, shared), bool), prompt_mask, jnp.zeros((rows, new), bool)], 1)
    reached = shared + length
    causal = jnp.arange(reached)[None] <= shared + jnp.arange(length)[:, None]
    position = shared + jnp.cumsum(prompt_mask.astype(jnp.int32), 1) - 1
    mask = source[:, None, :reached] & causal[None]
    coming = position[:, -1:] + 1 + jnp.arange(new)[None]
    before = jnp.broadcast_to(jnp.arange(shared)[None], (rows, shared))
    places = jnp.concatenate([before, position, coming], 1)
    hidden, cache = model.apply(
        base, lora, prompt, positions=position, mask=mask, cache=cache, index=shared, source_positions=places[:, :reached]
    )
    return hidden, cache, Sources(source, places, reached, position[:, -1:])


def _decode(
    model: Model, base: Any, lora: Any, token: Int32[Array, " row"], i: Array, cache: Cache, sources: Sources
) -> tuple[Float[Array, "row 1 hidden"], Cache]:
    """Hidden states of the i-th generated token, which is written to the cache."""
    index, places = sources.begin + i, jnp.arange(sources.there.shape[1])
    seen = sources.there | ((places >= sources.begin) & (places <= index))[None]
    return model.apply(
        base,
        lora,
        token[:, None],
        positions=sources.position + 1 + i,
        mask=seen[:, None],
        cache=cache,
        index=index,
        source_positions=sources.places,
    )


def _prefill_prefix(model: Model, base: Any, lora: Any, prefix: Int32[Array, " prefix_len"], cache: Cache) -> Cache:
    shared = prefix.shape[0]
    small = model.empty_cache(1, shared, base["embed"].dtype)
    position = jnp.arange(shared)[None]
    mask = jnp.tril(jnp.ones((shared, shared), bool))[None]
    _, small = model.apply(
        base, lora, prefix[None], positions=position, mask=mask, cache=small, source_positions=position
    )

    def spread(whole: Array, part: Array) -> Array:
        part = jnp.broadcast_to(part[..., :shared, :], (*whole.shape[:-2], shared, whole.shape[-1]))
        return jax.lax.dynamic_update_slice(whole, part, (0,) * whole.ndim)

    return jax.tree.map(spread, cache, small)


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
    """One response, token by token as it is sampled, until EOS (yielded too) or `max_new` tokens.

    Shapes come in buckets, so that the turns of a conversation share their compiled programs.

    Args:
        lora: a fused adapter (`ple_jax.backend.lora.fuse`), or `{}` for the base alone.
        uniforms: the noise of every token.
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
    """Prefill of a right-padded prompt: what padding leaves in the cache is overwritten before anything may see it."""
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
    """The token after `token`, which stands at position `index`."""
    size = jax.tree.leaves(cache)[0].shape[-2]
    mask = (jnp.arange(size) <= index)[None, None]
    hidden, cache = model.apply(
        base,
        lora,
        token[:, None],
        positions=index[None, None],
        mask=mask,
        cache=cache,
        index=index,
        source_positions=jnp.arange(size)[None],
    )
    return sample_token(model.logits(base, hidden[:, 0]), u, sampling=sampling).token, cache
