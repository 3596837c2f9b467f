"""Runs whose updates are TRL's: our own loop's losses and adapters, also JAX's; what TRL samples; resume; refusals."""

import contextlib
import functools
import importlib.util
import json
import math
import random
import shutil
import signal
from pathlib import Path

import chats
import families
import journals
import numpy as np
import pytest
import test_torch_run
import torch
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file
from speed import quick
from test_baselines import config as configured
from test_resume import curve, outcome
from test_torch_run import WEIGHTS, summary, total

from ple_jax import modes
from ple_jax.core import files
from ple_jax.core.config import validate
from ple_jax.core.errors import UserError
from ple_jax.data.queries import draw, load_queries
from ple_jax.training.interrupt import Interrupted
from ple_jax.training.journal import read
from torch_ascend import baselines

ONE = {"queries_per_iteration": 4, "optimizer__batch_queries": 4, "optimizer__micro_queries": 2}  # a step an iteration
PARAMETERS = 26_688  # of the tiny model, that a token is multiplied with (test_costs)
COUNTERS = ("queries", "generated_tokens", "prompt_tokens", "training_tokens", "reward_calls", "evaluation_tokens")


@pytest.fixture(autouse=True)
def nothing_is_sent(monkeypatch):
    def refuse(**what):
        raise AssertionError(what)

    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", refuse)
    monkeypatch.delenv("CI", raising=False)  # where TRL would not send anything anyway


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[str, str]:
    """Preference pairs whose answers have 2 to 12 tokens; those above 8 are cut and have no EOS."""
    folder, rng, found = tmp_path_factory.mktemp("pairs"), random.Random(0), {}
    for which, count in (("train", 28), ("heldout", 6)):
        lines = [
            {
                "id": f"{which} {i}",
                "prompt": f"{which} {'ab' * (i % 5)}{i}",
                **{name: " " + "".join(rng.choices("abcdefgh", k=rng.randint(1, 10))) for name in ("chosen", "rejected")},
            }
            for i in range(count)
        ]
        file = folder / f"{which}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found[f"task__{which}"] = str(file)
    return found


def config(algorithm: str, records: dict[str, str], **options) -> FrozenConfigDict:
    cut = {"task__max_answer_tokens": 8}
    whole = {"trainer": "trl", "iterations": 2, "checkpoint__use": "newest"}  # the adapter is of all steps
    c = configured(algorithm, **{**whole, **cut, **records, **options})
    validate(c)
    return FrozenConfigDict(c)


def train(workdir: Path, algorithm: str, records: dict[str, str], *, backend: str = "torch", **options) -> Path:
    assert modes.train(config(algorithm, records, **options), workdir, backend) == 0
    return workdir


def column(workdir: Path, name: str) -> np.ndarray:
    return np.array([line[name] for line in curve(workdir)[1:]])


def assert_alike(ours: Path, wanted: Path, rel: float = 1e-3) -> None:
    """Apart by rounding, which Adam enlarges where a gradient is nothing else: by little of what was learned."""
    one, other = (load_file(workdir / WEIGHTS) for workdir in (ours, wanted))
    assert one.keys() == other.keys()
    learned = total(x for name, x in other.items() if "lora_B" in name)
    assert learned > 0.1 and total(one[name] - x for name, x in other.items()) < rel * learned


