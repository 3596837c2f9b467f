"""Sweeps: grids, names and choices by hand; mistakes; a whole sweep."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from ple_jax.core.errors import UserError
from ple_jax.experiments import compare_methods, grid, sweep
from ple_jax.training.workdir import lock

ROOT = Path(__file__).parents[2]
TINY = "tiny"


class Ended(NamedTuple):
    """How a command line ended."""

    code: int
    out: str
    err: str


def call(capsys, main, *arguments: str) -> Ended:
    """Runs one of the two commands in this process."""
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    return Ended(code, *capsys.readouterr())


def test_grid():
    assert grid.grid(["optimizer.lr=1e-3,3e-3", "seed=0, 1"]) == [
        {"optimizer.lr": "1e-3", "seed": "0"},
        {"optimizer.lr": "1e-3", "seed": "1"},
        {"optimizer.lr": "3e-3", "seed": "0"},
        {"optimizer.lr": "3e-3", "seed": "1"},
    ]
    axis = "lora.targets=('q_proj','v_proj'),('all-linear',)"
    assert [point["lora.targets"] for point in grid.grid([axis])] == ["('q_proj','v_proj')", "('all-linear',)"]
    assert grid.grid(["reward.kwargs={'a': [1, 2], 'b': '='}"]) == [{"reward.kwargs": "{'a': [1, 2], 'b': '='}"}]


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
        grid.grid(axes)


def test_names_of_folders():
    assert grid.name_of({"optimizer.lr": "1e-3", "seed": "0"}) == "optimizer.lr-1e-3__seed-0"
    # what --runs could not hold, or a folder, is lost, and a digest keeps the names apart
    names = [grid.name_of({"task.train": value}) for value in ("a/b", "a,b", "a b", "x" * 300, "x" * 301)]
    assert len(set(names)) == 5 and names[0].startswith("task.train-a_b-")
    assert all(len(name) < 200 and not set(name) & set("/,= ") for name in names)


def test_the_best_point_is_that_of_the_best_mean_over_seeds():
    points = grid.grid(["lr=1,2,3", "seed=0,1"])
    assert grid.best(points, [0.1, 0.5, 0.2, 0.6, 0.9, math.nan]) == ({"lr": "2"}, [0.2, 0.6])  # 3 lacks a seed
    assert grid.best(points, [0.1, 0.5, 0.2, 0.6, 0.9, math.nan], lowest=True) == ({"lr": "1"}, [0.1, 0.5])
    assert grid.best(points, [1.0, 0.0, 0.0, 1.0, 0.5, 0.5]) == ({"lr": "1"}, [1.0, 0.0])
    assert grid.best(points, [math.nan] * 6) is None
    seeds_first = grid.grid(["seed=0,1", "lr=1,2"])
    assert grid.best(seeds_first, [0.0, 0.3, 1.0, 0.4]) == ({"lr": "1"}, [0.0, 1.0])


def test_numbers_of_summaries():
    assert [grid.number(value) for value in (1, 0.5)] == [1.0, 0.5]
    assert all(math.isnan(grid.number(value)) for value in (None, "0.5", [1], {}))


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
def test_mistakes_cost_no_run(capsys, tmp_path, arguments, says):
    found = call(capsys, sweep.main, "--config", TINY, "--out", str(tmp_path / "out"), *arguments)
    assert found.code == 2 and says in found.err and found.err.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_out_must_be_a_folder_of_its_own(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    found = call(capsys, sweep.main, "--config", TINY, "--out", str(tmp_path / "file"), "--grid", "seed=0")
    assert found.code == 2 and "is a file" in found.err
    with lock(tmp_path / "busy"):
        found = call(capsys, sweep.main, "--config", TINY, "--out", str(tmp_path / "busy"), "--grid", "seed=0")
    assert found.code == 2 and f"--out={tmp_path / 'busy'} is in use by process {os.getpid()}" in found.err


@pytest.mark.parametrize("module", [sweep, compare_methods])
def test_a_module_and_its_door_are_the_same_command(tmp_path, module):
    """From a folder that is no checkout."""
    name = module.__name__.rpartition(".")[2]
    ended = [
        subprocess.run(
            [sys.executable, *start, "--config", TINY, "--out", "out", "--", "--mode=plan"],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        )
        for start in (["-m", module.__name__], [str(ROOT / "scripts" / f"{name}.py")])
    ]  # fmt: skip
    assert [found.returncode for found in ended] == [2, 2]
    assert ended[0].stderr == ended[1].stderr and ended[0].stderr.startswith("error: ")


@pytest.mark.slow
def test_a_sweep_of_which_one_point_fails(capsys, tmp_path):
    (tmp_path / "of_mine.py").write_text("def score(prompts, responses, **_):\n    raise OSError('the lexicon is gone')\n")
    failing = f"{tmp_path}/of_mine.py:score"
    arguments = ["--config", TINY, "--out", str(tmp_path), "--grid", f"reward.name=letters,{failing}"]
    arguments += ["--", "--config.iterations=1", "--config.sinks=()"]
    found = call(capsys, sweep.main, *arguments)
    assert found.code == 1, found.err
    good, bad = "reward.name-letters", grid.name_of({"reward.name": failing})
    value = json.loads((tmp_path / good / "summary.json").read_text())["heldout_reward_after"]
    assert f"best: --config.reward.name=letters, {value:.4f} over 1 runs" in found.out
    assert f"{bad}: exit code 2, error: " in found.out and "the lexicon is gone" in found.out
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["mean"] == value and best["overrides"] == {"reward.name": "letters"}
    assert best["flags"] == ["--config.reward.name=letters"] and best["select"] == "heldout_reward_after"
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["point"], row["reward.name"], row["exit_code"]) for row in rows] == [
        (good, "letters", "0"),
        (bad, failing, "2"),
    ]
    assert float(rows[0]["heldout_reward_after"]) == value and rows[1]["heldout_reward_after"] == ""

    before = (tmp_path / f"{good}.log").read_text()
    again = call(capsys, sweep.main, *arguments[:6], "--select", "heldout_reward_afterr", *arguments[6:])
    assert again.code == 1 and "did you mean 'heldout_reward_after'?" in again.out
    assert "1 of 2 are done already" in again.out and (tmp_path / f"{good}.log").read_text() == before
    assert not (tmp_path / "best.json").exists()
