"""What the model says of a batch: log-probabilities, entropy, values and scores of packed rows, chunked over time."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from ple_jax.backend import sharding
from ple_jax.backend.model import Model, head_logits
from ple_jax.core.types import Batch, Outputs
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
    softcap: float | None = None,
    shards: int = 1,
    temperature: float = 1.0,
) -> Float32[Array, "row time"]:
    """Entropy in nats of softmax(logits / temperature), chunked like `token_logprobs`; not differentiated."""

    def f(h: Array, y: Array) -> Array:
        _, normaliser, logits = _chunk(head, h, y, softcap, temperature)
        logp = logits - normaliser[..., None]
        return -(jnp.exp(logp) * logp).sum(-1)

    return _over_time(f, hidden, jnp.zeros(hidden.shape[:2], jnp.int32), shards)


def pack(batch: Batch) -> tuple[Array, Array, Array]:
    """Tokens, positions [row, time] and the block mask [row, time, time] of packed rows, time = P + K * R.

    Every response sees the prompt and itself, never another response; its positions start after the prompt's. A pair
    costs P + 2R tokens instead of 2(P + R).
    """
    rows, k, r = batch.response.shape
    prompt_len = batch.prompt_mask.astype(jnp.int32).sum(1)
    tokens = jnp.concatenate([batch.prompt, batch.response.reshape(rows, k * r)], 1)
    valid = jnp.concatenate([batch.prompt_mask, batch.response_mask.reshape(rows, k * r)], 1)
    segment = jnp.concatenate([jnp.full((batch.prompt.shape[1],), -1), jnp.repeat(jnp.arange(k), r)])
    prompt_position = jnp.cumsum(batch.prompt_mask.astype(jnp.int32), 1) - 1
    response_position = prompt_len[:, None] + jnp.tile(jnp.arange(r), k)[None]
    position = jnp.concatenate([prompt_position, response_position], 1)
    time = tokens.shape[1]
    causal = jnp.tril(jnp.ones((time, time), bool))
    own = (segment[None] == -1) | (segment[None] == segment[:, None])
    return tokens, position, (causal & own)[None] & valid[:, None]


def hidden_states(
    model: Model, base: Any, fused: Any, batch: Batch, score: Float[Array, "hidden 1"] | None = None
) -> tuple[Float[Array, "row k response_len hidden"], Float32[Array, "row k"] | None, Float[Array, "row 1 hidden"]]:
    """Of every response token; a reward model's scores, where there is a head for them; of the last prompt token."""
    rows, k, r = batch.response.shape
    tokens, position, mask = pack(batch)
    hidden, _ = model.apply(base, fused, tokens, positions=position, mask=mask)
    p = batch.prompt.shape[1]
    responses = hidden[:, p:].reshape(rows, k, r, -1)
    scores = None
    if score is not None:
        last = jnp.maximum(batch.response_mask.astype(jnp.int32).sum(-1) - 1, 0)
        scores = _read(score, jnp.take_along_axis(responses, last[..., None, None], 2)[:, :, 0])
    return responses, scores, hidden[:, p - 1 : p]


def predicting(
    responses: Float[Array, "row k response_len hidden"], first: Float[Array, "row 1 hidden"]
) -> Float[Array, "row k response_len hidden"]:
    """The hidden states that predict each response token: the last prompt token's is that of every first one."""
    rows, k, _, size = responses.shape
    return jnp.concatenate([jnp.broadcast_to(first[:, None], (rows, k, 1, size)), responses[:, :, :-1]], 2)


def outputs(
    model: Model,
    base: Any,
    fused: Any,
    batch: Batch,
    *,
    entropy: bool = False,
    temperature: float = 1.0,
    score: Float[Array, "hidden 1"] | None = None,
    value: Float[Array, "hidden 1"] | None = None,
) -> Outputs:
    """What the model says of a batch. Logits exist for response tokens alone; the compiler leaves out what is not used.

    Args:
        temperature: what the logits are divided by, above 0.
        score: a reward model's head, read at a response's last token.
        value: PPO's head, read where each token is predicted.
    """
    rows, k, r = batch.response.shape
    responses, scores, first = hidden_states(model, base, fused, batch, score)
    hidden = predicting(responses, first).reshape(rows, k * r, -1)
    head, shards, softcap = model.head(base), 1, model.config.logits_softcap
    if model.mesh is not None:
        # once: the loop over chunks would gather it in every turn
        head = sharding.gathered("head", head, model.mesh)
        shards = math.gcd(rows, sharding.row_multiple(model.mesh))

    def shaped(x: Array) -> Array:
        return jnp.where(batch.response_mask, x.reshape(rows, k, r), 0.0)

    logprobs = shaped(token_logprobs(head, hidden, batch.response.reshape(rows, k * r), softcap, shards, temperature))
    spread = shaped(token_entropy(head, hidden, softcap, shards, temperature)) if entropy else None
    values = None if value is None else shaped(_read(value, hidden))
    return Outputs(logprobs, spread, values, scores)


def _read(head: Float[Array, "hidden 1"], hidden: Float[Array, "*batch hidden"]) -> Float32[Array, "*batch"]:
    # a sum, not a matmul, whose fp32 is bfloat16 on TPUs
    return (hidden.astype(jnp.float32) * head.reshape((1,) * (hidden.ndim - 1) + (-1,))).sum(-1)


def heads(adapter: adapters.Adapter) -> dict[str, Array]:
    """The heads beside an adapter, as arguments of `outputs`."""
    return {name: adapter[name]["w"] for name in (adapters.SCORE, adapters.VALUE) if name in adapter}
