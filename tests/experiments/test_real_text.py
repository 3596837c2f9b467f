"""Methods on texts of people: what is made of the data by hand; mistakes; both tasks as a whole, on texts made here."""

import json
from pathlib import Path

import pytest
from test_sweep import call

from ple_jax.core.files import read_json, read_jsonl, write_jsonl
from ple_jax.experiments import real_text
from ple_jax.experiments.jobs import Outcome
from ple_jax.models import hub

SMALL = ["--dev", "8", "--test-queries", "8", "--responses", "16", "--steps", "2", "--samples", "2", "--lrs", "1e-2"]
SMALL += ["--seeds", "0", "--tune-seeds", "1", "--budgets", "1", "--methods", "ple,sft_references"]
TINY = ["--", "--config.model.path=tiny", "--config.iterations=2", "--config.sampling.max_new_tokens=6", "--config.sinks=()"]


@pytest.fixture
def reviews(tmp_path):
    """Train and test files in IMDb's layout."""
    for name, count in (("train", 48), ("test", 10)):
        rows = [
            {
                "text": f"The {name} film of number {i} was {'good' if i % 2 else 'bad'} in all its twelve parts",
                "label": i % 2,
            }
            for i in range(count)
        ]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    return ["--train", str(tmp_path / "train.jsonl"), "--test", str(tmp_path / "test.jsonl")]


@pytest.fixture
def dialogues(tmp_path):
    """Train and test files in HH's layout; one query is too long."""
    for name, count in (("train", 60), ("test", 12)):
        rows = []
        for i in range(count):
            words = f"may {name} {i} eat" + " cake" * (60 if i == 3 else 1)
            rows.append({
                "chosen": f"\n\nHuman: {words}?\n\nAssistant: Yes, {i} may.",
                "rejected": f"\n\nHuman: {words}?\n\nAssistant: No.",
            })  # fmt: skip
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    return ["--train", str(tmp_path / "train.jsonl"), "--test", str(tmp_path / "test.jsonl")]


def data(out: Path, name: str) -> Path:
    """The one file of records of that name, whatever digest of its content follows."""
    (file,) = (out / "data").glob(f"{name}-*.jsonl")
    return file


def ids(out: Path, name: str) -> set[str]:
    return {row["id"] for row in read_jsonl(data(out, name))}


@pytest.fixture
def compared(monkeypatch):
    """Nothing is compared; the settings that it would have been with."""
    asked = []
    monkeypatch.setattr(real_text.compare_methods, "compare", lambda settings, *, jobs: asked.append(settings) or 0)
    return asked


def test_reviews_are_parted(capsys, tmp_path, reviews, compared):
    out = tmp_path / "out"
    found = call(capsys, real_text.main, "imdb", "--out", str(out), *reviews, *SMALL, *TINY)
    assert found.code == 0, found.err
    train, dev, test, positive = (ids(out, name) for name in ("train", "dev", "test", "references"))
    assert (len(train), len(dev), len(test)) == (40, 8, 8) and not train & dev
    assert positive < train and {int(name.split(":")[1]) % 2 for name in positive} == {0}  # line numbers begin with 1
    (asked,) = compared
    assert (asked.config.reward.name, asked.second_reward) == ("bag_of_words", "vader")
    assert asked.config.task.heldout == str(data(out, "dev"))
    assert asked.test_data == str(data(out, "test")) == str(asked.texts)
    assert all(not row.get("completion") for row in read_jsonl(data(out, "test")))  # a whole review is no reference
    assert "0.663 of their 1,428 pieces of 25 words" in asked.note and asked.note in found.out
    assert asked.config.sampling.max_new_tokens == 6  # the user's word is the last
    assert asked.config.task.max_answer_tokens == 6  # what is imitated is as long as what is sampled
    # PLE answers the train queries, people's answers to the positive ones are imitated by one method alone
    jobs = {name: real_text.compare_methods.training(asked, name, "1e-2", "0").arguments for name in asked.methods}
    assert f"--config.task.train={data(out, 'references')}" in jobs["sft_references"]
    assert f"--config.task.train={data(out, 'references')}" not in jobs["ple"]


def test_what_is_sampled_is_read_for_the_backend_that_is_asked_for(capsys, tmp_path, reviews, compared):
    """After the data and the rewards were made: JAX need not be there, and reads no device of torch."""
    asked = ["imdb", "--out", str(tmp_path), *reviews, *SMALL, "--backend", "torch", *TINY, "--config.model.device=cpu"]
    assert call(capsys, real_text.main, *asked).code == 0
    assert compared[0].backend == "torch" and compared[0].config.task.max_answer_tokens == 6


