"""How well calibrated the scores of a reward model are: whether the probabilities that they stand for can be trusted."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ple_jax.formulas import intervals

_BINS = 10


class Bin(NamedTuple):
    """A bin of the reliability diagram: pairs whose probability of the likelier response lies in one tenth of 0.5 to 1."""

    pairs: int
    confidence: float  # mean of that probability
    accuracy: float  # share of them in which it was the preferred one


def calibration(margins: Float[np.ndarray, " pairs"]) -> list[Bin]:
    """Computes the reliability of sigmoid(|margin|) as a probability of being right, in 10 bins of equal width.

    Args:
        margins: score of the preferred response minus that of the other one, one per pair.

    Returns:
        The bins that are not empty, in ascending order of the probability.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    place = np.minimum(((confidence - 0.5) * 2 * _BINS).astype(int), _BINS - 1)
    right = _right(margins)
    return [
        Bin(int(inside.sum()), float(confidence[inside].mean()), float(right[inside].mean()))
        for inside in (place == i for i in range(_BINS))
        if inside.any()
    ]


def measures(margins: Float[np.ndarray, " pairs"], *, seed: int) -> dict[str, Any]:
    """Measures how well scores order pairs, and how far the probabilities that they stand for can be trusted.

    Args:
        margins: score of the preferred response minus that of the other one, one per pair.
        seed: of the bootstrap.

    Returns:
        accuracy (ties count half) with its 95% interval, log_loss (nats) and brier (the Brier score) of sigmoid(margin), the
        expected calibration error (arXiv:1706.04599, eq. 3), the mean margin, and the bins of `calibration`.
    """
    margins = np.asarray(margins, np.float64)
    right = _right(margins)
    bins = calibration(margins)
    wrong = np.exp(-np.logaddexp(0.0, margins))  # 1 - sigmoid(margin)
    return {
        "accuracy": float(right.mean()),
        "accuracy_ci95": np.clip(intervals.bootstrap_ci(right, seed=seed), 0.0, 1.0).tolist(),
        "log_loss": float(np.logaddexp(0.0, -margins).mean()),
        "brier": float((wrong**2).mean()),
        "calibration_error": sum(b.pairs * abs(b.confidence - b.accuracy) for b in bins) / len(margins),
        "margin": float(margins.mean()),
        "calibration": [b._asdict() for b in bins],
    }


def _right(margins: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.sign(margins)
