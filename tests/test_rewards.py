"""Rewards, their transforms, and what is refused."""

import sys

import numpy as np
import pytest

from ple_jax.core import rewards
from ple_jax.core.config import UserError


def test_vader_is_the_packages_compound_score():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    texts = ["A wonderful, lovely film!", "It was horrible.", "The film is two hours long.", ""]
    expected = [SentimentIntensityAnalyzer().polarity_scores(t)["compound"] for t in texts]
    assert rewards.load("vader", {})(["awful "] * 4, texts) == expected
    assert expected[0] > 0.5 > -0.3 > expected[1]
    with_prompt = rewards.load("vader", {"with_prompt": True})(["awful "] * 4, texts)
    assert with_prompt[2] == SentimentIntensityAnalyzer().polarity_scores("awful " + texts[2])["compound"] < 0


def test_vader_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(UserError, match="pip install vaderSentiment"):
        rewards.load("vader", {})


def test_length_and_letters():
    assert rewards.load("length", {"target": 4})(["", "", ""], ["a b c d", "a b", ""]) == [0.0, -0.5, -1.0]
    assert rewards.load("letters", {})(["", ""], ["aexx", ""]) == [0.5, 0.0]
    with pytest.raises(UserError, match="at least 1 word"):
        rewards.load("length", {"target": 0})


def constant(prompts, responses, *, value=1.0):
    return [value] * len(responses)


def test_a_function_of_your_own():
    assert rewards.load("test_rewards:constant", {"value": 3.0})(["p"], ["r"]) == [3.0]
    assert rewards.load("test_rewards:constant", {})(["p"], ["r"]) == [1.0]


@pytest.mark.parametrize(
    ("name", "kwargs", "says"),
    [
        ("vadr", {}, "did you mean 'vader'"),
        ("vader", {"k": 1}, "config.reward.kwargs"),
        ("no_such_module:f", {}, "does not import"),
        ("test_rewards:nothing", {}, "no function 'nothing'"),
    ],
)
def test_bad_names(name, kwargs, says):
    with pytest.raises(UserError, match=says):
        rewards.load(name, kwargs)


@pytest.mark.parametrize(
    ("values", "says"),
    [([1.0], "shape"), ([[1.0], [2.0]], "shape"), ([1.0, float("nan")], "second answer"), ([float("inf"), 0.0], "inf")],
)
def test_bad_values_name_prompt_and_response(values, says):
    with pytest.raises(UserError, match=says):
        rewards.score(lambda p, r: values, ["a", "b"], ["first answer", "second answer"])


def test_transforms_pool_both_kinds():
    raw = np.array([-1.0, 0.0, 2.0, 3.0])
    np.testing.assert_array_equal(rewards.transform(raw, "none"), raw)
    np.testing.assert_allclose(rewards.transform(raw, "sigmoid"), 1 / (1 + np.exp(-raw)), rtol=1e-12)
    np.testing.assert_allclose(rewards.transform(raw, "zscore"), (raw - 1) / np.sqrt(2.5), rtol=1e-12)
    np.testing.assert_allclose(rewards.transform(raw, "minmax"), [0, 0.25, 0.75, 1])
    with pytest.raises(UserError, match="sigmoid"):
        rewards.transform(raw, "log")


@pytest.mark.parametrize("name", ["zscore", "minmax"])
def test_no_spread_gives_zero(name):
    np.testing.assert_array_equal(rewards.transform(np.full(5, 0.7), name), np.zeros(5))


def test_sigmoid_of_huge_rewards():
    np.testing.assert_array_equal(rewards.transform(np.array([-1e9, 1e9]), "sigmoid"), [0, 1])
