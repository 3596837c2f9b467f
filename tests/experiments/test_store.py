"""What finished jobs say, packed and unpacked."""

import errno
import json
import os
import tarfile

import pytest

from ple_jax import experiments
from ple_jax.core.errors import Damaged, UserError
from ple_jax.core.files import read_sealed, write_jsonl, write_sealed
from ple_jax.core.types import Response, Rollout
from ple_jax.experiments import store
from ple_jax.experiments.jobs import Job
from ple_jax.training import journal


@pytest.fixture
def out(tmp_path):
    """A finished training and two answers of it, with everything that is not to be kept."""
    run = tmp_path / "out" / "ple__seed-0"
    files = {
        "config.json": "{}", "environment.json": "{}", "summary.json": "{}", "metrics.jsonl": "1", "report.html": "x",
        "checkpoints/5/state": "weights", "rollouts/iter_0000.jsonl": "x", "adapter/adapter_model.safetensors": "w",
        "responses/trained/iter_0002.json": "two",
        "responses/trained/iter_0002.scores.jsonl": "two", "responses/trained/iter_0005.scores.jsonl": "five",
    }  # fmt: skip
    for name, text in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    said = Response((5, 6), True, text="yes", reward=0.5, logprobs=(-1.5, -2.5))
    journal.write(run / "responses" / "trained" / "iter_0002.jsonl", [Rollout("q0", "a", (1,), (said,))])
    for name in ("ple__seed-0", "ple__seed-0__kl_4"):
        (tmp_path / "out" / f"{name}.done").write_text(json.dumps(name))
    return tmp_path / "out"


def jobs(out):
    run = out / "ple__seed-0"
    training = Job("ple__seed-0", (), run, "summary.json")
    return training, Job("ple__seed-0__kl_4", (), run, "responses/trained/iter_0002.scores.jsonl")


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """What a job asks for is its name, unless a test says something else."""
    wanted = {}
    monkeypatch.setattr(experiments.jobs, "asked", lambda job, out: json.dumps(wanted.get(job.name, job.name)))
    return wanted


OF_RUN = ["config.json", "environment.json", "summary.json", "metrics.jsonl"]


@pytest.fixture
def kept(out, tmp_path):
    for job in jobs(out):
        store.save(job, out, tmp_path / "kept")
    return tmp_path / "kept"


@pytest.fixture
def other(tmp_path):
    (tmp_path / "other").mkdir()
    return tmp_path / "other"


def test_what_a_job_says_is_kept_and_nothing_else(kept):
    held = {}
    for file in sorted(kept.iterdir()):
        with tarfile.open(file) as archive:
            held[file.name] = archive.getnames()
            assert "training" in held[file.name]
            assert all(member.mtime == 0 and member.uname == "" for member in archive.getmembers())
    answers = [f"ple__seed-0/responses/trained/iter_0002{end}" for end in (".json", ".jsonl", ".scores.jsonl")]
    assert held == {
        "ple__seed-0.tar.xz": ["training", "ple__seed-0.done", *(f"ple__seed-0/{name}" for name in OF_RUN)],
        "ple__seed-0__kl_4.tar.xz": ["training", "ple__seed-0__kl_4.done", *answers],
    }


def test_the_same_content_is_the_same_file(out, kept):
    first = (kept / "ple__seed-0.tar.xz").read_bytes()
    (out / "ple__seed-0" / "summary.json").touch()
    store.save(jobs(out)[0], out, kept)
    assert (kept / "ple__seed-0.tar.xz").read_bytes() == first


def test_what_was_kept_is_there_again_and_replaces_nothing_that_is_done(out, kept, other):
    training, answers = jobs(other)
    assert store.take(training, other, kept) and store.take(answers, other, kept)
    for name in [f"ple__seed-0/{name}" for name in (*OF_RUN, "responses/trained/iter_0002.scores.jsonl")]:
        assert (other / name).read_text() == (out / name).read_text()
    assert not (other / "ple__seed-0" / "checkpoints").exists()
    ours, theirs = (journal.read(root / "ple__seed-0/responses/trained/iter_0002.jsonl") for root in (out, other))
    assert ours[0].responses[0].logprobs == (-1.5, -2.5) and theirs[0].responses[0].logprobs == ()
    assert theirs[0].responses[0].tokens == (5, 6) and theirs[0].responses[0].text == "yes"
    assert sorted(path.name for path in other.iterdir()) == ["ple__seed-0", "ple__seed-0.done", "ple__seed-0__kl_4.done"]
    training.result.write_text("newer")
    assert not store.take(training, other, kept) and training.result.read_text() == "newer"
    assert not store.take(Job("else", (), other / "else", "summary.json"), other, kept)


def test_a_training_takes_the_place_of_what_was_begun(kept, other):
    """Its metrics are not those of the checkpoints that lie there, which would pass for the finished run's."""
    training, _ = jobs(other)
    (training.workdir / "checkpoints" / "2").mkdir(parents=True)
    assert store.take(training, other, kept) and not (training.workdir / "checkpoints").exists()


def test_what_is_forgotten_is_nowhere(kept, other):
    """Or else a kill while it is trained again would bring the old summary back, beside half of the new weights."""
    training, _ = jobs(other)
    store.take(training, other, kept)
    store.forget(training, other, kept)
    assert list(other.iterdir()) == [] == list(kept.iterdir())
    assert not store.take(training, other, kept) and not store.take(jobs(other)[1], other, kept)


