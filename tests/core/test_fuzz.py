"""Every key of the rule table with values that it cannot have, or hardly: one line that says so, or accepted and run.

In process as far as the entry's checking goes (parse, validate, read the inputs); some of what is accepted as processes.
"""

import contextlib
import functools
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from configs import tiny
from ple_jax import main
from ple_jax.core.config import RULES, flatten, validate
from ple_jax.core.errors import UserError
from ple_jax.training.opening import read_inputs

ROOT = Path(__file__).parents[2]
VALUES = (  # of every type, below and above everything
    None, True, -1, 0, 1, 3, 0.5, -0.5, 1e-300, 1e300, 10**20, 10**400, math.nan, math.inf, -math.inf, "", "text",
    "no/such.jsonl", "user/name", "a\0b", "\ud800", "x" * 300, "/" + "x" * 300, (), [], ("a",), (1, 2), ((1, 2),),
    (("(", 1),), {}, {"a": 1}, {"a": {"b": math.nan}}, {1: 2},
)  # fmt: skip
WORDS = (  # as they are written on a command line
    "", "-1", "0", "1e20", "nan", "inf", "-inf", "1" * 400, "text", "None", "True", "()", "('a',)", "(1", "{}", "{'a': 1}",
    "[[", "x" * 300, "user/name", "\udcff",
)  # fmt: skip
FORMS = (  # of a flag, and what stands for a key
    "--config.{}={}", "--config.{} {}", "-config.{}={}", "--noconfig.{}={}", "--config.{}", "--config.{}.more={}",
    "--config.x{}={}", "--conf.{}={}", "config.{}={}",
)  # fmt: skip


def kept(items, share):
    """About so large a share of the items, spread evenly and the same in every run."""
    items = list(items)
    order = np.random.default_rng(0).permutation(len(items))
    return [items[i] for i in sorted(order[: max(1, round(share * len(items)))])]


def singles():
    return itertools.product(RULES, VALUES)


def changed(changes):
    """The tiny config with some keys changed, whatever their types; None where ConfigDict itself refuses."""
    config = tiny.get_config()
    with config.ignore_type(), contextlib.suppress(TypeError, ValueError, OverflowError, KeyError):
        for key, value in changes.items():
            *parents, name = key.split(".")
            functools.reduce(getattr, parents, config)[name] = ConfigDict(value) if isinstance(value, dict) else value
        return config
    return None


def outcome(check):
    """What a check gives; None where it is refused in one line. Anything else is a traceback, and fails the test."""
    try:
        return check()
    except UserError as error:
        assert "\n" not in str(error).strip() and len(str(error)) < 4000, str(error)
        return None


def accepted(changes, *, read=False):
    config = changed(changes)
    if config is None:
        return False

    def check():
        validate(config)
        if read:
            read_inputs(FrozenConfigDict(config), "jax")
        return True

    return bool(outcome(check))


def in_turn(*, read):
    """Changes that are accepted, without end in sight: a key alone, and two that are accepted alone, in turn."""
    cases, alone = list(singles()), []
    for i in np.random.default_rng(1).permutation(len(cases)):
        key, value = cases[i]
        if accepted({key: value}, read=read):
            alone.append((key, value))
            yield {key: value}
            if len(alone) > 1 and accepted(pair := dict(alone[-2:]), read=read):
                yield pair


@pytest.mark.parametrize("share", [0.15, pytest.param(1.0, marks=pytest.mark.slow)])
def test_no_value_of_a_key_is_a_traceback(share):
    cases = kept(singles(), share)
    assert share < 1 or len(cases) > 2000
    found = [accepted({key: value}) for key, value in cases]
    assert 0.02 < np.mean(found) < 0.4


@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_no_form_of_a_command_line_is_a_traceback(count, monkeypatch, capsys):
    cases = kept(itertools.product(RULES, WORDS, FORMS), 1.0)
    chosen = np.random.default_rng(2).choice(len(cases), count, replace=False)
    monkeypatch.chdir(ROOT)
    for key, word, form in (cases[i] for i in chosen):
        argv = ["ple_jax", "--config", "tiny", "--workdir", "runs/none", *form.format(key, word).split(" ", 1)]
        with contextlib.suppress(SystemExit):
            outcome(lambda argv=argv: main.parse(argv))


