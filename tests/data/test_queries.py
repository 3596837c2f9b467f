"""Query sets: what is read, what is refused, and what an iteration draws."""

import json
import pickle
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.default import get_config
from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import UserError
from ple_jax.core.types import Query
from ple_jax.data.formats import shorten
from ple_jax.data.left_out import Bad, QuerySet, check_share, write_bad
from ple_jax.data.load import load_data
from ple_jax.data.queries import digest, disjoint, draw, load_queries


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return str(path)


def numbered(n):
    return [Query(str(i), f"prompt {i}") for i in range(n)]


def test_load_reads_all_columns_and_skips_blank_lines(tmp_path):
    source = write(tmp_path / "q.jsonl", {"prompt": "A film", "id": "x"}, "", {"prompt": " B", "completion": "c"}, "")
    assert load_queries(source) == ([Query("x", "A film"), Query("q:3", " B", "c")], [])


def test_load_cuts_lines_at_line_ends_only(tmp_path):
    source = write(tmp_path / "q.jsonl", '{"prompt": "one\u2028two\u0085three"}', {"prompt": "b"})
    assert [q.prompt for q in load_queries(source).queries] == ["one\u2028two\u0085three", "b"]


@pytest.mark.parametrize(
    ("lines", "kind", "says"),
    [
        ([{"prompt": "a"}, {"text": "a", "label": 1}], "column", r"q\.jsonl:2 has no `prompt`, only text, label"),
        ([{"prompt": "a"}, {"prompt": " \t"}], "empty", r"q\.jsonl:2: `prompt` is empty"),
        ([{"prompt": "a"}, '{"prompt": "b"'], "json", r"q\.jsonl:2 is not JSON"),
        ([r'{"prompt": "half \ud83c"}'], "json", r"q\.jsonl:1 is not JSON .*surrogates"),
        (["[1]"], "json", r"q\.jsonl:1 is a list"),
        ([{"prompt": 3}], "type", r"q\.jsonl:1: `prompt` is a int"),
        ([{"prompt": "a", "completion": 3}], "type", r"q\.jsonl:1: `completion` is a int"),
        ([{"prompt": "a"}, {"prompt": None, "text": "b"}], "column", r"q\.jsonl:2 has no `prompt`, only text"),
        ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}], "duplicate id", r"q\.jsonl:2: id '1' is already on line 1"),
    ],
)
def test_a_bad_record_names_file_and_line(tmp_path, lines, kind, says):
    source = write(tmp_path / "q.jsonl", *lines)
    task = load_queries(source)
    assert [b.kind for b in task.bad] == [kind] and len(task.queries) == len(lines) - 1
    with pytest.raises(UserError, match=f"^.*{says}"):
        check_share(task, source, 0.05)


def test_records_of_several_forms_in_one_table(tmp_path):
    """A table has every column in every row, and None where a record has it not."""
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    columns = ("prompt", "completion", "messages", "chosen", "rejected")
    pair = {"prompt": "x", "chosen": "c", "rejected": "r"}
    given = [{"prompt": "x"}, {"prompt": "x", "completion": "y"}, {"messages": turns}, pair]
    table = [dict.fromkeys(columns) | {"id": str(i)} | record for i, record in enumerate(given)]
    alone = [{"id": str(i)} | record for i, record in enumerate(given)]
    for needs, bad in (("prompt", 0), ("completion", 1), ("pair", 3)):
        files = [write(tmp_path / f"{name}.jsonl", *rows) for name, rows in (("a", table), ("b", alone))]
        found = [load_queries(file, needs=needs) for file in files]
        assert found[0].queries == found[1].queries and len(found[0].bad) == len(found[1].bad) == bad


def test_the_share_of_bad_records_is_of_all_that_were_read(tmp_path):
    source = write(tmp_path / "q.jsonl", *({"prompt": f"p{i}" if i % 20 else ""} for i in range(200)))
    c = get_config()
    c.task.train, c.task.max_train, c.task.heldout, c.task.format = source, 20, "tiny_heldout", "records"
    found = load_data(c)
    assert len(found.train) == 20 and len(found.bad["train"]) == 10
    c.task.max_bad_share = 0.04
    with pytest.raises(UserError, match="10 of 200 records of"):
        load_data(c)


def test_a_file_in_another_encoding(tmp_path):
    (tmp_path / "q.jsonl").write_bytes('{"prompt": "café"}\n{"prompt": "tea"}'.encode("latin-1"))
    queries, bad = load_queries(str(tmp_path / "q.jsonl"))
    assert queries == [Query("q:2", "tea")] and bad[0].kind == "utf-8"
    assert "q.jsonl:1 is not UTF-8" in bad[0].reason and bad[0].where.endswith("q.jsonl:1")


