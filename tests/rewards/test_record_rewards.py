"""Rewards that know the record: what they are told, under which key it is stored, and the built-in ones."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ml_collections import FrozenConfigDict

from ple_jax import modes, rewards
from ple_jax.configs import tiny
from ple_jax.core import plugins
from ple_jax.core.answers import Cache
from ple_jax.core.errors import UserError
from ple_jax.core.types import Reward
from ple_jax.data.queries import digest, load_queries
from ple_jax.training.journal import read
from ple_jax.training.opening import read_inputs

pytest_plugins = ["servers"]


def equal(prompts, responses, answer, *, off=0.0):
    """1 where the response is the record's."""
    return [float(r == a) - off for r, a in zip(responses, answer, strict=True)]


def longer(prompts, responses, completion, label):
    assert all(isinstance(text, str) for text in completion)
    return [float(len(r) > len(c)) + n for r, c, n in zip(responses, completion, label, strict=True)]


def plain(prompts, responses, scale=2.0, **more):
    """One of those that were written before rewards knew records."""
    assert more == {}
    return [scale] * len(responses)


NAME = f"{__file__}:equal"


def values(reward, responses, records, cache=None):
    prompts = ["same"] * len(responses)
    return rewards.score(reward, prompts, responses, records=records, cache=cache).values.tolist()


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# ---------------------------------------------------------------- what a function asks for


def test_a_function_is_told_what_it_asks_for():
    reward = rewards.load(f"{__file__}:longer", {})
    assert reward.reads == ("completion", "label")
    records = [
        {"completion": "abc", "label": 10},
        {"completion": "a", "label": 0.5},
        {"completion": "", "label": 0, "more": 1},
    ]
    assert values(reward, ["ab", "ab", "ab"], records) == [10.0, 1.5, 1.0]


def test_what_has_a_default_or_is_given_is_not_asked_for():
    assert rewards.load(NAME, {}).reads == ("answer",)
    assert rewards.load(NAME, {"off": 1.0}).reads == ("answer",)
    assert values(rewards.load(NAME, {"off": 1.0}), ["x"], [{"answer": "x"}]) == [0.0]
    old = rewards.load(f"{__file__}:plain", {"scale": 3.0})
    assert old.reads == () and values(old, ["x"], None) == [3.0]
    with pytest.raises(UserError, match="not called as .*'of'"):
        rewards.load(NAME, {"of": 1.0})


def test_two_records_that_share_a_prompt_have_values_of_their_own(tmp_path):
    calls = []

    def score(prompts, responses, answer):
        calls.append(list(zip(prompts, responses, answer, strict=True)))
        return equal(prompts, responses, answer)

    reward, records = Reward("mine", score, reads=("answer",)), [{"answer": "a"}, {"answer": "b"}, {"answer": "a", "x": 1}]
    with Cache(tmp_path / "rewards.sqlite") as cache:
        assert values(reward, ["a", "a", "a"], records, cache) == [1.0, 0.0, 1.0]
        assert calls == [[("same", "a", "a"), ("same", "a", "b")]]  # what it does not read makes no other question
        assert values(reward, ["a", "a"], records[:2], cache) == [1.0, 0.0] and len(calls) == 1


def test_keys_of_rewards_that_read_nothing_stay_as_they_were(tmp_path):
    reward = rewards.load("letters", {})
    with Cache(tmp_path / "rewards.sqlite") as cache:
        rewards.score(reward, ["p"], ["t"], cache=cache)
        asked = []
        again = Reward("letters", lambda *a: asked.append(a) or [0.5], version=reward.version)
        assert values(again, ["t"], [{"answer": "a"}], cache) == [0.5]  # another prompt
        rewards.score(again, ["p"], ["t"], records=[{"answer": "a"}], cache=cache)
    assert len(asked) == 1


