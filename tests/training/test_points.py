"""Evaluations as points: their KL, which is the best under a budget, when a run stops, and who takes the best."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from configs import tiny as tiny_config
from ple_jax import modes, rewards
from ple_jax.core import commits
from ple_jax.core.batches import pack
from ple_jax.core.config import validate
from ple_jax.core.errors import UserError
from ple_jax.models import peft
from ple_jax.training import loop, measures, outcome, points
from ple_jax.training.journal import read
from ple_jax.training.points import Point
from ple_jax.training.run import Clock
from ple_jax.training.state import State


def config_of(**overrides):
    config = tiny_config.get_config()
    config.update_from_flattened_dict({"sinks": (), "generate.samples": 1, **overrides})
    validate(config)
    return FrozenConfigDict(config)


def train(workdir: Path, backend: str = "torch", **overrides) -> dict:
    assert modes.train(config_of(**overrides), workdir, backend) == 0
    return json.loads((workdir / "summary.json").read_text())


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def at(iteration: int, reward: float, kl: float, second: float | None = None) -> Point:
    return Point(iteration, 2 * iteration, False, reward, second, kl, kl, kl, kl / 8, 8.0, 0.0, 1.0, 0.0, 1, 1, 1.0)


def state_of(*found: Point) -> State:
    return State(iteration=found[-1].iteration, step=found[-1].step, points=tuple(p._asdict() for p in found))


# ---------------------------------------------------------------- rules


def test_the_best_is_the_highest_within_the_budget():
    found = [at(0, 0.0, 0.0, 0.5), at(1, 0.4, 2.0, 0.9), at(2, 0.4, 3.0, 0.1), at(3, 0.7, 9.0), at(4, math.nan, 1.0)]
    assert points.best(found, "reward", math.inf).iteration == 3
    assert points.best(found, "reward", 9.0).iteration == 3  # a budget may be spent whole
    assert points.best(found, "reward", 8.0).iteration == 1  # of equal ones the first
    assert points.best(found, "reward", 1.5).iteration == 0
    assert points.best(found, "second", math.inf).iteration == 1  # one without a second reward is none
    assert points.best(found[3:], "reward", 1.0) is None


def test_a_folder_for_every_budget():
    assert points.budgets(config_of()) == {"any": math.inf}
    assert points.budgets(config_of(**{"eval.max_kl": (8, 2.5)})) == {"kl_2.5": 2.5, "kl_8": 8.0}
    assert points.budgets(config_of(**{"eval.best": "none"})) == {}


def test_a_run_stops_where_its_largest_budget_is_spent():
    config = config_of(**{"eval.max_kl": (2, 4)})
    assert not points.stopped(config, state_of(at(0, 0.0, 0.0), at(1, 1.0, 4.0)))
    why = points.stopped(config, state_of(at(0, 0.0, 0.0), at(1, 1.0, 4.1)))
    assert why.startswith("its budget is spent: 4.1 nats a response from the start at iteration 1, of 4 (longer")
    assert not points.stopped(config, state_of(at(0, 0.0, 0.0), at(3, 1.0, 9.0)))  # it has ended by itself
    on = config_of(**{"eval.max_kl": (2, 4), "eval.stop": False})  # the best within each are kept all the same
    assert not points.stopped(on, state_of(at(0, 0.0, 0.0), at(1, 1.0, 4.1)))
    assert points.ended(config, state_of(at(3, 1.0, 9.0)))


def test_a_run_stops_where_nothing_gets_better():
    config, found = config_of(**{"eval.patience": 2, "iterations": 9}), [at(0, 0.0, 0.0), at(1, 0.5, 1.0), at(2, 0.4, 1.0)]
    assert not points.stopped(config, state_of(*found))
    why = points.stopped(config, state_of(*found, at(3, 0.5, 1.0)))
    assert why == "no evaluation was better than that of iteration 1 for 2"
    assert not points.stopped(config, state_of(*found, at(3, 0.6, 1.0)))
    # what is out of budget is not better
    both = config_of(**{"eval.patience": 2, "iterations": 9, "eval.max_kl": (10,)})
    assert not points.stopped(both, state_of(*found))
    assert points.stopped(both, state_of(*found, at(3, 0.5, 1.0)))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"eval.max_kl": (4,), "eval.best": "none"}, r"max_kl is \(4,\), and config.eval.best 'none' keeps no best"),
        ({"eval.patience": 3, "eval.best": "none"}, "config.eval.patience is 3, and config.eval.best 'none'"),
        ({"eval.best": "second"}, "config.eval.second_reward names none"),
        ({"eval.max_kl": (0,)}, "config.eval.max_kl is"),
        ({"checkpoint.use": "kl_4"}, "keeps no such: choose best, newest$"),
        ({"checkpoint.use": "kl_4", "eval.max_kl": (4.5, 2)}, "choose best, newest, kl_4.5, kl_2$"),
        ({"checkpoint.use": "last"}, "config.checkpoint.use is 'last' but must be best, newest, or kl_"),
        ({"eval.second_kwargs": {"a": 1}}, "not read without config.eval.second_reward"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, says):
    with pytest.raises(UserError, match=says):
        config_of(**overrides)


def test_what_a_killed_process_kept_of_later_steps_is_forgotten(tmp_path):
    class Session:
        workdir = tmp_path

    for name, step in (("kl_2", 4), ("kl_8", 6)):
        (tmp_path / "best" / name / str(step)).mkdir(parents=True)
    points.forget_later(Session, State(step=4))
    assert {name: commits.steps(tmp_path / "best" / name) for name in ("kl_2", "kl_8")} == {"kl_2": [4], "kl_8": []}
    points.forget_later(Session, None)  # a run from the start has no best yet
    assert not (tmp_path / "best").exists()


# ---------------------------------------------------------------- a run


BUDGETED = {"eval.max_kl": (0.05, 1e3), "eval.samples": 3, "eval.second_reward": "length"}


@pytest.fixture(scope="module")
def budgeted(tmp_path_factory):
    """A run that is soon out of one budget and never of the other."""
    workdir = tmp_path_factory.mktemp("budgeted")
    return workdir, train(workdir, **BUDGETED)


def test_every_evaluation_is_a_point_with_the_kl_of_all_its_responses(budgeted):
    workdir, summary = budgeted
    found = lines(workdir)
    assert found[0]["heldout_kl_response"] == 0
    for line in found[1:]:
        assert line["heldout_kl_response_low"] < line["heldout_kl_response"] < line["heldout_kl_response_high"]
        rollouts = read(workdir / "evaluations" / f"iter_{line['iteration']:04d}.jsonl")
        said = [r for rollout in rollouts for r in rollout.responses]
        tokens = [len(r.tokens) for r in said]
        assert line["heldout_kl"] == pytest.approx(line["heldout_kl_response"] * len(said) / sum(tokens))
        assert line["heldout_truncated"] == np.mean([not r.finished for r in said])
        assert line["heldout_length"] == np.mean(tokens)
        assert line["heldout_second"] != line["heldout_reward"]
    assert summary["iterations"] == 3 and summary["stopped"] is None


def test_every_evaluation_draws_with_the_same_noise(budgeted):
    workdir, _ = budgeted
    answered = [read(workdir / "evaluations" / f"iter_{i:04d}.jsonl") for i in range(4)]
    noise = [[r.noise for rollout in rollouts for r in rollout.responses if r.own] for rollouts in answered]
    assert noise[0] == noise[1] == noise[2] == noise[3]
    assert len(set(noise[0])) == len(noise[0]) > 1


def test_the_first_evaluation_keeps_the_kinds_apart(budgeted):
    workdir, _ = budgeted
    first, rollouts = lines(workdir)[0], read(workdir / "evaluations" / "iter_0000.jsonl")
    kinds = {how: [r for rollout in rollouts for r in rollout.responses if r.principled is how] for how in (False, True)}
    means = {how: np.mean([r.reward for r in some]) for how, some in kinds.items()}
    assert first["heldout_reward"] == pytest.approx(means[False]) != pytest.approx(means[True])
    assert first["heldout_reward_principled"] == pytest.approx(means[True])
    prompts = [x.prompt for x in rollouts for _ in range(3)]
    said = rewards.score(rewards.load("length", {}), prompts, [r.text for r in kinds[False]]).values
    assert first["heldout_second"] == pytest.approx(said.mean())


def test_kl_is_what_it_is_said_to_be(budgeted):
    """To the base, where the adapter began as nothing, of the trainer's log-probabilities, in float64."""
    workdir, _ = budgeted
    config = config_of(**BUDGETED, **{"checkpoint.use": "newest"})
    with modes.on_run(config, workdir, "torch") as (run, state):
        rollouts = read(workdir / "evaluations" / f"iter_{state.iteration:04d}.jsonl")
        ours, logprob = points.divergences(run, rollouts)
        batch = pack(rollouts, [range(3)] * len(rollouts), prompt_multiple=16, response_len=8)
        policy, base = (run.backend.logprobs(batch, base=base).logprobs.astype(np.float64) for base in (False, True))
        ratio = np.where(batch.response_mask, np.exp(base - policy), 1.0)
        theirs = (ratio - 1 - np.log(ratio)).sum(-1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(logprob, np.where(batch.response_mask, base, 0.0).sum(-1), rtol=1e-4)
    tokens = batch.response_mask.sum()
    assert lines(workdir)[-1]["heldout_perplexity"] == pytest.approx(np.exp(-logprob.sum() / tokens), rel=1e-4)
    assert lines(workdir)[-1]["heldout_kl_response"] == pytest.approx(ours.mean())
    low, high = measures.intervals.bootstrap_ci(ours.mean(1), seed=0)  # queries are drawn, not responses
    assert [lines(workdir)[-1][f"heldout_kl_response_{end}"] for end in ("low", "high")] == pytest.approx([low, high])


def test_every_evaluation_is_a_point_of_the_summary(budgeted):
    workdir, summary = budgeted
    found = lines(workdir)
    assert [p["iteration"] for p in summary["points"]] == [0, 1, 2, 3] and not any(p["within"] for p in summary["points"])
    for line, point in zip(found, summary["points"], strict=True):
        assert (point["kl"], point["kl_token"]) == (line["heldout_kl_response"], line["heldout_kl"])
        for name in ("reward", "second", "perplexity", "overlap", "distinct_2"):
            assert point[name] == line[f"heldout_{name}"]
        assert point["generated_tokens"] == line["total_generated_tokens"]
    # of the gain, what length alone would give, by hand
    best = summary["best"]["kl_1000"]
    plain = [
        [r for rollout in read(workdir / file) for r in rollout.responses if not r.principled]
        for file in ("evaluations/iter_0000.jsonl", best["responses"])
    ]
    rewards = [np.array([r.reward for r in some]) for some in plain]
    lengths = [np.array([len(r.tokens) for r in some]) for some in plain]
    above = sum(((x - x.mean()) * (y - y.mean())).sum() for x, y in zip(lengths, rewards, strict=True))
    below = sum(((x - x.mean()) ** 2).sum() for x in lengths)
    expected = above / below * (lengths[1].mean() - lengths[0].mean()) if below else 0.0
    assert best["gain_by_length"] == pytest.approx(expected, abs=1e-12)


def test_a_state_of_before_a_point_had_a_measure_is_read():
    kept = at(1, 0.5, 2.0)._asdict()
    del kept["perplexity"], kept["overlap"]
    (found,) = points.of(State(points=(kept,)))
    assert found.kl == 2.0 and math.isnan(found.perplexity) and math.isnan(found.overlap)


def test_trackers_are_shown_the_first_responses_of_every_evaluation(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(measures, "show_samples", lambda sinks, rows, step: shown.append((step, rows)))
    train(tmp_path, **{"iterations": 2})
    assert [step for step, _ in shown] == [0, 1, 2]
    for step, rows in shown:
        rollouts = read(tmp_path / "evaluations" / f"iter_{step:04d}.jsonl")[:8]
        assert [row["query"] for row in rows] == [rollout.query_id for rollout in rollouts]
        for row, rollout in zip(rows, rollouts, strict=True):
            first = rollout.responses[0]
            assert not first.principled and (row["prompt"], row["response"]) == (rollout.prompt, first.text)
            assert row["reward"] == first.reward and row["finished"] == first.finished


def test_the_best_under_each_budget_is_kept_and_taken(budgeted, capsys):
    workdir, summary = budgeted
    found, best = lines(workdir), summary["best"]
    assert list(best) == ["kl_0.05", "kl_1000"] and best["kl_0.05"]["iteration"] == 0  # nothing else was so near
    top = max(found, key=lambda line: line["heldout_reward"])
    assert best["kl_1000"]["iteration"] == top["iteration"] and best["kl_1000"]["reward"] == top["heldout_reward"]
    assert best["kl_1000"]["kl"] == top["heldout_kl_response"] and best["kl_1000"]["second"] == top["heldout_second"]
    adapters = {}
    for use in ("best", "newest", "kl_0.05", "kl_1000"):
        assert modes.export(config_of(**BUDGETED, **{"checkpoint.use": use}), workdir, "torch") == 0
        adapters[use] = peft.read(workdir / "adapter")[0]
    said = capsys.readouterr().out
    best_of_all = f"the best evaluated within 1000 nats: reward {top['heldout_reward']:.3f}"
    assert f"adapter of iteration {top['iteration']}, {best_of_all}" in said
    assert "adapter of iteration 3: " in said and "adapter of iteration 0, the best evaluated within 0.05 nats: " in said

    def same(a, b):
        return all((adapters[a][name] == adapters[b][name]).all() for name in adapters[a])

    assert same("best", "kl_1000") and not same("best", "kl_0.05")
    assert same("best", "newest") == (top["iteration"] == 3)
    assert modes.evaluate(config_of(**BUDGETED), workdir, "torch") == 0
    assert f"held-out reward {top['heldout_reward']:.4f}" in capsys.readouterr().out
    assert modes.generate(config_of(**BUDGETED), workdir, "torch") == 0
    assert (workdir / "responses" / "trained" / f"iter_{top['iteration']:04d}.scores.jsonl").exists()
    settings = json.loads((workdir / "responses" / "trained" / f"iter_{top['iteration']:04d}.json").read_text())
    assert settings["second_reward"] == "length"  # of the evaluations, where generate names none


def test_a_run_whose_best_evaluation_was_removed_ends_nevertheless(tmp_path, capsys, monkeypatch):
    """As the error about a damaged one advises; what only its file says is left out."""
    monkeypatch.setattr(points, "best", lambda found, by, budget: found[min(1, len(found) - 1)])
    stop = {"n": 0}
    real = loop.learn_from_samples

    def learn(run, state, context):
        stop["n"] += 1
        if stop["n"] == 3:
            raise KeyboardInterrupt
        return real(run, state, context)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "learn_from_samples", learn)
        train(tmp_path, iterations=3)
    (tmp_path / "evaluations" / "iter_0001.jsonl").unlink()
    summary = train(tmp_path, iterations=3)
    best = summary["best"]["any"]
    assert best["iteration"] == 1 and "gain_ci95" not in best and "responses" not in best
    said = capsys.readouterr().out
    assert "held-out reward" in said and "95% interval of the gain" not in said.rpartition("held-out reward")[2]
    assert f"→ {best['reward']:.3f}" in (tmp_path / "report.html").read_text()
    # the checkpoint is damaged too: the error says what its removal means, and then what was taken is said
    (kept,) = (tmp_path / "best" / "any").iterdir()
    file = next(path for path in kept.rglob("*") if path.is_file() and path.stat().st_size > 1000)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="remove that folder to take the newest checkpoint in its place"):
        modes.export(config_of(iterations=3), tmp_path, "torch")
    shutil.rmtree(kept)
    capsys.readouterr()
    assert modes.export(config_of(iterations=3), tmp_path, "torch") == 0
    said = capsys.readouterr().out
    assert "the checkpoint of the best evaluation, iteration 1, is gone: this is that of iteration 3" in said