def test_an_unknown_set_lists_the_built_in_ones():
    with pytest.raises(UserError, match="quickstart_heldout, quickstart_test, .*did you mean 'quickstart_train'"):
        load_queries("quickstart_trian")


def test_a_source_without_records(tmp_path):
    with pytest.raises(UserError, match=r"q\.jsonl holds no record"):
        load_queries(write(tmp_path / "q.jsonl", "", ""))


def test_a_column_that_no_record_has_stops_at_once(tmp_path):
    source = write(tmp_path / "q.jsonl", {"question": "a", "n": 1}, "broken", {"question": "b"})
    with pytest.raises(UserError, match=r"q\.jsonl:1 has no `prompt`, only question, n.*--config.task.columns=\"{'prompt'"):
        load_queries(source)
    queries, bad = load_queries(source, columns={"prompt": "question"})
    assert [q.prompt for q in queries] == ["a", "b"] and [b.kind for b in bad] == ["json"]


def test_a_column_that_is_named_wrongly_is_said(tmp_path):
    source = write(tmp_path / "q.jsonl", {"question": "a", "n": 1}, {"question": "b", "n": 2})
    with pytest.raises(UserError) as error:
        load_queries(source, columns={"prompt": "quesiton"})
    assert str(error.value).endswith(
        "q.jsonl:1 has no column 'quesiton', which config.task.columns names as 'prompt', only question, n;"
        " did you mean 'question'?"
    )
    mixed = write(tmp_path / "m.jsonl", {"question": "a"}, {"n": 1}, {"question": ""})
    mixed = load_queries(mixed, columns={"prompt": "question"})
    assert [bad.kind for bad in mixed.bad] == ["column", "empty"] and "has no column 'question'" in mixed.bad[0].reason


def test_a_column_gets_the_name_that_a_reward_reads(tmp_path):
    file = tmp_path / "q.csv"
    file.write_text("Request,Word limit\nwrite,40\n")
    found = load_queries(str(file), columns={"prompt": "Request", "limit": "Word limit"}, reads=("limit",))
    assert [query.record for query in found.queries] == [{"limit": "40"}]  # a cell of a CSV file is text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"prompt;n\na;1\n", "q.csv:1 names one column, 'prompt;n': separate fields by commas and not by ';'"),
        (b"prompt\tn\na\t1\n", r"separate fields by commas and not by '\\t'"),
        ("prompt,n\na,1\n".encode("utf-16"), "q.csv:1 is not UTF-8; convert the file"),
    ],
)
def test_a_csv_file_of_another_kind_is_named(tmp_path, content, says):
    (tmp_path / "q.csv").write_bytes(content)
    with pytest.raises(UserError, match=says):
        load_queries(str(tmp_path / "q.csv"))


def test_columns_may_change_places(tmp_path):
    source = write(tmp_path / "q.jsonl", {"prompt": "b", "completion": "a"})
    assert load_queries(source, columns={"prompt": "completion", "completion": "prompt"}).queries == [Query("q:1", "a", "b")]


def test_two_names_for_one_column(tmp_path):
    source = write(tmp_path / "q.jsonl", {"question": "a", "answer": "b"})
    columns = {"prompt": "question", "completion": "answer", "answer": "answer"}
    (query,) = load_queries(source, columns=columns, reads=("answer", "completion")).queries
    assert (query.prompt, query.completion, query.record) == ("a", "b", {"answer": "b", "completion": "b"})


def test_columns_of_a_table_without_a_name_are_no_matter_and_two_of_one_are(tmp_path):
    (tmp_path / "q.csv").write_text("prompt,answer,,\na,b,,\n")
    assert [query.prompt for query in load_queries(str(tmp_path / "q.csv")).queries] == ["a"]
    (tmp_path / "q.csv").write_text("prompt,answer,answer\na,b,c\n")
    with pytest.raises(UserError, match=r"q.csv:1 names the column 'answer' twice"):
        load_queries(str(tmp_path / "q.csv"))


def test_an_answer_that_only_calls_a_tool_has_no_text_for_a_reward(tmp_path):
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"n": 1}}}]
    for content in (None, " "):
        said = [{"role": "assistant", "content": content, "tool_calls": calls}]
        source = write(tmp_path / "q.jsonl", {"prompt": [{"role": "user", "content": "a"}], "completion": said})
        found = load_queries(source, reads=("completion",))
        assert not found.queries and "has an empty `completion`" in found.bad[0].reason


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


TOOL = {"type": "function", "function": {"name": "clock"}}
NONE = {"tool_calls": None, "name": None}  # as Arrow fills up what other rows have


