"""A cache on disk for the values of rewards and judges: what was scored is never scored again, not even after kill -9."""

import hashlib
import json
import math
import sqlite3
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float64

from ple_jax.core import identity
from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import UserError

# whose file is another one then, for which the user vouches (`identity.ACCEPTED`)
AGAIN = "mend it and give the same command again with --accept=reward: what was sampled is kept"


def digest(*what: Any) -> str:
    """Returns a name for plain values: a SHA-256 in hex, which differs if any of the values differs."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=repr).encode()).hexdigest()


def key(name: str, version: str, prompt: str, response: str, reads: Mapping[str, Any] | None = None) -> str:
    """Returns the key that a value is stored under. All that the value depends on goes into it, and is listed only here.

    Args:
        name, version: of the reward or judge that computes the value.
        prompt: text or a conversation. Conversations that read alike may differ in turns and tools, so these go in too.
        response: the text that the value is for.
        reads: whatever else is read for the value, by name (fields of the record, say); plain values.
    """
    turns = [prompt.messages, prompt.tools] if isinstance(prompt, Conversation) else []
    return digest(name, version, prompt, turns, response, *([reads] if reads else []))


_TABLE = "CREATE TABLE IF NOT EXISTS answer (key TEXT PRIMARY KEY, value REAL, digest TEXT) WITHOUT ROWID"


def _seal(k: str, value: Any) -> str:
    """Returns the checksum that is stored beside a value; it differs if one bit of the value or of its key differs."""
    # SQLite has no -0.0
    return identity.digest([k.encode(), (value + 0.0).hex().encode()]) if isinstance(value, float) else "no value"


class Cache:
    """A file of values by key, for one writer at a time. It is opened at the first use and closed when the context ends.

    A value that is not as it was stored counts as missing, so that it is computed again.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._database: sqlite3.Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def get(self, keys: Iterable[str]) -> dict[str, float]:
        """Returns the stored values, by key, of those `keys` that are in the file. Raises UserError if it cannot be read."""
        try:
            database = self._open()
            rows = {k: database.execute("SELECT value, digest FROM answer WHERE key = ?", (k,)).fetchone() for k in keys}
        except sqlite3.DatabaseError as error:
            raise self._refused(error) from error
        return {k: row[0] for k, row in rows.items() if row is not None and row[1] == _seal(k, row[0])}

    def put(self, values: Mapping[str, float]) -> None:
        """Stores all of the values or none; on return they are on disk. Raises UserError if the file cannot be written."""
        try:
            with self._open() as database:  # a transaction
                rows = [(k, value, _seal(k, value)) for k, value in values.items()]
                database.executemany("INSERT OR REPLACE INTO answer VALUES (?, ?, ?)", rows)
        except sqlite3.DatabaseError as error:
            raise self._refused(error) from error

    def _open(self) -> sqlite3.Connection:
        if self._database is None:
            self._database = sqlite3.connect(self.path)
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.text_factory = lambda data: data.decode(errors="replace")  # a damaged text is another, no error
            self._database.execute(_TABLE)
        return self._database

    def _refused(self, error: sqlite3.DatabaseError) -> UserError:
        if self._database is not None and not self.path.exists():  # to SQLite it is read-only then
            return UserError(f"{self.path} is gone: something removed it, or its folder, while the run went on")
        # a full disk, a folder that is not there, no right to write; or a table that is not the one that was made
        if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
            return UserError(f"{self.path}: {error}; mend that and give the same command again: what was scored is kept")
        return UserError(f"{self.path} is damaged ({error}); delete it: what it held is scored again")


class Incomplete(UserError):
    """The error of a reward that stops before the end: `values` is one float per response, NaN where none was scored.

    The values that it holds go into the cache, so that the same command continues from there.
    """

    def __init__(self, message: str, values: Float64[np.ndarray, " n"]):
        super().__init__(message)
        self.values = values


def answered(
    questions: Mapping[str, tuple[Any, ...]],
    ask: Callable[..., Any],
    check: Callable[..., Sequence[float]],
    *,
    cache: Cache | None,
    batch: int,
    failed: Callable[[int], str],
    again: str,
) -> dict[str, float]:
    """Returns a number for each question, by its key: from the cache, or else by asking, `batch` questions at a time.

    The results of one call are in the cache before the next call begins. Values that are not finite are never stored.

    Args:
        questions: by key; each is a row of texts and of whatever else is read for them.
        ask: called with the columns of some of the questions, as lists.
        check: (result of `ask`, *columns) -> one number each; raises a UserError if the result is anything else.
        failed: describes, for the error, what happened to so many questions if `ask` fails.
        again: what the user should do then.

    Raises:
        UserError: `ask` failed, or `check` raised it.
        Incomplete: `ask` stopped before the end.
    """
    known = cache.get(questions) if cache is not None else {}
    missing = [k for k in questions if k not in known]
    for start in range(0, len(missing), batch):
        some = missing[start : start + batch]
        columns = [list(column) for column in zip(*(questions[k] for k in some), strict=True)]
        given, stopped = _asked(ask, columns, failed(len(some)), again)
        found = dict(zip(some, check(given, *columns), strict=True))
        if cache is not None:
            cache.put({k: value for k, value in found.items() if math.isfinite(value)})
        if stopped is not None:
            raise stopped
        known |= found
    return known


def _asked(ask: Callable[..., Any], columns: Sequence[list[Any]], failed: str, again: str) -> tuple[Any, Incomplete | None]:
    """Returns the result of a call and, if it stopped before the end, the Incomplete that says why."""
    try:
        return ask(*columns), None
    except Incomplete as error:
        return error.values, error
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # it may be the user's code: anything may come out of it, sys.exit(0) too
        raise UserError(f"{failed}: {type(error).__name__}: {error}{_where(error)}; {again}") from error


def _where(error: BaseException) -> str:
    """Says in which file and line an error of the user's code was raised."""
    installed = (Path(__file__).parents[1], Path(sys.prefix), Path(sys.base_prefix))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_file() and not any(Path(frame.filename).is_relative_to(path) for path in installed)
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""
