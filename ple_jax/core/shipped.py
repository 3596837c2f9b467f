"""The configs that come with the package: found by name for `--config`, and importable from any config as `configs`."""

import ast
import contextlib
import importlib.machinery
import importlib.util
import os
import re
import sys
from pathlib import Path

from ple_jax.core.config import PACKAGE, names
from ple_jax.core.errors import UserError, suggestion
from ple_jax.core.files import write_text

CONFIGS = PACKAGE / "configs"  # in a checkout a link to the folder at its top


def find(config: str) -> Path:
    """Finds the file of a config: NAME is one of the package's, a path is a path.

    The path `configs/NAME.py` is also the package's if there is no such file, so that a command is the same in a checkout
    and in any other folder.

    Raises:
      UserError: there is no such config; the message says which is nearest.
    """
    file, known = Path(config), names("configs", ".py")
    packaged = CONFIGS / f"{file.stem}.py"
    if re.fullmatch(r"[\w-]+", config):
        if config in known:
            return packaged
        nearest = suggestion(config, [*known, *(p.name for p in Path().glob("*.py") if p.is_file())], files=True)
        raise UserError(f"no config is called {config!r}, only {', '.join(known)}; a file's name ends in .py{nearest}")
    if not os.path.isfile(file) and file in [Path(f"configs/{name}.py") for name in known]:
        return packaged
    if not os.path.isfile(file):
        near = [f"configs/{name}.py" for name in known]
        with contextlib.suppress(OSError):  # of a path that is too long
            near += [str(p) for p in file.parent.glob("*.py") if p.is_file()]
        nearest = suggestion(config, sorted(near), files=True)
        raise UserError(f"config file {config!r} does not exist in {Path.cwd()}{nearest}")
    return file


def copy(file: Path, folder: Path) -> Path:
    """Copies a config into a folder, which is made if need be, and returns the path of the copy.

    Raises:
      UserError: the folder has a file of this name, or cannot be written.
    """
    path = folder / file.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path):
            raise FileExistsError
        write_text(path, _own(file))  # whole or not at all: the next call would take a half for a file of the user's
    except FileExistsError as error:
        raise UserError(f"{path} exists, and may hold changes of yours: take another --workdir") from error
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}; take another --workdir") from error
    return path


def _own(file: Path) -> str:
    """Returns the text of a config for its copy. What the package says of one of its own, figures too, is not said there."""
    text = file.read_text(encoding="utf-8")
    if file.resolve().parent != CONFIGS.resolve() or file.stem == "default":
        return text
    about, *_ = ast.parse(text).body  # all of them have a docstring
    rest = "".join(text.splitlines(keepends=True)[about.end_lineno :])
    return f'''"""A config of my own, begun as a copy of ple_jax's `{file.stem}`.

The data are c.task.train and c.task.heldout, with c.task.chat and c.task.columns; the rules c.principles; the reward
c.reward.name and c.reward.kwargs; the model c.model.path. Every key, with its default, is in ple_jax's configs/default.py.
"""
{rest}'''


class _Fallback:
    """An import finder for `configs` and `configs.NAME`, used last: a user's own package of that name goes first."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name == "configs":
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(CONFIGS)]
            return spec
        package, _, config = name.partition(".")
        if package == "configs" and config in names("configs", ".py"):
            return importlib.util.spec_from_file_location(name, CONFIGS / f"{config}.py")
        return None


def importable() -> None:
    """Makes `from configs import default` work from here on, wherever the importing file lies, installed or not."""
    if _Fallback not in sys.meta_path:
        sys.meta_path.append(_Fallback)
