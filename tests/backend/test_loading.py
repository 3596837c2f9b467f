"""Filling the decoder: the same weights in every layout and dtype, sharded by the rules, one kernel on the host at once."""

import gc
import importlib.util
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec
from qwix import QArray
from speed import quick

from ple_jax.backend import sharding
from ple_jax.backend.model import Model, fill
from ple_jax.backend.quantize import quantize
from ple_jax.models.families import read
from ple_jax.models.layout import expected_shapes

CONFIG = read(tiny.RAW | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}, "test")  # 64: nf4's blocks
MESHES = {"one device": {}, "fsdp and tensor": {"fsdp": 4, "tensor": 2}, "tensor does not divide": {"tensor": 8}}

spec = importlib.util.spec_from_file_location("load_memory", Path(__file__).parents[2] / "scripts" / "load_memory.py")
load_memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(load_memory)


def placing(mesh):
    def put(name, array):
        spec = sharding.spec(name, array.shape, mesh, kv_heads=CONFIG.num_kv_heads)
        return jax.device_put(array, NamedSharding(mesh, spec))

    return put


def by_hand(tensors, layer: int) -> dict[str, np.ndarray]:
    """One layer's kernels, written out: KV heads with their queries, keys and values; gate before up."""

    def get(name):
        return tensors[f"model.layers.{layer}.{name}.weight"].T

    dim, group = CONFIG.head_dim, CONFIG.num_heads // CONFIG.num_kv_heads
    heads = []
    for kv in range(CONFIG.num_kv_heads):
        heads.append(get("self_attn.q_proj")[:, kv * group * dim : (kv + 1) * group * dim])
        heads += [get(f"self_attn.{x}_proj")[:, kv * dim : (kv + 1) * dim] for x in "kv"]
    return {
        "qkv": np.concatenate(heads, 1),
        "o": get("self_attn.o_proj"),
        "gate_up": np.stack([get("mlp.gate_proj"), get("mlp.up_proj")], 1),
        "down": get("mlp.down_proj"),
    }


@pytest.mark.parametrize("stored", quick([np.float32, ml_dtypes.bfloat16, np.float16], ml_dtypes.bfloat16))
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scan", [False, True])
def test_values_and_dtypes(scan, dtype, stored):
    tensors = {name: value.astype(stored) for name, value in tiny.weights(CONFIG).items()}
    model = Model.create(CONFIG, dtype=dtype, scan=scan)
    base = fill(model, tensors, lambda _, array: jnp.asarray(array))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), base) == jax.tree.map(lambda x: (x.shape, x.dtype), model.shapes)
    np.testing.assert_array_equal(base["embed"], tensors["model.embed_tokens.weight"].astype(dtype))
    np.testing.assert_array_equal(base["head"], tensors["lm_head.weight"].astype(dtype))
    for i in range(CONFIG.num_layers):
        layer = jax.tree.map(lambda x, i=i: x[i], base["layers"]) if scan else base["layers"][i]
        for name, kernel in by_hand(tensors, i).items():
            np.testing.assert_array_equal(layer[name]["kernel"], kernel.astype(dtype), err_msg=f"{i} {name}")
        norm = tensors[f"model.layers.{i}.post_attention_layernorm.weight"]
        np.testing.assert_array_equal(layer["pre_mlp_norm"]["scale"], norm.astype(dtype))


@pytest.mark.parametrize("mesh", quick(MESHES.values(), MESHES["fsdp and tensor"]), ids=MESHES)
@pytest.mark.parametrize("kind", quick(["none", "int8", "nf4"], "nf4"))
def test_a_stack_is_sharded_as_one_array_would_be(mesh, kind):
    """Also its values and scales; the dimension of the layers is whole everywhere."""
    mesh, tensors = sharding.make_mesh(**mesh), tiny.weights(CONFIG)
    model = Model.create(CONFIG, scan=True)
    base = fill(model, tensors, placing(mesh), quantize=kind)
    plain = fill(Model.create(CONFIG, scan=False), tensors, lambda _, array: jnp.asarray(array), quantize=kind)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(base):
        path = [str(k.key) for k in keys if hasattr(k, "key")]
        name = "/".join(path)
        if path[0] == "layers" and path[-1] in ("qvalue", "scale") and path[-2] == "kernel":
            name = "/".join(path[:-1])
        expected = NamedSharding(mesh, sharding.spec(name, leaf.shape, mesh, kv_heads=CONFIG.num_kv_heads))
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), (name, leaf.sharding, expected)
    stacked = jax.tree.map(lambda *x: np.stack(x), *(plain["layers"][i] for i in range(CONFIG.num_layers)))
    jax.tree.map(np.testing.assert_array_equal, base["layers"], stacked)


