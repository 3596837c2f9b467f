"""The loop in this process, on the tiny model: ablations, a variant from a file, the warm-up, and bad runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from configs import tiny as tiny_config
from ple_jax import algorithms, modes
from ple_jax.core import identity, processor
from ple_jax.core.config import validate
from ple_jax.core.errors import Damaged, UserError
from ple_jax.core.files import write_json
from ple_jax.core.identity import FORMAT
from ple_jax.core.types import Query, Response, Rollout
from ple_jax.core.version import VERSION
from ple_jax.models import peft
from ple_jax.training import loop, measures
from ple_jax.training.journal import Journal, write
from ple_jax.training.workdir import check_config
from torch_ascend.backend import TorchBackend

ROOT = Path(__file__).parents[2]


def train(workdir: Path, backend: str = "torch", **overrides) -> list[dict]:
    """Runs the tiny config, one iteration unless told otherwise; its metrics lines.

    The loop is the same for both backends: with torch, which compiles nothing, a test takes a fifth of the time.
    """
    config = tiny_config.get_config()
    config.sinks = ()
    for key, value in {"iterations": 1, **overrides}.items():
        *parents, name = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[name] = ConfigDict(value) if isinstance(value, dict) else value  # dictionaries are overridden whole
    validate(config)
    assert modes.train(FrozenConfigDict(config), workdir, backend) == 0
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def rollouts(workdir: Path, iteration: int = 0) -> list[dict]:
    lines = (workdir / "rollouts" / f"iter_{iteration:04d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("default")
    # tau_0 = 0 so that about half of the pairs of a random model are ranked
    return workdir, train(workdir, **{"ple.tau_0": 0.0})


def test_there_is_no_rate_of_an_iteration_that_two_processes_sampled(tmp_path, monkeypatch):
    """The second has fewer tokens to sample than the iteration has, and its seconds are those of these."""
    generate, calls = TorchBackend.generate, []

    def stopped(self, *asked, tell, **options):
        calls.append(asked)

        def told(ended):
            tell(ended)
            if ended and len(calls) == 2:  # after the evaluation before training
                raise KeyboardInterrupt

        return generate(self, *asked, tell=told, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TorchBackend, "generate", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, iterations=2)
    assert (tmp_path / "rollouts" / "iter_0000.partial.jsonl").exists()
    _, first, second = train(tmp_path, iterations=2)
    assert "generate_tokens_per_second" not in first and first["train_tokens_per_second"] > 0
    assert second["generate_tokens_per_second"] > 0


@pytest.mark.parametrize("backend", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
@pytest.mark.parametrize("iterations", [1, 3])
def test_one_iteration_is_traced_where_asked(tmp_path, capsys, backend, iterations):
    """The second, as the first compiles; of one iteration that one. The run is no other one."""
    plain, traced = tmp_path / "plain", tmp_path / "traced"
    config = tiny_config.get_config()
    config.sinks, config.iterations = (), iterations
    for workdir, profile in ((plain, False), (traced, True)):
        assert modes.train(FrozenConfigDict(config), workdir, backend, profile=profile) == 0
        said = capsys.readouterr().out
        assert ("profile of this iteration" in said) == profile == (workdir / "profile").exists()
        if profile:
            before, _, after = said.partition("profile of this iteration")
            assert before.count("iteration 1/") == 1 and before.count("iteration 2/") == (iterations > 1)
            assert after.count("iteration 3/") == (iterations > 1)
    assert [file for file in (traced / "profile").rglob("*") if file.is_file() and file.stat().st_size > 1000]
    assert rollouts(plain, iterations - 1) == rollouts(traced, iterations - 1)


def test_a_trace_of_what_has_no_iteration_is_refused(tmp_path):
    config = tiny_config.get_config()
    config.algorithm = "reward"
    for key, first in (("train", 0), ("heldout", 10)):
        records = [{"prompt": f"{i} ", "chosen": "yes", "rejected": "no"} for i in range(first, first + 9)]
        config.task[key] = str(tmp_path / f"{key}.jsonl")
        Path(config.task[key]).write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(UserError, match="--profile traces an iteration of our own trainer of an algorithm that samples"):
        modes.train(FrozenConfigDict(config), tmp_path / "run", "torch", profile=True)


def test_environment_says_what_made_the_run(default_run):
    found = json.loads((default_run[0] / "environment.json").read_text())
    assert found["ple_jax"] == VERSION and found["torch"] and {"commit", "date"} <= set(found)
    assert found["processor"] == processor.named()


def test_metrics_are_all_there(default_run):
    workdir, (before, after) = default_run
    first = {"iteration", "heldout_reward", "heldout_reward_principled", "heldout_kl", "heldout_entropy"}
    assert before["iteration"] == 0 and first <= set(before)
    assert before["heldout_kl"] == after["kl"] == 0  # the policy that sampled is still the reference
    assert after["heldout_kl"] > 0
    assert {
        "reward_plain", "reward_principled", "margin", "tau", "ranked_share", "negative_margin_share",
        "hinge_active_before", "hinge_active_after", "lp_plain", "lp_principled", "length_plain", "length_principled",
        "truncated_share", "kl", "entropy", "heldout_kl",
        "rank_loss", "blend_loss", "grad_norm", "distinct_2_plain", "distinct_2_principled", "leak", "loss", "lr",
        "generated_tokens", "training_tokens", "seconds_generate", "seconds_update", "heldout_reward",
    } <= set(after)  # fmt: skip
    lines = rollouts(workdir)
    margins = np.array([line["margin"] for line in lines])
    assert after["margin"] == pytest.approx(margins.mean())
    assert after["ranked_share"] == (margins > 0).mean() and 0 < after["ranked_share"] < 1
    assert after["negative_margin_share"] == (margins < 0).mean()
    assert after["reward_plain"] == pytest.approx(np.mean([line["responses"][0]["reward"] for line in lines]))
    assert after["truncated_share"] == np.mean([not r["finished"] for line in lines for r in line["responses"]])
    assert after["generated_tokens"] == sum(len(r["tokens"]) for line in lines for r in line["responses"])
    trained = sum(len(line["prompt_tokens"]) + sum(len(r["tokens"]) for r in line["responses"]) for line in lines)
    assert after["training_tokens"] == trained


@pytest.mark.parametrize(
    ("override", "ranked"),
    [
        pytest.param({"ple.rank_weight": 0.0}, None, marks=pytest.mark.slow),
        ({"ple.tau_0": float("inf")}, 0.0),
        pytest.param({"ple.blend_weight": 0.0}, None, marks=pytest.mark.slow),
        ({"ple.alpha": 1.0}, None),
        pytest.param({"ple.blend": "uniform"}, None, marks=pytest.mark.slow),
        pytest.param({"ple.rank": "dpo", "ple.rank_beta": 0.1}, None, marks=pytest.mark.slow),
        pytest.param({"ple.selection": "symmetric"}, None, marks=pytest.mark.slow),
        ({"ple.selection": "percentile", "ple.rank": "dpo", "ple.samples": 3}, None),
        pytest.param({"reward.transform": "zscore", "ple.rank": "sigmoid"}, None, marks=pytest.mark.slow),
        pytest.param({"reward.kwargs": {"letters": "xyz"}}, None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_one_override_is_another_run(override, ranked, default_run, tmp_path):
    workdir, reference = default_run
    ours = train(tmp_path, **{"ple.tau_0": 0.0, **override})
    if ranked is not None:
        assert ours[1]["ranked_share"] == ranked
    same = [r["tokens"] for line in rollouts(workdir) for r in line["responses"]]
    if override.get("ple.selection") != "percentile":  # the same noise samples the same tokens
        assert [r["tokens"] for line in rollouts(tmp_path) for r in line["responses"]] == same
    if "ple.alpha" not in override:  # which changes later iterations only
        assert ours[1]["loss"] != reference[1]["loss"]
    a, b = (peft.read(w / "adapter")[0] for w in (workdir, tmp_path))
    assert any((a[name] != b[name]).any() for name in a) == ("ple.alpha" not in override)


def test_a_reward_that_tells_nothing_apart_is_said(tmp_path, capsys):
    train(tmp_path / "flat", **{"reward.name": "test_loop:flat_reward", "reward.kwargs": {}})
    assert "warning: all rewards of this iteration are 0.5: there is nothing to rank" in capsys.readouterr().out
    train(tmp_path / "letters")
    assert "nothing to rank" not in capsys.readouterr().out


def flat_reward(prompts, responses):
    return [0.5] * len(responses)


def test_constant_threshold(tmp_path):
    lines = train(tmp_path, iterations=2, **{"ple.alpha": 1.0, "ple.tau_0": 0.01})
    assert [line.get("tau") for line in lines] == [None, 0.01, 0.01]


def test_a_variant_is_one_file(default_run, tmp_path):
    variant = ROOT / "tests" / "variants" / "focal.py"
    assert len(variant.read_text().splitlines()) < 30
    ours = train(tmp_path, **{"ple.tau_0": 0.0, "algorithm": str(variant), "algorithm_kwargs": {"gamma": 2.0}})
    assert ours[1]["loss"] != default_run[1][1]["loss"]
    assert ours[1]["reward_plain"] == default_run[1][1]["reward_plain"]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("x = 1\n", "lacks collect"),
        ("import no_such_module\n", "does not import: ModuleNotFoundError"),
        ("1 / 0\n", "does not import: ZeroDivisionError"),
        ("import sys; sys.exit(0)\n", "does not import: SystemExit: 0"),
    ],
)
def test_a_broken_variant_is_named(tmp_path, code, says):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(UserError, match=says):
        algorithms.load(str(tmp_path / "mine.py"))


def test_warm_up_makes_another_reference(tmp_path):
    data = tmp_path / "sft.jsonl"
    rows = [{"prompt": f"query {i}", "completion": "abc" * (i % 3)} for i in range(9)]  # a third are empty
    data.write_text("\n".join(map(json.dumps, rows)))
    sft = {"warm_up.data": str(data), "warm_up.epochs": 2, "warm_up.lr": 0.02}
    with pytest.raises(UserError, match="sft.jsonl:1: the answer is empty.*3 of 9 records .*max_bad_share"):
        train(tmp_path / "run", **sft)
    lines = train(tmp_path / "run", **sft, **{"task.max_bad_share": 0.4})
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert [line["set"] for line in listed] == ["warm_up"] * 3 and listed[0]["where"].endswith("sft.jsonl:1")
    assert lines[0]["heldout_kl"] == 0  # the reference is the policy as it stood after the warm-up
    assert lines[0]["heldout_reward"] != train(tmp_path / "cold")[0]["heldout_reward"]


def nan_reward(prompts, responses):
    return [float("nan")] * len(responses)


def test_a_reward_that_is_not_finite_loses_nothing(tmp_path):
    """One line names the response; what was sampled stays, and is used once the reward is mended."""
    with pytest.raises(UserError, match="nan_reward is not finite for 8 of 8 queries .*heldout_0000.*such as prompt"):
        train(tmp_path, **{"reward.name": "test_loop:nan_reward", "reward.kwargs": {}})
    assert (tmp_path / "evaluations" / "iter_0000.partial.jsonl").stat().st_size > 0
    assert not (tmp_path / "summary.json").exists()


def nan_for_one(prompts, responses):
    """No value for one train query and for one held-out query, a share of letters for the others."""
    bad = ("At first", "Later on")
    return [float("nan") if p in bad else sum(c.islower() for c in r) / 8 for p, r in zip(prompts, responses, strict=True)]


def test_quarantined_queries_are_left_out_and_kept(tmp_path):
    settings = {"reward.name": "test_loop:nan_for_one", "reward.kwargs": {}, "queries_per_iteration": 16}
    data = [json.dumps({"id": str(i), "prompt": p}) for i, p in enumerate(["At first", *(f"query {i}" for i in range(15))])]
    (tmp_path / "train.jsonl").write_text("\n".join(data))
    (tmp_path / "heldout.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in ["Later on", *"abcdefg"]))
    settings |= {f"task.{which}": str(tmp_path / f"{which}.jsonl") for which in ("train", "heldout")}
    with pytest.raises(UserError, match="is not finite for 1 of 8 queries.*reward.max_bad_share=0.05"):
        train(tmp_path / "strict", **settings)
    lines = train(tmp_path / "run", **settings, **{"reward.max_bad_share": 0.2})
    kept = rollouts(tmp_path / "run")
    assert len(kept) == 15 and "At first" not in [line["prompt"] for line in kept]
    trained = sum(len(line["prompt_tokens"]) + sum(len(r["tokens"]) for r in line["responses"]) for line in kept)
    assert lines[1]["training_tokens"] == trained  # 4 batches: none is lost, none is trained on twice
    (quarantined,) = (tmp_path / "run" / "quarantine" / "iter_0000.jsonl").read_text().splitlines()
    assert json.loads(quarantined)["prompt"] == "At first"
    assert all(r["text"] is not None and r["reward"] is None for r in json.loads(quarantined)["responses"])
    done = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert done["heldout_queries"] == 7 and np.isfinite(done["heldout_gain_ci95"]).all()
    assert np.isfinite([lines[0]["heldout_reward"], lines[1]["heldout_reward"]]).all()


def nan_while(prompts, responses, *, broken):
    """No value for a query while a file is there, as of a reward that is mended meanwhile."""
    bad = "query 3" if Path(broken).exists() else ""
    return [float("nan") if p == bad else len(r) / 8 for p, r in zip(prompts, responses, strict=True)]


def test_what_was_in_quarantine_before_a_reward_was_mended_is_counted_once(tmp_path):
    """A count by hand: 8 queries, 16 responses; and the file of the attempt before is gone."""
    rows = [json.dumps({"id": str(i), "prompt": f"query {i}"}) for i in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "broken").touch()
    settings = {"reward.name": "test_loop:nan_while", "reward.kwargs": {"broken": str(tmp_path / "broken")}}
    settings["task.train"] = str(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match="is not finite for 1 of 8 queries"):
        train(tmp_path / "run", **settings)
    assert [p.name for p in (tmp_path / "run" / "quarantine").iterdir()] == ["iter_0000.jsonl"]
    (tmp_path / "broken").unlink()
    train(tmp_path / "run", **settings)
    done = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (done["queries"], done["reward_calls"]) == (8, 16)
    responses = [r for line in rollouts(tmp_path / "run") for r in line["responses"]]
    assert done["generated_tokens"] == sum(len(r["tokens"]) for r in responses)
    assert list((tmp_path / "run" / "quarantine").iterdir()) == []


def test_a_stale_quarantine_file_is_not_counted(tmp_path):
    """As an earlier version left it: of queries that the journal has."""
    train(tmp_path)
    done = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "quarantine").mkdir()
    shutil.copy(tmp_path / "rollouts" / "iter_0000.jsonl", tmp_path / "quarantine")
    (tmp_path / "summary.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints")
    train(tmp_path)
    again = json.loads((tmp_path / "summary.json").read_text())
    assert [again[name] for name in ("queries", "reward_calls", "prompt_tokens")] == [8, 16, done["prompt_tokens"]]


def test_an_iterations_queries_are_all_in_its_journal_or_in_quarantine(tmp_path):
    some = {i: Rollout(i, "a", (1,), (Response((1,), True),)) for i in "abcx"}
    queries, there = [Query(i, "a") for i in "abc"], Journal(tmp_path / "rollouts", 0)
    quarantine = tmp_path / "quarantine" / "iter_0000.jsonl"

    def left_out(kept: str) -> list[str]:
        return [r.query_id for r in loop.quarantined(there, queries, [some[i] for i in kept])]

    assert left_out("abc") == []
    with pytest.raises(Damaged, match=r"quarantine/iter_0000\.jsonl is gone, or lacks query 'b'.* delete it and .*rollouts"):
        left_out("ac")
    write(quarantine, [some["b"]])
    assert left_out("ac") == ["b"] and left_out("abc") == []
    with pytest.raises(Damaged, match="lacks query 'c', which iter_0000.jsonl leaves out"):
        left_out("a")
    with pytest.raises(Damaged, match=r"rollouts/iter_0000\.jsonl has query 'x', which this iteration does not draw"):
        left_out("ax")


def test_a_gain_is_of_the_queries_that_have_a_reward_before_and_after(tmp_path):
    def rewarded(**values: float) -> list[Rollout]:
        return [Rollout(i, "a", (1,), (Response((1,), True, reward=value),)) for i, value in values.items()]

    folder = tmp_path / "evaluations"
    write(folder / "iter_0000.jsonl", rewarded(a=1.0, b=2.0, c=float("nan"), d=4.0))
    write(folder / "iter_0002.jsonl", rewarded(d=5.0, b=7.0, c=1.0))
    before, after = measures.before_and_after(tmp_path, 2)
    assert (before.tolist(), after.tolist()) == ([2.0, 4.0], [7.0, 5.0])
    write(folder / "iter_0002.jsonl", rewarded(c=1.0))
    assert [len(x) for x in measures.before_and_after(tmp_path, 2)] == [0, 0]


def test_a_damaged_summary_is_made_again(default_run, tmp_path):
    shutil.copytree(default_run[0], tmp_path / "copy")
    summary = tmp_path / "copy" / "summary.json"
    good = json.loads(summary.read_text())
    summary.write_text(summary.read_text().replace('"seed": 0', '"seed": 1'))
    train(tmp_path / "copy", **{"ple.tau_0": 0.0})
    again = json.loads(summary.read_text())
    timed = ("seconds", "wall_seconds", "peak_memory_bytes", "digest")
    assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in good.items() if k not in timed}


def test_the_parts_of_a_reward_are_logged_and_scored_once(tmp_path):
    parts = {"vowels": {"name": "letters", "weight": 2.0}, "short": {"name": "length", "kwargs": {"target": 1}}}
    settings = {"reward.name": "combine", "reward.kwargs": {"parts": parts}, "reward.transform": "zscore"}
    lines = train(tmp_path, **settings)
    responses = [r for line in rollouts(tmp_path) for r in line["responses"]]
    for r in responses:
        vowels = sum(c in "aeiou" for c in r["text"]) / max(len(r["text"]), 1)
        assert r["parts"] == pytest.approx({"vowels": vowels, "short": -abs(len(r["text"].split()) - 1)})
        assert r["reward"] == pytest.approx(2 * r["parts"]["vowels"] + r["parts"]["short"])
    plain = [r["parts"]["vowels"] for r in responses if r["kind"] == "plain"]
    assert lines[1]["reward_vowels_plain"] == pytest.approx(np.mean(plain))
    raw = [r["reward"] for r in responses]
    assert lines[1]["transform_mean"] == pytest.approx(np.mean(raw))
    assert lines[1]["transform_std"] == pytest.approx(np.std(raw))
    assert (tmp_path / "rewards.sqlite").exists()


def counting(prompts, responses, *, log):
    with Path(log).open("a") as file:
        file.writelines(json.dumps([p, r]) + "\n" for p, r in zip(prompts, responses, strict=True))
    return [0.5 + len(r) % 3 for r in responses]


def test_nothing_is_scored_twice(tmp_path):
    settings = {"reward.name": "test_loop:counting", "reward.kwargs": {"log": str(tmp_path / "log")}}
    train(tmp_path / "run", **settings)
    scored = (tmp_path / "log").read_text().splitlines()
    assert len(scored) == len(set(scored))
    for name in ("evaluations", "rollouts"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    train(tmp_path / "run", **settings)  # sampled again, to the same texts
    assert (tmp_path / "log").read_text().splitlines() == scored


def test_how_a_reward_is_computed_may_change(tmp_path):
    config = tiny_config.get_config()
    part = {"name": "letters", "kwargs": {"retries": 2, "letters": "abc"}}
    config.reward.name, config.reward.kwargs = "combine", {"parts": {"a": part}, "timeout": 3}
    found = identity.comparable(identity.run_keys(config, "jax", {}))["reward"]["kwargs"]
    assert found == {"parts": {"a": {"name": "letters", "kwargs": {"letters": "abc"}}}}


def test_queries_that_are_held_out_are_not_trained_on(tmp_path):
    names = (ROOT / "ple_jax" / "data" / "tiny_train.jsonl").read_text().splitlines()
    (tmp_path / "heldout.jsonl").write_text("\n".join(names[:2]))
    train(tmp_path / "run", **{"task.heldout": str(tmp_path / "heldout.jsonl"), "queries_per_iteration": 12})
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert [(line["set"], line["kind"]) for line in listed] == [("train", "held out too")] * 2
    drawn = {line["query_id"] for line in rollouts(tmp_path / "run")}
    assert not drawn & {json.loads(name)["id"] for name in names[:2]}
    with pytest.raises(UserError, match="also held-out query .*, and so are all"):
        train(tmp_path / "none", **{"task.heldout": "tiny_train"})


def test_prompts_that_are_too_long_are_counted(tmp_path):
    with pytest.raises(UserError, match=r"'train-\d+' has \d+ tokens, above task.max_prompt_tokens=4; .*16 of 16"):
        train(tmp_path, **{"task.max_prompt_tokens": 4})
    train(tmp_path, **{"task.max_prompt_tokens": 8, "task.max_bad_share": 0.9, "queries_per_iteration": 4})
    listed = [json.loads(line) for line in (tmp_path / "bad_records.jsonl").read_text().splitlines()]
    assert [(line["set"], line["kind"]) for line in listed] == [("train", "over-long")] * 3 + [("heldout", "over-long")]
    assert all(len(line["prompt_tokens"]) <= 8 for line in rollouts(tmp_path))


@pytest.mark.slow
def test_long_posts_are_cut_between_paragraphs(tmp_path):
    post = "One line.\nAnother line.\n" + "A last line that is long. " * 4
    row = {"prompt": f"SUBREDDIT: r/a\n\nTITLE: t\n\nPOST: {post}\n\nTL;DR:", "completion": "Short."}
    rows = [row | {"prompt": row["prompt"].replace("r/a", f"r/{i}")} for i in "abcdefgh"]
    for which, some in {"train": rows[:4], "heldout": rows[4:]}.items():
        (tmp_path / f"{which}.jsonl").write_text("\n".join(map(json.dumps, some)))
    files = {f"task.{which}": str(tmp_path / f"{which}.jsonl") for which in ("train", "heldout")}
    train(tmp_path / "run", **files, **{"task.format": "tldr", "task.max_prompt_tokens": 80, "queries_per_iteration": 4})
    for line in rollouts(tmp_path / "run"):
        assert line["prompt"].endswith("\n\nTITLE: t\n\nPOST: One line.\nAnother line.\n\nTL;DR:")
        assert len(line["prompt_tokens"]) <= 80
    assert not (tmp_path / "run" / "bad_records.jsonl").exists()


@pytest.mark.slow
def test_conversations_reach_the_policy_the_reward_and_the_journal(tmp_path):
    """HH's transcripts in the chat template, with principles, a system turn of its own, and the warm-up on the answers."""
    turns = [{"role": "system", "content": "Be a pirate."}, {"role": "user", "content": "Hi"}]
    rows = [{"prompt": [*turns, {"role": "assistant", "content": f"Arr {i}"}, {"role": "user", "content": "And?"}],
             "completion": [{"role": "assistant", "content": "Aye."}]} for i in range(12)]  # fmt: skip
    for which, some in {"train": rows[:8], "heldout": rows[8:]}.items():
        (tmp_path / f"{which}.jsonl").write_text("\n".join(map(json.dumps, some)))
    files = {f"task.{which}": str(tmp_path / f"{which}.jsonl") for which in ("train", "heldout")}
    settings = {"task.chat": True, "principles": "honest+concise", "principles_per_query": 2}
    seen = {"reward.name": "test_loop:counting", "reward.kwargs": {"log": str(tmp_path / "log")}}
    train(tmp_path / "run", **files, **settings, **seen, **{"warm_up.data": files["task.train"]})
    line = rollouts(tmp_path / "run")[0]
    assert line["prompt"][0] == turns[0] and len(line["prompt"]) == 4
    shown = bytes(line["prompt_tokens"]).decode()
    assert shown.startswith("system: Be a pirate.\nuser: Hi\nassistant: Arr ") and shown.endswith("user: And?\nassistant: ")
    assert "honest" not in shown.lower() and "concise" not in shown.lower()
    prompt, _ = json.loads((tmp_path / "log").read_text().splitlines()[0])
    assert prompt.startswith("Be a pirate.\n\nHuman: Hi\n\nAssistant: Arr ")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Human: Hi" in page and "&#39;role&#39;" not in page


