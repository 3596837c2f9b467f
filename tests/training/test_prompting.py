"""What of the records a run takes: prompts, answers, and why one is left out; and the day that a run keeps."""

import datetime
import json

import chats
import pytest
from ml_collections import FrozenConfigDict
from test_baselines import config as configured
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ple_jax import modes
from ple_jax.core.config import flatten
from ple_jax.core.conversation import Answer, Conversation
from ple_jax.core.errors import UserError
from ple_jax.core.identity import method_keys, run_keys
from ple_jax.core.types import Query, Reward
from ple_jax.data.load import Data
from ple_jax.models.tokenizer import byte_tokenizer
from ple_jax.prompts import principles
from ple_jax.prompts.principles import Principles
from ple_jax.training import prompting, workdir

RULES = Principles("mine", "mine 1", "Be kind.", (), "")
TURNS = (  # speakers must take turns, the user begins; an answer ends with <|eos|>
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('speakers take turns') }}{% endif %}"
    "{{ m.role + ': ' + m.content + (eos_token if m.role == 'assistant' else '') + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def rendering(**options):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TURNS
    context = options.pop("context", 2048)
    config = FrozenConfigDict(configured("ple", **{"task__chat": True, "task__max_bad_share": 0.9} | options))
    return prompting.Prompts(config, tokenizer, RULES, (256,), context)


def reasons(queries, prompts, **how):
    kept, said = prompting.usable(queries, prompts, "here", **how)
    return [query.id for query in kept.queries], {bad.where: (bad.kind, bad.reason) for bad in kept.bad}, said


def test_a_conversation_that_the_template_refuses_is_a_bad_record():
    queries = [
        Query("good", Conversation([user("a"), assistant("b"), user("c")])),
        Query("twice", Conversation([user("a"), user("b")])),
        Query("begun", Conversation([assistant("a"), user("b")])),
        Query("system", Conversation([{"role": "system", "content": "s"}, user("b")])),  # goes into the user's turn
    ]
    kept, bad, _ = reasons(queries, rendering())
    assert kept == ["good", "system"] and {kind for kind, _ in bad.values()} == {"template"}
    assert bad["twice"][1].startswith("query 'twice' is refused by the tokenizer's chat template: speakers take turns; take")
    assert reasons(queries, rendering(task__chat=False))[0] == ["good", "twice", "begun", "system"]
    with pytest.raises(UserError, match="'twice' is refused.*2 of 4 records of here cannot be used: 2 template .twice, "):
        reasons(queries, rendering(task__max_bad_share=0.4))


@pytest.mark.parametrize("chat", [True, False])
def test_principles_without_a_rule_are_no_principles(chat):
    """The control: a principled prompt that is the plain one, and not one with an empty system turn or line."""
    prompts = rendering(task__chat=chat)._replace(principles=principles.load("none"))
    queries = [Query("a", "say it"), Query("b", "say more")]
    assert [prompts.of(query, True) for query in queries] == [prompts.of(query, False) for query in queries]
    assert rendering(task__chat=chat).of(queries[0], True) != prompts.of(queries[0], True)


def test_every_query_has_the_rules_that_its_seed_draws():
    rules = principles.load("helpful_harmless")
    c = FrozenConfigDict(configured("ple", principles_per_query=1, seed=3))
    prompts = prompting.Prompts(c, byte_tokenizer(), rules, (256,), 2048)
    wanted = [principles.choose(rules, 1, seed=3, query_id=f"q{i}") for i in range(8)]
    assert all(prompts.of(Query(f"q{i}", "x"), True)[0].startswith(wanted[i]) for i in range(8))
    assert len(set(wanted)) > 1
    assert rules.text not in prompts.of(Query("q0", "x"), True)[0]


def test_turns_that_the_template_takes_without_principles_alone():
    prompts = rendering()
    prompts.tokenizer.chat_template = (
        "{% if 'kind' in messages[0].content and messages | length == 1 %}{{ raise_exception('no') }}{% endif %}" + TURNS
    )
    queries = [Query(str(i), Conversation([user(f"a{i}")])) for i in range(2)]
    queries.append(Query("three", Conversation([user("a"), assistant("b"), user("c")])))
    kept, bad, _ = reasons(queries, prompts)
    assert kept == ["three"] and list(bad) == ["0", "1"]
    assert {reason.endswith("(with the principles)") for _, reason in bad.values()} == {True}


def test_a_prompt_without_tokens_is_a_bad_record():
    """The vocabulary knows letters alone, and has no token for what it does not know."""
    letters = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
    config = FrozenConfigDict(configured("ple", task__max_bad_share=0.9))
    prompts = prompting.Prompts(config, tokenizer, RULES, (1,), 2048)
    kept, bad, _ = reasons([Query("known", "ab"), Query("unknown", "12")], prompts)
    assert kept == ["known"] and {kind for kind, _ in bad.values()} == {"empty"}


