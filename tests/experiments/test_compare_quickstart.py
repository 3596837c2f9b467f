"""The comparison of all methods: choices and budgets by hand; mistakes; a whole comparison."""

import json
import math
from pathlib import Path

import pytest
from test_sweep import TINY, call

from ple_jax import algorithms
from ple_jax.core.errors import UserError
from ple_jax.core.files import read_json
from ple_jax.core.types import Response, Rollout
from ple_jax.evaluation import responses
from ple_jax.experiments import compare_quickstart, methods
from ple_jax.experiments.jobs import Outcome, parsed
from ple_jax.training.journal import read


def settings(out: Path, *given: str, names: str = "all", **options) -> compare_quickstart.Settings:
    file = "quickstart"
    config = parsed((f"--config={file}", "--mode=plan", *given)).config
    values = {
        "out": out, "file": file, "config": config, "given": given, "backend": "jax", "seeds": ["0", "1"],
        "methods": methods.chosen(names), "lrs": ["1e-4", "1e-3"], "responses": 96, "steps": 6,
        "test_data": "quickstart_test", "samples": 4, "second_reward": "bag_of_words",
    }  # fmt: skip
    return compare_quickstart.Settings(**values | options)


@pytest.fixture
def out(tmp_path):
    for name in ("pairs", "sft"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "completion": " b"}\n')
    return tmp_path


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_has_the_same_budget(out, name):
    job = compare_quickstart.training(settings(out), name, "1e-3", "1")
    asked = parsed(job.arguments)
    config, method = asked.config, methods.METHODS[name]
    slots = algorithms.load(config.algorithm).collect(config)
    sampled = [slot for slot in slots if slot.source == "policy"]
    assert config.iterations * config.queries_per_iteration * len(sampled) == (0 if method.data else 480)
    assert config.queries_per_iteration == (48 if method.data else 96 // len(sampled))
    assert config.queries_per_iteration // config.optimizer.batch_queries == 6
    assert (config.optimizer.lr, config.seed) == (1e-3, 1)
    assert (asked.backend, config.trainer) == (("torch", "trl") if name.startswith("trl_") else ("jax", "own"))
    if method.data:
        taken = {"sft": {"completion"}, "pairs": {"completion", "rejected"}}[method.data]
        assert {slot.source for slot in slots} == taken and config.task.train == str(out / f"{method.data}.jsonl")
        assert method.data == {"sft": "sft", "dpo": "pairs"}[config.algorithm]
    else:
        assert config.task.train == "quickstart_train"
    # the test asks the same run, and differs in what it asks for alone
    test = parsed(compare_quickstart.training(settings(out), name, "1e-3", "1", test=True).arguments)
    assert (test.mode, test.workdir, test.backend) == ("generate", asked.workdir, asked.backend)
    own = ("generate", "checkpoint")
    assert {k: v for k, v in test.config.to_dict().items() if k not in own} == {
        k: v for k, v in config.to_dict().items() if k not in own
    }
    assert test.config.checkpoint.use == "newest"  # of all methods the end of one budget
    assert (test.config.generate.data, test.config.generate.samples) == ("quickstart_test", 4)
    assert (test.config.generate.policy, test.config.generate.second_reward) == ("trained", "bag_of_words")


@pytest.mark.slow
def test_trl_has_what_its_methods_ask_for(out):
    from torch_ascend import baselines

    names = [name for name in methods.METHODS if name.startswith("trl_")]
    for name in names:
        baselines.check(parsed(compare_quickstart.training(settings(out), name, "1e-3", "0").arguments).config)
    assert len(names) == 4


def test_ablations_differ_from_ple_in_one_thing(out):
    def flat(name):
        job = compare_quickstart.training(settings(out), name, "1e-3", "0")
        return parsed(job.arguments).config.ple.to_dict()

    ple = flat("ple")
    found = {
        name: {key: value for key, value in flat(name).items() if value != ple[key]}
        for name, method in methods.METHODS.items()
        if method.ablation
    }
    assert found == {
        "ple_no_ranking": {"rank_weight": 0.0},
        "ple_all_blended": {"tau_0": math.inf},
        "ple_no_blend": {"blend_weight": 0.0},
        "ple_constant_tau": {"alpha": 1.0},
        "ple_uniform": {"blend": "uniform"},
        "ple_percentile": {"selection": "percentile", "rank": "dpo", "rank_beta": 0.1, "rank_sft_weight": 0.0},
    }


def test_a_method_wins_over_what_the_user_gives(out):
    given = ("--config.queries_per_iteration=8", "--config.optimizer.micro_queries=4", "--config.lora.rank=2")
    config = parsed(compare_quickstart.training(settings(out, *given), "self_distillation", "1e-3", "0").arguments).config
    assert (config.queries_per_iteration, config.optimizer.batch_queries, config.optimizer.micro_queries) == (96, 16, 4)
    assert config.lora.rank == 2


def test_budgets_that_do_not_divide():
    with pytest.raises(UserError, match="--responses=96 must be a multiple of 40: ple_percentile takes 8 a query"):
        methods.budget("ple_percentile", responses=96, steps=5, micro=8)
    assert methods.budget("ppo", responses=30, steps=2, micro=8) == {
        "queries_per_iteration": "30",
        "optimizer.batch_queries": "15",
        "optimizer.micro_queries": "5",
    }


def test_methods_by_name():
    everything = methods.chosen("all")
    assert everything == list(methods.METHODS) and len(everything) == 20
    main = methods.chosen("main")
    assert [name for name in everything if name not in main] == [n for n in everything if n.startswith("ple_")]
    assert methods.chosen("sft, ple") == ["ple", "sft"]
    with pytest.raises(UserError, match="'dpo_offlne' is none of main, all, ple.*did you mean 'dpo_offline'"):
        methods.chosen("ple,dpo_offlne")


def test_the_start_model_with_and_without_principles(out):
    for principled in (False, True):
        job = compare_quickstart.starting(settings(out), principled=principled)
        asked = parsed(job.arguments)
        assert (asked.mode, asked.config.generate.policy, asked.config.generate.principled) == (
            "generate",
            "start",
            principled,
        )
        assert job.result == responses.folder(asked.workdir, asked.config) / "iter_0000.scores.jsonl"


def test_offline_records_are_best_and_worst_as_they_were_sampled():
    def rollout(number, *responses):
        made = tuple(Response((1,), True, sample=i, text=text, reward=reward) for i, (text, reward) in enumerate(responses))
        return Rollout(f"q{number}", f"prompt {number}", (1,), made)

    found = responses.Generated(
        {},
        [
            rollout(0, (" so so", 0.1), (" great\n", 0.9), (" bad", -0.5), (" fine", 0.9)),
            rollout(1, (" a", 0.3), (" b", 0.3)),  # a tie
            rollout(2, ("  ", 0.9), (" b", 0.3)),  # the best is empty
            rollout(3, (" a", 0.9), ("\n", 0.3)),  # the worst is
            rollout(4, (" a", 0.9), ("a ", 0.3)),  # the same words
            rollout(5, (" a", 0.9), (" b", math.nan)),
        ],
        [],
    )
    pairs, best = compare_quickstart.records(found)
    assert pairs == [{"id": "q0", "prompt": "prompt 0", "chosen": " great\n", "rejected": " bad"}]
    assert best == [
        {"id": "q0", "prompt": "prompt 0", "completion": " great\n"},
        {"id": "q1", "prompt": "prompt 1", "completion": " a"},
        {"id": "q3", "prompt": "prompt 3", "completion": " a"},
        {"id": "q4", "prompt": "prompt 4", "completion": " a"},
    ]


def test_the_learning_rate_is_chosen_on_the_dev_split(out, capsys):
    s = settings(out, names="ple,raft,sft,ppo,grpo", lrs=["1e-4", "1e-3", "1e-2"])
    reached = {  # exit code, reward
        "ple": [(0, 0.5), (0, 0.7), (0, 0.7)],  # the smaller of equal ones
        "raft": [(0, 0.9), (2, 0.0), (0, 0.1)],
        "sft": [(2, 0.0), (2, 0.0), (2, 0.0)],
        "ppo": [(0, 0.5), (-9, 0.0), (0, 0.3)],  # killed: which is the best is not known
        "grpo": [(0, None), (0, 0.2), (0, 0.1)],
    }
    ended = {}
    for method, runs in reached.items():
        for lr, (code, reward) in zip(s.lrs, runs, strict=True):
            job = compare_quickstart.training(s, method, lr, "0")
            ended[job.name] = Outcome(code)
            job.workdir.mkdir()
            job.result.write_text(json.dumps({"heldout_reward_after": reward}))
    assert compare_quickstart.choose(s, ended) == {"ple": "1e-3", "raft": "1e-4", "grpo": "1e-3"}
    shown = capsys.readouterr().out
    assert "ple: learning rate 1e-3, heldout_reward_after 0.7000\n" in shown and "0.9000, at the edge of the grid\n" in shown
    assert "sft: left out, since every run failed" in shown and "ppo: left out, since a run failed" in shown
    written = json.loads((out / "lrs.json").read_text())
    assert written["selected_on"] == "quickstart_heldout" and written["seed"] == "0"
    assert written["methods"]["raft"] == {"lr": "1e-4", "heldout_reward_after": {"1e-4": 0.9, "1e-3": None, "1e-2": 0.1}}
    assert written["methods"]["ppo"]["lr"] is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "plee"], "'plee' is none of"),
        (["--responses", "95"], "--responses=95 must be a multiple of"),
        (["--test-data", "quickstart_tset"], "did you mean 'quickstart_test'?"),
        (["--second-reward", "bag_of_word"], "did you mean 'bag_of_words'?"),
        (["--seeds", "0,x"], "--config.seed=x"),
        (["--lrs", "1e-3,fast"], "--lrs=1e-3,fast"),
        (["--", "--config.task.format=hh"], "config.task.format is 'hh'"),
    ],
)
def test_mistakes_of_a_comparison_cost_no_run(capsys, tmp_path, arguments, says):
    found = call(capsys, compare_quickstart.main, "--config", TINY, "--out", str(tmp_path), *arguments)
    assert found.code == 2 and says in found.err and found.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_whole_comparison(capsys, tmp_path):
    arguments = ["--config", TINY, "--out", str(tmp_path), "--methods", "ple,dpo_offline", "--seeds", "0,1", "--lrs", "1e-2"]
    arguments += ["--responses", "16", "--steps", "2", "--samples", "2", "--test-data", "tiny_heldout", "--jobs", "2"]
    arguments += ["--", "--config.iterations=2", "--config.sinks=()"]
    found = call(capsys, compare_quickstart.main, *arguments)
    assert found.code == 0, found.out + found.err
    assert "nothing failed" in found.out and (tmp_path / "comparison" / "comparison.html").exists()
    for label in ("ple", "dpo_offline", "start + principles"):
        assert label in (tmp_path / "comparison" / "table.md").read_text()
    # as many responses for the offline methods' data as others sample while they train
    answers = read(tmp_path / "data" / "responses" / "start" / "iter_0000.jsonl")
    assert sum(len(rollout.responses) for rollout in answers) == 2 * 16
    by_query = {rollout.query_id: rollout for rollout in answers}
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    for pair in pairs:
        rewards = {r.text: r.reward for r in by_query[pair["id"]].responses}
        assert rewards[pair["chosen"]] == max(rewards.values()) > min(rewards.values()) == rewards[pair["rejected"]]
    for method in ("ple", "dpo_offline"):
        for seed in (0, 1):
            folder = tmp_path / f"{method}__lr-1e-2__seed-{seed}"
            tested = responses.read(folder / "responses" / "trained")
            assert tested.settings["seed"] == seed and tested.settings["iteration"] == 2
            assert (tested.settings["data"], tested.settings["second_reward"]) == ("tiny_heldout", "bag_of_words")
            assert len(tested.rollouts) == 8 and all(len(rollout.responses) == 2 for rollout in tested.rollouts)
            trained = read(folder / "rollouts" / "iter_0000.jsonl")
            assert len(trained) == 8 and read_json(folder / "summary.json")["queries"] == 16

    # the same command again: only the page is made anew. Then as if a run had been killed at its end
    logs = {path: path.read_text() for path in tmp_path.glob("*.log") if path.name != "comparison.log"}
    lost = tmp_path / "ple__lr-1e-2__seed-1"
    (lost / "summary.json").unlink()
    again = call(capsys, compare_quickstart.main, *arguments)
    assert again.code == 0 and "nothing failed" in again.out and (lost / "summary.json").exists()
    assert [path.name for path, text in logs.items() if path.read_text() != text] == ["ple__lr-1e-2__seed-1.log"]