@pytest.mark.parametrize("kind", quick(["int8", "nf4"], "int8"))
@pytest.mark.parametrize("scan", [False, True])
def test_quantised_while_loading_is_quantised_afterwards(scan, kind):
    tensors, model = tiny.weights(CONFIG), Model.create(CONFIG, dtype=jnp.bfloat16, scan=scan)
    loaded = {}

    def put(name, array):
        loaded.setdefault(name, set()).add(str(array.dtype))
        return jnp.asarray(array)

    base = fill(model, tensors, put, quantize=kind)
    for i in range(CONFIG.num_layers):
        layer = jax.tree.map(lambda x, i=i: x[i], base["layers"]) if scan else base["layers"][i]
        for name, kernel in by_hand(tensors, i).items():
            found, expected = layer[name]["kernel"], quantize(kernel, kind)
            assert isinstance(found, QArray) and found.qtype == expected.qtype
            jax.tree.map(np.testing.assert_array_equal, found, expected)
    values, scales = {"int8": ("int8", "float32"), "nf4": ("uint4", "bfloat16")}[kind]
    assert loaded["layers/down/kernel"] == {values, scales}  # not cast to the model's dtype
    assert loaded["embed"] == loaded["head"] == loaded["layers/pre_mlp_norm/scale"] == {"bfloat16"}


class Counted(Mapping):
    """Weights made on access, as they are read from disk; counts how often."""

    def __init__(self, config, dtype):
        self.shapes, self.dtype, self.taken = expected_shapes(config), dtype, dict.fromkeys(expected_shapes(config), 0)

    def __getitem__(self, name):
        self.taken[name] += 1
        return np.full(self.shapes[name], 0.5, self.dtype)

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(np.float32, np.float32), pytest.param(ml_dtypes.bfloat16, ml_dtypes.bfloat16, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("scan", quick([False, True], True))
def test_one_kernel_on_the_host(scan, stored, dtype):
    """numpy's own memory at its peak: some copies of the largest kernel, of a model that is 45 times as large."""
    config = read(tiny.RAW | {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32, "num_hidden_layers": 24}, "test")
    model, weights = Model.create(config, dtype=dtype, scan=scan), Counted(config, stored)
    item = np.dtype(stored).itemsize
    kernel = 2 * 128 * 512 * item  # gate and up
    total = sum(int(np.prod(shape)) for shape in weights.shapes.values()) * item

    def put(_, array):  # a copy, as on an accelerator: on the CPU jax may keep numpy's memory
        return jnp.array(array, copy=True)

    fill(model, weights, put)  # compiles
    gc.collect()
    tracemalloc.start()
    try:
        fill(model, weights, put)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert set(weights.taken.values()) == {2}  # each tensor once per load
    assert total > 36 * kernel and peak < 4 * kernel, (peak / kernel, total / kernel)


def test_stacks_are_written_in_place(monkeypatch):
    """The stack keeps its place in memory from the first layer to the last."""
    from ple_jax.backend import model

    places: dict[tuple, set[int]] = {}
    wait = jax.block_until_ready

    def watch(tree):
        tree = wait(tree)
        for x in jax.tree.leaves(tree):
            if x.ndim == 3 and x.shape[0] == CONFIG.num_layers:
                places.setdefault(x.shape, set()).add(x.unsafe_buffer_pointer())
        return tree

    monkeypatch.setattr(model.jax, "block_until_ready", watch)
    base = fill(Model.create(CONFIG, scan=True), tiny.weights(CONFIG), lambda _, array: jnp.asarray(array))
    assert base["layers"]["qkv"]["kernel"].shape in places
    assert all(len(pointers) == 1 for pointers in places.values()), places


def test_the_stack_of_a_single_device_stays_there():
    device = jax.devices()[3]
    base = fill(Model.create(CONFIG, scan=True), tiny.weights(CONFIG), lambda _, array: jax.device_put(array, device))
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(base))


@pytest.mark.slow
def test_the_script_that_measures_it(tmp_path):
    """At this size the interpreter's own memory weighs too much to demand a ratio."""
    load_memory.write(tmp_path / "model", "bfloat16", 0.15)
    command = [sys.executable, load_memory.__file__, "--measure", str(tmp_path / "model"), "bfloat16", "scan"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""}, check=True)
    found = json.loads(run.stdout)
    assert found["size"] == pytest.approx(0.15e9, rel=0.15) and found["size"] < found["peak"] < 3 * found["size"], found


def test_specs_of_a_layer_and_of_a_stack_agree():
    """What `fill` relies on: a rule says nothing about the dimension of the layers."""
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    for name in sharding.RULES:
        if not name.startswith("layers/"):
            continue
        shape = tuple(8 * (i + 1) for i in range(len(sharding.RULES[name])))
        one, stack = (sharding.spec(name, s, mesh, kv_heads=2) for s in (shape, (3, *shape)))
        assert stack == PartitionSpec(None, *one)
