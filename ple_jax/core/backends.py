"""The backends: where they are, and what a module of one offers."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from ple_jax.core.types import Backend, Query

BACKENDS = {"jax": "ple_jax.backend.backend", "torch": "torch_ascend.backend"}  # --backend and the module behind it
TOPOLOGIES = {"jax": "ple_jax.planning.topology", "torch": "torch_ascend.topology"}  # and the one behind --topology
REWARD_MODELS = {"jax": "ple_jax.backend.reward_model", "torch": "torch_ascend.reward_model"}  # and what scores by a head

Loaded = TypeVar("Loaded")  # a base model that was read: its tokenizer, its shapes, its weights
Made = TypeVar("Made", bound=Backend)


class BackendModule(Protocol[Loaded, Made]):
    """How a backend is made from a config. A module of functions satisfies it; mypy checks both."""

    def load(self, config: Any) -> Loaded:
        """Weights, model config and tokenizer of `config.model`; no weight is on a device yet.

        Raises:
            UserError: a mesh or a device that is not there, a model that cannot be read; before any weight is.
        """
        ...

    def fast_dtype(self, config: Any) -> str:
        """What `config.model.dtype` of "auto" is on this config's devices: bfloat16 where they compute faster in it, or
        float32.

        Raises:
            UserError: a device that is not there.
        """
        ...

    def count(self, config: Any, loaded: Loaded) -> tuple[int, int]:
        """Parameters of the base and of the adapter; reads shapes alone."""
        ...

    def transposed(self, loaded: Loaded) -> bool:
        """Whether the base keeps its linear weights as [in, out]."""
        ...

    def build(self, config: Any, loaded: Loaded, *, head: str | None = None) -> Made:
        """The backend, base and adapter on the devices.

        Args:
            head: the name of a head that is trained beside the adapter ("value"), or alone ("score"); None: there is none.
        """
        ...

    def notes(self, backend: Made) -> list[str]:
        """What a user should know before the run starts, a line each."""
        ...


class Needs(NamedTuple):
    """What a run would need of a device."""

    memory: int | None  # bytes that may be filled; None: not limited
    reading: int  # rows whose arithmetic takes as long as reading the weights once does
    sampling: Callable[[int], int]  # bytes where so many rows are decoded at once
    training: Callable[[int], int]  # bytes where a pass of an optimiser step has so many queries


class TopologyModule(Protocol):
    """How `--mode=plan --topology` counts what a run needs of devices that are not there."""

    def report(
        self,
        config: Any,
        topology: str,
        *,
        algorithm: Any,
        train_set: Sequence[Query],
        heldout: Sequence[Query],
        principles: str,
        write: Callable[[str], None] = ...,
    ) -> Any:
        """Writes what every phase needs of a device and whether it fits; returns what was counted.

        Args:
            topology: kind and number of devices, as the module knows them.
            algorithm: as `algorithms.load` gives it.
            write: takes one line at a time.

        Raises:
            UserError: an unknown topology, a mesh that does not take its devices, a model that is not supported.
        """
        ...

    def needs(self, config: Any, topology: str | None, *, algorithm: Any, source: Any, sizes: Any) -> Needs:
        """What `config.sampling.width` and `config.optimizer.micro_queries` of "auto" are fitted to.

        Args:
            topology: as `report` takes it; None: the devices of this machine.
            source, sizes: the model and the lengths, as `planning.outline` has them.

        Raises:
            UserError: as `report`.
        """
        ...


def load(name: str) -> BackendModule[Any, Any]:
    """The module of `--backend=name`: its framework is imported here and not before."""
    return cast(BackendModule, importlib.import_module(BACKENDS[name]))


def load_topology(name: str) -> TopologyModule:
    """The module behind `--topology` of `--backend=name`."""
    return cast(TopologyModule, importlib.import_module(TOPOLOGIES[name]))
