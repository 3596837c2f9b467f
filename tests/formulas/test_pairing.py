"""Selection rules and blend weights, against closed forms and as properties."""

import doctest
import math

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ple_jax.core.errors import UserError
from ple_jax.formulas import pairing

rewards = arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(2, 4)), elements=st.floats(-20, 20))


def test_only_a_margin_strictly_above_tau_ranks():
    above = math.nextafter(0.2, 1)
    assert pairing.threshold([0.2, above, 0.0, -5.0], 0.2).tolist() == [False, True, False, False]
    assert pairing.threshold([0.0, -0.1, 5e-324], 0.0).tolist() == [False, False, True]
    assert pairing.symmetric([0.2, above, -0.2, -above], 0.2).tolist() == [False, True, False, True]
    assert pairing.symmetric([0.0], 0.0).tolist() == [False]


def test_margins_are_compared_in_float64():
    assert pairing.threshold([0.2 + 1e-12], 0.2).tolist() == [True]  # equal in float32


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=10))
def test_an_infinite_threshold_blends_every_pair(margins):
    assert not pairing.threshold(margins, math.inf).any()
    assert not pairing.symmetric(margins, math.inf).any()


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=10), st.floats(0, 5))
def test_symmetric_adds_exactly_the_mirrored_pairs(margins, tau):
    mirrored = pairing.threshold([-m for m in margins], tau)
    np.testing.assert_array_equal(pairing.symmetric(margins, tau), pairing.threshold(margins, tau) | mirrored)


@pytest.mark.parametrize("blend", ["softmax", "sigmoid", "uniform", "best"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_blend_weights_are_those_of_the_oracle(blend, temperature):
    rows = [[0.1, -0.3], [2.0, 2.0], [-1.5, 0.0], [0.0, 3.0]]
    expected = [reference.blend_weights(r, blend=blend, temperature=temperature) for r in rows]
    np.testing.assert_allclose(pairing.blend_weights(blend, rows, temperature=temperature), expected, rtol=1e-13)


@given(rewards, st.sampled_from(["softmax", "sigmoid", "uniform", "best"]), st.floats(0.1, 10))
def test_blend_weights_sum_to_one_and_follow_the_rewards(r, blend, temperature):
    weights = pairing.blend_weights(blend, r, temperature=temperature)
    assert weights.dtype == np.float64
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-12)
    for reward, weight in zip(r, weights, strict=True):
        order = np.argsort(reward)
        assert (np.diff(weight[order]) >= -1e-15).all()
        for i in range(1, len(order)):
            if reward[order[i]] == reward[order[i - 1]]:
                assert weight[order[i]] == weight[order[i - 1]]


def test_the_numbers_that_the_method_s_description_quotes():
    plain_better = pairing.softmax([1.5, 0.0], temperature=1.0)
    assert plain_better[1] == pytest.approx(0.18, abs=0.005)
    assert pairing.softmax([0.0, 0.2], temperature=1.0)[1] == pytest.approx(0.55, abs=0.001)
    assert pairing.best([[1.0, 1.0]]).tolist() == [[0.5, 0.5]]


def test_weights_of_extreme_rewards_are_finite():
    np.testing.assert_allclose(pairing.softmax([1e4, 0.0], temperature=1.0), [1.0, 0.0])
    # both sigmoids underflow to 0; far below 0 the sigmoid is the exponential
    np.testing.assert_allclose(
        pairing.sigmoid([-1e4, -1e4 - 1], temperature=1.0), [1 / (1 + math.exp(-1.0)), 1 / (1 + math.e)]
    )


def test_percentile_weights():
    margins = [0.5, 4.0, 0.0, 2.0, 1.0]  # four pairs are kept: floor(0.5 * 4) = 2 of them are at the top
    weights = pairing.percentile(margins, share=0.5, temperature=10.0)
    expected = [1 / (1 + math.exp(-0.05)), 1.0, 0.0, 1.0, 1 / (1 + math.exp(-0.1))]
    np.testing.assert_allclose(weights, expected, rtol=1e-13)
    assert pairing.percentile(margins, share=0.49, temperature=10.0).tolist().count(1.0) == 1
    assert pairing.percentile(margins, share=1.0, temperature=10.0).tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]
    assert pairing.percentile([0.0, 0.0], share=0.5, temperature=10.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("share", "count", "full"), [(0.7, 90, 63), (0.29, 100, 29), (0.35, 180, 63), (0.5, 3, 1)])
def test_a_share_of_pairs_is_rounded_down_from_its_exact_value(share, count, full):
    """In float64 0.7 * 90 is below 63."""
    weights = pairing.percentile(np.arange(1.0, count + 1), share=share, temperature=1e6)
    assert (weights == 1).sum() == full


def test_as_intended_is_a_weighted_mean_and_as_released_a_plain_one():
    weights, loss = np.array([1.0, 0.0, 0.6, 0.5]), np.array([3.0, 99.0, 1.0, 2.0])
    intended, released = (pairing.batch_weights(weights, how=how) for how in ("as_intended", "as_released"))
    assert np.mean(intended * loss) == pytest.approx((3.0 * 1.0 + 1.0 * 0.6 + 2.0 * 0.5) / 2.1, rel=1e-13)
    assert np.mean(released * loss) == pytest.approx((3.0 + 1.0 + 2.0) / 3, rel=1e-13)
    # as the released code writes it: the mean of the losses, times every weight, over the sum of the weights
    kept = weights > 0
    assert np.mean(released * loss) == pytest.approx((loss[kept].mean() * weights[kept]).sum() / weights[kept].sum())
    for how in ("as_intended", "as_released"):
        assert pairing.batch_weights([0.0, 0.0], how=how).tolist() == [0.0, 0.0]


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match="ple.blend = 'mean': choose softmax, sigmoid, uniform or best"):
        pairing.blend_weights("mean", [[0.0, 1.0]], temperature=1.0)
    with pytest.raises(UserError, match="ple.percentile_weights = 'x': choose as_intended or as_released"):
        pairing.batch_weights([1.0], how="x")


def test_the_examples_in_the_docstrings_hold():
    failed, attempted = doctest.testmod(pairing)
    assert attempted > 0 and failed == 0
