"""Values of rewards on disk: what was scored is never scored again, not even after kill -9."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from ple_jax.core.config import UserError
from ple_jax.core.transcripts import Conversation


def digest(*what: Any) -> str:
    """A name for plain values: another one if any of them differs."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=repr).encode()).hexdigest()


def key(name: str, version: str, prompt: str, response: str) -> str:
    """What a value is stored by. Conversations that read alike may differ in their turns, so these go in too."""
    turns = [prompt.messages, prompt.tools] if isinstance(prompt, Conversation) else []
    return digest(name, version, prompt, turns, response)


class Cache:
    """A file of values by key, for one writer. It is opened at the first use and closed on leaving the context."""

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._database: sqlite3.Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def get(self, keys: Iterable[str]) -> dict[str, float]:
        """The values of those keys that are there."""
        try:
            database = self._open()
            rows = [database.execute("SELECT key, value FROM value WHERE key = ?", (k,)).fetchone() for k in keys]
        except sqlite3.DatabaseError as error:
            raise self._refused(error) from error
        return {row[0]: row[1] for row in rows if row is not None}

    def put(self, values: Mapping[str, float]) -> None:
        """Stores all of them or none; on return they are on disk."""
        try:
            with self._open() as database:  # a transaction
                database.executemany("INSERT OR REPLACE INTO value VALUES (?, ?)", values.items())
        except sqlite3.DatabaseError as error:
            raise self._refused(error) from error

    def _open(self) -> sqlite3.Connection:
        if self._database is None:
            self._database = sqlite3.connect(self._path)
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.execute("CREATE TABLE IF NOT EXISTS value (key TEXT PRIMARY KEY, value REAL) WITHOUT ROWID")
        return self._database

    def _refused(self, error: sqlite3.DatabaseError) -> UserError:
        if isinstance(error, sqlite3.OperationalError):  # a full disk, a folder that is not there, no right to write
            return UserError(f"{self._path}: {error}; mend that and give the same command again: what was scored is kept")
        return UserError(f"{self._path} is damaged ({error}); delete it: what it held is scored again")