def test_answers_are_taken_beside_the_training_that_gave_them(out, kept, other):
    training, answers = jobs(other)
    assert not store.take(answers, other, kept)  # beside none
    store.take(training, other, kept)
    training.result.write_text('{"wall_seconds": 2}')  # trained again, to other weights maybe
    assert not store.take(answers, other, kept) and not answers.result.exists()


def test_what_is_kept_is_known(out, kept, asked):
    training, answers = jobs(out)
    assert store.holds(training, out, kept) and store.holds(answers, out, kept)
    training.result.write_text('{"wall_seconds": 2}')
    assert not store.holds(training, out, kept) and not store.holds(answers, out, kept)
    store.save(training, out, kept)
    assert store.holds(training, out, kept)
    asked["ple__seed-0"] = "another question"
    assert not store.holds(training, out, kept) and not store.holds(training, out, kept / "elsewhere")


def test_a_job_of_another_question_is_neither_taken_nor_replaced(out, kept, other, asked):
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    asked["ple__seed-0"] = {"config": {"budgets": [4]}}
    for job, folder in ((jobs(other)[0], other), (jobs(out)[0], out)):
        act = store.take if folder == other else store.save
        with pytest.raises(UserError, match=r"ple__seed-0.tar.xz is of another command, .* give another --keep"):
            act(job, folder, kept)
    assert list(other.iterdir()) == [] and {path.name: path.read_bytes() for path in kept.iterdir()} == before


@pytest.mark.parametrize("spoil", [lambda data: data[:100], lambda data: data[:60] + bytes(8) + data[68:]])
def test_a_damaged_file_is_named_and_leaves_nothing(kept, other, spoil):
    file = kept / "ple__seed-0.tar.xz"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(Damaged, match=r"ple__seed-0.tar.xz is damaged .* delete it, and that job is done again"):
        store.take(jobs(other)[0], other, kept)
    assert list(other.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "the disk cannot be written .*make room there"), (errno.EACCES, "Permission denied.*; mend that")],
    ids=["full", "denied"],
)
def test_what_the_machine_refuses_is_no_damage(number, says, kept, other, monkeypatch):
    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tarfile.TarFile, "extractall", refused)
    with pytest.raises(UserError, match=f"ple__seed-0.tar.xz cannot be unpacked: .*{says}.* same command again") as error:
        store.take(jobs(other)[0], other, kept)
    assert not isinstance(error.value, Damaged) and "delete" not in str(error.value)


@pytest.fixture
def texts(out, tmp_path):
    """The data that the answers are of, which are not to be copied."""
    answers = out / "ple__seed-0" / "responses" / "trained"
    said = Response((5, 6), True, text="yes", reward=0.5, logprobs=(-1.5, -2.5))
    asked = Rollout("q0", "private", (1, 2), (said,), record={"label": "secret"})
    journal.write(answers / "iter_0002.jsonl", [asked])
    scores = [{"query_id": "q0", "reference": " hidden", "second": [0.5]}]
    write_sealed(answers / "iter_0002.scores.jsonl", scores, ascii=True)
    file = tmp_path / "test.jsonl"
    write_jsonl(file, [{"id": "q0", "prompt": "private", "completion": " hidden"}])
    return file


def test_what_the_data_say_is_not_kept_and_stands_in_its_place_again(out, other, tmp_path, texts):
    kept = tmp_path / "kept"
    for job in jobs(out):
        store.save(job, out, kept, texts=texts)
    for file in kept.iterdir():
        with tarfile.open(file) as archive:
            words = b"".join(archive.extractfile(name).read() for name in archive.getnames())
        assert b"private" not in words and b"hidden" not in words and b"secret" not in words
    store.take_all(jobs(other), other, kept, texts=texts)
    name = "ple__seed-0/responses/trained/iter_0002"
    ours, theirs = (journal.read(root / f"{name}.jsonl")[0] for root in (out, other))
    assert (theirs.prompt, theirs.responses[0].text, theirs.responses[0].reward) == ("private", "yes", 0.5)
    assert ours.query_id == theirs.query_id
    ours, theirs = (read_sealed(root / f"{name}.scores.jsonl", remedy="")[0] for root in (out, other))
    assert {**ours, "digest": 0} == {**theirs, "digest": 0}


def test_other_data_than_the_answers_are_of_are_named(out, other, tmp_path, texts):
    kept = tmp_path / "kept"
    for job in jobs(out):
        store.save(job, out, kept, texts=texts)
    write_jsonl(texts, [{"id": "q1", "prompt": "another", "completion": " one"}])
    with pytest.raises(Damaged, match=r"test.jsonl has no q0, which kept answers are of: give the data"):
        store.take_all(jobs(other), other, kept, texts=texts)
    assert not jobs(other)[1].result.exists()


def test_of_a_reward_model_the_adapter_is_kept(out, other, tmp_path):
    training = jobs(out)[0]
    (training.workdir / "reward_model").mkdir()
    store.save(training, out, tmp_path / "kept")
    assert store.take(jobs(other)[0], other, tmp_path / "kept")
    assert (other / "ple__seed-0/adapter/adapter_model.safetensors").read_text() == "w"
    assert not (other / "ple__seed-0/reward_model").exists()