def test_a_checkpoint_is_called_the_best_only_if_it_is():
    """The newest one is taken where none is kept: with eval.best=none, or where none was within the budget."""
    first, second = at(1, 0.75, 2.0), at(2, 0.5, 2.0)
    state = state_of(first, second)
    for overrides in ({"eval.best": "none"}, {"eval.max_kl": (1.0,)}, {}):
        assert points.told(config_of(**overrides), state) == "iteration 2: reward 0.500, 2 nats a response from the start"
    assert points.told(config_of(), state._replace(step=first.step)).startswith("iteration 1, the best evaluated: ")
    newest = config_of(**{"checkpoint.use": "newest"})
    assert points.told(newest, state) == "iteration 2: reward 0.500, 2 nats a response from the start"
    start = points.told(config_of(), state_of(at(0, 0.9, 0.0)))
    assert start.endswith("; that is the start, and --config.checkpoint.use=newest takes the last one")


def test_a_spent_budget_ends_the_run_and_so_does_the_same_command(tmp_path, capsys):
    overrides = {"eval.max_kl": (1e-6,), "optimizer.lr": 0.1}
    summary = train(tmp_path, **overrides)
    assert summary["iterations"] == 1 and summary["stopped"].startswith("its budget is spent: ")
    assert summary["best"]["kl_1e-06"]["iteration"] == 0 and summary["best"]["kl_1e-06"]["gain_ci95"] == [0, 0]
    said = capsys.readouterr().out
    assert "stopped after 1 of 3 iterations: its budget is spent" in said
    assert "of iteration 0, the best evaluated within 1e-06 nats: reward" in said
    zero = peft.read(tmp_path / "adapter")[0]
    assert not any(tensor.any() for name, tensor in zero.items() if "lora_B" in name)  # that of the start
    assert "Stopped after 1 iterations" in (tmp_path / "report.html").read_text()
    train(tmp_path, **overrides)
    assert "is finished (stopped early: its budget is spent: " in capsys.readouterr().out


