"""Rewards against values worked out by hand and the packages they come from; how they are called; their transforms."""

import functools
import math
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from ple_jax import rewards
from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import UserError
from ple_jax.core.types import Reward


def values(name, kwargs, responses, prompts=None):
    scored = rewards.score(rewards.load(name, kwargs), prompts or [f"prompt {i}" for i in range(len(responses))], responses)
    assert scored.values.dtype == np.float64 and scored.parts == {}
    return scored.values.tolist()


# ---------------------------------------------------------------- the modules


def test_vader_is_the_packages_compound_score():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    def compound(text):
        return SentimentIntensityAnalyzer().polarity_scores(text)["compound"]

    texts = ["A wonderful, lovely film!", "It was horrible.", "It is two hours long.", ""]
    found = values("vader", {}, texts, ["awful "] * 4)
    assert found == [compound(t) for t in texts]
    assert found[0] > 0.5 and found[1] < -0.5 and found[2:] == [0, 0]
    assert values("vader", {"with_prompt": True}, texts, ["awful "] * 4) == [compound("awful " + t) for t in texts]
    # "Assistant:good" would be one word, and not in the lexicon
    talk = Conversation([{"role": "user", "content": "So?"}])
    assert values("vader", {"with_prompt": True}, ["good"], [talk]) == [compound("good")] != [0]


@pytest.mark.parametrize(
    ("name", "module"), [("vader", "vaderSentiment"), ("toxicity", "profanity_check")],
)
def test_a_package_that_is_missing(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"reward '{name}' needs {module}.*: pip install 'ple_jax\[{name}\]'"):
        rewards.load(name, {})


def test_length_counts_words():
    responses = ["a b  c\nd", "a b", "", "a b c d e f g h i j"]
    assert values("length", {"target": 4}, responses) == [0.0, -0.5, -1.0, -1.5]
    assert values("length", {"limit": 4}, responses) == [0.0, 0.0, 0.0, -1.5]
    assert values("length", {}, ["a " * 20, "a " * 30]) == [0.0, -0.5]


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [({"target": 0}, "target = 0"), ({"limit": 0}, "limit = 0"), ({"target": 3, "limit": 4}, "target = 3 and limit = 4")],
)
def test_lengths_that_are_none(kwargs, says):
    with pytest.raises(UserError, match=says):
        rewards.load("length", kwargs)


def test_letters_counts_lower_case_vowels():
    assert values("letters", {}, ["aexx", "", "AEIOU", "ouié"]) == [0.5, 0.0, 0.0, 0.75]


def test_toxicity_is_what_the_package_leaves():
    from profanity_check import predict_prob

    texts = ["Thank you, that is a kind thought.", "you stupid fucking idiot"]
    kind, rude, empty, blank = values("toxicity", {}, [*texts, "", " \n"])
    np.testing.assert_allclose([kind, rude], 1 - predict_prob(texts), rtol=0, atol=1e-12)
    assert kind > 0.9 and rude < 0.1 and empty == blank == 1.0


@pytest.mark.parametrize(
    ("kwargs", "kept", "broken"),
    [
        ({"require": [r"\bbecause\b"]}, "It fell because I let go", "It becauses"),
        ({"forbid": ["(?i)as an ai"]}, "Sure.", "Well, As an AI"),
        ({"max_repeats": 2}, "no no yes no", "No no NO"),
        ({"max_repeats": 1}, "one two\none three\n", "one two\n\none two"),
        ({"sentence": True}, 'She said: "Stop it."', "And then"),
        ({"sentence": True}, "那是真的。\n", "1.5"),
    ],
)
def test_one_rule_is_kept_or_not(kwargs, kept, broken):
    assert values("rules", kwargs, [kept, broken]) == [1.0, 0.0]


