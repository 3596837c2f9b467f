"""PLE (Progressively Label Enhancement) for language models. The functional API, imported when it is first used.

    from ple_jax import generate, losses, lora, pairing, threshold

Importing `ple_jax` imports neither jax nor torch; nor do the neutral parts of it (everything in `core`, and `losses`).
"""

import importlib
from types import ModuleType

_MODULES = {
    # neutral: numpy alone
    "losses": "ple_jax.losses",
    "metrics": "ple_jax.core.metrics",
    "pairing": "ple_jax.core.pairing",
    "prompts": "ple_jax.core.prompts",
    "rewards": "ple_jax.core.rewards",
    "rollouts": "ple_jax.core.rollouts",
    "statistics": "ple_jax.core.statistics",
    "threshold": "ple_jax.core.threshold",
    "types": "ple_jax.core.types",
    # JAX
    "generate": "ple_jax.generate",
    "lora": "ple_jax.lora",
    "models": "ple_jax.models",
    "sharding": "ple_jax.sharding",
    "train": "ple_jax.train",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> ModuleType:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_MODULES)}")
    return importlib.import_module(_MODULES[name])


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
