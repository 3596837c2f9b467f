"""Sampling: the filters against transformers' warpers, the CDF against float64, EOS, and independence of the batch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_model import build, full_logits, left_padded

from ple_jax.backend import generate, lora
from ple_jax.core.types import Sampling
from ple_jax.models import adapters


def probabilities(logits):
    return np.asarray(jax.nn.softmax(jnp.asarray(logits), -1))


@pytest.mark.parametrize(
    ("options", "warper"),
    [
        ({"top_k": 5, "top_p": 1.0, "min_p": 0.0}, lambda t: t.TopKLogitsWarper(5)),
        ({"top_k": 500, "top_p": 1.0, "min_p": 0.0}, lambda t: t.TopKLogitsWarper(500)),
        ({"top_k": 0, "top_p": 0.7, "min_p": 0.0}, lambda t: t.TopPLogitsWarper(0.7)),
        ({"top_k": 0, "top_p": 0.01, "min_p": 0.0}, lambda t: t.TopPLogitsWarper(0.01)),
        ({"top_k": 0, "top_p": 1.0, "min_p": 0.2}, lambda t: t.MinPLogitsWarper(0.2)),
        (
            {"top_k": 20, "top_p": 0.8, "min_p": 0.1},
            lambda t: t.LogitsProcessorList([t.TopKLogitsWarper(20), t.TopPLogitsWarper(0.8), t.MinPLogitsWarper(0.1)]),
        ),
    ],
)
def test_filters_equal_transformers(options, warper):
    import torch
    import transformers.generation.logits_process as process

    logits = (2 * np.random.default_rng(0).normal(size=(16, 300))).astype(np.float32)
    ours = np.asarray(jax.jit(lambda p: generate.filter_probabilities(p, **options))(probabilities(logits)))
    warped = warper(process)(torch.zeros(16, 1, dtype=torch.long), torch.tensor(logits))
    np.testing.assert_array_equal(ours > 0, torch.isfinite(warped).numpy())


def test_filters_keep_ties():
    p = jnp.asarray([[0.2, 0.3, 0.3, 0.2]])
    np.testing.assert_array_equal(
        generate.filter_probabilities(p, top_k=1, top_p=1.0, min_p=0.0) > 0, [[False, True, True, False]]
    )


@pytest.mark.parametrize("vocab", [7, 128, 129, 1000])
def test_invert_cdf_equals_float64(vocab):
    rng = np.random.default_rng(vocab)
    p = rng.gamma(0.1, size=(512, vocab)).astype(np.float32)
    p[:, rng.integers(0, vocab, vocab // 4)] = 0
    u = rng.random(512).astype(np.float32)
    ours = np.asarray(jax.jit(generate.invert_cdf)(p, u))
    upper = np.cumsum(p.astype(np.float64), -1) / p.sum(-1, dtype=np.float64, keepdims=True)
    exact = (upper <= u[:, None]).sum(-1)
    edge = np.abs(upper - u[:, None]).min(-1)
    assert (ours == exact)[edge > 1e-5].all() and (edge > 1e-5).mean() > 0.9
    assert (np.take_along_axis(p, ours[:, None], -1) > 0).all()  # never a token without mass


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_invert_cdf_at_the_ends(u):
    p = np.zeros((1, 300), np.float32)
    p[0, 17], p[0, 250] = 0.3, 0.6
    assert generate.invert_cdf(p, jnp.asarray([u], jnp.float32))[0] == (17 if u == 0 else 250)


def sampled(options, rows=(0, 1, 2), width=None, prefix=0, **sampling):
    """Responses of some rows of one fixed batch, at temperature 1, as a list of token tuples."""
    new, rng = 12, np.random.default_rng(5)
    model, base = build()
    tokens, mask = left_padded(rng, tiny.CONFIG.vocab_size, width=16)
    noise = rng.random((3, new), dtype=np.float32)
    rows = list(rows)
    out, _, lengths = jax.jit(
        lambda b, t, m, u: generate.generate(
            model, b, {}, t, m, jnp.zeros(0, jnp.int32), u, sampling=Sampling(new, **sampling)
        )
    )(base, tokens[rows], mask[rows], noise[rows])
    return [tuple(int(t) for t in o[:n]) for o, n in zip(np.asarray(out), lengths, strict=True)]


def test_a_response_does_not_depend_on_its_place():
    a, b, c = sampled({}, eos=())
    assert sampled({}, rows=(2, 0, 1), eos=()) == [c, a, b]


def test_eos_ends_a_response_and_is_its_last_token():
    whole = sampled({}, eos=())
    eos = whole[0][4]
    cut = sampled({}, eos=(eos, 10_000))
    for before, after in zip(whole, cut, strict=True):
        stop = before.index(eos) + 1 if eos in before else len(before)
        assert after == before[:stop]
    assert len(cut[0]) <= 5 and cut[0][-1] == eos


def test_immediate_eos_is_a_response_of_one_token():
    first = sampled({}, eos=())[1][0]
    assert sampled({}, eos=(first,))[1] == (first,)


@pytest.mark.parametrize("scan", [False, True])
def test_room_for_more_tokens_changes_no_bit(scan):
    rng = np.random.default_rng(5)
    model, base = build(scan=scan)
    tokens, mask = left_padded(rng, tiny.CONFIG.vocab_size, width=16)
    noise, found = rng.random((3, 400), dtype=np.float32), []
    for new in (250, 400):  # both longer than what is read at once
        how = {"sampling": Sampling(new, (), temperature=0.7)}
        call = jax.jit(lambda *data, how=how: generate.generate(model, base, {}, *data, **how))
        found.append(call(tokens, mask, jnp.zeros(0, jnp.int32), noise[:, :new]))
    (short, said, _), (long, longer, _) = found
    np.testing.assert_array_equal(short, long[:, :250])
    np.testing.assert_array_equal(said, longer[:, :250])


@pytest.mark.parametrize("scan", [False, True])
def test_the_cache_is_never_copied(scan):
    """Once it is there: every token is written into it, and what is read is read where it is."""
    model, base = build(scan=scan)
    prompt, new = np.ones((2, 16), np.int32), 300
    how = {"sampling": Sampling(new, ())}
    call = jax.jit(lambda *data: generate.generate(model, base, {}, *data, **how))
    text = call.lower(prompt, prompt > 0, jnp.zeros(0, jnp.int32), np.zeros((2, new), np.float32)).compile().as_text()
    c = tiny.CONFIG
    shape = f"f32[{f'{c.num_layers},' if scan else ''}2,{c.num_kv_heads},320,{c.head_dim}]"
    called = set(re.findall(r"body=%([\w.-]+)", text))
    bodies = [part for part in re.split(r"\n(?=%|ENTRY)", text) if part.split(" ")[0].lstrip("%") in called]
    made = [line for part in bodies for line in part.splitlines() if re.search(rf"= {re.escape(shape)}\S* \w", line)]
    assert len(bodies) >= 2 and made  # of tokens, and in it of a layer's blocks
    there = r"parameter\(|get-tuple-element\(|dynamic-update-slice"  # the last also in a fusion's name
    assert [line for line in made if not re.search(there, line)] == []


def test_sampler_and_trainer_agree():
    """Every sampled token is the one that the full forward pass's distribution gives for its uniform."""
    new, rng = 12, np.random.default_rng(5)
    model, base = build()
    fused = lora.fuse(model, tiny.random_adapter(tiny.CONFIG), adapters.Lora(rank=4, alpha=4.0))
    tokens, mask = left_padded(rng, tiny.CONFIG.vocab_size, width=16)
    noise = rng.random((3, new), dtype=np.float32)
    out, said, _ = generate.generate(
        model, base, fused, tokens, mask, jnp.zeros(0, jnp.int32), noise, sampling=Sampling(new, (), temperature=0.7)
    )
    whole = np.concatenate([tokens, np.asarray(out)], 1)
    logits = full_logits(model, base, fused, whole, np.concatenate([mask, np.ones((3, new), bool)], 1))
    p = probabilities(np.asarray(logits)[:, 15:-1] / np.float32(0.7)).astype(np.float64)
    upper = np.cumsum(p, -1)
    expected = (upper <= noise[..., None] * upper[..., -1:]).sum(-1)
    edge = np.abs(upper - noise[..., None]).min(-1)
    assert ((expected == np.asarray(out)) | (edge < 1e-4)).all()
    np.testing.assert_allclose(said, np.log(np.take_along_axis(p, np.asarray(out)[..., None], -1)[..., 0]), atol=1e-5)


