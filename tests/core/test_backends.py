"""Both backends are what the modes take them for: mypy reads this file."""

import sys
import types

import pytest

import ple_jax.backend.backend
import ple_jax.planning.topology
import torch_ascend.backend
import torch_ascend.topology
from ple_jax.core import backends
from ple_jax.core.backends import BackendModule, TopologyModule
from ple_jax.models.weights import Loaded

# mypy compares every function's signature with the protocol's: what `load` gives is what the others take
ON_JAX: BackendModule[Loaded, ple_jax.backend.backend.JaxBackend] = ple_jax.backend.backend
ON_TORCH: BackendModule[Loaded, torch_ascend.backend.TorchBackend] = torch_ascend.backend
PLANS: tuple[TopologyModule, TopologyModule] = (ple_jax.planning.topology, torch_ascend.topology)


def test_a_backend_is_known_by_its_name() -> None:
    assert backends.load("jax") is ON_JAX and backends.load("torch") is ON_TORCH
    assert (backends.load_topology("jax"), backends.load_topology("torch")) == PLANS


def test_a_backend_is_imported_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "other", "a_module_of_another")
    with pytest.raises(ModuleNotFoundError, match="a_module_of_another"):
        backends.load("other")
    other = types.ModuleType("a_module_of_another")
    monkeypatch.setitem(sys.modules, "a_module_of_another", other)
    assert backends.load("other") is other
