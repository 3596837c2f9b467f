"""Every argument of every built-in reward and judge with values of other types: accepted, or one line with its name."""

import functools
import importlib
import inspect
import math

import pytest

from ple_jax import rewards
from ple_jax.core.config import names
from ple_jax.core.errors import UserError
from ple_jax.evaluation.load_judge import load_judge

ODD = (
    None, True, -1, 0, 3, 0.5, 1e300, 10**20, 10**400, math.inf, "", "text", "a\0b", "\ud800", "x" * 300, "(" * 2000, [],
    ["a"], [1], [[]], ["a{99999999999}"], {}, {"a": 1}, {"a": {}}, {"a": {"name": 3}}, {"a": {"name": "vader", "kwargs": 3}},
    {"a": {"name": "vader", "weight": "x"}}, {"a": {"name": "vader", "veto_below": "x"}}, {1: 2},
)  # fmt: skip
BASE = {  # what must be given
    "combine": {"parts": {"a": {"name": "letters"}}},
    "judge": {"url": "http://localhost:1/v1", "model": "m"},
    "model": {"path": "nowhere"},
    "remote": {"url": "http://localhost:1/"},
    "rules": {"require": ["a"]},
}
HTTP = ("timeout", "retries", "backoff", "max_failures", "api_key_env", "headers")


def arguments(make):
    found = [name for name, p in inspect.signature(make).parameters.items() if p.kind is not p.VAR_KEYWORD]
    return [*found, *(HTTP if len(found) < len(inspect.signature(make).parameters) else ()), "unknown"]


def refused_or_made(load, kwargs):
    try:
        return load(kwargs)
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith("config."), error
        return None


@pytest.mark.parametrize("name", names("rewards", ".py"))
def test_no_value_of_a_rewards_argument_is_a_traceback(name):
    make, base = importlib.import_module(f"ple_jax.rewards.{name}").make, BASE.get(name, {})
    load = functools.partial(rewards.load, name, backend="jax", mesh={})
    for argument in arguments(make):
        for value in ODD:
            made = refused_or_made(load, {**base, argument: value})
            if made is not None and name in ("letters", "length", "rules", "vader", "combine"):
                assert len(rewards.score(made, ["p"], ["a b."]).values) == 1


@pytest.mark.parametrize("name", ["reward", "endpoint", "model"])
def test_no_value_of_a_judges_argument_is_a_traceback(name):
    make = {"reward": "judges.by_reward", "endpoint": "model_judges.endpoint", "model": "model_judges.local"}[name]
    module, _, function = make.partition(".")
    make = getattr(importlib.import_module(f"ple_jax.evaluation.{module}"), function)
    base = {"reward": {"name": "letters"}, "endpoint": BASE["judge"], "model": {"path": "tiny"}}[name]
    for argument in set(arguments(make)) - {"backend"}:
        for value in ODD:
            refused_or_made(lambda kwargs: load_judge(name, kwargs, backend="jax"), {**base, argument: value})


@pytest.mark.parametrize(
    ("name", "kwargs", "says"),
    [
        ("length", {"target": "20"}, "config.reward.kwargs target = '20': give a whole number or None"),
        ("vader", {"with_prompt": "yes"}, "config.reward.kwargs with_prompt = 'yes': give True or False"),
        ("remote", {"url": 5}, "config.reward.kwargs url = 5: give a text"),
        ("remote", {"url": "http://[::1"}, r"give an address such as http://localhost:5000/get_reward"),
        ("remote", {"url": "http://a:99999"}, r"give an address such as http://localhost:5000/get_reward"),
        ("remote", {"url": "http://a", "timeout": "5"}, "timeout = '5': give a number"),
        ("remote", {"url": "http://a", "retries": 10**9}, "retries = 1000000000: .*at most 1000"),
        ("combine", {"parts": {"a": {"name": "letters", "weight": "1"}}}, r"parts\['a'\] has weight '1': give a finite"),
    ],
)
def test_what_is_said(name, kwargs, says):
    with pytest.raises(UserError, match=says):
        rewards.load(name, kwargs)
