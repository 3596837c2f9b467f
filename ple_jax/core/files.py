"""Files: written whole or not at all, appended to line by line, on disk at once, and read with their place in every error.

Files that a run is resumed from are sealed: the last key of a JSON object, in a file of its own or on a line, is
`digest`, 16 hex digits that stand for all bytes before it. The lines of a whole file are numbered too. So one changed bit
is found, and so is a missing line. What is not sealed was written by an earlier version, and is read as it is.
"""

import contextlib
import csv
import gzip
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from ple_jax.core.errors import Damaged
from ple_jax.core.identity import digest

_AGAIN = "give another --workdir"

# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def whole(path: Path, *, binary: bool = False, errors: str = "strict") -> Iterator[IO[Any]]:
    """Yields a file to write to, which takes its name when the block ends.

    A reader sees the old file or the new one, even after a crash. If the block raises, the old file stays.

    Args:
        path: in a folder that exists.
        binary: for bytes; otherwise for text in UTF-8, with "\\n" at the ends of lines.
        errors: what to do with text that UTF-8 cannot encode, as in `open`.
    """
    temporary = path.with_name(path.name + ".tmp")
    options: dict[str, Any] = {} if binary else {"encoding": "utf-8", "newline": "\n", "errors": errors}
    try:
        with temporary.open("wb" if binary else "w", **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    to_disk(path.parent)  # the name is part of the folder


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Writes a text to a file, whole or not at all; `errors` is as in `whole`."""
    with whole(path, errors=errors) as file:
        file.write(text)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes bytes to a file, whole or not at all."""
    with whole(path, binary=True) as file:
        file.write(data)


def write_json(path: Path, value: Mapping[str, Any], *, sealed: bool = False) -> None:
    """Writes a value as a JSON file, whole or not at all, with its digest if `sealed`.

    NaN becomes null, and the infinities become "inf" and "-inf".
    """
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, (seal(text) if sealed else text) + "\n")


def write_jsonl(path: Path, values: Iterable[Any], *, ascii: bool = False) -> None:
    """Writes values to a file, one JSON line each, whole or not at all; they are taken one after the other.

    Args:
        ascii: whether all characters outside ASCII are escaped.
    """
    with whole(path) as file:
        file.writelines(json.dumps(value, ensure_ascii=ascii) + "\n" for value in values)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a table as CSV, whole or not at all.

    Numbers are written exactly, missing values as empty cells; keys of a row that are not in `columns` are left out. A text
    that a spreadsheet would read as a formula is written behind an apostrophe.
    """
    with whole(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([_cell(column) for column in columns])
        writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.replace("\r\n", "\n").replace("\r", "\n")  # no reader takes a bare one
    if value[:1] not in ("=", "+", "-", "@", "\t", "\r"):
        return text
    try:
        float(text)
        return text
    except ValueError:
        return f"'{text}"


def write_sealed(path: Path, values: Iterable[Mapping[str, Any]], *, ascii: bool = False) -> None:
    """Writes values as `write_jsonl` does, each line sealed, with its number and the number of lines."""
    everything = list(values)
    numbered = ({**value, "line": n, "lines": len(everything)} for n, value in enumerate(everything, 1))
    with whole(path) as file:
        file.writelines(seal(json.dumps(value, ensure_ascii=ascii)) + "\n" for value in numbered)


def seal(text: str) -> str:
    """Returns the text of a non-empty JSON object with its digest as one more key, the last."""
    head = text[:-1].rstrip()
    end = text[len(head) : -1]  # what stands before the last brace where the object is indented
    return f'{head},{end + "  " if end else " "}"digest": "{digest([head.encode()])}"{end}}}'


def append_line(path: Path, value: str) -> None:
    """Appends a line to a file; on return it is on disk. A kill may leave the beginning of it there, without its end."""
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(value + "\n")
        file.flush()
        os.fsync(file.fileno())


def user_cache() -> Path:
    """Returns this package's folder in the user's cache folder: XDG_CACHE_HOME, or ~/.cache.

    Raises:
        OSError: the user's home cannot be found out.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ple_jax"
    except RuntimeError as error:
        raise OSError(str(error)) from error