def test_distribution_of_samples():
    """Frequencies of 20,000 draws against the distribution (chi-squared at 5 standard deviations)."""
    logits = np.random.default_rng(0).normal(size=30).astype(np.float32)
    u = np.random.default_rng(1).random(20_000).astype(np.float32)
    draws, said = generate.sample_token(jnp.broadcast_to(jnp.asarray(logits), (20_000, 30)), u, sampling=Sampling(1, ()))
    expected = 20_000 * probabilities(logits).astype(np.float64)
    statistic = ((np.bincount(draws, minlength=30) - expected) ** 2 / expected).sum()
    assert statistic < 29 + 5 * np.sqrt(2 * 29)
    np.testing.assert_allclose(said, np.log(probabilities(logits).astype(np.float64))[draws], atol=1e-5)


@pytest.mark.parametrize(("temperature", "at"), [(0.0, 1.0), (0.5, 0.5)])
def test_log_probabilities_are_those_of_no_filter(temperature, at):
    """At the temperature that was sampled at, and of what is greedy at 1; filters leave out much of the mass."""
    logits = np.random.default_rng(0).normal(size=(50, 30)).astype(np.float32)
    u = np.random.default_rng(1).random(50).astype(np.float32)
    how = Sampling(1, (), temperature=temperature, top_k=3, top_p=0.6, min_p=0.2)
    token, said = generate.sample_token(jnp.asarray(logits), jnp.asarray(u), sampling=how)
    p = probabilities(logits / np.float32(at)).astype(np.float64)
    np.testing.assert_allclose(said, np.log(p[np.arange(50), token]), atol=1e-5)
