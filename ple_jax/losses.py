"""The losses, as pure functions on arrays: one file for numpy, JAX and torch, through the array-API standard.

Every function returns one value per response, pair, query or token, and leaves the reduction to the caller. Functions with
a clipped ratio also return what was clipped. Log-probabilities are in nats, results in the dtype of the first argument
(backends pass float32). Masks may be boolean or 0/1 arrays; values where a mask is false are ignored, even nan. No function
needs a stop-gradient: everything that is constant is computed beforehand and passed as an argument.

References: PLE, arXiv:2408.02599; RRHF, arXiv:2304.05302; DPO, arXiv:2305.18290; IPO, arXiv:2310.12036; PPO,
arXiv:1707.06347; RLOO, arXiv:2402.14740; GRPO, arXiv:2402.03300; Dr. GRPO, arXiv:2503.20783; DAPO, arXiv:2503.14476;
KL estimators, http://joschu.net/blog/kl-approx.html. "TRL" is TRL 1.16.
"""

import math
from typing import Any

from array_api_compat import array_namespace
from jaxtyping import Bool, Float

Array = Any  # of numpy, JAX or torch: this file imports nothing of the project

# ---------------------------------------------------------------- sums and means


def masked_sum(values: Float[Array, "*rows time"], mask: Bool[Array, "*rows time"]) -> Float[Array, "*rows"]:
    """Computes the sum over the true positions of the last axis; it is 0 where there are none."""
    xp = array_namespace(values)
    return xp.sum(xp.where(xp.astype(mask, xp.bool), values, 0.0), axis=-1)


def sum_logprob(logprobs: Float[Array, "*rows time"], mask: Bool[Array, "*rows time"]) -> Float[Array, "*rows"]:
    """Computes the log-probability of each response: the sum over its tokens.

    Args:
      logprobs: log pi(y_t | x, y_<t) in nats; where the mask is false any value is allowed, even nan.
      mask: true on response tokens.

    Returns:
      One value per response, in nats; 0 for an empty response.

    Examples:
      >>> import numpy as np
      >>> float(sum_logprob(np.array([-1.0, -2.0, -9.0]), np.array([True, True, False])))
      -3.0
    """
    return masked_sum(logprobs, mask)


def masked_mean(values: Float[Array, "*rows time"], mask: Bool[Array, "*rows time"]) -> Float[Array, "*rows"]:
    """Computes the mean over the true positions of the last axis; it is 0 where there are none.

    Examples:
      >>> import numpy as np
      >>> float(masked_mean(np.array([1.0, 2.0, 9.0]), np.array([True, True, False])))
      1.5
    """
    xp = array_namespace(values)
    length = xp.sum(xp.astype(mask, values.dtype), axis=-1)
    return masked_sum(values, mask) / xp.clip(length, min=1.0)


def mean_logprob(logprobs: Float[Array, "*rows time"], mask: Bool[Array, "*rows time"]) -> Float[Array, "*rows"]:
    """Computes the length-normalised log-probability of each response (RRHF, eq. 1).

    Args:
      logprobs: log pi(y_t | x, y_<t) in nats; where the mask is false any value is allowed, even nan.
      mask: true on response tokens.

    Returns:
      One value per response, in nats per token; 0 for an empty response.
    """
    return masked_mean(logprobs, mask)


# ---------------------------------------------------------------- pairs


def _relu(x: Array) -> Array:
    # where, not maximum(x, 0): the latter has gradient 0.5 at 0 in JAX and torch
    return array_namespace(x).where(x > 0, x, 0.0)


def _log_sigmoid(x: Array) -> Array:
    xp = array_namespace(x)
    return -xp.logaddexp(xp.zeros_like(x), -x)


