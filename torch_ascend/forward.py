"""Log-probabilities, entropy, values and scores of a batch of packed rows, computed in chunks of tokens."""

import functools
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int64, Shaped
from torch import Tensor

from ple_jax.core.types import Outputs, Packed
from ple_jax.models import adapters
from torch_ascend import lora
from torch_ascend.model import Model

CHUNK = 512  # tokens whose logits exist at one time: 100 MB in fp32 at a vocabulary of 49152


class _TokenLogprobs(torch.autograd.Function):
    """The autograd function log softmax(logits / temperature)[target] in nats, computed chunk by chunk.

    [token, vocab] never exists, forward or backward. The gradient is with respect to `hidden` alone (the head is frozen) and
    is computed beside the value, so that the backward pass needs neither the logits nor a second pass over the vocabulary.
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
    """Computes log softmax(logits / temperature)[target] in nats from hidden states; see `_TokenLogprobs`."""
    flat = _TokenLogprobs.apply(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), model, temperature)
    return flat.view(targets.shape)


@torch.no_grad()
def token_entropy(
    model: Model, hidden: Float[Tensor, "*batch hidden"], targets: Int64[Tensor, "*batch"], temperature: float = 1.0
) -> tuple[Float32[Tensor, "*batch"], Float32[Tensor, "*batch"]]:
    """Computes `token_logprobs`, and beside them the entropy of softmax(logits / temperature); nats, not differentiated."""
    value, spread = [], []
    for h, y in zip(hidden.reshape(-1, hidden.shape[-1]).split(CHUNK), targets.reshape(-1).split(CHUNK), strict=True):
        logits = _tempered(model.logits(h), temperature)
        logprob, normaliser = model.ops.token_logprob(logits, y)
        logp = logits.sub_(normaliser[:, None])
        value.append(logprob)
        spread.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(value).view(targets.shape), torch.cat(spread).view(targets.shape)


def visible(packed: Packed) -> Bool[Tensor, "row time time"]:
    """Returns which tokens each token sees: itself, and those before it in its query's prompt and in its own response."""

    def pair(x: Int64[Tensor, "row time"]) -> Bool[Tensor, "row time time"]:
        return x[:, :, None] == x[:, None]

    own = pair(packed.query) & (pair(packed.response) | (packed.response == 0)[:, None])
    time = packed.tokens.shape[1]
    return own & torch.ones((time, time), dtype=torch.bool, device=own.device).tril()


def _at(x: Shaped[Tensor, "device place *rest"], index: Int64[Tensor, "device n"]) -> Shaped[Tensor, "device n *rest"]:
    """Returns the entries of x at given places of the device. No place comes twice; what a place outside gives is arbitrary.

    The order of the gradient's additions does not matter, since entries that nobody reads add zeros.
    """
    index = index.clamp(max=x.shape[1] - 1)
    return x.gather(1, index if x.dim() == 2 else index[..., None].expand(-1, -1, x.shape[-1]))


def hidden_states(model: Model, adapter: adapters.Adapter, packed: Packed) -> Float[Tensor, "device place hidden"]:
    """Computes the final hidden state of every token of packed rows. The only device is this process's."""
    numbers = packed.number, int(packed.total)
    states = model.apply(adapter, packed.tokens, positions=packed.positions, mask=visible(packed), numbers=numbers)
    return states.reshape(1, -1, states.shape[-1])


def predicting(hidden: Float[Tensor, "device place hidden"], packed: Packed) -> Float[Tensor, "device token hidden"]:
    """Returns the hidden states that predict each response token; the last prompt token's predicts all first tokens."""
    last = _at(hidden, packed.last[None])[:, :, None]
    first = last.expand(-1, -1, packed.places.shape[1], -1).reshape(1, -1, hidden.shape[-1])
    return torch.cat([first, _at(hidden, packed.before)], 1)


def _read(head: Float32[Tensor, "hidden 1"], hidden: Float[Tensor, "*batch hidden"]) -> Float32[Tensor, "*batch"]:
    return (hidden.float() * head[:, 0]).sum(-1)


def _of_responses(
    x: Float32[Tensor, "device token"], places: Int64[Tensor, "query *place"]
) -> Float32[Tensor, "query *place"]:
    """Puts values of response tokens from device order into the order of the queries; a place outside gives 0."""
    return torch.where(places < x.shape[1], _at(x, places.reshape(1, -1)).reshape(places.shape), 0.0)


def outputs(
    model: Model,
    adapter: adapters.Adapter,
    packed: Packed,
    *,
    entropy: bool = False,
    temperature: float = 1.0,
) -> Outputs:
    """Computes the model's `Outputs` for a batch: log-probabilities, entropy if asked for, and the adapter's heads' values.

    Args:
        packed: the batch's rows, as `core.packing.pack` makes them, as tensors.
        temperature: what the logits are divided by, above 0.
    """
    said = Lazy(model, adapter, packed, temperature)
    logprobs, spread = said.spread() if entropy else (said.logprobs, None)
    return Outputs(logprobs, spread, said.values, said.scores)


class Lazy:
    """`Outputs` for a loss, with log-probabilities that are computed when they are first read.

    They cost as much as several layers, and a reward model's loss does not read them.
    """

    entropy = None

    def __init__(self, model: Model, adapter: adapters.Adapter, packed: Packed, temperature: float = 1.0):
        self._model, self._packed, self._temperature = model, packed, temperature
        states = hidden_states(model, adapter, packed)
        self._hidden = predicting(states, packed)
        score, value = (lora.head(adapter, name) for name in (adapters.SCORE, adapters.VALUE))
        self.scores = None if score is None else _of_responses(_read(score, states), packed.ends)
        self.values = None if value is None else _of_responses(_read(value, self._hidden), packed.places)

    @functools.cached_property
    def logprobs(self) -> Float32[Tensor, "query k response_len"]:
        found = token_logprobs(self._model, self._hidden, self._packed.targets, self._temperature)
        return _of_responses(found, self._packed.places)

    def spread(self) -> tuple[Float32[Tensor, "query k response_len"], Float32[Tensor, "query k response_len"]]:
        """Computes the log-probabilities and the entropy, both in nats. A loss gets no entropy."""
        found = token_entropy(self._model, self._hidden, self._packed.targets, self._temperature)
        logprobs, spread = (_of_responses(x, self._packed.places) for x in found)
        return logprobs, spread