def test_what_a_reward_cannot_read_is_a_bad_record():
    part = Reward("part", refuses=lambda prompt: "does not like it" if "x" in prompt else "")
    whole = Reward("combine", parts={"part": part, "other": Reward("other")})
    queries = [Query("a", "a"), Query("x", "x")]
    for reward in (part, whole):
        kept, bad, _ = reasons(queries, rendering(), rewards=(Reward("any"), reward))
        assert kept == ["a"] and bad["x"] == ("reward", "query 'x' cannot be scored: it does not like it")


def test_answers_are_cut_counted_and_never_a_pair_of_equals():
    both = ("completion", "rejected")
    queries = [
        Query("short", "q", "yes", "no"),
        Query("long", "q", "a" * 9, "b"),
        Query("fits", "q", "a" * 7, "b"),  # with EOS
        Query("equal", "q", "a" * 9 + "x", "a" * 9 + "y"),
        Query("called", "q", Answer({**assistant("a"), "tool_calls": [{"function": {"name": "clock"}}]}), "b"),
    ]
    prompts = rendering(task__max_answer_tokens=8)
    kept, bad, said = reasons(queries, prompts, sources=both)
    assert kept == ["short", "long", "fits"] and {where: kind for where, (kind, _) in bad.items()} == {
        "equal": "pair",
        "called": "template",
    }
    assert "the same in tokens up to task.max_answer_tokens=8, where they are cut" in bad["equal"][1]
    assert said == [
        "1 of 6 answers of here are cut to 8 tokens, and have no EOS: raise --config.task.max_answer_tokens to train on the"
        " whole"
    ]
    assert prompts.given(queries[1], "completion") == (tuple(b"a" * 8), False, "a" * 8)
    assert prompts.given(queries[2], "completion") == ((*b"a" * 7, 256), True, "a" * 7)
    assert reasons(queries[:1], prompts, sources=both)[2] == []
    (said,) = reasons(queries[1:3], rendering(), sources=both)[2]
    assert said.startswith("1 of 4 answers of here are longer than sampling.max_new_tokens=8") and "trained on whole" in said
    raw = reasons(queries, rendering(task__max_answer_tokens=8, task__chat=False), sources=both)[1]
    assert raw["called"][0] == "answer" and "tool_calls, which plain text cannot hold" in raw["called"][1]


def test_prompt_and_answer_must_have_room():
    queries = [Query("fits", "q" * 5, "a" * 4), Query("not", "q" * 5, "a" * 5)]
    kept, bad, _ = reasons(queries, rendering(task__chat=False, context=10), sources=("completion",))
    assert kept == ["fits"]
    says = "query 'not' has 5 tokens and an answer of 6, and the model takes 10 at once; remove the line"
    assert bad["not"] == ("over-long", says)


