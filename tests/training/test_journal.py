"""The journal survives being cut anywhere; noise depends on what it is for and on nothing else."""

import hashlib
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ple_jax.core import files
from ple_jax.core.batches import bucket
from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import UserError
from ple_jax.core.noise import uniforms
from ple_jax.core.types import Response, Rollout
from ple_jax.training import journal
from ple_jax.training.journal import Journal

# every line end that str.splitlines knows, and what JSON must escape
NASTY = 'a "quoted"\\ \r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029 é 🎬'
RESPONSES = [Response((5, 6, 2), True, "plain", 0, NASTY), Response((7,), False, "principled", 1, "")]
ROLLOUTS = [Rollout("q", "p", (1,), tuple(RESPONSES))]

number = st.floats(allow_nan=False)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ids = st.lists(st.integers(0, 10**6), max_size=6).map(tuple)
parts = st.dictionaries(text, number, max_size=2)
logprobs = st.lists(number, max_size=3).map(tuple)
response = st.builds(
    Response, ids, st.booleans(), text, st.integers(0, 9), text, number, number, number, parts, logprobs=logprobs, noise=text
)
turn = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool"]), "content": text})
conversation = st.builds(Conversation, st.lists(turn, min_size=1, max_size=3), st.lists(st.just({"name": "f"}), max_size=1))
prompt = text | conversation
record = st.dictionaries(text, text | st.lists(number, max_size=2), max_size=2)
rollout = st.builds(Rollout, text, prompt, ids, st.lists(response, max_size=3).map(tuple), number, number, text, record)


def sampled(responses):
    """What a backend knows of a response: neither reward nor score nor weight, which are NaN and equal nothing."""
    return [(r.tokens, r.finished, r.kind, r.sample, r.text) for r in responses]


@settings(max_examples=50)
@given(st.lists(rollout, min_size=1, max_size=3))
def test_what_is_written_is_read(written):
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), 3)
        journal.complete(written)
        assert (found := journal.read()) == written

        def turns(rollouts):
            conversations = (r.prompt for r in rollouts if isinstance(r.prompt, Conversation))
            return [(c.messages, c.tools) for c in conversations]

        assert turns(found) == turns(written)


def test_the_line_of_a_rollout(tmp_path):
    scored = Response((5, 2), True, "plain", 0, "é\u2028", 0.5, 0.25)
    journal = Journal(tmp_path, 12)
    journal.complete([Rollout("q-1", "The", (1, 2), (scored,), math.inf, -0.5, "blended"), Rollout("q-2", "A", (3,), ())])
    text = (tmp_path / "iter_0012.jsonl").read_bytes().decode()
    heads = [line.rpartition(', "digest": "')[0] for line in text.split("\n")]
    first, second, _ = (hashlib.sha256(head.encode()).hexdigest()[:16] for head in heads)
    assert text.replace(first, "FIRST").replace(second, "SECOND") == (
        '{"format": 2, "query_id": "q-1", "prompt": "The", "prompt_tokens": [1, 2], "tau": "inf", "responses": '
        '[{"kind": "plain", "principled": false, "source": "policy", "sample": 0, '
        '"tokens": [5, 2], "text": "é\u2028", "finished": true, '
        '"reward": 0.5, "score": 0.25, "weight": null}], "margin": -0.5, "decision": "blended", "line": 1, "lines": 2, '
        '"digest": "FIRST"}\n'
        '{"format": 2, "query_id": "q-2", "prompt": "A", "prompt_tokens": [3], "tau": null, "responses": [], '
        '"margin": null, "decision": "", "line": 2, "lines": 2, "digest": "SECOND"}\n'
    )
    first, second = journal.read()
    assert first.tau == math.inf and math.isnan(first.responses[0].weight)
    assert math.isnan(second.tau) and math.isnan(second.margin)