def test_rules_share():
    kwargs = {"require": ["a", "b"], "forbid": ["c"], "max_repeats": 1, "sentence": True}
    assert values("rules", kwargs, ["a b.", "a b", "a c", "", "c c"]) == [1.0, 0.8, 0.4, 0.4, 0.0]


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({}, "no rule"),
        ({"require": ["(a"]}, r"require: '\(a' is no regular expression"),
        ({"forbid": [3]}, r"forbid = \[3\]: give a list of texts"),
        ({"forbid": "a"}, r"forbid = 'a': give a list of texts"),
        ({"max_repeats": 0}, "max_repeats = 0"),
    ],
)
def test_rules_that_are_none(kwargs, says):
    with pytest.raises(UserError, match=says):
        rewards.load("rules", kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs", "scale"),
    [
        ("vader", {}, (-1, 1)),
        ("letters", {}, (0, 1)),
        ("toxicity", {}, (0, 1)),
        ("rules", {"sentence": True}, (0, 1)),
        ("length", {}, (-math.inf, 0)),
    ],
)
def test_a_reward_says_its_name_and_scale(name, kwargs, scale):
    reward = rewards.load(name, kwargs)
    assert (reward.name, reward.scale) == (name, scale)


# ---------------------------------------------------------------- loading


def constant(prompts, responses, *, value=1.0):
    return [value] * len(responses)


@functools.cache
def cached(text):
    return float(len(text))


def made(*, backend="none", mesh=None, own=0):
    return Reward("made", lambda prompts, responses: [0.0], version=f"{backend} {mesh} {own}")


def test_a_function_of_your_own():
    assert values("test_rewards:constant", {}, ["r"]) == [1.0]
    assert values("test_rewards:constant", {"value": 3.0}, ["r", "s"]) == [3.0, 3.0]
    assert rewards.load("test_rewards:constant", {}).name == "test_rewards:constant"


def test_what_the_run_offers_reaches_a_make_that_asks(monkeypatch):
    monkeypatch.setattr("ple_jax.rewards.letters.make", made)
    offered = {"backend": "torch", "mesh": {"data": 2}, "nobody_asks": 1}
    assert rewards.load("letters", {}, **offered).version == "torch {'data': 2} 0"
    assert rewards.load("letters", {"backend": "jax", "own": 3}, **offered).version == "jax {'data': 2} 3"
    assert rewards.load("letters", {}).version == "none None 0"
    # a function of your own gets what you give it alone
    assert values("test_rewards:constant", {}, ["r"]) == [1.0]
    assert rewards.load("test_rewards:constant", {}, value=3.0).score(["p"], ["r"]) == [1.0]


def versions(name, *kwargs):
    return {rewards.load(name, kwarg).version for kwarg in kwargs}


def test_versions_differ_with_the_kwargs():
    assert len(versions("letters", {}, {"letters": "a"}, {"letters": "b"}, {})) == 3
    assert len(versions("length", {"target": 5}, {"limit": 5})) == 2
    assert len(versions("vader", {}, {"with_prompt": True})) == 2
    assert len(versions("rules", {"require": ["a"]}, {"forbid": ["a"]})) == 2
    assert len(versions("test_rewards:constant", {}, {"value": 2.0}, {"value": 3.0}, {})) == 3


def test_versions_differ_with_the_code(tmp_path):
    (tmp_path / "a.py").write_text("def f(prompts, responses):\n    return [1.0] * len(responses)\n")
    (tmp_path / "b.py").write_text("def f(prompts, responses):\n    return [2.0] * len(responses)\n")
    (tmp_path / "c.py").write_text("def f(prompts, responses):\n    return [1.0] * len(responses)\n")
    a, b, c = (rewards.load(f"{tmp_path / name}.py:f", {}).version for name in "abc")
    assert a == c != b


def test_the_version_of_a_function_taken_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "taken_from.py").write_text("def f(prompts, responses):\n    return [1.0]\n")
    (tmp_path / "takes.py").write_text("from taken_from import f\n")
    before = rewards.load("takes:f", {}).version
    (tmp_path / "taken_from.py").write_text("def f(prompts, responses):\n    return [2.0]\n")
    assert rewards.load("takes:f", {}).version != before


