"""Code of the user's own, named in a config: a Python file or a dotted path."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from ple_jax.core.config import UserError


def load_module(name: str, key: str) -> ModuleType:
    """The module of a file `my_variant.py` or of a dotted path; `key` is the config key that names it, for the error.

    Raises:
        UserError: it does not import, whatever the reason.
    """
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        if spec is None or spec.loader is None:
            raise ImportError(f"{name} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.path.append(str(Path(name).resolve().parent))  # for what lies beside it
        sys.modules.setdefault(spec.name, module)  # where dataclasses and pickle look a module up
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    except Exception as error:  # the code is the user's: anything may come out of it
        raise UserError(f"config.{key} {name!r} does not import: {type(error).__name__}: {error}") from error
