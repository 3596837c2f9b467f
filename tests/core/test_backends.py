"""Both backends are what the modes take them for: mypy reads this file."""

import ast
import sys
import types
from pathlib import Path

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


def names(file: Path) -> list[str]:
    """Functions and classes of a file, and the methods of its classes, in their order."""
    found = []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append(node.name.replace("JaxBackend", "TorchBackend"))
        if isinstance(node, ast.ClassDef):
            found += [f"{found[-1]}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)]
    return found


@pytest.mark.parametrize(
    ("file", "shared"),
    [
        ("attention", ["attend_cache"]),
        ("backend", ["load", "fast_dtype", "count", "transposed", "make_model", "notes", "build"]),
        ("checkpoint", ["save", "restore"]),
        ("forward", ["token_logprobs", "token_entropy", "visible", "hidden_states", "predicting", "outputs"]),
        ("generate", ["filter_probabilities", "invert_cdf", "sample_token", "read_prefix", "begin", "stream"]),
        ("lora", ["magnitudes"]),
        ("model", ["Cache", "Model", "fill"]),
        ("reward_model", ["classifier"]),
        ("sharding", ["make_mesh", "row_multiple"]),
        ("train", ["optimizer", "gradients", "apply_gradients"]),
    ],
)
def test_the_backends_are_twins(file: str, shared: list[str]) -> None:
    """Files of the same names, and in them what does the same under the same name, in the same order."""
    root = Path(__file__).parents[2]
    on_jax, on_torch = (names(root / folder / f"{file}.py") for folder in ("ple_jax/backend", "torch_ascend"))
    both = [name for name in on_jax if name in on_torch]
    assert both == [name for name in on_torch if name in on_jax]
    assert [name for name in both if name in shared] == shared
