"""`kill -9` anywhere, the same command again: the same adapter, bit for bit. Signals, the lock, and the work directory."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import LAST_RESORT
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
# one device: what is compared must not depend on the eight that other tests simulate
ENVIRONMENT = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
NEVER = ("ple_jax.training.journal:Journal.keep", 0, "before")


def command(workdir: Path, *extra: str) -> list[str]:
    newest = "--config.checkpoint.use=newest"  # the adapter is of all steps
    return ["--config", str(ROOT / "configs" / "tiny.py"), "--workdir", str(workdir), newest, *extra]


def run(workdir: Path, *extra: str, at: tuple[str, int, str] = NEVER) -> subprocess.CompletedProcess[str]:
    driver = [sys.executable, str(ROOT / "tests" / "killed.py"), at[0], str(at[1]), at[2]]
    environment = ENVIRONMENT | {"GENERATED": str(workdir) + ".rows"}
    return subprocess.run([*driver, *command(workdir, *extra)], env=environment, capture_output=True, text=True)


def rows(workdir: Path) -> int:
    """Responses that have ended so far, over all processes."""
    return sum(int(line.split()[1]) for line in Path(f"{workdir}.rows").read_text().splitlines())


def first_kept(workdir: Path, journal: str) -> int:
    """Which call of Journal.keep of a whole run was the first of a journal, of which there were more."""
    names = [line.split()[0] for line in Path(f"{workdir}.rows").read_text().splitlines()]
    assert names.count(journal) > 1
    return names.index(journal) + 1


def outcome(workdir: Path) -> dict[str, bytes]:
    """Everything that must not depend on interruptions."""
    files = [workdir / "adapter" / "adapter_model.safetensors"]
    files += sorted((workdir / "rollouts").iterdir()) + sorted((workdir / "evaluations").iterdir())
    return {str(file.relative_to(workdir)): file.read_bytes() for file in files}


def curve(workdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    result = run(workdir)
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "n", "when"),
    [
        # of the second iteration's responses the first that ended are on disk, the others are not
        pytest.param("ple_jax.training.journal:Journal.keep", None, "after", id="inside the sampling of an iteration"),
        pytest.param("ple_jax.backend.backend:JaxBackend.update", 4, "after", id="between the optimiser steps"),
        pytest.param("orbax.checkpoint:CheckpointManager.wait_until_finished", 3, "before", id="around a commit"),
        pytest.param("ple_jax.training.measures:evaluate", 3, "before", id="after a commit, before its evaluation"),
    ],
)
def test_killed_and_continued(where, n, when, tmp_path, uninterrupted):
    workdir = tmp_path / "killed"
    n = n or first_kept(uninterrupted, "rollouts/iter_0001")
    assert run(workdir, at=(where, n, when)).returncode == -signal.SIGKILL
    assert not (workdir / "summary.json").exists()
    again = run(workdir)
    assert again.returncode == 0, again.stderr
    assert outcome(workdir) == outcome(uninterrupted)
    assert curve(workdir) == curve(uninterrupted)
    # what had ended is not sampled again
    assert rows(workdir) == rows(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "until"),
    [
        (signal.SIGTERM, "load: "),
        (signal.SIGINT, "[0/3] evaluate"),
        (signal.SIGTERM, "iteration 1/3"),
        (signal.SIGINT, "iteration 1/3"),
    ],
)
def test_signals(number, until, tmp_path, uninterrupted):
    workdir = tmp_path / "stopped"
    arguments = [sys.executable, "-m", "ple_jax.main", *command(workdir)]
    with subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while until not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        started = time.monotonic()
        _, error = process.communicate(timeout=LAST_RESORT)
    assert time.monotonic() - started < 30
    assert process.returncode == 128 + number
    assert "give the same command again to continue" in error and "Traceback" not in error
    assert run(workdir).returncode == 0
    assert outcome(workdir) == outcome(uninterrupted)


def test_a_finished_directory_does_nothing(uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file() and path.name != ".lock"}
    result = run(uninterrupted)
    assert result.returncode == 0 and "is finished" in result.stdout
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_directory_of_another_config_is_refused(uninterrupted):
    result = run(uninterrupted, "--config.ple.tau_0=0.3", "--config.seed=7")
    assert result.returncode == 2
    assert "differing in ple.tau_0, seed" in result.stderr and len(result.stderr.splitlines()) == 1


def test_one_writer(tmp_path):
    workdir = tmp_path / "busy"
    workdir.mkdir()
    with (workdir / ".lock").open("w") as lock:
        lock.write("node-3:4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run(workdir)
    assert result.returncode == 2
    assert "in use by process 4711 on node-3; wait for it" in result.stderr and len(result.stderr.splitlines()) == 1


def test_the_work_directory_is_as_documented(uninterrupted):
    expected = {
        "adapter", "best", "checkpoints", "config.json", "environment.json", "evaluations", "metrics.jsonl", "report.html",
        "rewards.sqlite", "rollouts", "summary.json", "tensorboard", ".lock",
    }  # fmt: skip
    assert {p.name for p in uninterrupted.iterdir()} == expected
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert {
        "algorithm", "backend", "seed", "heldout_reward_before", "heldout_reward_after", "heldout_gain_ci95", "iterations",
        "generated_tokens", "training_tokens", "wall_seconds", "peak_memory_bytes",
    } <= set(summary)  # fmt: skip
    low, high = summary["heldout_gain_ci95"]
    assert low <= summary["heldout_reward_after"] - summary["heldout_reward_before"] <= high
    assert [line["iteration"] for line in curve(uninterrupted)] == [0, 1, 2, 3]
    lines = [json.loads(line) for line in (uninterrupted / "rollouts" / "iter_0002.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    for line in lines:
        plain, principled = line["responses"]
        assert (plain["kind"], principled["kind"]) == ("plain", "principled")
        assert line["margin"] == principled["score"] - plain["score"]
        assert line["tau"] == pytest.approx(0.2 * 0.9**2)
        assert line["decision"] == ("ranked" if line["margin"] > line["tau"] else "blended")
    tokens = [r["tokens"] for name in range(3) for line in (uninterrupted / "rollouts" / f"iter_{name:04d}.jsonl")
              .read_text().splitlines() for r in json.loads(line)["responses"]]  # fmt: skip
    assert summary["generated_tokens"] == sum(map(len, tokens))


def test_no_principle_at_training(uninterrupted):
    """What is trained on is the plain prompt: the bytes of the query and nothing else."""
    for line in (uninterrupted / "rollouts" / "iter_0000.jsonl").read_text().splitlines():
        rollout = json.loads(line)
        assert bytes(rollout["prompt_tokens"]).decode() == rollout["prompt"]


@pytest.mark.slow
def test_modes_on_a_finished_run(uninterrupted):
    for mode, said in {"evaluate": "held-out reward", "generate": "kept in", "export": "PEFT layout"}.items():
        result = run(uninterrupted, f"--mode={mode}")
        assert result.returncode == 0 and said in result.stdout, result.stderr
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert f"{summary['heldout_reward_after']:.4f}" in run(uninterrupted, "--mode=evaluate").stdout
    adapter = load_file(uninterrupted / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 7 and all(adapter[n].any() for n in adapter if "lora_B" in n)


def test_modes_need_a_run(tmp_path):
    result = run(tmp_path / "nothing", "--mode=evaluate")
    assert result.returncode == 2 and "holds no run" in result.stderr and len(result.stderr.splitlines()) == 1
