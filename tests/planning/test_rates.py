"""Rates that runs leave for plans: measured of a run's metrics, kept and read again, and what a plan says of them."""

import json
import subprocess
import sys

import pytest

from ple_jax.configs import default
from ple_jax.planning import rates
from ple_jax.planning.rates import Rates, duration, expected

HERE = {"device": "cpu", "cores": 2}


SUMMARY = {"seconds": {"generate": 30.0, "update": 50.0}, "wall_seconds": 100.0}


def line(iteration, generate, train, score=0.5, calls=10, evaluate=4.0):
    speed = {"generate_tokens_per_second": generate, "train_tokens_per_second": train, "seconds_evaluate": evaluate}
    return {"iteration": iteration, **speed, "seconds_score": score, "total_reward_calls": calls * iteration}


def test_the_first_iteration_compiles_and_counts_only_alone():
    lines = [{"iteration": 0, "heldout_reward": 0.1}, line(1, 1.0, 2.0), line(2, 100.0, 50.0), line(3, 300.0, 70.0)]
    found = rates.measured(lines, HERE, SUMMARY, answers=80)
    assert (found.generate, found.train, found.score, found.device) == (200.0, 60.0, 20.0, "cpu, 2 cores")
    assert (found.evaluate, found.other) == (20.0, 0.25)
    assert rates.measured(lines[:2], HERE, SUMMARY, answers=80).generate == 1.0


def test_the_evaluated_iteration_may_be_one_without_rates():
    """One that was sampled before a kill and trained after it, where not every iteration is evaluated."""
    bare = [{k: v for k, v in line(i, 1.0, 2.0).items() if k != "seconds_evaluate"} for i in (1, 2)]
    whole = [{"iteration": 0, "seconds_evaluate": 8.0}, *bare, {"iteration": 3, "seconds_evaluate": 4.0}]
    assert rates.measured(whole, HERE, SUMMARY, answers=60).evaluate == 10.0
    assert rates.measured(bare, HERE, SUMMARY, answers=60) is None


@pytest.mark.parametrize("lines", [[], [{"iteration": 0}], [{"iteration": 1, "train_tokens_per_second": 5.0}]])
def test_a_run_that_sampled_nothing_has_none(lines):
    assert rates.measured(lines, HERE, SUMMARY, answers=80) is None


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ple_jax" / "rates.json"


def config(dtype="float32"):
    made = default.get_config()
    made.model.dtype = dtype
    return made


def test_they_are_kept_apart_by_what_they_depend_on(cache, monkeypatch):
    assert rates.read(config(), "jax") is None
    slow, fast = Rates(1.0, 2.0, 3.0, 4.0, 0.5, "2026-11-28", "cpu"), Rates(4.0, 5.0, 6.0, 7.0, 0.5, "2026-11-28", "cpu")
    rates.keep(config(), "jax", slow)
    rates.keep(config("bfloat16"), "jax", fast)
    rates.keep(config(), "jax", None)
    assert rates.read(config(), "jax") == slow
    assert rates.read(config("bfloat16"), "jax") == fast
    assert rates.read(config(), "torch") is None
    served = config()
    served.sampling.server = "http://localhost:8000"
    assert rates.read(served, "jax") is None  # its devices sample faster or slower than these
    rates.keep(served, "jax", fast)
    assert rates.read(served, "jax") == fast and rates.read(config(), "jax") == slow
    monkeypatch.setattr(rates.processor, "cores", lambda: 64)
    assert rates.read(config(), "jax") is None  # those of other cores are other ones


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1', "\0"])
def test_a_damaged_file_is_measured_again(cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    assert rates.read(config(), "jax") is None
    rates.keep(config(), "jax", Rates(1.0, 2.0, 3.0, 4.0, 0.5, "2026-11-28", "cpu"))
    assert rates.read(config(), "jax").train == 2.0


def test_those_of_another_version_are_none(cache):
    rates.keep(config(), "jax", Rates(1.0, 2.0, 3.0, 4.0, 0.5, "2026-11-28", "cpu"))
    cache.write_text(cache.read_text().replace("train", "trained"))
    assert rates.read(config(), "jax") is None


def test_a_folder_that_cannot_be_written_is_done_without(cache, monkeypatch):
    cache.parent.write_text("")
    rates.keep(config(), "jax", Rates(1.0, 2.0, 3.0, 4.0, 0.5, "2026-11-28", "cpu"))
    assert rates.read(config(), "jax") is None


def test_a_user_without_a_home_has_none(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", home)
    rates.keep(config(), "jax", Rates(1.0, 2.0, 3.0, 4.0, 0.5, "2026-11-28", "cpu"))
    assert rates.read(config(), "jax") is None


def test_what_a_plan_says():
    found = Rates(100.0, 50.0, 10.0, 2.0, 0.1, "2026-11-28", "cpu, 2 cores")
    said = expected(found, sampled=30_000, trained=15_000, scored=1000, evaluated=600)
    assert said.startswith(
        "at most 18 min (sampling 5 min, scoring 100 s, training 5 min, evaluating 5 min, all else 100 s)"
    )
    assert "100 tokens sampled and 50 trained on a second (cpu, 2 cores, 2026-11-28)" in said
    assert expected(None, sampled=1, trained=1, scored=1, evaluated=1).startswith("not known")


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (119.0, "119 s"), (120.0, "2 min"), (7200.0, "2.0 h"), (200_000.0, "2.3 days")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said


@pytest.mark.slow
def test_a_run_leaves_what_the_next_plan_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))

    def run(mode):
        command = ["--config=tiny", f"--workdir={tmp_path / 'run'}", f"--mode={mode}", "--config.iterations=2"]
        done = subprocess.run([sys.executable, "-m", "ple_jax.main", *command], capture_output=True, text=True, check=True)
        return next((line for line in done.stdout.splitlines() if "expected time" in line), "")

    assert "not known" in run("plan")
    run("train")
    (found,) = json.loads((tmp_path / "user" / "ple_jax" / "rates.json").read_text()).values()
    assert f"by {found['generate']:,.0f} tokens sampled" in run("plan")
