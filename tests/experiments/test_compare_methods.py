"""The comparison of all methods: choices and budgets by hand; mistakes; a whole comparison."""

import json
import math
from pathlib import Path

import pytest
from test_sweep import TINY, call

from ple_jax import algorithms
from ple_jax.core.config import flatten
from ple_jax.core.errors import UserError
from ple_jax.core.files import read_json
from ple_jax.core.types import Response, Rollout
from ple_jax.evaluation import responses
from ple_jax.experiments import compare_methods, jobs, methods, store
from ple_jax.experiments.jobs import Outcome, parsed
from ple_jax.training.journal import read


def settings(out: Path, *given: str, names: str = "all", **options) -> compare_methods.Settings:
    file = "quickstart"
    config = parsed((f"--config={file}", "--mode=plan", *given)).config
    values = {
        "out": out, "file": file, "config": config, "given": given, "backend": "jax", "seeds": ["0", "1"],
        "methods": methods.chosen(names), "lrs": ["1e-4", "1e-3"], "tune_seeds": 1, "budgets": ["2", "4"], "points": 2,
        "responses": 96, "steps": 6,
        "test_data": "quickstart_test", "samples": 4, "second_reward": "bag_of_words",
    }  # fmt: skip
    return compare_methods.Settings(**values | options)


