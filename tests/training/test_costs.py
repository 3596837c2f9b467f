"""What a run says that it cost, against its own files."""

import json
from pathlib import Path

import pytest
from ml_collections import FrozenConfigDict
from test_baselines import config

from ple_jax import modes
from ple_jax.models.weights import load
from ple_jax.prompts import principles
from ple_jax.training import costs
from ple_jax.training.journal import read

# of the tiny model, whose tokens are the bytes of a text: two layers' matmuls, and the head
PARAMETERS = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 258 * 32


@pytest.fixture(scope="module", params=["ple", "grpo"])
def finished(request, tmp_path_factory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp(request.param)
    c = config(request.param, iterations=2, grpo__samples=3, grpo__beta=0.1)
    c.optimizer.epochs = 2
    assert modes.train(FrozenConfigDict(c), path, "torch") == 0
    return request.param, path


def test_counters_are_those_of_the_files(finished):
    algorithm, path = finished
    said = json.loads((path / "summary.json").read_text())
    rollouts = [rollout for i in range(2) for rollout in read(path / "rollouts" / f"iter_{i:04d}.jsonl")]
    responses = [r for rollout in rollouts for r in rollout.responses]
    kinds = {"ple": 2, "grpo": 3}[algorithm]
    assert len(rollouts) == 16 and len(responses) == 16 * kinds
    generated = sum(len(r.tokens) for r in responses)
    prompts = kinds * sum(len(rollout.prompt.encode()) for rollout in rollouts)
    # the principles and what joins them to a query stand before it, of one response in two
    loaded = load("tiny")
    text = principles.load("positive_review").text
    guided = len(loaded.tokenizer.encode(text, add_special_tokens=False))
    assert said["queries"] == 16 and said["reward_calls"] == 16 * kinds
    assert said["generated_tokens"] == generated and said["prompt_tokens"] == prompts
    if algorithm == "ple":
        assert 16 * guided <= said["principle_tokens"] <= 16 * (guided + 4)
    else:
        assert said["principle_tokens"] == 0
    # two passes over every prompt once and all its responses
    trained = 2 * (sum(len(rollout.prompt.encode()) for rollout in rollouts) + generated)
    assert said["training_tokens"] == trained
    compared = {"ple": 0, "grpo": 2}[algorithm] * trained / 2  # of the reference and of the policy before
    forward = generated + prompts + said["principle_tokens"] + compared + 2 * trained
    assert said["flops"] == 2 * PARAMETERS * forward


def test_curves_have_what_they_are_drawn_against(finished):
    _, path = finished
    said = json.loads((path / "summary.json").read_text())
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for name in ("queries", "generated_tokens", "training_tokens", "reward_calls"):
        totals = [line[f"total_{name}"] for line in lines]
        assert totals[0] == 0 < totals[1] < totals[2] == said[name]
    seconds = [line["total_seconds"] for line in lines]
    assert seconds[0] == 0 < seconds[1] < seconds[2]
    spent = said["seconds"]
    assert set(spent) == {"generate", "score", "prepare", "update", "evaluate"} and all(s > 0 for s in spent.values())
    assert seconds[2] == pytest.approx(sum(spent.values()) - spent["evaluate"])
    assert sum(spent.values()) < said["wall_seconds"]


def test_costs_are_added_up_and_never_written_into():
    before = costs.Costs()
    after = before.plus(queries=2, flops=10).plus(flops=5).took("update", 1.5).took("evaluate", 4.0).took("update", 0.5)
    assert (after.queries, after.flops, after.seconds["update"], after.seconds["evaluate"]) == (2, 15, 2.0, 4.0)
    assert before == costs.Costs() and not any(before.seconds.values())
    assert after.totals()["total_seconds"] == 2.0 and after.totals()["total_flops"] == 15


def test_what_was_quarantined_was_paid_for_too(tmp_path):
    """Its tokens and reward calls count, though nothing is learned from it."""
    file = tmp_path / "mine.py"
    file.write_text("def some(prompts, responses):\n    return [float('nan') if 'a' in p else 1.0 for p in prompts]\n")
    c = config("raft", iterations=1, reward__name=f"{file}:some", reward__max_bad_share=1.0)
    c.reward.kwargs = {}
    assert modes.train(FrozenConfigDict(c), tmp_path / "run", "torch") == 0
    said = json.loads((tmp_path / "run" / "summary.json").read_text())
    kept = read(tmp_path / "run" / "rollouts" / "iter_0000.jsonl")
    left = read(tmp_path / "run" / "quarantine" / "iter_0000.jsonl")
    assert kept and left and len(kept) + len(left) == 8
    responses = [r for rollout in (*kept, *left) for r in rollout.responses]
    assert (said["queries"], said["reward_calls"]) == (8, 8 * 4)
    assert said["generated_tokens"] == sum(len(r.tokens) for r in responses)


def test_a_warm_up_takes_time(tmp_path):
    file = tmp_path / "sft.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}: ", "completion": " yes"}) + "\n" for i in range(4)))
    c = config("ple", iterations=1)
    c.warm_up.data = str(file)
    assert modes.train(FrozenConfigDict(c), tmp_path / "run", "torch") == 0
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["total_training_tokens"] == sum(len(f"{i}: ") + len(" yes") + 1 for i in range(4))
    assert first["total_seconds"] > 0 and first["total_flops"] == 4 * PARAMETERS * first["total_training_tokens"]
