"""Files: written whole or not at all, appended to by lines that are on disk, and read with their place in every error."""

import contextlib
import gzip
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ple_jax.core.errors import UserError

_AGAIN = "give another --workdir"

# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def whole(path: Path, *, binary: bool = False, errors: str = "strict") -> Iterator[IO[Any]]:
    """A file to write to, which takes its name when the block ends: a reader sees the old one or the new one, even after
    a crash. Where the block raises, the old one stays.

    Args:
        path: in a folder that exists.
        binary: for bytes; otherwise for text in UTF-8, with "\\n" at the ends of lines.
        errors: what to do with text that UTF-8 does not have, as `open` takes it.
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
    """A file of this text, whole; `errors` as `whole` takes it."""
    with whole(path, errors=errors) as file:
        file.write(text)


def write_bytes(path: Path, data: bytes) -> None:
    """A file of these bytes, whole."""
    with whole(path, binary=True) as file:
        file.write(data)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A file of this value, whole; NaN and infinities become null and "inf"."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, values: Iterable[Any], *, ascii: bool = False) -> None:
    """A file of these values, one a line, whole; values are taken one after the other.

    Args:
        ascii: whether all other characters are escaped.
    """
    with whole(path) as file:
        file.writelines(json.dumps(value, ensure_ascii=ascii) + "\n" for value in values)


def append_line(path: Path, value: str) -> None:
    """One more line of a file; on return it is on disk. A kill may leave its beginning there, without the end."""
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(value + "\n")
        file.flush()
        os.fsync(file.fileno())


def cut_torn_line(path: Path) -> None:
    """Cuts off a last line that has no end, as a kill leaves it: appending goes on after it."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())


def to_disk(path: Path) -> None:
    """Waits until what was written to a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def plain(value: Any) -> Any:
    """The value as JSON has it: keys are texts, tuples lists, and what is not finite null, "inf" or "-inf"."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


# ---------------------------------------------------------------- reading


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's content; None if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged, or no file of a run ({error}); {_AGAIN}") from error


def lines(path: Path, *, torn: bool = False) -> list[bytes]:
    """The lines of a file, without their ends. They are cut at "\\n" alone: str.splitlines would also cut at U+2028 and
    the like, which JSON leaves as they are.

    Args:
        path: what ends in .gz is unpacked.
        torn: whether the last one may lack its end, as it is being written or a kill cut it off; it is dropped then.
    """
    data = path.read_bytes()
    *found, rest = (gzip.decompress(data) if path.suffix == ".gz" else data).split(b"\n")
    return found if torn or not rest else [*found, rest]


def read_jsonl(path: Path, *, torn: bool = False, remedy: str = _AGAIN) -> list[Any]:
    """The values of a file of JSON lines.

    Args:
        path, torn: as `lines` takes them.
        remedy: what to do about a line that is damaged, for the error.

    Raises:
        UserError: a line is not JSON; it names file and line.
    """
    values = []
    for number, line in enumerate(lines(path, torn=torn), 1):
        try:
            values.append(json.loads(line))
        except ValueError as error:  # UnicodeDecodeError is one too
            raise UserError(f"{path}:{number} is damaged ({error}); {remedy}") from error
    return values
