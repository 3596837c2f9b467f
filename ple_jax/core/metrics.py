"""Measures of responses, and intervals. numpy, for every backend."""

from collections.abc import Sequence

import numpy as np


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct_n(responses: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams of all responses over their number (Li et al., arXiv:1510.03055); 0 where there is none."""
    everything = [gram for tokens in responses for gram in ngrams(tokens, n)]
    return len(set(everything)) / max(len(everything), 1)


def ngram_overlap(tokens: Sequence[int], reference: Sequence[int], n: int) -> float:
    """The share of a response's n-grams that occur in `reference`; 0 where it has none."""
    known, grams = set(ngrams(reference, n)), ngrams(tokens, n)
    return sum(gram in known for gram in grams) / max(len(grams), 1)


def bootstrap_ci(
    values: Sequence[float] | np.ndarray, *, seed: int, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979). For paired data give the differences."""
    values = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (resamples, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