def test_other_data_have_other_names(capsys, tmp_path, reviews, compared):
    """So that nothing that was made of the ones passes for the others'."""
    found = []
    for i, more in enumerate(([], [], ["--limit", "30"])):
        call(capsys, real_text.main, "imdb", "--out", str(tmp_path / str(i)), *reviews, *SMALL, *more, *TINY)
        found.append(sorted(path.name for path in (tmp_path / str(i) / "data").glob("*.jsonl")))
    assert found[0] == found[1] and len(found[0]) == 4
    assert [name[:4] for name in {*found[0]} & {*found[2]}] == ["test"]  # of which both have all


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dev", "500"], "48 train queries are left, and --dev=500 are set apart"),
        (["--train", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--methods", "plee"], "'plee' is none of"),
    ],
)
def test_mistakes_cost_no_run(capsys, tmp_path, reviews, compared, arguments, says):
    found = call(capsys, real_text.main, "imdb", "--out", str(tmp_path / "out"), *reviews, *SMALL, *arguments)
    assert found.code == 2 and says in found.err and found.err.count("\n") == 1 and not compared


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "plee"], "'plee' is none of"),
        (["--lrs", "fast"], "--lrs=fast"),
        (["--responses", "7"], "--responses=7 must be a multiple of"),
        (["--", "--config.optimizer.ll=1"], "unknown key in '--config.optimizer.ll=1'"),
        (["--out", "."], "--out=. does not go with --keep="),
    ],
)
def test_mistakes_cost_no_reward_model(capsys, tmp_path, dialogues, compared, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(real_text.store, "run", lambda *_, **__: pytest.fail("a reward model is trained"))
    asked = ["hh", "--out", str(tmp_path / "out"), "--keep", str(tmp_path / "keep"), *dialogues, *SMALL, *arguments]
    found = call(capsys, real_text.main, *asked)
    assert found.code == 2 and says in found.err and found.err.count("\n") == 1 and not compared


def test_reviews_without_a_positive_one_are_refused(capsys, tmp_path, reviews, compared):
    train = Path(reviews[1])
    write_jsonl(train, [row | {"label": 0} for row in read_jsonl(train)])
    found = call(capsys, real_text.main, "imdb", "--out", str(tmp_path / "out"), *reviews, *SMALL)
    assert found.code == 2 and "has no review with the label 1" in found.err


def trained(jobs, *_, **__):
    """In the place of the training of reward models: leaves what is read of it."""
    judged = {"heldout_accuracy": 0.75, "heldout_accuracy_ci95": (0.5, 0.9), "heldout_examples": 12, "train_examples": 30}
    for job in jobs:
        (job.workdir / "reward_model").mkdir(parents=True)
        (job.workdir / "reward_model" / "config.json").write_text("{}")
        job.result.write_text(json.dumps(judged))
    return {job.name: Outcome(0) for job in jobs}


def test_rewards_learn_from_answers_as_long_as_sampled_ones(capsys, tmp_path, dialogues, compared, monkeypatch):
    """Of pairs that differ later alone there is nothing to learn: such a difference is in no answer that is scored."""
    rows = list(read_jsonl(Path(dialogues[1])))
    late = {name: f"\n\nHuman: May I swim?\n\nAssistant: Of course you {said}." for name, said in
            (("chosen", "may"), ("rejected", "may not"))}  # fmt: skip
    write_jsonl(Path(dialogues[1]), [late, *rows])
    monkeypatch.setattr(real_text.store, "run", trained)
    out = tmp_path / "out"
    assert call(capsys, real_text.main, "hh", "--out", str(out), *dialogues, *SMALL, *TINY).code == 0
    pairs = [row for name in (*real_text.HALVES, "pairs") for row in read_jsonl(data(out, name))]
    assert len(pairs) == 60 + 12  # the late one is left out
    assert {row[name][0]["content"] for row in pairs for name in ("chosen", "rejected")} >= {"No.", "Yes, 4"}
    assert not any("may" in row["chosen"][0]["content"] for row in pairs)
    (asked,) = compared
    assert asked.config.reward.transform == "zscore"  # the loss of a reward model gives it no scale
    assert asked.note.startswith("half_a orders 0.750 (0.500 to 0.900) of 12 test pairs as people did; half_b orders")
    assert any("may." in row["completion"][0]["content"] for row in read_jsonl(data(out, "references")))  # cut later


@pytest.mark.slow
def test_dialogues_with_two_reward_models(capsys, tmp_path, dialogues):
    """As a whole; and from what was kept, with which nothing is trained, in another folder."""
    keep = tmp_path / "kept"
    asked = [*dialogues, *SMALL, "--keep", str(keep), "--jobs", "2", "--reward-base", "tiny", "--reward-tokens", "512"]
    asked += TINY
    known: list[str] = []
    for out in (tmp_path / "out", tmp_path / "other"):
        found = call(capsys, real_text.main, "hh", "--out", str(out), *asked)
        assert found.code == 0, found.out + found.err
        assert found.out.count("half_a orders") >= 2 and "nothing failed" in found.out  # and beside the tables
        halves = [ids(out, name) for name in real_text.HALVES]
        assert not halves[0] & halves[1] and len(halves[0] | halves[1]) == 60
        queries = ids(out, "train") | ids(out, "dev")
        assert queries < halves[0] | halves[1] and len(queries) == 59  # one has too many words
        judged = read_json(out / "rewards.json")
        assert [judged[name]["train_examples"] for name in real_text.HALVES] == [len(half) for half in halves]
        halves = [next(out.glob(f"{name}-*/reward_model/model.safetensors")) for name in real_text.HALVES]
        assert halves[0].read_bytes() != halves[1].read_bytes()
        # what stands in its folder is the reward's version
        models = [hub.identity(str(file.parent), None) for file in halves]
        assert models == known or not known
        known = models
    first, second = tmp_path / "out", tmp_path / "other"
    for name in ("comparison/table.md", "rewards.json", halves[1].relative_to(second)):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert {path.name for path in second.glob("*.log")} == {"comparison.log"}
    settings = json.loads(next((first / "start" / "responses" / "start").glob("iter_0000.json")).read_text())
    assert (settings["reward"], settings["second_reward"]) == ("half_a", "half_b")