def test_parts_read_what_is_theirs():
    parts = {
        "right": {"name": "exact"},
        "label": {"name": f"{__file__}:longer", "weight": 0.1},
        "letters": {"name": "letters"},
    }
    reward = rewards.load("combine", {"parts": parts})
    assert rewards.reads(reward, None, rewards.load(NAME, {})) == ("completion", "label", "answer")
    scored = rewards.score(reward, ["p"], ["Aye "], records=[{"completion": "aye", "label": 5}])
    assert scored.parts["right"] == [1.0] and scored.parts["label"] == [6.0]
    assert scored.values == pytest.approx(1 + 0.6 + 0.25)


def test_what_is_not_known_is_named():
    with pytest.raises(
        UserError, match="reward 'exact' reads `completion` of the record, and what it is asked about has none"
    ):
        values(rewards.load("exact", {}), ["x"], [{"answer": "x"}])
    with pytest.raises(UserError, match="reward 'exact' reads `completion`"):
        rewards.score(rewards.load("exact", {}), ["p"], ["x"])


# ---------------------------------------------------------------- from the data


def test_columns_of_the_data_go_with_the_query(tmp_path):
    source = write(tmp_path / "q.jsonl", {"prompt": "a", "completion": "b", "n": [1, {"x": None}], "other": 3})
    found = load_queries(source, reads=("n", "completion"))
    assert found.queries[0].record == {"n": [1, {"x": None}], "completion": "b"} and not found.bad
    assert load_queries(source).queries[0].record == {}


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_record_without_it_is_a_bad_one(tmp_path, value):
    source = write(tmp_path / "q.jsonl", {"prompt": "a", "n": value}, {"prompt": "b", "n": 0}, {"prompt": "c"})
    found = load_queries(source, reads=("n",))
    assert [q.prompt for q in found.queries] == ["b"] and [b.kind for b in found.bad] == ["reward", "reward"]
    assert "q.jsonl:3 has no `n`, only prompt, and the reward reads it" in found.bad[1].reason
    without = load_queries(source, reads=("completion",))
    assert not without.queries and "has no `completion`" in without.bad[0].reason
    empty = write(tmp_path / "e.jsonl", {"prompt": "a", "completion": ""})
    assert "has an empty `completion`" in load_queries(empty, reads=("completion",)).bad[0].reason
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    called = write(tmp_path / "c.jsonl", {"messages": [{"role": "user", "content": "So?"}, call]})
    assert not load_queries(called, reads=("completion",)).queries and load_queries(called).queries


def test_what_no_json_holds_comes_as_text(tmp_path):
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"prompt": ["a"], "day": [datetime.date(2024, 2, 29)]})
    pq.write_table(table, tmp_path / "q.parquet")
    assert load_queries(str(tmp_path / "q.parquet"), reads=("day",)).queries[0].record == {"day": "2024-02-29"}


def test_the_digest_of_queries_is_that_of_their_texts(tmp_path):
    one = load_queries(write(tmp_path / "a.jsonl", {"id": "x", "prompt": "a", "n": 1}), reads=("n",)).queries
    other = load_queries(write(tmp_path / "b.jsonl", {"id": "x", "prompt": "a", "n": 2}), reads=("n",)).queries
    assert digest(one) == digest(other) == "1a3843cb8f40a0ab"  # as it was before there were records


# ---------------------------------------------------------------- in a run


def config(tmp_path: Path, **changes) -> FrozenConfigDict:
    c = tiny.get_config()
    c.iterations, c.sinks = 1, ()
    records = [{"prompt": "same" if i < 2 else f"query {i}", "answer": f"{i}", "completion": "abc"} for i in range(10)]
    c.task.train = write(tmp_path / "train.jsonl", *records)
    c.task.heldout = write(tmp_path / "heldout.jsonl", *(r | {"prompt": f"held {r['answer']}"} for r in records))
    c.reward.name, c.reward.kwargs = f"{__file__}:near", {}
    c.update_from_flattened_dict(changes)
    return FrozenConfigDict(c)


