"""From rewards to decisions: which pairs are ranked, and what each response of a blended one weighs. All in float64.

A margin is the (transformed) reward of the principled response minus that of the plain one. The rule `threshold` is the
paper's (Alg. 1, arXiv:2408.02599), with the margin read as signed; the softmax weights are our choice; the others are
variants.
"""

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from ple_jax.core.errors import UserError


def threshold(margin: ArrayLike, tau: float) -> Bool[np.ndarray, "*pairs"]:
    """True where the pair is ranked: margin > tau. Ties are blended, and so is a pair whose principled one is worse.

    >>> threshold([0.3, 0.2, -0.3], 0.2).tolist()
    [True, False, False]
    """
    return np.asarray(margin, np.float64) > tau


def symmetric(margin: ArrayLike, tau: float) -> Bool[np.ndarray, "*pairs"]:
    """True where the better response is ranked over the worse, whichever it is: abs(margin) > tau. Ties are blended.

    >>> symmetric([0.3, 0.2, -0.3], 0.2).tolist()
    [True, False, True]
    """
    return np.abs(np.asarray(margin, np.float64)) > tau


def percentile(margin: ArrayLike, *, share: float, temperature: float) -> Float[np.ndarray, " pairs"]:
    """Weights of (best, worst) pairs as in the authors' released code: 1 for the top margins, else sigmoid(margin / T).

    Args:
      margin: reward of the best minus that of the worst response, of every pair of an iteration.
      share: the floor(share * n) largest margins get weight 1, where n counts the pairs with a margin above 0.
      temperature: T of the sigmoid, in units of the reward.

    Returns:
      One weight per pair in [0, 1]: 0, and the pair is dropped, where the best is not better than the worst.

    >>> percentile([3.0, 0.0, 1.0], share=0.5, temperature=1.0).round(3).tolist()
    [1.0, 0.0, 0.731]
    """
    margin = np.asarray(margin, np.float64)
    kept = margin > 0
    top = np.argsort(-margin, kind="stable")[: int(share * kept.sum())]
    weights = np.where(kept, np.exp(-np.logaddexp(0.0, -margin / temperature)), 0.0)
    weights[top] = 1.0
    return weights


def batch_weights(weights: ArrayLike, *, how: str) -> Float[np.ndarray, " pairs"]:
    """What the weights of `percentile` do to the pairs of one optimiser batch, as factors in a mean over all its pairs.

    Args:
      weights: of every pair of the optimiser batch; 0 drops a pair.
      how: "as_intended", sum(w * loss) / sum(w), which is our reading of what was meant; or "as_released", where the
        loss is averaged before it is weighted, so that the weights cancel and every kept pair counts the same.

    Returns:
      One factor per pair, 0 for dropped pairs, with mean 1; all 0 where every pair is dropped.

    Raises:
      UserError: unknown `how`.

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
    """softmax(rewards / temperature) over the k responses of a query.

    >>> softmax([0.0, 1.0], temperature=1.0).round(4).tolist()
    [0.2689, 0.7311]
    """
    logits = np.asarray(rewards, np.float64) / temperature
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def sigmoid(rewards: ArrayLike, *, temperature: float) -> Float[np.ndarray, "*queries k"]:
    """sigmoid(rewards / temperature), normalised to sum 1 over the k responses of a query."""
    # the softmax of log-sigmoids: sigmoids of very low rewards underflow, and 0 / 0 is no weight
    return softmax(-np.logaddexp(0.0, -np.asarray(rewards, np.float64) / temperature), temperature=1.0)


def uniform(rewards: ArrayLike) -> Float[np.ndarray, "*queries k"]:
    """1 / k for each of the k responses (an ablation)."""
    rewards = np.asarray(rewards, np.float64)
    return np.full(rewards.shape, 1 / rewards.shape[-1])


def best(rewards: ArrayLike) -> Float[np.ndarray, "*queries k"]:
    """All weight on the best of the k responses; ties share it (an ablation).

    >>> best([[0.0, 1.0], [2.0, 2.0]]).tolist()
    [[0.0, 1.0], [0.5, 0.5]]
    """
    rewards = np.asarray(rewards, np.float64)
    top = rewards == rewards.max(axis=-1, keepdims=True)
    return top / top.sum(axis=-1, keepdims=True)


def blend_weights(name: str, rewards: ArrayLike, *, temperature: float) -> Float[np.ndarray, "*queries k"]:
    """Weights of the k responses of each query: softmax, sigmoid, uniform or best of their (transformed) rewards.

    Args:
      name: which of the four.
      rewards: one per response.
      temperature: of softmax and sigmoid, > 0, in units of the reward; the other two ignore it.

    Returns:
      Weights that sum to 1 over the last axis.

    Raises:
      UserError: unknown name.
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
