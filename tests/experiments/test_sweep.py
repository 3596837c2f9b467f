"""Sweeps and the comparison's script: grids, choices and budgets by hand; what runs, waits or stops; whole runs."""

import csv
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ple_jax import algorithms
from ple_jax.core.errors import UserError
from ple_jax.core.files import read_json
from ple_jax.core.types import Response, Rollout
from ple_jax.evaluation import responses
from ple_jax.training import opening
from ple_jax.training.journal import read
from ple_jax.training.workdir import lock

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))
import compare_quickstart  # noqa: E402
import sweep  # noqa: E402

TINY = str(ROOT / "configs" / "tiny.py")


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip


# ---------------------------------------------------------------- the grid


def test_grid():
    assert sweep.grid(["optimizer.lr=1e-3,3e-3", "seed=0, 1"]) == [
        {"optimizer.lr": "1e-3", "seed": "0"},
        {"optimizer.lr": "1e-3", "seed": "1"},
        {"optimizer.lr": "3e-3", "seed": "0"},
        {"optimizer.lr": "3e-3", "seed": "1"},
    ]
    axis = "lora.targets=('q_proj','v_proj'),('all-linear',)"
    assert [point["lora.targets"] for point in sweep.grid([axis])] == ["('q_proj','v_proj')", "('all-linear',)"]
    assert sweep.grid(["reward.kwargs={'a': [1, 2], 'b': '='}"]) == [{"reward.kwargs": "{'a': [1, 2], 'b': '='}"}]


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        ([], "--grid KEY=VALUE,VALUE is missing"),
        (["seed"], "--grid 'seed' must read like"),
        (["seed="], "--grid 'seed=' must read like"),
        (["=1"], "--grid '=1' must read like"),
        (["seed=1,,2"], "values that differ"),
        (["seed=1,1"], "values that differ"),
        (["seed=1", "seed=2"], "a key of its own"),
    ],
)
def test_grids_that_are_none(axes, says):
    with pytest.raises(UserError, match=says):
        sweep.grid(axes)


def test_names_of_folders():
    assert sweep.name_of({"optimizer.lr": "1e-3", "seed": "0"}) == "optimizer.lr-1e-3__seed-0"
    # what --runs could not hold, or a folder, is lost, and a digest keeps the names apart
    names = [sweep.name_of({"task.train": value}) for value in ("a/b", "a,b", "a b", "x" * 300, "x" * 301)]
    assert len(set(names)) == 5 and names[0].startswith("task.train-a_b-")
    assert all(len(name) < 200 and not set(name) & set("/,= ") for name in names)


def test_the_best_point_is_that_of_the_best_mean_over_seeds():
    points = sweep.grid(["lr=1,2,3", "seed=0,1"])
    assert sweep.best(points, [0.1, 0.5, 0.2, 0.6, 0.9, math.nan]) == ({"lr": "2"}, [0.2, 0.6])  # 3 lacks a seed
    assert sweep.best(points, [0.1, 0.5, 0.2, 0.6, 0.9, math.nan], lowest=True) == ({"lr": "1"}, [0.1, 0.5])
    assert sweep.best(points, [1.0, 0.0, 0.0, 1.0, 0.5, 0.5]) == ({"lr": "1"}, [1.0, 0.0])
    assert sweep.best(points, [math.nan] * 6) is None
    seeds_first = sweep.grid(["seed=0,1", "lr=1,2"])
    assert sweep.best(seeds_first, [0.0, 0.3, 1.0, 0.4]) == ({"lr": "1"}, [0.0, 1.0])


def test_numbers_of_summaries():
    assert [sweep.number(value) for value in (1, 0.5)] == [1.0, 0.5]
    assert all(math.isnan(sweep.number(value)) for value in (None, "0.5", [1], {}))


# ---------------------------------------------------------------- jobs, with programs that stand in for a run

