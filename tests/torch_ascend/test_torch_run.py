"""Whole runs with --backend=torch: JAX's rollouts to the byte, without JAX; killed and continued; modes; reward models."""

import functools
import io
import json
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path

import journals
import numpy as np
import pytest
import test_resume
import test_reward_training
import torch
import transformers
from ml_collections import FrozenConfigDict
from peft import PeftModel
from safetensors.numpy import load_file
from test_resume import NEVER, curve, outcome, rows

from configs import tiny as tiny_config
from ple_jax import modes
from ple_jax.core.errors import UserError
from ple_jax.core.types import Sampling
from torch_ascend import backend as torch_backend

WEIGHTS = Path("adapter") / "adapter_model.safetensors"


def run(workdir: Path, backend: str = "torch", at: tuple[str, int, str] = NEVER) -> subprocess.CompletedProcess[str]:
    """configs/tiny.py in a process of its own."""
    return test_resume.run(workdir, f"--backend={backend}", at=at)


def summary(workdir: Path) -> dict:
    return json.loads((workdir / "summary.json").read_text())


def config(**changes) -> FrozenConfigDict:
    """configs/tiny.py, which `run` runs, with dotted keys changed; a double underscore stands for the dot."""
    c = tiny_config.get_config()
    c.checkpoint.use = "newest"
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return FrozenConfigDict(c)


def total(arrays: Iterable[np.ndarray]) -> float:
    return sum(float((x.astype(np.float64) ** 2).sum()) for x in arrays) ** 0.5


def assert_trained_alike(ours: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Where a gradient is all rounding Adam makes a share of its step of it, here 1e-2; but that is in few places.

    They are a thousandth of what was learned: B began at zero.
    """
    assert ours.keys() == wanted.keys()
    apart = {name: ours[name] - array for name, array in wanted.items()}
    assert max(np.abs(x).max() for x in apart.values()) < 1e-3
    assert total(apart.values()) < 1e-3 * total(x for name, x in wanted.items() if "lora_B" in name)


def assert_same_numbers(ours: list[dict], wanted: list[dict], rel: float) -> None:
    assert [line.keys() for line in ours] == [line.keys() for line in wanted]
    for one, other in zip(ours, wanted, strict=True):
        assert one == pytest.approx(other, rel=rel, abs=rel)


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """An uninterrupted run, in a process in which nothing of JAX can be imported."""
    workdir = tmp_path_factory.mktemp("runs") / "torch"
    result = run(workdir)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no library has anything to warn of
    return workdir


# ---------------------------------------------------------------- against JAX


@pytest.mark.slow
def test_rollouts_and_evaluations_are_jaxs(ours, tmp_path):
    """Tokens, rewards, thresholds, decisions, weights; and what was measured and trained, as far as fp32 goes."""
    theirs = tmp_path / "jax"
    result = run(theirs, "jax")
    assert result.returncode == 0, result.stderr
    files, wanted = outcome(ours), outcome(theirs)
    assert_trained_alike(*(load_file(workdir / WEIGHTS) for workdir in (ours, theirs)))
    del files[str(WEIGHTS)], wanted[str(WEIGHTS)]
    assert len(files) == 3 + 4 and files.keys() == wanted.keys()
    for name in files:
        journals.assert_the_same(ours / name, theirs / name)
    assert_same_numbers(curve(ours), curve(theirs), rel=1e-4)
    assert rows(ours) == rows(theirs)
    same = ("heldout_reward_before", "heldout_reward_after", "heldout_gain_ci95", "generated_tokens", "training_tokens")
    assert {key: summary(ours)[key] for key in same} == {key: summary(theirs)[key] for key in same}
    assert summary(ours)["backend"] == "torch"
    assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()}
    settings = [json.loads((workdir / "adapter" / "adapter_config.json").read_text()) for workdir in (ours, theirs)]
    assert settings[0] == settings[1]


def test_a_run_of_the_other_backend_is_refused(ours):
    with pytest.raises(UserError, match="differing in backend"):
        modes.train(config(), ours, "jax")


# ---------------------------------------------------------------- killed and continued


@pytest.mark.slow
def test_killed_and_continued(ours, tmp_path):
    """Between a step's gradients and the step, then while a checkpoint is being written: the same bytes in the end."""
    workdir = tmp_path / "killed"
    # the fourth update is the second one of iteration 1
    assert run(workdir, at=("torch_ascend.backend:TorchBackend.step", 4, "before")).returncode == -signal.SIGKILL
    assert not (workdir / WEIGHTS).exists()
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["0", "1"]
    # files and folder of the first commit of this process, which is iteration 1's
    assert run(workdir, at=("ple_jax.core.commits:to_disk", 2, "before")).returncode == -signal.SIGKILL
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["0", "1", "2.partial"]
    again = run(workdir)
    assert again.returncode == 0, again.stderr
    assert outcome(workdir) == outcome(ours)
    assert curve(workdir) == curve(ours)
    assert rows(workdir) == rows(ours)  # finished rollouts are not sampled again
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "3"]


