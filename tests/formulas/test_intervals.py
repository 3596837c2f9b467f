"""Intervals and p-values against closed forms, scipy, and the coverage and the errors that they promise."""

import numpy as np
import pytest
from scipy import stats

from ple_jax.formulas import intervals
from ple_jax.formulas.intervals import (
    FEW,
    Paired,
    bootstrap_ci,
    clustered_ci,
    holm,
    paired,
    student_p,
    student_quantile,
)

NAN = float("nan")


def crossed(rng, seeds, queries, *, by_seed=1.0, by_query=1.0, rest=1.0):
    """Values of mean 0: an effect of each seed, of each query, and of both."""
    normal = rng.standard_normal
    return by_seed * normal((seeds, 1)) + by_query * normal((1, queries)) + rest * normal((seeds, queries))


# ---------------------------------------------------------------- Student's t


@pytest.mark.parametrize("freedom", [1, 2, 3, 7, 62, 1000])
def test_students_t_is_scipys(freedom):
    for t in (0.0, 0.1, 1.0, 3.0, 30.0):
        assert student_p(t, freedom) == student_p(-t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), abs=1e-12)
    for level in (0.5, 0.95, 0.99):
        assert student_quantile(level, freedom) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-9)


@pytest.mark.parametrize("freedom", [1.3, 2.9, 7.7])
def test_students_t_of_no_whole_number(freedom):
    assert student_p(2.0, freedom) == pytest.approx(2 * stats.t.sf(2.0, freedom), abs=1e-6)
    assert student_quantile(0.95, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-6)


# ---------------------------------------------------------------- bootstrap_ci


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_bootstrap_approaches_the_normal_interval(level):
    values = np.random.default_rng(0).normal(3.0, 2.0, 1000)
    low, high = bootstrap_ci(values, seed=1, resamples=4000, level=level)
    half = stats.norm.ppf((1 + level) / 2) * values.std() / np.sqrt(len(values))
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.1 * half)


def test_bootstrap_equals_scipys_on_skewed_values():
    values = np.random.default_rng(0).exponential(size=FEW)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=2).confidence_interval
    np.testing.assert_allclose(bootstrap_ci(values, seed=1), theirs, atol=0.02)


@pytest.mark.parametrize("part", [1, 999, 10**9])
def test_bootstrap_is_the_same_in_parts_of_any_size(part, monkeypatch):
    """One row of draws, several with a rest, and all at once."""
    values = np.random.default_rng(0).normal(size=100)
    drawn = np.random.default_rng(7).integers(0, 100, (500, 100))
    monkeypatch.setattr(intervals, "DRAWS", part)
    ends = np.quantile(values[drawn].mean(1), [(1 - 0.95) / 2, (1 + 0.95) / 2])
    assert bootstrap_ci(values, seed=7, resamples=500) == tuple(ends)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_interval_of_few_values_is_students(level):
    values = np.random.default_rng(0).exponential(size=FEW - 1)
    theirs = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    np.testing.assert_allclose(bootstrap_ci(values, seed=1, level=level), theirs, rtol=1e-9)


@pytest.mark.parametrize("interval", [bootstrap_ci, lambda x, **kw: clustered_ci(x[None], **kw)])
def test_an_interval_depends_on_the_seed_alone(interval):
    values = np.random.default_rng(0).normal(size=FEW)
    assert interval(values, seed=1) == interval(values.copy(), seed=1)
    assert interval(values, seed=1) != interval(values, seed=2)


def test_an_interval_of_nothing_is_unknown():
    assert np.isnan(bootstrap_ci([], seed=0)).all()


@pytest.mark.parametrize("values", [[0.25], [0.1] * 7, [0.1] * 100, [0.0] * 8, [1e-300, 1e-300]])
def test_an_interval_without_spread_has_no_width(values):
    np.testing.assert_allclose(bootstrap_ci(values, seed=0), [values[0]] * 2, rtol=1e-12)
    np.testing.assert_allclose(clustered_ci(np.array([values, values]), seed=0), [values[0]] * 2, rtol=1e-12)


