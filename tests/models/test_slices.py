"""Parts of weights: the same numbers as the whole has there, of every family, and hardly more bytes than they take."""

import math

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import VARIANTS
from safetensors import safe_open
from speed import quick

from ple_jax.backend.model import Model, fill
from ple_jax.core.errors import UserError
from ple_jax.models import slices, weights
from ple_jax.models.layout import expected_shapes


def place(keys: tuple) -> tuple[int, tuple[str, ...]]:
    """The layer and the path within it of a leaf of the base."""
    path = [str(getattr(key, "key", getattr(key, "idx", key))) for key in keys]
    return (int(path[1]), tuple(path[2:])) if path[0] == "layers" else (0, tuple(path))


def cuts(shape: tuple[int, ...], seed: int) -> tuple[slice, ...]:
    """A slice a dimension: all of it, a half, or what is drawn."""
    draw = np.random.default_rng(seed)
    found = []
    for size in shape:
        low, high = sorted(draw.integers(0, size, 2).tolist())
        found.append((slice(None), slice(0, -(-size // 2)), slice(low, max(high, low + 1)))[draw.integers(3)])
    return tuple(found)


@pytest.mark.parametrize("name", quick(VARIANTS, "gpt2", "gpt_neox", "mixtral", "phi3"))
def test_a_part_is_what_the_whole_has_there(name, tmp_path):
    families.save(families.build(VARIANTS[name]), tmp_path)
    loaded = weights.load(str(tmp_path))
    model = Model.create(loaded.config, dtype=jnp.float32, scan=False)
    base = fill(model, loaded.weights, lambda _, array: np.asarray(array))
    assert isinstance(loaded.weights, slices.Sliced)
    for seed, (keys, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(base)):
        layer, own = place(keys)
        for index in (cuts(leaf.shape, seed), tuple(slice(None) for _ in leaf.shape)):
            found = slices.part(loaded.config, loaded.weights, own, layer, index, leaf.shape)
            np.testing.assert_array_equal(found, leaf[index], err_msg=f"{own} {index}")


def test_weights_that_lie_in_memory_have_parts_too():
    loaded = weights.load("tiny")
    index = (slice(3, 9), slice(0, 16))
    found = slices.part(loaded.config, loaded.weights, ("embed",), 0, index, (258, 32))
    np.testing.assert_array_equal(found, loaded.weights["model.embed_tokens.weight"][index])


def test_what_another_host_has_is_not_read(tmp_path, monkeypatch):
    """Half of the weights are half of the bytes; what is no multiple is everybody's."""
    families.save(families.build(VARIANTS["llama"]), tmp_path)
    loaded = weights.load(str(tmp_path))
    model = Model.create(loaded.config, dtype=jnp.float32, scan=False)
    total = 4 * sum(math.prod(shape) for shape in expected_shapes(loaded.config).values())
    read, fromfile = [], np.fromfile

    def counted(file, dtype, count, offset):
        read.append(count * dtype.itemsize)
        return fromfile(file, dtype, count, offset=offset)

    monkeypatch.setattr(np, "fromfile", counted)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(model.shapes):
        (layer, own), index = place(keys), [slice(None)] * leaf.ndim
        axis = slices.spread_axis(loaded.config, own, leaf.ndim)
        index[axis] = slice(0, leaf.shape[axis] // 2)
        slices.part(loaded.config, loaded.weights, own, layer, tuple(index), leaf.shape)
    assert 0.49 * total < sum(read) < 0.55 * total


def test_a_part_that_is_not_finite_or_not_there_is_named(tmp_path):
    families.save(families.build(VARIANTS["llama"]), tmp_path)
    loaded = weights.load(str(tmp_path))
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    with safe_open(file, framework="numpy") as stored:
        last = max(stored.keys(), key=lambda name: bytes(data).index(stored.get_tensor(name).tobytes()[:64]))
    shape = expected_shapes(loaded.config)[last]
    data[-4:] = b"\xff\xff\xff\xff"
    file.write_bytes(bytes(data))
    with pytest.raises(UserError, match="not finite"):
        loaded.weights.part(last, tuple(slice(None) for _ in shape))
    file.write_bytes(bytes(data[:-8]))
    with pytest.raises(UserError, match="was cut while it was read"):
        loaded.weights.part(last, tuple(slice(None) for _ in shape))
