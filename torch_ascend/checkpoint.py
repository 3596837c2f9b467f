"""Checkpoints: one folder per step with every tensor (safetensors) and a JSON `meta` (iteration, step, environment).

`core.commits` commits them, and checks them when they are read.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ple_jax.core import commits
from ple_jax.core.errors import UserError

_STATE, _META = "state.safetensors", "meta.json"


def save(path: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], *, keep: int) -> None:
    """Writes and commits checkpoint `step`; on return it is on disk, and all but the newest `keep` are gone."""
    with commits.committing(path, step, keep=keep) as partial:
        folder = partial / str(step)
        folder.mkdir()
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / _STATE)
        (folder / _META).write_text(json.dumps(meta), encoding="utf-8")


def restore(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Reads the newest checkpoint; returns (tensors, meta), or None if there is none. The tensors are on the CPU.

    Raises:
        Damaged: a file of the checkpoint is not as it was written.
        UserError: the machine cannot read it.
    """
    if (folder := commits.newest(path)) is None:
        return None
    try:
        return load_file(folder / _STATE), json.loads((folder / _META).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, SafetensorError) as error:  # an earlier version has no list of the files
        raise commits.damaged(folder, str(error)) from error
    except OSError as error:  # such as of a file system without mmap: nothing is wrong with the checkpoint
        says = f"checkpoint {folder} cannot be read ({error}): mend that, and give the same command again"
        raise UserError(says) from error


def check(found: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    """Raises a UserError unless a checkpoint has the tensors that this config needs; the message says which differs."""
    for name in sorted(found.keys() | wanted.keys()):
        a, b = ("nothing" if x is None else f"{tuple(x.shape)} {x.dtype}" for x in (found.get(name), wanted.get(name)))
        if a != b:
            raise UserError(
                f"checkpoint {path}: {name} is {a}, this config needs {b}; the model or --config.lora.* changed: start in"
                " an empty --workdir"
            )

