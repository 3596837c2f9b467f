"""The algorithms: one file each. Here, what an algorithm is, and how one is found by name, path or dotted path."""

from types import ModuleType

from ple_jax.core.errors import UserError
from ple_jax.core.plugins import load_module

_NEEDED = {  # functions of an algorithm that samples, and of one that trains on what the records hold
    False: ("collect", "schedule", "label", "batch", "make_loss", "needs_reference"),
    True: ("NEEDS", "HEAD", "encode", "batches", "batch", "make_loss", "needs_reference", "judge"),
}


def load_algorithm(name: str) -> ModuleType:
    """The module of an algorithm: a name in ple_jax/algorithms, a Python file, or a dotted path.

    Raises:
        UserError: it does not import, or lacks one of the functions that the loop calls.
    """
    own = name.endswith(".py") or "." in name
    module = load_module(name if own else f"ple_jax.algorithms.{name}", "algorithm")
    if missing := [function for function in _NEEDED[is_offline(module)] if not hasattr(module, function)]:
        raise UserError(
            f"config.algorithm {name!r} lacks {', '.join(missing)}; start it with `from ple_jax.algorithms.ple import *`"
        )
    return module


def is_offline(algorithm: ModuleType) -> bool:
    """Whether it samples nothing and trains on examples that it encodes (`ple_jax.training.offline`)."""
    return hasattr(algorithm, "encode")


def has_head(algorithm: ModuleType) -> bool:
    """Whether it trains a score head: the result is a reward model."""
    return head_of(algorithm) == "score"


def head_of(algorithm: ModuleType) -> str | None:
    """The head that is trained beside the adapter, where it has a `HEAD`: "score", or PPO's "value"."""
    return algorithm.HEAD if hasattr(algorithm, "HEAD") else None