def near(prompts, responses, answer):
    """A value of response and record, never the same of two records."""
    return [int(a) + len(set(r)) / 100 for r, a in zip(responses, answer, strict=True)]


@pytest.mark.slow
def test_a_run_scores_every_record_by_its_own(tmp_path):
    work = tmp_path / "w"
    c = config(tmp_path)
    modes.train(c, work, "jax")
    found = read(work / "rollouts" / "iter_0000.jsonl") + read(work / "evaluations" / "iter_0001.jsonl")
    assert len(found) == 18
    for rollout in found:
        assert list(rollout.record) == ["answer"]
        for response in rollout.responses:
            assert response.reward == near([""], [response.text], [rollout.record["answer"]])[0]
    assert modes.train(c, work, "jax") == 0  # finished
    # another answer in the data is another run
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    write(tmp_path / "train.jsonl", *(json.loads(line) | {"answer": "77"} for line in lines))
    with pytest.raises(UserError, match=r"inputs.record \(the content\); to go on with it .* add --accept=reward"):
        modes.train(c, work, "jax")


def test_a_second_reward_chooses_no_record_to_train_on(tmp_path, capsys):
    """Held-out records alone need what it reads: of a record to train on it is kept where it is there, and refuses none."""
    alone = config(tmp_path, **{"reward.name": "letters"})
    c = config(
        tmp_path,
        **{"reward.name": "letters", "eval.second_reward": "numeric", "eval.second_kwargs": {"column": "gold"}},
    )
    rows = [json.loads(line) for line in Path(c.task.heldout).read_text().splitlines()]
    write(tmp_path / "heldout.jsonl", *(row | {"gold": 3} for row in rows))
    rows = [json.loads(line) for line in Path(c.task.train).read_text().splitlines()]
    write(tmp_path / "train.jsonl", {**rows[0], "gold": "no number"}, *rows[1:])
    without, found = (read_inputs(one, "jax").data for one in (alone, c))
    assert [q.id for q in found.train] == [q.id for q in without.train] and not any(found.bad.values())
    modes.plan(c, tmp_path / "plan", "jax")
    assert f"train     10 of {c.task.train}\n" in capsys.readouterr().out
    modes.train(c, tmp_path / "w", "jax")
    rollouts = read(tmp_path / "w" / "rollouts" / "iter_0000.jsonl")
    assert {rollout.record["gold"] for rollout in rollouts} <= {None, "no number"}
    assert read(tmp_path / "w" / "evaluations" / "iter_0001.jsonl")[0].record == {"gold": 3}
    another = {"reward.name": "numeric", "reward.kwargs": {"column": "gold"}}
    with pytest.raises(UserError, match="has no `gold`, .* and the reward reads it"):  # and no answer is scored by None
        modes.replay(config(tmp_path, **another), tmp_path / "w", "jax")


def test_a_column_that_no_record_has_ends_it_at_once(tmp_path):
    with pytest.raises(
        UserError, match="train.jsonl:1 has no `label`, only prompt, answer, completion, and the reward reads it"
    ):
        modes.train(config(tmp_path, **{"reward.name": f"{__file__}:longer"}), tmp_path / "w", "jax")


def test_a_second_reward_of_generate_reads_what_training_did_not(tmp_path):
    options = {"reward.name": "letters", "generate.second_reward": "numeric", "generate.second_kwargs": {"column": "answer"}}
    work = tmp_path / "w"
    modes.generate(config(tmp_path, **options, **{"generate.policy": "start", "generate.samples": 1}), work, "jax")
    lines = (work / "responses" / "start" / "iter_0000.scores.jsonl").read_text().splitlines()
    assert all(json.loads(line)["second"][0] in (0.0, 1.0) for line in lines) and len(lines) == 10


