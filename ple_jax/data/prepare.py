"""Prepares raw data as train.jsonl and test.jsonl: usable records without duplicates, and no prompt that is in both."""

import functools
import hashlib
import json
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ple_jax.core.conversation import Answer, Conversation, turn_of
from ple_jax.core.errors import UserError
from ple_jax.core.files import write_json, write_jsonl
from ple_jax.core.types import Query
from ple_jax.data.left_out import Bad, QuerySet, write_bad
from ple_jax.data.queries import load_queries

_BAR = 40  # characters of the longest
_OWN = ("id", "prompt", "messages", "chosen", "tools")  # columns that records are read from


def prepare(
    train: str,
    out: Path,
    *,
    test: str = "",
    test_split: str = "test",
    test_share: float = 0.05,
    max_words: int = 0,
    seed: int = 0,
    needs: str = "prompt",
    **options: Any,
) -> dict[str, Any]:
    """Writes train.jsonl, test.jsonl, bad.jsonl and summary.json to `out`; returns the summary.

    Args:
        train, options, seed, needs: as in `load_queries`.
        test: the source of the test records; if it is empty, a share of the train records, chosen by a hash of their prompt.
        test_split: the split of `test`, if that is a folder or a data set on a hub.
        test_share: how large that share is, between 0 and 1.
        max_words: records with a longer prompt are bad (0: no limit).

    Raises:
        UserError: as `load_queries`; or nothing is left for one of the two files.
    """
    _check_kept(options.get("reads", ()))
    load = functools.partial(load_queries, seed=seed, needs=needs)
    clean = functools.partial(_clean, max_words=max_words, needs=needs)
    sets = {"train": clean(load(train, **options))}
    if test:
        sets["test"] = clean(load(test, **options | {"split": test_split}))
        sets["train"] = _apart(sets["train"], sets["test"])
    else:
        left, drawn = divide(sets["train"].queries, share=test_share, seed=seed)
        sets = {"train": sets["train"]._replace(queries=left), "test": _Set(drawn, [], {})}
    return _written(sets, out, needs)


def _written(sets: "Mapping[str, _Set]", out: Path, needs: str) -> dict[str, Any]:
    """Writes all files, and returns the contents of summary.json."""
    counts = {name: one.counts | _described(one, name) for name, one in sets.items()}
    out.mkdir(parents=True, exist_ok=True)
    for name, one in sets.items():
        write(out / f"{name}.jsonl", one.queries, needs=needs)
    write_bad(out / "bad.jsonl", {name: one.bad for name, one in sets.items()})
    write_json(out / "summary.json", counts)
    return counts


def _check_kept(names: Sequence[str]) -> None:
    if taken := [name for name in names if name in _OWN]:
        raise UserError(f"--keep {taken[0]}: the column is written anyway, or would be read as something else; leave it out")


class _Set(NamedTuple):
    """The train or the test records while they are prepared."""

    queries: list[Query]
    bad: list[Bad]
    counts: dict[str, Any]  # for the summary


def _clean(found: QuerySet, *, max_words: int, needs: str) -> _Set:
    """Removes records that are too long, and duplicates."""
    short, long = _short(found.queries, max_words)
    bad = found.bad + long
    kept, exact, normal = unique(short, needs=needs)
    counts = {
        "read": len(found.queries) + len(found.bad),
        "bad": dict(Counter(b.kind for b in bad).most_common()),
        "exact duplicates": exact,
        "normalised duplicates": normal,
    }
    return _Set(kept, bad, counts)


def _apart(train: _Set, test: _Set) -> _Set:
    """Removes train records whose prompt is also in the test set."""
    left, exact, normal = apart(train.queries, test.queries)
    return _Set(left, train.bad, train.counts | {"exactly in test too": exact, "normalised in test too": normal})


def _described(one: _Set, name: str) -> dict[str, Any]:
    """Returns what the summary says about the records that are written.

    Raises:
        UserError: there are none.
    """
    if not one.queries:
        first = f"; the first bad record: {one.bad[0].reason}" if one.bad else ""
        raise UserError(f"no record is left for {name}.jsonl{first}; see --format, --columns, --needs and --test-share")
    return {
        "written": len(one.queries),
        "words of prompts": histogram(query.prompt for query in one.queries),
        "words of completions": histogram(query.completion for query in one.queries),
    }