def test_a_file_of_your_own(tmp_path):
    (tmp_path / "helper_of_mine.py").write_text("def words(text):\n    return len(text.split())\n")
    (tmp_path / "mine.py").write_text(
        "from helper_of_mine import words\n\ndef score(prompts, responses):\n    return [words(r) for r in responses]\n\n"
        "class Scorer:\n    def __call__(self, prompts, responses):\n        return [0.5] * len(responses)\n\n"
        "scorer = Scorer()\n"
    )
    assert values(f"{tmp_path / 'mine.py'}:score", {}, ["a b", ""]) == [2.0, 0.0]
    assert values(f"{tmp_path / 'mine.py'}:scorer", {}, ["a b"]) == [0.5]  # any object that can be called


def of_trl(completions, answer, **columns):
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


@pytest.mark.parametrize(
    ("name", "kwargs", "says"),
    [
        ("vadr", {}, "combine, exact, json_schema, judge, length, .*, toxicity, vader.*did you mean 'vader'"),
        ("_cache", {}, "'_cache' is not one of bag_of_words, code, combine"),
        ("vader", {"with_promt": True}, r"config.reward.kwargs \{'with_promt': True\}.*unexpected keyword"),
        ("no_such_module:f", {}, "No module named 'no_such_module'"),
        ("test_rewards:nothing", {}, "no function 'nothing'"),
        ("test_rewards:constant", {"size": 1}, "not called as .*unexpected keyword argument 'size'; .*another reward"),
        ("test_rewards:cached", {}, "not called as"),
        ("test_rewards:of_trl", {}, "takes `completions` first, as TRL calls it: here it is called as .prompts, responses."),
        ("letters", {"letters": ""}, "config.reward.kwargs letters = '': give at least one letter"),
    ],
)
def test_what_cannot_be_loaded(name, kwargs, says):
    with pytest.raises(UserError, match=says):
        rewards.load(name, kwargs)


# ---------------------------------------------------------------- scoring

PROMPTS, ANSWERS = ["prompt a", "prompt b"], ["first answer", "second answer"]


def giving(given, **more):
    return Reward("mine", lambda prompts, responses: given, **more)


def test_score_gives_float64_in_order():
    lengths = Reward("lengths", lambda p, r: [len(a) * 10 + len(b) for a, b in zip(p, r, strict=True)])
    scored = rewards.score(lengths, ["a", "bb", "a"], ["cc", "d", "ee"])
    assert scored.values.dtype == np.float64 and scored.values.tolist() == [12.0, 21.0, 12.0] and scored.parts == {}
    assert rewards.score(lengths, [], []).values.shape == (0,)


@pytest.mark.parametrize(
    "given", [(1, 0), np.array([1, 0]), np.array([1, 0], np.float16), [True, False], [np.float32(1), Fraction(0)]]
)
def test_numbers_of_many_kinds(given):
    assert rewards.score(giving(given), PROMPTS, ANSWERS).values.tolist() == [1.0, 0.0]


def test_arrays_of_frameworks():
    import jax.numpy as jnp
    import torch

    for array in (jnp.array([1, 0], jnp.bfloat16), list(jnp.array([1.0, 0.0])), torch.tensor([1.0, 0.0])):
        assert rewards.score(giving(array), PROMPTS, ANSWERS).values.tolist() == [1.0, 0.0]
    with pytest.raises(UserError, match="'mine' gave Tensor tensor.*no row of numbers .*requires grad"):
        rewards.score(giving(torch.ones(2, requires_grad=True)), PROMPTS, ANSWERS)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([1.0], r"gave list \[1.0\] of shape \(1,\) for 2 responses"),
        ([[1.0], [2.0]], r"gave list .* of shape \(2, 1\) for 2 responses"),
        ([[1.0], [2.0, 3.0]], r"gave list \[1.0\] for prompt 'prompt a'.* no number"),
        (None, r"gave NoneType None of shape \(\)"),
        ({"a": 1, "b": 2}, r"gave dict .* of shape \(\)"),
        ([1.0, None], "gave NoneType None for prompt 'prompt b', response 'second answer', which is no number"),
        (["0.5", 1.0], "gave str '0.5' for prompt 'prompt a', response 'first answer', which is no number"),
        (np.array(["good", "bad"]), "gave str 'good'"),
        ([b"1", 1.0], "gave bytes b'1'"),
        ([1.0, 10**400], "gave int 1000000.* no number"),
    ],
)
def test_score_checks_what_it_gets(given, says):
    with pytest.raises(UserError, match=f"reward 'mine' {says}.*give the same command again"):
        rewards.score(giving(given), PROMPTS, ANSWERS)


