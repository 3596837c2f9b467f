"""Attention of one token of every row to a KV cache, in blocks. Its twin is in `ple_jax/backend/attention.py`."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BLOCK = 128  # positions of a cache that are summed up together
_UNSEEN = -1e30  # a score, not -inf: rows that see nothing must not give NaN


def attend_cache(
    query: Float[Tensor, "row head 1 dim"],
    keys: Float[Tensor, "row kv reach dim"],
    values: Float[Tensor, "row kv reach dim"],
    visible: Bool[Tensor, "row 1 1 source"],
    *,
    scale: float,
    softcap: float | None = None,
    prefix: tuple[Float[Tensor, "1 kv before dim"], Float[Tensor, "1 kv before dim"]] | None = None,
) -> Float[Tensor, "row head 1 dim"]:
    """Computes softmax attention to whole blocks of a cache, and to a prefix that is held once for all rows.

    Scores are in float32. Blocks are computed alike, however many there are, and added up in their order: a block of which
    nothing is visible changes no bit.

    Args:
        visible: which positions a query sees: those of the prefix, then those of the blocks.
    """
    (rows, heads, _, dim), kv = query.shape, keys.shape[1]
    before, reach = 0 if prefix is None else prefix[0].shape[2], keys.shape[2]
    q = query.reshape(rows, kv, heads // kv, dim)
    found = None
    if prefix is not None:
        together = q.transpose(0, 1).reshape(kv, -1, dim)  # all rows' queries to one set of keys
        seen = visible[:, 0, :, :before].expand(rows, heads // kv, before).reshape(1, -1, before)
        part = _part_of(together, prefix[0][0], prefix[1][0], seen, scale, softcap)
        found = _Part(*(x.view(kv, rows, heads // kv, -1).transpose(0, 1).reshape(rows * kv, heads // kv, -1) for x in part))
    q, keys, values = q.reshape(rows * kv, -1, dim), keys.flatten(0, 1), values.flatten(0, 1)
    own = visible[:, 0, :, before:].repeat_interleave(kv, 0)
    for start in range(0, reach, BLOCK):
        block = slice(start, start + BLOCK)
        part = _part_of(q, keys[:, block], values[:, block], own[:, :, block], scale, softcap)
        found = part if found is None else _joined(found, part)
    assert found is not None
    return (found.out / found.total).to(query.dtype).view(rows, heads, 1, dim)


class _Part(NamedTuple):
    """The attention to some of the source positions, in float32, not yet divided by the sum of its weights."""

    largest: Float[Tensor, "batch query 1"]  # of the scores
    total: Float[Tensor, "batch query 1"]
    out: Float[Tensor, "batch query dim"]


def _part_of(
    q: Tensor, k: Tensor, v: Tensor, seen: Bool[Tensor, "batch query source"], scale: float, softcap: float | None
) -> _Part:
    scores = _product(q, k.transpose(1, 2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = torch.where(seen, scores, _UNSEEN)
    largest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - largest)
    return _Part(largest, weights.sum(-1, keepdim=True), _product(weights.to(q.dtype), v))


def _joined(a: _Part, b: _Part) -> _Part:
    """Merges two partial attentions. One that sees nothing adds zeros to the other."""
    largest = torch.maximum(a.largest, b.largest)
    x, y = torch.exp(a.largest - largest), torch.exp(b.largest - largest)
    return _Part(largest, a.total * x + b.total * y, a.out * x + b.out * y)


def _product(a: Float[Tensor, "batch n inner"], b: Float[Tensor, "batch inner m"]) -> Float[Tensor, "batch n m"]:
    """Multiplies batches of matrices; the result is float32, whatever their dtype."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    return torch.bmm(a, b, out_dtype=torch.float32)