@pytest.mark.parametrize("key", ["principles", "heldout"])
def test_other_content_of_principles_or_heldout_is_another_run(key, tmp_path):
    file = tmp_path / ("p.txt" if key == "principles" else "h.jsonl")
    first, other = {
        "principles": ("Be kind.\n", "Be rude.\n"), "heldout": ('{"prompt": "a"}\n', '{"prompt": "b"}\n')
    }[key]  # fmt: skip
    how = {"iterations": 1, "principles" if key == "principles" else "task.heldout": str(file)}
    file.write_text(first)
    train(tmp_path / "run", **how)
    file.write_text(other)
    with pytest.raises(UserError, match=rf"inputs\.{key}"):
        train(tmp_path / "run", **how)


def test_of_an_algorithm_of_ones_own_all_measures_are_said():
    """Of one that samples nothing, and measures what it likes."""
    assert outcome.reached({"heldout_auc": 0.75, "heldout_pairs": 3, "steps": 2}) == "held-out auc 0.75, pairs 3"
    assert outcome.reached({"heldout_accuracy": 0.5, "steps": 2}) == "held-out accuracy 0.5"
    assert outcome.reached({"steps": 2}) == "trained"


def test_what_was_the_best_before_an_iteration_stays_until_it_is_finished(tmp_path):
    """A process may be stopped in it, and go on another way: then the weights of the best evaluation are still there."""
    class Backend:
        def save(self, folder, step, meta, *, keep):
            (folder / str(step)).mkdir(parents=True)
            commits.prune(folder, keep=keep)

    class Stand:
        config, backend = config_of(), Backend()
        session = Session = type("Session", (), {"workdir": tmp_path, "clock": Clock(), "keep": 1})()

    kept, state = tmp_path / "best" / "any", state_of(at(1, 0.3, 1.0))
    state = points.noted(Stand, state._replace(points=()), at(1, 0.3, 1.0))
    for step, reward in ((3, 0.4), (5, 0.5)):
        new = at(1, reward, 1.0)._replace(step=step, within=True)
        state = points.noted(Stand, state._replace(step=step), new)
    assert commits.steps(kept) == [2, 3, 5]
    state = points.noted(Stand, state._replace(iteration=2, step=6), at(2, 0.1, 1.0)._replace(step=6))
    assert commits.steps(kept) == [5]


