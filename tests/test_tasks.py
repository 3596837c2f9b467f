"""Query sets: what is read, what is refused, what an iteration draws; and the data that ships with the project."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ple_jax.core import tasks
from ple_jax.core.config import UserError
from ple_jax.core.types import Query


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_load(tmp_path):
    source = write(tmp_path / "q.jsonl", {"prompt": "A film", "id": "x"}, "", {"prompt": " B", "completion": "c"})
    assert tasks.load(source) == [Query("x", "A film"), Query("3", " B", "c")]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([{"text": "a", "label": 1}], r"q\.jsonl:1 has no `prompt`, only text, label"),
        ([{"prompt": "a"}, {"prompt": "  "}], r"q\.jsonl:2: `prompt` is empty"),
        ([{"prompt": "a"}, "{"], r"q\.jsonl:2 is not JSON"),
        (["[1]"], r"q\.jsonl:1 is a list"),
        ([{"prompt": 3}], r"q\.jsonl:1: `prompt` is a int"),
        ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}], r"q\.jsonl:2: id '1' is already on line 1"),
        ([], "holds no record"),
    ],
)
def test_bad_files_are_named(tmp_path, lines, says):
    with pytest.raises(UserError, match=says):
        tasks.load(write(tmp_path / "q.jsonl", *lines))


def test_not_utf8(tmp_path):
    (tmp_path / "q.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UserError, match="not UTF-8"):
        tasks.load(str(tmp_path / "q.jsonl"))


def test_unknown_set():
    with pytest.raises(UserError, match="did you mean 'quickstart_train'"):
        tasks.load("quickstart_trian")


def test_sft_sets_empty_completions_aside(tmp_path):
    source = write(tmp_path / "s.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": " "})
    good, empty = tasks.load_sft(source)
    assert [q.prompt for q in good] == ["a"] and [q.prompt for q in empty] == ["c"]
    with pytest.raises(UserError, match="has no `completion`"):
        tasks.load_sft(write(tmp_path / "t.jsonl", {"prompt": "a"}))
    with pytest.raises(UserError, match="no example with a completion"):
        tasks.load_sft(write(tmp_path / "u.jsonl", {"prompt": "a", "completion": ""}))


def test_overlap_is_refused():
    with pytest.raises(UserError, match="'h'.*is also train query 't'"):
        tasks.check_disjoint([Query("t", "The film ")], [Query("h", "The film")])


@settings(max_examples=200)
@given(st.integers(1, 25), st.data())
def test_draw(size, data):
    n = data.draw(st.integers(1, size))
    queries = [Query(str(i), f"p{i}") for i in range(size)]
    drawn = [tasks.draw(queries, n, seed=5, iteration=i) for i in range(12)]
    counts = dict.fromkeys((q.id for q in queries), 0)
    for iteration in drawn:
        assert len({q.id for q in iteration}) == n  # without replacement
        for query in iteration:
            counts[query.id] += 1
        assert max(counts.values()) - min(counts.values()) <= 1  # every query once before any comes again
    assert drawn[7] == tasks.draw(queries, n, seed=5, iteration=7)


def test_draw_depends_on_the_seed_and_has_an_end():
    queries = [Query(str(i), f"p{i}") for i in range(40)]
    assert tasks.draw(queries, 20, seed=0, iteration=0) != tasks.draw(queries, 20, seed=1, iteration=0)
    with pytest.raises(UserError, match="there are 40 train queries"):
        tasks.draw(queries, 41, seed=0, iteration=0)


def test_quickstart_data():
    train, heldout = tasks.load("quickstart_train"), tasks.load("quickstart_heldout")
    assert len(train) >= 96 and len(heldout) >= 32
    tasks.check_disjoint(train, heldout)
    openings = [tuple(q.prompt.lower().split()[:5]) for q in train]
    assert len(set(openings)) == len(openings)
    assert not set(openings) & {tuple(q.prompt.lower().split()[:5]) for q in heldout}
    words = [set(q.prompt.lower().split()) for q in train]
    for query in heldout:  # no near duplicates
        own = set(query.prompt.lower().split())
        assert max(len(own & other) / len(own | other) for other in words) < 0.6
    for query in (*train, *heldout):
        assert 5 <= len(query.prompt.split()) <= 12 and query.prompt == query.prompt.strip()


def test_tiny_data():
    train, heldout = tasks.load("tiny_train"), tasks.load("tiny_heldout")
    tasks.check_disjoint(train, heldout)
    assert len(train) == 16 and len(heldout) == 8 and all(len(q.prompt.encode()) <= 12 for q in (*train, *heldout))