@pytest.mark.parametrize(
    ("record", "needs", "turns", "answers"),
    [
        ({"prompt": [user(" a ")]}, "prompt", [user(" a ")], ("", "")),
        ({"prompt": [user("a")], "completion": [assistant(" b ")]}, "completion", [user("a")], ("b", "")),
        ({"prompt": [user("a")], "completion": " b"}, "completion", [user("a")], ("b", "")),
        ({"prompt": "a", "completion": [assistant("b")]}, "completion", [user("a")], ("b", "")),
        ({"prompt": "a", "completion": [user("a"), assistant("b")]}, "completion", [user("a")], ("b", "")),
        ({"prompt": [system("s"), user("a")], "completion": [user("a"), assistant("b")]}, "completion",
         [system("s"), user("a")], ("b", "")),
        ({"messages": [{**system("s"), "role": "developer"}, user("a")]}, "prompt", [system("s"), user("a")], ("", "")),
        ({"prompt": [system("s")], "completion": [user("a"), assistant("b")]}, "completion",
         [system("s"), user("a")], ("b", "")),
        ({"messages": [user("a"), {**assistant("b"), "tool_calls": []}, user("c")]}, "prompt",
         [user("a"), assistant("b"), user("c")], ("", "")),
        ({"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}, "completion",
         [user("a"), assistant("b"), user("c")], ("d", "")),
        ({"messages": [user("a"), assistant("b"), user("c")]}, "prompt", [user("a"), assistant("b"), user("c")], ("", "")),
        ({"prompt": "a", "messages": [user("a"), assistant("b")]}, "completion", [user("a")], ("b", "")),
        ({"messages": [{**user("a"), **NONE}, {**assistant("b"), **NONE}]}, "completion", [user("a")], ("b", "")),
        ({"prompt": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]}, "prompt",
         [user("ab")], ("", "")),
        ({"messages": [user("a"), {**assistant(None), "tool_calls": [TOOL]}, {"role": "tool", "content": "4"}]}, "prompt",
         [user("a"), {**assistant(""), "tool_calls": [TOOL]}, {"role": "tool", "content": "4"}], ("", "")),
        ({"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}, "pair", [user("a")], ("b", "c")),
        ({"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]}, "pair", [user("a")], ("b", "c")),
        ({"prompt": [user("a")], "chosen": "b ", "rejected": " c"}, "pair", [user("a")], ("b", "c")),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}, "pair", [user("a")], ("b", "c")),
        # the prompt in a column, and once more in the lists
        ({"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}, "pair",
         [user("a")], ("b", "c")),
        # the answers have turns in common, which belong to the query
        ({"prompt": [user("a")], "chosen": [assistant("b"), user("c"), assistant("d")],
          "rejected": [assistant("b"), user("c"), assistant("e")]}, "pair",
         [user("a"), assistant("b"), user("c")], ("d", "e")),
        # a system turn alone in the column, and the rest in the lists
        ({"prompt": [system("s")], "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}, "pair",
         [system("s"), user("a")], ("b", "c")),
        ({"prompt": [system("s"), user("a")], "chosen": [user("a"), assistant("b")],
          "rejected": [user("a"), assistant("c")]}, "pair", [system("s"), user("a")], ("b", "c")),
        ({"prompt": [user("x"), assistant("y")], "chosen": [user("a"), assistant("b")],
          "rejected": [user("a"), assistant("c")]}, "pair", [user("x"), assistant("y"), user("a")], ("b", "c")),
        ({"prompt": [user("a")], "chosen": [system("s"), user("a"), assistant("b")],
          "rejected": [system("s"), user("a"), assistant("c")]}, "pair", [system("s"), user("a")], ("b", "c")),
        ({"prompt": [system("s"), user("x"), assistant("y"), user("a")],
          "chosen": [system("s"), user("x"), assistant("y"), user("a "), assistant("b")],
          "rejected": [assistant("c")]}, "pair", [system("s"), user("x"), assistant("y"), user("a")], ("b", "c")),
        ({"prompt": "A?", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}, "pair",
         [user("a")], ("b", "c")),  # a text may be spelled otherwise
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]}, "prompt", [user("a")], ("b", "")),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "pair",
         [user("a")], ("b", "c")),
    ],
)  # fmt: skip
def test_records_with_turns(tmp_path, record, needs, turns, answers):
    queries, bad = load_queries(write(tmp_path / "q.jsonl", record), needs=needs)
    assert not bad and isinstance(queries[0].prompt, Conversation)
    assert list(queries[0].prompt.messages) == turns and queries[0][2:4] == answers