def test_principles_that_are_quoted_are_warned_of():
    said = measures.warn_of_leak(0.35, 0.05)
    assert said.startswith("warning: 35% of the trigrams")
    assert measures.warn_of_leak(0.05, 0.03) == ""


def test_evaluations_divide_the_steps_of_iterations_that_are_evaluated():
    c = tiny_config.get_config()
    c.eval.points, c.eval.every, c.iterations = 3, 2, 5
    found = {i: [n for n in range(1, 10) if loop.evaluates_within(c, i, n, 9)] for i in range(5)}
    assert found == {0: [], 1: [3, 6], 2: [], 3: [3, 6], 4: [3, 6]}  # the last one always


def test_files_of_someone_else_are_not_touched(tmp_path):
    (tmp_path / "rollouts").mkdir()
    with pytest.raises(UserError, match="no config.json"):
        train(tmp_path)


def test_a_lost_report_is_made_again(default_run, tmp_path):
    shutil.copytree(default_run[0], tmp_path / "copy")
    (tmp_path / "copy" / "report.html").unlink()
    train(tmp_path / "copy", **{"ple.tau_0": 0.0})
    assert (tmp_path / "copy" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"mesh.data": 2}, {"mesh.fsdp": 2, "mesh.tensor": 2}], ids=str)
