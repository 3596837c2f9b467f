"""What the model says of a batch: log-probabilities, entropy, values and scores of packed rows, chunked over time."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32, Shaped

from ple_jax.backend import sharding
from ple_jax.backend.model import Model, head_logits
from ple_jax.core.types import Batch, Outputs, Packed
from ple_jax.models import adapters

CHUNK = 512  # tokens whose logits exist at one time: 100 MB in fp32 at a vocabulary of 49152


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def token_logprobs(
    head: Float[Array, "vocab hidden"],
    hidden: Float[Array, "row time hidden"],
    targets: Int[Array, "row time"],
    softcap: float | None = None,
    shards: int = 1,
    temperature: float = 1.0,
) -> Float32[Array, "row time"]:
    """log softmax(logits / temperature)[target], chunked over time: [row, time, vocab] never exists, forward or backward.

    The gradient is with respect to `hidden` alone (the head is frozen) and is computed beside the value, so that the
    backward pass needs neither the logits nor a second pass over the vocabulary.

    Args:
        softcap: of the logits, where the family has one.
        shards: over how many devices rows are spread: chunks are as large as one device can take.
        temperature: that the tokens were sampled at, above 0.
    """
    return _over_time(lambda h, y: _chunk(head, h, y, softcap, temperature)[0], hidden, targets, shards)


def _chunk(
    head: Array, hidden: Array, targets: Array, softcap: float | None, temperature: float
) -> tuple[Array, Array, Array]:
    logits = head_logits(head, hidden, softcap=softcap)
    if temperature != 1:
        logits = logits / temperature
    normaliser = jax.nn.logsumexp(logits, -1)
    target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return target - normaliser, normaliser, logits


def _over_time(f: Any, hidden: Array, targets: Array, shards: int) -> Any:
    rows, time = targets.shape
    # chunks along time only: rows may be spread over devices
    size = max(1, min(time, CHUNK * shards // rows))
    pad = -time % size
    h = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(rows, -1, size, hidden.shape[-1]).swapaxes(0, 1)
    y = jnp.pad(targets, ((0, 0), (0, pad))).reshape(rows, -1, size).swapaxes(0, 1)
    out = jax.lax.map(lambda part: f(*part), (h, y))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, -1, *x.shape[3:])[:, :time], out)


def _token_logprobs_forward(
    head: Array, hidden: Array, targets: Array, softcap: float | None, shards: int, temperature: float
) -> tuple[Array, tuple[Array, Array]]:
    def f(h: Array, y: Array) -> tuple[Array, Array]:
        value, normaliser, logits = _chunk(head, h, y, softcap, temperature)
        # subtracted in fp32, then rounded to the head's dtype: where p is nearly one, the rest is smaller than p's rounding
        error = jax.nn.one_hot(y, logits.shape[-1], dtype=jnp.float32) - jnp.exp(logits - normaliser[..., None])
        if softcap is not None:  # d tanh
            error = error * (1 - (logits * temperature / softcap) ** 2)
        if temperature != 1:
            error = error / temperature
        return value, jnp.einsum("btv,vd->btd", error.astype(head.dtype), head, preferred_element_type=jnp.float32)

    value, gradient = _over_time(f, hidden, targets, shards)
    return value, (gradient, jnp.zeros((), hidden.dtype))


def _token_logprobs_backward(
    softcap: float | None, shards: int, temperature: float, saved: tuple[Array, Array], g: Array
) -> tuple[None, Array, None]:
    gradient, like = saved
    return None, (g[..., None] * gradient).astype(like.dtype), None
token_logprobs.defvjp(_token_logprobs_forward, _token_logprobs_backward)


def token_entropy(
    head: Float[Array, "vocab hidden"],
    hidden: Float[Array, "row time hidden"],
    targets: Int[Array, "row time"],
    softcap: float | None = None,
    shards: int = 1,
    temperature: float = 1.0,
) -> tuple[Float32[Array, "row time"], Float32[Array, "row time"]]:
    """`token_logprobs`, and beside them the entropy in nats of softmax(logits / temperature); not differentiated."""

    def f(h: Array, y: Array) -> tuple[Array, Array]:
        value, normaliser, logits = _chunk(head, h, y, softcap, temperature)
        logp = logits - normaliser[..., None]
        return value, -(jnp.exp(logp) * logp).sum(-1)

    return _over_time(f, hidden, targets, shards)


def pack(batch: Batch, time: int | None = None) -> Packed:
    """A batch's rows as the model takes them.

    Args:
        batch: prompts may be padded on either side, responses on the right.
        time: tokens of a row: at least the longest (`core.batches.packed_width`); P + K * R if it is not given.
    """
    rows, k, r = batch.response.shape
    p, all_tokens = batch.prompt.shape[1], batch.prompt.shape[1] + k * r
    time = min(time or all_tokens, all_tokens)
    valid = jnp.concatenate([batch.prompt_mask, batch.response_mask.reshape(rows, k * r)], 1)
    # what is valid, in its order, before what is not
    order = jnp.argsort(~valid, axis=1, stable=True)[:, :time]

    def packed(x: Array) -> Array:
        return jnp.take_along_axis(x, order, 1)

    length = batch.prompt_mask.astype(jnp.int32).sum(1)
    position = jnp.concatenate(
        [
            jnp.cumsum(batch.prompt_mask.astype(jnp.int32), 1) - 1,
            length[:, None] + jnp.broadcast_to(jnp.tile(jnp.arange(r), k)[None], (rows, k * r)),
        ],
        1,
    )
    segment = packed(jnp.broadcast_to(jnp.arange(all_tokens)[None] - p, (rows, all_tokens)) // r)  # negative: the prompt's
    there = packed(valid)
    own = (segment[:, None] < 0) | (segment[:, None] == segment[:, :, None])
    mask = jnp.tril(jnp.ones((time, time), bool))[None] & own & there[:, None]
    tokens = packed(jnp.concatenate([batch.prompt, batch.response.reshape(rows, k * r)], 1))
    said = min(k * r, time)
    rank = jnp.cumsum(batch.response_mask.reshape(rows, k * r).astype(jnp.int32), 1) - 1
    outside = jnp.broadcast_to(said + jnp.arange(k * r)[None], rank.shape)
    places = jnp.where(batch.response_mask, rank.reshape(rows, k, r), outside.reshape(rows, k, r))
    first = packed(position) == length[:, None]
    begins, targets = (_responses(x, length, said) for x in (first, tokens))
    return Packed(tokens, packed(position), mask, length, begins, targets, places)


def _responses(x: Array, length: Int32[Array, " row"], said: int) -> Shaped[Array, "row said *rest"]:
    """What belongs to the response tokens, which stand after prompts of these lengths; zeros after the last."""
    return _at(x, length[:, None] + jnp.arange(said)[None])


def _at(x: Shaped[Array, "row time *rest"], index: Int32[Array, "row n"]) -> Shaped[Array, "row n *rest"]:
    """Entries of every row, none twice; zero where the index is outside."""

    def of_row(x: Array, index: Array) -> Array:
        # unique: then the gradient's scatter needs no order among its additions, and is the same every time
        return x.at[index].get(unique_indices=True, mode="fill", fill_value=0)

    return jax.vmap(of_row)(x, index)


def hidden_states(model: Model, base: Any, fused: Any, packed: Packed) -> Float[Array, "row time hidden"]:
    """Of every token of packed rows."""
    return model.apply(base, fused, packed.tokens, positions=packed.positions, mask=packed.mask)[0]


def predicting(hidden: Float[Array, "row time hidden"], packed: Packed) -> Float[Array, "row said hidden"]:
    """The hidden states that predict each response token: the last prompt token's is that of every first one."""
    own = _responses(hidden, packed.length, packed.targets.shape[1])
    last = _at(hidden, packed.length[:, None] - 1)
    before = jnp.concatenate([last, own[:, :-1]], 1)
    return jnp.where(packed.begins[..., None], last, before)