@pytest.mark.parametrize(
    ("record", "needs", "query"),
    [
        ({"prompt": "a ", "completion": " b "}, "completion", ("a ", " b ", "")),
        ({"prompt": "a", "chosen": " b", "rejected": " c"}, "pair", ("a", " b", " c")),
        ({"prompt": "a", "chosen": " b"}, "completion", ("a", " b", "")),
        ({"chosen": "The sky is blue.", "rejected": "The sky is black."}, "pair", ("The sky is", " blue.", " black.")),
        ({"chosen": "The sky is", "rejected": "The sky isn't"}, "pair", ("The sky", " is", " isn't")),
        ({"prompt": "a", "completion": ""}, "prompt", ("a", "", "")),
        ({"prompt": "a", "tools": None}, "prompt", ("a", "", "")),
    ],
)
def test_records_of_texts(tmp_path, record, needs, query):
    assert load_queries(write(tmp_path / "q.jsonl", record), needs=needs).queries == [Query("q:1", *query)]


@pytest.mark.parametrize(
    ("record", "needs", "kind", "says"),
    [
        ({"prompt": "a", "completion": " "}, "completion", "empty", "the answer is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "pair", "empty", "the rejected answer is empty"),
        ({"prompt": "a", "chosen": " b", "rejected": "b"}, "pair", "pair", "are the same"),
        ({"prompt": []}, "prompt", "turns", "`prompt` is empty, not a list of turns"),
        ({"prompt": [user(" ")]}, "prompt", "empty", "the query is empty"),
        ({"prompt": [user("a"), assistant("b")]}, "prompt", "turns", "the query ends with the assistant's turn"),
        ({"prompt": [user("a")], "completion": [user("b")]}, "completion", "turns", "does not end with the assistant's"),
        ({"prompt": ["a"]}, "prompt", "turns", "turn 0 of `prompt` is 'a'"),
        ({"prompt": [{"role": "user"}]}, "prompt", "type", "`content` of turn 0 of `prompt` is 'None'"),
        ({"prompt": [user([{"type": "image", "image": "x"}])]}, "prompt", "type", "`content` of turn 0"),
        ({"messages": [user("a")]}, "completion", "turns", "`messages` does not end with the assistant's turn"),
        ({"messages": "a"}, "prompt", "turns", "`messages` is a text, not a list of turns"),
        ({"messages": [assistant("a")]}, "prompt", "empty", "the query is empty"),
        ({"chosen": [user("a")], "rejected": [user("a")]}, "pair", "turns", "`chosen` does not end with the assistant's"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]}, "pair", "different queries", ""),
        ({"chosen": "blue", "rejected": "black"}, "pair", "empty", "begin with nothing in common"),
        (
            {"prompt": [user("x")], "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            "pair",
            "turns",
            "`prompt` ends with the user's turn, and `chosen` begins with another one",
        ),
        (
            {"prompt": [user("x")], "completion": [user("a"), assistant("b")]},
            "completion",
            "turns",
            "`prompt` ends with the user's turn, and `completion` begins with another one",
        ),
        ({"messages": [user("a"), {**assistant(""), "reasoning_content": "b"}]}, "completion", "empty", "answer is empty"),
        ({"prompt": [user("a")], "tools": "{"}, "prompt", "tools", "`tools` is not JSON"),
        ({"prompt": [user("a")], "tools": ["clock"]}, "prompt", "tools", "not a list of objects"),
        ({"prompt": "a", "chosen": float("nan"), "rejected": "b"}, "pair", "type", "`chosen` is a float"),
    ],
)
def test_records_that_cannot_be_used(tmp_path, record, needs, kind, says):
    source = write(tmp_path / "q.jsonl", record)
    task = load_queries(source, needs=needs)
    assert not task.queries and task.bad[0].kind == kind
    with pytest.raises(UserError, match=rf"q\.jsonl:1: .*{says}"):
        check_share(task, source, 1.0)  # none is left


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_go_to_the_chat_template(tmp_path, tools):
    source = write(tmp_path / "q.jsonl", {"prompt": [user("How late is it?")], "tools": tools})
    assert load_queries(source).queries[0].prompt.tools == (TOOL,)


def called(**arguments):
    return {"type": "function", "function": {"name": "clock", "arguments": arguments}}


