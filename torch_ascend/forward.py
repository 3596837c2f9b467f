"""What the model says of a batch: log-probabilities, entropy, values and scores of packed rows, chunked over time."""

import functools
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from ple_jax.core.types import Batch, Outputs
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
    model: Model, hidden: Float[Tensor, "*batch hidden"], temperature: float = 1.0
) -> Float32[Tensor, "*batch"]:
    """Entropy in nats of softmax(logits / temperature), chunked like `token_logprobs`; not differentiated."""
    parts = []
    for h in hidden.reshape(-1, hidden.shape[-1]).split(CHUNK):
        logp = _tempered(model.logits(h), temperature).log_softmax(-1)
        parts.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(parts).view(hidden.shape[:-1])


def pack(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions [row, time] and the block mask [row, time, time] of packed rows, time = P + K * R.

    Every response sees the prompt and itself, never another response; its positions start after the prompt's. A pair
    costs P + 2R tokens instead of 2(P + R).
    """
    rows, k, r = batch.response.shape
    prompt_mask: Tensor = batch.prompt_mask
    place = {"device": prompt_mask.device}
    tokens = torch.cat([batch.prompt, batch.response.reshape(rows, k * r)], 1)
    valid = torch.cat([prompt_mask, batch.response_mask.reshape(rows, k * r)], 1)
    prompt_len = prompt_mask.to(torch.int32).sum(1)
    prompt_position = (prompt_mask.to(torch.int32).cumsum(1) - 1).clamp(min=0)
    segment = torch.cat(
        [torch.full((batch.prompt.shape[1],), -1, **place), torch.arange(k, **place).repeat_interleave(r, output_size=k * r)]
    )
    response_position = prompt_len[:, None] + torch.arange(r, **place).repeat(k)[None]
    position = torch.cat([prompt_position, response_position], 1)
    time = tokens.shape[1]
    causal = torch.ones((time, time), dtype=torch.bool, **place).tril()
    own = (segment[None] == -1) | (segment[None] == segment[:, None])
    return tokens, position, (causal & own)[None] & valid[:, None]


def hidden_states(
    model: Model, adapter: adapters.Adapter, batch: Batch
) -> tuple[Float[Tensor, "row k response_len hidden"], Float32[Tensor, "row k"] | None, Float[Tensor, "row 1 hidden"]]:
    """Of every response token; a reward model's scores, where the adapter has a head; of the last prompt token."""
    rows, k, r = batch.response.shape
    tokens, position, mask = pack(batch)
    hidden = model.apply(adapter, tokens, positions=position, mask=mask)
    p = batch.prompt.shape[1]
    responses = hidden[:, p:].reshape(rows, k, r, -1)
    scores = None
    if (score := lora.head(adapter, adapters.SCORE)) is not None:
        response_mask: Tensor = batch.response_mask
        last = (response_mask.to(torch.int64).sum(-1) - 1).clamp(min=0)
        chosen = responses.gather(2, last[..., None, None].expand(-1, -1, 1, responses.shape[-1]))[:, :, 0]
        scores = (chosen.float() * score[:, 0]).sum(-1)
    return responses, scores, hidden[:, p - 1 : p]


def predicting(
    responses: Float[Tensor, "row k response_len hidden"], first: Float[Tensor, "row 1 hidden"]
) -> Float[Tensor, "row k response_len hidden"]:
    """The hidden states that predict each response token: the last prompt token's is that of every first one."""
    return torch.cat([first[:, None].expand(-1, responses.shape[1], -1, -1), responses[:, :, :-1]], 2)


def response_values(adapter: adapters.Adapter, batch: Batch, hidden: Tensor) -> Float32[Tensor, "row k response_len"] | None:
    """What a head of values says where each response token is predicted; 0 where masked."""
    if (head := lora.head(adapter, adapters.VALUE)) is None:
        return None
    return torch.where(batch.response_mask, (hidden.float() * head[:, 0]).sum(-1), 0.0)


def outputs(
    model: Model, adapter: adapters.Adapter, batch: Batch, *, entropy: bool = False, temperature: float = 1.0
) -> Outputs:
    """What the model says of a batch of tensors; logits are divided by `temperature`, above 0."""
    responses, scores, first = hidden_states(model, adapter, batch)
    hidden = predicting(responses, first)
    logprobs = torch.where(batch.response_mask, token_logprobs(model, hidden, batch.response, temperature), 0.0)
    spread = torch.where(batch.response_mask, token_entropy(model, hidden, temperature), 0.0) if entropy else None
    return Outputs(logprobs, spread, response_values(adapter, batch, hidden), scores)


class Lazy:
    """`Outputs` for a loss: log-probabilities cost as much as several layers, and a reward model's loss reads none."""

    entropy = None

    def __init__(self, model: Model, adapter: adapters.Adapter, batch: Batch, temperature: float = 1.0):
        self._model, self._batch, self._temperature = model, batch, temperature
        responses, self.scores, first = hidden_states(model, adapter, batch)
        self._hidden = predicting(responses, first)
        self.values = response_values(adapter, batch, self._hidden)

    @functools.cached_property
    def logprobs(self) -> Float32[Tensor, "query k response_len"]:
        logprobs = token_logprobs(self._model, self._hidden, self._batch.response, self._temperature)
        return torch.where(self._batch.response_mask, logprobs, 0.0)
