"""Tasks: records on disk -> queries, and which of them an iteration draws."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ple_jax.core.config import PACKAGE, UserError, names, suggestion
from ple_jax.core.types import Query


def load(source: str) -> list[Query]:
    """The queries of a built-in set (ple_jax/data) or of a JSONL file with `prompt`, optionally `id` and `completion`.

    Raises:
        UserError: no such file, a line that is not such a record, an empty prompt, an id twice; names file and line.
    """
    path = _path(source)
    queries: list[Query] = []
    seen: dict[str, int] = {}
    for number, record in _records(path):
        query = _query(path, number, record)
        if query.id in seen:
            raise UserError(f"{path}:{number}: id {query.id!r} is already on line {seen[query.id]}; ids must differ")
        seen[query.id] = number
        queries.append(query)
    if not queries:
        raise UserError(f"{path} holds no record; give a JSONL file with a `prompt` on each line")
    return queries


def load_sft(source: str) -> tuple[list[Query], list[Query]]:
    """(examples, those set aside because their completion is empty) of a JSONL file with `prompt` and `completion`."""
    path = _path(source)
    good: list[Query] = []
    empty: list[Query] = []
    for number, record in _records(path):
        if "completion" not in record:
            raise UserError(f"{path}:{number} has no `completion`, only {', '.join(record)}; SFT needs one")
        query = _query(path, number, record)
        (good if query.completion.strip() else empty).append(query)
    if not good:
        raise UserError(f"{path} holds no example with a completion")
    return good, empty


def check_disjoint(train: Sequence[Query], heldout: Sequence[Query]) -> None:
    """Raises a UserError if a held-out prompt is also trained on."""
    known = {query.prompt.strip(): query.id for query in train}
    for query in heldout:
        if query.prompt.strip() in known:
            raise UserError(
                f"held-out query {query.id!r} ({query.prompt[:60]!r}) is also train query {known[query.prompt.strip()]!r};"
                " remove it from one of config.task.train and config.task.heldout"
            )


def draw(queries: Sequence[Query], n: int, *, seed: int, iteration: int) -> list[Query]:
    """The queries of one iteration: without replacement, and every query once before any comes again.

    Passes over the data are permutations, each from (seed, number of the pass); iteration i takes places i * n to
    (i + 1) * n of their concatenation. Where that crosses into the next pass, queries drawn already in this iteration are
    moved behind the others of that pass.

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


def _path(source: str) -> Path:
    built_in = PACKAGE / "data" / f"{source}.jsonl"
    path = built_in if built_in.is_file() else Path(source)
    if not path.is_file():
        known = names("data", ".jsonl")
        raise UserError(f"{source!r} is neither a file nor one of {', '.join(known)}{suggestion(source, known)}")
    return path


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but nothing can encode it
        except ValueError as error:
            raise UserError(f"{path}:{number} is not JSON ({error}); each line is one record") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number} is a {type(record).__name__}, not an object with a `prompt`")
        yield number, record


def _query(path: Path, number: int, record: dict[str, Any]) -> Query:
    if "prompt" not in record:
        raise UserError(f"{path}:{number} has no `prompt`, only {', '.join(record) or 'nothing'}; rename the column")
    for key in ("prompt", "completion"):
        if not isinstance(record.get(key, ""), str):
            raise UserError(f"{path}:{number}: `{key}` is a {type(record[key]).__name__}, not a text")
    if not record["prompt"].strip():
        raise UserError(f"{path}:{number}: `prompt` is empty; remove the line")
    return Query(str(record.get("id", f"{path.stem}:{number}")), record["prompt"], record.get("completion", ""))