def test_responses_and_judges_know_the_record(tmp_path):
    work = tmp_path / "w"
    options = {
        "generate.policy": "start", "generate.samples": 2, "generate.second_reward": "numeric",
        "generate.second_kwargs": {"column": "answer"},
    }  # fmt: skip
    modes.generate(config(tmp_path, **options), work, "jax")
    rollouts = read(work / "responses" / "start" / "iter_0000.jsonl")
    assert all(set(rollout.record) == {"answer"} for rollout in rollouts)
    other = tmp_path / "other"
    modes.generate(config(tmp_path, **options, seed=1), other, "jax")
    from ple_jax.evaluation import compare

    judge = {"compare.judge_kwargs": {"name": f"{__file__}:near"}}
    runs = [f"{label}={folder / 'responses' / 'start'}" for label, folder in (("a", work), ("b", other))]
    for folder in ("c", "d"):
        (tmp_path / folder).mkdir()
    *_, result = compare.results(runs, tmp_path / "c", config=config(tmp_path, **judge), backend="jax")
    assert result["views"][0]["wins"][0]["judged"] == 20
    judge = {"compare.judge": f"{__file__}:blind"}
    with pytest.raises(UserError, match="judge '.*:blind' reads `elsewhere` of the record"):
        list(compare.results(runs, tmp_path / "d", config=config(tmp_path, **judge), backend="jax"))


def blind(prompts, first, second, elsewhere):
    return [0.0] * len(prompts)


# ---------------------------------------------------------------- exact, numeric, regex, json_schema


def of(name, kwargs, response, **record):
    return values(rewards.load(name, kwargs), [response], [record])[0]


def test_exact():
    assert of("exact", {}, " The  Answer\n", completion="the answer") == 1.0
    assert of("exact", {}, "the answer.", completion="the answer") == 0.0
    assert of("exact", {"strict": True}, "The answer", completion="the answer") == 0.0
    assert of("exact", {"column": "gold"}, "two", gold=["one", "Two"]) == 1.0
    assert of("exact", {"column": "gold"}, "2", gold=2) == 1.0


@pytest.mark.parametrize(
    ("name", "options", "record", "says"),
    [
        ("exact", {}, {"completion": None}, "has no answer in its `completion`"),
        ("exact", {}, {"completion": [None]}, "has no answer in its `completion`"),
        ("regex", {"column": "c"}, {"c": None}, "has nothing in its `c`"),
        ("regex", {"pattern": "a", "answer": "c"}, {"c": [None]}, "has nothing in its `c`"),
        ("code", {"column": "c"}, {"c": None}, "has no test in its `c`"),
        ("numeric", {}, {"completion": None}, "has no number in its `completion`"),
        ("exact", {}, {"completion": [None, "yes"]}, ""),
    ],
)
def test_a_missing_value_is_no_answer(name, options, record, says):
    """As of a mixture whose other set has the column."""
    assert rewards.load(name, options).refuses("p", **record).startswith(says)


def test_an_opening_that_a_record_lacks_is_none():
    reward = rewards.load("code", {"column": "c", "before": "b"})
    assert rewards.score(reward, ["p"], ["x = 1"], records=[{"c": "assert x == 1", "b": None}]).values.tolist() == [1.0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 12 + 30 is 42.", 42), ("#### 1,234", 1234), ("about 1,234,567.25 in all", 1234567.25), ("x = -3", -3),
        ("5-3", 3), ("(4)-2", 2), ("it is \u22127", -7), (".5 of it", 0.5), ("6.02e23", 6.02e23), ("$12.50", 12.5),
        ("10% of 20%", 20), ("1,2", 2), ("12,34", 34), ("none", None), ("", None), ("1.", 1), ("9-", 9),
    ],
)  # fmt: skip
def test_the_last_number(text, number):
    from ple_jax.rewards.numeric import last_number

    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It costs 1,234, I think", 1234), ("1,234,567, which", 1234567), ("-$5", -5), ("-\u20ac1,000.5", -1000.5),
        ("1e999", None), ("1e-999999999", 0), ("9" * 5000, None),
        ("Rs.500", 500), ("so it is...42", 42), ("No.7", 7), ("$.50", 0.5), ("-.5", -0.5),
        ("it is 3/4.", 0.75), ("-1 / 2", -0.5), ("11/30/2026", 2026), ("1/2/3", 3), ("3/0", None), ("3/4.5", 4.5),
        ("1/" + "9" * 5000, None),
    ],
)  # fmt: skip
def test_the_last_number_beside_signs(text, number):
    from ple_jax.rewards.numeric import last_number

    assert last_number(text) == number