def test_the_end_of_a_run_says_what_its_best_hides():
    best = {**at(1, 0.5, 2.0)._asdict(), "gain_ci95": [0.1, 0.9], "distinct_2": 0.4}
    summary = {"heldout_reward_before": 0.0, "heldout_reward_after": 0.8, "heldout_gain_ci95": [0.2, 1.0],
               "points": [at(0, 0.0, 0.0)._asdict(), best, at(2, 0.8, 9.0)._asdict()], "best": {"kl_4": best}}  # fmt: skip
    said = outcome.reached(summary)
    assert said.endswith("2.0 nats a response from the start (the last evaluation: 0.800, 9.0 nats)")
    assert "0.000 -> 0.500" in said and "last evaluation" not in outcome.reached(summary | {"points": summary["points"][:2]})
    start = {**at(0, 0.0, 0.0)._asdict(), "gain_ci95": [0.0, 0.0]}
    by_second = summary | {"best": {"kl_20": start}, "best_by": "second"}
    assert "no evaluation within 20 nats was better by the second reward (the last one:" in outcome.reached(by_second)
    assert outcome.reached(summary | {"best": {"any": start}}) == (
        "held-out reward 0.000, that of the start: no evaluation was better (the last one: 0.800, 9.0 nats a response from"
        " the start)"
    )
    (warning,) = outcome.collapsed(summary)
    assert "fell from 1.00 to 0.40: they repeat one another" in warning
    assert not list(outcome.collapsed(summary | {"best": {}})) and not list(outcome.collapsed({}))