def response_scores(
    head: Float[Array, "hidden 1"], batch: Batch, states: Float[Array, "row time hidden"]
) -> Float32[Array, "row k"]:
    """What a reward model's head says at every response's last token."""
    said, length = batch.response_mask.astype(jnp.int32).sum(-1), batch.prompt_mask.astype(jnp.int32).sum(1)
    return _read(head, _at(states, length[:, None] + jnp.maximum(jnp.cumsum(said, 1) - 1, 0)))


def outputs(
    model: Model,
    base: Any,
    fused: Any,
    batch: Batch,
    *,
    time: int | None = None,
    entropy: bool = False,
    temperature: float = 1.0,
    score: Float[Array, "hidden 1"] | None = None,
    value: Float[Array, "hidden 1"] | None = None,
) -> Outputs:
    """What the model says of a batch. Logits exist for response tokens alone; the compiler leaves out what is not used.

    Args:
        time: tokens of a packed row, as `pack` takes it.
        temperature: what the logits are divided by, above 0.
        score: a reward model's head, read at a response's last token.
        value: PPO's head, read where each token is predicted.
    """
    rows, k, r = batch.response.shape
    packed = pack(batch, time)
    states = hidden_states(model, base, fused, packed)
    hidden = predicting(states, packed)
    head, shards, softcap = model.head(base), 1, model.config.logits_softcap
    if model.mesh is not None:
        # once: the loop over chunks would gather it in every turn
        head = sharding.gathered("head", head, model.mesh)
        shards = math.gcd(rows, sharding.row_multiple(model.mesh))

    def shaped(x: Float32[Array, "row said"]) -> Float32[Array, "row k response_len"]:
        return _at(x, packed.places.reshape(rows, k * r)).reshape(rows, k, r)

    how = head, hidden, packed.targets, softcap, shards, temperature
    logprobs, spread = map(shaped, token_entropy(*how)) if entropy else (shaped(token_logprobs(*how)), None)
    values = None if value is None else shaped(_read(value, hidden))
    return Outputs(logprobs, spread, values, None if score is None else response_scores(score, batch, states))


def _read(head: Float[Array, "hidden 1"], hidden: Float[Array, "*batch hidden"]) -> Float32[Array, "*batch"]:
    # a sum, not a matmul, whose fp32 is bfloat16 on TPUs
    return (hidden.astype(jnp.float32) * head.reshape((1,) * (hidden.ndim - 1) + (-1,))).sum(-1)


def heads(adapter: adapters.Adapter) -> dict[str, Array]:
    """The heads beside an adapter, as arguments of `outputs`."""
    return {name: adapter[name]["w"] for name in (adapters.SCORE, adapters.VALUE) if name in adapter}
