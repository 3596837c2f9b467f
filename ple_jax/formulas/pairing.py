"""Decisions made from rewards: which pairs are ranked, and how much each response of a blended pair weighs. All in float64.

A margin is the (transformed) reward of the principled response minus that of the plain one. The rule `threshold` is the
paper's (Alg. 1, arXiv:2408.02599), with the margin read as signed. The softmax weights are our choice; all others are
variants.
"""

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from ple_jax.core.errors import UserError


def threshold(margin: ArrayLike, tau: float) -> Bool[np.ndarray, "*pairs"]:
    """Returns, for every pair, whether it is ranked: margin > tau.

    Every other pair is blended, including one with a margin of exactly tau and one whose principled response is the worse.

    Args:
      margin: reward of the principled response minus that of the plain one, one per pair.
      tau: the threshold, >= 0, in the unit of the margin.

    Examples:
      >>> threshold([0.3, 0.2, -0.3], 0.2).tolist()
      [True, False, False]
    """
    return np.asarray(margin, np.float64) > tau


def symmetric(margin: ArrayLike, tau: float) -> Bool[np.ndarray, "*pairs"]:
    """Returns, for every pair, whether the better response, whichever it is, is ranked above the worse: abs(margin) > tau.

    Every other pair is blended, including one with an absolute margin of exactly tau.

    Args:
      margin: reward of the principled response minus that of the plain one, one per pair.
      tau: the threshold, >= 0, in the unit of the margin.

    Examples:
      >>> symmetric([0.3, 0.2, -0.3], 0.2).tolist()
      [True, False, True]
    """
    return np.abs(np.asarray(margin, np.float64)) > tau


def percentile(margin: ArrayLike, *, share: float, temperature: float) -> Float[np.ndarray, " pairs"]:
    """Computes the weights of (best, worst) pairs as in the authors' released code.

    The pairs with the largest margins get weight 1, all others with a margin above 0 sigmoid(margin / T).

    Args:
      margin: reward of the best response minus that of the worst, for every pair of an iteration.
      share: the floor(share * n) largest margins get weight 1, where n is the number of pairs with a margin above 0.
      temperature: T of the sigmoid, > 0, in units of the reward.

    Returns:
      One weight per pair in [0, 1]. It is 0, which drops the pair, where the best response is not better than the worst.

    Examples:
      >>> percentile([3.0, 0.0, 1.0], share=0.5, temperature=1.0).round(3).tolist()
      [1.0, 0.0, 0.731]
    """
    margin = np.asarray(margin, np.float64)
    kept = margin > 0
    top = np.argsort(-margin, kind="stable")[: int(share * kept.sum() + 1e-9)]  # 0.7 * 90 is 62.99... in float64
    weights = np.where(kept, np.exp(-np.logaddexp(0.0, -margin / temperature)), 0.0)
    weights[top] = 1.0
    return weights


def batch_weights(weights: ArrayLike, *, how: str) -> Float[np.ndarray, " pairs"]:
    """Turns the weights of `percentile` into factors for the mean loss over all pairs of one optimiser batch.

    Args:
      weights: one per pair of the optimiser batch; 0 drops a pair.
      how: "as_intended" gives sum(w * loss) / sum(w), which is our reading of what was meant. "as_released" averages the
        loss before it is weighted, as the released code does: the weights cancel, and every kept pair counts the same.

    Returns:
      One factor per pair, 0 for dropped pairs. Their mean is 1, or 0 if every pair is dropped.

    Raises:
      UserError: `how` is neither of the two.

    Examples:
      >>> batch_weights([1.0, 0.5, 0.0], how="as_intended").tolist()
      [2.0, 1.0, 0.0]
      >>> batch_weights([1.0, 0.5, 0.0], how="as_released").tolist()
      [1.5, 1.5, 0.0]
    """
    weights = np.asarray(weights, np.float64)
    match how:
        case "as_intended":
            factors = weights
        case "as_released":
            factors = (weights > 0).astype(np.float64)
        case _:
            raise UserError(f"ple.percentile_weights = {how!r}: choose as_intended or as_released")
    return factors * len(factors) / (factors.sum() if factors.any() else 1.0)


def softmax(rewards: ArrayLike, *, temperature: float) -> Float[np.ndarray, "*queries k"]:
    """Computes the weights softmax(rewards / temperature) over the k responses of each query.

    Args:
      rewards: (transformed) rewards [*queries, k].
      temperature: > 0, in units of the reward.

    Examples:
      >>> softmax([0.0, 1.0], temperature=1.0).round(4).tolist()
      [0.2689, 0.7311]
    """
    logits = np.asarray(rewards, np.float64) / temperature
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def sigmoid(rewards: ArrayLike, *, temperature: float) -> Float[np.ndarray, "*queries k"]:
    """Computes the weights sigmoid(rewards / temperature), normalised to sum 1 over the k responses of each query.

    Args:
      rewards: (transformed) rewards [*queries, k].
      temperature: > 0, in units of the reward.
    """
    # the softmax of log-sigmoids: sigmoids of very low rewards underflow, and 0 / 0 is no weight
    return softmax(-np.logaddexp(0.0, -np.asarray(rewards, np.float64) / temperature), temperature=1.0)


def uniform(rewards: ArrayLike) -> Float[np.ndarray, "*queries k"]:
    """Returns the weight 1 / k for each of the k responses of rewards [*queries, k] (an ablation)."""
    rewards = np.asarray(rewards, np.float64)
    return np.full(rewards.shape, 1 / rewards.shape[-1])


def best(rewards: ArrayLike) -> Float[np.ndarray, "*queries k"]:
    """Puts all weight on the best of the k responses of rewards [*queries, k]; equal best ones share it (an ablation).

    Examples:
      >>> best([[0.0, 1.0], [2.0, 2.0]]).tolist()
      [[0.0, 1.0], [0.5, 0.5]]
    """
    rewards = np.asarray(rewards, np.float64)
    top = rewards == rewards.max(axis=-1, keepdims=True)
    return top / top.sum(axis=-1, keepdims=True)


def blend_weights(name: str, rewards: ArrayLike, *, temperature: float) -> Float[np.ndarray, "*queries k"]:
    """Computes the blend weights of the k responses of each query from their (transformed) rewards.

    Args:
      name: the rule: "softmax", "sigmoid", "uniform" or "best".
      rewards: one per response, [*queries, k].
      temperature: > 0, in units of the reward, for softmax and sigmoid; the other two ignore it.

    Returns:
      Weights that sum to 1 over the last axis.

    Raises:
      UserError: `name` is none of the four.
    """
    match name:
        case "softmax":
            return softmax(rewards, temperature=temperature)
        case "sigmoid":
            return sigmoid(rewards, temperature=temperature)
        case "uniform":
            return uniform(rewards)
        case "best":
            return best(rewards)
    raise UserError(f"ple.blend = {name!r}: choose softmax, sigmoid, uniform or best")