def normalised(text: str) -> str:
    """Normalises a text for comparison: NFKC, case-folded, with every run of blanks and punctuation as one blank.

    A text of punctuation alone keeps it.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.translate(_blanks()).split()) or " ".join(folded.split())


@functools.cache
def _blanks() -> dict[int, str]:
    """Maps punctuation, separators and control characters to a blank, for `str.translate`."""
    return {i: " " for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i))[0] in "PZC"}


def unique(queries: Iterable[Query], *, needs: str) -> tuple[list[Query], int, int]:
    """Returns the queries without duplicates, and two numbers of duplicates that were dropped.

    The first query of equal ones is kept. The numbers are those of queries that exactly equal an earlier one, and of queries
    that equal one only after `normalised`. What is compared is what the record is needed for: the prompt, what is kept of
    the record, and with needs=completion or pair its answers.
    """
    kept: list[Query] = []
    exact, alike = set(), set()
    equal = normal = 0
    for query in queries:
        parts = (query.prompt, query.completion, query.rejected)[: {"prompt": 1, "completion": 2, "pair": 3}[needs]]
        beside = [json.dumps([i, part.message]) for i, part in enumerate(parts) if isinstance(part, Answer)]
        beside += [json.dumps(query.record, sort_keys=True)] if query.record else []
        plain, other = _hash([*parts, *beside]), _hash([*map(normalised, parts), *beside])
        if plain in exact:
            equal += 1
        elif other in alike:
            normal += 1
        else:
            kept.append(query)
        exact.add(plain)
        alike.add(other)
    return kept, equal, normal


def apart(train: Iterable[Query], test: Iterable[Query]) -> tuple[list[Query], int, int]:
    """Returns the train queries whose prompt is not in the test set.

    It also returns how many were there exactly, and how many only after `normalised`.
    """
    exact = {query.prompt for query in test}
    alike = {normalised(prompt) for prompt in exact}
    kept: list[Query] = []
    equal = normal = 0
    for query in train:
        if query.prompt in exact:
            equal += 1
        elif normalised(query.prompt) in alike:
            normal += 1
        else:
            kept.append(query)
    return kept, equal, normal


def divide(queries: Iterable[Query], *, share: float, seed: int) -> tuple[list[Query], list[Query]]:
    """Divides queries into (train, test) by a hash of the normalised prompt.

    Equal prompts stay together, whatever else is in the data. `share` is the expected share of the test queries.
    """
    parts: tuple[list[Query], list[Query]] = ([], [])
    for query in queries:
        drawn = int.from_bytes(_hash((str(seed), normalised(query.prompt)))[:8], "big") / 2**64
        parts[drawn < share].append(query)
    return parts


def histogram(texts: Iterable[str]) -> dict[str, int]:
    """Counts the texts with 0, 1, 2-3, 4-7, 8-15 ... words, up to the longest text and without gaps."""
    counts = Counter(len(text.split()).bit_length() for text in texts)
    bins = [f"{2**i // 2}-{2**i - 1}" if i > 1 else str(i) for i in range(max(counts, default=0) + 1)]
    return {name: counts[i] for i, name in enumerate(bins)}


def table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Formats a summary for people."""
    lines = []
    for name, counts in summary.items():
        lines.append(name)
        for key, value in counts.items():
            if not key.startswith("words"):
                listed = ", ".join(f"{kind} {n}" for kind, n in value.items()) or "0" if isinstance(value, dict) else value
                lines.append(f"  {key}: {listed}")
                continue
            lines.append(f"  {key}")
            longest = max(value.values())
            lines += [f"    {bin:>11} {n:>8} {'#' * -(-n * _BAR // longest)}".rstrip() for bin, n in value.items()]
    return "\n".join(lines)


def write(path: Path, queries: Sequence[Query], *, needs: str) -> None:
    """Writes JSONL that `load_queries` and TRL read: prompt and completion, or chosen and rejected, as texts or turns."""
    answered = any(query.completion for query in queries)

    def record(query: Query) -> dict[str, Any]:
        answers: dict[str, Any] = {"completion": query.completion} if answered else {}
        if needs == "pair":
            answers = {"chosen": query.completion, "rejected": query.rejected}
        kept = {name: value for name, value in query.record.items() if name not in answers}
        if not isinstance(query.prompt, Conversation):
            return {"id": query.id, "prompt": query.prompt, **answers, **kept}
        turns = {key: [turn_of(text)] for key, text in answers.items()}
        tools = {"tools": query.prompt.tools} if query.prompt.tools else {}
        return {"id": query.id, "prompt": query.prompt.messages, **turns, **tools, **kept}

    write_jsonl(path, map(record, queries))


def _short(queries: Sequence[Query], most: int) -> tuple[list[Query], list[Bad]]:
    if not most:
        return list(queries), []
    kept: list[Query] = []
    long: list[Bad] = []
    for query in queries:
        if (n := len(query.prompt.split())) <= most:
            kept.append(query)
        else:
            reason = f"{query.id}: the prompt has {n} words, more than {most}"
            long.append(Bad(query.id, "long", reason, query.prompt[:300]))
    return kept, long


def _hash(parts: Iterable[str]) -> bytes:
    return hashlib.sha256("\0".join(parts).encode()).digest()