def test_a_block_in_the_item_of_a_list():
    """Its lines are indented as its fence is, and a separator of lines within a string parts nothing."""
    item = "1. Like this:\n\n   ```python\n   def f(x):\n       return x + 1\n   ```\n"
    assert rewards.fenced_block(item, ("python",)) == "def f(x):\n    return x + 1\n"
    assert of("code", {}, item, tests="assert f(1) == 2") == 1.0
    assert rewards.fenced_block('```json\n{"a": "x\u2028y"}\r\n```', ("json",)) == '{"a": "x\u2028y"}\n'
    assert rewards.fenced_block("  ```\nless\n    more\n  ```", ("python",), or_none=True) == "less\n  more\n"


def test_numeric():
    assert of("numeric", {"column": "n"}, "12345679", n=12345678) == 0.0
    assert of("numeric", {}, "I get 1234", completion="It is so.\n#### 1,234") == 1.0
    assert of("numeric", {}, "I get 1235, not 1233", completion="#### 1,234") == 0.0
    assert of("numeric", {}, "no idea", completion="3") == 0.0
    assert of("numeric", {"column": "n", "tolerance": 1e-6}, "0.3333333", n=1 / 3) == 1.0
    assert of("numeric", {"column": "n"}, "0.3333333", n=1 / 3) == 0.0
    assert of("numeric", {"column": "n", "tolerance": 0.1}, "110", n=[1, 100]) == 1.0
    product = {"completion": "12345 * 98765 = 1219253925"}  # integers are the same or not, however large
    assert [of("numeric", {}, f"It is {n}.", **product) for n in (1219253925, 1219253926)] == [1.0, 0.0]
    assert of("numeric", {"tolerance": 1e-9}, "1219253926", **product) == 1.0
    assert [of("numeric", {}, text, completion="1/2") for text in ("0.5", "2/4", "3/2", "2")] == [1.0, 1.0, 0.0, 0.0]
    with pytest.raises(UserError, match="tolerance = -1"):
        rewards.load("numeric", {"tolerance": -1.0})


def test_a_record_without_a_number_is_left_out_before_anything_is_sampled(tmp_path):
    c = config(tmp_path, **{"reward.name": "numeric", "reward.kwargs": {"column": "completion"}})
    with pytest.raises(UserError, match="cannot be scored: it has no number in its `completion`: 'abc'"):
        modes.train(c, tmp_path / "w", "jax")
    assert not (tmp_path / "w" / "rollouts").exists()