def test_an_answer_is_more_than_its_text(tmp_path):
    """What Arrow writes for values that other rows have is no part of it, at any depth."""
    told = {**assistant(" now "), "tool_calls": [called(zone="UTC", hour=None, more={"a": None, "b": [1, None]})], "x": None}
    thought = {**assistant("b"), "reasoning_content": "c"}
    rows = [
        {"messages": [user("a"), told], "tools": [{**TOOL, "strict": None}]},
        {"prompt": [user("b")], "completion": [{**assistant(None), "tool_calls": [called()]}]},
        {"prompt": [user("c")], "chosen": [thought], "rejected": [assistant("b")]},
        {"prompt": [user("d")], "completion": [{**assistant("b"), "tool_calls": [], "reasoning_content": None}]},
    ]
    queries, bad = load_queries(write(tmp_path / "q.jsonl", *rows), needs="completion")
    assert not bad and [str(q.completion) for q in queries] == ["now", "", "b", "b"]
    wanted = {**assistant("now"), "tool_calls": [called(zone="UTC", more={"b": [1, None]})]}
    assert queries[0].completion.message == wanted and queries[0].prompt.tools == (TOOL,)
    assert queries[1].completion and queries[1].completion.message["tool_calls"] == [called()]
    assert queries[2].completion.message == thought and type(queries[2].rejected) is str
    assert type(queries[3].completion) is str
    assert pickle.loads(pickle.dumps(queries[0].completion)).message == wanted


def test_answers_of_equal_texts_may_differ(tmp_path):
    one, other = ({**assistant("b"), "tool_calls": [called(zone=zone)]} for zone in ("UTC", "CET"))
    rows = [{"prompt": [user("a")], "chosen": [one], "rejected": [second]} for second in (other, assistant("b"), one)]
    queries, bad = load_queries(write(tmp_path / "q.jsonl", *rows), needs="pair")
    assert [q.id for q in queries] == ["q:1", "q:2"] and [b.kind for b in bad] == ["pair"]
    assert len({digest([q._replace(id="")]) for q in queries}) == 2


@pytest.mark.parametrize("needs", ["completion", "pair"])
def test_what_is_needed_must_be_there(tmp_path, needs):
    source = write(tmp_path / "q.jsonl", {"prompt": "a"})
    with pytest.raises(UserError, match=r":1 has no `(completion|chosen)`, only prompt; rename the column"):
        load_queries(source, needs=needs)


def hh(*turns):
    return "".join(f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {turn}" for i, turn in enumerate(turns))


def test_hh_the_query_is_all_before_the_last_answer(tmp_path):
    rows = [
        {"chosen": hh("a", "b", "c", " d "), "rejected": hh("a", "b", "c", "e")},
        {"chosen": hh("a", "b"), "rejected": hh("x", "c")},
        {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d", "rejected": hh("a\n\nb", "c\n\nd")},
        {"chosen": hh("a", "b", "c", "d"), "rejected": "no turns"},
    ]
    source = write(tmp_path / "q.jsonl", *rows)
    queries, bad = load_queries(source, format="hh")
    assert not bad and [q.id for q in queries] == [f"q:{i}" for i in (1, 2, 3, 4)]
    assert queries[0] == Query("q:1", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "d", "e")
    assert list(queries[0].prompt.messages) == [user("a"), assistant("b"), user("c")]
    assert queries[1][2:4] == ("b", "") and queries[3][2:4] == ("d", "")
    assert list(queries[2].prompt.messages) == [user("a\n\nb")] and queries[2].completion == "c\n\nd"  # speakers take turns
    queries, bad = load_queries(source, format="hh", needs="pair")
    assert [q.id for q in queries] == ["q:1"] and [b.kind for b in bad] == ["different queries", "pair", "turns"]


@pytest.mark.parametrize(
    ("chosen", "kind"),
    [
        (hh("a"), "turns"),
        (hh("a", "b", "c"), "turns"),
        ("text", "turns"),
        ("", "turns"),
        (hh("a", ""), "empty"),
        (hh("", "b"), "empty"),
        ("\n\nAssistant: b", "empty"),
        (None, "type"),
        (3, "type"),
    ],
)
def test_hh_that_cannot_be_used(tmp_path, chosen, kind):
    queries, bad = load_queries(write(tmp_path / "q.jsonl", {"chosen": chosen, "rejected": hh("a", "c")}), format="hh")
    assert not queries and bad[0].kind == kind


REVIEW = "<br>A <BR/>film\t<br />that</ br >goes  on<br clear='all'>and on < br / > until it ends."


def test_imdb_the_first_words_are_the_query(tmp_path):
    source = write(tmp_path / "q.jsonl", *[{"text": REVIEW, "label": i % 2} for i in range(200)])
    queries, bad = load_queries(source, format="imdb", words=(2, 4), seed=1)
    assert not bad and {q.prompt + q.completion for q in queries} == {"A film that goes on and on until it ends."}
    counts = [sum(len(q.prompt.split()) == n for q in queries) for n in (2, 3, 4)]
    assert sum(counts) == 200 and min(counts) > 40  # uniform: 67 each, with a standard deviation of 7
    assert queries[0].completion.startswith(" ") and not queries[0].completion.startswith("  ")
    assert load_queries(source, format="imdb", words=(2, 4), seed=1).queries == queries
    assert load_queries(source, format="imdb", words=(2, 4), seed=2).queries != queries
    assert {len(q.prompt.split()) for q in load_queries(source, format="imdb", words=(3, 3)).queries} == {3}


def test_imdb_the_number_of_words_depends_on_the_record_alone(tmp_path):
    rows = [{"text": REVIEW, "label": 1}] * 20
    whole = load_queries(write(tmp_path / "q.jsonl", *rows), format="imdb").queries
    (tmp_path / "other").mkdir()
    part = load_queries(write(tmp_path / "other" / "q.jsonl", "broken", *rows[1:]), format="imdb").queries
    assert part == whole[1:]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "A film that goes on", "label": float("nan")}, "label"),
        ({"text": "A film that goes on", "label": None}, "label"),
        ({"text": "A film that goes on", "label": ""}, "label"),
        ({"text": "A film that goes on"}, "label"),
        ({"text": " <br /> ", "label": 1}, "empty"),
        ({"text": "A film", "label": 1}, "short"),
        ({"text": "A film<br />", "label": 1}, "short"),
        ({"text": None, "label": 1}, "type"),
        ({"label": 1}, "column"),
    ],
)
def test_imdb_that_cannot_be_used(tmp_path, row, kind):
    good = {"text": "A film that goes on", "label": 0}
    queries, bad = load_queries(write(tmp_path / "q.jsonl", good, row, good), format="imdb", words=(2, 2))
    assert len(queries) == 2 and [b.kind for b in bad] == [kind] and bad[0].where.endswith(":2")