def test_a_run_that_was_interrupted_drops_what_it_would_have(tmp_path, monkeypatch):
    """In one process, with dropout, DoRA, a warm-up, a reference and recomputation: neither end differs by a bit."""
    options = {
        "iterations": 2, "sinks": (), "lora__dora": True, "lora__dropout": 0.2, "model__remat": "dots", "ple__rank": "dpo",
        "ple__selection": "symmetric", "ple__tau_0": 0.01,
    }  # fmt: skip
    records = tmp_path / "sft.jsonl"
    lines = [json.dumps({"prompt": f"{i} is", "completion": f" {i + 1} less one"}) + "\n" for i in range(6)]
    records.write_text("".join(lines))
    options["warm_up__data"] = str(records)
    c = config(**options)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert modes.train(c, whole, "torch") == 0
    update, calls = torch_backend.TorchBackend.update, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return update(self, *args, **kwargs)

    monkeypatch.setattr(torch_backend.TorchBackend, "update", failing)
    with pytest.raises(KeyboardInterrupt):
        modes.train(c, cut, "torch")
    assert modes.train(c, cut, "torch") == 0
    assert len(calls) == 2 + 4 + 2  # of the warm-up; two of every iteration, and the one that was cut off, over again
    assert outcome(cut) == outcome(whole) and curve(cut) == curve(whole)
    lines = curve(whole)
    assert lines[0]["heldout_kl"] == 0 < lines[-1]["heldout_kl"]  # the reference is the policy after the warm-up
    assert any(name.endswith("lora_magnitude_vector") for name in load_file(whole / WEIGHTS))
    plain = tmp_path / "plain"
    assert modes.train(config(**options | {"model__remat": "none"}), plain, "torch") == 0
    assert outcome(plain) == outcome(whole)


# ---------------------------------------------------------------- the other modes, on a run


def test_evaluate_and_generate(ours, capsys):
    assert modes.evaluate(config(), ours, "torch") == 0
    assert f"iteration 3: held-out reward {summary(ours)['heldout_reward_after']:.4f}" in capsys.readouterr().out
    assert modes.generate(config(), ours, "torch") == 0
    said = capsys.readouterr().out
    file = ours / "responses" / "trained" / "iter_0003.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 8 and all(repr(response["text"]) in said for line in lines for response in line["responses"])
    assert modes.train(config(), ours, "torch") == 0
    assert "is finished: held-out reward" in capsys.readouterr().out


def test_a_plan_is_that_of_jax(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))  # of rates each backend has its own
    said = []
    for backend in ("torch", "jax"):
        assert modes.plan(config(), tmp_path, backend) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "LoRA parameters" in said[0]


def test_exported_weights_say_what_the_backend_says(ours, capsys):
    """Merged, by transformers alone; and the adapter, by PEFT on the base."""
    before = (ours / WEIGHTS).read_bytes()
    assert modes.export(config(export__merged=True), ours, "torch") == 0
    assert "merged weights:" in capsys.readouterr().out and (ours / WEIGHTS).read_bytes() == before
    ids = torch.tensor([list(b"Hello, and once more")])
    with modes.on_run(config(), ours, "torch") as (opened, state), torch.no_grad():
        assert state.iteration == 3
        model, time = opened.backend.model, torch.arange(ids.shape[1])[None]
        wanted, base = (
            model.logits(model.apply(adapter, ids, positions=time, mask=(time <= time.mT)[None]))
            for adapter in (opened.backend.policy, {})
        )
        merged = transformers.AutoModelForCausalLM.from_pretrained(ours / "merged")
        torch.testing.assert_close(merged(ids).logits, wanted, atol=1e-4, rtol=0)
        plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**torch_backend.load(config()).raw))
        plain.load_state_dict({n: torch.tensor(x) for n, x in torch_backend.load(config()).weights.items()}, strict=False)
        plain.tie_weights()
        torch.testing.assert_close(plain.eval()(ids).logits, base, atol=1e-4, rtol=0)
        torch.testing.assert_close(PeftModel.from_pretrained(plain, ours / "adapter")(ids).logits, wanted, atol=1e-4, rtol=0)
    assert (wanted - base).abs().max() > 0.1


