"""Transcripts of HH: turns to text and back, on what real and hostile transcripts hold."""

import copy
import pickle
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ple_jax.core.conversation import Conversation, merge, parse, render


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


# pieces that parsers trip over, besides any character
hostile = st.lists(
    st.one_of(
        st.sampled_from(["Human:", "Assistant:", "\n", "\n\n", "\r\n", " ", "\u2028", "\x85", "\x0b", "System:", ":", "\0"]),
        st.text(max_size=4),
    ),
    max_size=12,
).map("".join)


def marked(content):
    plain = content.replace("\r\n", "\n")
    return any(f"\n\n{speaker}:" in plain for speaker in ("Human", "Assistant"))


contents = hostile.map(str.strip).filter(lambda c: not marked(c))
turns = st.lists(st.one_of(st.builds(user, contents), st.builds(assistant, contents)))


def test_a_transcript_by_hand():
    text = "\n\nHuman: Is it late?\n\nAssistant: It is ten.\n\nOr eleven.\n\nHuman: Thanks"
    messages = [user("Is it late?"), assistant("It is ten.\n\nOr eleven."), user("Thanks")]
    assert parse(text) == messages and render(messages) == text


@given(turns)
def test_parse_undoes_render(messages):
    assert parse(render(messages)) == messages


@given(contents.filter(lambda c: c and not c.startswith(("Human:", "Assistant:"))), turns)
def test_parse_undoes_render_with_a_system_turn(content, messages):
    assert parse(render([system(content), *messages])) == [system(content), *messages]


@given(hostile)
def test_parse_takes_any_text_and_loses_nothing_but_marks_and_blanks(text):
    def letters(text):
        return "".join(text.replace("Human:", "").replace("Assistant:", "").split())

    found = parse(text)
    assert letters("".join(turn["content"] for turn in found)) == letters(text)
    assert all(turn["content"] == turn["content"].strip() for turn in found)
    assert parse(render(found)) == found or found[0]["role"] == "system" or any(marked(t["content"]) for t in found)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("", []),
        (" \n ", []),
        ("Human: a\n\nAssistant: b", [user("a"), assistant("b")]),  # no newlines at the start
        ("\nAssistant: a", [assistant("a")]),
        ("\n\nAssistant: first\n\nHuman: b", [assistant("first"), user("b")]),
        ("\n\nHuman: he said Human: hi\nHuman: ho", [user("he said Human: hi\nHuman: ho")]),  # in a line, after one newline
        ("\n\nHuman: Human: a", [user("Human: a")]),
        ("\n\nHuman:\n\nAssistant:", [user(""), assistant("")]),
        ("\n\nHuman: \n\nHuman: b\n\nHuman: c", [user(""), user("b"), user("c")]),
        ("A talk.\n\nHuman: a", [system("A talk."), user("a")]),
        ("only text, no turn", [system("only text, no turn")]),
        ("\r\n\r\nHuman: a\r\nb\r\n\r\nAssistant: c\r\n", [user("a\r\nb"), assistant("c")]),
        ("\n\nHuman: a\n\n\n\nAssistant: b", [user("a"), assistant("b")]),
        ("\n\nHuman: a\u2028\u2028Assistant: b", [user("a\u2028\u2028Assistant: b")]),
        ("\n\nHuman: a\x85\x85Assistant: b\x0c\x0cHuman: c", [user("a\x85\x85Assistant: b\x0c\x0cHuman: c")]),
        ("\n\nHuman: a\n\nhuman: b\n\n Human: c", [user("a\n\nhuman: b\n\n Human: c")]),
        ("\n\nHuman: a\n\nHuman Resources: b", [user("a\n\nHuman Resources: b")]),
        ("\n\nHuman:a", [user("a")]),
    ],
)
def test_where_turns_begin(text, messages):
    assert parse(text) == messages


@pytest.mark.parametrize("filler", ["a", " ", "\n", "\r\n", "\n\n ", "\n\nHuman", "\n\nHuman: ", "Assistant: "])
def test_long_turns_take_linear_time(filler):
    def seconds(n):
        text = "\n\nHuman: " + filler * (n // len(filler)) + "\n\nAssistant: b"
        begin = time.process_time()
        assert parse(text)[-1] == assistant("b")
        return time.process_time() - begin

    assert seconds(2_000_000) < 3  # of a quadratic parser: hours


def test_other_roles_by_their_names():
    messages = [system("Be kind."), user("a"), {"role": "tool", "content": "4"}, system("b")]
    assert render(messages) == "Be kind.\n\nHuman: a\n\nTool: 4\n\nSystem: b"
    assert render([]) == "" and render([assistant("")]) == "\n\nAssistant:"


def test_turns_of_one_speaker_become_one():
    messages = [user("a"), user("b"), assistant("c"), assistant(""), assistant("d"), user("e")]
    assert merge(messages) == [user("a\n\nb"), assistant("c\n\nd"), user("e")]
    assert messages[0] == user("a") and merge([]) == []


@given(turns)
def test_merged_speakers_take_turns(messages):
    roles = [turn["role"] for turn in merge(messages)]
    assert all(a != b for a, b in zip(roles, roles[1:], strict=False))
    assert [t["role"] for t in messages[:1]] == roles[:1]


def test_a_conversation_reads_as_its_open_transcript():
    prompt = Conversation([user("a"), assistant("b"), user("c")], [{"name": "clock"}])
    assert prompt == "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert prompt.messages == (user("a"), assistant("b"), user("c")) and prompt.tools == ({"name": "clock"},)
    for twin in (copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert (twin, twin.messages, twin.tools) == (prompt, prompt.messages, prompt.tools)
    assert Conversation([user("a")]).tools == ()
