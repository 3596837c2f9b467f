"""Intervals and p-values against every resample written out, closed forms, scipy, and the errors that they promise."""

import itertools

import numpy as np
import pytest
from scipy import stats

from ple_jax.formulas.intervals import Paired, bootstrap_ci, clustered_ci, holm, paired

NAN = float("nan")


def crossed(rng, seeds, queries, *, by_seed=1.0, by_query=1.0, rest=1.0):
    """Values of mean 0: an effect of each seed, of each query, and of both."""
    normal = rng.standard_normal
    return by_seed * normal((seeds, 1)) + by_query * normal((1, queries)) + rest * normal((seeds, queries))


def every_resample(values):
    """The mean of every equally probable resample of rows and of columns."""
    seeds, queries = (list(itertools.product(range(n), repeat=n)) for n in values.shape)
    means = [np.nanmean(values[np.ix_(s, q)]) for s in seeds for q in queries if not np.isnan(values[np.ix_(s, q)]).all()]
    return np.array(means)


# ---------------------------------------------------------------- bootstrap_ci


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_bootstrap_approaches_the_normal_interval(level):
    values = np.random.default_rng(0).normal(3.0, 2.0, 1000)
    low, high = bootstrap_ci(values, seed=1, resamples=4000, level=level)
    half = stats.norm.ppf((1 + level) / 2) * values.std() / np.sqrt(len(values))
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.1 * half)


def test_bootstrap_equals_scipys_on_skewed_values():
    values = np.random.default_rng(0).exponential(size=30)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=2).confidence_interval
    np.testing.assert_allclose(bootstrap_ci(values, seed=1), theirs, atol=0.02)


@pytest.mark.parametrize("interval", [bootstrap_ci, lambda x, **kw: clustered_ci(x.reshape(5, 8), **kw)])
def test_an_interval_depends_on_the_seed_alone(interval):
    values = np.random.default_rng(0).normal(size=40)
    assert interval(values, seed=1) == interval(values.copy(), seed=1)
    assert interval(values, seed=1) != interval(values, seed=2)


@pytest.mark.parametrize("values", [[0.25], [0.1] * 7])
def test_bootstrap_without_spread_has_no_width(values):
    np.testing.assert_allclose(bootstrap_ci(values, seed=0), [values[0]] * 2, rtol=1e-12)
    np.testing.assert_allclose(clustered_ci(np.array([values, values]), seed=0), [values[0]] * 2, rtol=1e-12)


# ---------------------------------------------------------------- clustered_ci


@pytest.mark.parametrize("turned", [False, True], ids=["one seed", "one query"])
def test_with_one_seed_the_queries_alone_are_resampled(turned):
    values = np.random.default_rng(0).exponential(size=40)
    table = values[:, None] if turned else values[None]
    np.testing.assert_allclose(clustered_ci(table, seed=1), bootstrap_ci(values, seed=2), atol=0.02)


TABLE = np.array([[0.0, 1.0, 5.0, 2.5], [2.0, 2.25, 4.0, 9.0], [-1.0, 0.5, 3.0, 3.125]])
HOLES = np.array([[0.0, NAN, 5.0, NAN], [2.0, 2.25, NAN, NAN], [NAN, 0.5, 3.0, 3.125]])


@pytest.mark.parametrize("values", [TABLE, HOLES, TABLE.T, HOLES.T])
@pytest.mark.parametrize("level", [0.5, 0.9])
def test_clustered_interval_is_that_of_every_resample(values, level):
    every = every_resample(values)
    expected = np.quantile(every, [(1 - level) / 2, (1 + level) / 2])
    found = clustered_ci(values, seed=1, resamples=40_000, level=level)
    np.testing.assert_allclose(found, expected, atol=0.1)  # which of two neighbouring means is chance


def test_clustered_variance_is_owens():
    """E w_s w_s' = [s = s'] + 1 - 1/S of multinomial counts; rows and columns independent; normal from there."""
    values = crossed(np.random.default_rng(0), 30, 40, by_query=2.0)
    rows, columns = (np.eye(n) + 1 - 1 / n for n in values.shape)
    variance = (values * (rows @ values @ columns)).sum() / values.size**2 - values.mean() ** 2
    low, high = clustered_ci(values, seed=3, resamples=20_000)
    assert (high - low) / (2 * stats.norm.ppf(0.975)) == pytest.approx(np.sqrt(variance), rel=0.02)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.02)


def test_clustered_interval_holds_the_mean_as_often_as_it_says():
    rng, hits, naive = np.random.default_rng(0), 0, 0
    for seed in range(300):
        values = crossed(rng, 20, 20)
        low, high = clustered_ci(values, seed=seed, resamples=500)
        hits += low <= 0 <= high
        low, high = bootstrap_ci(values.ravel(), seed=seed, resamples=200)
        naive += low <= 0 <= high
    assert 0.91 <= hits / 300 <= 0.98  # resampling seeds or queries alone would give 0.83
    assert naive / 300 < 0.5


def test_three_seeds_that_differ_give_the_lowest_and_the_highest():
    """All draws of one seed have probability 1/27, more than 2.5%: so says the file's first page."""
    values = np.repeat([[1.0], [2.0], [4.0]], 50, axis=1)
    assert clustered_ci(values, seed=0) == (1.0, 4.0)
    low, high = clustered_ci(values, seed=0, level=0.9)
    assert 1 < low < high < 4


