"""Records that are left out: what they are, how many there may be, and where they are listed."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ple_jax.core.compact import Compact, compact
from ple_jax.core.errors import Unusable, UserError
from ple_jax.core.files import read_jsonl, write_jsonl
from ple_jax.core.types import Query

FILE = "bad_records.jsonl"  # in the work directory: what was left out, and why
_NAMED = 8  # places of bad records of a kind that an error names
CUT = 300  # characters of a bad record that are kept


class Bad(NamedTuple):
    """A record that is left out, with the reason."""

    where: str  # "file:line"
    kind: str  # what is counted: json, utf-8, csv, column, type, empty, turns, pair, label, short, duplicate id ...
    reason: str  # a sentence that names the place
    record: str  # the beginning of it


class QuerySet(NamedTuple):
    """The queries of a source, in its order, and the records that are left out."""

    queries: Compact[Query]
    bad: list[Bad]


def check_share(task: QuerySet, source: str, limit: float) -> None:
    """Raises a UserError if more than the share `limit` of the records is bad, or all of them.

    The message has the first bad record, and of each kind the number and the places.
    """
    queries, bad = task
    share = len(bad) / max(len(queries) + len(bad), 1)
    if queries and share <= limit:
        return
    if not bad:
        raise UserError(f"{source} holds no record that can be used")
    kinds = ", ".join(f"{n} {kind} ({_places(bad, kind)})" for kind, n in Counter(b.kind for b in bad).most_common())
    allowing = f"--config.task.max_bad_share={min(share + 0.01, 1):.2f}"
    remedy = (
        f"mend them, let scripts/prepare_data.py of a checkout leave them out, or set {allowing}"
        if queries
        else "mend them, or see whether --config.task.format and --config.task.columns are those of the data"
    )
    raise UserError(
        f"{bad[0].reason}; {len(bad)} of {len(queries) + len(bad)} records of {source} cannot be used: {kinds}; more than"
        f" config.task.max_bad_share={limit:g} allows: {remedy}"
    )


def _places(bad: Sequence[Bad], kind: str) -> str:
    """Names the first places of the bad records of a kind; of equal files the name is said once."""
    places = [b.where for b in bad if b.kind == kind]
    files: dict[str, list[str]] = {}
    for place in places[:_NAMED]:
        file, colon, line = place.rpartition(":")
        files.setdefault(file + colon, []).append(line)
    named = ", ".join(f"{file}{', '.join(lines)}" for file, lines in files.items())
    return named + (f" and {len(places) - _NAMED} more" if len(places) > _NAMED else "")


def fit(queries: Sequence[Query], judge: Callable[[Query], Any]) -> tuple[Compact[Any], list[Bad]]:
    """Applies `judge` to every query. Returns its results, and the queries that it finds `Unusable`.

    Queries that `judge` returns as they are do not get copied.
    """
    queries, bad = compact(queries), []
    same: list[int] = []
    made: Compact[Any] | None = None  # from the first on that is something else
    for place, query in enumerate(queries):
        try:
            good = judge(query)
        except Unusable as error:
            bad.append(Bad(query.id, error.kind, f"query {query.id!r} {error.reason}", query.prompt[:CUT]))
            continue
        if made is None and good is query:
            same.append(place)
            continue
        made = Compact(queries.take(same)) if made is None else made
        made.append(good)
    return queries.take(same) if made is None else made, bad


def note(bad: dict[str, list[Bad]], workdir: Path) -> str:
    """Writes the left-out records to the work directory; returns a line that says how many they are, or an empty text."""
    write_bad(workdir / FILE, bad)
    listed = counts(bad)
    return f"records left out: {listed}; listed in {workdir / FILE}" if listed else ""


def noted(workdir: Path, name: str) -> list[Bad]:
    """Reads what an earlier process has listed in the work directory as left out of the set `name`.

    Raises:
        Damaged: a line of the list is not JSON.
    """
    if not (path := workdir / FILE).exists():
        return []
    lines = read_jsonl(path, remedy="remove it: it only lists what was left out")
    return [Bad(*(line[field] for field in Bad._fields)) for line in lines if line["set"] == name]


def write_bad(path: Path, bad: Mapping[str, Sequence[Bad]]) -> None:
    """Writes the left-out records of every set, one JSON line each; if there are none, removes the file."""
    if not any(bad.values()):
        path.unlink(missing_ok=True)
        return
    write_jsonl(path, ({"set": name, **record._asdict()} for name, records in bad.items() for record in records))


def counts(bad: dict[str, list[Bad]]) -> str:
    """Says how many records were left out, by kind and set; the text is empty if there were none."""
    found = Counter(f"{record.kind} ({which})" for which, records in bad.items() for record in records)
    return ", ".join(f"{n} {kind}" for kind, n in found.items())