PROGRAM = """
import json, sys
from pathlib import Path
folder, code = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir(exist_ok=True)
with (folder / "calls").open("a") as file:
    file.write("x")
print("first\\nlast words\\n")
if not code:
    (folder / "summary.json").write_text("{}")
sys.exit(code)
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """(name, exit code, program) -> a job; what it was asked for is in job.arguments."""
    monkeypatch.setattr(sweep, "_asked", lambda job: json.dumps(job.arguments))
    monkeypatch.setattr(sweep, "command", lambda job: [sys.executable, "-c", *job.arguments])

    def make(name: str, code: int = 0, program: str = PROGRAM) -> sweep.Job:
        return sweep.Job(name, (program, str(tmp_path / name), str(code)), tmp_path / name, "summary.json")

    return make


def calls(*some: sweep.Job) -> list[int]:
    return [len((job.workdir / "calls").read_text()) for job in some]


def test_what_is_done_is_not_run_again(jobs, tmp_path, capsys):
    good, bad = jobs("good"), jobs("bad", 3)
    ended = sweep.run([bad, good], tmp_path)
    assert list(ended.items()) == [("bad", (3, "last words")), ("good", (0, ""))]
    shown = capsys.readouterr().out
    assert "[1/2] bad: exit code 3, last words (all of it is in" in shown and "[2/2] good: done after" in shown
    assert (tmp_path / "good.log").read_text() == "first\nlast words\n\n"

    assert sweep.run([bad, good], tmp_path) == ended
    assert calls(good, bad) == [1, 2]
    assert "1 of 2 are done already" in capsys.readouterr().out
    # of another command nothing is known
    other = good._replace(arguments=(*good.arguments, "more"))
    assert sweep.run([other], tmp_path)["good"].code == 0 and calls(good) == [2]
    other.result.unlink()
    assert sweep.run([other], tmp_path)["good"].code == 0 and calls(good) == [3]


def test_a_mistake_is_said_before_anything_runs(jobs, tmp_path, monkeypatch):
    def asked(job):
        if job.name == "second":
            raise UserError("no such key")

    monkeypatch.setattr(sweep, "_asked", asked)
    with pytest.raises(UserError, match="no such key"):
        sweep.run([jobs("first"), jobs("second")], tmp_path)
    assert not (tmp_path / "first").exists()


# is alone, or fails
ALONE = """
import fcntl, sys
from pathlib import Path
with (Path(sys.argv[1]).parent / "one_at_a_time").open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    sum(range(3_000_000))
"""
# ends when another one has begun
TOGETHER = """
import sys, time
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir()
for _ in range(3000):
    if len(list(folder.parent.glob("both_?"))) == 2:
        sys.exit(0)
    time.sleep(0.01)
sys.exit(1)
"""


def test_so_many_at_a_time(jobs, tmp_path):
    ended = sweep.run([jobs(f"alone_{i}", program=ALONE) for i in range(4)], tmp_path)
    assert [outcome.code for outcome in ended.values()] == [0] * 4
    ended = sweep.run([jobs(f"both_{i}", program=TOGETHER) for i in range(2)], tmp_path, parallel=2)
    assert [outcome.code for outcome in ended.values()] == [0] * 2


def test_a_process_that_outlived_its_script_is_waited_for(jobs, tmp_path, monkeypatch):
    job, waited = jobs("job"), []
    job.workdir.mkdir()
    holder = (job.workdir / ".lock").open("w")
    fcntl.flock(holder, fcntl.LOCK_EX)

    class Event(threading.Event):
        def wait(self, timeout=None):
            if timeout == 1.0:  # and not one of a future or a thread
                waited.append((job.workdir / "calls").exists())
                holder.close()
                return False
            return super().wait(timeout)

    monkeypatch.setattr(sweep.threading, "Event", Event)
    assert sweep.run([job], tmp_path)["job"].code == 0
    assert waited == [False] and calls(job) == [1]


STOPPED = """
import os, signal, sys
from pathlib import Path

sys.path.append({scripts!r})
import sweep

out = Path({out!r})
child = '''
import os, signal, sys
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
if (folder / "stopped").exists():
    (folder / "summary.json").write_text("")
    sys.exit(0)
def stop(number, frame):
    (folder / "stopped").write_text("")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
os.kill(os.getppid(), {number})
signal.pause()
'''
sweep._asked = lambda job: job.name
sweep.command = lambda job: [sys.executable, "-c", child, str(job.workdir)]
with sweep.reported(out):
    ended = sweep.run([sweep.Job(name, (), out / name, "summary.json") for name in ("one", "two")], out)
    sys.exit(sum(outcome.code for outcome in ended.values()))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_what_runs_and_starts_nothing_more(tmp_path, number):
    source = STOPPED.format(scripts=str(ROOT / "scripts"), out=str(tmp_path), number=int(number))

    def again():
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=120)

    found = again()
    assert found.returncode == 130 and found.stderr.count("\n") == 1 and "give the same command again" in found.stderr
    assert (tmp_path / "one" / "stopped").exists() and not (tmp_path / "two").exists()
    found = again()  # goes on with the first, and the second asks for a stop in turn
    assert found.returncode == 130 and (tmp_path / "one.done").exists() and (tmp_path / "two" / "stopped").exists()
    found = again()
    assert found.returncode == 0 and "1 of 2 are done already" in found.stdout


def test_overrides_and_nothing_else():
    assert sweep.overrides(["--config.seed=1", "--noconfig.task.chat"]) == ("--config.seed=1", "--noconfig.task.chat")
    with pytest.raises(UserError, match="'--mode=plan' after `--`"):
        sweep.overrides(["--config.seed=1", "--mode=plan"])