def test_what_is_not_finite_is_no_error():
    found = rewards.score(giving([math.nan, -math.inf], scale=(0.0, 1.0)), PROMPTS, ANSWERS).values
    assert math.isnan(found[0]) and found[1] == -math.inf


def test_the_scale_is_held():
    assert rewards.score(giving([1 + 1e-7, -1e-7], scale=(0.0, 1.0)), PROMPTS, ANSWERS).values[0] > 1
    assert rewards.score(giving([1000.0001, 5], scale=(5.0, 1000.0)), PROMPTS, ANSWERS).values[0] > 1000


@pytest.mark.parametrize(
    ("given", "scale", "says"),
    [
        ([0.5, 1.1], (0.0, 1.0), "gave 1.1 for prompt 'prompt b', response 'second answer', outside its scale of 0 to 1"),
        ([-0.1, 0.5], (0.0, 1.0), "gave -0.1 for prompt 'prompt a', response 'first answer', outside its scale of 0 to 1"),
        ([-3.0, 1e-3], (-math.inf, 0.0), "gave 0.001 .* outside its scale of -inf to 0"),
        ([5.0, -1e-4], (0.0, math.inf), "gave -0.0001 .* outside its scale of 0 to inf"),
    ],
)
def test_values_outside_the_scale(given, scale, says):
    with pytest.raises(UserError, match=f"reward 'mine' {says}.*same command again"):
        rewards.score(giving(given, scale=scale), PROMPTS, ANSWERS)


def test_a_reward_that_fails_is_named():
    def fails(prompts, responses):
        raise KeyError("weights")

    says = "reward 'mine' failed on 2 responses: KeyError: 'weights'.*same command again"
    with pytest.raises(UserError, match=says) as found:
        rewards.score(Reward("mine", fails), PROMPTS, ANSWERS)
    line = fails.__code__.co_firstlineno + 1
    assert f"({__file__}, line {line}, in fails); mend it" in str(found.value)

    class Cancelled(BaseException):
        """As asyncio's: nothing that `except Exception` sees."""

    for error, said in ((SystemExit(0), "SystemExit: 0"), (SystemExit(), "SystemExit: "), (Cancelled(), "Cancelled: ")):

        def ends(prompts, responses, error=error):
            raise error

        with pytest.raises(UserError, match=f"reward 'mine' failed on 2 responses: {said}.*same command again"):
            rewards.score(Reward("mine", ends), PROMPTS, ANSWERS)

    def interrupted(prompts, responses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # the user's own, where nothing else stops a program
        rewards.score(Reward("mine", interrupted), PROMPTS, ANSWERS)

    def refuses(prompts, responses):
        raise UserError("as it is")

    with pytest.raises(UserError, match="^as it is$"):
        rewards.score(Reward("mine", refuses), PROMPTS, ANSWERS)


def test_calls_are_of_batch_responses_and_equal_pairs_go_once():
    calls = []

    def lengths(prompts, responses):
        calls.append(list(zip(prompts, responses, strict=True)))
        return [len(r) for r in responses]

    prompts, responses = list("ppqpqp"), ["a", "bb", "a", "a", "ccc", "dddd"]
    found = rewards.score(Reward("lengths", lengths, batch=2), prompts, responses).values
    assert found.tolist() == [1, 2, 1, 1, 3, 4]
    assert calls == [[("p", "a"), ("p", "bb")], [("q", "a"), ("q", "ccc")], [("p", "dddd")]]


def test_conversations_that_read_alike_are_two():
    # the turn's text holds the mark of the next turn
    a = Conversation([{"role": "user", "content": "Hi\n\nAssistant: Yes\n\nHuman: So?"}])
    b = Conversation(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "So?"}]
    )
    assert a == b
    turns = Reward("turns", lambda prompts, responses: [len(p.messages) for p in prompts])
    assert rewards.score(turns, [a, b, a], ["x", "x", "x"]).values.tolist() == [1, 3, 1]


