"""Sampling: prefill, then decode with a KV cache of one size, the noise given as data.

Its twin is `ple_jax/backend/generate.py`. Tokens are drawn by inverting the CDF in the same order of additions as there, so
that both backends draw the same ones.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from ple_jax.core.batches import round_up
from ple_jax.core.types import Sampling
from ple_jax.models.adapters import Adapter
from torch_ascend import device as devices
from torch_ascend.model import Cache, Model

_BLOCK = 128
_REACH = 128  # positions of a cache: as far as it is filled, and to a multiple of this, it is read


def filter_probabilities(
    p: Float32[Tensor, "row vocab"], *, top_k: int, top_p: float, min_p: float
) -> Float32[Tensor, "row vocab"]:
    """Zeroes what top-k, then top-p (nucleus, arXiv:1904.09751), then min-p (arXiv:2407.01082) leave out.

    `p` need not sum to 1. Ties with the last token kept are kept. No sort: non-negative floats are ordered as their bits
    are, so the cut is found exactly by 31 bisections over the bits.
    """
    if top_k:
        p = _cut(p, lambda kept: kept.to(torch.int32).sum(-1) >= min(top_k, p.shape[-1]))
    if top_p < 1:
        total = p.sum(-1)
        p = _cut(p, lambda kept: torch.where(kept, p, 0.0).sum(-1) >= top_p * total)
    if min_p:
        p = torch.where(p >= min_p * p.amax(-1, keepdim=True), p, 0.0)
    return p


def _cut(p: Float32[Tensor, "row vocab"], enough: Callable[[Tensor], Tensor]) -> Float32[Tensor, "row vocab"]:
    """Keeps p >= t for the largest t at which what is kept is still `enough`."""
    bits = p.view(torch.int32)
    low = torch.zeros_like(bits[:, 0])  # keeping everything is enough
    high = torch.full_like(low, 0x7F800000)  # the bits of infinity
    for _ in range(31):
        middle = low + torch.div(high - low, 2, rounding_mode="floor")
        ok = enough(bits >= middle[:, None])
        low, high = torch.where(ok, middle, low), torch.where(ok, high, middle)
    return torch.where(bits >= low[:, None], p, 0.0)


def invert_cdf(p: Float32[Tensor, "row vocab"], u: Float32[Tensor, " row"]) -> Int64[Tensor, " row"]:
    """The token at quantile `u` in [0, 1) of the unnormalised distribution `p`, in vocabulary order.

    Two levels, the sums of blocks of 128 and then inside one block, as in JAX: another order of additions would put the
    edges between tokens elsewhere.
    """
    rows, vocab = p.shape
    blocks = torch.nn.functional.pad(p, (0, -vocab % _BLOCK)).view(rows, -1, _BLOCK)
    block, rest = _pick(blocks.sum(-1), u)
    token, _ = _pick(blocks.gather(1, block[:, None, None].expand(-1, 1, _BLOCK))[:, 0], rest)
    return block * _BLOCK + token


def _pick(p: Float32[Tensor, "row n"], u: Float32[Tensor, " row"]) -> tuple[Int64[Tensor, " row"], Float32[Tensor, " row"]]:
    """The entry at quantile u, and the quantile inside that entry."""
    upper = p.cumsum(-1)
    target = u * upper[:, -1]
    # rounding may put the target at or above the last sum: the last entry with any mass is meant
    last = p.shape[-1] - 1 - (p > 0).flip(-1).to(torch.int32).argmax(-1)
    index = torch.minimum((upper <= target[:, None]).to(torch.int64).sum(-1), last)
    mass = p.gather(-1, index[:, None])[:, 0]
    below = upper.gather(-1, index[:, None])[:, 0] - mass
    inside = ((target - below) / mass.clamp(min=1e-38)).clamp(0.0, 1 - 2**-24)
    return index, inside


class Drawn(NamedTuple):
    """A token of every row, and its log-probability: of softmax(logits / temperature), whatever filters left out of it."""

    token: Int64[Tensor, " row"]
    logprob: Float32[Tensor, " row"]  # nats


def sample_token(logits: Float32[Tensor, "row vocab"], u: Float32[Tensor, " row"], *, sampling: Sampling) -> Drawn:
    """One token per row: argmax at temperature 0, of which log-probabilities are at 1, else the filtered distribution at
    quantile `u`.
    """
    below = (logits - logits.amax(-1, keepdim=True)) / (sampling.temperature or 1.0)
    p = below.exp()
    if sampling.temperature == 0:
        token = logits.argmax(-1)
    else:
        token = invert_cdf(filter_probabilities(p, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p), u)
    return Drawn(token, below.gather(-1, token[:, None])[:, 0] - p.sum(-1).log())


@torch.no_grad()  # not inference_mode: what FSDP2 gathers in it could not be used in training
def generate(
    model: Model,
    adapter: Adapter,
    prompt: Int64[Tensor, "row prompt_len"],
    prompt_mask: Bool[Tensor, "row prompt_len"],
    prefix: Int64[Tensor, " prefix_len"],
    uniforms: Float32[Tensor, "row max_new"],
    *,
    sampling: Sampling,
    all_done: Callable[[Bool[Tensor, " row"]], bool],
    steps_per_sync: int = 1,
    recorded: bool = False,
) -> tuple[Int64[Tensor, "row max_new"], Float32[Tensor, "row max_new"], Int64[Tensor, " row"]]:
    """Responses, their tokens' log-probabilities (`Drawn`) and their lengths (EOS counted, where it was sampled).

    Args:
        prompt: left-padded; every row has at least one token.
        prefix: tokens that stand before every prompt (the principles); computed once and shared by all rows.
        all_done: whether decoding may stop; it waits for the device.
        steps_per_sync: tokens decoded between two calls of `all_done`.
        recorded: whether the device records a step and repeats it (a CUDA graph), so that it waits for no launch.
    """
    new = uniforms.shape[1]
    hidden, cache, sources = _prefill(model, adapter, prompt, prompt_mask, prefix, new)
    rows = _Rows(uniforms, sampling)
    token = rows.take(model.logits(hidden[:, -1]))
    every = _REACH if model.able.strided else sources.there.shape[1]
    step = _Step(functools.partial(_decode, model, adapter, token, cache, sources, rows), every, model.device, recorded)
    for i in range(1, new):
        if i % steps_per_sync == 0 and all_done(rows.done):
            break
        step(sources.begin + i)
    return rows.out, rows.logprobs, rows.lengths


class _Step:
    """`_decode`, of a cache as far as it is filled; where steps are recorded, once for every reach."""

    def __init__(self, decode: Callable[[int], None], every: int, device: torch.device, recorded: bool):
        self.decode, self.every, self.device, self.recorded = decode, every, device, recorded
        self.reach = self.ran = 0
        self.repeat: Callable[[], None] = functools.partial(decode, 0)

    def __call__(self, filled: int) -> None:
        if self.reach < filled:
            self.reach, self.ran = round_up(filled, self.every), 0
            self.repeat = functools.partial(self.decode, self.reach)
        elif self.ran == 1 and self.recorded:
            self.repeat = devices.record(self.repeat, self.device)
        self.repeat()
        self.ran += 1


class Sources(NamedTuple):
    """What a row attends to while it is decoded: [prefix | padded prompt | generated]."""

    there: Bool[Tensor, "row source"]  # of all until now; written in place
    places: Int64[Tensor, "row source"]  # position of each
    begin: int  # index of the first generated token


class _Rows:
    """What was sampled until now, in tensors that are written in place."""

    def __init__(self, uniforms: Float32[Tensor, "row max_new"], sampling: Sampling):
        rows, place = len(uniforms), {"device": uniforms.device}
        self.uniforms, self.sampling = uniforms, sampling
        self.eos = torch.tensor(sampling.eos, **place)
        self.out = torch.zeros(uniforms.shape, dtype=torch.int64, **place)
        self.logprobs = torch.zeros_like(uniforms)
        self.lengths = torch.zeros(rows, dtype=torch.int64, **place)
        self.done = torch.zeros(rows, dtype=torch.bool, **place)
        self.step = torch.zeros(1, dtype=torch.int64, **place)

    def take(self, logits: Float32[Tensor, "row vocab"]) -> Int64[Tensor, " row"]:
        """Draws the tokens of this step and writes them down."""
        token, logprob = sample_token(logits, self.uniforms.index_select(1, self.step)[:, 0], sampling=self.sampling)
        self.out.index_copy_(1, self.step, torch.where(self.done, 0, token)[:, None])
        self.logprobs.index_copy_(1, self.step, torch.where(self.done, 0, logprob)[:, None])
        self.lengths.add_((~self.done).to(torch.int64))
        self.done.logical_or_((token[:, None] == self.eos[None]).any(-1))
        return token


def _prefill(
    model: Model, adapter: Adapter, prompt: Tensor, prompt_mask: Tensor, prefix: Tensor, new: int
) -> tuple[Float[Tensor, "row prompt_len hidden"], Cache, Sources]:
    """Hidden states of the prompts, and a cache with room for `new` tokens after them."""
    (rows, length), shared = prompt.shape, prefix.shape[0]
    reached, total, place = shared + length, shared + length + new, {"device": prompt.device}
    cache = Cache.empty(model.config, rows, total, dtype=model.dtype, **place)
    if shared:
        _prefill_prefix(model, adapter, prefix, cache)
    ones = torch.ones((rows, shared), dtype=torch.bool, **place)
    source = torch.cat([ones, prompt_mask, torch.zeros((rows, new), dtype=torch.bool, **place)], 1)
    causal = torch.arange(reached, **place)[None] <= shared + torch.arange(length, **place)[:, None]
    position = (shared + prompt_mask.to(torch.int32).cumsum(1) - 1).clamp(min=0)
    coming = position[:, -1:] + 1 + torch.arange(new, **place)[None]
    places = torch.cat([torch.arange(shared, **place)[None].expand(rows, -1), position, coming], 1)
    hidden = model.apply(
        adapter, prompt, positions=position, mask=source[:, None, :reached] & causal[None],
        source_positions=places[:, :reached], cache=cache, index=shared,
    )  # fmt: skip
    return hidden, cache, Sources(source, places, reached)


def _decode(
    model: Model, adapter: Adapter, token: Tensor, cache: Cache, sources: Sources, rows: _Rows, reach: int
) -> None:
    """One step, of tensors alone and in place: what a device records it can repeat.

    Args:
        reach: how much of the cache is read.
    """
    index = rows.step + sources.begin
    sources.there.index_fill_(1, index, True)
    hidden = model.apply(
        adapter, token[:, None], positions=sources.places.index_select(1, index), mask=sources.there[:, None, :reach],
        source_positions=sources.places[:, :reach], cache=cache, index=index,
    )  # fmt: skip
    rows.step.add_(1)
    token.copy_(rows.take(model.logits(hidden[:, -1])))


def _prefill_prefix(model: Model, adapter: Adapter, prefix: Int64[Tensor, " prefix_len"], cache: Cache) -> None:
    shared, place = prefix.shape[0], {"device": prefix.device}
    small = Cache.empty(model.config, 1, shared, dtype=model.dtype, **place)
    causal = torch.ones((shared, shared), dtype=torch.bool, **place).tril()[None]
    model.apply(adapter, prefix[None], positions=torch.arange(shared, **place)[None], mask=causal, cache=small)
    for whole, part in zip((*cache.keys, *cache.values), (*small.keys, *small.values), strict=True):
        whole[:, :, :shared] = part


# ---------------------------------------------------------------- one token at a time, for a person who waits


@torch.no_grad()
def stream(
    model: Model, adapter: Adapter, prompt: Sequence[int], uniforms: Float32[Tensor, " max_new"], *, sampling: Sampling
) -> Iterator[int]:
    """One response, token by token as it is sampled, until EOS (yielded too) or `max_new` tokens.

    Args:
        adapter: {} for the base alone.
        uniforms: the noise of every token.
    """
    length, new, place = len(prompt), len(uniforms), {"device": model.device}
    total = length + new
    cache = Cache.empty(model.config, 1, total, dtype=model.dtype, **place)
    places = torch.arange(total, **place)[None]
    tokens, start = torch.tensor([list(prompt)], **place), 0
    for i in range(new):
        at, seen = places[:, start : start + tokens.shape[1]], places[:, : round_up(start + tokens.shape[1], _REACH)]
        mask = seen[:, None] <= at[:, :, None]
        hidden = model.apply(adapter, tokens, positions=at, mask=mask, source_positions=seen, cache=cache, index=start)
        token, _ = sample_token(model.logits(hidden[:, -1]), uniforms[i : i + 1], sampling=sampling)
        yield (chosen := int(token))
        if chosen in sampling.eos:
            return
        start, tokens = length + i, token[:, None]
