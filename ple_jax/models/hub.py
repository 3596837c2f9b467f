"""Models on a hub, as user/name: their folder in the cache that all Hugging Face tools share; and what model a path is.

Only safetensors, JSON and tokenizer files are downloaded: nothing that is pickled, no code.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ple_jax.core.config import is_hub_id
from ple_jax.core.errors import UserError

_DESCRIPTION = ("*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt", "LICENSE*", "NOTICE*")
_WEIGHTS = ("*.safetensors",)
# the same weights once more in other layouts: Meta's folder original/, Mistral's consolidated files, onnx/ ...
_LEFT_OUT = ("*/*", "consolidated*", "*.fp16.safetensors", "*.fp16-*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BLOCK, _BLOCKS = 4096, 16


def is_remote(path: str) -> bool:
    """Whether a model's path means a hub: user/name, and nothing on disk is called so."""
    return is_hub_id(path) and not os.path.exists(path)


def here(folder: Path, source: tuple[str, str | None] | None) -> Path:
    """The folder of a model that another process fetched, on this host; it is fetched here too where it is of a hub.

    Args:
        source: path or hub id, and revision, that the folder is of. The commit is the folder's.
    """
    if folder.exists() or source is None or not is_remote(source[0]):
        return folder
    return fetch(source[0], folder.name)


def fetch(repo: str, revision: str | None = None, *, weights: bool = True, setting: str = "--config.model.path") -> Path:
    """The folder of a model, downloaded unless the cache has it; its name is the commit.

    A cached branch stays at the commit it had when it was downloaded (`hf download` moves it): without that a run that is
    continued could find another model.

    Args:
        repo: user/name.
        revision: branch, tag or commit; the main branch if it is not given.
        weights: without them, only config and tokenizer are downloaded.
        setting: what to set to a folder instead, for messages.

    Raises:
        UserError: no such model or revision, one that needs a login or a licence, no network, or no model in the repository.
    """
    from huggingface_hub import snapshot_download

    if (cached := _cached(repo, revision, weights)) is not None:
        return cached
    with _explained(repo, revision, setting):
        folder = Path(snapshot_download(repo, revision=revision, **_patterns(weights)))
    if (missing := _missing(folder, weights)) is not None:
        raise UserError(
            f"hub model {repo!r} lacks {missing} (in {folder}); a repository must have config.json, tokenizer.json and"
            " *.safetensors, and without a network all of them must be in the cache (download a GGUF file by hand and give"
            " its path)"
        )
    return folder


def commit(repo: str, revision: str | None = None) -> str:
    """The commit that `fetch` gives; nothing is downloaded.

    Raises:
        UserError: as `fetch`.
    """
    from huggingface_hub import HfApi

    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    if (cached := _cached(repo, revision, True)) is not None:
        return cached.name
    with _explained(repo, revision, "--config.model.path"):
        return str(HfApi().model_info(repo, revision=revision).sha)


def identity(path: str, revision: str | None = None) -> str:
    """What tells one model from another behind the same path: the commit on a hub, else a digest of samples of its files.

    16 blocks of every weight file are enough: training changes nearly every weight. Names of built-in models stay as they
    are.

    Raises:
        UserError: a file that cannot be read.
    """
    if is_remote(path):
        return commit(path, revision)
    place = Path(path)
    if place.is_dir():
        found = (file for pattern in (*_WEIGHTS, *_DESCRIPTION) for file in sorted(place.glob(pattern)))
        files = [file for file in found if file.is_file()]  # a folder of such a name is said better where it is needed
    else:
        files = [place] if place.is_file() else []
    if not files:
        return path
    digest = hashlib.sha256()
    try:
        for file in files:
            for part in _samples(file, named=place.is_dir()):
                digest.update(part)
    except OSError as error:
        raise UserError(f"model {path!r} cannot be read: {error}") from error
    return digest.hexdigest()[:16]


def _samples(file: Path, *, named: bool) -> Iterator[bytes]:
    size = file.stat().st_size
    yield f"{os.fsencode(file.name).decode(errors='replace')} {size}\n".encode() if named else f"{size}\n".encode()
    with file.open("rb") as handle:
        for i in range(_BLOCKS):
            handle.seek(max(0, size - _BLOCK) * i // (_BLOCKS - 1))
            yield handle.read(_BLOCK)


def _patterns(weights: bool) -> dict[str, Any]:
    return {"allow_patterns": [*_DESCRIPTION, *(_WEIGHTS if weights else ())], "ignore_patterns": list(_LEFT_OUT)}


def _cached(repo: str, revision: str | None, weights: bool) -> Path | None:
    """The folder in the cache if it is complete; other tools may have put some of the files there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, **_patterns(weights)))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise UserError(f"{repo!r} cannot be a model on a hub: {error}") from error
    return folder if _missing(folder, weights) is None else None


def _missing(folder: Path, weights: bool) -> str | None:
    """A file without which the folder is not a whole model."""
    needed = ["config.json", "tokenizer.json"]
    index = folder / "model.safetensors.index.json"
    if weights and index.is_file():
        with contextlib.suppress(ValueError, KeyError, AttributeError):  # said better where it is read
            needed += sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif weights:
        needed.append("model.safetensors")
    return next((name for name in needed if not (folder / name).is_file()), None)


@contextlib.contextmanager
def _explained(repo: str, revision: str | None, setting: str) -> Iterator[None]:
    """What a hub refuses, as one line that says what to do."""
    from huggingface_hub import constants, errors

    where, at = f"{constants.ENDPOINT}/{repo}", f" --revision {revision}" if revision else ""
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"hub model {repo!r} has no revision {revision!r}; set {setting.replace('path', 'revision')} to a branch, tag or"
            f" commit of {where}, or leave it unset"
        ) from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"hub model {repo!r} is gated: ask for access at {where}, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no model {repo!r} on {constants.ENDPOINT}, or it is private (`hf auth login` or HF_TOKEN); and no"
            f" folder of that name in {Path.cwd()}"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _short(error)
        raise UserError(
            f"model {repo!r} is no folder in {Path.cwd()}, not (or not wholly) in the cache {constants.HF_HUB_CACHE}, and"
            f" {constants.ENDPOINT} cannot be reached ({reason}); where there is a network run"
            f" `hf download {repo}{at} --local-dir DIR`, copy DIR here and set {setting}=DIR"
        ) from error
    except Exception as error:  # of the HTTP library below it, which changes between versions, or of the disk
        raise UserError(
            f"hub model {repo!r} could not be downloaded ({_short(error)}); run again, what came is kept, or run"
            f" `hf download {repo}{at} --local-dir DIR` and set {setting}=DIR"
        ) from error


def _short(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
