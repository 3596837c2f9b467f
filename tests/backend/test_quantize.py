"""Quantised kernels: levels from their definition, error bounds against float64, and the ways the decoder uses them."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import qwix
import tiny
from flax import nnx
from jax.sharding import NamedSharding

from ple_jax.backend import sharding
from ple_jax.backend.model import Model, fill
from ple_jax.backend.quantize import dequantize, project, quantize, shapes
from ple_jax.core.errors import UserError

KINDS = ("int8", "nf4")
BF16_STEP = 2.0**-8  # largest relative error of a cast to bfloat16


def kernel(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def expanded(quantised: qwix.QArray) -> np.ndarray:
    """The definition, in float64 numpy: level (or integer) times its block's scale."""
    values = np.asarray(quantised.qvalue).astype(np.int64)
    scale = np.asarray(quantised.scale).astype(np.float64)
    block = values.shape[0] // scale.shape[0]
    levels = normal_float_levels()[values] if quantised.qtype == "nf4" else values
    return levels * np.repeat(scale, block, 0)


def normal_float_levels() -> np.ndarray:
    """NF4 as QLoRA defines it: quantiles of the normal, 8 of the positive half and 7 of the negative one, and 0."""
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2  # 0.9677083, the outermost quantile
    positive = [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    return np.sort(np.array([*negative, 0.0, *positive])) / max(positive)


def test_levels_of_nf4():
    levels = np.asarray(dequantize(qwix.QArray(jnp.arange(16, dtype=jnp.uint4), jnp.ones(1), qtype="nf4"), jnp.float32))
    np.testing.assert_allclose(levels, normal_float_levels(), atol=2e-7)
    # the printed table, arXiv:2305.14314 appendix E
    paper = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    np.testing.assert_array_equal(levels, np.array(paper, np.float32))
    # weights that are levels come back as they are: the library quantises to the same table
    weights = np.tile(levels[:, None], (4, 3))
    np.testing.assert_array_equal(dequantize(quantize(weights, "nf4"), jnp.float32), weights)


@pytest.mark.parametrize("fn", [dequantize, jax.jit(dequantize, static_argnums=1)], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(128, 24), (192, 2, 40), (48, 8), (32, 5)], ids=str)
def test_dequantize_is_the_definition(kind, shape, fn):
    quantised = quantize(kernel(*shape), kind)
    np.testing.assert_allclose(fn(quantised, jnp.float32), expanded(quantised), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(128, 24), (192, 2, 40)], ids=str)
def test_int8_is_within_half_a_step(shape):
    exact = kernel(*shape).astype(np.float64)
    quantised = quantize(kernel(*shape), "int8")
    assert quantised.qvalue.dtype == np.int8 and quantised.scale.shape == (1, *shape[1:])
    step = np.abs(exact).max(0, keepdims=True) / 127.5
    assert (np.abs(expanded(quantised) - exact) <= 0.5001 * step).all()
    assert np.linalg.norm(expanded(quantised) - exact) / np.linalg.norm(exact) < 0.01


