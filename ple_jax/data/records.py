"""Raw records, each with its place, from a built-in set, a file, a folder, or a data set on a hub. They are not judged here.

No code of a data set is run: files are JSON, CSV and Parquet, and `datasets` no longer has loading scripts.
"""

import contextlib
import csv
import gzip
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ple_jax.core.config import find, is_hub_id, names
from ple_jax.core.errors import UserError, suggestion
from ple_jax.core.extras import need

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


class Record(NamedTuple):
    """A raw record from one place, or the reason why it cannot be read."""

    where: str  # "file:line", or "user/name/subset/split:row"; lines and rows are counted from 1
    name: str  # likewise without folders and suffixes: the id of a record that has none
    value: dict[str, Any]
    kind: str = ""  # of the problem, one word; empty if there is none
    reason: str = ""
    text: str = ""  # what stands there instead of a record


def read(source: str, *, split: str = "train", subsets: Sequence[str] = (), streaming: bool = False) -> Iterator[Record]:
    """Yields the records of a source one after the other; a line that cannot be read is one record with a problem.

    Args:
        source: a built-in set (ple_jax/data); a .jsonl, .json (an array, or lines), .csv or .parquet file, also with .gz; a
            folder of such files or as `datasets` saves them; or the user/name of a data set on a hub.
        split: the split of a folder or of a data set on a hub.
        subsets: subsets of the same, read one after the other: configurations if some have these names, else sub-folders.
        streaming: for a data set on a hub, whether to download no more than is read.

    Raises:
        UserError: there is no such source, split or subset; a file is cut off; a data set cannot be reached.
    """
    path = find("data", ".jsonl", source) or Path(source)
    if path.is_file():
        yield from _file(path, Path(path.name.removesuffix(".gz")).stem)
    elif path.is_dir():
        for subset in subsets or ("",):
            yield from _folder(path, split, subset)
    elif on_hub(source):
        for subset in subsets or ("",):
            yield from _hub(source, split, subset, streaming)
    else:
        known = names("data", ".jsonl")
        raise UserError(
            f"{source!r} is neither a file nor a folder (looked in {Path.cwd()}), no user/name of a data set on a hub, and"
            f" none of {', '.join(known)}{suggestion(source, known)}"
        )


def on_hub(source: str) -> bool:
    """Says whether a source is the user/name of a data set on a hub, and no built-in set, file or folder here."""
    path = find("data", ".jsonl", source) or Path(source)
    return not path.exists() and is_hub_id(source) and not source.removesuffix(".gz").endswith(SUFFIXES)


def _folder(path: Path, split: str, subset: str) -> Iterator[Record]:
    saved = path / subset
    if (saved / "dataset_dict.json").is_file() or (saved / "state.json").is_file():
        yield from _numbered(_saved(saved, split), f"{saved}/{split}", f"{subset}/{split}".lstrip("/"))
        return
    builder, options = _builder(str(path), split, subset)
    files = [Path(file) for file in builder.config.data_files[split]]
    if any(not file.name.removesuffix(".gz").endswith(SUFFIXES) for file in files):
        rows = _dataset(str(path), split, options)
        yield from _numbered(rows, f"{saved}/{split}", f"{subset}/{split}".lstrip("/"))
        return
    for file in files:  # by our own readers: to `datasets` a line that cannot be read is the end of it all
        inside = str(file.relative_to(path.resolve())) if file.is_relative_to(path.resolve()) else file.name
        plain = inside.removesuffix(".gz")
        yield from _file(file, plain.removesuffix(Path(plain).suffix))


def _hub(source: str, split: str, subset: str, streaming: bool) -> Iterator[Record]:
    from huggingface_hub import constants, snapshot_download

    files: dict[str, Any] = {"repo_type": "dataset", "allow_patterns": [f"{subset}/*"]}
    if subset and constants.HF_HUB_OFFLINE:
        with contextlib.suppress(OSError):  # not in the cache
            folder = Path(snapshot_download(source, local_files_only=True, **files))
            if (folder / subset).is_dir():
                yield from _folder(folder, split, subset)
                return
    options = _builder(source, split, subset)[1]
    if "data_dir" in options and not streaming:  # without a network `datasets` finds no sub-folder of its cache again
        with _explained(source):
            folder = Path(snapshot_download(source, **files))
        yield from _folder(folder, split, subset)
    else:
        rows = _dataset(source, split, options, streaming=streaming)
        yield from _numbered(rows, "/".join(filter(None, (source, subset, split))), f"{subset}/{split}".lstrip("/"))


