"""The journal survives being cut anywhere; chunks and noise depend on what they are for and on nothing else."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ple_jax.core.config import UserError
from ple_jax.core.rollouts import Journal, bucket, plan_chunks, read, uniforms
from ple_jax.core.types import Response, Rollout

RESPONSES = [
    Response((5, 6, 2), True, "plain", 0, 'a "quoted"\nline \u2028 é 🎬'),
    Response((7,), False, "principled", 1, ""),
]


def rollout(tau=0.2):
    scored = [r._replace(reward=0.5, score=-1.25, weight=0.75) for r in RESPONSES]
    return Rollout("q-1", "The film", (1, 2, 3), tuple(scored), tau, 0.125, "blended")


@pytest.mark.parametrize("tau", [0.2, math.inf])
def test_complete_round_trip(tmp_path, tau):
    journal = Journal(tmp_path / "rollouts", 3)
    journal.append(0, RESPONSES)
    assert journal.read() is None
    journal.complete([rollout(tau), rollout(tau)])
    assert journal.read() == [rollout(tau), rollout(tau)]
    assert [p.name for p in (tmp_path / "rollouts").iterdir()] == ["iter_0003.jsonl"]


def test_what_is_not_known_is_null(tmp_path):
    journal = Journal(tmp_path, 0)
    journal.complete([Rollout("q", "p", (1,), (RESPONSES[1],))])
    line = json.loads(journal.path.read_text())
    assert line["tau"] is None and line["responses"][0]["reward"] is None
    assert math.isnan(journal.read()[0].margin)
    assert list(line) == ["query_id", "prompt", "prompt_tokens", "tau", "responses", "margin", "decision"]


def test_cut_at_every_byte(tmp_path):
    """Whole lines survive, a torn one is dropped and overwritten by what is appended next."""
    journal = Journal(tmp_path, 0)
    for chunk in range(3):
        journal.append(chunk, RESPONSES)
    data = journal.partial.read_bytes()
    for cut in range(len(data) + 1):
        journal.partial.write_bytes(data[:cut])
        whole = data[:cut].count(b"\n")
        found = journal.finished_chunks()
        assert sorted(found) == list(range(whole))
        journal.append(9, RESPONSES[1:])
        again = journal.finished_chunks()
        assert sorted(again) == [*range(whole), 9]
        for chunk in range(whole):
            assert [(r.tokens, r.finished, r.kind, r.sample, r.text) for r in again[chunk]] == [
                (r.tokens, r.finished, r.kind, r.sample, r.text) for r in RESPONSES
            ]


def test_a_foreign_file_is_named(tmp_path):
    (tmp_path / "iter_0000.jsonl").write_text('{"query_id": 1}\n')
    with pytest.raises(UserError, match=r"iter_0000.jsonl:1"):
        read(tmp_path / "iter_0000.jsonl")


@given(st.lists(st.sampled_from("abc"), max_size=60), st.integers(1, 9))
def test_plan_chunks(groups, width):
    chunks = plan_chunks(groups, width)
    assert sorted(row for chunk in chunks for row in chunk) == list(range(len(groups)))
    for chunk in chunks:
        assert len({groups[row] for row in chunk}) == 1 and len(chunk) <= width and chunk == sorted(chunk)
    assert len(chunks) == sum(math.ceil(groups.count(g) / width) for g in set(groups))


@pytest.mark.parametrize(("length", "size"), [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64)])
def test_bucket(length, size):
    assert bucket(length, 16) == size


def test_uniforms_do_not_change():
    """Two values written down: other versions, machines and backends must draw the same tokens."""
    noise = uniforms(0, 3, "train-007", "plain", 0, 4)
    assert noise.dtype == np.float32
    np.testing.assert_array_equal(noise * 2**24, (noise * 2**24).round())
    np.testing.assert_array_equal(uniforms(0, 3, "train-007", "plain", 0, 9)[:4], noise)
    assert noise.tolist() == PINNED


PINNED = [0.8810904622077942, 0.19515454769134521, 0.26139330863952637, 0.7752788662910461]


def test_uniforms_depend_on_every_argument():
    arguments = (0, 3, "q", "plain", 0)
    base = uniforms(*arguments, 8)
    for i, other in enumerate((1, 4, "r", "principled", 1)):
        assert (uniforms(*arguments[:i], other, *arguments[i + 1 :], 8) != base).all()
    # the parts are not simply strung together
    assert (uniforms(1, 23, "q", "plain", 0, 8) != uniforms(12, 3, "q", "plain", 0, 8)).all()


def test_uniforms_are_uniform():
    noise = np.concatenate([uniforms(0, 0, f"q{i}", "plain", 0, 100) for i in range(200)])
    assert noise.min() >= 0 and noise.max() < 1
    counts, _ = np.histogram(noise, 20, (0, 1))
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 19 + 5 * np.sqrt(2 * 19)


@settings(max_examples=30)
@given(st.text(), st.integers(0, 2**31), st.integers(-2, 100))
def test_uniforms_take_any_query_id(query_id, seed, iteration):
    assert uniforms(seed, iteration, query_id, "plain", 0, 3).shape == (3,)
