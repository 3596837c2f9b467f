"""Query sets: what is read, what is refused, and what an iteration draws."""

import json
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ple_jax.core import tasks
from ple_jax.core.config import UserError
from ple_jax.core.types import Query


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return str(path)


def numbered(n):
    return [Query(str(i), f"prompt {i}") for i in range(n)]


def test_load_reads_all_columns_and_skips_blank_lines(tmp_path):
    source = write(tmp_path / "q.jsonl", {"prompt": "A film", "id": "x"}, "", {"prompt": " B", "completion": "c"}, "")
    assert tasks.load(source) == [Query("x", "A film"), Query("q:3", " B", "c")]


def test_load_cuts_lines_at_line_ends_only(tmp_path):
    source = write(tmp_path / "q.jsonl", '{"prompt": "one\u2028two\u0085three"}', {"prompt": "b"})
    assert [q.prompt for q in tasks.load(source)] == ["one\u2028two\u0085three", "b"]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([{"prompt": "a"}, {"text": "a", "label": 1}], r"q\.jsonl:2 has no `prompt`, only text, label"),
        ([{"prompt": "a"}, {"prompt": " \t"}], r"q\.jsonl:2: `prompt` is empty"),
        ([{"prompt": "a"}, '{"prompt": "b"'], r"q\.jsonl:2 is not JSON"),
        ([r'{"prompt": "half \ud83c"}'], r"q\.jsonl:1 is not JSON .*surrogates"),
        (["[1]"], r"q\.jsonl:1 is a list"),
        ([{"prompt": 3}], r"q\.jsonl:1: `prompt` is a int"),
        ([{"prompt": "a", "completion": None}], r"q\.jsonl:1: `completion` is a NoneType"),
        ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}], r"q\.jsonl:2: id '1' is already on line 1"),
        (["", ""], r"q\.jsonl holds no record"),
    ],
)
def test_a_bad_record_names_file_and_line(tmp_path, lines, says):
    with pytest.raises(UserError, match=says):
        tasks.load(write(tmp_path / "q.jsonl", *lines))


def test_a_file_in_another_encoding(tmp_path):
    (tmp_path / "q.jsonl").write_bytes('{"prompt": "café"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"q\.jsonl is not UTF-8"):
        tasks.load(str(tmp_path / "q.jsonl"))


def test_an_unknown_set_lists_the_built_in_ones():
    with pytest.raises(UserError, match="quickstart_heldout, quickstart_train.*did you mean 'quickstart_train'"):
        tasks.load("quickstart_trian")


def test_sft_sets_empty_completions_aside(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": " "}, {"prompt": "d", "completion": ""}]
    good, bad = tasks.load_sft(write(tmp_path / "s.jsonl", *rows))
    assert [q.prompt for q in good] == ["a"] and [q.prompt for q in bad] == ["c", "d"]


@pytest.mark.parametrize(
    ("row", "says"),
    [({"prompt": "a"}, r":1 has no `completion`, only prompt"), ({"prompt": "a", "completion": ""}, "holds no example")],
)
def test_sft_needs_completions(tmp_path, row, says):
    with pytest.raises(UserError, match=says):
        tasks.load_sft(write(tmp_path / "s.jsonl", row))


def test_overlap_is_refused():
    train = [Query("t0", "The film "), Query("t1", "A ship")]
    tasks.check_disjoint(train, [Query("h0", "A sheep")])
    with pytest.raises(UserError, match="'h1'.*is also train query 't0'"):
        tasks.check_disjoint(train, [Query("h0", "A sheep"), Query("h1", "The film")])


@given(st.data(), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_every_pass_sees_every_query_once(data, size, seed):
    n = data.draw(st.integers(1, size))
    drawn = [[q.id for q in tasks.draw(numbered(size), n, seed=seed, iteration=i)] for i in range(5 * size // n + 1)]
    assert all(len(set(ids)) == n for ids in drawn)
    stream = list(chain(*drawn))
    for begin in range(0, len(stream) - size + 1, size):
        assert len(set(stream[begin : begin + size])) == size


def test_draw_depends_on_seed_and_iteration_alone():
    queries = numbered(40)
    one = tasks.draw(queries, 16, seed=3, iteration=7)
    assert one == tasks.draw(queries, 16, seed=3, iteration=7)
    assert one != tasks.draw(queries, 16, seed=4, iteration=7)
    passes = [tasks.draw(queries, 40, seed=3, iteration=i) for i in range(3)]
    assert passes[0] != passes[1] != passes[2] != queries


def test_more_than_there_are():
    assert len(tasks.draw(numbered(8), 8, seed=0, iteration=0)) == 8
    with pytest.raises(UserError, match="is 9 but there are 8 train queries"):
        tasks.draw(numbered(8), 9, seed=0, iteration=0)
