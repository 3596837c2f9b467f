"""PLE (Progressively Label Enhancement) for language models: the functional API, whose modules are imported on first use.

    from ple_jax import generate, losses, lora, pairing, threshold

Importing `ple_jax` imports neither jax nor torch. Of its subpackages only `backend` and a part of `planning` import them.
"""

import importlib
from types import ModuleType

from ple_jax.core.version import VERSION as __version__  # noqa: F401

_MODULES = {
    # neutral: numpy alone
    "losses": "ple_jax.losses",
    "texts": "ple_jax.formulas.texts",
    "pairing": "ple_jax.formulas.pairing",
    "prompts": "ple_jax.prompts",
    "rewards": "ple_jax.rewards",
    "journal": "ple_jax.training.journal",
    "intervals": "ple_jax.formulas.intervals",
    "threshold": "ple_jax.formulas.threshold",
    "types": "ple_jax.core.types",
    # JAX
    "generate": "ple_jax.backend.generate",
    "lora": "ple_jax.backend.lora",
    "models": "ple_jax.models",
    "sharding": "ple_jax.backend.sharding",
    "train": "ple_jax.backend.train",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> ModuleType:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_MODULES)}")
    return importlib.import_module(_MODULES[name])


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