def test_that_too_few_queries_are_left_is_said_before_the_warm_up(tmp_path):
    rows = [{"prompt": f"q {i}" + "x" * (300 if i == 3 else 0), "completion": "a"} for i in range(8)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = configured("ple", iterations=1, task__train=str(tmp_path / "t.jsonl"), task__max_prompt_tokens=200)
    c.queries_per_iteration, c.task.max_bad_share, c.warm_up.data = 8, 0.5, str(tmp_path / "t.jsonl")
    with pytest.raises(UserError, match="config.queries_per_iteration is 8 but there are 7 train queries"):
        modes.train(FrozenConfigDict(c), tmp_path / "run", "torch")
    assert not any((tmp_path / "run" / name).exists() for name in ("checkpoints", "warm_up", "evaluations"))


def test_what_is_left_out_of_both_sets():
    class Shown:
        lines: list[str] = []

        def phase(self, *_): ...

        def advance(self, *_): ...

        def log(self, line):
            self.lines.append(line)

    bad = Query("bad", Conversation([user("a"), user("b")]), "c")
    data = Data([Query("t", "a", "b" * 9), bad], [Query("h", "a"), bad], {"train": [], "heldout": []})
    found = prompting.fitted(data, rendering(task__max_answer_tokens=8), Shown(), sources=("completion",))
    assert [q.id for q in found.train] == ["t"] and [q.id for q in found.heldout] == ["h"]
    assert [[b.where for b in found.bad[which]] for which in ("train", "heldout")] == [["bad"], ["bad"]]
    assert [line.startswith("1 of 1 answers of config.task.train are cut") for line in Shown.lines] == [True]


def test_what_is_said_of_stops_and_headers():
    prompts = rendering()
    config, tokenizer = prompts.config, prompts.tokenizer
    assert prompting.notes(config, tokenizer, (256,)) == []
    assert "nothing stops a response" in prompting.notes(config, tokenizer, ())[0]
    assert "ends at '<|eos|>' (256), '<|pad|>' (257): the model's EOS" in prompting.notes(config, tokenizer, (256, 257))[0]
    assert "ends at '<|pad|>' (257): the model's EOS" in prompting.notes(config, tokenizer, (257,))[0]
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    (said,) = prompting.notes(config, tokenizer, (256,))
    assert "no generation prompt" in said and "\n" not in said
    raw = FrozenConfigDict(configured("ple"))
    assert prompting.notes(raw, tokenizer, (256,)) == []


def test_records_that_are_hardly_meant_as_they_are_read():
    """The model has a template, and what was trained on are turns; or the held-out records are the default's."""

    def said(query="a", heldout="mine", **options):
        prompts = rendering(**{"task__chat": False, "task__heldout": heldout} | options)
        data = Data([Query("", query)], [], {})
        return list(prompting.of_records(prompts.config, data, prompts.tokenizer))

    turns = Conversation([user("a")])
    (warning,) = said(turns)
    assert warning.startswith("warning: the records are conversations and config.task.chat is False")
    assert "--config.task.chat=True gives it that" in warning and "\n" not in warning
    assert said() == said(turns, task__chat=True) == []
    base = byte_tokenizer()
    base.chat_template = None
    raw = rendering(task__chat=False, task__heldout="mine").config
    assert list(prompting.of_records(raw, Data([Query("", turns)], [], {}), base)) == []
    (warning,) = said(heldout="quickstart_heldout", task__train="mine.jsonl")
    assert "config.task.train is 'mine.jsonl', and config.task.heldout still 'quickstart_heldout'" in warning
    assert said(heldout="quickstart_heldout", task__train="quickstart_train") == []
    assert said(heldout="quickstart_heldout", task__train="a.jsonl", task__sets={"a": {"train": "a.jsonl"}}) == []


def test_what_a_run_says_first(tmp_path, capsys):
    """Its model, dtype, backend and device; then what is odd about its records, once."""
    for name in ("train", "heldout"):
        pairs = [{"prompt": [user(f"{name} {i}")], "chosen": "b", "rejected": "c"} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def said(algorithm, heldout):
        files = {"task__train": str(tmp_path / "train.jsonl"), "task__heldout": heldout}
        with modes.on_run(FrozenConfigDict(configured(algorithm, **files)), tmp_path / algorithm, "torch", trained=False):
            return capsys.readouterr().out

    found = said("ple", "quickstart_heldout")
    assert "tiny in float32, by torch on cpu\n" in found
    assert found.count("warning: the records are conversations") == found.count("warning: config.task.train is") == 1
    assert "warning" not in said("reward", str(tmp_path / "heldout.jsonl"))  # the model's own template writes its prompts


def test_a_run_keeps_the_day_on_which_it_began(tmp_path, monkeypatch):
    config = FrozenConfigDict(configured("ple"))

    def on(day):
        monkeypatch.setattr(workdir, "today", lambda: datetime.date.fromisoformat(day))
        return workdir.begun(config, tmp_path, "torch")

    first = on("2026-11-28")
    assert first.task.date == "2026-11-28" and config.task.date is None
    assert on("2026-11-29").task.date == "2026-11-29"  # nothing has begun yet
    keys = run_keys(first, "jax", {})
    (tmp_path / "config.json").write_text(json.dumps(keys))
    (tmp_path / "metrics.jsonl").write_text("")
    later = on("2026-11-30")
    assert later.task.date == "2026-11-28"
    workdir.check_config(tmp_path, run_keys(later, "jax", {}))
    said = FrozenConfigDict(configured("ple", task__date="2026-12-01"))
    assert workdir.begun(said, tmp_path, "torch").task.date == "2026-12-01"
    with pytest.raises(UserError, match="differing in task.date"):
        workdir.check_config(tmp_path, run_keys(said, "jax", {}))
    # runs of several days are seeds of one method
    assert method_keys(flatten(run_keys(said, "jax", {}))) == method_keys(flatten(keys))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ple", "sft", "reward"])
def test_one_conversation_of_many_does_not_end_a_run(algorithm, tmp_path, monkeypatch):
    """In training, in the warm-up, in evaluations and in the set that is answered afterwards."""
    chats.speak(monkeypatch, TURNS)

    def save(name, count):
        asked = [[user(f"{name} {i}")] for i in range(count)]
        asked.append([user(f"{name} first"), user("second")])
        pairs = [{"prompt": turns, "chosen": [assistant("yes")], "rejected": [assistant("no")]} for turns in asked]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        return str(path)

    options = {"task__train": save("train", 20), "task__heldout": save("heldout", 20), "task__chat": True, "iterations": 1}
    options |= {"generate__data": save("asked", 20), "task__max_bad_share": 0.05}
    options |= {"warm_up__data": save("warm", 20)} if algorithm != "reward" else {}
    config = FrozenConfigDict(configured(algorithm, **options))
    assert modes.train(config, tmp_path / "run", "torch") == 0
    sets = ["train", "heldout"] + (["warm_up"] if algorithm != "reward" else [])
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert [bad["set"] for bad in listed] == sets
    assert {bad["kind"] for bad in listed} == {"template"} and all(":21" in bad["where"] for bad in listed)
    assert modes.evaluate(config, tmp_path / "run", "torch") == 0
    if algorithm != "reward":
        assert modes.generate(config, tmp_path / "run", "torch") == 0
        kept = tmp_path / "run" / "responses" / "trained" / "bad_records.jsonl"
        assert [json.loads(line)["set"] for line in kept.read_text().splitlines()] == ["heldout"]