def test_a_whole_run_on_a_mesh(axes, tmp_path):
    """The same loss as on one device, to rounding."""
    one, ours = (train(tmp_path / name, "jax", **{"ple.tau_0": 0.0, **own}) for name, own in (("one", {}), ("mesh", axes)))
    assert ours[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-4)
    assert ours[1]["ranked_share"] == one[1]["ranked_share"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        {"model.layers": "scan", "model.remat": "full"},
        {"model.dtype": "bfloat16"},
        {"sampling.temperature": 0.7, "sampling.top_k": 50, "sampling.top_p": 0.9, "sampling.min_p": 0.01},
        {"sampling.max_new_tokens": 1, "eval.samples": 2, "eval.every": 2, "optimizer.epochs": 2},
        {"task.chat": True},
    ],
    ids=str,
)
def test_settings_that_change_the_shapes(overrides, tmp_path):
    lines = train(tmp_path, "jax", **overrides)
    assert np.isfinite([lines[1]["loss"], lines[1]["kl"], lines[1]["heldout_kl"], lines[1]["heldout_reward"]]).all()
    longest = max(len(r["tokens"]) for line in rollouts(tmp_path) for r in line["responses"])
    assert longest <= overrides.get("sampling.max_new_tokens", 8)


def test_a_run_that_diverges_stops_before_it_is_committed(tmp_path):
    with pytest.raises(UserError, match="optimiser step .* lower --config.optimizer.lr"):
        train(tmp_path, iterations=3, **{"optimizer.lr": 1e9, "lora.alpha": 1e6, "optimizer.warmup_steps": 0})
    assert not (tmp_path / "summary.json").exists() and not (tmp_path / "checkpoints" / "3").exists()


