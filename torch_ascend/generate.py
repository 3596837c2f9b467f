"""Sampling in rows that are refilled: `begin` reads prompts into some rows, `Decoding` draws one token of each at a time.

Its twin is `ple_jax/backend/generate.py`. Tokens are drawn by inverting the CDF in the same order of additions as there, so
that both backends draw the same ones.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from ple_jax.core.batches import round_up
from ple_jax.core.refill import Group
from ple_jax.core.types import Sampling
from ple_jax.models.adapters import Adapter
from torch_ascend import device as devices
from torch_ascend.attention import BLOCK as REACH  # a cache is read as far as it is filled, in whole blocks
from torch_ascend.model import Cache, Model

_BLOCK = 128


def filter_probabilities(
    p: Float32[Tensor, "row vocab"], *, top_k: int, top_p: float, min_p: float
) -> Float32[Tensor, "row vocab"]:
    """Zeroes what top-k, then top-p (nucleus, arXiv:1904.09751), then min-p (arXiv:2407.01082) leave out.

    `p` need not sum to 1. Ties with the last token kept are kept. Nothing is sorted: non-negative floats are ordered as
    their bits are, so the cut is found exactly by 31 bisections over the bits.
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
    """Keeps the entries p >= t, for the largest t at which what is kept is still `enough`, and zeroes the others."""
    bits = p.view(torch.int32)
    low = torch.zeros_like(bits[:, 0])  # keeping everything is enough
    high = torch.full_like(low, 0x7F800000)  # the bits of infinity
    for _ in range(31):
        middle = low + torch.div(high - low, 2, rounding_mode="floor")
        ok = enough(bits >= middle[:, None])
        low, high = torch.where(ok, middle, low), torch.where(ok, high, middle)
    return torch.where(bits >= low[:, None], p, 0.0)