def test_unknown_values_are_left_out():
    holes = np.array([[1.0, 2.0, 4.0, NAN], [3.0, 1.5, 6.0, NAN], [NAN] * 4])
    infinite = np.where(np.isnan(holes), np.inf, holes)
    expected = clustered_ci(holes[:2, :3], seed=0)
    assert clustered_ci(holes, seed=0) == clustered_ci(infinite, seed=0) == expected
    assert np.isnan(clustered_ci(np.full((2, 3), NAN), seed=0)).all()
    assert np.isnan(clustered_ci(np.empty((0, 3)), seed=0)).all()


def test_a_resample_of_unknown_values_alone_has_no_mean():
    """An eighth of them, drawn from one seed and the other's query."""
    values = np.array([[5.0, NAN], [NAN, 5.0]])
    assert clustered_ci(values, seed=0) == (5.0, 5.0)
    assert paired(values, values - 1, seed=0, resamples=1000).p < 2 / 800  # of as many as there are


def test_values_without_seeds_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\).*one row a seed"):
        clustered_ci(np.ones(3), seed=0)


def test_many_queries_are_resampled_in_pieces(monkeypatch):
    values = crossed(np.random.default_rng(0), 3, 50)
    whole = clustered_ci(values, seed=1, resamples=3000)
    monkeypatch.setattr("ple_jax.formulas.intervals.CELLS", 50 * 7)  # 3000 = 428 * 7 + 4
    np.testing.assert_allclose(clustered_ci(values, seed=1, resamples=3000), whole, atol=0.2)
    assert paired(values, values - 10, seed=1, resamples=3000).p == 2 / 3001


# ---------------------------------------------------------------- paired


def test_paired_difference_and_interval_are_those_of_the_differences():
    rng = np.random.default_rng(0)
    a, b = crossed(rng, 4, 30) + 0.5, crossed(rng, 4, 30)
    found = paired(a, b, seed=3, level=0.9)
    assert found.difference == pytest.approx((a - b).mean())
    np.testing.assert_allclose((found.low, found.high), clustered_ci(a - b, seed=3, level=0.9), rtol=1e-12)


def test_p_is_that_of_every_resample():
    a = TABLE - 1.0
    every = every_resample(a)
    expected = 2 * min((every <= 0).mean(), (every >= 0).mean())
    assert 0.1 < expected < 0.5
    assert paired(a, np.zeros_like(a), seed=1, resamples=40_000).p == pytest.approx(expected, abs=0.01)


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


def test_equal_arrays_do_not_differ():
    values = crossed(np.random.default_rng(0), 3, 20)
    assert paired(values, values.copy(), seed=0) == Paired(0.0, 0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("resamples", [99, 1999])
def test_p_has_a_floor(resamples):
    a, b = np.full((3, 5), 2.0), np.ones((3, 5))
    for x, y in ((a, b), (b, a)):
        assert paired(x, y, seed=0, resamples=resamples).p == 2 / (resamples + 1)


def test_ties_count_on_both_sides():
    a = np.array([[1.0, -1.0]])  # means -1, 0, 1 with probabilities 1/4, 1/2, 1/4
    assert paired(a, np.zeros((1, 2)), seed=0).p == 1.0
    a = np.array([[1.0, 0.0]])  # 0, 1/2, 1: at most 0 in 1/4
    assert paired(a, np.zeros((1, 2)), seed=0).p == pytest.approx(0.5, abs=0.03)


def test_p_under_no_difference_is_uniform():
    rng = np.random.default_rng(2)
    p = np.array([paired(crossed(rng, 20, 20), crossed(rng, 20, 20), seed=seed, resamples=400).p for seed in range(400)])
    assert stats.kstest(p, "uniform").statistic < 0.1
    assert 0.02 <= (p <= 0.05).mean() <= 0.09


def test_three_seeds_agree_by_chance_in_a_quarter_of_cases():
    """The warning at the top of the file, and its figure for five seeds."""
    rng = np.random.default_rng(0)
    for seeds, chance in ((3, 0.25), (5, 0.0625)):
        effects = rng.standard_normal((300, seeds, 1))
        floor = np.mean([paired(x, np.zeros_like(x), seed=0, resamples=500).p == 2 / 501 for x in effects])
        assert floor == pytest.approx(chance, abs=0.06)


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


def test_the_t_test_over_seeds_is_scipys():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(5, 40)) + 0.3, rng.normal(size=(5, 40))
    found = paired(a, b, seed=0)
    assert found.p_seeds == pytest.approx(stats.ttest_rel(a.mean(1), b.mean(1)).pvalue, rel=1e-12)
    assert paired(b, a, seed=0).p_seeds == found.p_seeds
    assert np.isnan(paired(a[:1], b[:1], seed=0).p_seeds)
    # all seeds agree exactly: a constant difference is certain, none is none
    assert paired(a + 1, a, seed=0).p_seeds == pytest.approx(0, abs=1e-9) and paired(a, a, seed=0).p_seeds == 1
    a[0] = np.nan  # a seed of which nothing is known does not count
    assert paired(a, b, seed=0).p_seeds == pytest.approx(stats.ttest_rel(a[1:].mean(1), b[1:].mean(1)).pvalue, rel=1e-12)


def test_the_t_test_keeps_its_level_where_seeds_decide():
    """Three seeds, only they differ: the bootstrap's p is at most 0.05 in a quarter of equal pairs, this one's in 5%."""
    rng = np.random.default_rng(0)
    small = []
    for _ in range(400):
        effects = rng.normal(size=(3, 1)) * np.ones((1, 8))
        found = paired(effects, np.zeros((3, 8)), seed=0, resamples=200)
        small.append((found.p <= 0.05, found.p_seeds <= 0.05))
    bold, right = np.mean(small, 0)
    assert bold > 0.2 and 0.02 < right < 0.09
