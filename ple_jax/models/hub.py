"""Fetches models, named user/name, from a hub into the cache that all Hugging Face tools share, and identifies models.

Only safetensors, JSON and tokenizer files and licences are downloaded: no pickled files and no code.
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
    """Says whether a path names a model on a hub: it reads user/name, and no file or folder has this name."""
    return is_hub_id(path) and not os.path.exists(path)


def is_commit(revision: str) -> bool:
    return _COMMIT.fullmatch(revision) is not None


def here(folder: Path, source: tuple[str, str | None] | None) -> Path:
    """Returns the folder, on this host, of a model that another process fetched.

    If the folder is not here, or not whole, and the model is from a hub, it is fetched again, at the same commit.

    Args:
        folder: the folder on the other host; its name is the commit if the model is from a hub.
        source: the path or hub id that the folder was found by, and the revision.

    Raises:
        UserError: as `fetch` does.
    """
    if source is None or not is_remote(source[0]) or _missing(folder, True) is None:
        return folder
    return fetch(source[0], folder.name)


def fetch(repo: str, revision: str | None = None, *, weights: bool = True, setting: str = "--config.model.path") -> Path:
    """Returns the local folder of a hub's model, which is downloaded unless the cache has it. Its name is the commit.

    A cached branch stays at the commit that it had when it was downloaded (`hf download` moves it). Otherwise a run that is
    resumed could find another model.

    Args:
        repo: user/name.
        revision: branch, tag or commit; the main branch if it is not given.
        weights: whether weights are needed; if not, only config and tokenizer are downloaded.
        setting: the setting that error messages advise to set to a local folder instead.

    Raises:
        UserError: if the model or revision does not exist, it needs a login or a licence, the hub cannot be reached, or the
            repository lacks a file that a model needs.
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
    """Returns the commit of the model that `fetch` would return. No file is downloaded.

    Raises:
        UserError: as `fetch` does.
    """
    from huggingface_hub import HfApi

    if revision is not None and is_commit(revision):
        return revision
    if (cached := _cached(repo, revision, True)) is not None:
        return cached.name
    with _explained(repo, revision, "--config.model.path"):
        return str(HfApi().model_info(repo, revision=revision).sha)


def identity(path: str, revision: str | None = None) -> str:
    """Returns a text that tells one model from another behind the same path.

    It is the commit of a model on a hub, or else a digest of samples of the model's files. 16 blocks of every file are
    enough, since training changes nearly every weight. Names of built-in models are returned as they are.

    Raises:
        UserError: if a file cannot be read, or as `commit` does.
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
    """Returns the model's folder in the cache, or None if it is incomplete: other tools may have fetched some files only."""
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
    """Returns the name of a file that the folder needs to be a whole model and lacks, or None if there is none."""
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
    """Turns errors of the hub's client into UserErrors that say in one line what to do."""
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
