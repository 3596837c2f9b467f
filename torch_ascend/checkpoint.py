"""Checkpoints: a folder a step with every tensor (safetensors) and a JSON `meta` (iteration, step, environment).

A folder appears under its name only when it is whole and on disk: that is the commit point of a run.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ple_jax.core.errors import UserError
from ple_jax.core.files import to_disk

_STATE, _META = "state.safetensors", "meta.json"


def save(path: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], *, keep: int) -> None:
    """Writes and commits checkpoint `step`; on return it is on disk, and all but the newest `keep` are gone."""
    path.mkdir(parents=True, exist_ok=True)
    whole, partial = path / str(step), path / f"{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial / _STATE)
    (partial / _META).write_text(json.dumps(meta), encoding="utf-8")
    for file in (partial / _STATE, partial / _META, partial):
        to_disk(file)
    shutil.rmtree(whole, ignore_errors=True)  # of a step that was begun again
    partial.rename(whole)
    to_disk(path)
    for old in _steps(path)[:-keep]:
        shutil.rmtree(path / str(old))


def restore(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint's tensors, on the CPU, and its meta; None if there is none.

    Raises:
        UserError: it is damaged.
    """
    if not (steps := _steps(path)):
        return None
    folder = path / str(steps[-1])
    try:
        return load_file(folder / _STATE), json.loads((folder / _META).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {folder} is damaged ({error}); remove that folder to go on from the one before it"
        ) from error


def check(found: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    """Raises a UserError unless a checkpoint has the tensors that this config needs; it says which differ."""
    for name in sorted(found.keys() | wanted.keys()):
        a, b = ("nothing" if x is None else f"{tuple(x.shape)} {x.dtype}" for x in (found.get(name), wanted.get(name)))
        if a != b:
            raise UserError(
                f"checkpoint {path}: {name} is {a}, this config needs {b}; the model or --config.lora.* changed: start in"
                " an empty --workdir"
            )


def _steps(path: Path) -> list[int]:
    return sorted(int(entry.name) for entry in path.glob("*") if re.fullmatch(r"\d+", entry.name))