@pytest.fixture
def out(tmp_path):
    for name in ("pairs", "sft"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "completion": " b"}\n')
    return tmp_path


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_has_the_same_budget(out, name):
    job = compare_methods.training(settings(out), name, "1e-3", "1")
    asked = parsed(job.arguments)
    config, method = asked.config, methods.METHODS[name]
    slots = algorithms.load(config.algorithm).collect(config)
    sampled = [slot for slot in slots if slot.source == "policy"]
    total = 450 if name in ("ple_candidates_2", "ple_candidates_4") else 480  # 3 or 5 a query make no equal batches of 96
    offline = bool(method.data) or method.references
    assert config.iterations * config.queries_per_iteration * len(sampled) == (0 if offline else total)
    assert config.queries_per_iteration == (48 if offline else total // 5 // len(sampled))
    assert config.queries_per_iteration // config.optimizer.batch_queries == 6
    assert (config.optimizer.lr, config.seed) == (1e-3, 1)
    assert (asked.backend, config.trainer) == (("torch", "trl") if name.startswith("trl_") else ("jax", "own"))
    if method.data:
        taken = {"sft": {"completion"}, "pairs": {"completion", "rejected"}}[method.data]
        assert {slot.source for slot in slots} == taken and config.task.train == str(out / f"{method.data}.jsonl")
        assert method.data == {"sft": "sft", "dpo": "pairs"}[config.algorithm]
    else:
        assert config.task.train == "quickstart_train"
    # every run goes on to its end, and keeps its best within each budget
    own = config.eval
    points = 1 if method.trl else 2
    assert (own.max_kl, own.stop, own.points, own.second_reward) == ((2, 4), False, points, "bag_of_words")
    # the test asks the same run, and differs in what it asks for alone
    job.workdir.mkdir()
    best = {"kl_2": {"iteration": 1, "step": 9, "within": True}, "kl_4": {"iteration": 3, "step": 18, "within": False}}
    job.result.write_text(json.dumps({"best": best, "iterations": 5}))
    files = {"kl_2": "trained_step_9/iter_0001", "kl_4": "trained/iter_0003", "newest": "trained/iter_0005"}
    for view, file in files.items():
        tested = compare_methods.testing(settings(out), name, "1e-3", "1", view)
        test = parsed(tested.arguments)
        assert (test.mode, test.workdir, test.backend) == ("generate", asked.workdir, asked.backend)
        assert tested.last == f"responses/{file}.scores.jsonl"
        modes = ("generate", "checkpoint")
        assert {k: v for k, v in test.config.to_dict().items() if k not in modes} == {
            k: v for k, v in config.to_dict().items() if k not in modes
        }
        assert test.config.checkpoint.use == view
        assert (test.config.generate.data, test.config.generate.samples) == ("quickstart_test", 4)
        assert (test.config.generate.policy, test.config.generate.second_reward) == ("trained", "bag_of_words")


@pytest.mark.slow
def test_trl_has_what_its_methods_ask_for(out):
    from torch_ascend import baselines

    names = [name for name in methods.METHODS if name.startswith("trl_")]
    for name in names:
        baselines.check(parsed(compare_methods.training(settings(out), name, "1e-3", "0").arguments).config)
    assert len(names) == 4 and all(methods.METHODS[name].trl for name in names)


def test_variants_differ_from_ple_in_one_thing(out):
    def flat(name):
        job = compare_methods.training(settings(out), name, "1e-3", "0")
        config = parsed(job.arguments).config
        return {key: value for key, value in flatten(config.to_dict()).items() if key.startswith(("ple.", "pri", "reward."))}

    ple = flat("ple")
    assert ple["ple.kl_weight"] == 0.0
    found = {
        name: {key: value for key, value in flat(name).items() if value != ple[key]}
        for name, method in methods.METHODS.items()
        if method.of_ple
    }
    percentile = {"selection": "percentile", "rank": "dpo", "rank_beta": 0.1, "rank_sft_weight": 0.0}
    assert found == {
        "ple_no_ranking": {"ple.rank_weight": 0.0},
        "ple_all_blended": {"ple.tau_0": math.inf},
        "ple_no_blend": {"ple.blend_weight": 0.0},
        "ple_constant_tau": {"ple.alpha": 1.0},
        "ple_uniform": {"ple.blend": "uniform"},
        "ple_empty": {"principles": "none"},
        "ple_irrelevant": {"principles": "irrelevant"},
        "ple_reversed": {"principles": "negative_review"},
        "ple_shuffled": {"reward.transform": "shuffle"},
        "ple_kl": {"ple.kl_weight": 0.1},
        "ple_soft": {"ple.kl_weight": 0.1, "ple.rank_weight": 0.2, "ple.rank_sft_weight": 5.0},
        "ple_percentile": {f"ple.{key}": value for key, value in percentile.items()},
        **{f"ple_tau_{tau:g}": {"ple.tau_0": tau} for tau in (0, 0.05, 0.5, 1)},
        **{f"ple_alpha_{alpha:g}": {"ple.alpha": alpha} for alpha in (0.5, 0.7)},
        **{f"ple_candidates_{n}": {"ple.candidates": n} for n in (2, 3, 4)},
        **{f"ple_{name}": {"reward.transform": name} for name in ("sigmoid", "zscore")},
    }


def test_a_method_wins_over_what_the_user_gives(out):
    given = ("--config.queries_per_iteration=8", "--config.optimizer.micro_queries=4", "--config.lora.rank=2")
    config = parsed(compare_methods.training(settings(out, *given), "self_distillation", "1e-3", "0").arguments).config
    assert (config.queries_per_iteration, config.optimizer.batch_queries, config.optimizer.micro_queries) == (96, 16, 4)
    assert config.lora.rank == 2


def test_ple_takes_its_two_responses_whatever_the_config_makes_of_it(out):
    """Of sums it would be four, and twice the budget."""
    s = settings(out, "--config.ple.selection=symmetric")._replace(file="sums")
    config = parsed(compare_methods.training(s, "ple", "1e-3", "0").arguments).config
    collected = algorithms.load("ple").collect(config)
    assert config.queries_per_iteration * len(collected) == s.responses and config.ple.selection == "threshold"


def test_budgets_that_do_not_divide():
    says = "--responses=96 must be a multiple of 56, or little more: ple_percentile takes 8 a query"
    with pytest.raises(UserError, match=says):
        methods.budget("ple_percentile", responses=96, steps=7, micro=8)
    assert methods.budget("ppo", responses=30, steps=2, micro=8) == {
        "queries_per_iteration": "30",
        "optimizer.batch_queries": "15",
        "optimizer.micro_queries": "5",
    }
    # 5 a query: 90 of the 96
    assert methods.budget("ppo", responses=30, steps=2, micro="auto")["optimizer.micro_queries"] == "auto"
    assert methods.budget("ple_candidates_4", responses=96, steps=6, micro=8)["queries_per_iteration"] == "18"


def test_methods_by_name():
    everything = methods.chosen("all")
    assert everything == [name for name in methods.METHODS if name != "sft_references"]  # not all data have references
    assert methods.GROUPS == ("main", "references", "ablations", "sensitivity", "trl")
    assert methods.chosen("references") == methods.chosen("sft_references") == ["sft_references"]
    main = methods.chosen("main")
    assert len(main) == 10 and main[0] == "ple" and not any(methods.METHODS[name].of_ple for name in main)
    assert methods.chosen("sft, ple") == ["ple", "sft"]
    assert methods.chosen("ple,ablations") == ["ple", *(n for n in everything if methods.METHODS[n].group == "ablations")]
    with pytest.raises(UserError, match="'dpo_offlne' is none of all, main, .*did you mean 'dpo_offline'"):
        methods.chosen("ple,dpo_offlne")
    with pytest.raises(UserError, match="'mine.py' is none of .*; a file of your own is compared by ple_jax.*sweep"):
        methods.chosen("ple,mine.py")
    with pytest.raises(UserError, match="ple_empty is trained at the learning rate of ple, which is not among them"):
        methods.chosen("sft,ple_empty")


def test_variants_of_ple_have_its_rate_and_the_sensitivity_fewer_seeds(out):
    s = settings(out, names="ple,ple_empty,ple_tau_1,sft", seeds=["0", "1", "2", "3"])
    assert compare_methods.tuned(s) == ["ple", "sft"]
    rewards = {"ple": {"1e-4": 0.1, "1e-3": 0.3}, "sft": {"1e-4": 0.2, "1e-3": 0.1}}
    ended = {}
    for method, of_rate in rewards.items():
        for lr, reward in of_rate.items():
            job = compare_methods.training(s, method, lr, "0")
            ended[job.name] = Outcome(0)
            job.workdir.mkdir()
            best = {view: {"reward": reward} for view in ("kl_2", "kl_4")}
            job.result.write_text(json.dumps({"best": best, "heldout_reward_after": reward}))
    rates = compare_methods.choose(s, ended)
    assert {method: rates[method, "kl_4"] for method in s.methods} == {
        "ple": "1e-3", "ple_empty": "1e-3", "ple_tau_1": "1e-3", "sft": "1e-4"}  # fmt: skip
    views = {method: [view for m, view in rates if m == method] for method in ("ple", "ple_empty", "ple_tau_1")}
    assert views == {"ple": ["kl_2", "kl_4", "newest"]} | dict.fromkeys(("ple_empty", "ple_tau_1"), ["kl_4", "newest"])
    seeds = {}
    for run in compare_methods.chosen_runs(s, rates):
        seeds.setdefault(run.method, []).append(run.seed)
    assert {method: len(found) for method, found in seeds.items()} == {"ple": 4, "ple_empty": 4, "ple_tau_1": 3, "sft": 4}


def test_a_run_answers_the_test_before_the_next_one_begins(out, monkeypatch):
    """Weights are lost with a machine, so that what was trained and not yet tested would be trained again."""
    s = settings(out, names="ple,sft", seeds=["0", "1"])
    rates = {("ple", view): "1e-3" for view in s.views} | {("sft", "kl_2"): "1e-4", ("sft", "kl_4"): "1e-3"}
    runs = compare_methods.chosen_runs(s, rates)
    assert [(*run,) for run in runs[:3]] == [
        ("ple", "1e-3", "0", ("kl_2", "kl_4", "newest")), ("sft", "1e-4", "0", ("kl_2",)), ("sft", "1e-3", "0", ("kl_4",)),
    ]  # fmt: skip
    order, failing = [], "sft__lr-1e-3__seed-0"

    def run(some, *_, **__):
        for job in some:
            order.append(job.name)
            if job.name == failing:
                continue
            job.result.parent.mkdir(parents=True, exist_ok=True)
            point = {"iteration": 3, "step": 2, "within": True}  # both budgets have the same best: it answers once
            summary = {"best": {"kl_2": point, "kl_4": point}, "iterations": 5}
            job.result.write_text(json.dumps(summary) if job.result.name == "summary.json" else "")
        return {job.name: Outcome(int(job.name == failing)) for job in some}

    monkeypatch.setattr(compare_methods.store, "run", run)
    ended, entries = compare_methods.trained_and_tested(s, runs[:3], jobs=1)
    ple = "ple__lr-1e-3__seed-0"
    assert order == [ple, f"{ple}__kl_2", f"{ple}__newest", "sft__lr-1e-4__seed-0", "sft__lr-1e-4__seed-0__kl_2", failing]
    assert set(ended) == set(order)
    assert list(entries) == [
        *(f"ple={out / ple}@{view}" for view in s.views), f"sft={out / 'sft__lr-1e-4__seed-0'}@kl_2",
    ]  # fmt: skip
    order.clear()
    compare_methods.trained_and_tested(s, runs[:2], jobs=2)  # as many at once: these, and then the answers of both
    assert order == [ple, "sft__lr-1e-4__seed-0", f"{ple}__kl_2", f"{ple}__newest", "sft__lr-1e-4__seed-0__kl_2"]


def test_runs_of_two_dtypes_are_not_compared(out, monkeypatch):
    """`auto` is float32 on one processor and bfloat16 on the next, and what is kept may come from anywhere."""
    s = settings(out, names="ple,sft")
    jobs = [compare_methods.training(s, name, "1e-3", "0") for name in ("ple", "sft")]
    for job, dtype in zip(jobs, ("float32", "bfloat16"), strict=True):
        job.workdir.mkdir()
        (job.workdir / "config.json").write_text(json.dumps({"model": {"dtype": dtype}}))
        if dtype == "float32":
            assert compare_methods.executed(s, []) == {}
    says = "ple__lr-1e-3__seed-0 computed in float32 and sft__lr-1e-3__seed-0 in bfloat16.*--config.model.dtype=float32"
    with pytest.raises(UserError, match=says):
        compare_methods.executed(s, [])


def test_the_start_model_with_and_without_principles(out):
    for principled in (False, True):
        job = compare_methods.starting(settings(out), principled=principled)
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
    pairs, best = compare_methods.records(found)
    assert pairs == [{"id": "q0", "prompt": "prompt 0", "chosen": " great\n", "rejected": " bad"}]
    assert best == [
        {"id": "q0", "prompt": "prompt 0", "completion": " great\n"},
        {"id": "q1", "prompt": "prompt 1", "completion": " a"},
        {"id": "q3", "prompt": "prompt 3", "completion": " a"},
        {"id": "q4", "prompt": "prompt 4", "completion": " a"},
    ]


def test_the_learning_rate_is_chosen_on_the_dev_split_for_every_budget_as_a_mean_over_seeds(out, capsys):
    s = settings(out, names="ple,raft,sft,ppo,rloo,grpo", lrs=["1e-4", "1e-3", "1e-2"], tune_seeds=2, seeds=["3", "4", "5"])
    reached = {  # of each rate, of both seeds: exit code, reward within 2, within 4 and in the end
        "ple": [
            [(0, 0.5, 0.5, 0.5)] * 2,
            [(0, 0.2, 0.9, 0.7), (0, 0.4, 0.5, 0.7)],
            [(0, 0.1, 0.6, 0.8), (0, 0.1, 0.6, 0.6)],
        ],
        "raft": [[(0, 0.9, 0.9, 0.9)] * 2, [(0, 1.0, 1.0, 1.0), (2, 0, 0, 0)], [(0, 0.1, 0.1, 0.1)] * 2],
        "sft": [[(2, 0, 0, 0)] * 2] * 3,
        "ppo": [[(0, 0.5, 0.5, 0.5)] * 2, [(-9, 0, 0, 0), (0, 0, 0, 0)], [(0, 0.3, 0.3, 0.3)] * 2],  # killed: unknown
        "rloo": [[(0, 0.5, 0.5, 0.5)] * 2, [(12, 0, 0, 0), (0, 0, 0, 0)], [(0, 0.3, 0.3, 0.3)] * 2],  # no memory: so too
        "grpo": [[(0, None, 0.1, 0.1)] * 2, [(0, 0.2, 0.1, 0.1)] * 2, [(0, 0.1, 0.1, 0.1)] * 2],
    }
    ended = {}
    for method, rates in reached.items():
        for lr, runs in zip(s.lrs, rates, strict=True):
            for seed, (code, *rewards) in zip("34", runs, strict=True):
                job = compare_methods.training(s, method, lr, seed)
                says = {2: "error: step 3 gave loss nan; lower --config.optimizer.lr (in a new --workdir)",
                        12: "error: not enough memory; lower --config.optimizer.micro_queries"}  # fmt: skip
                ended[job.name] = Outcome(min(code, 2), says.get(code, ""))
                job.workdir.mkdir()
                best = {view: {"reward": reward} for view, reward in zip(("kl_2", "kl_4"), rewards, strict=False)}
                job.result.write_text(json.dumps({"best": best, "heldout_reward_after": rewards[-1]}))
    assert compare_methods.choose(s, ended) == {
        ("ple", "kl_2"): "1e-4", ("ple", "kl_4"): "1e-3", ("ple", "newest"): "1e-3",  # the smaller of equal ones
        **{("raft", view): "1e-4" for view in s.views},  # of a rate at which a seed diverged nothing is said
        ("grpo", "kl_2"): "1e-3", ("grpo", "kl_4"): "1e-4", ("grpo", "newest"): "1e-4",
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "ple, newest: learning rate 1e-3, reward 0.7000\n" in shown
    assert "ple, kl_2: learning rate 1e-4, reward 0.5000, at the edge of the grid\n" in shown
    assert "sft: left out, since every rate failed" in shown and "ppo: left out, since a run failed" in shown
    assert "rloo: left out, since a run failed" in shown
    written = json.loads((out / "lrs.json").read_text())
    assert written["selected_on"] == "quickstart_heldout" and written["seeds"] == ["3", "4"]
    assert written["methods"]["raft"]["kl_2"]["lr"] == "1e-4" and written["methods"]["ppo"]["kl_2"]["lr"] is None
    assert written["methods"]["ple"]["kl_4"]["reward"] == {"1e-4": [0.5, 0.5], "1e-3": [0.9, 0.5], "1e-2": [0.6, 0.6]}


def test_rates_that_were_chosen_stay_where_a_run_is_trained_again(out, tmp_path):
    """On another processor it is another run: what has answered at the rates before should not have done so for nothing."""
    s = settings(out, names="raft", seeds=["3"], tune_seeds=1, budgets=["2"], keep=tmp_path / "keep")

    def reached(low, high):
        ended = {}
        for lr, reward in zip(s.lrs, (low, high), strict=True):
            job = compare_methods.training(s, "raft", lr, "3")
            ended[job.name] = Outcome(0, "")
            job.workdir.mkdir(exist_ok=True)
            job.result.write_text(json.dumps({"best": {"kl_2": {"reward": reward}}, "heldout_reward_after": reward}))
        return ended

    first = {("raft", view): "1e-3" for view in ("kl_2", "newest")}
    assert compare_methods.choose(s, reached(0.1, 0.2)) == first
    assert compare_methods.choose(s, reached(0.2, 0.1)) == first
    assert read_json(out / "lrs.json")["methods"]["raft"]["kl_2"] == {"lr": "1e-3", "reward": {"1e-4": [0.1], "1e-3": [0.2]}}
    assert compare_methods.choose(s._replace(keep=None), reached(0.2, 0.1)) == dict.fromkeys(first, "1e-4")
    # neither a run that was killed since nor another grid takes the place of what was chosen
    kept = (tmp_path / "keep" / "lrs.json").read_text()
    killed = reached(0.2, 0.1) | {compare_methods.training(s, "raft", "1e-4", "3").name: Outcome(-9, "")}
    assert compare_methods.choose(s, killed) == {}
    assert compare_methods.choose(s._replace(lrs=["1e-4"]), reached(0.2, 0.1)) == dict.fromkeys(first, "1e-4")
    # and another question's are neither taken nor replaced
    for other in (s._replace(steps=12), s._replace(given=("--config.lora.rank=4",))):
        assert compare_methods.choose(other, reached(0.2, 0.1)) == dict.fromkeys(first, "1e-4")
    assert (tmp_path / "keep" / "lrs.json").read_text() == kept


def test_what_chooses_rates_asks_nothing_of_a_method_that_is_not_compared(out):
    """Six responses go with PPO's one a query, and not with PLE's two."""
    s = settings(out, names="ppo", seeds=["3"], tune_seeds=1, budgets=["2"], responses=6, steps=6)
    ended = {}
    for lr in s.lrs:
        job = compare_methods.training(s, "ppo", lr, "3")
        ended[job.name] = Outcome(0, "")
        job.workdir.mkdir(exist_ok=True)
        job.result.write_text(json.dumps({"best": {"kl_2": {"reward": 0.5}}, "heldout_reward_after": 0.5}))
    assert compare_methods.choose(s, ended)["ppo", "newest"] == "1e-4"


def test_a_folder_of_kept_results_of_another_question_is_refused_at_once(out, tmp_path):
    s = settings(out, names="raft", seeds=["3"], tune_seeds=1, budgets=["2"], keep=tmp_path / "keep")
    job = compare_methods.starting(s, principled=False)
    job.result.parent.mkdir(parents=True)
    job.result.write_text("")
    jobs.mark(job, out).write_text(jobs.asked(job, out))
    store.save(job, out, s.keep)
    compare_methods.check(s)
    with pytest.raises(UserError, match=r"start.tar.xz is of another command, differing in config.generate.samples"):
        compare_methods.check(s._replace(samples=s.samples + 1))
    with pytest.raises(UserError, match="--out=. does not go with --keep"):
        compare_methods.check(s._replace(out=Path(".")))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "plee"], "'plee' is none of"),
        (["--responses", "95"], "--responses=95 must be a multiple of"),
        (["--test-data", "quickstart_tset"], "did you mean 'quickstart_test'?"),
        (["--second-reward", "bag_of_word"], "did you mean 'bag_of_words'?"),
        (["--seeds", "0,x"], "--config.seed=x"),
        (["--lrs", "1e-3,fast"], "--lrs=1e-3,fast"),
        (["--budgets", "4,much"], "--budgets=4,much"),
        (["--budgets", "-1"], "config.eval.max_kl is"),
        ([], "has a comma"),
        (["--", "--config.task.format=hh"], "config.task.format is 'hh'"),
        (
            ["--", "--config.task.sets={'a': {'train': 'tiny_train', 'heldout': 'tiny_heldout'}}"],
            "config.task.sets is a mixture, and dpo_offline, sft would train on one file: leave them out of --methods",
        ),
    ],
)
def test_mistakes_of_a_comparison_cost_no_run(capsys, tmp_path, arguments, says):
    out = tmp_path / ("a,b" if "comma" in says else "out")
    found = call(capsys, compare_methods.main, "--config", TINY, "--out", str(out), *arguments)
    assert found.code == 2 and says in found.err and found.err.count("\n") == 1
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_variants_are_questions_of_their_own(out, monkeypatch):
    """No p-value would survive 35 methods in one family, and nobody would read such a table."""
    ask = compare_methods.questions
    assert ask(["ple", "raft"]) == {"comparison": ["ple", "raft"]} and ask(["ple"]) == {"comparison": ["ple"]}
    assert ask(["ple", "ple_empty"]) == {"comparison_ablations": ["ple", "ple_empty"]}
    assert ask(["ple", "raft", "ple_empty", "ple_tau_0", "trl_sft"]) == {
        "comparison": ["ple", "raft", "trl_sft"], "comparison_ablations": ["ple", "ple_empty"],
        "comparison_sensitivity": ["ple", "ple_tau_0"],
    }  # fmt: skip
    asked = {}
    fine = Outcome(0, "")
    monkeypatch.setattr(compare_methods, "check", lambda s: None)
    monkeypatch.setattr(compare_methods, "executed", lambda s, jobs, parallel=1: {job.name: fine for job in jobs})
    monkeypatch.setattr(compare_methods, "choose", lambda s, ended: {("ple", "newest"): "1e-3"})
    tested = {}, {"ple=a@newest": out / "a", "raft=b@newest": out / "b", "ple_empty=c@newest": out / "c"}
    monkeypatch.setattr(compare_methods, "trained_and_tested", lambda s, runs, jobs: tested)
    monkeypatch.setattr(
        compare_methods, "compared",
        lambda s, name, entries: (asked.setdefault(name, entries), (compare_methods.starting(s, principled=False), fine))[1],
    )  # fmt: skip
    compare_methods.compare(settings(out, methods=["ple", "raft", "ple_empty"], lrs=["1e-3"], tune_seeds=1), jobs=1)
    labels = {name: {entry.partition("=")[0] for entry in entries} for name, entries in asked.items()}
    starts = {"start", "start + principles"}
    assert labels == {"comparison": {"ple", "raft"} | starts, "comparison_ablations": {"ple", "ple_empty"} | starts}
    curves = [entry.partition("=")[0] for entry in asked["comparison_ablations"] if entry.endswith("@points")]
    assert curves == ["ple"]


