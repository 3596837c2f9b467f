"""Threshold schedules against closed forms, and the errors of impossible ones."""

import doctest
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ple_jax.core.errors import UserError
from ple_jax.formulas import pairing, threshold

NAMES = ("exponential", "constant", "linear", "cosine")


def test_the_paper_s_schedule_is_a_geometric_series_in_float64():
    schedule = threshold.make("exponential", tau_0=0.2, alpha=0.9, iterations=5)
    assert [schedule(i) for i in range(5)] == pytest.approx([0.2, 0.18, 0.162, 0.1458, 0.13122], rel=1e-15)
    assert schedule(60) == pytest.approx(0.2 * math.exp(60 * math.log(0.9)), rel=1e-13)


def test_the_other_schedules():
    constant, linear, cosine = (threshold.make(n, tau_0=2.0, alpha=0.5, iterations=4) for n in NAMES[1:])
    assert [constant(i) for i in (0, 7)] == [2.0, 2.0]
    assert [linear(i) for i in range(6)] == [2.0, 1.5, 1.0, 0.5, 0.0, 0.0]
    half = math.sqrt(0.5)
    assert [cosine(i) for i in range(6)] == pytest.approx([2.0, 1 + half, 1.0, 1 - half, 0.0, 0.0], abs=1e-15)


def test_alpha_one_is_the_constant_schedule():
    schedule = threshold.exponential(0.2, 1.0)
    assert {schedule(i) for i in range(100)} == {0.2}


@pytest.mark.parametrize("name", NAMES)
def test_an_infinite_threshold_stays_infinite(name):
    schedule = threshold.make(name, tau_0=math.inf, alpha=1e-300, iterations=3)
    assert [schedule(i) for i in range(6)] == [math.inf] * 6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tau_0", [-1e-9, -math.inf, math.nan])
def test_a_threshold_below_zero_or_nan_is_refused_with_its_value(name, tau_0):
    with pytest.raises(UserError, match=rf"ple\.tau_0 = {tau_0}: give a number >= 0"):
        threshold.make(name, tau_0=tau_0, alpha=0.9, iterations=3)


@pytest.mark.parametrize("alpha", [0.0, -0.5, 1.0001, math.inf, math.nan])
def test_an_alpha_that_does_not_decay_is_refused_with_its_value(alpha):
    with pytest.raises(UserError, match=rf"ple\.alpha = {alpha}: give a number with 0 < alpha <= 1"):
        threshold.exponential(0.2, alpha)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_falling_schedule_needs_iterations(name):
    with pytest.raises(UserError, match="iterations = 0"):
        threshold.make(name, tau_0=0.2, alpha=0.9, iterations=0)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="ple.schedule = 'step': choose exponential, constant, linear or cosine"):
        threshold.make("step", tau_0=0.2, alpha=0.9, iterations=3)


@given(
    name=st.sampled_from(NAMES),
    tau_0=st.floats(0, 10),
    alpha=st.floats(0, 1, exclude_min=True),
    margins=st.lists(st.floats(-10, 10), min_size=1, max_size=20),
    rule=st.sampled_from([pairing.threshold, pairing.symmetric]),
)
def test_the_ranked_set_only_grows(name, tau_0, alpha, margins, rule):
    schedule = threshold.make(name, tau_0=tau_0, alpha=alpha, iterations=6)
    ranked = [set(rule(margins, schedule(i)).nonzero()[0]) for i in range(8)]
    assert all(earlier <= later for earlier, later in zip(ranked, ranked[1:], strict=False))
    assert all(schedule(i) >= schedule(i + 1) >= 0 for i in range(8))


def test_the_examples_in_the_docstrings_hold():
    failed, attempted = doctest.testmod(threshold)
    assert attempted > 0 and failed == 0
