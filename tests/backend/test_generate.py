"""Sampling: the filters against transformers' warpers, the CDF against float64, EOS, and independence of the rows."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from decoded import Engine, responses, unpadded
from test_model import build, full_logits, left_padded
from test_train import backend, negative_likelihood, random_batch

from ple_jax.backend import backend as jax_backend
from ple_jax.backend import generate, lora
from ple_jax.core import refill
from ple_jax.core.types import Response, Sampling
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


# ---------------------------------------------------------------- responses

LENGTHS = (3, 9, 1, 16, 30, 6, 5, 12, 7)
PREFIX = (5, 6, 7)
NEW = 12
NOISE = np.random.default_rng(5).random((len(LENGTHS) + 3, NEW), dtype=np.float32)
ALL = tuple(range(len(NOISE)))


def prompts():
    """Some after a prefix, and one of which three more responses are asked for."""
    rng = np.random.default_rng(4)
    made = [tuple(rng.integers(1, tiny.CONFIG.vocab_size, n).tolist()) for n in LENGTHS]
    made = [(*PREFIX, *prompt) if i % 2 else prompt for i, prompt in enumerate(made)]
    return made + [made[3]] * 3


def sampled(which=ALL, *, scan=False, width=4, prefix=PREFIX, eos=(), room=NEW, noise=NOISE, **how):
    """Responses to some of the prompts, at temperature 1."""
    (model, base), every = built(scan), prompts()
    sampling = Sampling(room, eos)
    noise = np.concatenate([noise, np.zeros((len(noise), room - noise.shape[1]), np.float32)], 1)
    chosen = [every[i] for i in which]
    return responses(model, base, {}, chosen, noise[list(which)], sampling=sampling, prefix=prefix, width=width, **how)


@functools.cache
def built(scan):
    return build(scan=scan)


@functools.cache
def ends(scan):
    """Tokens after which responses have very different lengths."""
    whole = sampled(scan=scan)
    return tuple({whole[i].tokens[n] for i, n in enumerate((1, 7, 10, 3, 2))})


@pytest.mark.parametrize("scan", [False, True])
def test_a_response_depends_on_its_prompt_and_noise_alone(scan):
    """To the bit: not on its row, on how busy the others are, on the order, or on what was known before."""
    whole = sampled(scan=scan, eos=ends(scan))
    assert len({len(r.tokens) for r in whole}) > 3 and {r.finished for r in whole} == {False, True}
    order = [7, 2, 11, 0, 5, 9, 1, 3, 10, 8, 4, 6]
    assert sampled(order, scan=scan, eos=ends(scan)) == [whole[i] for i in order]
    for known in ([0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11], [3, 4], [8]):  # of the first alone one is left: others are idle
        given = {i: whole[i] for i in known}
        assert sampled(scan=scan, eos=ends(scan), known=given) == whole
    # the same shapes, with another prompt in every row but one
    assert sampled([0, 4, 8, 3, 1, 11], scan=scan, eos=ends(scan))[1] == whole[4]


def test_rows_that_have_all_ended_leave_no_nan_to_the_next_response():
    """Of 32 rows with a long cache, read in two parts, one part is done before the other; all are refilled together."""
    (model, base), room, rng = built(False), 272, np.random.default_rng(6)
    first, second = ([tuple(rng.integers(1, tiny.CONFIG.vocab_size, 9).tolist())] * 32 for _ in range(2))
    noise = rng.random((64, room), dtype=np.float32)
    how = {"sampling": Sampling(room, (7, 8, 9)), "width": 32}
    whole = responses(model, base, {}, first + second, noise, **how)
    lengths = [[len(r.tokens) for r in whole[i : i + 16]] for i in (0, 16)]
    assert max(lengths[0]) != max(lengths[1]) and max(map(len, (r.tokens for r in whole[32:]))) > 32
    assert not any(np.isnan(r.logprobs).any() for r in whole)
    assert whole[32:] == responses(model, base, {}, second, noise[32:], **how)


def test_responses_to_one_prompt_read_it_once():
    (model, base), every = built(False), prompts()
    engine, which = Engine(model, base), [3, 9, 10, 11, 0]
    requests = refill.Requests([every[i] for i in which], NOISE[which], Sampling(NEW, ()))
    found = refill.sample(engine, requests, width=4, smallest=16)
    groups = [call for call in engine.calls if isinstance(call, refill.Group)]
    assert [sorted(set(g.lengths.tolist())) for g in groups] == [[1, 19], [1, 3]]
    assert [(g.row < 4).sum() for g in groups] == [4, 1]
    assert len({r.tokens for r in found[:4]}) == 4
    assert [r.tokens for r in found] == [sampled(which, prefix=())[i].tokens for i in range(5)]


def test_a_prefix_is_computed_once_and_changes_nothing(monkeypatch):
    seen, whole = [], generate.read_prefix
    monkeypatch.setattr(generate, "read_prefix", lambda *given: seen.append(1) or whole(*given))
    after, alone = sampled(), sampled(prefix=())
    assert seen == [1]
    assert [r.tokens for r in after] == [r.tokens for r in alone]
    for one, other in zip(after, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_eos_ends_a_response_and_is_its_last_token():
    whole = sampled()
    eos = whole[0].tokens[4]
    cut = sampled(eos=(eos, 10_000))
    for before, after in zip(whole, cut, strict=True):
        stop = before.tokens.index(eos) + 1 if eos in before.tokens else NEW
        assert after == Response(before.tokens[:stop], eos in before.tokens, logprobs=before.logprobs[:stop])
    assert len(cut[0].tokens) <= 5 and cut[0].finished


def test_immediate_eos_is_a_response_of_one_token():
    first = sampled()[1].tokens[0]
    assert sampled(eos=(first,))[1].tokens == (first,)
    assert [len(r.tokens) for r in sampled(room=1, noise=NOISE[:, :1])] == [1] * len(NOISE)


@pytest.mark.parametrize("scan", [False, True])
def test_room_for_more_tokens_changes_no_bit(scan):
    noise, found = np.random.default_rng(5).random((3, 400), dtype=np.float32), []
    for new in (250, 400):  # both longer than what is read at once
        found.append(sampled([0, 1, 3], scan=scan, width=3, room=new, noise=np.insert(noise, 2, 0, 0)[:, :new]))
    for short, long in zip(*found, strict=True):
        assert (long.tokens[:250], long.logprobs[:250]) == (short.tokens, short.logprobs)


@pytest.mark.parametrize("scan", [False, True])
def test_an_accelerator_reads_no_more_than_rows_fill(scan, monkeypatch):
    """In blocks that do not depend on how many are read: to the bit what all of the cache gives.

    Steps between two checks of what is done count, or a call would fill more than the bound that it was given.
    """
    decode = generate.decode
    monkeypatch.setattr(generate, "decode", lambda *given, unasked, **how: decode(*given, unasked=8, **how))
    monkeypatch.setattr(jax_backend.attention, "loops", lambda mesh: False)
    noise, how = np.random.default_rng(5).random((6, 500), dtype=np.float32), {"sampling": Sampling(500, ())}
    made, within = backend(scan=scan), []
    whole, every = made.programs.decode, prompts()[:6]

    def all_of_it(*given, **more):
        within.append(more.pop("within"))
        return whole(*given, **more)

    limited = made.generate(every, noise, prefix=PREFIX, **how)
    made.programs = made.programs._replace(decode=all_of_it)
    assert made.generate(every, noise, prefix=PREFIX, **how) == limited
    assert set(within) == {256, 512, 1024} and max(len(r.tokens) for r in limited) == 500


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("prefix", [(), PREFIX])
def test_the_cache_is_never_copied(scan, prefix):
    """Once it is there: every token is written into it, and what is read is read where it is."""
    (model, base), c, how = built(scan), tiny.CONFIG, {"sampling": Sampling(300, ())}
    rows = jax.eval_shape(lambda: generate.empty_rows(model, 2, 316, 300, jnp.float32))
    before = None
    if prefix:
        before = jax.eval_shape(lambda: generate.read_prefix(model, base, {}, jnp.asarray(prefix)))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    decode = jax.jit(functools.partial(generate.decode, model, **how), donate_argnums=3)
    text = decode.lower(base, {}, before, rows, number, number).compile().as_text()
    shape = f"f32[{f'{c.num_layers},' if scan else ''}2,{c.num_kv_heads},320,{c.head_dim}]"
    called = set(re.findall(r"body=%([\w.-]+)", text))
    parts = re.split(r"\n(?=%|ENTRY)", text)
    bodies = [part for part in parts if part.split(" ")[0].lstrip("%") in called]
    assert len(bodies) >= 2  # of tokens, and in it of a layer's blocks
    made = [line for part in parts if not part.startswith("%fused") for line in part.splitlines()]
    made = [line for line in made if re.search(rf"= {re.escape(shape)}\S* \w", line)]
    there = r"parameter\(|get-tuple-element\(|dynamic-update-slice|scatter|bitcast\("
    assert made and [line for line in made if not re.search(there, line)] == []
    assert text.count("may-alias") >= (2 if scan else 2 * c.num_layers)  # what is given is written to


def test_sampler_and_trainer_agree():
    """Every sampled token is the one that the full forward pass's distribution gives for its uniform."""
    new, rng = 12, np.random.default_rng(5)
    model, base = built(False)
    fused = lora.fuse(model, tiny.random_adapter(tiny.CONFIG), adapters.Lora(rank=4, alpha=4.0))
    tokens, mask = left_padded(rng, tiny.CONFIG.vocab_size, width=16)
    noise, how = rng.random((3, new), dtype=np.float32), {"sampling": Sampling(new, (), temperature=0.7)}
    found = responses(model, base, fused, unpadded(tokens, mask), noise, **how)
    out, said = (np.array([getattr(r, name) for r in found]) for name in ("tokens", "logprobs"))
    whole = np.concatenate([tokens, out.astype(np.int32)], 1)
    logits = full_logits(model, base, fused, whole, np.concatenate([mask, np.ones((3, new), bool)], 1))
    p = probabilities(np.asarray(logits)[:, 15:-1] / np.float32(0.7)).astype(np.float64)
    upper = np.cumsum(p, -1)
    expected = (upper <= noise[..., None] * upper[..., -1:]).sum(-1)
    edge = np.abs(upper - noise[..., None]).min(-1)
    assert ((expected == out) | (edge < 1e-4)).all()
    np.testing.assert_allclose(said, np.log(np.take_along_axis(p, out[..., None], -1)[..., 0]), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_weights_that_the_adapter_is_folded_into_sample_the_same(scan):
    """Of the policy as it is at the time; what is trained and exported knows nothing of it."""
    own, folded = (backend(scan=scan, fold=fold) for fold in (False, True))
    how = {"sampling": Sampling(NEW, (), temperature=0.7), "prefix": PREFIX}
    before = [made.generate(prompts(), NOISE, **how) for made in (own, folded)]
    said = [made.update([random_batch()], negative_likelihood, lr=0.01) for made in (own, folded)]
    after = [made.generate(prompts(), NOISE, **how) for made in (own, folded)]
    assert said[0] == said[1] and before[0] != after[0]
    for one, other in zip(before[0] + after[0], before[1] + after[1], strict=True):
        assert one.tokens == other.tokens and one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert before[0] != before[1]  # to the bit they are other sums
    for name, array in own.adapter().items():
        np.testing.assert_array_equal(folded.adapter()[name], array)


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