def test_other_content_under_the_same_name_is_another_run(tmp_path):
    """A file changed between two starts would attach what was sampled to other queries."""
    data = tmp_path / "train.jsonl"
    lines = (ROOT / "ple_jax" / "data" / "tiny_train.jsonl").read_text().splitlines()
    data.write_text("\n".join(lines))
    train(tmp_path / "run", **{"task.train": str(data)})
    data.write_text("\n".join(reversed(lines)))
    with pytest.raises(UserError, match="differing in inputs.train"):
        train(tmp_path / "run", **{"task.train": str(data)})


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"queries_per_iteration": 100}, "queries_per_iteration"),
        ({"mesh.data": 8, "mesh.fsdp": 2, "sampling.width": 16, "optimizer.batch_queries": 16,
          "optimizer.micro_queries": 16, "queries_per_iteration": 16}, "needs 16 devices"),
        ({"reward.name": "test_loop:nan_reward", "reward.kwargs": {"k": 1}}, "is not called as"),
        ({"sampling.max_new_tokens": 2048}, "takes 2048"),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_mended_does_not_need_another_directory(overrides, says, tmp_path):
    with pytest.raises(UserError, match=says):
        train(tmp_path, "jax", **overrides)
    check_config(tmp_path, {"any": "other config"})


def test_how_a_run_is_computed_may_change_and_what_may_not(tmp_path):
    config = {"format": FORMAT, **tiny_config.get_config().to_dict()}
    write_json(tmp_path / "config.json", config)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    config["model"] |= {"remat": "full", "layers": "scan", "attention": "xla"}
    config["mesh"]["fsdp"] = 4
    check_config(tmp_path, config)
    config["model"]["dtype"] = "bfloat16"
    with pytest.raises(UserError, match="differing in model.dtype;"):
        check_config(tmp_path, config)


def test_a_damaged_config_in_the_directory(tmp_path):
    (tmp_path / "config.json").write_text("hi")
    with pytest.raises(UserError, match="config.json is damaged"):
        check_config(tmp_path, {})
