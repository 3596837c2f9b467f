"""--mode=generate: what is kept beside responses, and that it is the same for every backend."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from test_baselines import config

from ple_jax import modes
from ple_jax.core.batches import pack
from ple_jax.core.errors import UserError
from ple_jax.core.files import read_json, write_json, write_sealed
from ple_jax.evaluation import responses
from ple_jax.training import opening
from ple_jax.training.journal import Journal, read


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Queries of which the second has no reference."""
    file = tmp_path_factory.mktemp("data") / "test.jsonl"
    rows = [("a", "say: ", " yes"), ("b", "one, two, ", ""), ("c", "hm ", " a longer answer than any that is sampled")]
    file.write_text("".join(json.dumps({"id": i, "prompt": p, "completion": c}) + "\n" for i, p, c in rows))
    return str(file)


def settings(data: str, **options):
    wanted = {"generate__samples": 3, "generate__second_reward": "length"} | options
    return FrozenConfigDict(config("ple", iterations=1, generate__data=data, **wanted))


SECOND = {"generate__second_kwargs": {"target": 1}}


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    assert modes.train(settings(data, **SECOND), path, "torch") == 0
    return path


def test_what_is_kept(data, trained, capsys):
    c = settings(data, **SECOND)
    assert modes.generate(c, trained, "torch") == 0
    said = capsys.readouterr().out
    found = responses.read(trained / "responses" / "trained")
    assert [rollout.query_id for rollout in found.rollouts] == ["a", "b", "c"]
    assert [[(r.kind, r.sample) for r in rollout.responses] for rollout in found.rollouts] == [
        [("plain", 0), ("plain", 1), ("plain", 2)]
    ] * 3
    assert found.settings["algorithm"] == "ple" and found.settings["iteration"] == 1 and found.settings["samples"] == 3
    assert found.settings["second_reward"] == "length" and found.settings["queries"] == 3
    assert [line["reference"] for line in found.scores] == [" yes", "", " a longer answer than any that is sampled"]
    # the reference with its EOS, whole, whatever sampling.max_new_tokens is: the tiny model's tokens are bytes
    assert [line["reference_tokens"] for line in found.scores] == [5, 0, 42]
    assert found.scores[1]["reference_logprob"] is None and found.scores[0]["reference_logprob"] < 0
    assert "3 queries x 3 responses, kept in" in said and repr(found.rollouts[0].responses[0].text) in said
    for rollout, line in zip(found.rollouts, found.scores, strict=True):
        for r, second, logprob, base, kl in zip(
            rollout.responses, line["second"], line["logprob"], line["base_logprob"], line["kl"], strict=True
        ):
            assert second == -abs(len(r.text.split()) - 1) and kl > 0
            assert logprob < 0 and base < 0 and logprob != base
    # finished work is neither done again nor changed
    files = {path: path.read_bytes() for path in (trained / "responses" / "trained").iterdir()}
    assert modes.generate(c, trained, "torch") == 0
    assert files == {path: path.read_bytes() for path in (trained / "responses" / "trained").iterdir()}
    # nor are settings of an earlier version, which had no version of the second reward, other ones
    file = trained / "responses" / "trained" / "iter_0001.json"
    kept = file.read_bytes()
    before = {key: value for key, value in found.settings.items() if key != "second_reward_version"}
    write_json(file, before, sealed=True)
    assert modes.generate(c, trained, "torch") == 0 and read_json(file) == before  # which version scored them is not known
    file.write_bytes(kept)
    with pytest.raises(UserError, match=r"other settings \(second_reward_version\)"):
        modes.generate(settings(data, generate__second_kwargs={"target": 2}), trained, "torch")
    # the config of a run does not say what is generated with it: other settings are refused by name
    with pytest.raises(UserError, match=r"other settings \(samples\); move or delete that folder"):
        modes.generate(settings(data, **SECOND | {"generate__samples": 2}), trained, "torch")