@pytest.mark.parametrize(
    "flags",
    [
        ["--workdir", "x" * 300], ["--workdir", "a/" * 3000], ["--workdir", "a\0b"], ["--workdir", "\udcff"],
        ["--workdir", ""], ["--config", "x" * 300 + ".py"], ["--config", "\udcff"], ["--config", "a\0"],
        ["--config", "/"], ["--config", "tiny:x"], ["--mode", "compare", "--runs", "x" * 300], ["--runs", "a"],
        ["--mode", "compare", "--runs", ","], ["--mode", "x"], ["--backend", ""], ["--topology", "x", "--mode", "plan"],
        ["--", "a"], ["--workdir"], ["---"], ["="],
    ],
    ids=lambda flags: " ".join(flags)[:30].encode("ascii", "backslashreplace").decode(),
)  # fmt: skip
def test_no_flag_is_a_traceback(flags, capsys):
    with contextlib.suppress(SystemExit):
        outcome(lambda: main.parse(["ple_jax", *(["--config", "tiny"] if "--config" not in flags else []), *flags]))


@pytest.mark.parametrize("flag", ["--workdir", "--config"])
def test_a_path_of_short_names_that_is_too_long(flag, capsys):
    path = "/".join(["y" * 200] * 30)
    argv = ["ple_jax", *(["--config", "tiny"] if flag != "--config" else ["--workdir", "runs/x"]), flag, path]
    with pytest.raises(UserError, match="does not exist" if flag == "--config" else r"a path of \d+ bytes; give one"):
        main.parse(argv)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"ple.tau_0": 1.0, "ple.alpha": 1.0}, True),  # shares of letters differ by at most 1
        ({"ple.tau_0": 1.0, "ple.alpha": 0.9}, False),  # it falls below
        ({"ple.tau_0": 1.0, "ple.alpha": 1.0, "ple.blend_weight": 1.0}, False),
        ({"ple.tau_0": 1.0, "ple.alpha": 1.0, "reward.transform": "zscore"}, False),
        ({"ple.tau_0": 1e300, "reward.transform": "sigmoid"}, True),
        ({"ple.tau_0": 1e300, "reward.name": "length", "reward.kwargs": {"target": 3}}, False),  # has no lowest value
        ({"ple.tau_0": 1e300, "algorithm": "grpo"}, False),  # does not read it
    ],
)
def test_a_threshold_that_no_margin_exceeds(changes, refused):
    config = FrozenConfigDict(changed({"ple.blend_weight": 0.0, **changes}))
    if refused:
        with pytest.raises(UserError, match="every pair would be blended, and config.ple.blend_weight is 0: nothing"):
            read_inputs(config, "torch")
    else:
        read_inputs(config, "torch")


@pytest.mark.slow
def test_what_is_accepted_reads_its_inputs_or_says_why_not():
    assert sum(1 for _ in in_turn(read=True)) > 200


def argument(key, value):
    return f"--config.{key}={value!r}" if not isinstance(value, str) else f"--config.{key}={value}"


@pytest.mark.parametrize("count", [1, pytest.param(24, marks=pytest.mark.slow)])
def test_what_is_accepted_runs_or_says_why_not(count, tmp_path):
    small = {"iterations": 1, "sinks": (), "queries_per_iteration": 8}
    small |= {"optimizer.batch_queries": 8, "optimizer.micro_queries": 8}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    for n, changes in enumerate(itertools.islice(in_turn(read=True), count)):
        own = [argument(key, value) for key, value in {**small, **changes}.items() if value is not None]
        command = [sys.executable, "-m", "ple_jax.main", "--config", "tiny", "--workdir", str(tmp_path / str(n))]
        command += ["--mode", "plan" if n % 3 else "train"]
        done = subprocess.run([*command, *own], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr, (own, done.stderr[-2000:])


def test_every_key_is_tried():
    assert {key for key, _ in singles()} == set(flatten(tiny.get_config().to_dict()))