def test_regex():
    assert of("regex", {"pattern": r"^Answer: \w+$"}, "Answer: yes") == 1.0
    assert of("regex", {"pattern": r"^Answer: \w+$"}, "The answer: yes") == 0.0
    assert of("regex", {"column": "rule"}, "abc", rule="b.$") == 1.0
    found = {"pattern": r"Answer: (\w+)", "answer": "completion"}
    assert of("regex", found, "Answer: no. Answer: YES", completion="yes") == 1.0
    assert of("regex", found, "Answer: yes. Answer: no", completion="yes") == 0.0
    assert of("regex", found, "yes", completion="yes") == 0.0
    assert of("regex", {"pattern": r"\d+", "answer": "n"}, "1 or 2", n=2) == 1.0
    assert of("regex", {"column": "rule"}, "a dog", rule=["cat", "dog"]) == 1.0
    assert of("regex", {"column": "rule"}, "zzz t", rule=["cat", "dog"]) == 0.0
    assert of("regex", {"pattern": r"(-?\d*)", "answer": "n"}, "it is -7.", n="-7") == 1.0  # matches of nothing do not count
    for kwargs in ({}, {"pattern": "a", "column": "b"}):
        with pytest.raises(UserError, match="give a pattern, or the column"):
            rewards.load("regex", kwargs)
    with pytest.raises(UserError, match=r"pattern: '\(' is no regular expression"):
        rewards.load("regex", {"pattern": "("})
    refuses = rewards.load("regex", {"column": "rule"}).refuses
    assert "has no pattern in `rule`: '(' is no regular expression" in refuses("", rule="(") and refuses("", rule="a") == ""


PERSON = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}, "age": {"minimum": 0}}}


def test_json_schema():
    kwargs = {"schema": PERSON}
    assert of("json_schema", kwargs, '{"name": "Ann", "age": 3}') == 1.0
    assert of("json_schema", kwargs, '{"name": "Ann", "age": -3}') == 0.0
    assert of("json_schema", kwargs, 'Here: {"name": "Ann"}') == 0.0
    fenced = 'First\n```json\n{"name": 1}\n```\nno,\n```\n{"name": "Ann"}\n```\n'
    assert of("json_schema", kwargs, fenced) == 1.0
    assert of("json_schema", kwargs | {"fenced": False}, fenced) == 0.0
    assert of("json_schema", {"schema": {}}, "[1") == 0.0 and of("json_schema", {"schema": {}}, "[1]") == 1.0
    assert of("json_schema", {"column": "form"}, '{"name": "Ann"}', form=json.dumps(PERSON)) == 1.0
    assert of("json_schema", {"column": "form"}, "3", form={"type": "string"}) == 0.0
    with pytest.raises(UserError, match="schema is no JSON schema"):
        rewards.load("json_schema", {"schema": {"type": "nothing"}})
    with pytest.raises(UserError, match="give a schema, or the column"):
        rewards.load("json_schema", {})
    refuses = rewards.load("json_schema", {"column": "form"}).refuses
    assert "no JSON schema in its `form`" in refuses("", form="{") and "no JSON" in refuses("", form={"type": 3})
    assert refuses("", form=PERSON) == ""


def test_a_schema_that_refers_to_what_is_not_there(serve):
    server = serve(lambda *_: {})
    for ref in (f"{server.url}/other", "#/$defs/gone", "other.json"):
        with pytest.raises(UserError, match=f"it refers to '{re.escape(ref)}', which is not in it"):
            rewards.load("json_schema", {"schema": {"items": {"$ref": ref}}})
    assert server.bodies == []
    tree = {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}
    assert of("json_schema", {"schema": tree}, "[[], [[]]]") == 1.0 and of("json_schema", {"schema": tree}, "[1]") == 0.0


def test_what_a_model_writes_ends_no_run():
    assert of("json_schema", {"schema": {"multipleOf": 0.01}}, "9" * 400) == 0.0
    assert of("json_schema", {"schema": {"items": {"$ref": "#"}}}, "[" * 300 + "]" * 300) in (0.0, 1.0)
    assert of("json_schema", {"schema": {}}, "[" * 10**5) == 0.0
    assert of("json_schema", {"schema": {}}, "NaN") == of("json_schema", {"schema": {}}, '{"a": Infinity}') == 0.0


