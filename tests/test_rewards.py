"""Rewards against values worked out by hand and the package they come from; their transforms; what is refused."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from ple_jax.core import rewards
from ple_jax.core.config import UserError


def test_vader_is_the_packages_compound_score():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    def compound(text):
        return SentimentIntensityAnalyzer().polarity_scores(text)["compound"]

    texts = ["A wonderful, lovely film!", "It was horrible.", "It is two hours long.", ""]
    scores = rewards.load("vader", {})(["awful "] * 4, texts)
    assert scores == [compound(t) for t in texts]
    assert scores[0] > 0.5 and scores[1] < -0.5 and scores[2:] == [0, 0]
    assert rewards.load("vader", {"with_prompt": True})(["awful "] * 4, texts) == [compound("awful " + t) for t in texts]


def test_vader_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(UserError, match="pip install vaderSentiment"):
        rewards.load("vader", {})


def test_length_counts_words():
    responses = ["a b  c\nd", "a b", "", "a b c d e f g h i j"]
    assert rewards.load("length", {"target": 4})([""] * 4, responses) == [0.0, -0.5, -1.0, -1.5]
    with pytest.raises(UserError, match="target = 0"):
        rewards.load("length", {"target": 0})


def test_letters_counts_lower_case_vowels():
    assert rewards.load("letters", {})([""] * 4, ["aexx", "", "AEIOU", "ouié"]) == [0.5, 0.0, 0.0, 0.75]


def constant(prompts, responses, *, value=1.0):
    return [value] * len(responses)


def test_a_function_of_your_own():
    assert rewards.load("test_rewards:constant", {}) is constant
    assert rewards.load("test_rewards:constant", {"value": 3.0})(["p"], ["r"]) == [3.0]


@pytest.mark.parametrize(
    ("name", "kwargs", "says"),
    [
        ("vadr", {}, "length, letters, vader.*did you mean 'vader'"),
        ("vader", {"with_promt": True}, r"config.reward.kwargs \{'with_promt': True\}.*unexpected keyword"),
        ("no_such_module:f", {}, "No module named 'no_such_module'"),
        ("test_rewards:nothing", {}, "no function 'nothing'"),
    ],
)
def test_what_cannot_be_loaded(name, kwargs, says):
    with pytest.raises(UserError, match=says):
        rewards.load(name, kwargs)


def test_score_gives_float64_in_order():
    values = rewards.score(lambda p, r: [len(a) + len(b) for a, b in zip(p, r, strict=True)], ["a", "bb"], ["c", "dd"])
    assert values.dtype == np.float64 and values.tolist() == [2.0, 4.0]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1.0], r"shape \(1,\) for 2 responses"),
        ([[1.0], [2.0]], r"shape \(2, 1\) for 2 responses"),
        ([1.0, math.nan], r"1 of 2 .*nan for prompt 'prompt b', response 'second answer'"),
        ([math.inf, -math.inf], r"2 of 2 .*inf for prompt 'prompt a', response 'first answer'"),
    ],
)
def test_score_checks_what_it_gets(values, says):
    with pytest.raises(UserError, match=says):
        rewards.score(lambda p, r: values, ["prompt a", "prompt b"], ["first answer", "second answer"])


SPREAD = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30).filter(
    lambda x: np.ptp(x) > max(1e-6, 1e-3 * max(map(abs, x)))
)


@given(SPREAD)
def test_transforms_equal_scipys(values):
    raw = np.array(values)
    np.testing.assert_array_equal(rewards.transform(raw, "none"), raw)
    np.testing.assert_allclose(rewards.transform(raw, "sigmoid"), special.expit(raw), rtol=1e-12, atol=0)
    np.testing.assert_allclose(rewards.transform(raw, "zscore"), stats.zscore(raw), rtol=1e-9, atol=1e-9)
    scaled = rewards.transform(raw, "minmax")
    assert scaled.min() == 0 and scaled.max() == 1
    np.testing.assert_allclose(scaled * np.ptp(raw) + raw.min(), raw, rtol=1e-9, atol=1e-9 * np.abs(raw).max())


@pytest.mark.parametrize("name", ["zscore", "minmax"])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.4404, -1e300])
@pytest.mark.parametrize("n", [1, 3, 96])
def test_no_spread_gives_zero(name, value, n):
    # the mean of three times 0.1 is not 0.1 in floating point
    np.testing.assert_array_equal(rewards.transform(np.full(n, value), name), np.zeros(n))


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e150])
def test_scale_does_not_matter(scale):
    raw = np.array([-1.0, 0.0, 2.0, 3.0])
    np.testing.assert_allclose(rewards.transform(raw * scale, "zscore"), (raw - 1) / math.sqrt(2.5), rtol=1e-12)
    np.testing.assert_allclose(rewards.transform(raw * scale, "minmax"), [0, 0.25, 0.75, 1], rtol=1e-12)


def test_sigmoid_of_huge_rewards():
    np.testing.assert_array_equal(rewards.transform(np.array([-1e9, 0.0, 1e9]), "sigmoid"), [0, 0.5, 1])


def test_unknown_transform():
    with pytest.raises(UserError, match="'log': choose none, sigmoid, zscore or minmax"):
        rewards.transform(np.zeros(2), "log")


def test_a_file_of_your_own(tmp_path):
    (tmp_path / "helper_of_mine.py").write_text("def words(text):\n    return len(text.split())\n")
    (tmp_path / "mine.py").write_text(
        "from helper_of_mine import words\n\ndef score(prompts, responses):\n    return [words(r) for r in responses]\n"
    )
    reward = rewards.load(f"{tmp_path / 'mine.py'}:score", {})
    assert rewards.score(reward, ["p", "p"], ["a b", ""]).tolist() == [2.0, 0.0]


@pytest.mark.parametrize("returned", [["good"], None])
def test_a_reward_that_fails_is_named(returned):
    with pytest.raises(UserError, match="the reward failed|shape"):
        rewards.score(lambda prompts, responses: returned, ["p"], ["r"])