@pytest.mark.parametrize("shape", [(128, 24), (192, 2, 40)], ids=str)
def test_nf4_takes_the_nearest_level(shape):
    exact = kernel(*shape).astype(np.float64)
    quantised = quantize(kernel(*shape), "nf4")
    assert quantised.qvalue.dtype == ml_dtypes.uint4 and quantised.scale.shape == (shape[0] // 64, *shape[1:])
    blocks = exact.reshape(-1, 64, *shape[1:])
    largest = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs(blocks[..., None] / largest[..., None] - normal_float_levels()).argmin(-1)
    # but where a weight is halfway between two levels up to fp32's rounding
    assert np.mean(nearest.reshape(shape) != np.asarray(quantised.qvalue).astype(int)) < 1e-3
    widest = np.diff(normal_float_levels()).max() / 2
    error = np.abs(expanded(quantised).reshape(blocks.shape) - blocks)
    assert (error <= largest * (widest + BF16_STEP)).all()
    # normal weights in blocks of 64; SmolLM2's own kernels: 9.4 %
    assert 0.08 < np.linalg.norm(error) / np.linalg.norm(exact) < 0.10


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_constants(kind):
    weights = np.zeros((128, 4), np.float32)
    weights[:, 1], weights[:, 2], weights[64:, 3] = 0.5, -3.0, 1e-30
    result = np.asarray(dequantize(quantize(weights, kind), jnp.float32))
    assert np.isfinite(result).all()
    np.testing.assert_array_equal(result[:, 0], 0)
    np.testing.assert_array_equal(result[:64, 3], 0)
    # int8's outermost step is half a step from the largest weight
    np.testing.assert_allclose(result[:, 1:3], weights[:, 1:3], rtol=0.5 / 127 if kind == "int8" else 0)
    np.testing.assert_allclose(result[64:, 3], 0, atol=1e-30)


def test_an_outlier_costs_its_own_channel_or_block_alone():
    weights, spoilt = kernel(256, 6), kernel(256, 6)
    spoilt[70, 2] = 1000.0
    for kind in KINDS:
        before, after = (np.asarray(dequantize(quantize(w, kind), jnp.float32)) for w in (weights, spoilt))
        same = np.ones((256, 6), bool)
        same[slice(None) if kind == "int8" else slice(64, 128), 2] = False
        np.testing.assert_array_equal(after[same], before[same])
        assert after[70, 2] == pytest.approx(1000, rel=0.5 / 127)
        assert np.abs(after[~same]).sum() == pytest.approx(after[70, 2])  # the others are nearer to 0 than to a level


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "fp16"])
def test_half_precision_weights_are_quantised_in_fp32(kind, dtype):
    weights = kernel(128, 16).astype(dtype)
    ours, expected = quantize(weights, kind), quantize(weights.astype(np.float32), kind)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_layers_are_quantised_one_by_one(kind):
    stack = kernel(3, 128, 2, 8)
    together = quantize(stack, kind, axis=1)
    alone = jax.tree.map(lambda *parts: np.stack(parts), *[quantize(layer, kind) for layer in stack])
    assert jax.tree.structure(together) == jax.tree.structure(alone)
    jax.tree.map(np.testing.assert_array_equal, together, alone)
    abstract = shapes(jax.ShapeDtypeStruct(stack.shape, jnp.bfloat16), kind, axis=1)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), together)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8 + 32 / 1024), ("nf4", 4.25)])
def test_bits_a_weight_on_the_device(kind, bits):
    quantised = quantize(kernel(1024, 256), kind)
    memory = jax.jit(lambda k: (k.qvalue, k.scale)).lower(quantised).compile().memory_analysis()
    assert memory.argument_size_in_bytes * 8 / (1024 * 256) == pytest.approx(bits, rel=1e-3)


