"""Dots in bfloat16: numbers and gradients against float64, and that a whole training step has no other kind of dot."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_train import negative_likelihood, random_batch

from ple_jax.backend import dots, generate, lora, train
from ple_jax.backend.model import Model
from ple_jax.core.packing import pack
from ple_jax.core.types import Sampling

STEP = 2.0**-8  # largest relative error of a rounding to bfloat16


def drawn(*shape, seed=0, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def exact(x) -> np.ndarray:
    return np.asarray(x, np.float64)


@pytest.mark.parametrize("fn", [dots.project, jax.jit(dots.project)], ids=["eager", "jit"])
def test_a_frozen_kernel(fn):
    x, kernel, g = drawn(3, 5, 64), drawn(64, 2, 24, seed=1), drawn(3, 5, 2, 24, seed=2, dtype=jnp.float32)
    y, pull = jax.vjp(fn, x, kernel)
    assert y.dtype == jnp.float32
    # products of bfloat16 are exact in float32
    np.testing.assert_allclose(exact(y), np.tensordot(exact(x), exact(kernel), 1), atol=1e-4)
    to_x, to_kernel = pull(g)
    assert to_x.dtype == jnp.bfloat16
    np.testing.assert_allclose(exact(to_x), np.einsum("btcd,icd->bti", exact(g), exact(kernel)), atol=3 * STEP * 48**0.5)
    assert not np.asarray(to_kernel, np.float32).any()


def test_a_low_rank_product_has_gradients_in_float32():
    x, down, up = drawn(6, 5, 64), drawn(64, 8, seed=1, dtype=jnp.float32) / 8, drawn(8, 24, seed=2, dtype=jnp.float32)
    y, pull = jax.vjp(dots.low_rank, x, down, up)
    np.testing.assert_allclose(exact(y), exact(x) @ exact(down) @ exact(up), atol=4 * STEP * 8**0.5)
    g = drawn(6, 5, 24, seed=3, dtype=jnp.float32)
    to_x, to_down, to_up = pull(g)
    assert (to_x.dtype, to_down.dtype, to_up.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    back = exact(g) @ exact(up).T
    scale = 24**0.5  # of an entry of `back`, a sum of 24 products
    np.testing.assert_allclose(exact(to_x), back @ exact(down).T, atol=4 * STEP * scale)
    np.testing.assert_allclose(exact(to_down), np.einsum("bti,btr->ir", exact(x), back), atol=4 * STEP * scale * 30**0.5)
    h = exact(x) @ exact(down)
    np.testing.assert_allclose(exact(to_up), np.einsum("btr,bto->ro", h, exact(g)), atol=4 * STEP * 30**0.5)
    # float32: bfloat16 would have rounded them once more, to few digits
    assert (exact(to_down) != exact(to_down.astype(jnp.bfloat16))).mean() > 0.9


def test_experts_of_their_own():
    x, kernels, sizes = drawn(10, 16), drawn(3, 16, 24, seed=1), jnp.asarray([4, 0, 6], jnp.int32)
    expert = np.repeat(np.arange(3), np.asarray(sizes))
    y, pull = jax.vjp(lambda x: dots.grouped(x, kernels, sizes), x)
    np.testing.assert_allclose(exact(y), np.einsum("ni,nio->no", exact(x), exact(kernels)[expert]), atol=1e-4)
    g = drawn(10, 24, seed=2, dtype=jnp.float32)
    expected = np.einsum("no,nio->ni", exact(g), exact(kernels)[expert])
    np.testing.assert_allclose(exact(pull(g)[0]), expected, atol=3 * STEP * 24**0.5)


@pytest.mark.parametrize("size", [64, 1024, 1026])
def test_in_float32_all_of_it_is(size):
    x, kernel = drawn(3, 5, size, dtype=jnp.float32), drawn(size, 24, seed=1, dtype=jnp.float32)
    y, pull = jax.vjp(dots.project, x, kernel)
    g = drawn(3, 5, 24, seed=2, dtype=jnp.float32)
    # of sums of so many products of about 1, each rounded to 2**-24 of itself
    np.testing.assert_allclose(exact(y), exact(x) @ exact(kernel), atol=size * 2.0**-21)
    to_x, to_kernel = pull(g)
    np.testing.assert_allclose(exact(to_x), exact(g) @ exact(kernel).T, atol=24 * 2.0**-21)
    assert not np.asarray(to_kernel).any()


def test_long_sums_are_added_up_in_two():
    """All of one sign: then the error of one accumulator grows with its length."""
    size = 4096
    x, kernel = jnp.abs(drawn(2, size, dtype=jnp.float32)), jnp.abs(drawn(size, 3, seed=1, dtype=jnp.float32))
    assert str(jax.make_jaxpr(dots.project)(x, kernel)).count(f"f32[2,{size // 2}") > 0
    np.testing.assert_allclose(exact(dots.project(x, kernel)), exact(x) @ exact(kernel), rtol=size * 2.0**-25)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 8), (8, 64)])
def test_the_smaller_operand_of_a_gradient_is_transposed(dtype, inputs, outputs):
    """Of the large one no copy is made for a weight's gradient, nor is the result's transpose folded into the dot."""
    x, weight = drawn(2, 256, inputs, dtype=dtype), drawn(inputs, outputs, seed=1, dtype=jnp.float32)

    @jax.jit
    def gradient(x, weight, g):
        return jax.vjp(lambda weight: dots.contract("bti,io->bto", x, weight), weight)[1](g)[0]

    g = drawn(2, 256, outputs, seed=2, dtype=jnp.float32)
    expected = np.einsum("bti,bto->io", exact(x), exact(g))
    np.testing.assert_allclose(exact(gradient(x, weight, g)), expected, atol=1e-3 if dtype == jnp.float32 else 2.0)
    text = gradient.lower(x, weight, g).compile().as_text()
    large = max(inputs, outputs)
    assert not re.findall(rf"\[{large},512\]", text)


_DOT = re.compile(r"(?:dot_general|ragged_dot)\b.*: \(tensor<([^>]*)>, tensor<([^>]*)>.*\) -> tensor<([^>]*)>")


def kinds_of_dots(lowered) -> set[tuple[str, ...]]:
    """(operand, operand, result) dtypes of all dots of a program."""
    found = {tuple(shape.rsplit("x", 1)[-1] for shape in dot) for dot in _DOT.findall(lowered.as_text())}
    assert found
    return found


@pytest.mark.parametrize("remat", ["none", "dots"])
@pytest.mark.parametrize("scan", [False, True])
def test_a_step_and_a_response_are_of_such_dots_alone(scan, remat):
    model = Model.create(tiny.CONFIG, dtype=jnp.bfloat16, scan=scan, remat=remat)
    adapter = tiny.random_adapter(tiny.CONFIG)

    def step(base, adapter, *data):
        return train.gradients(model, tiny.LORA, negative_likelihood, base, adapter, *data)

    batch = random_batch()
    data = batch, pack(batch), jnp.float32(1), jax.random.key(0)
    assert kinds_of_dots(jax.jit(step).lower(model.shapes, adapter, *data)) == {("bf16", "bf16", "f32")}

    def sample(base, adapter, tokens, lengths, number, noise):
        """A prefix, prompts after it and a step of decoding, which reads a cache in blocks."""
        fused, how = lora.fuse(model, adapter, tiny.LORA), {"sampling": Sampling(4, ())}
        rows = generate.empty_rows(model, 4, 300, 4, jnp.bfloat16)
        prefix = generate.read_prefix(model, base, fused, tokens[0])
        rows = generate.begin(model, base, fused, prefix, rows, tokens, lengths, number, number, noise, **how)
        return generate.decode(model, base, fused, prefix, rows, jnp.int32(4), jnp.int32(1), **how)

    data = batch.prompt, batch.prompt_mask.sum(1, dtype=np.int32), np.arange(4, dtype=np.int32), np.zeros((4, 4), np.float32)
    assert kinds_of_dots(jax.jit(sample).lower(model.shapes, adapter, *data)) == {("bf16", "bf16", "f32")}
