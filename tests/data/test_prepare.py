"""Clean train and test files: what is compared as equal, what is counted, and that the files are read back as they were."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ple_jax.core.conversation import Answer, Conversation
from ple_jax.core.errors import UserError
from ple_jax.core.types import Query
from ple_jax.data import prepare
from ple_jax.data.queries import digest, load_queries

ROOT = Path(__file__).parents[2]


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  Hello,\n\u2028WORLD!! ", "hello world"),
        ("ﬁne ２ Straße", "fine 2 strasse"),  # NFKC, then casefold
        ("don't — “stop”\x00now", "don t stop now"),
        ("C++ > C", "c++ > c"),  # symbols mean something
        ("कि", "कि"),  # vowel signs are no punctuation
        ("?!  ?", "?! ?"),  # there is nothing else
        ("", ""),
    ],
)
def test_normalised(text, wanted):
    assert prepare.normalised(text) == wanted


@given(st.text())
def test_normalised_has_single_blanks(text):
    found = prepare.normalised(text)
    assert found == " ".join(found.split()) and prepare.normalised(f" {text}\n") == found


@pytest.mark.parametrize(("needs", "ids"), [("prompt", "0"), ("completion", "02"), ("pair", "0234")])
def test_duplicates_are_what_is_needed_twice(needs, ids):
    rows = [("A b", "c", "d"), ("A b", "c", "d"), ("A b", "x", "d"), ("a  b!", "C.", "e"), ("A b", "c", "f")]
    rows.append(("a B", "c", "d"))
    queries = [Query(str(i), *row) for i, row in enumerate(rows)]
    kept, exact, normal = prepare.unique(queries, needs=needs)
    assert "".join(query.id for query in kept) == ids
    assert (exact, normal) == {"prompt": (3, 2), "completion": (2, 2), "pair": (1, 1)}[needs]


def test_what_is_in_test_too_leaves_train():
    train = [Query(str(i), prompt) for i, prompt in enumerate(["A b", "a B.", "c", "d", "A b"])]
    assert prepare.apart(train, [Query("t", "A b"), Query("u", "D")]) == ([train[2]], 2, 2)


@given(st.lists(st.text("aB. ", max_size=3), max_size=60), st.integers(0, 99))
def test_no_prompt_is_in_both_parts(prompts, seed):
    queries = [Query(str(i), prompt) for i, prompt in enumerate(prompts)]
    train, test = prepare.divide(queries, share=0.5, seed=seed)
    assert sorted(train + test) == sorted(queries)
    assert not {prepare.normalised(q.prompt) for q in train} & {prepare.normalised(q.prompt) for q in test}
    assert prepare.divide(queries[:20], share=0.5, seed=seed)[1] == [q for q in queries[:20] if q in test]


def test_the_share_is_kept_and_seeded():
    queries = [Query(str(i), f"prompt {i}") for i in range(4000)]
    first, second = (prepare.divide(queries, share=0.1, seed=seed)[1] for seed in (0, 1))
    assert 330 < len(first) < 470 and first != second  # 400, with a standard deviation of 19
    both = {query.id for query in first} & {query.id for query in second}
    assert abs(len(both) - 40) < 25  # independent: 1 in 100


def test_a_histogram_in_words():
    texts = ["", "a", "a b", "a b c", "a b c d", "a " * 16]
    assert prepare.histogram(texts) == {"0": 1, "1": 1, "2-3": 2, "4-7": 1, "8-15": 0, "16-31": 1}


TURNS = [{"role": "user", "content": "a \u2028"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
PLAIN, TURNED = Query("0", "a", " b", " c"), Query("1", Conversation(TURNS), "d", "e")
SETS = {
    "prompt": [Query("0", " a\n"), Query("1", "b\u2028")],
    "completion": [q._replace(rejected="") for q in (PLAIN, TURNED, Query("2", Conversation(TURNS, [{"name": "t"}]), "e"))],
    "pair": [PLAIN, TURNED],
}


@pytest.mark.parametrize("needs", SETS)
def test_what_is_written_is_read_back(tmp_path, needs):
    prepare.write(tmp_path / "q.jsonl", SETS[needs], needs=needs)
    found = load_queries(str(tmp_path / "q.jsonl"), needs=needs)
    assert found == (SETS[needs], []) and digest(found.queries) == digest(SETS[needs])


def test_completions_are_kept_where_they_are_not_needed(tmp_path):
    queries = [Query("0", "a", " b"), Query("1", "c"), Query("2", Conversation(TURNS))]
    prepare.write(tmp_path / "q.jsonl", queries, needs="prompt")
    assert load_queries(str(tmp_path / "q.jsonl")) == (queries, [])


def test_turns_are_written_as_trl_names_them(tmp_path):
    """Its "conversational preference" and "conversational prompt-completion", as its documentation shows them."""
    prepare.write(tmp_path / "pairs.jsonl", [SETS["pair"][1]], needs="pair")
    better, worse = ([{"role": "assistant", "content": text}] for text in "de")
    assert read(tmp_path / "pairs.jsonl") == [{"id": "1", "prompt": TURNS, "chosen": better, "rejected": worse}]
    prepare.write(tmp_path / "examples.jsonl", [SETS["completion"][1]], needs="completion")
    assert read(tmp_path / "examples.jsonl") == [{"id": "1", "prompt": TURNS, "completion": better}]


def test_prepare_counts_whatever_it_leaves_out(tmp_path):
    train = [{"prompt": f"prompt number {i}", "completion": " yes"} for i in range(10)]
    train += [train[0], {"prompt": "Prompt number 1.", "completion": "Yes!"}, {"prompt": "x " * 9, "completion": "y"}]
    train += [{"prompt": "held out", "completion": "y"}, {"prompt": "HELD out", "completion": "n"}]
    train += [{"prompt": "empty", "completion": ""}]
    test = [{"prompt": "held out", "completion": "z"}, {"text": "no prompt"}]
    sources = save(tmp_path / "a.jsonl", train), save(tmp_path / "b.jsonl", test)
    counts = prepare.prepare(sources[0], tmp_path / "out", test=sources[1], max_words=5, needs="completion")
    assert counts["train"] == {
        "read": 16,
        "bad": {"empty": 1, "long": 1},
        "exact duplicates": 1,
        "normalised duplicates": 1,
        "exactly in test too": 1,
        "normalised in test too": 1,
        "written": 10,
        "words of prompts": {"0": 0, "1": 0, "2-3": 10},
        "words of completions": {"0": 0, "1": 10},
    }
    assert counts["test"]["bad"] == {"column": 1} and counts["test"]["written"] == 1
    assert read(tmp_path / "out" / "train.jsonl")[3] == {"id": "a:4", "prompt": "prompt number 3", "completion": " yes"}
    bad = read(tmp_path / "out" / "bad.jsonl")
    assert [(b["set"], b["kind"]) for b in bad] == [("train", "empty"), ("train", "long"), ("test", "column")]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == counts
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["bad.jsonl", "summary.json", "test.jsonl", "train.jsonl"]


def test_prepare_needs_something_for_both(tmp_path):
    with pytest.raises(UserError, match=r"no record is left for test\.jsonl; see .*--test-share"):
        prepare.prepare(save(tmp_path / "a.jsonl", [{"prompt": "a"}]), tmp_path / "out", test_share=1e-9)
    with pytest.raises(UserError, match=r"left for train\.jsonl; the first bad record: .*a\.jsonl:1: `prompt` is empty"):
        prepare.prepare(save(tmp_path / "a.jsonl", [{"prompt": ""}]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prepare_reads_both_splits_of_a_folder(tmp_path):
    parts = {"train": [{"prompt": "a"}], "validation": [{"prompt": "b"}]}
    saved = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in parts.items()})
    saved.save_to_disk(str(tmp_path / "in"))
    prepare.prepare(str(tmp_path / "in"), tmp_path / "out", test=str(tmp_path / "in"), test_split="validation")
    found = [load_queries(str(tmp_path / "out" / f"{name}.jsonl")).queries for name in ("train", "test")]
    assert found == [[Query("train:1", "a")], [Query("validation:1", "b")]]


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_errors_name_the_options_of_the_script(tmp_path):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": f"a {i}"}) + "\n" for i in range(60)))
    done = run("--train", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "or say its name: --columns prompt=question" in done.stderr
    done = run("--train", str(tmp_path / "q.jsonl"), "--format", "imdb", "--words", "8-2", "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "--words 2-8" in done.stderr and "config.task" not in done.stderr
    done = run("--train", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "q.jsonl"), "--columns", "prompt=question")
    assert done.returncode == 2 and "File exists" in done.stderr and done.stderr.count("\n") == 1
    assert "-1 is below 0" in run("--train", "a", "--out", "b", "--seed", "-1").stderr


def test_the_script(tmp_path):
    rows = [{"question": f"How late is it in town {i}?", "answer": "ten"} for i in range(200)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    made = run(
        "--train", str(tmp_path / "a.jsonl.gz"), "--columns", "prompt=question,completion=answer", "--needs", "completion",
        "--out", str(tmp_path / "out"), "--test-share", "0.2", "--seed", "3",
    )  # fmt: skip
    assert made.returncode == 0 and not made.stderr
    train, test = (load_queries(str(tmp_path / "out" / f"{name}.jsonl"), needs="completion") for name in ("train", "test"))
    assert len(train.queries) + len(test.queries) == 200 and 20 < len(test.queries) < 60
    assert f"  written: {len(train.queries)}\n" in made.stdout and "\n            4-7      " in made.stdout
    assert not (tmp_path / "out" / "bad.jsonl").exists()


def test_the_script_says_what_to_mend_in_one_line(tmp_path):
    made = run("--train", str(tmp_path / "nowhere.jsonl"), "--out", str(tmp_path / "out"))
    assert made.returncode == 2 and made.stderr.startswith("error: ") and made.stderr.count("\n") == 1


def test_what_an_answer_calls_is_kept_and_compared(tmp_path):
    call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    messages = [{"role": "assistant", "content": "b", "tool_calls": [call]}, {"role": "assistant", "content": "b"}]
    queries = [
        Query(str(i), Conversation([{"role": "user", "content": "a"}]), Answer(m) if "tool_calls" in m else m["content"])
        for i, m in enumerate([*messages, messages[0]])
    ]
    kept, exact, _ = prepare.unique(queries, needs="completion")
    assert [query.id for query in kept] == ["0", "1"] and exact == 1
    prepare.write(tmp_path / "train.jsonl", kept, needs="completion")
    assert [row["completion"] for row in read(tmp_path / "train.jsonl")] == [[message] for message in messages]
    assert digest(load_queries(str(tmp_path / "train.jsonl"), needs="completion").queries) == digest(kept)


def test_columns_that_are_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"prompt": f"p {i % 3}", "answer": i // 3, "rejected": "no", "x": 1}) + "\n" for i in range(6))
    )
    prepare.prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", test_share=0.5, reads=("answer", "rejected"))
    files = [(tmp_path / "out" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "test")]
    rows = [json.loads(line) for lines in files for line in lines]
    assert len(rows) == 6  # though two records share a prompt
    assert all(set(row) == {"id", "prompt", "answer", "rejected"} for row in rows)
    with pytest.raises(UserError, match="--keep prompt: the column is written anyway"):
        prepare.prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", reads=("prompt",))
