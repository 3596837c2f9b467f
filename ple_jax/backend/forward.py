"""Log-probabilities, entropy, values and scores of a batch of packed rows, computed in chunks of tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Shaped

from ple_jax.backend import sharding
from ple_jax.backend.model import Model, head_logits
from ple_jax.core.types import Outputs, Packed
from ple_jax.models import adapters

CHUNK = 512  # tokens of a device whose logits exist at one time: 100 MB in fp32 at a vocabulary of 49152


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def token_logprobs(
    head: Float[Array, "vocab hidden"],
    hidden: Float[Array, "device token hidden"],
    targets: Int[Array, "device token"],
    used: Int[Array, ""] | int,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Float32[Array, "device token"]:
    """Computes log softmax(logits / temperature)[target] in nats, chunk by chunk.

    [device, token, vocab] never exists, forward or backward. The gradient is with respect to `hidden` alone (the head is
    frozen) and is computed beside the value, so that the backward pass needs neither the logits nor a second pass over the
    vocabulary.

    Args:
        hidden: hidden states, with the first dimension spread over devices.
        used: how many tokens of a device are computed; the others are 0, except for those that fill up the last chunk.
        softcap: the soft cap of the logits, where the family has one.
        temperature: the temperature at which the tokens were sampled, above 0.
    """
    return _in_chunks(lambda h, y: (_chunk(head, h, y, softcap, temperature)[0],), hidden, targets, used)[0]


def _chunk(
    head: Array, hidden: Array, targets: Array, softcap: float | None, temperature: float
) -> tuple[Array, Array, Array]:
    logits = head_logits(head, hidden, softcap=softcap)
    if temperature != 1:
        logits = logits / temperature
    normaliser = jax.nn.logsumexp(logits, -1)
    target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return target - normaliser, normaliser, logits


def _in_chunks(f: Any, hidden: Array, targets: Array, used: Array | int) -> tuple[Array, ...]:
    """Applies f to the chunks that hold the used tokens; returns its fp32 results, which are 0 in the other chunks."""
    devices, tokens = targets.shape
    size = max(1, min(tokens, CHUNK))
    pad = -tokens % size
    h, y = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))), jnp.pad(targets, ((0, 0), (0, pad)))
    shapes = jax.eval_shape(f, h[:, :size], y[:, :size])
    start = tuple(jnp.zeros((devices, tokens + pad, *x.shape[2:]), x.dtype) for x in shapes)

    def chunk(state: tuple[Array, tuple[Array, ...]]) -> tuple[Array, tuple[Array, ...]]:
        i, found = state
        parts = f(*(jax.lax.dynamic_slice_in_dim(x, i * size, size, 1) for x in (h, y)))
        written = [
            jax.lax.dynamic_update_slice_in_dim(x, part, i * size, 1) for x, part in zip(found, parts, strict=True)
        ]
        return i + 1, tuple(written)

    chunks, most = (jnp.asarray(used, jnp.int32) + size - 1) // size, (tokens + pad) // size
    # both bounds: the constant is what a reader of the program, such as `planning.hlo`, knows
    _, found = jax.lax.while_loop(lambda s: (s[0] < most) & (s[0] < chunks), chunk, (jnp.int32(0), start))
    return tuple(x[:, :tokens] for x in found)


def _token_logprobs_forward(
    head: Array, hidden: Array, targets: Array, used: Array | int, softcap: float | None, temperature: float
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

    value, gradient = _in_chunks(f, hidden, targets, used)
    return value, (gradient, jnp.zeros((), hidden.dtype))


def _token_logprobs_backward(
    softcap: float | None, temperature: float, saved: tuple[Array, Array], g: Array
) -> tuple[None, Array, None, None]:
    gradient, like = saved
    return None, (g[..., None] * gradient).astype(like.dtype), None, None


token_logprobs.defvjp(_token_logprobs_forward, _token_logprobs_backward)


def token_entropy(
    head: Float[Array, "vocab hidden"],
    hidden: Float[Array, "device token hidden"],
    targets: Int[Array, "device token"],
    used: Int[Array, ""] | int,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> tuple[Float32[Array, "device token"], Float32[Array, "device token"]]:
    """Computes `token_logprobs`, and beside them the entropy of softmax(logits / temperature); nats, not differentiated."""

    def f(h: Array, y: Array) -> tuple[Array, Array]:
        value, normaliser, logits = _chunk(head, h, y, softcap, temperature)
        logp = logits - normaliser[..., None]
        return value, -(jnp.exp(logp) * logp).sum(-1)

    return _in_chunks(f, hidden, targets, used)


def visible(packed: Packed) -> Bool[Array, "row time time"]:
    """Returns which tokens each token sees: itself, and those before it in its query's prompt and in its own response."""

    def pair(x: Int32[Array, "row time"]) -> Bool[Array, "row time time"]:
        return x[:, :, None] == x[:, None]

    time = packed.tokens.shape[1]
    own = pair(packed.query) & (pair(packed.response) | (packed.response == 0)[:, None])
    return own & jnp.tril(jnp.ones((time, time), bool))[None]


