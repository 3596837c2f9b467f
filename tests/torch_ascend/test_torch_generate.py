"""Sampling in torch: JAX's tokens, transformers' filters and greedy tokens, the CDF against float64, EOS, streaming."""

import dataclasses
import functools
from collections.abc import Sequence

import families
import jax
import numpy as np
import pytest
import test_train
import tiny
import torch
import transformers.generation.logits_process as process
from families import VARIANTS, WINDOW
from test_families import LENGTHS, LORA, decisive_prompts
from test_torch_model import build
from test_torch_train import backend

from ple_jax.backend import generate as jax_generate
from ple_jax.core import refill
from ple_jax.core.types import Response, Sampling
from ple_jax.models import adapters, weights
from torch_ascend import attention, generate, model, sharding

# ---------------------------------------------------------------- from a distribution to a token

FILTERS = {
    "top_k": ({"top_k": 5}, lambda: process.TopKLogitsWarper(5)),
    "top_k of more than there are": ({"top_k": 500}, lambda: process.TopKLogitsWarper(500)),
    "top_p": ({"top_p": 0.7}, lambda: process.TopPLogitsWarper(0.7)),
    "top_p of one token": ({"top_p": 0.01}, lambda: process.TopPLogitsWarper(0.01)),
    "min_p": ({"min_p": 0.2}, lambda: process.MinPLogitsWarper(0.2)),
    "all": (
        {"top_k": 20, "top_p": 0.8, "min_p": 0.1},
        lambda: process.LogitsProcessorList(
            [process.TopKLogitsWarper(20), process.TopPLogitsWarper(0.8), process.MinPLogitsWarper(0.1)]
        ),
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_equal_transformers_and_jax(name):
    options, warper = FILTERS[name]
    options = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    logits = torch.tensor((2 * np.random.default_rng(0).normal(size=(16, 300))).astype(np.float32))
    p = logits.softmax(-1)
    ours = generate.filter_probabilities(p, **options)
    kept = torch.isfinite(warper()(torch.zeros(16, 1, dtype=torch.long), logits))
    assert torch.equal(ours, torch.where(kept, p, 0.0))
    theirs = jax.jit(functools.partial(jax_generate.filter_probabilities, **options))(p.numpy())
    np.testing.assert_array_equal(ours.numpy(), theirs)


def test_filters_keep_ties_and_need_no_sum_of_one():
    p = torch.tensor([[0.2, 0.3, 0.3, 0.2]])
    kept = generate.filter_probabilities(p, top_k=1, top_p=1.0, min_p=0.0) > 0
    assert kept.tolist() == [[False, True, True, False]]
    for scale in (1e-6, 1e6):
        kept = generate.filter_probabilities(scale * p, top_k=0, top_p=0.55, min_p=0.0) > 0
        assert kept.tolist() == [[False, True, True, False]]
    kept = generate.filter_probabilities(torch.tensor([[0.5, 0.25, 0.2]]), top_k=0, top_p=1.0, min_p=0.5) > 0
    assert kept.tolist() == [[True, True, False]]


@pytest.mark.parametrize("vocab", [7, 128, 129, 1000])
def test_invert_cdf_equals_float64_and_jax(vocab):
    rng = np.random.default_rng(vocab)
    p = rng.gamma(0.1, size=(512, vocab)).astype(np.float32)
    p[:, rng.integers(0, vocab, vocab // 4)] = 0
    u = rng.random(512).astype(np.float32)
    ours = generate.invert_cdf(torch.tensor(p), torch.tensor(u)).numpy()
    upper = np.cumsum(p.astype(np.float64), -1) / p.sum(-1, dtype=np.float64, keepdims=True)
    exact = (upper <= u[:, None]).sum(-1)
    clear = np.abs(upper - u[:, None]).min(-1) > 1e-5
    assert (ours == exact)[clear].all() and clear.mean() > 0.9
    assert (np.take_along_axis(p, ours[:, None], -1) > 0).all()  # never a token without mass
    np.testing.assert_array_equal(ours[clear], np.asarray(jax.jit(jax_generate.invert_cdf)(p, u))[clear])


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24, 1.0])
def test_invert_cdf_at_the_ends(u):
    """1 is where rounding may put a draw: the last token with any mass is meant, not what comes after it."""
    p = torch.zeros(1, 300)
    p[0, 17], p[0, 250] = 0.3, 0.6
    assert generate.invert_cdf(p, torch.tensor([u])).tolist() == [17 if u == 0 else 250]


def test_distribution_of_samples():
    """Frequencies of 20,000 draws against the distribution at a temperature (chi-squared at 5 standard deviations)."""
    logits = np.random.default_rng(0).normal(size=30).astype(np.float32)
    u = torch.tensor(np.random.default_rng(1).random(20_000).astype(np.float32))
    sampling = Sampling(1, (), temperature=0.5)
    draws, said = generate.sample_token(torch.tensor(logits).expand(20_000, -1), u, sampling=sampling)
    p = np.exp(logits.astype(np.float64) / 0.5)
    expected = 20_000 * p / p.sum()
    statistic = ((np.bincount(draws, minlength=30) - expected) ** 2 / expected).sum()
    assert statistic < 29 + 5 * np.sqrt(2 * 29)
    np.testing.assert_allclose(said, np.log(p / p.sum())[draws], atol=1e-5)


@pytest.mark.parametrize(("temperature", "at"), [(0.0, 1.0), (0.5, 0.5)])
def test_log_probabilities_are_those_of_no_filter(temperature, at):
    """At the temperature that was sampled at, and of what is greedy at 1; filters leave out much of the mass."""
    logits = np.random.default_rng(0).normal(size=(50, 30)).astype(np.float32)
    u = torch.tensor(np.random.default_rng(1).random(50).astype(np.float32))
    how = Sampling(1, (), temperature=temperature, top_k=3, top_p=0.6, min_p=0.2)
    token, said = generate.sample_token(torch.tensor(logits), u, sampling=how)
    exact = logits.astype(np.float64) / at
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    np.testing.assert_allclose(said, exact[np.arange(50), token], atol=1e-5)


# ---------------------------------------------------------------- responses

PROMPTS = [np.random.default_rng(i).integers(1, 101, n).tolist() for i, n in enumerate((3, 9, 1, 16, 12, 6))]
PREFIX = np.random.default_rng(9).integers(1, 101, 5).tolist()
NOISE = np.random.default_rng(5).random((6, 20), dtype=np.float32)
WAYS = {
    "greedy": Sampling(20, (), temperature=0.0),
    "sampled": Sampling(20, (), temperature=0.8, top_k=40, top_p=0.9),
    "sampled with EOS": Sampling(20, (3, 7, 11, 50), temperature=1.3, min_p=0.02),
}


@pytest.fixture(scope="module")
def ours():
    return backend()


@pytest.fixture(scope="module")
def theirs():
    return test_train.backend()


@pytest.mark.parametrize(("way", "prefix"), [("greedy", []), ("sampled", []), ("sampled with EOS", PREFIX)])
def test_tokens_are_those_of_jax(way, prefix, ours, theirs):
    """Six prompts in four rows; all but one of them after the prefix, where there is one."""
    prompts = [*([*prefix, *prompt] for prompt in PROMPTS[:5]), PROMPTS[5]]
    found = ours.generate(prompts, NOISE, sampling=WAYS[way], prefix=prefix)
    wanted = theirs.generate(prompts, NOISE, sampling=WAYS[way], prefix=prefix)
    assert [one._replace(logprobs=()) for one in found] == [one._replace(logprobs=()) for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4) and len(one.logprobs) == len(one.tokens)
    assert all(type(token) is int for response in found for token in response.tokens)
    assert len({response.tokens for response in found}) == 6


def test_without_an_adapter_other_tokens(ours):
    zeros = {p: {k: np.zeros_like(x) for k, x in m.items()} for p, m in tiny.random_adapter(tiny.CONFIG).items()}
    base = backend(zeros)
    assert base.generate(PROMPTS, NOISE, sampling=WAYS["greedy"]) != ours.generate(PROMPTS, NOISE, sampling=WAYS["greedy"])


def test_a_response_does_not_depend_on_its_place(ours):
    whole = ours.generate(PROMPTS[:4], NOISE[:4], sampling=WAYS["sampled"])
    order = [2, 0, 3, 1]
    again = ours.generate([PROMPTS[i] for i in order], NOISE[order], sampling=WAYS["sampled"])
    assert again == [whole[i] for i in order]


def test_eos_ends_a_response_and_is_its_last_token(ours):
    whole = ours.generate(PROMPTS, NOISE, sampling=WAYS["sampled"])
    eos = whole[0].tokens[4]
    cut = ours.generate(PROMPTS, NOISE, sampling=WAYS["sampled"]._replace(eos=(eos, 10_000)))
    for before, said, after in ((r.tokens, r.logprobs, c) for r, c in zip(whole, cut, strict=True)):
        stop = before.index(eos) + 1 if eos in before else len(before)
        assert after == Response(before[:stop], finished=eos in before, logprobs=said[:stop])
    assert 0 < sum(r.finished for r in cut) < 6 and len(cut[0].tokens) <= 5
    first = ours.generate(PROMPTS, NOISE, sampling=WAYS["sampled"]._replace(eos=(whole[1].tokens[0],)))
    assert first[1] == Response(whole[1].tokens[:1], finished=True, logprobs=whole[1].logprobs[:1])


def test_room_for_more_tokens_changes_no_bit_and_is_not_read(ours, monkeypatch):
    """The cache is read as far as it is filled, in whole blocks."""
    short, reads = ours.generate(PROMPTS[:4], NOISE[:4, :8], sampling=WAYS["sampled"]._replace(max_new_tokens=8)), []

    def attend_cache(query, keys, *rest, **how):
        reads.append(keys.shape[2])
        return attention.attend_cache(query, keys, *rest, **how)

    monkeypatch.setattr(model, "attend_cache", attend_cache)
    noise = np.concatenate([NOISE[:4, :8], np.random.default_rng(0).random((4, 142), dtype=np.float32)], 1)
    long = ours.generate(PROMPTS[:4], noise, sampling=WAYS["sampled"]._replace(max_new_tokens=150))
    assert [(r.tokens[:8], r.logprobs[:8]) for r in long] == [(r.tokens, r.logprobs) for r in short]
    longest, layers = max(map(len, PROMPTS[:4])), tiny.CONFIG.num_layers
    assert reads == [128 if longest + i <= 128 else 256 for i in range(1, 150) for _ in range(layers)]


def test_a_step_is_recorded_once_for_every_reach(ours, monkeypatch):
    """After it ran once; what is repeated decodes the same tokens."""
    recorded: list[object] = []

    def record(call, memory):
        """What a device records may not read memory of the host, as a tensor made of a list does."""
        recorded.append(call)

        def repeat() -> None:
            with monkeypatch.context() as patch:
                patch.setattr(torch, "tensor", None)
                call()

        return repeat

    monkeypatch.setattr(generate.devices, "record", record)
    monkeypatch.setattr(generate.devices, "recording_memory", object)
    noise, found = np.random.default_rng(0).random((6, 150), dtype=np.float32), []
    for on in (False, True):
        monkeypatch.setattr(ours.model, "able", dataclasses.replace(ours.model.able, records=on))
        found.append(ours.generate(PROMPTS, noise, sampling=Sampling(150, ())))
    assert found[0] == found[1]
    assert len(recorded) == 2  # of 128 positions, and of 256, though rows are refilled in between


@pytest.mark.parametrize("way", ["greedy", "sampled with EOS"])
def test_how_often_the_device_is_asked_changes_nothing(way, ours, monkeypatch):
    """Whether all have ended is asked every token or every few: what is decoded beyond the end is not there."""
    found = {}
    for steps in (1, 16):
        monkeypatch.setattr(ours.model, "able", dataclasses.replace(ours.model.able, steps_per_sync=steps))
        found[steps] = ours.generate([[*PREFIX, *p] for p in PROMPTS], NOISE, sampling=WAYS[way], prefix=PREFIX)
    assert found[1] == found[16]


@pytest.mark.parametrize("steps", [1, 3, 16])
def test_decoding_stops_when_enough_have_ended(steps, ours, monkeypatch):
    """At the first question after the end, and never more often asked than said."""
    whole = [r.tokens for r in ours.generate(PROMPTS[:3], NOISE[:3], sampling=WAYS["sampled"])]
    sampling = WAYS["sampled"]._replace(eos=tuple(tokens[i] for tokens, i in zip(whole, (1, 7, 10), strict=True)))
    lengths = [len(r.tokens) for r in ours.generate(PROMPTS[:3], NOISE[:3], sampling=sampling)]
    monkeypatch.setattr(ours.model, "able", dataclasses.replace(ours.model.able, steps_per_sync=steps))
    asked: list[int] = []
    enough = sharding.enough

    def counted(world, free, done, **how):
        asked.append(int(done.sum()))
        return enough(world, free, done, **how)

    monkeypatch.setattr(sharding, "enough", counted)
    requests = refill.Requests([tuple(p) for p in PROMPTS[:3]], NOISE[:3], sampling)
    ours.open(refill.shape_of(requests, width=3, smallest=16), sampling)
    row = np.arange(3, dtype=np.int32)
    tokens = np.array([p + [0] * (16 - len(p)) for p in PROMPTS[:3]], np.int32)
    ours.begin(refill.Group(tokens, np.array([len(p) for p in PROMPTS[:3]], np.int32), False, row, row, NOISE[:3]))
    for free in (2, 3):  # the first token of each was drawn when it began
        asked.clear()
        found = ours.decode(free)
        ended = sorted(lengths)[free - 1]
        assert (found.lengths >= ended).sum() >= 3 - free and found.done.sum() >= free
        assert asked[:-1] == [n for n in asked if n < free] and asked[-1] >= free
    assert found.lengths.tolist() == lengths and 3 < max(lengths) <= 11
    ours.close()


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text", "gpt2", "smollm3", "qwen3_moe"])
def test_greedy_tokens_equal_transformers(name, tmp_path):
    """Families whose windows, caps or positions must be kept up: behind a prefix longer than a window, and streamed."""
    theirs, new = families.build(VARIANTS[name]), 20
    families.save(theirs, tmp_path)
    loaded = weights.load(str(tmp_path))
    prefix, prompt, mask, expected = decisive_prompts(theirs, WINDOW + 3, new)
    fresh = adapters.init(loaded.config, LORA, seed=0)
    policy = backend(fresh, model=build(loaded.config, loaded.raw, loaded.weights), width=len(LENGTHS))
    prompts = [[*prefix.tolist(), *row[seen].tolist()] for row, seen in zip(prompt, mask, strict=True)]
    noise, greedy = np.zeros((len(LENGTHS), new), np.float32), Sampling(new, (), temperature=0.0)
    found = policy.generate(prompts, noise, sampling=greedy, prefix=prefix.tolist())
    assert [list(r.tokens) for r in found] == expected.tolist()
    assert list(policy.stream(prompts[0], noise[0], sampling=greedy)) == expected[0].tolist()


# ---------------------------------------------------------------- one token at a time


def streamed(policy, prompt: Sequence[int], sampling: Sampling, **options) -> tuple[int, ...]:
    return tuple(policy.stream(prompt, NOISE[0], sampling=sampling, **options))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length", [1, 9, 16, 17])  # the last needs the next bucket
def test_stream_is_generate(length, way, ours):
    prompt = np.random.default_rng(length).integers(1, 101, length).tolist()
    expected = ours.generate([prompt], NOISE[:1], sampling=WAYS[way])[0].tokens
    assert streamed(ours, prompt, WAYS[way]) == expected


def test_stream_of_the_base_is_an_adapter_of_zeros(ours):
    zeros = {p: {k: np.zeros_like(x) for k, x in m.items()} for p, m in tiny.random_adapter(tiny.CONFIG).items()}
    expected = backend(zeros).generate([PROMPTS[1]], NOISE[:1], sampling=WAYS["greedy"])[0].tokens
    assert streamed(ours, PROMPTS[1], WAYS["greedy"], base=True) == expected
    assert streamed(ours, PROMPTS[1], WAYS["greedy"]) != expected


def test_a_stream_gives_tokens_as_they_come(ours):
    """And may be left: the next one, and training, find everything as it was."""
    tokens = ours.stream(PROMPTS[0], NOISE[0], sampling=WAYS["sampled"])
    first = [next(tokens) for _ in range(3)]
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    between = ours.generate([PROMPTS[1]], NOISE[1:2], sampling=WAYS["sampled"])
    rest = [next(tokens) for _ in range(3)]  # a cache of its own
    assert (*first, *rest) == streamed(ours, PROMPTS[0], WAYS["sampled"])[:6]
    assert between == ours.generate([PROMPTS[1]], NOISE[1:2], sampling=WAYS["sampled"])
