"""Every file that a run is resumed from, damaged: truncated, emptied, and with one bit changed.

Whatever the damage, the same command ends as an undisturbed run does, or with exit code 2 and one line that names the file.
Most of it is shown on the load path: what `Loaded` reads is all that the rest of a run depends on, so where that is the
same, so is its end. A sample goes through whole runs, and does what the line says.
"""

import contextlib
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ml_collections import FrozenConfigDict

from configs import tiny as tiny_config
from ple_jax import modes
from ple_jax.core import commits
from ple_jax.core.answers import Cache, key
from ple_jax.core.errors import Damaged, UserError
from ple_jax.core.identity import run_keys
from ple_jax.data.queries import draw
from ple_jax.training import loop, steps
from ple_jax.training.journal import Journal, check
from ple_jax.training.opening import open_run, read_inputs
from ple_jax.training.state import resume
from ple_jax.training.workdir import check_config

SAMPLE, ALL = 8, 80  # changed bits a kind of file, of the quick tests and of the slow ones


def lower_case(prompts, responses):
    """The share of lower-case letters; no value for a query of the first and third iteration, and for a held-out one."""
    return [
        float("nan") if prompt in ("my boat", "it grew") else sum(c.islower() for c in response) / 8
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def config(**more: Any) -> FrozenConfigDict:
    c = tiny_config.get_config()
    c.sinks = ()
    c.task.date = "2026-01-31"  # as a run keeps that of its first day
    c.reward.name, c.reward.kwargs, c.reward.max_bad_share = "test_damage:lower_case", {}, 0.5
    c.update(more)
    return FrozenConfigDict(c)


def outcome(path: Path) -> dict[str, bytes]:
    """What an undisturbed run and one that went on after damage must have in common."""
    found = [path / "adapter" / "adapter_model.safetensors"]
    found += [file for name in ("rollouts", "evaluations", "quarantine") for file in (path / name).iterdir()]
    return {str(file.relative_to(path)): file.read_bytes() for file in found}


def curve(path: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


class Stopped(Exception):
    pass


def stop_at(owner: Any, name: str, n: int, tell: Any = lambda *_: None) -> Any:
    """A context in which the n-th call of a function stops the run; 0: none does. `tell` is told what each is called on."""
    function, calls = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        tell(args[0])
        if len(calls) == n:
            raise Stopped
        return function(*args, **kwargs)

    patch = pytest.MonkeyPatch()
    patch.setattr(owner, name, call)
    return contextlib.closing(type("Undo", (), {"close": lambda _: patch.undo()})())


class Runs:
    """A whole run of a backend; one stopped in its third iteration while it samples, and one between two updates."""

    def __init__(self, backend: str, folder: Path):
        self.backend, self.whole = backend, folder / "whole"
        kept: list[str] = []
        with stop_at(Journal, "keep", 0, lambda journal: kept.append(f"{journal.path.parent.name}/{journal.path.stem}")):
            assert modes.train(config(), self.whole, backend) == 0
        assert kept.count("rollouts/iter_0002") > 1
        # before the last of what it samples is kept
        last = len(kept) - kept[::-1].index("rollouts/iter_0002")
        self.halves = {"sampling": (Journal, "keep", last), "updating": (steps, "step", 6)}
        for name, (owner, function, n) in self.halves.items():
            with stop_at(owner, function, n), pytest.raises(Stopped):
                modes.train(config(), folder / name, backend)
        self.folder = folder


@pytest.fixture(scope="module", params=["torch", pytest.param("jax", marks=pytest.mark.slow)])
def runs(request, tmp_path_factory) -> Runs:
    return Runs(request.param, tmp_path_factory.mktemp(request.param))


KINDS = {  # of file: which of a half-finished run's are damaged, the stage that it stopped in
    "rollouts": ("rollouts/iter_????.jsonl", "updating"),
    "partial journals": ("rollouts/*.partial.jsonl", "sampling"),
    "evaluations": ("evaluations/*.jsonl", "sampling"),
    "quarantine": ("quarantine/*.jsonl", "updating"),
    "metrics": ("metrics.jsonl", "sampling"),
    "config": ("config.json", "sampling"),
    "environment": ("environment.json", "sampling"),
    "rewards": ("rewards.sqlite", "sampling"),
    "checkpoints": ("checkpoints/2/**/*", "sampling"),
}


def files(path: Path, pattern: str) -> list[Path]:
    return sorted(file for file in path.glob(pattern) if file.is_file() and file.stat().st_size)


def damages(found: list[Path], count: int) -> Iterator[tuple[Path, str, bytes]]:
    """Files with what they hold after some damage: all of them truncated and emptied, and bits changed in some."""
    rng, whole = random.Random(0), {file: file.read_bytes() for file in found}
    for file, data in whole.items():
        yield file, "emptied", b""
        for cut in (1, len(data) // 2, data[:-1].rfind(b"\n") + 1):  # the last line is a whole one, too
            yield file, f"cut to {cut}", data[: cut or 2]
    for _ in range(count):
        file = rng.choice(found)
        data = bytearray(whole[file])
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        data[at] ^= 1 << bit
        yield file, f"bit {bit} of byte {at}", bytes(data)


class Meta:
    """A backend whose checkpoints are checked and whose arrays are not read: they are, where these are damaged."""

    def __init__(self, backend: Any, meta: dict[str, Any]):
        self.environment, self.meta = backend.environment, meta

    def restore(self, path: Path) -> dict[str, Any]:
        assert commits.newest(path) is not None
        return json.loads(json.dumps(self.meta))


class Loaded:
    """All that the rest of a run depends on, as it is read from a directory."""

    def __init__(self, run: Any, keys: dict[str, Any], path: Path, backend: Any):
        check_config(path, keys)
        session = run.session._replace(workdir=path)
        with Cache(path / "rewards.sqlite") as cache:
            self.state = resume(backend, session._replace(cache=cache))
            check(path, self.state.iteration)
            self.metrics = (path / "metrics.jsonl").read_bytes()
            journal = Journal(path / "rollouts", self.state.iteration)
            self.rollouts = journal.read()
            self.chunks = {} if self.rollouts else journal.finished()
            queries = draw(run.data.train, 8, seed=0, iteration=self.state.iteration)
            self.bad = loop.quarantined(journal, queries, self.rollouts) if self.rollouts else []
            self.evaluations = {i: self.evaluation(path, i) for i in (0, self.state.iteration)}
            there = [rollout for some in self.evaluations.values() for rollout in some or ()]
            texts = [(rollout.prompt, r.text) for rollout in there for r in rollout.responses]
            self.rewards = cache.get(key(run.reward.name, run.reward.version, *pair) for pair in texts)

    @staticmethod
    def evaluation(path: Path, iteration: int) -> Any:
        with contextlib.suppress(Damaged):  # it is made again: the policy is that of the checkpoint
            return Journal(path / "evaluations", iteration).read()

    def same_end(self, whole: "Loaded") -> bool:
        """Whether a run ends alike from here; what is not there is sampled and scored again, to the same."""
        texts = [repr(x) for x in (self.rollouts, self.bad, self.state, self.metrics)]  # as nan is not equal to itself
        wanted = [repr(x) for x in (whole.rollouts, whole.bad, whole.state, whole.metrics)]
        parts = [(self.chunks, whole.chunks), (self.rewards, whole.rewards)]
        parts.append(({k: v for k, v in self.evaluations.items() if v is not None}, whole.evaluations))
        return texts == wanted and all(repr(whole_[k]) == repr(v) for own, whole_ in parts for k, v in own.items())


@pytest.fixture
def load(runs, tmp_path, monkeypatch) -> Iterator[Any]:
    """(directory, whether arrays are read) -> what is loaded of it."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    inputs = read_inputs(config(), runs.backend)
    (tmp_path / "scratch").mkdir()
    with open_run(tmp_path / "scratch", runs.backend, inputs) as run:
        keys = run_keys(inputs.config, runs.backend, inputs.digests)
        meta = run.backend.restore(runs.folder / "sampling" / "checkpoints")

        def loaded(path: Path, arrays: bool) -> tuple[Loaded, dict[str, bytes]]:
            found = Loaded(run, keys, path, run.backend if arrays else Meta(run.backend, meta))
            return found, {name: x.tobytes() for name, x in run.backend.adapter().items()} if arrays else {}

        yield loaded


def damaged_ones_end_alike_or_say_so(runs: Runs, load: Any, tmp_path: Path, kind: str, count: int) -> None:
    pattern, stage = KINDS[kind]
    shutil.copytree(runs.folder / stage, tmp_path / "run")
    snapshot = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    arrays = kind == "checkpoints"
    whole, adapter = load(tmp_path / "run", arrays)
    assert whole.same_end(whole) and whole.state.iteration == 2 and len(whole.rewards) > 8
    outcomes = {"alike": 0, "said": 0}
    for file, what, data in damages(files(tmp_path / "run", pattern), count):
        for restored, was in snapshot.items():
            if not restored.exists() or restored.read_bytes() != was:
                restored.write_bytes(was)
        file.write_bytes(data)
        try:
            found, theirs = load(tmp_path / "run", arrays)
        except UserError as error:
            outcomes["said"] += 1
            assert file.name in str(error) and "\n" not in str(error), f"{file} {what}: {error}"
            assert re.search("remove|delete|put a copy of it back|belongs to another", str(error)), error
        else:
            outcomes["alike"] += 1
            assert found.same_end(whole) and theirs == adapter, f"{file} {what}"
    print(kind, outcomes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_damages(kind, runs, load, tmp_path):
    damaged_ones_end_alike_or_say_so(runs, load, tmp_path, kind, SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_damages(kind, runs, load, tmp_path):
    damaged_ones_end_alike_or_say_so(runs, load, tmp_path, kind, ALL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_run_goes_on_to_the_same_end(kind, runs, tmp_path):
    """And where it says what to remove, it does when that is removed."""
    pattern, stage = KINDS[kind]
    found = files(runs.folder / stage, pattern)
    some = random.Random(kind).sample(list(damages(found, 4)), 2)
    for number, (file, what, data) in enumerate(some):
        path = tmp_path / str(number)
        shutil.copytree(runs.folder / stage, path)
        (path / file.relative_to(runs.folder / stage)).write_bytes(data)
        accepted: list[str] = []
        for _ in range(3):
            try:
                assert modes.train(config(), path, runs.backend, accepted) == 0
                break
            except UserError as error:
                assert str(path) in str(error), f"{file} {what}: {error}"
                accepted = re.findall("--accept=(.*)", str(error))
                for name in told(str(error), path):
                    shutil.rmtree(name) if name.is_dir() else name.unlink()
        gone = set(outcome(runs.whole)) - set(outcome(path))
        assert {**outcome(runs.whole), **outcome(path)} == outcome(runs.whole), f"{file} {what}"
        assert all(name in ("rollouts/iter_0000.jsonl", "rollouts/iter_0001.jsonl") or "quarantine" in name or "0001" in name
                   for name in gone), gone  # fmt: skip
        assert curve(path) == curve(runs.whole)


def told(error: str, path: Path) -> list[Path]:
    """What a line tells to remove."""
    assert re.search(r"remove|delete", error), error
    return [Path(name) for name in re.findall(rf"({re.escape(str(path))}[^\s,:;()]*)", error) if Path(name) != path]