def test_another_training_is_another_policy(data, trained, tmp_path):
    """The same directory and iteration, but other weights: what is there is not taken for theirs."""
    newest = {"checkpoint__use": "newest"}
    c = settings(data, **SECOND, **newest)
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("responses"))
    assert modes.generate(c, tmp_path / "run", "torch") == 0
    folders = ("checkpoints", "best", "rollouts", "evaluations", "adapter")
    for name in (*folders, "metrics.jsonl", "summary.json", "report.html"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    other = settings(data, **SECOND, **newest, optimizer__lr=0.05)
    with pytest.raises(UserError, match="belongs to another config, differing in optimizer.lr"):
        modes.train(other, tmp_path / "run", "torch")
    (tmp_path / "run" / "config.json").unlink()
    shutil.move(tmp_path / "run" / "responses", tmp_path / "kept")
    assert modes.train(other, tmp_path / "run", "torch") == 0
    shutil.move(tmp_path / "kept", tmp_path / "run" / "responses")
    with pytest.raises(UserError, match=r"other settings \(weights_digest\)"):
        modes.generate(other, tmp_path / "run", "torch")


def test_a_reference_longer_than_the_model_takes_is_left_out(tmp_path):
    file = tmp_path / "test.jsonl"
    rows = [("a", " yes"), ("b", " no" * 700)]  # 2,101 tokens with the EOS, of a model that takes 2,048
    file.write_text("".join(json.dumps({"id": i, "prompt": "say: ", "completion": c}) + "\n" for i, c in rows))
    for backend in ("torch", "jax"):
        c = settings(str(file), generate__policy="start", generate__second_reward=None)
        assert modes.generate(c, tmp_path / backend, backend) == 0
        found = responses.read(tmp_path / backend / "responses" / "start")
        assert [line["reference_tokens"] for line in found.scores] == [5, 0]
        assert found.scores[0]["reference_logprob"] < 0 and found.scores[1]["reference_logprob"] is None


def test_log_probabilities_and_kl_by_hand(data, trained):
    """Each response alone, policy and base, and the sums written out."""
    c = settings(data, **SECOND)
    modes.generate(c, trained, "torch")
    found = responses.read(trained / "responses" / "trained", 1)
    inputs = opening.read_inputs(c, "torch")
    with opening.open_run(trained, "torch", inputs) as run:
        assert run.backend.restore(trained / "checkpoints") is not None
        for rollout, line in zip(found.rollouts, found.scores, strict=True):
            for k in range(3):
                batch = pack([rollout], [(k,)], prompt_multiple=c.sampling.bucket, response_len=8)
                n = len(rollout.responses[k].tokens)
                policy = run.backend.logprobs(batch).logprobs[0, 0, :n].astype(float)
                base = run.backend.logprobs(batch, base=True).logprobs[0, 0, :n].astype(float)
                assert line["logprob"][k] == pytest.approx(policy.sum(), rel=1e-5)
                assert line["base_logprob"][k] == pytest.approx(base.sum(), rel=1e-5)
                ratio = np.exp(base - policy)
                assert line["kl"][k] == pytest.approx((ratio - 1 - np.log(ratio)).sum(), rel=1e-3)


@pytest.mark.parametrize(("backend", "began"), [("torch", "warm_up"), ("jax", "warm_up"), ("torch", "adapter")])
def test_kl_is_to_what_training_began_with(backend, began, data, trained, tmp_path):
    """An adapter, or the policy after a warm-up, as it is for the budgets; perplexity stays that of the base."""
    options = {
        "warm_up": {"warm_up__data": data, "warm_up__epochs": 3, "warm_up__lr": 0.05, "task__max_bad_share": 0.5},
        "adapter": {"model__adapter": str(trained / "adapter")},
    }[began]
    still = {"checkpoint__use": "newest", "eval__best": "none", "optimizer__lr": 1e-30}
    c = settings(data, **options, **still, generate__second_reward=None)
    assert modes.train(c, tmp_path, backend) == 0
    modes.generate(c, tmp_path, backend)
    for line in responses.read(tmp_path / "responses" / "trained").scores:
        assert max(line["kl"]) < 1e-3 < np.abs(np.subtract(line["logprob"], line["base_logprob"])).min()


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_log_probabilities_are_of_the_untouched_model_whatever_they_are_sampled_at(data, tmp_path, temperature):
    c = settings(data, generate__policy="start", generate__second_reward=None, sampling__temperature=temperature)
    modes.generate(c, tmp_path, "jax")
    for line in responses.read(tmp_path / "responses" / "start").scores:  # policy and base are one model
        assert line["logprob"] == pytest.approx(line["base_logprob"], rel=1e-5)
        assert line["kl"] == pytest.approx([0.0] * 3, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_start_needs_no_run(data, tmp_path, temperature):
    found = {}
    for principled in (False, True):
        asked = {"generate__policy": "start", "generate__principled": principled, "sampling__temperature": temperature}
        c = settings(data, **SECOND, **asked)
        assert modes.generate(c, tmp_path / "start", "torch") == 0
        found[principled] = responses.read(responses.folder(tmp_path / "start", c))
    plain, principled = found[False], found[True]
    assert {path.name for path in (tmp_path / "start" / "responses").iterdir()} == {"start", "start_principled"}
    assert plain.settings["policy"] == "start" and plain.settings["iteration"] == 0
    # the policy is the base: no divergence, until the principles stand in its prompt
    assert all(kl == pytest.approx(0, abs=1e-6) for line in plain.scores for kl in line["kl"])
    assert all(
        a == pytest.approx(b) for line in plain.scores for a, b in zip(line["logprob"], line["base_logprob"], strict=True)
    )
    assert all(kl > 1e-4 for line in principled.scores for kl in line["kl"])
    assert {r.kind for rollout in principled.rollouts for r in rollout.responses} == {"principled"}
    # what is scored, and kept as the prompt, is the plain one
    assert [rollout.prompt_tokens for rollout in principled.rollouts] == [
        rollout.prompt_tokens for rollout in plain.rollouts
    ]
    # which principles they were is kept, and settings of an earlier version, which do not say it, are no other ones
    inputs = read_json(tmp_path / "start" / "config.json")["inputs"]
    said = {key: principled.settings.get(key) for key in responses.RULES}
    assert said == {"principles_per_query": 0, "principles_digest": inputs["principles"]} and not {*said} & {*plain.settings}
    file = tmp_path / "start" / "responses" / "start_principled" / "iter_0000.json"
    before = {key: value for key, value in principled.settings.items() if key not in said}
    write_json(file, before, sealed=True)
    assert modes.generate(c, tmp_path / "start", "torch") == 0 and read_json(file) == before


def test_both_backends_keep_the_same(data, trained, tmp_path):
    c = settings(data, **SECOND, generate__policy="start")
    kept = []
    for backend in ("jax", "torch"):
        assert modes.generate(c, tmp_path / backend, backend) == 0
        kept.append(responses.read(tmp_path / backend / "responses" / "start"))
    for one, other in zip(*(each.rollouts for each in kept), strict=True):
        bare = [[r._replace(logprobs=()) for r in rollout.responses] for rollout in (one, other)]
        assert bare[0] == bare[1] and one._replace(responses=()) == other._replace(responses=())
        said, theirs = ([x for r in rollout.responses for x in r.logprobs] for rollout in (one, other))
        assert said == pytest.approx(theirs, abs=1e-4)
    for one, other in zip(kept[0].scores, kept[1].scores, strict=True):
        for key in ("logprob", "base_logprob"):
            assert one[key] == pytest.approx(other[key], rel=1e-4)
        theirs = other["reference_logprob"]
        assert one["reference_logprob"] == (theirs and pytest.approx(theirs, rel=1e-4))


def test_the_same_queries_whatever_the_seed(data):
    chosen = {
        seed: [q.id for q in responses.evaluation_set(settings(data, seed=seed, generate__max_queries=2)).queries]
        for seed in (0, 1, 2, 3)
    }
    assert len(chosen[0]) == 2 and all(ids == chosen[0] for ids in chosen.values())


def test_a_stopped_one_goes_on(data, tmp_path, monkeypatch):
    """What was sampled before a stop is there: nothing is sampled twice, and the result is the uninterrupted one."""
    c = settings(data, **SECOND, generate__policy="start", sampling__width=2)
    assert modes.generate(c, tmp_path / "whole", "torch") == 0
    calls, whole = [], Journal.keep

    def dies(self, responses, *more):
        if len(calls) == 2:
            calls.append(0)
            raise UserError("the power is gone")
        calls.append(len(responses))
        return whole(self, responses, *more)

    monkeypatch.setattr(Journal, "keep", dies)
    with pytest.raises(UserError, match="the power is gone"):
        modes.generate(c, tmp_path / "twice", "torch")
    assert modes.generate(c, tmp_path / "twice", "torch") == 0
    assert sum(calls) == 9 and calls[2] == 0 and len(calls) > 4  # nine responses; those that could not be kept came again
    names = ("iter_0000.jsonl", "iter_0000.scores.jsonl", "iter_0000.json")
    for name in names:
        one, other = ((tmp_path / which / "responses" / "start" / name).read_text() for which in ("whole", "twice"))
        assert one == other


def test_queries_that_were_trained_on_are_told(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("responses"))
    c = settings("tiny_train", generate__max_queries=4, generate__second_reward=None)
    assert modes.generate(c, tmp_path / "run", "torch") == 0
    assert "warning: 4 of 4 queries are among those that were trained on" in capsys.readouterr().out
    assert "second" not in responses.read(tmp_path / "run" / "responses" / "trained").scores[0]


@pytest.mark.parametrize(("package", "measure"), [("sacrebleu", "BLEU"), ("rouge_score", "ROUGE")])
def test_what_references_need_is_asked_for_before_anything_is_sampled(package, measure, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{measure} needs {package}, .*: pip install 'ple_jax\[eval\]'"):
        modes.generate(settings(data, **SECOND, generate__policy="start"), tmp_path / "start", "torch")
    assert not (tmp_path / "start").exists()
    c = settings("tiny_heldout", **SECOND, generate__policy="start")  # without references nothing needs it
    assert modes.generate(c, tmp_path / "start", "torch") == 0


def test_mistakes(data, trained, tmp_path):
    with pytest.raises(UserError, match="holds no run; train one first"):
        modes.generate(settings(data), tmp_path / "nothing", "torch")
    with pytest.raises(UserError, match=r"config.generate.second_kwargs \{'aim': 1\}"):
        modes.generate(settings(data, generate__second_kwargs={"aim": 1}), trained, "torch")
    with pytest.raises(UserError, match="holds no responses; --mode=generate"):
        responses.read(tmp_path)
    folder = tmp_path / "responses"
    shutil.copytree(trained / "responses" / "trained", folder)
    with pytest.raises(UserError, match="holds no responses of iteration 7"):
        responses.read(folder, 7)
    scores = folder / "iter_0001.scores.jsonl"
    lines = scores.read_text().splitlines(keepends=True)
    write_sealed(scores, [{"query_id": "others"} for _ in lines])
    with pytest.raises(UserError, match="are of other queries; delete both"):
        responses.read(folder)
    scores.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=r"scores.jsonl:1 is damaged .*; delete it and give --mode=generate again"):
        responses.read(folder)
    scores.write_text(lines[0][:-20])
    with pytest.raises(UserError, match="is damaged"):
        responses.read(folder)
    assert read(folder / "iter_0001.jsonl")
    scores.write_text("".join(lines))
    (folder / "iter_0001.json").unlink()
    with pytest.raises(UserError, match="the settings of these responses, is gone"):
        responses.read(folder)
