"""Converts records to queries, sorts out unusable ones with the reason, and draws the queries of an iteration."""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from ple_jax.core import identity
from ple_jax.core.compact import Compact, compact
from ple_jax.core.conversation import Answer, Conversation
from ple_jax.core.errors import UserError, suggestion
from ple_jax.core.types import Query
from ple_jax.data import formats, records
from ple_jax.data.left_out import CUT, Bad, QuerySet

T = TypeVar("T")
_ENOUGH = 1000  # records of a stream, none of them of use: the others are not waited for


# one piece: half of it says what every argument means
def load_queries(
    source: str,
    *,
    split: str = "train",
    subsets: Sequence[str] = (),
    format: str = "records",
    columns: Mapping[str, str] = {},  # noqa: B006
    words: tuple[int, int] = (2, 8),
    streaming: bool = False,
    limit: int = 0,
    seed: int = 0,
    needs: str = "prompt",
    reads: Sequence[str] = (),
    optional: Collection[str] = (),
) -> QuerySet:
    """Loads the queries of a source, and the records that cannot be one.

    Args:
        source, split, subsets, streaming: as in `records.read`.
        format: records, hh, imdb or tldr: the functions of `formats`.
        columns: our column names -> the data's.
        words: for imdb, fewest and most words of a review that are the query.
        limit: the number of queries to use (0: all), drawn by `seed`, in the order of the source; of a stream, the first.
        seed: of that draw, and of imdb's number of words.
        needs: what a record must have to be used: prompt, completion or pair (a chosen and a rejected answer).
        reads: what else a record must have, as in `Reward.reads`; it becomes the query's `record`.
        optional: what of that a record may lack; its value is None then.

    Raises:
        UserError: as `records.read`; there is no record at all; no record has a column that is needed.
    """
    if format == "imdb" and not 1 <= words[0] <= words[1]:
        raise UserError(f"config.task.words={words!r} must be (fewest, most), at least 1: --config.task.words='(2, 8)'")
    found: Iterable[records.Record] = records.read(source, split=split, subsets=subsets, streaming=streaming)
    labelled = False
    if format == "imdb" and not streaming:  # read twice, and not kept: the first record says it, mostly
        labelled = any("label" in _renamed(record.value, columns) for record in found)
        found = records.read(source, split=split, subsets=subsets)
    maker = _maker(format, needs, words=words, seed=seed, labelled=labelled)
    make = functools.partial(_query, make=maker, columns=columns, reads=reads, optional=optional)
    task = _sorted_out(found, make, streaming=streaming, limit=limit)
    _check_any(task, source)
    return task._replace(queries=some(task.queries, limit, seed))


def _sorted_out(
    found: Iterable[records.Record], make: Callable[[records.Record], Query], *, streaming: bool, limit: int
) -> QuerySet:
    """Returns the queries made of the records, and the records that cannot be one.

    A stream is read no further than needed.
    """
    queries: Compact[Query] = Compact()
    bad: list[Bad] = []
    places: dict[str, str] = {}
    for record in found:
        try:
            query = make(record)
            if query.id in places:
                file, _, line = places[query.id].rpartition(":")
                reason = f": id {query.id!r} is already on line {line} of {file}; ids must differ"
                raise formats.Unusable("duplicate id", reason)
        except formats.Unusable as error:
            reason = error.reason if record.kind else record.where + error.reason
            text = record.text or json.dumps(record.value, ensure_ascii=False, default=str)
            bad.append(Bad(record.where, error.kind, reason, text[:CUT]))
            if streaming and not queries and len(bad) == _ENOUGH:
                break
            continue
        places[query.id] = record.where
        queries.append(query)
        if streaming and len(queries) == limit:
            break
    return QuerySet(queries, bad)


def _check_any(task: QuerySet, source: str) -> None:
    """Raises a UserError if there is no record at all, or if a needed column has another name in all of them."""
    queries, bad = task
    if not queries and not bad:
        raise UserError(f"{source} holds no record; give a JSONL file with a `prompt` on each line")
    nameless = [b for b in bad if b.kind == "column"]
    if nameless and {b.kind for b in bad} <= {"column", "json", "utf-8", "csv"} and not queries:
        named = "config.task.columns" in nameless[0].reason
        hint = "" if named else ", or say its name: --config.task.columns=\"{'prompt': 'question'}\""
        raise UserError(f"{nameless[0].reason}{hint}")


def some(queries: Compact[Query], limit: int, seed: int) -> Compact[Query]:
    """Returns `limit` of the queries (0: all), drawn by `seed`, in their original order."""
    if not 0 < limit < len(queries):
        return queries
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, len(queries)])))
    # not a view: what is not drawn is kept by nobody
    return Compact(queries.take(sorted(rng.permutation(len(queries))[:limit].tolist())))


def _maker(format: str, needs: str, **options: Any) -> Callable[[Mapping[str, Any], str], Query]:
    """Returns the function (values, name) -> query for a format; the options are those of imdb."""
    if format == "imdb":
        return lambda values, name: formats.imdb(values, needs=needs, name=name, **options)
    plain = {"records": formats.records, "hh": formats.hh, "tldr": formats.tldr}[format]
    return lambda values, name: plain(values, needs=needs)


