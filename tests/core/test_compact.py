"""Values that are kept as bytes: what comes out is what went in, and views share them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ple_jax.core.compact import Compact, compact
from ple_jax.core.conversation import Answer, Conversation
from ple_jax.core.types import Query

TURNS = (
    {"role": "user", "content": "wer\u2028 bist ’du"},
    {"role": "assistant", "content": "ich"},
    {"role": "user", "content": "ja?"},
)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
QUERIES = [
    Query("a", "plain", "yes", "no", {"n": [1, None], "t": "ß"}),
    Query("b", Conversation(TURNS, [{"name": "f"}]), Answer(CALL)),
    Query("c", "\n"),
]


def test_queries_come_out_as_they_went_in():
    made = Compact(QUERIES)
    assert list(made) == QUERIES and len(made) == 3 and made[-1] == QUERIES[2]
    talk, answer = made[1].prompt, made[1].completion
    assert isinstance(talk, Conversation) and talk.messages == TURNS and talk.tools == ({"name": "f"},)
    assert isinstance(answer, Answer) and answer.message == CALL and bool(answer)
    assert made[0] is not made[0]  # of its own each time: what is done to one is not done to the sequence
    with pytest.raises(IndexError):
        made[3]
    assert made == QUERIES and made == tuple(QUERIES) and made != QUERIES[:2] and Compact() == [] and made != "abc"
    assert QUERIES == made and repr(Compact([1])) == "Compact([1])"


@given(st.lists(st.integers()), st.slices(20))
def test_slices_are_those_of_a_list(items, part):
    assert list(Compact(items)[part]) == items[part]


@given(st.lists(st.text(), min_size=1), st.data())
def test_views_of_views(items, data):
    places = data.draw(st.lists(st.integers(-len(items), len(items) - 1)))
    again = data.draw(st.lists(st.integers(0, len(places) - 1))) if places else []
    view = Compact(items).take(places).take(again)
    assert view == [items[places[i]] for i in again]


def test_a_view_shares_bytes_and_cannot_grow():
    whole = Compact(["a" * 1000, "b" * 1000])
    view = whole.take([1])
    whole.append("c")
    assert view == ["b" * 1000] and whole[2] == "c" and view.nbytes == whole.nbytes
    with pytest.raises(AssertionError):
        view.append("d")
    assert Compact(view).nbytes < 1.1 * 1000


def test_where_each_is_is_known_until_there_is_one_more():
    made = Compact(QUERIES)
    assert made.places("id") == {"a": 0, "b": 1, "c": 2} and made.places("id") is made.places("id")
    assert made.take([2]).places("id") == {"c": 0}
    made.append(Query("d", "x"))
    assert list(made.places("id").items())[3] == ("d", 3)


def test_what_is_compact_already_stays():
    made = Compact([1])
    assert compact(made) is made and compact([1]) == made


def test_text_beside_ascii_takes_its_bytes_and_not_twice_its_characters():
    text = "a" * 10_000 + "’"
    assert Compact([Query("x", Conversation([{"role": "user", "content": text}]))]).nbytes < 1.05 * len(text)
