"""Packed rows: which queries of a batch are computed together, in which rows of tokens, and the arrays that say so.

In a padded batch every query costs as much as the longest. Here a query is [prompt | response 1 | ... | response K]
without padding inside, and short queries share a row as wide as the longest, or a little wider. Both backends compute
these rows.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Shaped

from ple_jax.core.batches import bucket, lengths, round_up, rows_of
from ple_jax.core.types import Batch, Packed


class Cost(NamedTuple):
    """The cost of computing rows on a device, in tokens that go through the layers' matmuls."""

    a_pass: int  # another pass
    reach: float  # tokens of a row with which its attention costs as much as all else

    def of(self, rows: int, time: int) -> float:
        """Returns the cost of a pass over `rows` rows of `time` tokens."""
        return self.a_pass + rows * time * (1 + time / self.reach)


def cost(platform: str, reach: float) -> Cost:
    """Returns the costs on a platform.

    On a CPU small passes lose hardly anything; on an accelerator every pass costs its launches.

    Args:
        platform: "cpu", or the type of an accelerator.
        reach: tokens of a row with which its attention costs as much as all else, by operations alone. A CPU takes 1.6
            times as long for attention (two cores with AVX2, float32, rows of 384 to 1,024 tokens of SmolLM2).
    """
    return Cost(512, 0.6 * reach) if platform == "cpu" else Cost(8192, reach)


class Pass(NamedTuple):
    """Queries that are computed together, and their places in the rows.

    Every device has an equal part of the queries and of the rows. Where there is no query, its number is -1.
    """

    queries: Int32[np.ndarray, " query"]  # their numbers in the batch
    row: Int32[np.ndarray, " query"]
    offset: Int32[np.ndarray, " query"]  # tokens before it in its row
    number: Int32[np.ndarray, " query"]  # tokens of the batch before it, in the order of the batch
    rows: int
    time: int  # tokens of a row
    total: int  # tokens of the batch


def width(longest: int) -> int:
    """Returns the width of a row, in tokens, for queries of up to `longest` tokens: 8, 12, 16, 24, 32, 48, 64 ...

    There are two sizes per doubling: from 64 to 4,096 tokens there are 13.
    """
    power = bucket(longest, 8)
    less = power // 4 * 3
    return less if 8 <= longest <= less else power


