"""What the model says of a batch: log-probabilities, entropy, values and scores of packed rows, chunked over time."""

import functools
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64, Shaped
from torch import Tensor

from ple_jax.core.types import Batch, Outputs, Packed
from ple_jax.models import adapters
from torch_ascend import lora
from torch_ascend.model import Model

CHUNK = 512  # tokens whose logits exist at one time: 100 MB in fp32 at a vocabulary of 49152


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(logits / temperature)[target], chunked over tokens: [token, vocab] never exists, forward or backward.

    The gradient is with respect to `hidden` alone (the head is frozen) and is computed beside the value, so that the
    backward pass needs neither the logits nor a second pass over the vocabulary.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, model: Model, temperature: float) -> Tensor:
        value, gradient = [], []
        for h, y in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
            logits = _tempered(model.logits(h), temperature)
            logprob, normaliser = model.ops.token_logprob(logits, y)
            value.append(logprob)
            if ctx.needs_input_grad[0]:
                # subtracted in fp32, then rounded to the head's dtype: where p is nearly one, the rest is smaller than p's
                # rounding
                error = (logits - normaliser[:, None]).exp_().neg_()
                error.scatter_add_(1, y[:, None], torch.ones_like(error[:, :1]))
                if (cap := model.config.logits_softcap) is not None:  # d tanh
                    error = error * (1 - (logits * temperature / cap) ** 2)
                error = _tempered(error, temperature)
                gradient.append((error.to(model.head.dtype) @ model.head).to(hidden.dtype))
        ctx.gradient = torch.cat(gradient) if gradient else None
        return torch.cat(value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        return (g[:, None] * ctx.gradient).to(ctx.gradient.dtype), None, None, None


def _tempered(x: Tensor, temperature: float) -> Tensor:
    return x if temperature == 1 else x / temperature


def token_logprobs(
    model: Model, hidden: Float[Tensor, "*batch hidden"], targets: Int64[Tensor, "*batch"], temperature: float = 1.0
) -> Float32[Tensor, "*batch"]:
    """log softmax(logits / temperature)[target] in nats, of hidden states; see `_TokenLogprobs`."""
    flat = _TokenLogprobs.apply(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), model, temperature)
    return flat.view(targets.shape)


@torch.no_grad()
def token_entropy(
    model: Model, hidden: Float[Tensor, "*batch hidden"], targets: Int64[Tensor, "*batch"], temperature: float = 1.0
) -> tuple[Float32[Tensor, "*batch"], Float32[Tensor, "*batch"]]:
    """`token_logprobs`, and beside them the entropy in nats of softmax(logits / temperature); not differentiated."""
    value, spread = [], []
    for h, y in zip(hidden.reshape(-1, hidden.shape[-1]).split(CHUNK), targets.reshape(-1).split(CHUNK), strict=True):
        logits = _tempered(model.logits(h), temperature)
        logprob, normaliser = model.ops.token_logprob(logits, y)
        logp = logits.sub_(normaliser[:, None])
        value.append(logprob)
        spread.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(value).view(targets.shape), torch.cat(spread).view(targets.shape)


def pack(batch: Batch, time: int | None = None) -> Packed:
    """A batch's rows as the model takes them.

    Args:
        batch: prompts may be padded on either side, responses on the right.
        time: tokens of a row: at least the longest (`core.batches.packed_width`); P + K * R if it is not given.
    """
    rows, k, r = batch.response.shape
    prompt_mask: Tensor = batch.prompt_mask
    place = {"device": prompt_mask.device}
    p = prompt_mask.shape[1]
    time = min(time or p + k * r, p + k * r)
    said_mask: Tensor = batch.response_mask.reshape(rows, k * r)
    valid = torch.cat([prompt_mask, said_mask], 1)
    # what is valid, in its order, before what is not
    order = (~valid).to(torch.int32).argsort(dim=1, stable=True)[:, :time]
    length = prompt_mask.to(torch.int64).sum(1)
    prompt_position = (prompt_mask.to(torch.int64).cumsum(1) - 1).clamp(min=0)
    response_position = length[:, None] + torch.arange(r, **place).repeat(k)[None]
    positions = torch.cat([prompt_position, response_position], 1).gather(1, order)
    segment = torch.cat(
        [torch.full((p,), -1, **place), torch.arange(k, **place).repeat_interleave(r, output_size=k * r)]
    ).expand(rows, -1).gather(1, order)  # fmt: skip
    own = (segment[:, None] == -1) | (segment[:, None] == segment[:, :, None])
    causal = torch.ones((time, time), dtype=torch.bool, **place).tril()
    mask = causal & own & valid.gather(1, order)[:, None]
    tokens = torch.cat([batch.prompt, batch.response.reshape(rows, k * r)], 1).gather(1, order)
    said = (length[:, None] + torch.arange(min(k * r, time), **place)).clamp(max=time - 1)
    begins = (positions == length[:, None]).gather(1, said)
    places = (said_mask.to(torch.int64).cumsum(1) - 1).clamp(min=0, max=said.shape[1] - 1).reshape(rows, k, r)
    return Packed(tokens, positions, mask, length, begins, tokens.gather(1, said), places)