# ---------------------------------------------------------------- a whole sweep


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--grid", "ple.tau0=0.1,0.2"], "unknown key in '--config.ple.tau0=0.1'; did you mean 'ple.tau_0'?"),
        (["--grid", "seed=0", "--", "--config.plee.tau_0=1"], "did you mean 'ple.tau_0'?"),
        (["--grid", "optimizer.batch_queries=4,3"], "queries_per_iteration is 8 but must be a multiple of"),
        (["--grid", "seed=0", "--config", "nowhere.py"], "config file 'nowhere.py' does not exist"),
        (["--grid", "seed=0", "--", "--workdir=x"], "'--workdir=x' after `--`"),
        ([], "--grid KEY=VALUE,VALUE is missing"),
    ],
)
def test_mistakes_cost_no_run(tmp_path, arguments, says):
    found = script("sweep.py", "--config", TINY, "--out", str(tmp_path / "out"), *arguments)
    assert found.returncode == 2 and says in found.stderr and found.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_out_must_be_a_folder_of_its_own(tmp_path):
    (tmp_path / "file").write_text("")
    found = script("sweep.py", "--config", TINY, "--out", str(tmp_path / "file"), "--grid", "seed=0")
    assert found.returncode == 2 and "is a file" in found.stderr
    with lock(tmp_path / "busy"):
        found = script("sweep.py", "--config", TINY, "--out", str(tmp_path / "busy"), "--grid", "seed=0")
    assert found.returncode == 2 and f"--out={tmp_path / 'busy'} is in use by process {os.getpid()}" in found.stderr


@pytest.mark.slow
def test_a_sweep_of_which_one_point_fails(tmp_path):
    arguments = ["--config", TINY, "--out", str(tmp_path), "--grid", "optimizer.lr=1e-2,1e30"]
    arguments += ["--", "--config.iterations=1", "--config.sinks=()"]
    found = script("sweep.py", *arguments)
    assert found.returncode == 1, found.stderr
    good, bad = "optimizer.lr-1e-2", "optimizer.lr-1e30"
    value = json.loads((tmp_path / good / "summary.json").read_text())["heldout_reward_after"]
    assert f"best: --config.optimizer.lr=1e-2, {value:.4f} over 1 runs" in found.stdout
    assert f"{bad}: exit code 2, error: optimiser step 1" in found.stdout
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["mean"] == value and best["overrides"] == {"optimizer.lr": "1e-2"}
    assert best["flags"] == ["--config.optimizer.lr=1e-2"] and best["select"] == "heldout_reward_after"
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["point"], row["optimizer.lr"], row["exit_code"]) for row in rows] == [
        (good, "1e-2", "0"),
        (bad, "1e30", "2"),
    ]
    assert float(rows[0]["heldout_reward_after"]) == value and rows[1]["heldout_reward_after"] == ""

    before = (tmp_path / f"{good}.log").read_text()
    again = script("sweep.py", *arguments[:6], "--select", "heldout_reward_afterr", *arguments[6:])
    assert again.returncode == 1 and "did you mean 'heldout_reward_after'?" in again.stdout
    assert "1 of 2 are done already" in again.stdout and (tmp_path / f"{good}.log").read_text() == before
    assert not (tmp_path / "best.json").exists()


# ---------------------------------------------------------------- the comparison's parts


def settings(out: Path, *given: str, methods: str = "all", **options) -> compare_quickstart.Settings:
    file = str(ROOT / "configs" / "quickstart.py")
    config = sweep.parsed((f"--config={file}", "--mode=plan", *given)).config
    values = {
        "out": out, "file": file, "config": config, "given": given, "backend": "jax", "seeds": ["0", "1"],
        "methods": compare_quickstart.chosen(methods), "lrs": ["1e-4", "1e-3"], "responses": 96, "steps": 6,
        "test_data": "quickstart_test", "samples": 4, "second_reward": "bag_of_words",
    }  # fmt: skip
    return compare_quickstart.Settings(**values | options)


@pytest.fixture
def out(tmp_path):
    for name in ("pairs", "sft"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "completion": " b"}\n')
    return tmp_path