def hinge(
    lp_plain: Float[Array, "*rows"], lp_principled: Float[Array, "*rows"], *, margin: float
) -> Float[Array, "*rows"]:
    """Computes a hinge on length-normalised log-probabilities: relu(lp_plain - lp_principled + margin).

    The gradient at the corner is 0. With margin 0 it is RRHF's ranking loss (eq. 2). It is our choice to read
    the ranking loss of PLE's paper in this way: in log space, and normalised by length.

    Args:
      lp_plain: `mean_logprob` of the plain response, nats per token.
      lp_principled: the same for the principled response.
      margin: by how many nats per token the principled response must lead before the loss is 0.

    Returns:
      One loss per pair, in nats per token.

    Examples:
      >>> import numpy as np
      >>> hinge(np.array([-1.0, -3.0]), np.array([-2.0, -2.0]), margin=0.5).tolist()
      [1.5, 0.0]
    """
    return _relu(lp_plain - lp_principled + margin)


def hinge_prob(lp_plain: Float[Array, "*rows"], lp_principled: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Computes a hinge on geometric-mean token probabilities: relu(exp(lp_plain) - exp(lp_principled)).

    This is our reading of a review of PLE's paper, which says that its ranking loss works on probabilities. The probability
    of a whole sequence underflows; its geometric mean does not.

    Args:
      lp_plain: `mean_logprob` of the plain response, nats per token.
      lp_principled: the same for the principled response.

    Returns:
      One loss per pair, a difference of probabilities in [0, 1].
    """
    xp = array_namespace(lp_plain)
    return _relu(xp.exp(lp_plain) - xp.exp(lp_principled))


def sigmoid(
    lp_plain: Float[Array, "*rows"], lp_principled: Float[Array, "*rows"], *, beta: float
) -> Float[Array, "*rows"]:
    """Computes a smooth ranking loss, which never quite reaches 0: -log sigmoid(beta * (lp_principled - lp_plain)).

    Args:
      lp_plain: `mean_logprob` of the plain response, nats per token.
      lp_principled: the same for the principled response.
      beta: inverse temperature, per nat.

    Returns:
      One loss per pair, in nats.
    """
    return -_log_sigmoid(beta * (lp_principled - lp_plain))


def dpo(
    sum_rejected: Float[Array, "*rows"],
    sum_chosen: Float[Array, "*rows"],
    ref_rejected: Float[Array, "*rows"],
    ref_chosen: Float[Array, "*rows"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "*rows"]:
    """Computes the loss of direct preference optimisation (arXiv:2305.18290, eq. 7).

    -log sigmoid(z), z = beta * ((sum_chosen - ref_chosen) - (sum_rejected - ref_rejected)). With label smoothing e it is
    "conservative DPO" (https://ericmitchell.ai/cdpo.pdf): -(1 - e) log sigmoid(z) - e log sigmoid(-z). TRL's "sigmoid" loss
    ignores its label_smoothing; for single pairs, TRL's "aot_unpaired" is the loss computed here.

    Args:
      sum_rejected: `sum_logprob` of the rejected response under the policy, nats.
      sum_chosen: the same for the chosen response.
      ref_rejected: `sum_logprob` of the rejected response under the frozen reference, nats.
      ref_chosen: the same for the chosen response.
      beta: strength of the pull towards the reference, per nat; 0.1 is usual.
      label_smoothing: probability that the label of a pair is wrong, in [0, 0.5).

    Returns:
      One loss per pair, in nats.

    Examples:
      >>> import numpy as np
      >>> x = np.zeros(1)
      >>> round(float(dpo(x, x, x, x, beta=0.1)[0]), 4)  # log 2 before the first step
      0.6931
    """
    logit = beta * ((sum_chosen - ref_chosen) - (sum_rejected - ref_rejected))
    return label_smoothing * logit - _log_sigmoid(logit)  # log sigmoid(z) - log sigmoid(-z) = z


def ipo(
    lp_rejected: Float[Array, "*rows"],
    lp_chosen: Float[Array, "*rows"],
    ref_rejected: Float[Array, "*rows"],
    ref_chosen: Float[Array, "*rows"],
    *,
    beta: float,
) -> Float[Array, "*rows"]:
    """Computes the loss of identity preference optimisation (arXiv:2310.12036, eq. 17), whose tau is called beta, as in TRL.

    ((lp_chosen - ref_chosen) - (lp_rejected - ref_rejected) - 1 / (2 * beta)) ** 2

    Args:
      lp_rejected: `mean_logprob` of the rejected response under the policy, nats per token. The paper writes sums; TRL
        passes means, with which its authors got the paper's results. With means, beta does not depend on lengths.
      lp_chosen: the same for the chosen response.
      ref_rejected: `mean_logprob` of the rejected response under the frozen reference, nats per token.
      ref_chosen: the same for the chosen response.
      beta: > 0. The loss is 0 where the chosen response leads, relative to the reference, by 1 / (2 * beta) nats per token.

    Returns:
      One loss per pair, in (nats per token) ** 2.

    Examples:
      >>> import numpy as np
      >>> ipo(np.array([-3.0]), np.array([-1.0]), np.array([-2.0]), np.array([-2.0]), beta=0.5).tolist()
      [1.0]
    """
    return ((lp_chosen - ref_chosen) - (lp_rejected - ref_rejected) - 1 / (2 * beta)) ** 2


def bradley_terry(chosen: Float[Array, "*rows"], rejected: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Computes the loss of a reward model on preference pairs: -log sigmoid(chosen - rejected) (Bradley and Terry, 1952).

    Args:
      chosen: score of the preferred response.
      rejected: score of the other response of the pair.

    Returns:
      One loss per pair, in nats.

    Examples:
      >>> import numpy as np
      >>> bradley_terry(np.array([0.0, 2.0]), np.array([0.0, 1.0])).round(4).tolist()
      [0.6931, 0.3133]
    """
    return -_log_sigmoid(chosen - rejected)


# ---------------------------------------------------------------- likelihood


def blend(
    sumlp: Float[Array, "*rows k"], weights: Float[Array, "*rows k"], *, normaliser: Float[Array, "*rows"] | float
) -> Float[Array, "*rows"]:
    """Computes the weighted negative log-likelihood of a query's k responses: -sum_k weights_k * sumlp_k / normaliser.

    Args:
      sumlp: `sum_logprob` of each response, nats.
      weights: weight of each response, usually summing to 1 over k.
      normaliser: C, a mean response length in tokens that comes from an earlier sample and not from these responses. On a
        model's own samples a fixed C has no expected gradient towards any length. Dividing by each response's own length
        has one towards shorter responses, and so has the mean length of the same batch, as E[1 / mean] > 1 / E[mean].

    Returns:
      One loss per query, in nats per token of a response of length C.

    Examples:
      >>> import numpy as np
      >>> blend(np.array([[-8.0, -4.0]]), np.array([[0.25, 0.75]]), normaliser=2.0).tolist()
      [2.5]
    """
    xp = array_namespace(sumlp)
    return -xp.sum(weights * sumlp, axis=-1) / normaliser


def nll(
    logprobs: Float[Array, "*rows time"],
    mask: Bool[Array, "*rows time"],
    *,
    normaliser: Float[Array, "*rows"] | float,
) -> Float[Array, "*rows"]:
    """Computes each response's cross-entropy, -sum_logprob / normaliser: supervised fine-tuning on response tokens only.

    Args:
      logprobs: log pi(y_t | x, y_<t) in nats.
      mask: true on response tokens.
      normaliser: a mean response length in tokens, as in `blend`. The mean of the results over a batch is then in nats per
        token of an average response. TRL divides by the number of tokens of the optimiser batch itself.

    Returns:
      One loss per response.
    """
    return -sum_logprob(logprobs, mask) / normaliser


# ---------------------------------------------------------------- policy gradients


def kl_estimate(
    logprobs: Float[Array, "*rows time"], reference: Float[Array, "*rows time"], *, kind: str
) -> Float[Array, "*rows time"]:
    """Estimates KL(policy, reference) at tokens sampled from the policy (Schulman).

    With r = logprobs - reference: k1 = r is unbiased and may be negative; k2 = r ** 2 / 2 is biased and has low variance;
    k3 = exp(-r) - 1 + r is unbiased and never negative. The gradients of the estimates behave differently. In expectation,
    the gradient of k1 is 0, that of k2 is the gradient of KL(policy, reference), and that of k3 is the gradient of
    KL(reference, policy). So use k1 for penalties in rewards, not in losses.

    Args:
      logprobs: log-probabilities of the sampled tokens under the policy, nats.
      reference: the same under the reference.
      kind: "k1", "k2" or "k3".

    Returns:
      One estimate per token, in nats.

    Raises:
      ValueError: `kind` is none of these.

    Examples:
      >>> import numpy as np
      >>> [kl_estimate(np.log([0.5]), np.log([0.25]), kind=k).round(4).tolist() for k in ("k1", "k2", "k3")]
      [[0.6931], [0.2402], [0.1931]]
    """
    ratio = logprobs - reference
    match kind:
        case "k1":
            return ratio
        case "k2":
            return ratio**2 / 2
        case "k3":
            return array_namespace(ratio).expm1(-ratio) + ratio
    raise ValueError(f"the KL estimator is {kind!r}: choose k1, k2 or k3")


def _surrogate(log_ratio: Array, advantages: Array, *, clip_low: float, clip_high: float) -> tuple[Array, Array]:
    """Returns -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), and where the clipped term is the smaller."""
    xp = array_namespace(log_ratio)
    low, high = math.log1p(-clip_low) if clip_low < 1 else -math.inf, math.log1p(clip_high)
    over, under = (advantages > 0) & (log_ratio > high), (advantages < 0) & (log_ratio < low)
    # bounded before exp: the gradient through an exp that overflows is nan even where it is not chosen
    bounded = xp.where(over, high, xp.where(under, low, log_ratio))
    return -xp.exp(bounded) * advantages, over | under


def clipped_policy(
    logprobs: Float[Array, "*rows time"],
    old_logprobs: Float[Array, "*rows time"],
    advantages: Float[Array, "*rows time"],
    mask: Bool[Array, "*rows time"],
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, "*rows time"], Bool[Array, "*rows time"]]:
    """Computes PPO's clipped surrogate of every token (arXiv:1707.06347, eq. 7), negated, so that it is a loss.

    -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), ratio = exp(logprobs - old_logprobs)

    Args:
      logprobs: log pi(y_t | x, y_<t) in nats.
      old_logprobs: the same under the policy that sampled, constant.
      advantages: one per token, or [*rows, 1] where the tokens of a response share one; constant.
      mask: true on response tokens.
      clip_low: how far the ratio may fall below 1; 0.2 is usual, `math.inf` sets no bound.
      clip_high: how far the ratio may rise above 1. PPO uses one value for both; DAPO's clip_high is larger.

    Returns:
      The loss of every token, and whether it was clipped, in which case its gradient is 0. Masked tokens have 0 and false.

    Examples:
      >>> import numpy as np
      >>> new, old = np.log([[1.5, 1.1, 0.5, 0.5]]), np.zeros((1, 4))
      >>> advantages, mask = np.array([[2.0, 2.0, 2.0, -2.0]]), np.ones((1, 4), bool)
      >>> values, clipped = clipped_policy(new, old, advantages, mask, clip_low=0.2, clip_high=0.2)
      >>> values.round(6).tolist(), clipped.tolist()
      ([[-2.4, -2.2, -1.0, 1.6]], [[True, False, False, True]])
    """
    xp = array_namespace(logprobs)
    real = xp.astype(mask, xp.bool)
    log_ratio = xp.where(real, logprobs - old_logprobs, 0.0)
    values, clipped = _surrogate(log_ratio, advantages, clip_low=clip_low, clip_high=clip_high)
    return xp.where(real, values, 0.0), clipped  # a ratio of 1 never is


def clipped_value(
    values: Float[Array, "*rows time"],
    old_values: Float[Array, "*rows time"],
    returns: Float[Array, "*rows time"],
    mask: Bool[Array, "*rows time"],
    *,
    clip: float,
) -> tuple[Float[Array, "*rows time"], Bool[Array, "*rows time"]]:
    """Computes PPO's clipped loss of a value head at every token, as in OpenAI's baselines and in TRL before it dropped PPO.

    max((values - returns) ** 2, (old_values + clip(values - old_values, -clip, clip) - returns) ** 2) / 2

    Args:
      values: what the head predicts before every token, in units of the reward.
      old_values: the predictions at the time when the advantages were computed, constant.
      returns: what the head should predict, the second result of `formulas.advantages.gae`, constant.
      mask: true on response tokens.
      clip: how far a value may move towards its return before its gradient is 0; 0.2 is usual, `math.inf` sets no bound.

    Returns:
      The loss of every token, in squared units of the reward, and whether it was clipped. Masked tokens have 0 and false.
      The caller sums: `masked_sum(loss, mask) / normaliser`.

    Examples:
      >>> import numpy as np
      >>> loss, clipped = clipped_value(*np.array([[[1.0, 1.0]], [[0.0, 0.0]], [[2.0, 0.0]]]), np.ones((1, 2)), clip=0.5)
      >>> loss.tolist(), clipped.tolist()
      ([[1.125, 0.5]], [[True, False]])
    """
    xp = array_namespace(values)
    real = xp.astype(mask, xp.bool)
    moved = xp.where(real, values - old_values, 0.0)
    error = xp.where(real, values - returns, 0.0) ** 2
    bounded = xp.where(real, old_values + xp.clip(moved, min=-clip, max=clip) - returns, 0.0) ** 2
    clipped = (xp.abs(moved) > clip) & (bounded > error)
    return xp.where(clipped, bounded, error) / 2, clipped


def _responses(values: Array, clipped: Array, mask: Array, normaliser: Array | float) -> tuple[Array, Array]:
    """Returns the sum over each response's tokens divided by `normaliser`, and the share of its tokens that were clipped."""
    share = masked_mean(array_namespace(values).astype(clipped, values.dtype), mask)
    return masked_sum(values, mask) / normaliser, share


def ppo(
    logprobs: Float[Array, "*rows time"],
    old_logprobs: Float[Array, "*rows time"],
    advantages: Float[Array, "*rows time"],
    mask: Bool[Array, "*rows time"],
    *,
    clip_low: float,
    clip_high: float,
    normaliser: Float[Array, "*rows"] | float,
    weights: Float[Array, "*rows time"] | float = 1.0,
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Computes PPO's policy loss of each response: the sum of `clipped_policy` over its tokens, divided by `normaliser`.

    Args:
      logprobs: log pi(y_t | x, y_<t) in nats.
      old_logprobs: the same under the policy that sampled, constant.
      advantages: one per token (`formulas.advantages.gae`, whitened), constant.
      mask: true on response tokens.
      clip_low: as in `clipped_policy`.
      clip_high: as in `clipped_policy`.
      normaliser: the mean response length of the optimiser batch, in tokens. The mean of the results over the batch is
        then the mean over its tokens.
      weights: factors on the tokens' surrogates, constant (`truncated_importance`).

    Returns:
      The loss of each response, and the share of its tokens that were clipped.
    """
    values, clipped = clipped_policy(logprobs, old_logprobs, advantages, mask, clip_low=clip_low, clip_high=clip_high)
    return _responses(weights * values, clipped, mask, normaliser)


def truncated_importance(
    logprobs: Float[Array, "*rows"],
    sampler: Float[Array, "*rows"],
    mask: Bool[Array, "*rows"],
    *,
    cap: float,
) -> Float[Array, "*rows"]:
    """Computes truncated importance weights: how many times likelier a token is to the policy than to its sampler.

    The weight is min(exp(logprobs - sampler), cap) (Ionides, "Truncated Importance Sampling", 2008), as in TRL with
    vllm_importance_sampling_mode="token_truncate". A sampler with different arithmetic (a server, another dtype) draws from
    a distribution other than the one whose gradient is taken ("Your Efficient RL Framework Secretly Brings You Off-Policy
    RL Training", 2025). Losses that are linear in their advantages take the result as `weights`.

    Args:
      logprobs: log pi(y_t | x, y_<t) in nats under the policy that sampled, as the trainer computes it, constant; or sums
        over responses.
      sampler: the same as the sampler computed it.
      mask: true on response tokens; for sums over responses, true where there is a response.
      cap: the largest weight, at least 1; 2 to 3 is usual.

    Returns:
      One weight per token, or per response; 1 where masked.

    Examples:
      >>> import numpy as np
      >>> policy, sampler = np.log([[0.5, 0.5, 0.1]]), np.log([[0.4, 0.1, 0.9]])
      >>> truncated_importance(policy, sampler, np.array([[True, True, False]]), cap=2.0).round(6).tolist()
      [[1.25, 2.0, 1.0]]
    """
    xp = array_namespace(logprobs)
    # bounded before exp, as in `clipped_policy`
    log_ratio = xp.where(xp.astype(mask, xp.bool), logprobs - sampler, 0.0)
    return xp.exp(xp.clip(log_ratio, max=math.log(cap)))


# one piece: it is eight lines and what their arguments mean
def grpo(
    logprobs: Float[Array, "*rows time"],
    old_logprobs: Float[Array, "*rows time"],
    reference: Float[Array, "*rows time"] | None,
    advantages: Float[Array, "*rows"],
    mask: Bool[Array, "*rows time"],
    *,
    clip_low: float,
    clip_high: float,
    beta: float,
    normaliser: Float[Array, "*rows"] | float,
    weights: Float[Array, "*rows time"] | float = 1.0,
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Computes the loss of group relative policy optimisation (GRPO, arXiv:2402.03300, eq. 3) or of one of its relatives.

    sum over tokens of (weights * clipped_policy + beta * k3(logprobs, reference)) / normaliser

    The relatives differ in the normaliser:

    | TRL's loss_type | normaliser |
    |---|---|
    | grpo | the response's own length, at least 1 |
    | dr_grpo | a constant: the longest response that sampling allows (arXiv:2503.20783) |
    | dapo | the mean response length of the optimiser batch (arXiv:2503.14476); bnpo takes the micro-batch's |

    Args:
      logprobs: log pi(y_t | x, y_<t) in nats.
      old_logprobs: the same under the policy that sampled, constant.
      reference: the same under the frozen reference, constant. With beta 0 it is not read and may be None.
      advantages: one per response (`formulas.advantages.group_advantages`), constant.
      mask: true on response tokens.
      clip_low: as in `clipped_policy`.
      clip_high: as in `clipped_policy`.
      beta: weight of the KL divergence, per nat.
      normaliser: in tokens, from the table. The mean of the results over all responses equals TRL's loss.
      weights: factors on the tokens' surrogates, constant (`truncated_importance`).

    Returns:
      The loss of each response, and the share of its tokens that were clipped.
    """
    shared = advantages[..., None]
    values, clipped = clipped_policy(logprobs, old_logprobs, shared, mask, clip_low=clip_low, clip_high=clip_high)
    values = weights * values
    if beta:
        xp = array_namespace(logprobs)
        real = xp.astype(mask, xp.bool)
        policy, reference = xp.where(real, logprobs, 0.0), xp.where(real, reference, 0.0)
        values = values + beta * kl_estimate(policy, reference, kind="k3")
    return _responses(values, clipped, mask, normaliser)


def rloo(
    sum_logprobs: Float[Array, "*rows"],
    old_sum_logprobs: Float[Array, "*rows"],
    advantages: Float[Array, "*rows"],
    *,
    clip_low: float,
    clip_high: float,
    weights: Float[Array, "*rows"] | float = 1.0,
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Computes the loss of REINFORCE leave-one-out (RLOO, arXiv:2402.14740).

    A response is one action, with one ratio that is clipped as in PPO. At the first step on a batch, where the ratio is 1,
    the gradient is REINFORCE's, -advantage * grad sum_logprobs. The penalty for leaving the reference belongs in the reward,
    as in TRL: reward - beta * (old_sum_logprobs - the reference's).

    Args:
      sum_logprobs: `sum_logprob` of each response under the policy, nats.
      old_sum_logprobs: the same under the policy that sampled, constant.
      advantages: one per response (`formulas.advantages.group_advantages` with kind="rloo"), constant.
      clip_low: how far the ratio of a response may fall below 1. TRL takes 0.2, which is little for a long response.
      clip_high: how far the ratio may rise above 1.
      weights: factors on the responses' surrogates, constant (`truncated_importance` of the sums).

    Returns:
      The loss of each response, and 1 where the response was clipped, else 0.

    Examples:
      >>> import numpy as np
      >>> new, old, advantages = np.array([[-9.0, -7.0], [-9.0, -9.0], [3.0, 1.0]])
      >>> loss, clipped = rloo(new, old, advantages, clip_low=0.2, clip_high=0.2)
      >>> loss.tolist(), clipped.tolist()
      ([-3.0, -1.2], [0.0, 1.0])
    """
    values, clipped = _surrogate(sum_logprobs - old_sum_logprobs, advantages, clip_low=clip_low, clip_high=clip_high)
    return weights * values, array_namespace(values).astype(clipped, values.dtype)


def distillation(
    logprobs: Float[Array, "*rows time"],
    teacher: Float[Array, "*rows time"],
    old_logprobs: Float[Array, "*rows time"],
    mask: Bool[Array, "*rows time"],
    *,
    clip_low: float,
    clip_high: float,
    normaliser: Float[Array, "*rows"] | float,
    weights: Float[Array, "*rows time"] | float = 1.0,
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Computes the loss of on-policy distillation at the sampled tokens: `ppo` with the advantage teacher - old_logprobs.

    This is the policy gradient of each token's KL(policy, teacher). While the policy is still the one that sampled, the
    value is the k1 estimate of the KL and the expected gradient is that of the KL itself; the effect of a token on the KL of
    later tokens is left out. The teacher is the policy with the principles in its prompt, or any model with the same tokens.

    TRL's SDFT ("Self-Distillation Enables Continual Learning") then has the same gradient with distillation_mode=
    "sampled_token"; its default compares the policy's 100 likeliest tokens by a Jensen-Shannon divergence. It differs once
    the policy has moved: its advantage follows the policy (teacher - logprobs), its ratio is capped at 2 instead of clipped,
    and its teacher is the start model by default. It also divides by each response's own length.

    Args:
      logprobs: log pi(y_t | x, y_<t) in nats.
      teacher: log-probabilities of the same tokens under the teacher, constant.
      old_logprobs: the same under the policy that sampled, constant.
      mask: true on response tokens.
      clip_low: as in `clipped_policy`.
      clip_high: as in `clipped_policy`.
      normaliser: a mean response length in tokens, as in `blend`.
      weights: factors on the tokens' surrogates, constant (`truncated_importance`).

    Returns:
      The loss of each response, and the share of its tokens that were clipped.
    """
    advantages = teacher - old_logprobs
    values, clipped = clipped_policy(logprobs, old_logprobs, advantages, mask, clip_low=clip_low, clip_high=clip_high)
    return _responses(weights * values, clipped, mask, normaliser)