# ---------------------------------------------------------------- transforms

SPREAD = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30).filter(
    lambda x: np.ptp(x) > max(1e-6, 1e-3 * max(map(abs, x)))
)


@given(SPREAD)
def test_transforms_equal_scipys(numbers):
    raw = np.array(numbers)
    np.testing.assert_array_equal(rewards.transform(raw, "none"), raw)
    np.testing.assert_allclose(rewards.transform(raw, "sigmoid"), special.expit(raw), rtol=1e-12, atol=0)
    np.testing.assert_allclose(rewards.transform(raw, "zscore"), stats.zscore(raw), rtol=1e-9, atol=1e-9)
    scaled = rewards.transform(raw, "minmax")
    assert scaled.min() == 0 and scaled.max() == 1
    np.testing.assert_allclose(scaled * np.ptp(raw) + raw.min(), raw, rtol=1e-9, atol=1e-9 * np.abs(raw).max())


@given(SPREAD)
def test_statistics_are_those_of_the_transform(numbers):
    raw = np.array(numbers)
    assert rewards.statistics(raw, "none") == rewards.statistics(raw, "sigmoid") == {}
    found = rewards.statistics(raw, "zscore")
    np.testing.assert_allclose([found["mean"], found["std"]], [raw.mean(), raw.std()], rtol=1e-9, atol=1e-9 * np.ptp(raw))
    np.testing.assert_allclose(
        (raw - found["mean"]) / found["std"], rewards.transform(raw, "zscore"), rtol=1e-6, atol=1e-6
    )
    assert rewards.statistics(raw, "minmax") == {"low": min(numbers), "high": max(numbers)}


@pytest.mark.parametrize("name", ["zscore", "minmax"])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.4404, -1e300])
@pytest.mark.parametrize("n", [1, 3, 96])
def test_no_spread_gives_zero(name, value, n):
    # the mean of three times 0.1 is not 0.1 in floating point
    raw = np.full(n, value)
    np.testing.assert_array_equal(rewards.transform(raw, name), np.zeros(n))
    expected = {"mean": value, "std": 0.0} if name == "zscore" else {"low": value, "high": value}
    assert rewards.statistics(raw, name) == expected


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e150])
def test_scale_does_not_matter(scale):
    raw = np.array([-1.0, 0.0, 2.0, 3.0])
    np.testing.assert_allclose(rewards.transform(raw * scale, "zscore"), (raw - 1) / math.sqrt(2.5), rtol=1e-12)
    np.testing.assert_allclose(rewards.transform(raw * scale, "minmax"), [0, 0.25, 0.75, 1], rtol=1e-12)
    assert rewards.statistics(raw * scale, "zscore")["std"] == pytest.approx(math.sqrt(2.5) * scale)


def test_sigmoid_of_huge_rewards():
    np.testing.assert_array_equal(rewards.transform(np.array([-1e9, 0.0, 1e9]), "sigmoid"), [0, 0.5, 1])


@given(st.lists(st.integers(-50, 50), min_size=40, max_size=60, unique=True))
def test_shuffled_rewards_are_the_same_ones_of_other_responses(numbers):
    raw = np.array(numbers, np.float64)
    found = rewards.transform(raw, "shuffle")
    assert sorted(found) == sorted(raw) and (found == raw).mean() < 0.5
    # drawn by their order: rounding, as of another backend, draws no other one, and other rewards do
    np.testing.assert_array_equal(rewards.transform(raw + 1e-9 * np.arange(len(raw)), "shuffle").round(), found)
    assert (rewards.transform(raw[::-1], "shuffle") != found).any()


def test_unknown_transform():
    with pytest.raises(UserError, match="'log': choose none, sigmoid, zscore, minmax or shuffle"):
        rewards.transform(np.zeros(2), "log")