@pytest.mark.parametrize("fn", [project, jax.jit(project)], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", KINDS)
def test_project_and_its_gradient(kind, fn):
    quantised, x, g = quantize(kernel(128, 2, 24), kind), kernel(3, 5, 128, seed=1), kernel(3, 5, 2, 24, seed=2)
    exact = expanded(quantised)
    np.testing.assert_allclose(fn(x, quantised), np.tensordot(x.astype(np.float64), exact, 1), rtol=1e-4, atol=1e-4)
    _, pull = jax.vjp(lambda x: fn(x, quantised), x)
    np.testing.assert_allclose(pull(g)[0], np.einsum("btcd,icd->bti", g.astype(np.float64), exact), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_the_scales(kind):
    quantised, x = quantize(kernel(128, 24), kind), kernel(4, 128, seed=1)
    loss = jax.jit(lambda scale: project(x, qwix.QArray(quantised.qvalue, scale, qtype=quantised.qtype)).sum())
    scale = jnp.asarray(quantised.scale)
    np.testing.assert_array_equal(jax.grad(loss)(scale), jnp.zeros_like(scale))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_activations(kind):
    quantised, x = quantize(kernel(256, 32), kind), jnp.asarray(kernel(4, 256, seed=1), jnp.bfloat16)
    y = jax.jit(project)(x, quantised)
    assert y.dtype == jnp.float32
    expected = np.asarray(x).astype(np.float64) @ expanded(quantised)
    # a sum of 256 products, of weights that are rounded once each
    np.testing.assert_allclose(np.asarray(y).astype(np.float64), expected, atol=4 * BF16_STEP * 256**0.5, rtol=BF16_STEP)


@pytest.mark.parametrize("kind", KINDS)
def test_expanded_kernels_are_not_kept_for_the_backward_pass(kind):
    layers = quantize(0.1 * kernel(16, 256, 256), kind, axis=1)
    x = jnp.ones((2, 256))

    def loss(x):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(project(x, layer)), None), x, layers)[0].sum()

    _, pull = jax.vjp(loss, x)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))
    assert kept < 1.5 * 16 * 256 * 256  # the stored kernels (a byte a weight here), not 4 bytes a weight beside them
    expected = x
    for i in range(16):
        expected = jnp.tanh(project(expected, jax.tree.map(lambda part, i=i: part[i], layers)))
    np.testing.assert_allclose(jax.jit(loss)(x), expected.sum(), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_equals_unsharded_and_kernels_stay_sharded(kind):
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    quantised, x = quantize(kernel(256, 2, 64), kind), kernel(8, 256, seed=1)

    def put(part: np.ndarray) -> jax.Array:
        place = sharding.spec("layers/gate_up/kernel", part.shape, mesh, kv_heads=1)
        return jax.device_put(part, NamedSharding(mesh, place))

    placed = jax.tree.map(put, quantised)
    assert placed.qvalue.addressable_shards[0].data.shape == (128, 2, 16)
    assert placed.scale.addressable_shards[0].data.shape == ((1 if kind == "int8" else 2), 2, 16)
    rows = jax.device_put(x, sharding.rows(mesh, 2))
    np.testing.assert_allclose(jax.jit(project)(rows, placed), project(x, quantised), rtol=1e-5, atol=1e-5)
    whole = jax.jit(dequantize, static_argnums=1)
    np.testing.assert_array_equal(whole(placed, jnp.float32), dequantize(quantised, jnp.float32))
    assert "all-gather" not in whole.lower(placed, jnp.float32).compile().as_text()  # as it is in qwix.dequantize


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_in_the_place_of_a_kernel_in_an_nnx_state(kind, scan):
    """As the decoder does it: split, weights replaced by quantised ones, merged inside jit, scanned or not."""

    class Layer(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.zeros((64, 64)))

        def __call__(self, x):
            return jnp.tanh(project(x, self.w[...]))

    class Stack(nnx.Module):
        def __init__(self):
            self.layers = nnx.vmap(lambda _: Layer())(jnp.zeros(3)) if scan else nnx.List([Layer() for _ in range(3)])

    graph, _ = nnx.split(nnx.eval_shape(Stack))
    weights, x = 0.2 * kernel(3, 64, 64), kernel(5, 64, seed=1)
    each = [quantize(w, kind) for w in weights]
    base = {"layers": {"w": quantize(weights, kind, axis=1)} if scan else {i: {"w": q} for i, q in enumerate(each)}}

    @jax.jit
    def run(base, x):
        leaves = jax.tree.map(nnx.Param, base, is_leaf=lambda leaf: isinstance(leaf, qwix.QArray))
        stack = nnx.merge(graph, nnx.State(leaves))
        if not scan:
            for layer in stack.layers:
                x = layer(x)
            return x
        layer_graph, state = nnx.split(stack.layers)
        return jax.lax.scan(lambda x, part: (nnx.merge(layer_graph, part)(x), None), x, state)[0]

    expected = x.astype(np.float64)
    for q in each:
        expected = np.tanh(expected @ expanded(q))
    np.testing.assert_allclose(run(base, x), expected, atol=1e-5)


def test_logits_of_a_model():
    """Through the decoder: 8 bits move the logits by about a percent, 4 bits by more."""
    model = Model.create(tiny.CONFIG, scan=False)
    apply = jax.jit(model.apply)
    tensors = tiny.weights()
    tokens = np.random.default_rng(3).integers(1, tiny.CONFIG.vocab_size, (4, 12))
    positions = np.tile(np.arange(12), (4, 1))
    mask = np.tile(np.tril(np.ones((12, 12), bool)), (4, 1, 1))

    def logits(kind: str | None) -> np.ndarray:
        def put(name: str, array: np.ndarray) -> jax.Array:
            if kind and array.ndim > 1 and name.startswith("layers/"):
                return dequantize(quantize(array, kind), jnp.float32)
            return jnp.asarray(array)

        base = fill(model, tensors, put)
        hidden, _ = apply(base, {}, tokens, positions=positions, mask=mask)
        return np.asarray(model.logits(base, hidden))

    exact = logits(None)
    error = {kind: np.abs(logits(kind) - exact).mean() / exact.std() for kind in KINDS}
    assert 0 < error["int8"] < 0.05 and error["int8"] < error["nf4"] < 0.5, error


def test_what_cannot_be_quantised():
    with pytest.raises(UserError, match="multiple of 16, this one's is 100; quantise to int8"):
        quantize(kernel(100, 8), "nf4")
    with pytest.raises(UserError, match="'int3'; choose int8 or nf4"):
        quantize(kernel(64, 8), "int3")
    assert quantize(kernel(100, 8), "int8").qvalue.shape == (100, 8)