def _at(x: Shaped[Array, "device place *rest"], index: Int32[Array, "device n"]) -> Shaped[Array, "device n *rest"]:
    """Returns the entries of x at given places of every device. No place comes twice; a place outside gives zero."""

    def of_device(x: Array, index: Array) -> Array:
        # unique: then the gradient's scatter needs no order among its additions, and is the same every time
        return x.at[index].get(unique_indices=True, mode="fill", fill_value=0)

    return jax.vmap(of_device)(x, index)


def hidden_states(model: Model, base: Any, fused: Any, packed: Packed) -> Float[Array, "device place hidden"]:
    """Computes the final hidden state of every token of packed rows."""
    states = model.apply(base, fused, packed.tokens, positions=packed.positions, mask=visible(packed))[0]
    return states.reshape(packed.targets.shape[0], -1, states.shape[-1])


def predicting(hidden: Float[Array, "device place hidden"], packed: Packed) -> Float[Array, "device token hidden"]:
    """Returns the hidden states that predict each response token; the last prompt token's predicts all first tokens."""
    devices, _, size = hidden.shape
    last = _at(hidden, packed.last.reshape(devices, -1))[:, :, None]
    first = jnp.broadcast_to(last, (*last.shape[:2], packed.places.shape[1], size)).reshape(devices, -1, size)
    return jnp.concatenate([first, _at(hidden, packed.before)], 1)


def _read(head: Float[Array, "hidden 1"], hidden: Float[Array, "*batch hidden"]) -> Float32[Array, "*batch"]:
    # a sum, not a matmul, whose fp32 is bfloat16 on TPUs
    return (hidden.astype(jnp.float32) * head.reshape((1,) * (hidden.ndim - 1) + (-1,))).sum(-1)


def _of_responses(
    x: Float32[Array, "device token"], places: Int32[Array, "query *place"]
) -> Float32[Array, "query *place"]:
    """Puts values of response tokens from device order into the order of the queries; a place outside gives 0."""
    return _at(x, places.reshape(x.shape[0], -1)).reshape(places.shape)


def outputs(
    model: Model,
    base: Any,
    fused: Any,
    packed: Packed,
    *,
    entropy: bool = False,
    temperature: float = 1.0,
    score: Float[Array, "hidden 1"] | None = None,
    value: Float[Array, "hidden 1"] | None = None,
) -> Outputs:
    """Computes the model's `Outputs` for a batch: log-probabilities, entropy if asked for, and the values of given heads.

    Logits exist for response tokens alone; the compiler leaves out what is not used.

    Args:
        packed: the batch's rows, as `core.packing.pack` makes them.
        temperature: what the logits are divided by, above 0.
        score: a reward model's head, applied at a response's last token.
        value: PPO's head, applied where each token is predicted.
    """
    states = hidden_states(model, base, fused, packed)
    hidden = predicting(states, packed)
    head = model.head(base)
    if model.mesh is not None:
        # once: the loop over chunks would gather it in every turn
        head = sharding.gathered("head", head, model.mesh)
    how = head, hidden, packed.targets, packed.used, model.config.logits_softcap, temperature
    found = token_entropy(*how) if entropy else (token_logprobs(*how),)
    logprobs, *spread = (_of_responses(x, packed.places) for x in found)
    return Outputs(
        logprobs,
        spread[0] if entropy else None,
        None if value is None else _of_responses(_read(value, hidden), packed.places),
        None if score is None else _of_responses(_read(score, states), packed.ends),
    )


def heads(adapter: adapters.Adapter) -> dict[str, Array]:
    """Returns the heads beside an adapter, as keyword arguments of `outputs`."""
    return {name: adapter[name]["w"] for name in (adapters.SCORE, adapters.VALUE) if name in adapter}
