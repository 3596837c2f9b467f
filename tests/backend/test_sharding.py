"""Meshes of eight simulated devices give the numbers of one; every parameter has a rule."""

import functools
from types import SimpleNamespace

import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P
from speed import quick
from test_train import backend, negative_likelihood, random_batch

from ple_jax.backend import backend as jax_backend
from ple_jax.backend import sharding
from ple_jax.core import packing
from ple_jax.core.errors import UserError
from ple_jax.core.types import Sampling
from ple_jax.models import adapters

MESHES = [{"data": 4, "fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}, {"data": 8}]


@functools.cache
def known() -> exact.Known:
    """The loss and its gradient in float64."""
    return exact.Exact(tiny.random_adapter(tiny.CONFIG)).gradient(random_batch(rows=8), exact.negative_likelihood)


@pytest.mark.parametrize("scan", quick([False, True], True))
@pytest.mark.parametrize("axes", quick(MESHES, MESHES[1]), ids=str)
def test_loss_and_gradients_equal_one_device(axes, scan):
    batch = random_batch(rows=8)
    one, many = backend(scan=scan), backend(sharding.make_mesh(**axes), scan=scan)

    def gradients(b):
        data = b.put(batch, packing.alone(batch))
        grads, metrics = b.programs.gradients(
            b.base, b.policy, *data, jnp.float32(1 / 8), jax.random.key(0), loss=negative_likelihood
        )
        return jax.device_get(grads), float(metrics["loss"])

    for found, loss in (gradients(one), gradients(many)):
        exact.assert_metrics_near({"loss": loss}, known())
        exact.assert_near(exact.leaves(found), known())


@pytest.mark.parametrize("axes", quick(MESHES[:2], MESHES[1]), ids=str)
def test_updates_and_checkpoints_across_meshes(axes, tmp_path):
    batch = random_batch(rows=8)
    one, many = backend(), backend(sharding.make_mesh(**axes))
    for b in (one, many):
        b.update([batch], negative_likelihood, lr=1e-3)
    # Adam's first step is the sign of the gradient: a half of one for a gradient that is a half rounding
    gradient = adapters.to_peft(exact.tree(known().gradient))
    for name, array in one.adapter().items():
        unsure = np.minimum(1, exact.ROUNDINGS * known().unit / np.abs(gradient[name]))
        off = np.abs(many.adapter()[name] - array)
        assert (off <= 2e-3 * unsure + exact.EPS).all() and np.median(off) < 1e-5, name
    many.save(tmp_path, 1, {"iteration": 1}, keep=1)
    restored = backend()  # written on eight devices, read on one
    restored.restore(tmp_path)
    for name, array in many.adapter().items():
        np.testing.assert_array_equal(restored.adapter()[name], array)


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES[:2], ids=str)
def test_generated_tokens(axes):
    """Equal, but where the two top logits are so near that rounding decides (none here in fp32, at this seed)."""
    rng = np.random.default_rng(0)
    prompts = [[5, 6, *rng.integers(1, tiny.CONFIG.vocab_size, n).tolist()] for n in (3, 7, 5, 16, 9, 2, 4, 8, 6)]
    noise = rng.random((9, 10), dtype=np.float32)
    for temperature in (0.0, 1.0):
        sampling = Sampling(10, (), temperature=temperature)
        one = backend(width=8).generate(prompts, noise, sampling=sampling, prefix=(5, 6))
        many = backend(sharding.make_mesh(**axes), width=8).generate(prompts, noise, sampling=sampling, prefix=(5, 6))
        assert [r.tokens for r in many] == [r.tokens for r in one]


def test_arrays_are_really_spread():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    base = backend(mesh).base
    for part, share in {"qkv": 4, "o": 4, "gate_up": 4, "down": 4}.items():
        kernel = base["layers"][0][part]["kernel"]
        assert kernel.addressable_shards[0].data.size * share == kernel.size, part
    assert base["embed"].sharding.spec == P(None, "fsdp")  # 101 tokens do not divide by 2


def test_an_unmatched_parameter_raises():
    with pytest.raises(KeyError, match="layers/unknown"):
        sharding.spec("layers/unknown", (8,), sharding.make_mesh(), kv_heads=2)


def test_heads_that_do_not_divide_are_replicated_and_said_so():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert sharding.spec("layers/qkv/kernel", (576, 960), mesh, kv_heads=3) == P("fsdp", None)
    assert sharding.spec("layers/qkv/kernel", (30, 576, 960), mesh, kv_heads=4) == P(None, "fsdp", "tensor")
    assert "3 KV heads" in sharding.notes(mesh, kv_heads=3)[0]
    assert sharding.notes(mesh, kv_heads=4) == []


def test_too_few_devices():
    says = "needs 16 devices, there are 8 .cpu.; lower .*; JAX sees CPUs alone: for GPUs install the extra `cuda`"
    with pytest.raises(UserError, match=says):
        sharding.make_mesh(data=16)


@pytest.mark.parametrize(("error", "why"), [(RuntimeError("Not:\nmore"), "Not:"), (AssertionError(), "none is visible")])
def test_no_device_is_a_line(monkeypatch, error, why):
    """Where no GPU is visible JAX asserts, where its plugin is not installed it raises."""

    def none():
        raise error

    monkeypatch.setattr(jax, "devices", none)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    try:
        with pytest.raises(UserError, match=r"^JAX cannot use this machine's devices \(.*\); see docs/install.md$"):
            sharding.make_mesh()
        jax.config.update("jax_platforms", "cuda")
        _asked(why)
    finally:
        jax.config.update("jax_platforms", before)


def _asked(why):
    for asks in (sharding.make_mesh, lambda: jax_backend.fast_dtype(None)):
        with pytest.raises(UserError, match="^JAX finds no device of JAX_PLATFORMS=") as found:
            asks()
        assert f"({why}); JAX for GPUs is the extra `cuda`, docs/install.md" in str(found.value)
        assert "\n" not in str(found.value)


def test_devices_that_are_left_out_are_said(monkeypatch):
    def said(**axes):
        stand = SimpleNamespace(mesh=sharding.make_mesh(**axes), model=SimpleNamespace(config=tiny.CONFIG))
        with monkeypatch.context() as there:
            there.setattr(sharding, "devices", lambda: [SimpleNamespace(platform=platform)] * 8)
            return jax_backend.notes(stand)

    platform = "gpu"
    assert said() == ["1 of 8 devices is used: --config.mesh.data=8 takes 8"]
    assert said(tensor=2, data=2) == ["4 of 8 devices are used: --config.mesh.data=4 takes 8"]
    assert said(fsdp=5) == said(data=4, tensor=2) == []
    platform = "cpu"
    assert said() == []