def test_imdb_labels_are_not_missed_where_there_are_none(tmp_path):
    source = write(tmp_path / "q.jsonl", {"text": "A film that goes on"}, {"text": "Another film that ends"})
    assert len(load_queries(source, format="imdb", words=(2, 2)).queries) == 2
    with pytest.raises(UserError, match="config.task.words=.3, 2. must be"):
        load_queries(source, format="imdb", words=(3, 2))
    assert load_queries(source, format="imdb", words=(2, 2), needs="pair").bad[0].kind == "pair"


POST = "SUBREDDIT: r/dogs\n\nTITLE: My dog\n\nPOST: It barks.\n\nTL;DR:"
INFO = {"id": "t3", "subreddit": "dogs", "title": "My dog", "post": "It barks.\n", "site": None}


@pytest.mark.parametrize(
    ("record", "needs", "answers"),
    [
        ({"prompt": POST, "label": "loud dog"}, "completion", (" loud dog", "")),
        ({"prompt": POST, "completion": " loud dog"}, "completion", (" loud dog", "")),
        ({"prompt": POST[:-7], "chosen": "TL;DR:  loud dog", "rejected": "tldr: dog"}, "pair", (" loud dog", " dog")),
        ({"info": INFO, "summaries": [{"text": " dog"}, {"text": " loud"}], "choice": 1}, "pair", (" loud", " dog")),
        ({"info": INFO, "summaries": [{"text": "dog"}, {"text": "loud"}], "choice": 0}, "completion", (" dog", " loud")),
        ({"subreddit": "r/dogs", "title": "My dog", "post": "It barks.", "summary": "dog"}, "completion", (" dog", "")),
        ({"prompt": POST}, "prompt", ("", "")),
    ],
)
def test_tldr_in_every_published_layout(tmp_path, record, needs, answers):
    queries, bad = load_queries(write(tmp_path / "q.jsonl", record), format="tldr", needs=needs)
    assert not bad and queries == [Query("q:1", POST, *answers)]


@pytest.mark.parametrize("end", ["", "\n", "\nTL;DR: ", "\n\nTL;DR", "\ntldr:", "\nTl;Dr :", "\nTL;DR:\nTLDR:\t", " TL DR"])
def test_tldr_ends_with_its_mark_once(tmp_path, end):
    source = write(tmp_path / "q.jsonl", {"prompt": POST.removesuffix("\n\nTL;DR:") + end, "label": "x"})
    assert load_queries(source, format="tldr").queries[0].prompt == POST


@pytest.mark.parametrize(
    ("record", "needs", "kind"),
    [
        ({"info": INFO, "summaries": [{"text": "a"}], "choice": 0}, "pair", "pair"),
        ({"info": INFO, "summaries": [{"text": "a"}, {"text": "b"}], "choice": None}, "pair", "pair"),
        ({"info": INFO, "summaries": [{"text": "a"}, {"text": "a "}], "choice": 1}, "pair", "pair"),
        ({"info": INFO, "summaries": None, "choice": 1}, "pair", "pair"),
        ({"info": {**INFO, "post": None}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}, "pair", "type"),
        ({"info": {**INFO, "post": " "}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}, "pair", "empty"),
        ({"prompt": "TL;DR:", "label": "a"}, "prompt", "empty"),
        ({"prompt": POST, "label": " "}, "completion", "empty"),
        ({"prompt": POST, "chosen": "TL;DR:", "rejected": "a"}, "pair", "empty"),
        ({"prompt": POST, "label": 3}, "completion", "type"),
    ],
)
def test_tldr_that_cannot_be_used(tmp_path, record, needs, kind):
    queries, bad = load_queries(write(tmp_path / "q.jsonl", record), format="tldr", needs=needs)
    assert not queries and [b.kind for b in bad] == [kind]