DRAWS = {  # (draws, their mean): of several kinds, each with the coverage that is promised of 8, 16, 32 and 63 of them
    "normal": (lambda rng, shape: rng.standard_normal(shape), 0.0, (0.94, 0.94, 0.94, 0.93)),
    "skewed": (lambda rng, shape: rng.exponential(size=shape), 1.0, (0.88, 0.89, 0.92, 0.92)),
    "two values": (lambda rng, shape: (rng.random(shape) < 0.5) * 1.0, 0.5, (0.92, 0.92, 0.93, 0.93)),
    "three values": (lambda rng, shape: rng.choice([-1.0, 0, 1], shape, p=[0.2, 0.6, 0.2]), 0.0, (0.94, 0.93, 0.93, 0.93)),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_the_interval_holds_the_mean_as_often_as_it_says(kind):
    """The percentile bootstrap of 8 normal values holds it in 88%."""
    draw, mean, promised = DRAWS[kind]
    rng = np.random.default_rng(7)
    for n, least in zip((8, 16, 32, 63), promised, strict=True):
        found = np.array([bootstrap_ci(values, seed=0) for values in draw(rng, (600, n))])
        held = ((found[:, 0] <= mean) & (mean <= found[:, 1])).mean()
        assert least - 0.015 <= held <= 0.985, (n, held)


# ---------------------------------------------------------------- clustered_ci


@pytest.mark.parametrize("size", [8, 100])
@pytest.mark.parametrize("turned", [False, True], ids=["one seed", "one query"])
def test_with_one_seed_the_queries_alone_count(turned, size):
    values = np.random.default_rng(0).exponential(size=size)
    assert clustered_ci(values[:, None] if turned else values[None], seed=1) == bootstrap_ci(values, seed=1)


def test_clustered_interval_by_hand():
    """Seeds' means 1 and 3, queries' 1, 2, 3: variance 2 / 2 + 1 / 3, of 1 / (9/16 + 1/16 / 2) = 32/19 degrees."""
    values = np.array([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]])
    half = stats.t.ppf(0.975, 32 / 19) * np.sqrt(4 / 3)
    np.testing.assert_allclose(clustered_ci(values, seed=0), [2 - half, 2 + half], rtol=1e-6)


def test_seeds_that_agree_on_all_queries_are_students_seeds():
    values = np.repeat([[1.0], [2.0], [4.0]], 50, axis=1)
    theirs = stats.ttest_1samp([1.0, 2.0, 4.0], 0.0).confidence_interval(0.95)
    np.testing.assert_allclose(clustered_ci(values, seed=0), theirs, rtol=1e-9)


@pytest.mark.parametrize(("seeds", "queries"), [(3, 8), (5, 32)])
@pytest.mark.parametrize("effects", [(0, 1, 1), (1, 0, 0.5), (1, 1, 1), (0, 0, 1)], ids=str)
def test_clustered_interval_holds_the_mean_as_often_as_it_says(seeds, queries, effects):
    rng, (by_seed, by_query, rest) = np.random.default_rng(0), effects
    found = [
        clustered_ci(crossed(rng, seeds, queries, by_seed=by_seed, by_query=by_query, rest=rest), seed=0) for _ in range(200)
    ]
    assert np.mean([low <= 0 <= high for low, high in found]) >= 0.89  # resampled, three seeds held it in 75%


def test_unknown_values_are_left_out():
    holes = np.array([[1.0, 2.0, 4.0, NAN], [3.0, 1.5, 6.0, NAN], [NAN] * 4])
    infinite = np.where(np.isnan(holes), np.inf, holes)
    expected = clustered_ci(holes[:2, :3], seed=0)
    assert clustered_ci(holes, seed=0) == clustered_ci(infinite, seed=0) == expected
    assert np.isnan(clustered_ci(np.full((2, 3), NAN), seed=0)).all()
    assert np.isnan(clustered_ci(np.empty((0, 3)), seed=0)).all()


def test_values_without_seeds_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\).*one row a seed"):
        clustered_ci(np.ones(3), seed=0)


# ---------------------------------------------------------------- paired


def test_paired_difference_and_interval_are_those_of_the_differences():
    rng = np.random.default_rng(0)
    a, b = crossed(rng, 4, 30) + 0.5, crossed(rng, 4, 30)
    found = paired(a, b, seed=3, level=0.9)
    assert found.difference == pytest.approx((a - b).mean())
    np.testing.assert_allclose((found.low, found.high), clustered_ci(a - b, seed=3, level=0.9), rtol=1e-12)


def test_p_is_where_the_interval_ends_at_zero():
    rng = np.random.default_rng(1)
    a, b = crossed(rng, 3, 40) + 1.0, crossed(rng, 3, 40)
    p = paired(a, b, seed=0).p
    assert 0 < p < 1
    low, high = clustered_ci(a - b, seed=0, level=1 - p)
    assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-9)


def test_p_of_one_seed_is_that_of_scipys_paired_test():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(1, 40)) + 0.3, rng.normal(size=(1, 40))
    assert paired(a, b, seed=0).p == pytest.approx(stats.ttest_rel(a[0], b[0]).pvalue, rel=1e-9)
    assert paired(a.T, b.T, seed=0).p == paired(a, b, seed=0).p  # seeds of one query
    assert np.isnan(paired(a[:, :1], b[:, :1], seed=0).p)  # one seed of one query: no test