# ---------------------------------------------------------------- the curves of our own loop


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dpo", "sft"])
def test_twenty_steps_are_those_of_our_own_loop_in_jax(algorithm, records, equally_long, tmp_path):
    """The same start, data and order: asked for are losses within 1e-3."""
    records = equally_long if algorithm == "sft" else records
    options = {**ONE, "iterations": 20, "eval__every": 20, "optimizer__lr": 5e-3}
    theirs = train(tmp_path / "trl", algorithm, records, **options)
    ours = train(tmp_path / "jax", algorithm, records, backend="jax", **options | {"trainer": "own"})
    for name in ("loss", "grad_norm", *(("reward_margin",) if algorithm == "dpo" else ())):
        np.testing.assert_allclose(column(theirs, name), column(ours, name), atol=1e-4, rtol=1e-4, err_msg=name)
    for name in ("lr", "training_tokens", "total_reward_calls"):
        np.testing.assert_array_equal(column(theirs, name), column(ours, name), err_msg=name)
    if algorithm == "dpo":
        assert column(theirs, "loss")[0] == pytest.approx(np.log(2), abs=1e-6)
        # at the first step all margins are 0, and rounding decides of which sign
        np.testing.assert_array_equal(column(theirs, "reward_accuracy")[1:], column(ours, "reward_accuracy")[1:])
    assert np.ptp(column(theirs, "loss")) > 0.05
    assert_alike(theirs, ours)
    files, wanted = outcome(theirs), outcome(ours)
    del files[str(WEIGHTS)], wanted[str(WEIGHTS)]
    assert len(files) == 20 + 2 and files.keys() == wanted.keys()
    for name in files:
        journals.assert_the_same(theirs / name, ours / name)
    told = summary(theirs)
    assert {name: told[name] for name in COUNTERS} == {name: summary(ours)[name] for name in COUNTERS}
    assert (told["trainer"], summary(ours)["trainer"]) == ("trl", "own")
    trained = [rollout for i in range(20) for rollout in read(theirs / "rollouts" / f"iter_{i:04d}.jsonl")]
    again = sum(len(rollout.prompt_tokens) for rollout in trained)  # of DPO, before the other answer
    multiples = {"sft": 4 * told["training_tokens"], "dpo": (4 + 2) * (told["training_tokens"] + again)}
    assert told["flops"] == PARAMETERS * multiples[algorithm]


