"""Combined rewards against sums and minima worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ple_jax import rewards
from ple_jax.core.answers import Cache
from ple_jax.core.errors import UserError
from ple_jax.core.types import Reward

TEXTS = ["aa", "ab", "bb bb", "cccc"]  # shares of a: 1, .5, 0, 0; of b: 0, .5, .8, 0; words 1, 1, 2, 1
A = {"name": "letters", "kwargs": {"letters": "a"}}
B = {"name": "letters", "kwargs": {"letters": "b"}}


def combined(**kwargs):
    reward = rewards.load("combine", kwargs)
    return reward, rewards.score(reward, ["p"] * len(TEXTS), TEXTS)


@pytest.mark.parametrize(
    ("kwargs", "expected", "scale"),
    [
        ({}, [1, 1, 0.8, 0], (0, 2)),
        ({"how": "min"}, [0, 0.5, 0, 0], (0, 1)),
        ({"length_penalty": 0.25}, [0.75, 0.75, 0.3, -0.25], (-math.inf, 2)),
        ({"how": "min", "length_penalty": 0.25}, [-0.25, 0.25, -0.5, -0.25], (-math.inf, 1)),
    ],
)
def test_sum_and_minimum(kwargs, expected, scale):
    reward, scored = combined(parts={"a": A, "b": B}, **kwargs)
    np.testing.assert_allclose(scored.values, expected, atol=1e-12)
    assert reward.scale == scale
    np.testing.assert_array_equal(scored.parts["a"], [1, 0.5, 0, 0])  # as they were given
    np.testing.assert_array_equal(scored.parts["b"], [0, 0.5, 0.8, 0])
    if "length_penalty" in kwargs:
        np.testing.assert_array_equal(scored.parts.pop("length_penalty"), [-0.25, -0.25, -0.5, -0.25])
    assert list(scored.parts) == ["a", "b"]


@pytest.mark.parametrize(
    ("how", "expected", "scale"),
    [("sum", [2, 0.25, -1.2, 0], (-1.5, 2)), ("min", [0, -0.75, -1.2, 0], (-1.5, 0))],
)
def test_weights(how, expected, scale):
    reward, scored = combined(parts={"a": A | {"weight": 2.0}, "b": B | {"weight": -1.5}}, how=how)
    np.testing.assert_allclose(scored.values, expected, atol=1e-12)
    assert reward.scale == scale


@given(st.lists(st.floats(-1e3, 1e3).filter(bool), min_size=1, max_size=4), st.sampled_from(["sum", "min"]))
def test_values_stay_within_the_scale(weights, how):
    parts = {f"part {i}": {"name": "letters", "weight": weight} for i, weight in enumerate(weights)}
    reward = rewards.load("combine", {"parts": parts, "how": how})
    corners = [np.tile(np.repeat([0.0, 1.0], 2**i), 8)[:16] for i in range(len(weights))]
    found = reward.combine(dict(zip(parts, corners, strict=True)))
    np.testing.assert_allclose([found.min(), found.max()], reward.scale, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(
    ("kwargs", "expected", "scale"),
    [
        # the lowest that the combination can have
        ({}, [1, 1, 0, 0], (0, 2)),
        ({"veto_value": -3.0}, [1, 1, -3, -3], (-3, 2)),
        ({"veto_value": 5.0}, [1, 1, 5, 5], (0, 5)),
        ({"veto_value": 0.0}, [1, 1, 0, 0], (0, 2)),
        # a veto is not priced by length
        ({"veto_value": -3.0, "length_penalty": 0.25}, [0.75, 0.75, -3, -3], (-math.inf, 2)),
        ({"how": "min", "veto_value": -3.0}, [0, 0.5, -3, -3], (-3, 1)),
    ],
)
def test_vetoes(kwargs, expected, scale):
    reward, scored = combined(parts={"a": A | {"veto_below": 0.5}, "b": B}, **kwargs)
    np.testing.assert_allclose(scored.values, expected, atol=1e-12)
    assert reward.scale == scale
    np.testing.assert_array_equal(scored.parts["a"], [1, 0.5, 0, 0])


def test_a_part_of_weight_0_only_vetoes():
    for how, first in (("sum", [1, 0.5, -9, -9]), ("min", [1, 0.5, -9, -9])):
        parts = {"a": A, "b": B | {"weight": 0, "veto_below": 0.0}, "again": A | {"weight": 0.0, "veto_below": 0.1}}
        reward, scored = combined(parts=parts, how=how, veto_value=-9.0)
        np.testing.assert_allclose(scored.values, first)
        assert reward.scale == (-9, 1) and list(scored.parts) == ["a", "b", "again"]


NAN, INF = math.nan, math.inf
GIVEN = {"a": [1, NAN, INF, NAN, 1, -INF, INF], "b": [2, 2, 2, 2, NAN, 2, -INF], "veto": [1, 1, 1, -1, 1, 1, 1]}


def first(prompts, responses):
    return [GIVEN["a"][int(r)] for r in responses]


def second(prompts, responses):
    return [GIVEN["b"][int(r)] for r in responses]


def vetoing(prompts, responses):
    return [GIVEN["veto"][int(r)] for r in responses]


@pytest.mark.parametrize(
    ("how", "expected"), [("sum", [3, NAN, INF, -9, NAN, -INF, NAN]), ("min", [1, NAN, 2, -9, NAN, -INF, -INF])]
)
def test_where_a_part_has_no_value_there_is_none(how, expected):
    parts = {name: {"name": f"test_combined_rewards:{f}"} for name, f in (("a", "first"), ("b", "second"))}
    parts["veto"] = {"name": "test_combined_rewards:vetoing", "weight": 0, "veto_below": 0}
    reward = rewards.load("combine", {"parts": parts, "how": how, "veto_value": -9.0})
    found = rewards.score(reward, ["p"] * 7, list("0123456")).values
    np.testing.assert_array_equal(found, expected)


def test_a_veto_that_has_no_value_is_no_acquittal():
    parts = {"a": A, "judge": {"name": "test_combined_rewards:first", "weight": 0, "veto_below": 0}}
    reward = rewards.load("combine", {"parts": parts})
    np.testing.assert_array_equal(rewards.score(reward, ["p"] * 3, list("012")).values, [0, NAN, 0])


def test_a_combination_of_combinations(tmp_path):
    inner = {"name": "combine", "kwargs": {"parts": {"a": A, "b": B}, "how": "min"}, "weight": 2}
    _, scored = combined(parts={"both": inner, "b": B})
    np.testing.assert_allclose(scored.values, [0, 1.5, 0.8, 0], atol=1e-12)
    assert sorted(scored.parts) == ["b", "both", "both.a", "both.b"]
    np.testing.assert_array_equal(scored.parts["both.a"], [1, 0.5, 0, 0])


def test_every_part_is_stored_by_itself(tmp_path):
    with Cache(tmp_path / "rewards.sqlite") as cache:
        rewards.score(rewards.load("combine", {"parts": {"a": A, "b": B}}), ["p"] * 4, TEXTS, cache=cache)
        # another combination of them needs no part again
        again = rewards.load("combine", {"parts": {"b": B | {"weight": 3}, "a": A}, "how": "min"})
        fail = {name: broken(part) for name, part in again.parts.items()}
        scored = rewards.score(Reward("again", parts=fail, combine=again.combine), ["p"] * 4, TEXTS, cache=cache)
        np.testing.assert_allclose(scored.values, [0, 0.5, 0, 0], atol=1e-12)
        alone = rewards.score(broken(rewards.load(A["name"], A["kwargs"])), ["p"] * 4, TEXTS, cache=cache)
        np.testing.assert_array_equal(alone.values, [1, 0.5, 0, 0])


def broken(reward):
    def fails(prompts, responses):
        raise AssertionError("asked again")

    return Reward(reward.name, fails, version=reward.version, scale=reward.scale)


def test_what_the_run_offers_reaches_the_parts(monkeypatch):
    seen = []

    def make(*, backend, mesh):
        seen.append((backend, mesh))
        return Reward("letters", lambda prompts, responses: [0.0])

    monkeypatch.setattr("ple_jax.rewards.letters.make", make)
    inner = {"name": "combine", "kwargs": {"parts": {"a": {"name": "letters"}}}}
    rewards.load("combine", {"parts": {"a": {"name": "letters"}, "c": inner}}, backend="torch", mesh={"data": 2}, other=1)
    assert seen == [("torch", {"data": 2})] * 2


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"parts": {}}, "give at least one part"),
        ({"parts": {"a": A | {"weight": 0}}}, "of a weight that is not 0"),
        ({"parts": {"a": "vader"}}, r"parts\['a'\] is 'vader': give a dictionary"),
        ({"parts": {"a": {"weight": 1}}}, r"parts\['a'\] is {'weight': 1}: give a dictionary with a name"),
        ({"parts": {"a": A | {"wieght": 1}}}, r"parts\['a'\] has 'wieght'.*did you mean 'weight'"),
        ({"parts": {"a": A | {"weight": math.inf}}}, r"parts\['a'\] has weight inf"),
        ({"parts": {"a": {"name": "vadr"}}}, r"parts\['a'\]: config.reward.name 'vadr' is not one of"),
        ({"parts": {"a": {"name": "letters", "kwargs": {"x": 1}}}}, r"parts\['a'\]: .*\{'x': 1\}.*unexpected keyword"),
        ({"parts": {"length_penalty": A}}, r"parts\['length_penalty'\]: the word is taken"),
        ({"parts": {"a": A}, "how": "max"}, "how = 'max': choose sum or min"),
        ({"parts": {"a": A}, "length_penalty": -1}, "length_penalty = -1"),
        ({"parts": {"a": A}, "length_penalty": math.nan}, "length_penalty = nan"),
        ({"parts": {"a": A | {"veto_below": 1}}, "length_penalty": 0.1}, "veto_value is missing"),
        ({"parts": {"a": {"name": "length", "veto_below": -1}}}, "veto_value is missing"),
        ({"part": {}}, "unexpected keyword argument 'part'"),
    ],
)
def test_combinations_that_are_none(kwargs, says):
    with pytest.raises(UserError, match=says):
        rewards.load("combine", kwargs)
