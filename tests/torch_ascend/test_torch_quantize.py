"""A quantised base in torch: the values, scales and logits of JAX's, and gradients that reach the adapter."""

import families
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from ple_jax.backend import quantize as jax_quantize
from ple_jax.backend.model import Model, fill
from ple_jax.core.errors import UserError
from ple_jax.models import weights
from torch_ascend import lora, model
from torch_ascend.ops import REFERENCE
from torch_ascend.quantize import Quantized


def quantized(weight: np.ndarray, kind: str, *, transposed: bool = False) -> Quantized:
    base = torch.nn.Linear(*weight.shape[::-1], bias=False)
    if transposed:
        base.weight = torch.nn.Parameter(torch.tensor(weight))
    made = Quantized(base, kind, transposed=transposed)
    made.fill(torch.tensor(weight))
    return made


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("kind", "size"), [("int8", 96), ("nf4", 128), ("nf4", 96), ("nf4", 48)])
def test_as_jax_quantises(kind, size, transposed):
    kernel = np.random.default_rng(0).normal(size=(size, 40)).astype(np.float32)  # [in, out]
    kernel[:, 3] = 0.0
    kernel[:, 5] *= 1e-3
    theirs = jax_quantize.quantize(kernel, kind)
    ours = quantized(kernel if transposed else kernel.T.copy(), kind, transposed=transposed)
    if kind == "int8":
        np.testing.assert_array_equal(ours.values.numpy(), np.asarray(theirs.qvalue).T)
    np.testing.assert_array_equal(ours.scale[..., 0].float().numpy(), np.asarray(theirs.scale, np.float32).T)
    whole = np.asarray(jax_quantize.dequantize(theirs, jnp.float32))
    np.testing.assert_array_equal(ours.expand(torch.float32).numpy(), whole.T)
    np.testing.assert_array_equal(ours.weight.numpy(), whole if transposed else whole.T)
    assert 0 < np.abs(whole - kernel).max() < (0.02 if kind == "int8" else 0.5)


def test_bytes():
    weight = np.random.default_rng(0).normal(size=(256, 512)).astype(np.float32)
    stored = {
        kind: sum(t.numel() * t.element_size() for t in (m.values, m.scale)) * 8 / weight.size
        for kind in ("int8", "nf4")
        for m in [quantized(weight, kind)]
    }
    assert stored == {"int8": 8 + 32 / 512, "nf4": 4.25}


def test_the_expanded_weight_is_not_kept_and_the_gradient_is_that_of_a_matmul():
    made = quantized(np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32), "nf4")
    x = torch.randn(3, 5, 128, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = made(x)
    assert not [n for n in saved if n >= 64 * 128]
    y.square().sum().backward()
    reference = x.detach().clone().requires_grad_()
    (reference @ made.weight.T).square().sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_logits_are_those_of_the_jax_decoder(name, kind, tmp_path):
    families.save(families.build(families.VARIANTS[name]), tmp_path)
    loaded = weights.load(str(tmp_path))
    ours = model.create(loaded.config, loaded.raw, dtype=torch.float32, device=torch.device("cpu"), ops=REFERENCE)
    model.quantize(ours, kind)
    model.adapt(ours, tiny.LORA, [])
    model.fill(ours, loaded.weights)
    ids = np.random.default_rng(0).integers(0, 250, (2, 9))
    at = np.arange(9)[None].repeat(2, 0)
    mask = np.tril(np.ones((9, 9), bool))[None].repeat(2, 0)
    logits = ours.logits(ours.apply({}, torch.tensor(ids), positions=torch.tensor(at), mask=torch.tensor(mask))).detach()
    jax_model = Model.create(loaded.config, scan=False)
    base = fill(jax_model, loaded.weights, lambda _, x: jnp.asarray(x), quantize=kind)
    hidden, _ = jax_model.apply(base, {}, jnp.asarray(ids), positions=jnp.asarray(at), mask=jnp.asarray(mask))
    np.testing.assert_allclose(logits.numpy(), np.asarray(jax_model.logits(base, hidden)), atol=1e-4)
    plain = model.create(loaded.config, loaded.raw, dtype=torch.float32, device=torch.device("cpu"), ops=REFERENCE)
    model.fill(plain, loaded.weights)
    exact = plain.logits(plain.apply({}, torch.tensor(ids), positions=torch.tensor(at), mask=torch.tensor(mask)))
    assert (exact - logits).abs().max() > 1e-2  # it was quantised


def test_adapters_train_on_it(tmp_path):
    families.save(families.build(families.VARIANTS["llama-bias"]), tmp_path)
    loaded = weights.load(str(tmp_path))
    made = model.create(loaded.config, loaded.raw, dtype=torch.float32, device=torch.device("cpu"), ops=REFERENCE)
    adapter = lora.trainable(tiny.random_adapter(loaded.config), torch.device("cpu"))
    model.quantize(made, "int8")
    model.adapt(made, tiny.LORA, adapter)
    model.fill(made, loaded.weights)
    ids = torch.arange(8)[None]
    mask = torch.ones(8, 8, dtype=torch.bool).tril()[None]
    made.apply(adapter, ids, positions=ids, mask=mask).square().sum().backward()
    assert all(leaf.grad.abs().max() > 0 for leaf in lora.leaves(adapter).values())


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match="multiple of 16, this one's is 40"):
        quantized(np.zeros((8, 40), np.float32), "nf4")
    families.save(families.build(families.VARIANTS["mixtral"]), tmp_path)
    loaded = weights.load(str(tmp_path))
    made = model.create(loaded.config, loaded.raw, dtype=torch.float32, device=torch.device("cpu"), ops=REFERENCE)
    with pytest.raises(UserError, match="does not quantise experts"):
        model.quantize(made, "int8")