def test_from_responses_to_the_complete_file(tmp_path):
    journal = Journal(tmp_path / "rollouts", 0)
    assert journal.finished() == {} and journal.read() is None
    journal.keep({2: RESPONSES[0], 5: RESPONSES[1]})
    journal.keep({0: RESPONSES[0]})
    again = Journal(tmp_path / "rollouts", 0)
    found = again.finished()
    assert list(found) == [2, 5, 0] and sampled(found.values()) == sampled([*RESPONSES, RESPONSES[0]])
    assert again.read() is None
    again.complete(ROLLOUTS)
    assert [r.query_id for r in again.read()] == ["q"] and again.finished() == {}
    assert [p.name for p in (tmp_path / "rollouts").iterdir()] == ["iter_0000.jsonl"]


def test_a_response_to_another_prompt_is_sampled_again(tmp_path):
    journal, asked = Journal(tmp_path, 0), ["first", "second", "third"]
    journal.keep({0: RESPONSES[0]}, asked)
    journal.keep({2: RESPONSES[0], 1: RESPONSES[1]}, asked)
    assert list(Journal(tmp_path, 0).finished([*asked, "fourth"])) == [0, 2, 1]
    assert list(Journal(tmp_path, 0).finished(["first", "other", "third"])) == [0, 2]
    assert list(Journal(tmp_path, 0).finished(["other", "second", "other"])) == [1]
    assert list(Journal(tmp_path, 0).finished(asked)) == [2, 1]  # the first line was taken out
    assert Journal(tmp_path, 0).finished(["second"]) == {}


def test_lines_of_an_earlier_version_are_sampled_again(tmp_path):
    journal = Journal(tmp_path, 0)
    journal.keep({0: RESPONSES[0]})
    kept = journal.partial.read_bytes()
    files.append_line(journal.partial, files.seal(json.dumps({"chunk": 1, "asked": "", "responses": []})))
    assert list(journal.finished()) == [0] and journal.partial.read_bytes() == kept


def test_cut_at_every_byte(tmp_path, monkeypatch):
    """Whole lines survive, a torn one is cut off, and appending goes on after them."""
    journal, some = Journal(tmp_path, 0), dict(enumerate(RESPONSES))
    for line in range(2):
        journal.keep({10 * line + i: r for i, r in some.items()})
    data = journal.partial.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a thousand of them take seconds
    for cut in range(len(data) + 1):
        journal.partial.write_bytes(data[:cut])
        whole = [10 * line + i for line in range(data[:cut].count(b"\n")) for i in some]
        assert list(journal.finished()) == whole
        journal.keep({90: RESPONSES[0]})
        found = journal.finished()
        assert list(found) == [*whole, 90]
        assert sampled(found.values()) == sampled([*[some[i % 10] for i in whole], RESPONSES[0]])


def test_a_damaged_line_is_sampled_again_and_the_others_are_not(tmp_path):
    """Whatever bit of it is changed: what is read of the file is what was written to it, or not read."""
    journal = Journal(tmp_path, 0)
    for number in range(3):
        journal.keep({number: RESPONSES[0]})
    first, second, third = journal.partial.read_bytes().splitlines(keepends=True)
    for bit in range(0, 8 * (len(second) - 1), 5):
        damaged = bytearray(second)
        damaged[bit // 8] ^= 1 << bit % 8
        journal.partial.write_bytes(first + damaged + third)
        found = journal.finished()
        assert sorted(found) == [0, 2] and sampled(found.values()) == sampled([RESPONSES[0]] * 2)
        assert journal.partial.read_bytes() == first + third


def test_the_samplers_log_probabilities_have_a_place(tmp_path):
    journal = Journal(tmp_path, 0)
    said = RESPONSES[0]._replace(logprobs=(-0.1 - 0.2, -math.inf, -1e-320))
    journal.keep({0: said, 1: RESPONSES[1]})
    assert [r.logprobs for r in journal.finished().values()] == [said.logprobs, ()]
    journal.complete([Rollout("q", "p", (1,), (said, RESPONSES[1]))])
    assert [r.logprobs for r in journal.read()[0].responses] == [said.logprobs, ()]
    written = json.loads(journal.path.read_text())["responses"]
    assert written[0]["logprobs"] == [-0.1 - 0.2, "-inf", -1e-320] and "logprobs" not in written[1]


@settings(max_examples=50)
@given(st.lists(st.lists(response, min_size=1, max_size=3), min_size=1, max_size=3), st.data())
def test_cut_anywhere(lines, data):
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), 0)
        for number, line in enumerate(lines):
            journal.keep({10 * number + i: r for i, r in enumerate(line)})
        content = journal.partial.read_bytes()
        cut = data.draw(st.integers(0, len(content)))
        journal.partial.write_bytes(content[:cut])
        whole = lines[: content[:cut].count(b"\n")]
        assert journal.finished() == {10 * number + i: r for number, line in enumerate(whole) for i, r in enumerate(line)}