def test_responses_that_were_cut_off_are_said_at_the_end(tmp_path, capsys):
    """Of what the run has reached, in a chat: there an answer has an end."""
    cut, whole = (at(1, 0.5, 2.0)._replace(truncated=share)._asdict() for share in (0.51, 0.5))
    summary = {"points": [whole, cut], "best": {"kl_4": cut}}
    chat = config_of(**{"task.chat": True})
    assert list(outcome.cut_off(summary, chat)) == [
        "warning: 51% of the held-out responses were cut off at config.sampling.max_new_tokens=8: raise it"
    ]
    assert len(list(outcome.cut_off(summary | {"best": {}}, chat))) == 1
    assert not list(outcome.cut_off(summary, config_of()))
    assert not list(outcome.cut_off({"points": [cut, whole]}, chat)) and not list(outcome.cut_off({}, chat))
    train(tmp_path, iterations=1, **{"task.chat": True, "sampling.max_new_tokens": 1})
    assert "were cut off at config.sampling.max_new_tokens=1: raise it\n" in capsys.readouterr().out


def test_several_points_an_iteration_change_nothing_of_the_training(tmp_path):
    """One after each of two steps; they are of other weights than those at the end, and may be the best."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(whole, iterations=2)
    summary = train(parted, iterations=2, **{"eval.points": 2, "checkpoint.use": "newest"})
    assert [{k: v for k, v in line.items() if "second" not in k} for line in lines(whole)] == [
        {k: v for k, v in line.items() if "second" not in k} for line in lines(parted)
    ]
    # of an evaluation within an iteration the costs are those until then
    first, between, end = summary["points"][:3]
    assert first["seconds"] < between["seconds"] < end["seconds"]
    within = sorted((parted / "evaluations").glob("step_*/iter_*.jsonl"))
    assert [str(path.relative_to(parted / "evaluations")) for path in within] == [
        "step_000001/iter_0000.jsonl", "step_000003/iter_0001.jsonl",
    ]  # fmt: skip
    ends = [parted / "evaluations" / f"iter_{i:04d}.jsonl" for i in range(3)]
    texts = [[r.text for rollout in read(path) for r in rollout.responses if r.own] for path in (*ends, *within)]
    assert len({tuple(some) for some in texts}) == 5
    config = config_of(iterations=2, **{"eval.points": 2, "checkpoint.use": "newest"})
    with modes.on_run(config, parted, "torch") as (run, state):
        found = points.of(state)
        kl = [points.divergences(run, read(path)).kl.mean() for path in within]
    assert [(p.iteration, p.step, p.within) for p in found] == [
        (0, 0, False), (0, 1, True), (1, 2, False), (1, 3, True),
    ]  # fmt: skip  # that of the end is not committed any more
    assert [found[1].kl, found[3].kl] == pytest.approx(kl) and min(kl) > 0
    assert 0 < found[1].training_tokens < found[2].training_tokens < found[3].training_tokens
    assert found[1].generated_tokens == found[2].generated_tokens
    assert summary["evaluation_tokens"] > json.loads((whole / "summary.json").read_text())["evaluation_tokens"]


def test_one_evaluated_in_the_middle_of_an_iteration_is_taken(tmp_path, capsys, monkeypatch):
    """The reward says that it is the best."""
    overrides = {"iterations": 1, "eval.points": 2}
    monkeypatch.setattr(points, "best", lambda found, by, budget: found[1] if len(found) > 1 else found[0])
    summary = train(tmp_path, **overrides)
    best = summary["best"]["any"]
    assert best["step"] == 1 and best["within"] and best["responses"] == "evaluations/step_000001/iter_0000.jsonl"
    means = [measures.mean_rewards(read(tmp_path / file)) for file in ("evaluations/iter_0000.jsonl", best["responses"])]
    gains = means[1] - means[0]
    assert best["gain_ci95"] == pytest.approx(measures.intervals.bootstrap_ci(gains, seed=0)) and gains.any()
    assert "adapter, of step 1, the best evaluated" in capsys.readouterr().out
    assert modes.evaluate(config_of(**overrides), tmp_path, "torch") == 0
    assert "step 1: held-out reward" in capsys.readouterr().out
    assert modes.generate(config_of(**overrides), tmp_path, "torch") == 0
    assert (tmp_path / "responses" / "trained_step_1" / "iter_0000.scores.jsonl").exists()
    assert "best evaluation, step 1" in " ".join((tmp_path / "report.html").read_text().split())


def test_rules_without_numbers_and_intervals_within_the_scale(tmp_path, capsys, monkeypatch):
    rules = tmp_path / "rules.txt"
    rules.write_text("Be kind.\nBe brief.\n")
    overrides = {"iterations": 1, "principles": str(rules)}
    train(tmp_path / "run", **overrides)
    assert "have no numbered rules, so all of the text goes into every prompt" in capsys.readouterr().out
    monkeypatch.setattr(modes.intervals, "bootstrap_ci", lambda *_, **__: (-0.5, 1.25))
    modes.evaluate(config_of(**overrides), tmp_path / "run", "torch")
    assert "(95% interval 0.0000 to 1.0000)" in capsys.readouterr().out  # `letters` is a share
    monkeypatch.undo()
    train(tmp_path / "numbered", iterations=1)
    assert "no numbered rules" not in capsys.readouterr().out


def test_without_a_best_the_newest_is_taken(tmp_path, capsys):
    summary = train(tmp_path, iterations=1, **{"eval.best": "none"})
    assert summary["best"] == {} and not (tmp_path / "best").exists()
    assert "adapter, of iteration 1\n" in capsys.readouterr().out


# ---------------------------------------------------------------- rewards less a penalty


def test_a_reward_is_penalised_by_the_token_before_its_transform(tmp_path):
    """Rewards stay as they were given; scores, by which pairs are decided, do not."""
    config = config_of(iterations=1, **{"reward.length_penalty": 0.05, "reward.transform": "sigmoid"})
    assert modes.train(config, tmp_path, "torch") == 0
    found = [r for rollout in read(tmp_path / "rollouts" / "iter_0000.jsonl") for r in rollout.responses]
    assert len({len(r.tokens) for r in found}) > 1
    for r in found:
        assert r.score == pytest.approx(1 / (1 + math.exp(-(r.reward - 0.05 * len(r.tokens)))))
    line = lines(tmp_path)[1]
    plain = [r for r in found if r.own]
    assert line["reward_plain"] == pytest.approx(np.mean([r.reward for r in plain]))
    assert line["score_plain"] == pytest.approx(np.mean([r.score for r in plain]))