def to_disk(path: Path) -> None:
    """Waits until what was written to a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def plain(value: Any) -> Any:
    """Converts a value to what JSON has.

    Keys become texts, tuples become lists, numpy's scalars become Python's, NaN becomes None, and the infinities become
    "inf" and "-inf".
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


# ---------------------------------------------------------------- reading


def opened(data: bytes) -> tuple[dict[str, Any], bool]:
    """Parses a JSON object, checks its digest, and returns the object without it, and whether it had one.

    Raises:
        ValueError: the data is no JSON object, or not the one that was sealed.
    """
    value = json.loads(data.decode())
    if not isinstance(value, dict):
        raise ValueError(f"it is no JSON object: {str(value)[:40]}")
    if (said := value.pop("digest", None)) is None:
        return value, False
    head = data.rpartition(b'"digest": "')[0].rstrip().removesuffix(b",")
    if said != digest([head]):
        raise ValueError("its digest is of something else")
    return value, True


def read_json(path: Path, *, remedy: str = _AGAIN) -> dict[str, Any] | None:
    """Reads a JSON file and returns its content without the digest; None if there is no such file.

    Raises:
        Damaged: the file holds no JSON object, or not the one that was written; the message says the `remedy`.
    """
    try:
        return opened(path.read_bytes())[0] if path.exists() else None
    except (ValueError, OSError, RecursionError) as error:
        raise Damaged(f"{path} is damaged, or no file of a run ({error}); {remedy}") from error


def lines(path: Path, *, torn: bool = False) -> list[bytes]:
    """Reads the lines of a file, without their ends.

    They are cut at "\\n" alone: str.splitlines would also cut at U+2028 and the like, which JSON leaves as they are.

    Args:
        path: a file; if its name ends in .gz it is decompressed.
        torn: whether the last line may lack its end, because it is being written or a kill cut it off; it is dropped then.
    """
    data = path.read_bytes()
    *found, rest = (gzip.decompress(data) if path.suffix == ".gz" else data).split(b"\n")
    return found if torn or not rest else [*found, rest]


def read_jsonl(path: Path, *, torn: bool = False, remedy: str = _AGAIN) -> list[Any]:
    """Reads the values of a file of JSON lines.

    Args:
        path, torn: as in `lines`.
        remedy: what to do about a line that is damaged, for the error.

    Raises:
        Damaged: a line is not JSON; the message names file and line.
    """
    values = []
    try:
        found = lines(path, torn=torn)
    except IsADirectoryError as error:
        raise Damaged(f"{path} is no file ({error}); {remedy}") from error
    for number, line in enumerate(found, 1):
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one too
            raise Damaged(f"{path}:{number} is damaged ({error}); {remedy}") from error
    return values


def read_sealed(path: Path, *, remedy: str) -> list[dict[str, Any]]:
    """Reads the values of a file that `write_sealed` wrote, without digests and line numbers, which are checked.

    Raises:
        Damaged: a line is missing, or not as it was written; the message names the line and says the `remedy`.
    """
    try:
        *found, rest = path.read_bytes().split(b"\n")
    except IsADirectoryError as error:
        raise Damaged(f"{path} is no file ({error}); {remedy}") from error
    if rest or not found:
        raise Damaged(f"{path} is damaged (it {'ends within a line' if rest else 'is empty'}); {remedy}")
    values = []
    for number, line in enumerate(found, 1):
        try:
            value, sealed = opened(line)
            place = value.pop("line", None), value.pop("lines", None)
            if place != ((number, len(found)) if sealed else (None, None)):
                raise ValueError(f"it is line {place[0]} of {place[1]}, and the file has {len(found)}")
        except ValueError as error:
            raise Damaged(f"{path}:{number} is damaged ({error}); {remedy}") from error
        values.append(value)
    return values