def test_schemas_from_a_command_line(tmp_path):
    from ple_jax.main import parse

    nested = {**PERSON, "anyOf": [{"maxProperties": 2}], "patternProperties": {"^a.b$": {}}}
    (tmp_path / "s.json").write_text(json.dumps(nested))
    command = ["ple_jax", "--config=tiny", "--workdir=w", "--config.reward.name=json_schema"]

    def loaded(schema):
        kwargs = parse([*command, f"--config.reward.kwargs={{'schema': {schema!r}}}"]).config.reward.kwargs.to_dict()
        return values(rewards.load("json_schema", kwargs), ['{"name": "Ann"}', '{"age": 3}'], [{}, {}])

    for schema in (str(tmp_path / "s.json"), json.dumps(PERSON), PERSON):  # whose lists the config makes tuples
        assert loaded(schema) == [1.0, 0.0]
    with pytest.raises(UserError, match="the config holds what none can .*as the text of its JSON"):
        loaded({"anyOf": [{"type": "object"}]})
    with pytest.raises(UserError, match="neither a .json file nor JSON"):
        loaded("nowhere.json")


# ---------------------------------------------------------------- code


def code(response, tests, **kwargs):
    return of("code", kwargs, response, tests=tests)


def test_code_that_is_right_passes():
    right = "Here:\n```python\ndef twice(n):\n    return 2 * n\n```\nDone."
    assert code(right, ["assert twice(2) == 4", "assert twice(0) == 0"]) == 1.0
    assert (
        code(right, ["assert twice(2) == 4", "assert twice(0) == 1", "assert other(1)", "assert twice('a') == 'aa'"]) == 0.5
    )
    assert code("def twice(n):\n    return n", "assert twice(2) == 4") == 0.0
    assert code("def twice(n):\n    return n + n", "assert twice(2) == 4") == 1.0  # no block: all of it
    cut = "```python\ndef twice(n):\n    return 2 * n\n"  # no end
    assert code(cut, "assert twice(2) == 4") == 1.0
    for block in ("```python3\n{}```\nThis works.", "```python\n{}```\nIt prints\n```text\n4\n```\nthanks",
                  "```py\r\n{}```\n```\n4\n```", "~~~python\n{}~~~", "```\n{}```"):  # fmt: skip
        assert code(block.format("def twice(n):\n    return 2 * n\n"), "assert twice(2) == 4") == 1.0
    more = {"before": "opening"}
    assert of("code", more, "    return 2 * n", tests="assert f(2) == 4", opening="def f(n):\n") == 1.0


def test_modern_code_runs():
    text = "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\n"
    text += "if __name__ == '__main__':\n    raise SystemExit"
    assert code(text, ["assert A(3).x == 3", "import math; assert math.pi > 3"]) == 1.0
    assert code("x = 1", ["x = 2", "assert x == 1"]) == 1.0  # tests do not see one another


@pytest.mark.parametrize(
    "text",
    [
        "import sys; sys.exit(0)", "import os; os._exit(0)", "raise KeyboardInterrupt", "def f(:", "x = '\0'",
        "import os; os.kill(os.getpid(), 9)", "a = []\nwhile True: a.append('x' * 10**7)", "print('0\\n' * 100)\n1 / 0",
    ],
)  # fmt: skip
def test_code_that_ends_its_process_passes_nothing(text):
    assert code(text, ["pass"], timeout=10.0, memory_mb=256) == 0.0


def test_code_that_does_not_end_is_stopped():
    started = time.monotonic()
    tests = ["assert f(1) == 1", "f(0)", "assert f(1) == 1"]
    assert code("def f(n):\n    while not n: pass\n    return n", tests, timeout=1.0) == pytest.approx(1 / 3)
    assert time.monotonic() - started < 30  # and not for ever
    sleeps = "import time\ntime.sleep(1000)"
    assert code(sleeps, ["pass"], timeout=0.2) == 0.0
    assert code("", ["import time; time.sleep(3)"], timeout=1.0) == 0.0  # sleep is time too