@pytest.mark.parametrize("name", compare_quickstart.METHODS)
def test_every_method_has_the_same_budget(out, name):
    job = compare_quickstart.training(settings(out), name, "1e-3", "1")
    asked = sweep.parsed(job.arguments)
    config, method = asked.config, compare_quickstart.METHODS[name]
    slots = algorithms.load_algorithm(config.algorithm).collect(config)
    sampled = [slot for slot in slots if slot.source == "policy"]
    assert config.iterations * config.queries_per_iteration * len(sampled) == (0 if method.data else 480)
    assert config.queries_per_iteration == (48 if method.data else 96 // len(sampled))
    assert config.queries_per_iteration // config.optimizer.batch_queries == 6
    assert (config.optimizer.lr, config.seed) == (1e-3, 1)
    assert (asked.backend, config.trainer) == (("torch", "trl") if name.startswith("trl_") else ("jax", "own"))
    if method.data:
        needs = {"sft": "completion", "dpo": "pair"}[config.algorithm]
        assert opening._needs(slots) == needs and config.task.train == str(out / f"{method.data}.jsonl")
        assert method.data == {"completion": "sft", "pair": "pairs"}[needs]
    else:
        assert config.task.train == "quickstart_train"
    # the test asks the same run, and differs in what it asks for alone
    test = sweep.parsed(compare_quickstart.training(settings(out), name, "1e-3", "1", test=True).arguments)
    assert (test.mode, test.workdir, test.backend) == ("generate", asked.workdir, asked.backend)
    assert {k: v for k, v in test.config.to_dict().items() if k != "generate"} == {
        k: v for k, v in config.to_dict().items() if k != "generate"
    }
    assert (test.config.generate.data, test.config.generate.samples) == ("quickstart_test", 4)
    assert (test.config.generate.policy, test.config.generate.second_reward) == ("trained", "bag_of_words")


@pytest.mark.slow
def test_trl_has_what_its_methods_ask_for(out):
    from torch_ascend import baselines

    names = [name for name in compare_quickstart.METHODS if name.startswith("trl_")]
    for name in names:
        baselines.check(sweep.parsed(compare_quickstart.training(settings(out), name, "1e-3", "0").arguments).config)
    assert len(names) == 4


def test_ablations_differ_from_ple_in_one_thing(out):
    def flat(name):
        job = compare_quickstart.training(settings(out), name, "1e-3", "0")
        return sweep.parsed(job.arguments).config.ple.to_dict()

    ple = flat("ple")
    found = {
        name: {key: value for key, value in flat(name).items() if value != ple[key]}
        for name, method in compare_quickstart.METHODS.items()
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
    config = sweep.parsed(
        compare_quickstart.training(settings(out, *given), "self_distillation", "1e-3", "0").arguments
    ).config
    assert (config.queries_per_iteration, config.optimizer.batch_queries, config.optimizer.micro_queries) == (96, 16, 4)
    assert config.lora.rank == 2


def test_budgets_that_do_not_divide():
    with pytest.raises(UserError, match="--responses=96 must be a multiple of 40: ple_percentile takes 8 a query"):
        compare_quickstart.budget("ple_percentile", responses=96, steps=5, micro=8)
    assert compare_quickstart.budget("ppo", responses=30, steps=2, micro=8) == {
        "queries_per_iteration": "30",
        "optimizer.batch_queries": "15",
        "optimizer.micro_queries": "5",
    }


def test_methods_by_name():
    everything = compare_quickstart.chosen("all")
    assert everything == list(compare_quickstart.METHODS) and len(everything) == 20
    main = compare_quickstart.chosen("main")
    assert [name for name in everything if name not in main] == [n for n in everything if n.startswith("ple_")]
    assert compare_quickstart.chosen("sft, ple") == ["ple", "sft"]
    with pytest.raises(UserError, match="'dpo_offlne' is none of main, all, ple.*did you mean 'dpo_offline'"):
        compare_quickstart.chosen("ple,dpo_offlne")


def test_the_start_model_with_and_without_principles(out):
    for principled in (False, True):
        job = compare_quickstart.starting(settings(out), principled=principled)
        asked = sweep.parsed(job.arguments)
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
    s = settings(out, methods="ple,raft,sft,ppo,grpo", lrs=["1e-4", "1e-3", "1e-2"])
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
            ended[job.name] = sweep.Outcome(code)
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
def test_mistakes_of_a_comparison_cost_no_run(tmp_path, arguments, says):
    found = script("compare_quickstart.py", "--config", TINY, "--out", str(tmp_path), *arguments)
    assert found.returncode == 2 and says in found.stderr and found.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_whole_comparison(tmp_path):
    arguments = ["--config", TINY, "--out", str(tmp_path), "--methods", "ple,dpo_offline", "--seeds", "0,1", "--lrs", "1e-2"]
    arguments += ["--responses", "16", "--steps", "2", "--samples", "2", "--test-data", "tiny_heldout", "--jobs", "2"]
    arguments += ["--", "--config.iterations=2", "--config.sinks=()"]
    found = script("compare_quickstart.py", *arguments)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "nothing failed" in found.stdout and (tmp_path / "comparison" / "comparison.html").exists()
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
    again = script("compare_quickstart.py", *arguments)
    assert again.returncode == 0 and "nothing failed" in again.stdout and (lost / "summary.json").exists()
    assert [path.name for path, text in logs.items() if path.read_text() != text] == ["ple__lr-1e-2__seed-1.log"]
