"""Measures of responses against values worked out by hand, and scipy's bootstrap."""

import numpy as np
import pytest
from scipy import stats

from ple_jax.core import metrics


@pytest.mark.parametrize(
    ("responses", "n", "expected"),
    [([[1, 2, 1, 2]], 2, 2 / 3), ([[1, 1, 1]], 1, 1 / 3), ([[1, 2], [1, 2]], 2, 0.5), ([[1]], 2, 0.0), ([], 1, 0.0)],
)
def test_distinct(responses, n, expected):
    assert metrics.distinct_n(responses, n) == expected


@pytest.mark.parametrize(
    ("tokens", "reference", "n", "expected"),
    [([1, 2, 3, 9], [0, 1, 2, 3], 2, 2 / 3), ([1, 2], [2, 1], 2, 0.0), ([1], [1], 2, 0.0), ([4, 4], [4], 1, 1.0)],
)
def test_overlap(tokens, reference, n, expected):
    assert metrics.ngram_overlap(tokens, reference, n) == expected


def test_bootstrap_equals_scipys():
    values = np.random.default_rng(0).exponential(size=60)
    ours = metrics.bootstrap_ci(values, seed=1)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=2).confidence_interval
    np.testing.assert_allclose(ours, theirs, atol=0.02)
    assert ours == metrics.bootstrap_ci(values, seed=1)
    assert metrics.bootstrap_ci(values, seed=1, level=0.5)[0] > ours[0]


def test_bootstrap_of_one_value():
    assert metrics.bootstrap_ci([0.25], seed=0) == (0.25, 0.25)