def test_code_sees_neither_the_environment_nor_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_TOKEN", "secret")
    monkeypatch.chdir(tmp_path)
    tests = [
        "assert 'MY_TOKEN' not in os.environ",
        "assert os.listdir('.') == []",
        f"assert os.getcwd() != {str(tmp_path)!r}",
    ]
    assert code("import os", tests) == 1.0
    assert code("open('left', 'w').write('x')", ["assert open('left').read() == 'x'"]) == 1.0
    assert os.listdir(tmp_path) == []


def isolated() -> bool:
    """Whether this system gives a process namespaces of its own."""
    return subprocess.run(["unshare", "-Unp", "--fork", "true"], capture_output=True).returncode == 0


def test_code_neither_sees_nor_stops_other_processes(monkeypatch, capsys):
    if not isolated():
        assert code("", ["pass"]) == 1.0 and "gives no process namespaces of its own" in capsys.readouterr().err
        return
    monkeypatch.setenv("MY_TOKEN", "secret")
    pid = os.getpid()
    tests = [
        f"import os; os.kill({pid}, 0)", "import os; os.kill(os.getppid(), 9); assert 0",
        "import os; os.kill(-1, 9); assert 0",
        f"open('/proc/{pid}/environ').read()",
        f"import ctypes, os; assert ctypes.CDLL(None).setns(os.open('/proc/{pid}/ns/net', 0), 0x40000000) == 0",
    ]  # fmt: skip
    assert code("", tests) == 0.0 and code("", ["pass"]) == 1.0
    # what it starts ends with it
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.execv('/bin/sleep', ['sleep', '31415'])\n"
    program += "time.sleep(0.3)"
    code(program, ["pass"])
    assert "31415" not in subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True).stdout


def test_code_whose_process_does_not_start_has_no_reward(monkeypatch):
    reward = rewards.load("code", {})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert math.isnan(values(reward, ["x = 1"], [{"tests": ["pass"]}])[0])
    assert reward.failure() == "Python did not start within 10 s: it said nothing"


def test_code_does_not_write_large_files():
    text = "f = open('a', 'wb')\nfor _ in range(64):\n    f.write(b'x' * 2**20)\n    f.flush()"
    assert code(text, ["pass"]) == 0.0


def test_code_reaches_no_network_where_the_system_allows_that(serve):
    server = serve(lambda *_: {})
    text = f"import urllib.request\nurllib.request.urlopen({server.url!r}, data=b'{{}}', timeout=2)"
    assert code(text, ["pass"]) == (0.0 if isolated() else 1.0)
    assert len(server.bodies) == (0 if isolated() else 1)


def test_columns_may_have_any_name():
    assert of("exact", {"column": "responses"}, "a", responses="a") == 1.0
    assert of("numeric", {"column": "prompt"}, "3", prompt="3") == 1.0
    assert rewards.load("numeric", {"column": "prompt"}).refuses("p", prompt="none")
    assert of("code", {"column": "x", "before": "x"}, "", x="pass\n") == 1.0
    positional = plugins.load_function(f"{__file__}:positional", "reward.name", given=("p", "r"), kwargs={}, known=())
    assert positional.asks == ("completion",)


def positional(p, r, /, completion):
    return [0.0] * len(p)


def test_what_code_refuses():
    with pytest.raises(UserError, match="timeout = 0"):
        rewards.load("code", {"timeout": 0})
    reward = rewards.load("code", {})
    assert reward.refuses("", tests=[]) == reward.refuses("", tests=" ") == "has no test in its `tests`"
    assert reward.refuses("", tests=["assert 1"]) == ""


def test_a_server_is_told_the_answer(serve):
    server = serve(lambda number, body, handler: {"rewards": [float(label == "b") for label in body["labels"]]})
    reward = rewards.load("remote", {"url": server.url, "labels": "answer"})
    assert values(reward, ["x", "x"], [{"answer": "a"}, {"answer": "b"}]) == [0.0, 1.0]
    assert rewards.load("remote", {"url": server.url}).reads == ()