def invert_cdf(p: Float32[Tensor, "row vocab"], u: Float32[Tensor, " row"]) -> Int64[Tensor, " row"]:
    """Returns the token at quantile `u` in [0, 1) of the unnormalised distribution `p`, in vocabulary order.

    It looks first among the sums of blocks of 128, then inside one block, as in JAX: another order of additions would put
    the edges between tokens elsewhere.
    """
    rows, vocab = p.shape
    blocks = torch.nn.functional.pad(p, (0, -vocab % _BLOCK)).view(rows, -(-vocab // _BLOCK), _BLOCK)
    block, rest = _pick(blocks.sum(-1), u)
    token, _ = _pick(blocks.gather(1, block[:, None, None].expand(-1, 1, _BLOCK))[:, 0], rest)
    return block * _BLOCK + token


def _pick(p: Float32[Tensor, "row n"], u: Float32[Tensor, " row"]) -> tuple[Int64[Tensor, " row"], Float32[Tensor, " row"]]:
    """Returns the index of the entry at quantile u, and the quantile inside that entry."""
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
    """A token of every row, and its log-probability under softmax(logits / temperature), before any filter."""

    token: Int64[Tensor, " row"]
    logprob: Float32[Tensor, " row"]  # nats


def sample_token(logits: Float32[Tensor, "row vocab"], u: Float32[Tensor, " row"], *, sampling: Sampling) -> Drawn:
    """Draws one token per row: at quantile `u` of the filtered distribution, or the argmax at temperature 0.

    Log-probabilities are those of softmax(logits / temperature), and at temperature 0 those of temperature 1.
    """
    below = (logits - logits.amax(-1, keepdim=True)) / (sampling.temperature or 1.0)
    p = below.exp()
    if sampling.temperature == 0:
        token = logits.argmax(-1)
    else:
        token = invert_cdf(filter_probabilities(p, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p), u)
    return Drawn(token, below.gather(-1, token[:, None])[:, 0] - p.sum(-1).log())


class Rows:
    """The rows that are decoded together. Each holds its current response, or the last one that ended in it.

    The tensors are written in place.

    Args:
        count: number of rows on this process's device.
        room: positions of a row's own prompt and response.
        new: most tokens of a response.
        eos: the tokens that end a response.
    """

    def __init__(self, model: Model, count: int, room: int, new: int, eos: Sequence[int]):
        place, whole = {"device": model.device}, {"device": model.device, "dtype": torch.int64}
        size = round_up(room, REACH) if model.holds_prefix else room
        self.cache = Cache.empty(model.config, count, size, dtype=model.dtype, **place)
        self.eos = torch.tensor(eos, **whole)
        self.filled = torch.zeros(count, **whole)  # how many positions are written
        self.shared = torch.zeros(count, dtype=torch.bool, **place)  # whether the prefix stands before them
        self.token = torch.zeros(count, **whole)  # drawn last; not written yet
        self.length = torch.zeros(count, **whole)  # tokens drawn
        self.done = torch.ones(count, dtype=torch.bool, **place)
        self.uniforms = torch.zeros((count, new), **place)
        self.tokens = torch.zeros((count, new), **whole)  # 0 after the end, as log-probabilities are
        self.logprobs = torch.zeros((count, new), **place)


@torch.no_grad()  # not inference_mode: what FSDP2 gathers in it could not be used in training
def read_prefix(model: Model, adapter: Adapter, prefix: Int64[Tensor, " prefix_len"]) -> Cache:
    """Computes the keys and values of a prefix, held as one row, to which all rows that share the prefix attend."""
    return _read(model, adapter, None, prefix[None], torch.full((1,), len(prefix), device=prefix.device))[1]


@torch.no_grad()
def begin(
    model: Model,
    adapter: Adapter,
    prefix: Cache | None,
    rows: Rows,
    group: Group,
    *,
    sampling: Sampling,
) -> None:
    """Reads the prompts of a group, and draws the first token of every response to them.

    Args:
        prefix: the result of `read_prefix` if the prompts follow the prefix, else None.
        group: this process's own, its numbers as tensors, with only those responses that begin.
    """
    hidden, cache = _read(model, adapter, prefix, group.tokens, group.lengths)
    last = hidden.gather(1, (group.lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]
    token, logprob = sample_token(model.logits(last).index_select(0, group.prompt), group.uniforms[:, 0], sampling=sampling)
    # where the prefix cannot be held once for all, it is a part of every row
    before = 0 if prefix is None else prefix.length
    start = before if model.holds_prefix else 0
    for whole, part in zip((*rows.cache.keys, *rows.cache.values), (*cache.keys, *cache.values), strict=True):
        own = part[:, :, start:].index_select(0, group.prompt)
        whole[:, :, : own.shape[2]].index_copy_(0, group.row, own)
    first = torch.zeros_like(group.uniforms)
    first[:, 0] = 1
    lengths = group.lengths.index_select(0, group.prompt) + before - start
    written = {
        "filled": lengths,
        "shared": torch.full_like(lengths, start > 0, dtype=torch.bool),
        "token": token,
        "length": torch.ones_like(lengths),
        "done": _ends(token, rows.eos) | (first.shape[1] == 1),
        "uniforms": group.uniforms,
        "tokens": token[:, None] * first.to(torch.int64),
        "logprobs": logprob[:, None] * first,
    }
    for name, value in written.items():
        getattr(rows, name).index_copy_(0, group.row, value)


def _read(
    model: Model, adapter: Adapter, prefix: Cache | None, tokens: Tensor, lengths: Tensor
) -> tuple[Float[Tensor, "prompt length hidden"], Cache]:
    """Computes the hidden states of prompts, padded on the right, and their keys and values after those of the prefix."""
    (count, length), place = tokens.shape, {"device": tokens.device}
    before = 0 if prefix is None else prefix.length
    cache = Cache.empty(model.config, count, before + length, dtype=model.dtype, **place)
    if prefix is not None:
        for whole, part in zip((*cache.keys, *cache.values), (*prefix.keys, *prefix.values), strict=True):
            whole[:, :, :before] = part
    source = torch.arange(before + length, **place)[None].expand(count, -1)
    place_of, ends = source[:, before:], before + lengths[:, None]
    mask = (source[:, None] <= place_of[:, :, None]) & (source < ends)[:, None]
    position = torch.minimum(place_of, ends - 1)  # of padding too one that the model has
    hidden = model.apply(adapter, tokens, positions=position, mask=mask, source_positions=source, cache=cache, index=before)
    return hidden, cache


def _ends(token: Int64[Tensor, " row"], eos: Int64[Tensor, " n"]) -> Bool[Tensor, " row"]:
    return (token[:, None] == eos[None]).any(-1)


class Decoding:
    """The decoding steps of some rows. A step reads the cache as far as it is filled.

    If steps are recorded, there is one recording per reach.

    Args:
        prefix: the result of `read_prefix` if any row follows the prefix, else None.
        recorded: whether the device records a step and repeats it (a CUDA graph), so that it waits for no launch.
    """

    def __init__(
        self, model: Model, adapter: Adapter, prefix: Cache | None, rows: Rows, sampling: Sampling, *, recorded: bool
    ):
        self.rows, self.device, self.recorded = rows, model.device, recorded
        self.every = REACH if model.holds_prefix else rows.cache.length
        self.step = functools.partial(_step, model, adapter, prefix if model.holds_prefix else None, rows, sampling)
        self.repeats: dict[int, Callable[[], None]] = {}  # by reach
        self.ran: Counter[int] = Counter()  # of each, how often
        self.memory = devices.recording_memory() if recorded else None  # of all of them: none runs while another does

    def __call__(self, enough: Callable[[Bool[Tensor, " row"]], bool], *, steps: int, unasked: int) -> None:
        """Decodes at most `steps` tokens of every row.

        Args:
            enough: says, of which rows are done, whether decoding may stop; it waits for the device.
            unasked: tokens decoded between two calls of `enough`.
        """
        filled = int(torch.where(self.rows.done, 0, self.rows.filled).amax())
        for i in range(steps):
            if i % unasked == 0 and enough(self.rows.done):
                return
            self._repeat(min(round_up(filled + i + 1, self.every), self.rows.cache.length))

    def _repeat(self, reach: int) -> None:
        repeat = self.repeats.setdefault(reach, functools.partial(self.step, reach))
        if self.recorded and self.ran[reach] == 1:  # and not before it has run
            repeat = self.repeats[reach] = devices.record(repeat, self.memory)
        repeat()
        self.ran[reach] += 1


@torch.no_grad()
def _step(model: Model, adapter: Adapter, prefix: Cache | None, rows: Rows, sampling: Sampling, reach: int) -> None:
    """Writes the last token of every row to the cache and draws the next one; a row that is done stays as it is.

    It uses only tensors and works in place, so that a device can record and repeat it.

    Args:
        reach: how many positions of the cache are read.
    """
    place, (count, new) = {"device": rows.token.device}, rows.tokens.shape
    live, own = ~rows.done, torch.arange(reach, **place)[None]
    seen, source, start = own <= rows.filled[:, None], own, torch.zeros_like(rows.filled)
    if prefix is not None:
        before = torch.arange(prefix.length, **place)[None].expand(count, -1)
        start = rows.shared.to(torch.int64) * before.shape[1]
        seen = torch.cat([rows.shared[:, None].expand_as(before), seen], 1)
        source = torch.cat([before, start[:, None] + own], 1)
    hidden = model.apply(
        adapter, rows.token[:, None], positions=(start + rows.filled)[:, None], mask=seen[:, None],
        source_positions=source.expand(count, -1), cache=rows.cache, index=rows.filled, prefix=prefix,
    )  # fmt: skip
    u = rows.uniforms.gather(1, rows.length.clamp(max=new - 1)[:, None])[:, 0]
    token, logprob = sample_token(model.logits(hidden[:, 0]), u, sampling=sampling)
    here = (torch.arange(new, **place)[None] == rows.length[:, None]) & live[:, None]
    rows.tokens.copy_(torch.where(here, token[:, None], rows.tokens))
    rows.logprobs.copy_(torch.where(here, logprob[:, None], rows.logprobs))
    rows.token.copy_(torch.where(live, token, rows.token))
    rows.filled.add_(live.to(torch.int64))
    rows.length.add_(live.to(torch.int64))
    rows.done.logical_or_(_ends(token, rows.eos) | (rows.length >= new))


# ---------------------------------------------------------------- one token at a time, for a person who waits


@torch.no_grad()
def stream(
    model: Model, adapter: Adapter, prompt: Sequence[int], uniforms: Float32[Tensor, " max_new"], *, sampling: Sampling
) -> Iterator[int]:
    """Yields one response token by token as it is sampled, until EOS (yielded too) or `max_new` tokens.

    Args:
        adapter: the adapter, or {} for the base alone.
        uniforms: the noise of every token, in [0, 1).
    """
    length, new, place = len(prompt), len(uniforms), {"device": model.device}
    total = length + new
    cache = Cache.empty(model.config, 1, total, dtype=model.dtype, **place)
    places = torch.arange(total, **place)[None]
    tokens, start = torch.tensor([list(prompt)], **place), 0
    for i in range(new):
        at, seen = places[:, start : start + tokens.shape[1]], places[:, : round_up(start + tokens.shape[1], REACH)]
        mask = seen[:, None] <= at[:, :, None]
        hidden = model.apply(adapter, tokens, positions=at, mask=mask, source_positions=seen, cache=cache, index=start)
        token, _ = sample_token(model.logits(hidden[:, -1]), uniforms[i : i + 1], sampling=sampling)
        yield (chosen := int(token))
        if chosen in sampling.eos:
            return
        start, tokens = length + i, token[:, None]
