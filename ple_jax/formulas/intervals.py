"""Intervals and tests of means: numpy, float64.

What one run gives is one draw of everything that its seed decides; what a query gives is one draw of the queries there
are. A difference between two methods is to be believed where it is larger than both explain, so seeds and queries are
resampled together, crossed, as every seed answers the same queries.

What few seeds can tell. A bootstrap of 3 seeds knows no seed but those. Where the seeds, not the queries, decide how far
the mean is off, the 95% interval is just from the lowest seed to the highest, and holds the true mean with probability
1 - 2 * (1/2)^3 = 75%; and `paired` finds its smallest p wherever all seeds agree on which method is better, which two
equal methods do in 25% of cases (5 seeds: 6%, 8 seeds: 1%). Where the seeds hardly differ both are right, or careful. So
three seeds tell whether a difference is large beside what other queries would do to it; whether another seed would agree
they show only roughly, by how far they lie apart. That is why every seed is shown, and why `paired` gives a second p, of
the seeds alone; where they differ as much as the methods do, run more of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ple_jax.core.extras import need

CELLS = 1 << 20  # numbers of an array of resampled counts: memory does not grow with the number of resamples


def bootstrap_ci(
    values: Sequence[float] | np.ndarray, *, seed: int, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979). For paired data give the differences."""
    values = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (resamples, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def clustered_ci(
    values: Float[np.ndarray, "seed query"], *, seed: int, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean over seeds and queries, both resampled, independently of each other and crossed.

    The pigeonhole bootstrap. It is careful with what is neither the seed's nor the query's doing, whose variance it counts
    up to three times, and too bold with few seeds: see the top of this file. With one seed the queries alone are
    resampled, and the interval says nothing of another seed; with one query the seeds alone.

    Args:
      values: one row a seed, one column a query (the mean of its responses), the same queries in every row. What is
        nan or infinite is left out, of the mean and of its resamples.
      seed: of the resampling.
      resamples: how many means are drawn.
      level: the share of them that lies in the interval.

    Returns:
      (low, high), in the unit of the values; nan where there is no value.

    References: Owen (2007), The pigeonhole bootstrap, Annals of Applied Statistics 1(2), doi:10.1214/07-AOAS122.

    >>> clustered_ci(np.array([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]]), seed=0)  # 3 seeds, of which queries see no more
    (1.0, 4.0)
    """
    return _interval(_means(values, seed, resamples), level)


class Paired(NamedTuple):
    """What `paired` says of a - b."""

    difference: float
    low: float
    high: float
    p: float
    p_seeds: float


# one piece: a dozen lines and what they mean
def paired(
    a: Float[np.ndarray, "seed query"],
    b: Float[np.ndarray, "seed query"],
    *,
    seed: int,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Paired:
    """Is the mean of a other than that of b, on the same queries and (in pairs) the same seeds?

    The differences are resampled as in `clustered_ci`. p is two-sided, from the means of the same resamples:
    2 * min(share <= 0, share >= 0), at most 1, the observed mean counted among them, so that p is never below
    2 / (resamples + 1). With few seeds it is too small: see the top of this file. p_seeds is that of a two-sided t-test of
    the seeds' mean differences, with one degree of freedom fewer than there are seeds: right for few seeds, where these are
    about normal, and careful, since it knows of the queries only what they do to those means.

    Args:
      a, b: as `clustered_ci` takes them, row by row of the same seed, column by column of the same query. Where either
        has no finite value the pair is left out.
      seed, resamples, level: as there.

    Returns:
      The mean difference with its interval, p and p_seeds; all nan where there is no pair, p_seeds also for one seed.

    Raises:
      ValueError: the shapes differ.

    References: Davison and Hinkley (1997), Bootstrap Methods and their Application, 4.4.

    >>> paired(np.ones((3, 8)), np.ones((3, 8)), seed=0)
    Paired(difference=0.0, low=0.0, high=0.0, p=1.0, p_seeds=1.0)
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a is {a.shape} and b {b.shape}: give the same seeds and queries of both")
    known = np.isfinite(a) & np.isfinite(b)
    values = np.subtract(a, b, out=np.full(a.shape, np.nan), where=known)
    means = _means(values, seed, resamples)
    if not len(means):
        return Paired(*[float("nan")] * 5)
    tail = min((means <= 0).sum(), (means >= 0).sum())
    p = min(2 * (1 + int(tail)) / (len(means) + 1), 1.0)
    by_seed = np.array([row[kept].mean() for row, kept in zip(values, known, strict=True) if kept.any()])
    return Paired(float(values[known].mean()), *_interval(means, level), p, _t_test(by_seed))


def _t_test(x: Float[np.ndarray, " seed"]) -> float:
    """Two-sided p of Student's test that the mean is 0; nan for fewer than two values."""
    if len(x) < 2:
        return float("nan")
    need("eval", "Student's test", "scipy")
    from scipy.special import stdtr

    error = x.std(ddof=1) / np.sqrt(len(x))
    if error == 0:
        return float(x.mean() == 0)
    return float(2 * stdtr(len(x) - 1, -abs(x.mean()) / error))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number: of all that are then at most alpha, the chance of even one false one is alpha.

    The k-th smallest of m is multiplied by m - k + 1; it becomes at most 1, and at least what the one before it became. nan
    is no test: it stays nan and does not count.

    References: Holm (1979), A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6.

    >>> holm([0.25, 0.125, float("nan"), 0.5])
    [0.5, 0.375, nan, 0.5]
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")[: (~np.isnan(p)).sum()]  # nan comes last
    adjusted = np.full(p.shape, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1.0)
    return adjusted.tolist()


def _means(values: Float[np.ndarray, "seed query"], seed: int, resamples: int) -> Float[np.ndarray, " resamples"]:
    """The mean of every resample. One that drew nothing but missing values has none and is left out."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2:
        raise ValueError(f"the values are of shape {values.shape}: give one row a seed, one column a query")
    known = np.isfinite(values)
    rows, columns = known.any(1), known.any(0)  # a seed or query of which nothing is known was not drawn either
    values, known = values[rows][:, columns], known[rows][:, columns].astype(np.float64)
    if not values.size:
        return np.empty(0)
    sums, rng = np.where(known, values, 0.0), np.random.default_rng(seed)
    step = max(CELLS // max(values.shape), 1)
    means = []
    for start in range(0, resamples, step):
        seeds, queries = (_counts(rng, min(step, resamples - start), n) for n in values.shape)
        weight = ((seeds @ known) * queries).sum(1)
        means.append(((seeds @ sums) * queries).sum(1)[weight > 0] / weight[weight > 0])
    return np.concatenate(means)


def _counts(rng: np.random.Generator, resamples: int, n: int) -> Float[np.ndarray, "resamples n"]:
    """How often each of n things comes in n draws with replacement."""
    drawn = rng.integers(0, n, (resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def _interval(means: np.ndarray, level: float) -> tuple[float, float]:
    if not len(means):
        return float("nan"), float("nan")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