@pytest.mark.slow
def test_a_whole_comparison(capsys, tmp_path):
    root, keep = tmp_path / "out", tmp_path / "kept"
    arguments = ["--config", TINY, "--methods", "ple,dpo_offline", "--seeds", "0,1", "--lrs", "1e-2,1e-1"]
    arguments += ["--responses", "16", "--steps", "2", "--samples", "2", "--test-data", "tiny_heldout", "--jobs", "2"]
    arguments += ["--tune-seeds", "1", "--budgets", "0.01,1000", "--points", "2", "--keep", str(keep)]
    arguments += ["--", "--config.iterations=2", "--config.sinks=()"]
    found = call(capsys, compare_methods.main, "--out", str(root), *arguments)
    assert found.code == 0, found.out + found.err
    assert "nothing failed" in found.out and "nan" not in found.out
    table = (root / "comparison" / "table.md").read_text()
    for text in ("ple", "dpo_offline", "start + principles", "Within 0.01 nats", "Within 1000 nats", "At equal tokens"):
        assert text in table
    assert "0 of 2" in table  # nothing here gets to 1000 nats
    for view in ("kl_0.01", "kl_1000", "newest"):
        assert (root / "comparison" / view / "comparison.html").exists()
        assert f'href="{view}/comparison.html"' in (root / "comparison" / "comparison.html").read_text()
    # as many responses for the offline methods' data as others sample while they train
    answers = read(root / "data" / "responses" / "start" / "iter_0000.jsonl")
    assert sum(len(rollout.responses) for rollout in answers) == 2 * 16
    by_query = {rollout.query_id: rollout for rollout in answers}
    pairs = [json.loads(line) for line in (root / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    for pair in pairs:
        rewards = {r.text: r.reward for r in by_query[pair["id"]].responses}
        assert rewards[pair["chosen"]] == max(rewards.values()) > min(rewards.values()) == rewards[pair["rejected"]]
    rates = {method: views["newest"]["lr"] for method, views in read_json(root / "lrs.json")["methods"].items()}
    for method, lr in rates.items():
        for seed in (0, 1):
            folder = root / f"{method}__lr-{lr}__seed-{seed}"
            tested = responses.read(folder / "responses" / "trained", 2)
            assert tested.settings["seed"] == seed and tested.settings["iteration"] == 2
            assert (tested.settings["data"], tested.settings["second_reward"]) == ("tiny_heldout", "bag_of_words")
            assert len(tested.rollouts) == 8 and all(len(rollout.responses) == 2 for rollout in tested.rollouts)
            summary = read_json(folder / "summary.json")
            assert summary["queries"] == 16 and len(summary["points"]) == 5 and summary["stopped"] is None

    # the same command again: only the page is made anew. Then as if a run had been killed at its end
    logs = {path: path.read_text() for path in root.glob("*.log") if path.name != "comparison.log"}
    lost = root / f"ple__lr-{rates['ple']}__seed-1"
    (lost / "summary.json").unlink()
    alone = [word for word in arguments if word not in ("--keep", str(keep))]
    again = call(capsys, compare_methods.main, "--out", str(root), *alone)
    assert again.code == 0 and "nothing failed" in again.out and (lost / "summary.json").exists()
    assert [path.name for path, text in logs.items() if path.read_text() != text] == [f"{lost.name}.log"]

    # in another folder, with what was kept: nothing is run, and the tables are the same
    other = call(capsys, compare_methods.main, "--out", str(tmp_path / "other"), *arguments)
    assert other.code == 0 and {path.name for path in (tmp_path / "other").glob("*.log")} == {"comparison.log"}
    assert (tmp_path / "other" / "comparison" / "table.md").read_text() == table
    # answers that were not kept need the run's weights, which never are: it is trained again, and says the same
    (keep / f"{lost.name}__newest.tar.xz").unlink()
    third = call(capsys, compare_methods.main, "--out", str(tmp_path / "third"), *arguments)
    assert third.code == 0 and f"{lost.name} is trained again" in third.out
    assert (tmp_path / "third" / "comparison" / "table.md").read_text() == table
    # and what a finished OUT has is kept by the same command with --keep, where nothing was
    fourth = call(capsys, compare_methods.main, "--out", str(root), *arguments)
    assert fourth.code == 0 and (keep / f"{lost.name}__newest.tar.xz").exists()