def _query(
    record: records.Record,
    *,
    make: Callable[[Mapping[str, Any], str], Query],
    columns: Mapping[str, str],
    reads: Sequence[str],
    optional: Collection[str],
) -> Query:
    if record.kind:
        raise formats.Unusable(record.kind, record.reason)
    values = _renamed(record.value, columns)
    try:
        query = make(values, record.name)
    except formats.Unusable as error:
        raise (error.kind == "column" and _misnamed(record.value, columns)) or error from None
    query = query._replace(id=record.name if values.get("id") is None else str(values["id"]))
    return query._replace(record={name: _told(query, values, name, optional=name in optional) for name in reads})


def _misnamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> formats.Unusable | None:
    """Returns the error for a column that config.task.columns names and a record does not have; None if it has them all."""
    if not (wrong := [(ours, name) for ours, name in columns.items() if name not in values]):
        return None
    ours, name = wrong[0]
    given = f" has no column {name!r}, which config.task.columns names as {ours!r}, only {', '.join(values)}"
    return formats.Unusable("column", given + suggestion(name, values))


def _told(query: Query, values: Mapping[str, Any], name: str, *, optional: bool) -> Any:
    """Returns what a reward reads from a record under a name: the text of an answer of the query, or a column, as in JSON.

    Raises:
        Unusable: the record lacks it, and it is not optional.
    """
    own, value = {"completion": str(query.completion), "rejected": str(query.rejected)}, values.get(name)
    if name in own:  # a column of turns, all of which call tools, has no text
        value = own[name] or (value if isinstance(value, str) else "") or None
    if value is None or value != value:  # NaN
        if optional:
            return None
        lacks = f"an empty `{name}`" if name in values else f"no `{name}`, only {', '.join(values)}"
        raise formats.Unusable(
            "reward",
            f" has {lacks}, and the reward reads it: an argument of a function without a default is a column of the data"
            " where config.reward.kwargs does not give it",
        )
    return json.loads(json.dumps(value, default=str))


def _renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """Renames columns to our names; columns that are not named keep their own."""
    if not columns:
        return values
    others = {name: value for name, value in values.items() if name not in {*columns, *columns.values()}}
    return others | {ours: values[name] for ours, name in columns.items() if name in values}


def disjoint(train: Sequence[Query], heldout: Sequence[Query]) -> tuple[Compact[Query], list[Bad]]:
    """Returns the train queries that are not held out too, and those that are, as left-out records.

    Raises:
        UserError: no train query is left.
    """
    known = {query.prompt.strip(): query.id for query in heldout}
    kept: list[int] = []
    both: list[Bad] = []
    for place, query in enumerate(train):
        if (other := known.get(query.prompt.strip())) is None:
            kept.append(place)
        else:
            reason = f"train query {query.id!r} ({query.prompt[:60]!r}) is also held-out query {other!r}"
            both.append(Bad(query.id, "held out too", reason, query.prompt[:CUT]))
    if train and not kept:
        raise UserError(f"{both[0].reason}, and so are all; give --config.task.train or --config.task.heldout other data")
    return compact(train).take(kept), both


def digest(queries: Iterable[Query]) -> str:
    """Returns a digest that identifies a set of queries, without what rewards read from their records."""
    found = hashlib.sha256()
    for query in queries:
        turns = [query.prompt.messages, query.prompt.tools] if isinstance(query.prompt, Conversation) else None
        texts = query[: Query._fields.index("record")]
        answers = [[i, text.message] for i, text in enumerate(texts) if isinstance(text, Answer)]
        found.update(json.dumps([*texts, turns, *answers], sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()[:16]


def record_digest(queries: Iterable[Query]) -> str | None:
    """Returns a digest of what rewards read from the records of some queries; None if they read nothing."""
    read = (json.dumps(query.record, sort_keys=True) for query in queries if query.record)
    if (first := next(read, None)) is None:
        return None
    parts = itertools.chain(("[", first), (f", {one}" for one in read), ("]",))  # the JSON of all of them as one list
    return identity.digest(part.encode() for part in parts)


def draw(queries: Sequence[T], n: int, *, seed: int, iteration: int) -> list[T]:
    """Draws the queries of one iteration without replacement; every query is drawn once before any is drawn again.

    Passes over the data are permutations, each drawn from (seed, number of the pass). Iteration i takes the places from
    i * n up to (i + 1) * n of their concatenation. If that reaches into the next pass, queries already drawn in this
    iteration are moved behind the others of that pass.

    Raises:
        UserError: n is larger than the number of queries.
    """
    size = len(queries)
    if n > size:
        raise UserError(f"config.queries_per_iteration is {n} but there are {size} train queries; use at most {size}")

    last = ((iteration + 1) * n - 1) // size
    before: list[int] = []
    order: list[int] = []
    for passing in range(last + 1):  # from the first: the order of a pass depends on how the one before it ended
        fresh = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, passing]))).permutation(size).tolist()
        drawn = passing * size % n  # how many places of the crossing iteration lie in the pass before
        taken = set(order[size - drawn :])
        before, order = order, [i for i in fresh if i not in taken] + [i for i in fresh if i in taken]
    begin = iteration * n - max(last - 1, 0) * size
    return [queries[i] for i in (before + order)[begin : begin + n]]