LONG = "SUBREDDIT: r/dogs\n\nTITLE: My dog\n\nPOST: One two. Three four!\nFive six.\n\nSeven.\n\nTL;DR:"


@pytest.mark.parametrize(
    ("kept", "post"),
    [
        ("One two. Three four!\nFive six.\n\nSeven.", "One two. Three four!\nFive six.\n\nSeven."),
        ("One two. Three four!\nFive six.\n\nSeve", "One two. Three four!\nFive six."),
        ("One two. Three four!\nFive six", "One two. Three four!"),  # not within a paragraph
        ("One two. Three four", "One two."),  # not even the first paragraph: at a sentence
        ("One two", "One"),  # at a word
        ("One", "One"),
    ],
)
def test_a_post_is_cut_at_its_paragraphs(kept, post):
    most = len(LONG) - len("One two. Three four!\nFive six.\n\nSeven.") + len(kept)
    assert shorten(LONG, lambda text: len(text) <= most) == f"{LONG[: LONG.index('One')]}{post}\n\nTL;DR:"


def test_a_post_of_which_nothing_fits():
    shortest = len("SUBREDDIT: r/dogs\n\nTITLE: My dog\n\nPOST: One\n\nTL;DR:")
    assert shorten(LONG, lambda text: len(text) < shortest) is None
    assert shorten("One two three\n\nTL;DR:", lambda text: len(text) < 17) == "One two\n\nTL;DR:"


@given(st.text(" \nab.!", max_size=60), st.integers(0, 120))
def test_the_shortened_fits_and_is_a_beginning(post, most):
    prompt = f"TITLE: T\n\nPOST: {post.lstrip()}\n\nTL;DR:"
    found = shorten(prompt, lambda text: len(text) <= most)
    if found is not None:
        assert len(found) <= most and found.endswith("\n\nTL;DR:") and found.startswith("TITLE: T\n\nPOST: ")
        assert prompt.startswith(found.removesuffix("\n\nTL;DR:"))
    elif post.split():
        assert len(f"TITLE: T\n\nPOST: {post.split()[0]}\n\nTL;DR:") > most


def test_a_limit_is_a_seeded_choice_in_order(tmp_path):
    source = write(tmp_path / "q.jsonl", *[{"prompt": f"{i}", "id": f"{i:03}"} for i in range(100)], "broken")
    some = load_queries(source, limit=30, seed=1)
    ids = [q.id for q in some.queries]
    assert len(set(ids)) == 30 and ids == sorted(ids) and len(some.bad) == 1
    assert load_queries(source, limit=30, seed=1) == some and load_queries(source, limit=30, seed=2) != some
    assert len(load_queries(source, limit=100).queries) == len(load_queries(source, limit=500).queries) == 100
    assert ids != [f"{i:03}" for i in range(30)]
    stream = load_queries(source, limit=30, streaming=True)
    assert [q.id for q in stream.queries] == [f"{i:03}" for i in range(30)] and not stream.bad


def test_what_is_here_is_no_stream(tmp_path):
    """A limit draws from all of a file, whatever another set of the run, on a hub, is asked for."""
    source = write(tmp_path / "q.jsonl", *[{"prompt": f"{i}", "id": f"{i:03}"} for i in range(100)])
    c = get_config()
    c.task.train, c.task.max_train, c.task.heldout, c.task.max_heldout = source, 30, "tiny_heldout", 5
    drawn = load_data(c)
    c.task.streaming = True
    assert load_data(c) == drawn and [q.id for q in drawn.train] != [f"{i:03}" for i in range(30)]


def test_a_stream_of_which_nothing_is_of_use_is_not_read_to_its_end(tmp_path):
    source = write(tmp_path / "q.jsonl", *[{"text": "a"}] * 1500, {"prompt": "b"})
    with pytest.raises(UserError, match="has no `prompt`"):
        load_queries(source, streaming=True, limit=1)
    assert len(load_queries(source).bad) == 1500