def row_counts(most: int) -> list[int]:
    """Returns the numbers of rows that programs are compiled for, ascending: 1, 2, 3, 4, 6, 8, 12, 16 ... and `most`."""
    powers = [1 << i for i in range(most.bit_length())]
    return sorted({most, *(count for power in powers for count in (power, power * 3 // 2) if count < most)})


def passes(batch: Batch, cost: Cost, *, most: int, shards: int = 1) -> list[Pass]:
    """Splits the queries of a batch into passes so that passes, rows and tokens cost least.

    Sorted by length, queries are halved again and again where two passes cost less than one. Those of a pass are laid into
    rows as wide as the longest query, or one size wider: the longest first, each into the first row that has room. So for a
    batch of 8 at most 6 numbers of rows are compiled for every width.

    Args:
        most: the number of queries of a pass. One with fewer is filled up, at the cost of the head for their first tokens.
        shards: devices, or processes, over which queries and rows are spread.
    """
    size, each = lengths(batch), -(-most // shards)
    widest = batch.prompt.shape[1] + math.prod(batch.response.shape[1:])

    def halved(queries: np.ndarray) -> tuple[float, list[Pass]]:
        found = _cheapest(queries, size, cost, each, shards, widest)
        price = cost.of(found.rows, found.time)
        # two passes cost no less than their tokens, whatever the rows are
        if len(queries) == 1 or price <= 2 * cost.a_pass + size[queries].sum():
            return price, [found]
        short, long = (halved(half) for half in np.split(queries, [len(queries) // 2]))
        return (short[0] + long[0], short[1] + long[1]) if short[0] + long[0] < price else (price, [found])

    return halved(np.argsort(size, kind="stable"))[1]


def _cheapest(queries: np.ndarray, size: np.ndarray, cost: Cost, each: int, shards: int, widest: int) -> Pass:
    """Lays queries into rows of the narrowest width and of the next one, and returns the cheaper pass."""
    least = width(int(size[queries].max()))
    widths = sorted({min(time, widest) for time in (least, width(least + 1))})
    return min((_laid(queries, size, each, shards, time) for time in widths), key=lambda one: cost.of(one.rows, one.time))


def _laid(queries: np.ndarray, size: np.ndarray, each: int, shards: int, time: int) -> Pass:
    """Lays queries, given shortest first, into rows of `time` tokens."""
    taken, row, offset = (np.full((shards, each), fill, np.int32) for fill in (-1, 0, 0))
    free = np.full((shards, each), time)
    for i, query in enumerate(queries[::-1]):
        turn, shard = divmod(i, shards)
        shard = shards - 1 - shard if turn % 2 else shard  # there and back: no device gets all the longer ones
        place = int(np.argmax(free[shard] >= size[query]))
        taken[shard, turn], row[shard, turn], offset[shard, turn] = query, place, time - free[shard, place]
        free[shard, place] -= size[query]
    used = int((free < time).sum(1).max())
    rows = next(count for count in row_counts(each) if count >= used)
    row += rows * np.arange(shards, dtype=np.int32)[:, None]
    where = taken.reshape(-1), row.reshape(-1), offset.reshape(-1)
    return Pass(*where, _numbers(size)[where[0]], rows * shards, time, int(size.sum()))


def _numbers(size: np.ndarray) -> np.ndarray:
    return (np.cumsum(size) - size).astype(np.int32)


def part(batch: Batch, one: Pass) -> Batch:
    """Returns the queries of a pass as a Batch of their own.

    A place without a query gets a copy of a query's data, marked as not valid, since zeros would be no valid data.
    """
    there = one.queries >= 0
    found = rows_of(batch, np.where(there, one.queries, one.queries.max()))
    return found._replace(data=found.data | {"valid": np.where(there, found.data["valid"], 0).astype(np.float32)})


def alone(batch: Batch, shards: int = 1) -> Pass:
    """Returns the pass that needs most: every query in a row of its own, as wide as the batch's arrays."""
    queries, time = len(batch.prompt), batch.prompt.shape[1] + math.prod(batch.response.shape[1:])
    rows = np.arange(round_up(queries, shards), dtype=np.int32)
    taken, size = np.where(rows < queries, rows, -1), lengths(batch)
    return Pass(taken, rows, np.zeros_like(rows), _numbers(size)[taken], len(rows), time, int(size.sum()))


def laid_out(batch: Batch, one: Pass, *, shards: int) -> tuple[Batch, Packed]:
    """Returns a pass's part of a batch, and the packed rows of that part."""
    own = part(batch, one)
    return own, pack(own, one, shards=shards)


def pack(batch: Batch, one: Pass | None = None, *, shards: int = 1) -> Packed:
    """Packs the rows of a pass, as both backends compute them.

    Args:
        batch: the pass's part of the batch. Prompts may be padded on either side, responses on the right.
        one: the pass; if it is not given, every query has a row of its own.
        shards: over how many devices the rows are spread.
    """
    one = one or alone(batch, shards)
    found = _tokens(batch, one)

    def rows(values: np.ndarray, fill: int) -> np.ndarray:
        made = np.full(one.rows * one.time, fill, np.int32)
        made[found.flat] = values
        return made.reshape(one.rows, one.time)

    return Packed(
        tokens=rows(found.token, 0),
        positions=rows(found.position, 0),
        query=rows(found.query, -1),
        response=rows(found.response, 0),
        number=rows(found.number, 0),
        total=np.int32(one.total),
        **_ends(batch, one, shards),
        **_predictions(batch, one, shards, found),
    )


class _Tokens(NamedTuple):
    """All tokens of a batch without the padding, query after query, as arrays of one dimension."""

    token: np.ndarray
    query: np.ndarray
    response: np.ndarray  # 0 in the prompt, 1 to K
    within: np.ndarray  # its place in its response, where it is of one
    position: np.ndarray  # as the model counts: every response follows the prompt
    flat: np.ndarray  # its place in the rows, taken together
    number: np.ndarray  # among all tokens of the batch


def _tokens(batch: Batch, one: Pass) -> _Tokens:
    (queries, _, longest), prompt_len = batch.response.shape, batch.prompt.shape[1]
    there = np.concatenate([batch.prompt_mask, batch.response_mask.reshape(queries, -1)], 1) & (one.queries >= 0)[:, None]
    query, column = np.nonzero(there)
    rank, length = np.cumsum(there, 1)[query, column] - 1, batch.prompt_mask.sum(1)[query]
    response, within = np.divmod(column - prompt_len, longest)
    response = np.maximum(response, -1) + 1
    return _Tokens(
        np.concatenate([batch.prompt, batch.response.reshape(queries, -1)], 1)[query, column],
        query,
        response,
        within,
        np.where(response > 0, length + within, rank),
        one.row[query] * one.time + one.offset[query] + rank,
        one.number[query] + rank,
    )


def _ends(batch: Batch, one: Pass, shards: int) -> dict[str, np.ndarray]:
    """Returns the places, among all tokens of a device, of every prompt's last token and of every response's last token."""
    queries, k, _ = batch.response.shape
    area = one.rows * one.time // shards
    length, said = batch.prompt_mask.sum(1), batch.response_mask.sum(-1)
    last = (one.row * one.time + one.offset) % area + length - 1
    ends = last[:, None] + np.cumsum(said, 1)
    there, outside = one.queries >= 0, area + np.arange(queries * k).reshape(queries, k)
    last = np.where(there & (length > 0), last, outside[:, 0])
    ends = np.where(there[:, None] & (said > 0), ends, outside)
    return {"last": last.astype(np.int32), "ends": ends.astype(np.int32)}


def _predictions(batch: Batch, one: Pass, shards: int, found: _Tokens) -> dict[str, np.ndarray]:
    """Returns the arrays of what a device predicts: the first tokens of all responses, then the later ones, without gaps."""
    queries, k, longest = batch.response.shape
    area, each = one.rows * one.time // shards, queries // shards
    first, shard = each * k, found.query // each
    before = np.tile(area + np.arange(min(first * (longest - 1), area)), (shards, 1))
    targets = np.zeros((shards, first + before.shape[1]), np.int32)
    later = (found.response > 0) & (found.within > 0)
    own = shard[later]
    of_shard = np.bincount(own, minlength=shards)
    among = np.arange(len(own)) - (np.cumsum(of_shard) - of_shard)[own]
    before[own, among] = found.flat[later] % area - 1
    place = found.query % each * k + found.response - 1  # of a first token
    place[later] = first + among
    said = found.response > 0
    targets[shard[said], place[said]] = found.token[said]
    # where nothing is said, places that are outside, each another
    places = np.arange(batch.response.size).reshape(batch.response.shape) + targets.shape[1]
    places[found.query[said], found.response[said] - 1, found.within[said]] = place[said]
    used = np.int32(first + of_shard.max())
    return {"before": before.astype(np.int32), "targets": targets, "places": places.astype(np.int32), "used": used}


def reunited(parts: Sequence[Shaped[np.ndarray, "query *rest"]], made: Sequence[Pass]) -> Shaped[np.ndarray, "query *rest"]:
    """Joins what was computed in passes, and returns it in the order of the batch."""
    queries = np.concatenate([one.queries for one in made])
    there = queries >= 0
    return np.concatenate(parts)[there][np.argsort(queries[there])]