def _file(path: Path, name: str) -> Iterator[Record]:
    plain = path.name.removesuffix(".gz")
    reader = next((_READERS[suffix] for suffix in SUFFIXES if plain.endswith(suffix)), None)
    if reader is None:
        raise UserError(f"{path} is none of {', '.join(SUFFIXES)} (each also with .gz); give it the suffix of what it is")
    try:
        yield from reader(path, name)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is cut off or damaged ({error}); copy it again") from error
    except PermissionError as error:
        raise UserError(f"{path} may not be read by this user ({error.strerror}); change its permissions") from error


def _open(path: Path) -> Any:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _jsonl(path: Path, name: str) -> Iterator[Record]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):  # of bytes: cut at "\n" and nowhere else
            if line.strip():
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                yield _parsed(line, f"{path}:{number}", f"{name}:{number}")


def _parsed(line: bytes, where: str, name: str) -> Record:
    try:
        value = json.loads(line.decode())
        if b"\\ud" in line.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but nothing can encode it
    except UnicodeDecodeError as error:
        return _broken(where, name, "utf-8", f"is not UTF-8 ({error.reason} at byte {error.start}); convert the file", line)
    except (ValueError, RecursionError) as error:
        return _broken(where, name, "json", f"is not JSON ({error}); each line is one record", line)
    return _object(value, where, name)


def _broken(where: str, name: str, kind: str, reason: str, raw: bytes) -> Record:
    return Record(where, name, {}, kind, f"{where} {reason}", raw[:1000].decode(errors="replace").strip())


def _object(value: Any, where: str, name: str) -> Record:
    if isinstance(value, dict):
        return Record(where, name, value)
    reason = f"{where} is a {type(value).__name__}, not an object with columns"
    return Record(where, name, {}, "json", reason, str(value)[:1000])


def _json(path: Path, name: str) -> Iterator[Record]:
    with _open(path) as file:
        begins = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not begins.startswith(b"["):
        yield from _jsonl(path, name)
        return
    with _open(path) as file:
        content = file.read()
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); give an array of records, or one record a line") from error
    for number, value in enumerate(values, 1):
        where = f"{path}:{number}"
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            yield Record(where, f"{name}:{number}", {}, "json", f"{where} is not JSON ({error})", ascii(value)[:1000])
        else:
            yield _object(value, where, f"{name}:{number}")