def test_the_share_of_bad_records():
    bad = [Bad("f:1", "json", "f:1 is not JSON", ""), Bad("f:2", "empty", "f:2: empty", "")]
    queries = numbered(8)
    check_share(QuerySet(queries, bad), "f", 0.2)
    with pytest.raises(UserError) as error:
        check_share(QuerySet(queries, bad), "f", 0.19)
    assert str(error.value).startswith(
        "f:1 is not JSON; 2 of 10 records of f cannot be used: 1 json (f:1), 1 empty (f:2); more than"
    )
    assert "scripts/prepare_data.py" in str(error.value) and "--config.task.max_bad_share=0.21" in str(error.value)
    for empty in (QuerySet([], bad), QuerySet([], [])):
        with pytest.raises(UserError, match="cannot be used|no record that can be used"):
            check_share(empty, "f", 1.0)


def test_the_places_of_bad_records_are_named():
    bad = [Bad(f"a/f:{i}", "json", "", "") for i in range(1, 12)]
    bad += [Bad("a/f:12", "empty", "", ""), Bad("g:3", "empty", "", ""), Bad("q7", "empty", "", "")]
    with pytest.raises(UserError) as error:
        check_share(QuerySet(numbered(8), bad), "f", 0.1)
    assert "11 json (a/f:1, 2, 3, 4, 5, 6, 7, 8 and 3 more), 3 empty (a/f:12, g:3, q7); more than" in str(error.value)


def test_what_was_left_out_is_written_down(tmp_path):
    bad = [Bad("f:1", "json", "f:1 is not JSON", "{\u2028"), Bad("f:2", "empty", "f:2: empty", "")]
    write_bad(tmp_path / "bad.jsonl", {"train": bad, "heldout": bad[:1]})
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [row.pop("set") for row in rows] == ["train", "train", "heldout"]
    assert [Bad(**row) for row in rows] == [*bad, bad[0]]
    write_bad(tmp_path / "bad.jsonl", {"train": [], "heldout": []})
    assert list(tmp_path.iterdir()) == []


def test_a_bad_record_is_cut(tmp_path):
    bad = load_queries(write(tmp_path / "q.jsonl", {"prompt": "a"}, {"text": "x" * 100_000}, "y" * 100_000)).bad
    assert [len(b.record) for b in bad] == [300, 300] and bad[0].record.startswith('{"text": "xxx')


def test_what_is_held_out_is_not_trained_on():
    train = [Query("t0", "The film "), Query("t1", "A ship"), Query("t2", "The film", "again")]
    assert disjoint(train, [Query("h0", "A sheep")]) == (train, [])
    kept, both = disjoint(train, [Query("h0", "A sheep"), Query("h1", "The film")])
    assert kept == [train[1]] and [(b.where, b.kind) for b in both] == [("t0", "held out too"), ("t2", "held out too")]
    assert "'t0' ('The film ') is also held-out query 'h1'" in both[0].reason
    with pytest.raises(UserError, match="'t0'.*is also held-out query 'h1'.*--config.task.heldout"):
        disjoint(train[:1], [Query("h1", "The film")])


def test_a_digest_sees_everything():
    turns = [user("a"), assistant("b"), user("c")]
    one = Query("i", Conversation(turns), "d", "e")
    others = [
        one._replace(id="j"),
        one._replace(prompt=str(one.prompt)),
        one._replace(prompt=Conversation(turns, [TOOL])),
        one._replace(prompt=Conversation([{**user("a"), "name": "n"}, *turns[1:]])),
        one._replace(completion="de", rejected=""),
        one._replace(rejected=""),
    ]
    found = {digest([q]) for q in [one, *others]} | {digest([one, one]), digest([])}
    assert len(found) == 9 and all(len(d) == 16 and int(d, 16) >= 0 for d in found)
    assert digest(iter([one, others[0]])) == digest([one, others[0]]) != digest([others[0], one])


@given(st.data(), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_every_pass_sees_every_query_once(data, size, seed):
    n = data.draw(st.integers(1, size))
    drawn = [[q.id for q in draw(numbered(size), n, seed=seed, iteration=i)] for i in range(5 * size // n + 1)]
    assert all(len(set(ids)) == n for ids in drawn)
    stream = list(chain(*drawn))
    for begin in range(0, len(stream) - size + 1, size):
        assert len(set(stream[begin : begin + size])) == size


def test_draw_depends_on_seed_and_iteration_alone():
    queries = numbered(40)
    one = draw(queries, 16, seed=3, iteration=7)
    assert one == draw(queries, 16, seed=3, iteration=7)
    assert one != draw(queries, 16, seed=4, iteration=7)
    passes = [draw(queries, 40, seed=3, iteration=i) for i in range(3)]
    assert passes[0] != passes[1] != passes[2] != queries


def test_more_than_there_are():
    assert len(draw(numbered(8), 8, seed=0, iteration=0)) == 8
    with pytest.raises(UserError, match="is 9 but there are 8 train queries"):
        draw(numbered(8), 9, seed=0, iteration=0)