def test_killed_before_the_final_name(tmp_path, monkeypatch):
    journal = Journal(tmp_path, 0)
    journal.keep({0: RESPONSES[0]})

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        journal.complete(ROLLOUTS)
    assert journal.read() is None and list(journal.finished()) == [0]
    journal.complete(ROLLOUTS)
    assert [p.name for p in tmp_path.iterdir()] == ["iter_0000.jsonl"]


def test_killed_after_the_final_name(tmp_path, monkeypatch):
    journal = Journal(tmp_path, 0)
    journal.keep({0: RESPONSES[0]})

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        journal.complete(ROLLOUTS)
    assert [r.query_id for r in journal.read()] == ["q"]
    assert [p.name for p in tmp_path.iterdir()] == ["iter_0000.jsonl"]


@pytest.mark.parametrize("line", ['{"query_id": 1}', "{", "[]"])
def test_a_foreign_file_is_named(tmp_path, line):
    (tmp_path / "iter_0000.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"iter_0000\.jsonl:1 is .*delete the file to sample it again"):
        journal.read(tmp_path / "iter_0000.jsonl")


@pytest.mark.parametrize(("length", "size"), [(0, 16), (1, 16), (16, 16), (17, 32), (33, 64), (64, 64), (1000, 1024)])
def test_bucket(length, size):
    assert bucket(length, 16) == size


def test_uniforms_never_change():
    """Written down: other versions and machines must draw the same tokens."""
    noise = uniforms(0, 3, "train-007", "plain", 0, 4)
    assert noise.dtype == np.float32
    assert (noise * 2**24).tolist() == [14782245, 3274150, 4385452, 13007021]


@settings(max_examples=30)
@given(st.integers(0, 2**40), st.integers(-1, 100), st.text(), st.text(), st.integers(0, 64), st.integers(0, 9))
def test_uniforms_are_the_top_24_bits_of_philox(seed, iteration, query_id, kind, sample, n):
    name = json.dumps([seed, iteration, query_id, kind, sample]).encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    raw = np.random.Philox(key=key).random_raw(n) // 2**40
    np.testing.assert_array_equal(uniforms(seed, iteration, query_id, kind, sample, n).astype(np.float64) * 2**24, raw)


def test_uniforms_depend_on_every_part():
    parts = (0, 3, "q", "plain", 0)
    base = uniforms(*parts, 8)
    for i, other in enumerate((1, 4, "r", "principled", 1)):
        assert (uniforms(*parts[:i], other, *parts[i + 1 :], 8) != base).all()
    # the parts are not merely strung together
    assert (uniforms(1, 23, "q", "plain", 0, 8) != uniforms(12, 3, "q", "plain", 0, 8)).all()
    assert (uniforms(0, 3, "qp", "lain", 0, 8) != uniforms(0, 3, "q", "plain", 0, 8)).all()


def test_fewer_uniforms_are_the_beginning_of_more():
    np.testing.assert_array_equal(uniforms(0, 3, "q", "plain", 0, 9)[:5], uniforms(0, 3, "q", "plain", 0, 5))


def test_uniforms_are_uniform_and_independent_of_their_neighbours():
    from scipy import stats

    noise = np.stack([uniforms(0, 0, f"train-{i:03d}", "plain", 0, 64) for i in range(300)]).astype(np.float64)
    assert noise.min() >= 0 and noise.max() < 1
    assert stats.kstest(noise.ravel(), "uniform").pvalue > 1e-3
    assert abs(stats.pearsonr(noise[:-1].ravel(), noise[1:].ravel()).statistic) < 0.03  # four standard errors