def _csv(path: Path, name: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # a field may be a long text; the default is 128 KiB
    with _open(path) as raw:
        lines = (line.decode("utf-8-sig" if number == 0 else "utf-8", "surrogateescape") for number, line in enumerate(raw))
        rows = csv.reader(lines, strict=True)
        try:
            header = next(rows, [])
        except csv.Error as error:
            raise UserError(f"{path}:1 is not CSV ({error}); the first line must name the columns") from error
        _check_header(path, header)
        while True:
            number = rows.line_num + 1
            where, called = f"{path}:{number}", f"{name}:{number}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                yield Record(where, called, {}, "csv", f"{where} is not CSV ({error})")
                continue
            if row is None:
                return
            text = ",".join(row)
            if not text:
                continue
            clean = text.encode(errors="replace").decode()
            if clean != text:
                yield Record(where, called, {}, "utf-8", f"{where} is not UTF-8; convert the file", clean[:1000])
            elif len(row) != len(header):
                reason = f"{where} has {len(row)} fields, but the first line names {len(header)} columns"
                yield Record(where, called, {}, "csv", reason, text[:1000])
            else:
                yield Record(where, called, dict(zip(header, row, strict=True)))


def _check_header(path: Path, header: Sequence[str]) -> None:
    """Raises a UserError if a CSV file's first line is not UTF-8, repeats a name, or has other separators than commas."""
    named = ",".join(header)
    if named.encode(errors="replace").decode() != named:
        raise UserError(f"{path}:1 is not UTF-8; convert the file")
    if twice := [name for i, name in enumerate(header) if name and name in header[:i]]:
        raise UserError(f"{path}:1 names the column {twice[0]!r} twice: give each a name of its own")
    if len(header) == 1 and (other := next((sign for sign in ";\t" if sign in named), "")):
        raise UserError(f"{path}:1 names one column, {named!r}: separate fields by commas and not by {other!r}")


def _parquet(path: Path, name: str) -> Iterator[Record]:
    need("data", str(path), "pyarrow")
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        content = pyarrow.BufferReader(gzip.decompress(path.read_bytes())) if path.suffix == ".gz" else path
        with pyarrow.parquet.ParquetFile(content) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                try:
                    rows = batch.to_pylist()
                except UnicodeDecodeError:  # Parquet does not check its texts
                    rows = [_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
                for row in rows:
                    number += 1
                    where = f"{path}:{number}"
                    if row is None:
                        yield Record(where, f"{name}:{number}", {}, "utf-8", f"{where} is not UTF-8; write the file again")
                    else:
                        yield Record(where, f"{name}:{number}", row)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not Parquet, or damaged ({_short(error)}); copy it again") from error


def _row(batch: Any) -> dict[str, Any] | None:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return None


_READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _numbered(rows: Iterable[dict[str, Any]], where: str, name: str) -> Iterator[Record]:
    for number, row in enumerate(rows, 1):
        yield Record(f"{where}:{number}", f"{name}:{number}", row)


def _datasets(source: str) -> Any:
    """Imports and returns `datasets`, without its progress bars, its hints and its counting of downloads.

    Raises:
        UserError: it is not installed.
    """
    need("data", f"data set {source!r}", "datasets")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    return datasets


def _saved(folder: Path, split: str) -> Iterable[dict[str, Any]]:
    datasets = _datasets(str(folder))
    with _explained(str(folder)):
        found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.Dataset):
        return found
    _check_split(str(folder), split, found)
    return found[split]


def _dataset(source: str, split: str, options: dict[str, str], *, streaming: bool = False) -> Iterator[dict[str, Any]]:
    datasets = _datasets(source)
    with _explained(source):
        yield from datasets.load_dataset(source, split=split, streaming=streaming, **options)


def _builder(source: str, split: str, subset: str) -> tuple[Any, dict[str, str]]:
    """Returns what `datasets` knows of a folder or hub data set before reading it, and the options that name the subset.

    Raises:
        UserError: there is no such subset or split, or the data set cannot be reached.
    """
    datasets = _datasets(source)
    options: dict[str, str] = {}
    with _explained(source):
        configurations = datasets.get_dataset_config_names(source)
        if subset:
            options = {"name": subset} if subset in configurations else {"data_dir": subset}
        elif len(configurations) > 1 and datasets.get_dataset_default_config_name(source) is None:
            raise UserError(f"{source} has the subsets {', '.join(configurations)}; {_choose(configurations[0])}")
        try:
            builder = datasets.load_dataset_builder(source, **options)
        except (FileNotFoundError, ValueError) as error:  # of a folder, and of a hub
            if "data_dir" not in options:
                raise
            known = configurations if configurations != ["default"] else _folders(source)
            raise UserError(
                f"{source} has no subset {subset!r}, only {', '.join(known) or 'the whole'}{suggestion(subset, known)};"
                f" {_choose(known[0]) if known else 'leave --config.task.subsets empty'}"
            ) from error
    _check_split(source, split, builder.config.data_files or builder.info.splits or [split])
    return builder, options


def _choose(subset: str) -> str:
    return f"set --config.task.subsets=\"('{subset}',)\""


def _folders(source: str) -> list[str]:
    if Path(source).is_dir():
        return sorted(p.name for p in Path(source).iterdir() if p.is_dir() and not p.name.startswith("."))
    from huggingface_hub import HfApi

    tree = HfApi().list_repo_tree(source, repo_type="dataset")
    return sorted(entry.path for entry in tree if not hasattr(entry, "size"))


def _check_split(source: str, split: str, known: Iterable[str]) -> None:
    known = [str(name) for name in known]
    if split not in known:
        raise UserError(
            f"{source} has no split {split!r}, only {', '.join(known)}{suggestion(split, known)}; set"
            " --config.task.train_split and --config.task.heldout_split"
        )


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turns any error of `datasets` or of a hub into a UserError: one line that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of datasets, pyarrow, the hub's client, its HTTP library or the disk
        if Path(source).is_dir():
            raise UserError(
                f"{source} cannot be read as a data set ({_short(error)}); give a folder of {', '.join(SUFFIXES)} files,"
                " named after their split"
            ) from error
        from huggingface_hub import constants, errors

        cause = f"{error} {error.__cause__} {error.__context__}"
        by_hand = (
            f"`hf download {source} --repo-type dataset --local-dir DIR`{{}} and set --config.task.train=DIR or"
            " --config.task.heldout=DIR"
        )
        if isinstance(error, errors.GatedRepoError) or "gated" in cause:
            raise UserError(
                f"data set {source!r} is gated: ask for access at {constants.ENDPOINT}/datasets/{source}, then log in with"
                " `hf auth login` or set HF_TOKEN"
            ) from error
        if "OfflineModeIsEnabled" in cause or isinstance(error, ConnectionError):
            reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _short(error)
            raise UserError(
                f"data set {source!r} is no folder in {Path.cwd()}, not in the cache, and {constants.ENDPOINT} cannot be"
                f" reached ({reason}); where there is a network run {by_hand.format(', copy DIR here')}"
            ) from error
        raise UserError(
            f"data set {source!r} could not be read ({_short(error)}); see whether"
            f" {constants.ENDPOINT}/datasets/{source} has it, or run {by_hand.format('')}"
        ) from error


def _short(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