@pytest.fixture(scope="module")
def equally_long(records, tmp_path_factory) -> dict[str, str]:
    """Chosen answers of six tokens and EOS: what an SFT step is divided by, where we and TRL differ, is the same then."""
    folder, found = tmp_path_factory.mktemp("equal"), {}
    for key, file in records.items():
        lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
        lines = [line | {"chosen": (line["chosen"] + "abcde")[:6]} for line in lines]
        (folder / Path(file).name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        found[key] = str(folder / Path(file).name)
    return found


@pytest.fixture(scope="module")
def start(records, tmp_path_factory) -> str:
    """An adapter to start from."""
    workdir = train(tmp_path_factory.mktemp("runs") / "start", "sft", records, trainer="own", iterations=1)
    return str(workdir / "adapter")


VARIANTS = {
    "ranks and scales": ("dpo", {
        "lora__rslora": True, "lora__rank_pattern": (("mlp.down_proj", 3),), "lora__alpha_pattern": (("q_proj", 40.0),),
    }),
    "DoRA and epochs": ("sft", {"lora__dora": True, "optimizer__epochs": 2, "optimizer__weight_decay": 0.1}),
    "recomputation": ("dpo", {"model__remat": "full", "optimizer__clip_norm": 0.05, "dpo__loss": "ipo"}),
    "warm-up and chat": ("sft", {"warm_up__data": "train", "task__chat": True, "lora__targets": ("q_proj", "v_proj")}),
    "another start": ("dpo", {"model__adapter": "start", "optimizer__epochs": 2}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_options_mean_what_they_mean_to_us(variant, records, equally_long, start, tmp_path):
    algorithm, options = VARIANTS[variant]
    records = equally_long if algorithm == "sft" else records
    options |= {"model__adapter": start} if "model__adapter" in options else {}
    options |= {"warm_up__data": records["task__train"]} if "warm_up__data" in options else {}
    theirs = train(tmp_path / "trl", algorithm, records, **options)
    ours = train(tmp_path / "own", algorithm, records, **options, trainer="own")
    for name in ("loss", "grad_norm", "heldout_kl"):
        np.testing.assert_allclose(column(theirs, name), column(ours, name), atol=1e-5, rtol=1e-4, err_msg=name)
    assert ("reward_margin" in curve(theirs)[-1]) == (algorithm == "dpo" and "dpo__loss" not in options)
    assert_alike(theirs, ours)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "qwen3_moe"])
def test_the_model_is_ours(family, records, tmp_path):
    """Transposed weights and dropout of its own, modules of other names and windows, experts: on the way to TRL and back."""
    families.save(families.build(families.VARIANTS[family]), tmp_path / "model")
    (tmp_path / "rules.txt").write_text("Be kind.")
    given = {"model__path": str(tmp_path / "model"), "principles": str(tmp_path / "rules.txt"), "iterations": 1}
    theirs = train(tmp_path / "trl", "dpo", records, **given)
    ours = train(tmp_path / "own", "dpo", records, **given, trainer="own")
    for name in ("loss", "grad_norm", "heldout_kl"):
        np.testing.assert_allclose(column(theirs, name), column(ours, name), atol=1e-5, rtol=1e-4, err_msg=name)
    assert column(ours, "grad_norm")[0] > 0.1
    assert_alike(theirs, ours)
    if family == "gpt2":  # TRL pads prompts on the left and says nothing of positions
        with pytest.raises(UserError, match="positions that GPT-2 has learned"):
            train(tmp_path / "sampled", "grpo", records, **given)


ONLINE = {
    "grpo": {"algorithm": "grpo", "grpo__loss": "grpo", "grpo__beta": 0.5},
    "dr_grpo": {"algorithm": "grpo", "grpo__loss": "dr_grpo", "grpo__clip_low": 0.02, "grpo__clip_high": 0.3},
    "dapo": {"algorithm": "grpo", "grpo__beta": 0.2, "reward__transform": "zscore", "grpo__samples": 3},
    "rloo": {"algorithm": "rloo", "rloo__beta": 0.3, "rloo__clip": 0.1},
    "cool": {"algorithm": "grpo", "grpo__beta": 0.5, "sampling__temperature": 0.6},
    "hot": {"algorithm": "rloo", "rloo__beta": 0.3, "rloo__clip": 0.1, "sampling__temperature": 1.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONLINE)
def test_updates_on_what_trl_samples_are_ours(kind, records, start, tmp_path):
    """Our loop, given TRL's rollouts, ends where TRL does: rewards, advantages, bounds and KL are what they are to us."""
    options = ONE | ONLINE[kind] | {"optimizer__epochs": 3, "optimizer__lr": 0.02, "model__adapter": start}
    theirs = train(tmp_path / "trl", records=records, **options)
    ours = tmp_path / "own"
    shutil.copytree(theirs / "rollouts", ours / "rollouts")
    settings = files.read_json(theirs / "config.json") | {"trainer": "own"}
    files.write_json(ours / "config.json", settings, sealed=True)
    train(ours, records=records, **options, trainer="own")
    assert outcome(ours).keys() == outcome(theirs).keys()
    for name in ("loss", "grad_norm", "kl", "entropy", "heldout_kl"):
        np.testing.assert_allclose(column(theirs, name), column(ours, name), atol=2e-5, rtol=1e-3, err_msg=name)
    assert (column(theirs, "clipped") > 0.02).all()
    same = ("reward_plain", "score_plain", "length_plain", "margin", "training_tokens", "generated_tokens", "lr")
    for name in same:
        np.testing.assert_array_equal(column(theirs, name), column(ours, name), err_msg=name)
    assert_alike(theirs, ours, rel=1e-2)
    told = summary(theirs)
    assert {name: told[name] for name in COUNTERS} == {name: summary(ours)[name] for name in COUNTERS}
    rows = told["generated_tokens"] + told["prompt_tokens"]
    # sampled, three times forth and back, and compared with the policy that sampled and, but for dr_grpo, the reference
    assert told["flops"] == PARAMETERS * rows * (2 + 3 * 4 + 2 * (1 if kind == "dr_grpo" else 2))


# ---------------------------------------------------------------- what TRL samples


class Made(list):
    """Every trainer of TRL that was made, and the seed of torch's generator whenever one began to sample."""

    def __init__(self):
        self.seeds: list[int] = []


@contextlib.contextmanager
def watched():
    made, trainer, ids = Made(), baselines.trainer, baselines.Trl.prompt_ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "trainer", lambda *args: made.append(trainer(*args)) or made[-1])
        patch.setattr(baselines.Trl, "prompt_ids", lambda *args: made.seeds.append(torch.initial_seed()) or ids(*args))
        yield made


@pytest.mark.parametrize("algorithm", quick(["grpo", "rloo"], "grpo"))
def test_rollouts_are_what_trl_sampled_and_learns_from(algorithm, records, tmp_path):
    """Two optimiser steps of two passes each, an iteration."""
    options = {"sampling__temperature": 0.7, "sampling__top_p": 0.9, "sampling__min_p": 0.001, "sampling__top_k": 99}
    with watched() as made:
        workdir = train(tmp_path / "run", algorithm, records, **options, optimizer__epochs=2)
    lines = curve(workdir)
    queries = {query.id: query for query in load_queries(records["task__train"], needs="pair").queries}
    found = [read(workdir / "rollouts" / f"iter_{i:04d}.jsonl") for i in range(2)]
    for i, rollouts in enumerate(found):
        drawn = draw(list(queries.values()), 8, seed=0, iteration=i)
        assert [rollout.query_id for rollout in rollouts] == [query.id for query in drawn]
        for rollout in rollouts:
            assert bytes(rollout.prompt_tokens).decode() == rollout.prompt == queries[rollout.query_id].prompt
            assert [(r.kind, r.sample) for r in rollout.responses] == [("plain", j) for j in range(4)]
            assert len({r.tokens for r in rollout.responses}) > 1
            for r in rollout.responses:
                assert 0 < len(r.tokens) <= 8 and 256 not in r.tokens[:-1]
                assert r.finished == (r.tokens[-1] == 256) and (r.finished or len(r.tokens) == 8)
                assert r.text == bytes(t for t in r.tokens if t < 256).decode(errors="replace")
                assert r.reward == r.score == sum("a" <= letter <= "z" for letter in r.text) / max(len(r.text), 1)
        sampled = [r for rollout in rollouts for r in rollout.responses]
        assert lines[i + 1]["generated_tokens"] == sum(len(r.tokens) for r in sampled)
        assert lines[i + 1]["reward_plain"] == pytest.approx(np.mean([r.reward for r in sampled]))
    (trainer,) = made
    # of the last iteration: what reached TRL, and what it made of it
    logged = next(line for line in reversed(trainer.state.log_history) if "reward" in line)
    assert logged["reward"] == pytest.approx(lines[-1]["reward_plain"], rel=1e-6)
    assert list(trainer._logs["rewards"]["score"]) == pytest.approx([r.reward for r in sampled], rel=1e-6)
    if algorithm == "grpo":
        assert list(trainer._logs["advantages"]) == pytest.approx([r.weight for r in sampled], rel=1e-5, abs=1e-6)
    assert {rollout.decision for rollout in rollouts} <= {"compared", "dropped"}
    assert trainer.state.global_step == trainer.state.max_steps == 4
    wanted = {"temperature": 0.7, "top_p": 0.9, "min_p": 0.001, "top_k": 99, "max_new_tokens": 8, "eos_token_id": [256]}
    assert {name: getattr(trainer.generation_config, name) for name in wanted} == wanted
    assert total(x for name, x in load_file(workdir / WEIGHTS).items() if "lora_B" in name) > 0.1
    assert summary(workdir)["queries"] == 16 and summary(workdir)["reward_calls"] == 64
    assert summary(workdir)["prompt_tokens"] == 4 * sum(len(rollout.prompt_tokens) for some in found for rollout in some)
    # noise is an iteration's own, and its steps', whatever was drawn before
    assert len(set(made.seeds)) == 2


@pytest.mark.slow
def test_the_likeliest_tokens_are_those_of_our_sampler(records, tmp_path):
    """With top_k=1 nothing is left to chance."""
    found = []
    for name in ("trl", "own"):  # unchecked: the rules refuse what nothing can be learned from
        c = configured("grpo", **records, trainer=name, iterations=1, sampling__top_k=1)
        assert modes.train(FrozenConfigDict(c), tmp_path / name, "torch") == 0
        found.append(tmp_path / name / "rollouts" / "iter_0000.jsonl")
    journals.assert_the_same(*found, both_say=False)
    assert {len(rollout.responses) for rollout in read(found[0])} == {4}


def test_a_reward_that_is_not_finite_is_named(records, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def reward(prompts, responses):\n    return [float('nan') if p.startswith('train') else 1.0 for p in prompts]\n"
    )
    with pytest.raises(
        UserError, match=r"not finite for 32 responses, such as prompt 'train .*', response .*config.trainer"
    ):
        train(tmp_path / "run", "rloo", records, reward__name=f"{file}:reward", reward__kwargs={})
    assert not (tmp_path / "run" / "rollouts").exists()
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["0"]


@pytest.mark.slow
def test_what_was_quarantined_is_not_trained_on(records, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def reward(prompts, responses):\n    return [float('nan') if '7' in p else 1.0 for p in prompts]\n")
    options = {"reward__name": f"{file}:reward", "reward__kwargs": {}, "reward__max_bad_share": 0.9, "iterations": 1}
    queries = load_queries(records["task__train"], needs="pair").queries
    seed = next(s for s in range(99) if sum("7" in q.prompt for q in draw(queries, 8, seed=s, iteration=0)) == 1)
    with watched() as made:
        workdir = train(tmp_path / "run", "dpo", records, **options, seed=seed)
    assert len(read(workdir / "rollouts" / "iter_0000.jsonl")) == made[0].train_dataset.num_rows == 7
    assert made[0].state.max_steps == 2 and summary(workdir)["queries"] == 8  # all of them were scored
    first, second = (line["loss"] for line in made[0].state.log_history if "loss" in line)
    logged = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert logged["loss"] == pytest.approx((4 * first + 3 * second) / 7, rel=1e-9) and first != second


def test_a_loss_that_is_not_finite_stops_the_run(records, tmp_path, monkeypatch):
    """From the second step, number 1, on; a learning rate that brings it about on one processor does not on another."""
    import trl

    real = trl.SFTTrainer.compute_loss

    def broken(self, *args, **kwargs):
        found, factor = real(self, *args, **kwargs), math.nan if self.state.global_step else 1.0
        return (found[0] * factor, *found[1:]) if isinstance(found, tuple) else found * factor

    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", broken)
    with pytest.raises(UserError, match=r"optimiser step 1 at learning rate \S+ gave loss nan"):
        train(tmp_path / "run", "sft", records)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["0"]


# ---------------------------------------------------------------- stopped, killed and continued


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("dpo", {"optimizer__epochs": 2, "optimizer__warmup_steps": 7, "lora__dora": True}),
        ("sft", {"lora__dropout": 0.3, "optimizer__micro_queries": 4}),
        ("grpo", {"grpo__beta": 0.1, "model__adapter": "start"}),
        ("rloo", {}),
    ],
)
def test_a_run_that_was_stopped_goes_on(algorithm, options, records, start, tmp_path, monkeypatch):
    """After the first step of the second iteration; not a bit differs from a run that was not stopped."""
    options = options | ({"model__adapter": start} if "model__adapter" in options else {})
    whole, cut = train(tmp_path / "whole", algorithm, records, **options), tmp_path / "cut"
    log, stopped = baselines.Watch.on_log, []

    def stopping(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.trl.state.iteration == 1 and not stopped:
            stopped.append(self.trl.state.step)
            self.trl.run.session.stop._number = signal.SIGTERM

    monkeypatch.setattr(baselines.Watch, "on_log", stopping)
    with pytest.raises(Interrupted):
        train(cut, algorithm, records, **options)
    assert stopped == [2 * options.get("optimizer__epochs", 1) + 1]
    assert sorted(p.name for p in (cut / "checkpoints").iterdir()) == ["0", "1"]
    train(cut, algorithm, records, **options)
    assert outcome(cut) == outcome(whole) and curve(cut) == curve(whole)
    steps = 4 * options.get("optimizer__epochs", 1)
    meta = json.loads((cut / "checkpoints" / "2" / "meta.json").read_text())
    assert meta["step"] == meta["optimizer_steps"] == steps
    lr = [1e-2 * min(1, (step + 1) / options.get("optimizer__warmup_steps", 2)) for step in range(steps)]
    np.testing.assert_allclose(column(cut, "lr"), lr[steps // 2 - 1 :: steps // 2], rtol=1e-9)


@pytest.mark.slow
def test_killed_and_continued_by_the_command(records, tmp_path, monkeypatch):
    """`kill -9`, where neither JAX nor a warning is wanted; the work directory is that of our own loop."""
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in records.items()]
    flags += ["--config.algorithm=grpo", "--config.trainer=trl", "--config.iterations=2", "--config.checkpoint.use=newest"]
    monkeypatch.setattr(test_torch_run.test_resume, "command", functools.partial(command, flags))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = test_torch_run.run(whole)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert "[1/2] generate: 1/1 in" in result.stdout and "[2/2] update: 2/2 in" in result.stdout
    killed = test_torch_run.run(cut, at=("transformers.trainer:Trainer.training_step", 6, "before"))
    assert killed.returncode == -signal.SIGKILL and not (cut / WEIGHTS).exists()
    result = test_torch_run.run(cut)
    assert result.returncode == 0, result.stderr
    assert outcome(cut) == outcome(whole) and curve(cut) == curve(whole)
    own = {
        "adapter", "best", "checkpoints", "config.json", "environment.json", "evaluations", "metrics.jsonl", "report.html",
        "rewards.sqlite", "rollouts", "summary.json", "tensorboard", ".lock",
    }  # fmt: skip
    assert {p.name for p in whole.iterdir()} == own


def command(flags: list[str], workdir: Path, *extra: str) -> list[str]:
    root = Path(modes.__file__).parents[1]
    return ["--config", str(root / "configs" / "tiny.py"), "--workdir", str(workdir), *extra, *flags]


@pytest.mark.slow
def test_other_modes_on_such_a_run(records, tmp_path, capsys):
    workdir = train(tmp_path / "run", "sft", records)
    capsys.readouterr()
    assert modes.train(config("sft", records), workdir, "torch") == 0
    assert "is finished: held-out reward" in capsys.readouterr().out
    assert modes.evaluate(config("sft", records), workdir, "torch") == 0
    assert f"iteration 2: held-out reward {summary(workdir)['heldout_reward_after']:.4f}" in capsys.readouterr().out
    with pytest.raises(UserError, match="differing in trainer"):
        modes.train(config("sft", records, trainer="own"), workdir, "torch")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("algorithm", "options", "said"),
    [
        ("ple", {}, "'ple': that is this project's own"),
        ("raft", {}, "'raft': that is this project's own"),
        ("dpo", {"dpo__samples": 4}, "dpo.samples=4"),
        ("dpo", {"dpo__label_smoothing": 0.1}, "dpo.label_smoothing=0.1"),
        ("dpo", {"lora__dropout": 0.1}, "lora.dropout=0.1"),
        ("grpo", {"lora__dropout": 0.1}, "lora.dropout=0.1"),
        ("rloo", {"sampling__temperature": 0.0}, "sampling.temperature=0"),
        ("sft", {"model__quantize": "nf4"}, "model.quantize=nf4"),
        ("grpo", {"sampling__server": "http://localhost:1"}, "sampling.server"),
        ("sft", {"mesh__data": 2}, "config.mesh"),
        ("grpo", {"sampling__importance_cap": 2.0}, "sampling.importance_cap=2, as TRL has it for vLLM alone"),
    ],
)
def test_what_trl_has_not_is_refused_before_anything_is_read(algorithm, options, said, tmp_path):
    c = FrozenConfigDict(configured(algorithm, trainer="trl", task__train="nowhere.jsonl", **options))
    with pytest.raises(UserError, match=said) as refused:
        modes.train(c, tmp_path / "run", "torch")
    assert len(str(refused.value).splitlines()) == 1 and "trainer" in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_what_trl_has_is_not_refused():
    for algorithm, options in {
        "sft": {"lora__dropout": 0.1, "sampling__temperature": 0.0, "dpo__samples": 4},
        "dpo": {"dpo__loss": "ipo", "dpo__label_smoothing": 0.1, "sampling__temperature": 0.0},
        "grpo": {"dpo__label_smoothing": 0.1},
        "rloo": {"dpo__samples": 4},
    }.items():
        baselines.check(FrozenConfigDict(configured(algorithm, trainer="trl", **options)))


def test_another_trl_is_refused(monkeypatch):
    c, find = FrozenConfigDict(configured("sft", trainer="trl")), importlib.util.find_spec
    monkeypatch.setattr(baselines, "version", lambda name: "1.17.0")
    with pytest.raises(UserError, match=r"needs TRL 1.16, not 1.17.0; pip install 'ple_jax\[trl\]'"):
        baselines.check(c)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(UserError, match=r"needs peft, which is not installed: pip install 'ple_jax\[trl\]'"):
        baselines.check(c)


def test_a_tokenizer_without_an_eos_is_refused(records, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.eos_token_id", None, raising=False)
    with pytest.raises(UserError, match="tiny's has none"):
        train(tmp_path / "run", "sft", records)


def test_answers_have_the_templates_end_of_turn(tmp_path, monkeypatch):
    """What TRL gets are the chat template's tokens of the whole conversation, whatever is sampled."""
    chats.speak(  # <|pad|> ends a turn
        monkeypatch,
        "{% for m in messages %}{{ '[' + m.role + ']' + m.content + pad_token + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    )
    pairs = [{"prompt": [{"role": "user", "content": f"q{i}"}], "rejected": [{"role": "assistant", "content": "n" * 20}],
              "chosen": [{"role": "assistant", "content": f"yes {i}"}]} for i in range(4)]  # fmt: skip
    files = {"task__train": tmp_path / "train.jsonl", "task__heldout": tmp_path / "heldout.jsonl"}
    for file, lines in zip(files.values(), (pairs, [{"prompt": [{"role": "user", "content": "h"}]}]), strict=True):
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = []
    with watched() as made:
        options = ONE | {"task__chat": True, "iterations": 1, "task__max_answer_tokens": 64}
        workdir = train(tmp_path / "run", "dpo", {key: str(file) for key, file in files.items()}, **options)
        rows += list(made[0].train_dataset)
    for row, rollout in zip(rows, read(workdir / "rollouts" / "iter_0000.jsonl"), strict=True):
        i = rollout.query_id.rpartition(":")[2]
        asked = rollout.prompt.messages[-1]["content"]
        assert bytes(t for t in row["prompt_ids"] if t < 256).decode() == f"[user]{asked}\n[assistant]", i
        assert row["chosen_ids"] == [*f"yes {asked[1:]}".encode(), 257]
        assert row["rejected_ids"] == [*b"n" * 20, 257]
