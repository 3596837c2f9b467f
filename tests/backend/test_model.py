"""The decoder against transformers: logits, greedy tokens, cache, left padding; scanned and unrolled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from decoded import responses, unpadded
from speed import quick

from ple_jax.backend import lora
from ple_jax.backend.model import Model, fill
from ple_jax.core.types import Sampling
from ple_jax.models import weights
from ple_jax.models.adapters import Lora
from ple_jax.models.families import read

LENGTHS = (3, 9, 6)


def build(config=tiny.CONFIG, tensors=None, *, scan=False, remat="none", dtype=jnp.float32):
    model = Model.create(config, scan=scan, remat=remat, dtype=dtype)
    return model, fill(model, tensors or tiny.weights(config), lambda _, array: jnp.asarray(array))


def left_padded(rng, vocab, lengths=LENGTHS, width=None):
    width = width or max(lengths)
    mask = np.arange(width)[None] >= width - np.array(lengths)[:, None]
    return np.where(mask, rng.integers(1, vocab, mask.shape), 0).astype(np.int32), mask


def full_logits(model, base, fused, tokens, mask):
    position = jnp.asarray(np.cumsum(mask, 1) - 1, jnp.int32)
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None] & jnp.asarray(mask)[:, None]
    hidden, _ = model.apply(base, fused, jnp.asarray(tokens), positions=position, mask=causal)
    return model.logits(base, hidden)


def torch_logits(model, tokens, mask):
    import torch

    position = torch.tensor(np.maximum(np.cumsum(mask, 1) - 1, 0))
    with torch.no_grad():
        return model(
            torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long(), position_ids=position
        ).logits.numpy()


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_equal_transformers(scan, tie, kv_heads):
    raw = tiny.RAW | {"tie_word_embeddings": tie, "num_key_value_heads": kv_heads}
    config = read(raw, "test")
    tensors = tiny.weights(config)
    model, base = build(config, tensors, scan=scan)
    tokens, mask = left_padded(np.random.default_rng(0), config.vocab_size)
    ours = jax.jit(lambda b: full_logits(model, b, {}, tokens, mask))(base)
    theirs = torch_logits(tiny.transformers_model(raw, tensors), tokens, mask)
    np.testing.assert_allclose(np.asarray(ours)[mask], theirs[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("prefix_len", [0, 5])
def test_greedy_equals_transformers(scan, prefix_len):
    """Token for token, of prompts of unequal length, with and without a shared prefix computed once."""
    import torch

    new, rng = 24, np.random.default_rng(3)
    tensors = tiny.weights()
    model, base = build(tensors=tensors, scan=scan)
    tokens, mask = left_padded(rng, tiny.CONFIG.vocab_size)
    prefix = rng.integers(1, tiny.CONFIG.vocab_size, prefix_len).astype(np.int32)
    prompts = [(*prefix.tolist(), *prompt) for prompt in unpadded(tokens, mask)]
    how = {"sampling": Sampling(new, (), temperature=0.0), "prefix": prefix.tolist()}
    out = [r.tokens for r in responses(model, base, {}, prompts, np.zeros((3, new), np.float32), **how)]
    theirs = tiny.transformers_model(tiny.RAW, tensors)
    for row in range(3):
        prompt = torch.tensor(np.concatenate([prefix, tokens[row][mask[row]]])).long()[None]
        reference = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, eos_token_id=None
        )
        np.testing.assert_array_equal(out[row], reference[0, prompt.shape[1] :].numpy())


@pytest.mark.parametrize("remat", quick(["dots", "full"], "full"))
@pytest.mark.parametrize("scan", quick([False, True], True))
def test_remat_changes_no_gradient(remat, scan):
    tokens, mask = left_padded(np.random.default_rng(0), tiny.CONFIG.vocab_size)
    adapter = jax.tree.map(jnp.asarray, tiny.random_adapter(tiny.CONFIG))

    def gradient(remat):
        model, base = build(scan=scan, remat=remat)
        return jax.grad(lambda a: (full_logits(model, base, lora.fuse(model, a, tiny.LORA), tokens, mask) ** 2).sum())(
            adapter
        )

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2), gradient("none"), gradient(remat))


def test_bfloat16_stays_near():
    tokens, mask = left_padded(np.random.default_rng(0), tiny.CONFIG.vocab_size)
    model, base = build()
    half, half_base = build(dtype=jnp.bfloat16)
    fused = lora.fuse(model, tiny.random_adapter(tiny.CONFIG), Lora(rank=4, alpha=2.0))
    exact, rounded = full_logits(model, base, fused, tokens, mask), full_logits(half, half_base, fused, tokens, mask)
    assert rounded.dtype == jnp.float32
    assert np.abs(np.asarray(exact - rounded))[mask].mean() < 0.05 * np.asarray(exact)[mask].std()


@pytest.mark.slow
def test_smollm2_equals_transformers():
    """The real model: logits to 1e-4 of float64 on a left-padded batch, 64 greedy tokens equal."""
    import torch

    loaded = weights.load("smollm2-135m")
    model, base = build(loaded.config, loaded.weights)
    theirs = tiny.transformers_model(loaded.raw, loaded.weights)
    texts = ["The film opens with", "I had never heard of this director before my sister", "Two hours later,"]
    ids = [loaded.tokenizer.encode(t) for t in texts]
    width = max(map(len, ids))
    tokens = np.array([[0] * (width - len(i)) + i for i in ids], np.int32)
    mask = np.array([[False] * (width - len(i)) + [True] * len(i) for i in ids])
    ours = jax.jit(lambda b: full_logits(model, b, {}, tokens, mask))(base)
    exact = torch_logits(theirs.double(), tokens, mask)  # fp32 torch is 1e-4 off itself
    np.testing.assert_allclose(np.asarray(ours)[mask], exact[mask], atol=1e-4, rtol=0)
    theirs.float()
    greedy = Sampling(64, (), temperature=0.0)
    out = [r.tokens for r in responses(model, base, {}, ids, np.zeros((3, 64), np.float32), sampling=greedy)]
    reference = theirs.generate(
        torch.tensor(tokens).long(),
        attention_mask=torch.tensor(mask).long(),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
    )
    np.testing.assert_array_equal(out, reference[:, width:].numpy())