def _at(x: Shaped[Tensor, "row time hidden"], index: Int64[Tensor, "row n"]) -> Shaped[Tensor, "row n hidden"]:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def hidden_states(model: Model, adapter: adapters.Adapter, packed: Packed) -> Float[Tensor, "row time hidden"]:
    """Of every token of packed rows."""
    return model.apply(adapter, packed.tokens, positions=packed.positions, mask=packed.mask)


def predicting(hidden: Float[Tensor, "row time hidden"], packed: Packed) -> Float[Tensor, "row said hidden"]:
    """The hidden states that predict each response token: the last prompt token's is that of every first one."""
    place = packed.length[:, None] + torch.arange(packed.targets.shape[1], device=hidden.device)
    # no place twice but where nothing is said: the gradient's additions have one order
    own, last = _at(hidden, place.clamp(max=hidden.shape[1] - 1)), _at(hidden, packed.length[:, None] - 1)
    return torch.where(packed.begins[..., None], last, torch.cat([last, own[:, :-1]], 1))


def response_scores(
    adapter: adapters.Adapter, batch: Batch, states: Float[Tensor, "row time hidden"]
) -> Float32[Tensor, "row k"] | None:
    """What a reward model's head says at every response's last token, where the adapter has one."""
    if (head := lora.head(adapter, adapters.SCORE)) is None:
        return None
    response_mask: Tensor = batch.response_mask
    prompt_mask: Tensor = batch.prompt_mask
    said, length = response_mask.to(torch.int64).sum(-1), prompt_mask.to(torch.int64).sum(1, keepdim=True)
    last = length + (said.cumsum(1) - 1).clamp(min=0)
    return (_at(states, last).float() * head[:, 0]).sum(-1)


def response_values(
    adapter: adapters.Adapter, hidden: Float[Tensor, "row said hidden"]
) -> Float32[Tensor, "row said"] | None:
    """What a head of values says where each response token is predicted, where the adapter has one."""
    if (head := lora.head(adapter, adapters.VALUE)) is None:
        return None
    return (hidden.float() * head[:, 0]).sum(-1)


def _shaped(x: Float32[Tensor, "row said"], packed: Packed, batch: Batch) -> Float32[Tensor, "row k response_len"]:
    """As the batch has its responses; 0 where masked."""
    rows = len(x)
    found = x.gather(1, packed.places.reshape(rows, -1)).reshape(packed.places.shape)
    return torch.where(batch.response_mask, found, 0.0)


def outputs(
    model: Model,
    adapter: adapters.Adapter,
    batch: Batch,
    *,
    time: int | None = None,
    entropy: bool = False,
    temperature: float = 1.0,
) -> Outputs:
    """What the model says of a batch of tensors.

    Args:
        time: tokens of a packed row, as `pack` takes it.
        temperature: what the logits are divided by, above 0.
    """
    said = Lazy(model, adapter, batch, time, temperature)
    logprobs, spread = said.spread() if entropy else (said.logprobs, None)
    return Outputs(logprobs, spread, said.values, said.scores)


class Lazy:
    """`Outputs` for a loss: log-probabilities cost as much as several layers, and a reward model's loss reads none."""

    entropy = None

    def __init__(
        self, model: Model, adapter: adapters.Adapter, batch: Batch, time: int | None = None, temperature: float = 1.0
    ):
        self._model, self._batch, self._temperature = model, batch, temperature
        self._packed = pack(batch, time)
        states = hidden_states(model, adapter, self._packed)
        self._hidden = predicting(states, self._packed)
        self.scores = response_scores(adapter, batch, states)
        values = response_values(adapter, self._hidden)
        self.values = None if values is None else _shaped(values, self._packed, batch)

    @functools.cached_property
    def logprobs(self) -> Float32[Tensor, "query k response_len"]:
        found = token_logprobs(self._model, self._hidden, self._packed.targets, self._temperature)
        return _shaped(found, self._packed, self._batch)

    def spread(self) -> tuple[Float32[Tensor, "query k response_len"], Float32[Tensor, "query k response_len"]]:
        """Log-probabilities, and the entropy, which no loss is told."""
        found = token_entropy(self._model, self._hidden, self._packed.targets, self._temperature)
        logprobs, spread = (_shaped(x, self._packed, self._batch) for x in found)
        return logprobs, spread
