"""Reads parts of a decoder's weights, and of the stored tensors only the data that these parts consist of.

Where a model is sharded over many hosts, each host needs a part of every kernel. Which stored rows a kernel's outputs come
from is found with `layout.fuse` itself, by fusing row numbers in place of weights. A kernel's inputs have the same order as
those of the stored tensors.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ple_jax.models import layout
from ple_jax.models.config import ModelConfig
from ple_jax.models.families import FAMILIES

Index = tuple[slice, ...]
SUFFIX = {"scale": "weight", "bias": "bias", "kernel": "weight"}  # of a leaf's kind: Hugging Face's


@runtime_checkable
class Sliced(Protocol):
    """Weights whose tensors can be read in part."""

    def part(self, name: str, index: Index) -> np.ndarray:
        """Returns `weights[name][index]`; the slices have no step."""
        ...


def part(
    c: ModelConfig,
    weights: Mapping[str, np.ndarray],
    path: tuple[str, ...],
    layer: int,
    index: Index,
    shape: tuple[int, ...],
) -> np.ndarray:
    """Reads a part of one leaf of the base weights.

    Args:
        path: path of the leaf in the base's pytree, without the layer: ("embed",), ("norm", "scale"), ("qkv", "kernel") ...
        layer: number of the layer; ignored for a leaf outside the layers.
        index: one slice for each dimension of the leaf.
        shape: shape of the whole leaf.
    """
    family = FAMILIES[c.family]
    index = tuple(slice(*s.indices(size)) for s, size in zip(index, shape, strict=True))
    if len(path) == 1 or path[0] == "norm":
        return _read(weights, top(c, path), index)
    module, kind = path
    prefix = f"{family.layers}.{layer}."
    if module == "experts":
        return _experts(c, weights, prefix, kind, index)
    if (own := {**family.norms, **family.qk_norms}.get(module)) is not None:
        return weights[f"{prefix}{own}.{SUFFIX[kind]}"].reshape(shape)[index]  # small, and perhaps a head a row
    return _fused(c, weights, prefix, module, kind, index, shape)


def top(c: ModelConfig, path: Sequence[str]) -> str:
    """Returns Hugging Face's name of a weight outside the layers; `path` is its path in the base's pytree."""
    return f"{getattr(FAMILIES[c.family], path[0])}.{SUFFIX[path[1]] if len(path) > 1 else 'weight'}"


def spread_axis(c: ModelConfig, path: tuple[str, ...], dimensions: int) -> int:
    """Returns the dimension along which parts of a leaf are read fastest, given how many dimensions the leaf has.

    Along this dimension the rows of the stored tensors lie one after the other.
    """
    if len(path) == 1 or path[0] == "norm" or dimensions == 1:
        return 0
    if path[0] == "experts":
        return 1 if path[1] == "router" else 0
    return 0 if FAMILIES[c.family].transposed and path[1] == "kernel" else dimensions - 1


def _read(weights: Mapping[str, np.ndarray], name: str, index: Index) -> np.ndarray:
    return weights.part(name, index) if isinstance(weights, Sliced) else weights[name][index]


def _experts(c: ModelConfig, weights: Mapping[str, np.ndarray], prefix: str, kind: str, index: Index) -> np.ndarray:
    name = FAMILIES[c.family].experts[kind]
    if kind == "router":
        return _read(weights, f"{prefix}{name}.weight", index[::-1]).T
    numbers = range(c.experts)[index[0]]
    return np.stack([_read(weights, f"{prefix}{name.format(i)}.weight", index[:0:-1]).T for i in numbers])


def _fused(
    c: ModelConfig, weights: Mapping[str, np.ndarray], prefix: str, kernel: str, kind: str, index: Index,
    shape: tuple[int, ...],
) -> np.ndarray:  # fmt: skip
    """Reads a part of a kernel [in, *out] or a bias [*out] from the rows of the modules that are fused in it."""
    outputs = 1 if kind == "kernel" else 0  # its first dimension that is one of outputs
    rows, starts = _sources(c, kernel)
    wanted = rows.reshape(shape[outputs:])[index[outputs:]]
    flat, found = wanted.reshape(-1), None
    for module, (start, end) in starts.items():
        mine = np.flatnonzero((flat >= start) & (flat < end))
        for run in _runs(flat[mine]):
            at = mine[run]
            some = slice(int(flat[at[0]]) - start, int(flat[at[-1]]) - start + 1)
            read = _of_module(c, weights, f"{prefix}{module}.{SUFFIX[kind]}", kind, some, index[0])
            if found is None:
                found = np.zeros((*read.shape[:-1], flat.size), read.dtype)
            found[..., at] = read
    assert found is not None, "a kernel has at least one module"
    return found.reshape(*found.shape[:-1], *wanted.shape)


def _of_module(
    c: ModelConfig, weights: Mapping[str, np.ndarray], name: str, kind: str, rows: slice, inputs: slice
) -> np.ndarray:
    """Reads some outputs of a module: [in, rows] of its weight, or [rows] of its bias."""
    if kind == "bias":
        return _read(weights, name, (rows,))
    if FAMILIES[c.family].transposed:
        return _read(weights, name, (inputs, rows))
    return _read(weights, name, (rows, inputs)).T


@functools.lru_cache
def _sources(c: ModelConfig, kernel: str) -> tuple[np.ndarray, dict[str, tuple[int, int]]]:
    """Assigns numbers, from 1 on, to the rows of the modules in a kernel.

    Returns:
        For every output of the kernel the number of the row that it comes from, or 0 for none; and by module the first of
        its numbers and the end after its last.
    """
    starts: dict[str, tuple[int, int]] = {}
    first = f"{FAMILIES[c.family].layers}.0."
    end = 1
    for path, module, _, out in layout.module_shapes(c):
        if path.startswith(first) and module.kernel == kernel:
            starts[module.name] = (end, end + out)
            end += out
    numbers = {name: np.arange(*span) for name, span in starts.items()}
    return np.asarray(layout.fuse(c, kernel, numbers)), starts


def _runs(numbers: np.ndarray) -> list[slice]:
    """Splits ascending numbers into slices whose neighbours differ by one."""
    if not numbers.size:
        return []
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    edges: list[Any] = [0, *cuts.tolist(), len(numbers)]
    return [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
