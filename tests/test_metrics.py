"""Measures of responses against values worked out by hand, and intervals against the normal limit and scipy."""

import numpy as np
import pytest
from scipy import stats

from ple_jax.core import metrics


@pytest.mark.parametrize(
    ("responses", "n", "expected"),
    [
        ([[1, 2, 1, 2]], 2, 2 / 3),
        ([[1, 1, 1]], 1, 1 / 3),
        ([[1, 2], [1, 2]], 2, 1 / 2),  # pooled over the responses
        ([[1, 2], [3, 4]], 2, 1.0),  # (2, 3) spans two responses and is none
        ([[1]], 2, 0.0),
        ([], 1, 0.0),
    ],
)
def test_distinct_n(responses, n, expected):
    assert metrics.distinct_n(responses, n) == expected


@pytest.mark.parametrize(
    ("tokens", "reference", "n", "expected"),
    [
        ([1, 2, 3, 9], [0, 1, 2, 3], 2, 2 / 3),
        ([1, 2], [2, 1], 2, 0.0),
        ([4, 4, 5], [4], 1, 2 / 3),
        ([1], [1], 2, 0.0),
        ([1, 2], [], 1, 0.0),
    ],
)
def test_ngram_overlap(tokens, reference, n, expected):
    assert metrics.ngram_overlap(tokens, reference, n) == expected


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_bootstrap_approaches_the_normal_interval(level):
    values = np.random.default_rng(0).normal(3.0, 2.0, 1000)
    low, high = metrics.bootstrap_ci(values, seed=1, resamples=4000, level=level)
    half = stats.norm.ppf((1 + level) / 2) * values.std() / np.sqrt(len(values))
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.1 * half)


def test_bootstrap_equals_scipys_on_skewed_values():
    values = np.random.default_rng(0).exponential(size=30)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=2).confidence_interval
    np.testing.assert_allclose(metrics.bootstrap_ci(values, seed=1), theirs, atol=0.02)


def test_bootstrap_depends_on_the_seed_alone():
    values = np.random.default_rng(0).normal(size=40)
    assert metrics.bootstrap_ci(values, seed=1) == metrics.bootstrap_ci(values.copy(), seed=1)
    assert metrics.bootstrap_ci(values, seed=1) != metrics.bootstrap_ci(values, seed=2)


@pytest.mark.parametrize("values", [[0.25], [0.1] * 7])
def test_bootstrap_without_spread_has_no_width(values):
    np.testing.assert_allclose(metrics.bootstrap_ci(values, seed=0), [values[0]] * 2, rtol=1e-12)
