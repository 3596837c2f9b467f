"""The backends: where their modules are, and which functions such a module offers."""

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
    """The functions that make a backend from a config. A module of functions satisfies it; mypy checks both backends."""

    def load(self, config: Any, *, planned: bool = False) -> Loaded:
        """Reads weights, model config and tokenizer of `config.model`; puts no weight on a device yet.

        Args:
            planned: whether nothing will be computed: the devices of a mesh may then be those of other machines.

        Raises:
            UserError: the mesh or the device is not there, or the model cannot be read. No weight has been read then.
        """
        ...

    def fast_dtype(self, config: Any) -> str:
        """Returns what "auto" in `config.model.dtype` means on this config's devices.

        It is "bfloat16" where they compute faster in it, otherwise "float32".

        Raises:
            UserError: the device is not there.
        """
        ...

    def count(self, config: Any, loaded: Loaded) -> tuple[int, int]:
        """Returns the numbers of parameters of the base and of the adapter; only shapes are read."""
        ...

    def transposed(self, loaded: Loaded) -> bool:
        """Says whether the base keeps its linear weights as [in, out]."""
        ...

    def build(self, config: Any, loaded: Loaded, *, head: str | None = None) -> Made:
        """Builds the backend, with the base and the adapter on the devices.

        Args:
            head: the name of a head that is trained beside the adapter ("value"), or alone ("score"); None for no head.
        """
        ...

    def notes(self, backend: Made) -> list[str]:
        """Returns what a user should know before the run starts, one line per entry."""
        ...


class Needs(NamedTuple):
    """What a run would need of a device, as far as a fitting `sampling.width` and `optimizer.micro_queries` depend on it."""

    memory: int | None  # bytes that may be filled; None: not limited
    reading: int  # rows whose arithmetic takes as long as reading the weights once does
    sampling: Callable[[int], int]  # bytes where so many rows are decoded at once
    training: Callable[[int], int]  # bytes where a pass of an optimiser step has so many queries


class TopologyModule(Protocol):
    """The functions behind `--mode=plan --topology`, which count what a run needs of devices that are not there."""

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
        """Writes what every phase needs of a device and whether it fits. Returns what was counted.

        Args:
            topology: the kind and number of devices, as the module knows them.
            algorithm: as `algorithms.load` returns it.
            write: takes one line at a time.

        Raises:
            UserError: the topology is unknown, the mesh does not fit its devices, or the model is not supported.
        """
        ...

    def needs(self, config: Any, topology: str | None, *, algorithm: Any, source: Any, sizes: Any) -> Needs:
        """Computes what `config.sampling.width` and `config.optimizer.micro_queries` are fitted to if they are "auto".

        Args:
            topology: as in `report`; None for the devices of this machine.
            source, sizes: the model and the lengths, as in `planning.outline`.

        Raises:
            UserError: as in `report`.
        """
        ...


def load(name: str) -> BackendModule[Any, Any]:
    """Imports the module of `--backend=name` and returns it. Its framework is imported here and not before."""
    return cast(BackendModule, importlib.import_module(BACKENDS[name]))


def load_topology(name: str) -> TopologyModule:
    """Imports the module behind `--topology` of `--backend=name` and returns it."""
    return cast(TopologyModule, importlib.import_module(TOPOLOGIES[name]))