def test_chat_streams_what_generate_says(ours, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("/temperature 0\n/max 12\n/template off\n/both\nHello\n"))
    assert modes.chat(config(), ours, "torch") == 0
    said = capsys.readouterr().out
    with modes.on_run(config(), ours, "torch") as (opened, _):
        prompt, noise = list(b"Hello"), np.zeros((1, 12), np.float32)
        greedy = Sampling(12, opened.base.eos, temperature=0.0)
        show = functools.partial(opened.base.tokenizer.decode, skip_special_tokens=True)
        adapter = show(opened.backend.generate([prompt], noise, sampling=greedy)[0].tokens)
        opened.backend.policy = {}
        base = show(opened.backend.generate([prompt], noise, sampling=greedy)[0].tokens)
    assert said.endswith(f"base: {base}\nadapter: {adapter}\n\n") and base != adapter


# ---------------------------------------------------------------- reward models


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return {
        "task__train": test_reward_training.write_pairs(folder / "train.jsonl", 40, 0),
        "task__heldout": test_reward_training.write_pairs(folder / "heldout.jsonl", 12, 100),
    }


def reward(workdir: Path, backend: str, **changes) -> Path:
    assert modes.train(FrozenConfigDict(test_reward_training.config(**changes)), workdir, backend) == 0
    return workdir


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, files) -> Path:
    return reward(tmp_path_factory.mktemp("runs") / "reward", "torch", **files)


@pytest.mark.slow
def test_a_reward_model_is_jaxs(reward_model, files, tmp_path):
    theirs = reward(tmp_path / "jax", "jax", **files)
    assert_same_numbers(curve(reward_model), curve(theirs), rel=1e-4)
    one, other = summary(reward_model), summary(theirs)
    assert one["steps"] == 10 and one["heldout_margin"] == pytest.approx(other["heldout_margin"], rel=1e-4)
    assert abs(one["heldout_margin"]) > 0.01
    assert_trained_alike(*(load_file(workdir / WEIGHTS) for workdir in (reward_model, theirs)))
    merged, wanted = (load_file(workdir / "reward_model" / "model.safetensors") for workdir in (reward_model, theirs))
    assert merged.keys() == wanted.keys() and merged["score.weight"].any()
    for name, array in wanted.items():
        np.testing.assert_allclose(merged[name], array, atol=1e-3, rtol=0, err_msg=name)


def test_transformers_says_the_same_of_the_exported_reward_model(reward_model, files):
    folder = reward_model / "reward_model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = test_reward_training.margins(model, tokenizer, files["task__heldout"])
    assert found.mean() == pytest.approx(summary(reward_model)["heldout_margin"], abs=1e-4)


def test_an_interrupted_reward_model_goes_on_from_its_last_evaluation(reward_model, files, tmp_path, monkeypatch):
    update, calls = torch_backend.TorchBackend.update, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return update(self, *args, **kwargs)

    monkeypatch.setattr(torch_backend.TorchBackend, "update", failing)
    with pytest.raises(KeyboardInterrupt):
        reward(tmp_path / "cut", "torch", **files)
    reward(tmp_path / "cut", "torch", **files)
    assert len(calls) == 7 + 10 - 4  # steps 5 and 6 are done again
    for file in (WEIGHTS, "metrics.jsonl", "reward_model/model.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (reward_model / file).read_bytes()


def test_the_head_alone(files, tmp_path):
    reward(tmp_path, "torch", **files, reward_model__train="head", offline__epochs=3, optimizer__lr=5e-2)
    assert list(load_file(tmp_path / WEIGHTS)) == ["base_model.model.score.weight"]
    assert summary(tmp_path)["heldout_accuracy"] > 0.9


def test_modes_of_a_reward_model(reward_model, files, capsys):
    c = FrozenConfigDict(test_reward_training.config(**files))
    assert modes.evaluate(c, reward_model, "torch") == 0
    assert f"accuracy {summary(reward_model)['heldout_accuracy']:.4f}" in capsys.readouterr().out
    before = (reward_model / "reward_model" / "model.safetensors").read_bytes()
    assert modes.export(c, reward_model, "torch") == 0
    assert (reward_model / "reward_model" / "model.safetensors").read_bytes() == before
    assert modes.plan(c, reward_model, "torch") == 0
    assert "10 of 4 examples" in capsys.readouterr().out
    for mode in (modes.generate, modes.chat):
        with pytest.raises(UserError, match="needs an algorithm that samples"):
            mode(c, reward_model, "torch")