def test_paired_turns_with_its_arguments():
    rng = np.random.default_rng(1)
    a, b = crossed(rng, 3, 40) + 0.3, crossed(rng, 3, 40)
    there, back = paired(a, b, seed=5), paired(b, a, seed=5)
    assert there.p == back.p and 0.01 < there.p < 1
    np.testing.assert_allclose([-back.difference, -back.high, -back.low], there[:3], rtol=1e-12)


def test_pairing_takes_out_what_both_share():
    """Queries of very unequal difficulty, a always 0.1 better: certain in pairs, lost without them."""
    rng = np.random.default_rng(0)
    hard = crossed(rng, 3, 40, by_seed=0.0, by_query=5.0, rest=0.0)
    a, b = hard + 0.1 + 0.01 * rng.standard_normal((3, 40)), hard
    assert paired(a, b, seed=0).low > 0.09
    assert paired(a, b[:, ::-1], seed=0).p > 0.5


def test_equal_arrays_do_not_differ_and_constant_differences_are_certain():
    values = crossed(np.random.default_rng(0), 3, 20)
    assert paired(values, values.copy(), seed=0) == Paired(0.0, 0.0, 0.0, 1.0)
    found = paired(values + 1, values, seed=0)
    np.testing.assert_allclose(found, (1.0, 1.0, 1.0, 0.0), atol=1e-9)


@pytest.mark.parametrize(("seeds", "queries"), [(3, 8), (5, 32), (8, 32)])
@pytest.mark.parametrize("effects", [(0, 1, 1), (0, 1, 0), (1, 0, 0.5), (1, 1, 1)], ids=str)
def test_equal_methods_seldom_differ_whatever_has_an_effect(seeds, queries, effects):
    """Type-I error at 0.05; the seeds' means alone err in 0.34 to 0.70 of cases where queries have effects of their own."""
    rng, (by_seed, by_query, rest) = np.random.default_rng(0), effects
    zero = np.zeros((seeds, queries))
    p = [
        paired(crossed(rng, seeds, queries, by_seed=by_seed, by_query=by_query, rest=rest), zero, seed=0).p
        for _ in range(300)
    ]
    assert np.mean(np.array(p) <= 0.05) <= 0.09


def test_a_difference_that_is_there_is_found():
    rng = np.random.default_rng(0)
    p = [paired(crossed(rng, 5, 32) + 2.5, np.zeros((5, 32)), seed=0).p for _ in range(100)]
    assert np.mean(np.array(p) <= 0.05) > 0.9


def test_a_pair_with_an_unknown_half_is_left_out():
    a = np.array([[1.0, 2.0, NAN, np.inf], [3.0, 5.0, 1.0, 2.0]])
    b = np.array([[0.5, NAN, 1.0, np.inf], [1.0, 1.0, -np.inf, 2.0]])
    known = np.array([[0.5, NAN, NAN, NAN], [2.0, 4.0, NAN, 0.0]])
    found = paired(a, b, seed=0)
    assert found.difference == np.nanmean(known)
    assert found[1:] == paired(known, np.zeros_like(known), seed=0)[1:]
    assert np.isnan(paired(np.full((2, 2), NAN), np.ones((2, 2)), seed=0)).all()


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(1, 4\)"):
        paired(np.ones((3, 4)), np.ones((1, 4)), seed=0)


# ---------------------------------------------------------------- holm


def test_holm_by_hand():
    # sorted 0.005 0.01 0.03 0.04, times 4 3 2 1: 0.02 0.03 0.06 0.04, and the last no less than the one before it
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02], rtol=1e-12)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([], []),
        ([0.2], [0.2]),
        ([0.5, 0.75, 1.0], [1.0, 1.0, 1.0]),
        ([0.125, 0.125], [0.25, 0.25]),
        ([NAN, 0.125, NAN, 0.5], [NAN, 0.25, NAN, 0.5]),
        ([NAN], [NAN]),
    ],
)
def test_holm(p, expected):
    np.testing.assert_array_equal(holm(p), expected)


def test_holm_keeps_the_order_and_is_between_p_and_bonferroni():
    p = np.random.default_rng(0).random(50) ** 3
    adjusted = np.array(holm(p.tolist()))
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()
    assert (adjusted >= p).all() and (adjusted <= np.minimum(50 * p, 1)).all() and adjusted.max() <= 1


def test_holm_rejects_what_the_step_down_procedure_rejects():
    """Compares p(k) with alpha / (m - k + 1), from the smallest up, until one is larger."""
    rng = np.random.default_rng(0)
    for alpha in (0.01, 0.05, 0.2):
        p = rng.random(12) ** 4
        rejected = set()
        for k, i in enumerate(np.argsort(p)):
            if p[i] > alpha / (12 - k):
                break
            rejected.add(int(i))
        assert {i for i, adjusted in enumerate(holm(p.tolist())) if adjusted <= alpha} == rejected
        assert 0 < len(rejected) < 12
