"""The losses, as pure functions on arrays: one file for numpy, JAX and torch, through the array-API standard.

Every function returns one value per example and leaves the reduction to the caller; those with a clipped ratio return
what was clipped beside it. Log-probabilities are in nats, values in the dtype of the first argument (backends pass
float32). Masks may be boolean or 0/1 arrays, and what stands where they are false counts for nothing, even nan. Nothing
here needs a stop-gradient: whatever is constant was computed before and comes in as an argument.

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
    """Sum over the true positions of the last axis; 0 where there are none."""
    xp = array_namespace(values)
    return xp.sum(xp.where(xp.astype(mask, xp.bool), values, 0.0), axis=-1)


def sum_logprob(logprobs: Float[Array, "*rows time"], mask: Bool[Array, "*rows time"]) -> Float[Array, "*rows"]:
    """Log-probability of each response: the sum over its tokens.

    Args:
      logprobs: log pi(y_t | x, y_<t) in nats; anything where the mask is false, even nan.
      mask: true on response tokens.

    Returns:
      One value per response, in nats; 0 for an empty one.

    >>> import numpy as np
    >>> float(sum_logprob(np.array([-1.0, -2.0, -9.0]), np.array([True, True, False])))
    -3.0
    """
    return masked_sum(logprobs, mask)


def masked_mean(values: Float[Array, "*rows time"], mask: Bool[Array, "*rows time"]) -> Float[Array, "*rows"]:
    """Mean over the true positions of the last axis; 0 where there are none.

    >>> import numpy as np
    >>> float(masked_mean(np.array([1.0, 2.0, 9.0]), np.array([True, True, False])))
    1.5
    """
    xp = array_namespace(values)
    length = xp.sum(xp.astype(mask, values.dtype), axis=-1)
    return masked_sum(values, mask) / xp.clip(length, min=1.0)


def mean_logprob(logprobs: Float[Array, "*rows time"], mask: Bool[Array, "*rows time"]) -> Float[Array, "*rows"]:
    """Length-normalised log-probability of each response, in nats per token; 0 for an empty one (RRHF, eq. 1).

    Args:
      logprobs: log pi(y_t | x, y_<t) in nats; anything where the mask is false.
      mask: true on response tokens.
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
    """Hinge on length-normalised log-probabilities: relu(lp_plain - lp_principled + margin); gradient 0 at its corner.

    With margin 0 it is RRHF's ranking loss (eq. 2). That the paper ranks in log space and by length is our choice.

    Args:
      lp_plain: `mean_logprob` of the plain response, nats per token.
      lp_principled: the same of the principled one.
      margin: by how many nats per token the principled one must lead before the loss is 0.

    >>> import numpy as np
    >>> hinge(np.array([-1.0, -3.0]), np.array([-2.0, -2.0]), margin=0.5).tolist()
    [1.5, 0.0]
    """
    return _relu(lp_plain - lp_principled + margin)


def hinge_prob(lp_plain: Float[Array, "*rows"], lp_principled: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Hinge on geometric-mean token probabilities: relu(exp(lp_plain) - exp(lp_principled)).

    Our reading of a review of the paper, which says that its ranking loss works on probabilities: that of a whole
    sequence underflows, its geometric mean does not.

    Args:
      lp_plain: `mean_logprob` of the plain response, nats per token.
      lp_principled: the same of the principled one.
    """
    xp = array_namespace(lp_plain)
    return _relu(xp.exp(lp_plain) - xp.exp(lp_principled))


def sigmoid(
    lp_plain: Float[Array, "*rows"], lp_principled: Float[Array, "*rows"], *, beta: float
) -> Float[Array, "*rows"]:
    """Smooth ranking loss, never quite 0: -log sigmoid(beta * (lp_principled - lp_plain)).

    Args:
      lp_plain: `mean_logprob` of the plain response, nats per token.
      lp_principled: the same of the principled one.
      beta: inverse temperature, per nat.
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
    """Direct preference optimisation (arXiv:2305.18290, eq. 7).

    -log sigmoid(z), z = beta * ((sum_chosen - ref_chosen) - (sum_rejected - ref_rejected)); with label smoothing e
    "conservative DPO" (https://ericmitchell.ai/cdpo.pdf): -(1 - e) log sigmoid(z) - e log sigmoid(-z). TRL's "sigmoid" loss
    ignores its label_smoothing; of single pairs its "aot_unpaired" is this.

    Args:
      sum_rejected: `sum_logprob` of the rejected response under the policy, nats.
      sum_chosen: the same of the chosen one.
      ref_rejected: `sum_logprob` of the rejected response under the frozen reference.
      ref_chosen: the same of the chosen one.
      beta: strength of the pull towards the reference, per nat; 0.1 is usual.
      label_smoothing: probability that the label of a pair is wrong, in [0, 0.5).

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
    """Identity preference optimisation (arXiv:2310.12036, eq. 17), whose tau is called beta as in TRL.

    ((lp_chosen - ref_chosen) - (lp_rejected - ref_rejected) - 1 / (2 * beta)) ** 2

    Args:
      lp_rejected: `mean_logprob` of the rejected response under the policy, nats per token. The paper writes sums; TRL
        passes means, with which its authors got the paper's results, so that beta does not depend on lengths.
      lp_chosen: the same of the chosen one.
      ref_rejected: `mean_logprob` of the rejected response under the frozen reference.
      ref_chosen: the same of the chosen one.
      beta: > 0; the chosen one is to lead by 1 / (2 * beta) nats per token.

    >>> import numpy as np
    >>> ipo(np.array([-3.0]), np.array([-1.0]), np.array([-2.0]), np.array([-2.0]), beta=0.5).tolist()
    [1.0]
    """
    return ((lp_chosen - ref_chosen) - (lp_rejected - ref_rejected) - 1 / (2 * beta)) ** 2


def bradley_terry(chosen: Float[Array, "*rows"], rejected: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """A reward model's loss on preference pairs: -log sigmoid(chosen - rejected) (Bradley and Terry, 1952).

    Args:
      chosen: score of the response that was preferred.
      rejected: score of the other one.

    >>> import numpy as np
    >>> bradley_terry(np.array([0.0, 2.0]), np.array([0.0, 1.0])).round(4).tolist()
    [0.6931, 0.3133]
    """
    return -_log_sigmoid(chosen - rejected)


# ---------------------------------------------------------------- likelihood


def blend(
    sumlp: Float[Array, "*rows k"], weights: Float[Array, "*rows k"], *, normaliser: Float[Array, "*rows"] | float
) -> Float[Array, "*rows"]:
    """Weighted likelihood of the k responses of a query: -sum_k weights_k * sumlp_k / normaliser.

    Args:
      sumlp: `sum_logprob` of each response, nats.
      weights: weight of each response, usually summing to 1 over k.
      normaliser: C, a mean response length in tokens that does not come from these responses (an earlier sample's). On a
        model's own samples a fixed C has no expected gradient towards any length. Each response's own length has one
        towards shorter responses, and so has the mean length of the very batch, E[1 / mean] being above 1 / E[mean].

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
    """Cross-entropy of each response, -sum_logprob / normaliser: supervised fine-tuning on response tokens only.

    Args:
      logprobs: log pi(y_t | x, y_<t) in nats.
      mask: true on response tokens.
      normaliser: a mean response length in tokens, as in `blend`: the mean over the batch is then in nats per token of an
        average response. TRL divides by the tokens of the optimiser batch itself.
    """
    return -sum_logprob(logprobs, mask) / normaliser


# ---------------------------------------------------------------- policy gradients


def kl_estimate(
    logprobs: Float[Array, "*rows time"], reference: Float[Array, "*rows time"], *, kind: str
) -> Float[Array, "*rows time"]:
    """Estimates of KL(policy, reference) at tokens sampled from the policy (Schulman).

    With r = logprobs - reference: k1 = r, unbiased, may be negative; k2 = r ** 2 / 2, biased, of low variance;
    k3 = exp(-r) - 1 + r, unbiased, never negative. The gradients of these estimates are another matter: in expectation
    that of k1 is 0, that of k2 is the gradient of KL(policy, reference) and that of k3 the one of KL(reference, policy).
    So k1 is for penalties in rewards, not for losses.

    Args:
      logprobs: of the sampled tokens under the policy, nats.
      reference: the same under the reference.
      kind: "k1", "k2" or "k3".

    Returns:
      One value per token, in nats.

    Raises:
      ValueError: unknown kind.

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
    """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), and where the clipped one is the smaller."""
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
    """PPO's clipped surrogate of every token (arXiv:1707.06347, eq. 7), negated: a loss.

    -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), ratio = exp(logprobs - old_logprobs)

    Args:
      logprobs: log pi(y_t | x, y_<t) in nats.
      old_logprobs: the same under the policy that sampled, constant.
      advantages: of every token, or [*rows, 1] where the tokens of a response share one.
      mask: true on response tokens.
      clip_low: by how much the ratio may fall; 0.2 is usual, `math.inf` is no bound.
      clip_high: by how much it may rise. PPO has both the same; DAPO's is larger.

    Returns:
      The loss of every token and whether it was clipped, which is where its gradient is 0; 0 and false where masked.

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
    """PPO's clipped loss of a value head at every token, as in OpenAI's baselines and in TRL before it dropped PPO.

    max((values - returns) ** 2, (old_values + clip(values - old_values, -clip, clip) - returns) ** 2) / 2

    Args:
      values: what the head says before every token, in units of the reward.
      old_values: the same as it was when the advantages were computed, constant.
      returns: what it should say, `formulas.advantages.gae`'s second result.
      mask: true on response tokens.
      clip: how far it may move towards its return before its gradient is 0; 0.2 is usual, `math.inf` is no bound.

    Returns:
      The loss of every token and whether it was clipped; 0 and false where masked. The caller sums:
      `masked_sum(loss, mask) / normaliser`.

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
    """The sum over the tokens of each response / normaliser, and the share of its tokens that were clipped."""
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
    """PPO's policy loss of each response: the sum of `clipped_policy` over its tokens / normaliser.

    Args:
      logprobs: log pi(y_t | x, y_<t) in nats.
      old_logprobs: the same under the policy that sampled, constant.
      advantages: of every token (`formulas.advantages.gae`, whitened), constant.
      mask: true on response tokens.
      clip_low, clip_high: as in `clipped_policy`.
      normaliser: the mean response length of the optimiser batch, in tokens: the mean over the batch is then the mean
        over its tokens.
      weights: of the tokens' surrogates, constant: `truncated_importance`.

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
    """How much likelier a token is to the policy that is trained than to the sampler that drew it, at most `cap`.

    min(exp(logprobs - sampler), cap): truncated importance weights (Ionides, "Truncated Importance Sampling", 2008), as
    TRL's vllm_importance_sampling_mode="token_truncate" has them. A sampler with another arithmetic (a server, another
    dtype) draws from another distribution than the one whose gradient is taken ("Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training", 2025); a loss that is linear in its advantages takes them as `weights`.

    Args:
      logprobs: log pi(y_t | x, y_<t) in nats, of the policy that sampled, as the trainer computes it, constant; or the sum
        over a response.
      sampler: the same as the sampler had it.
      mask: true on response tokens; of responses, where there is one.
      cap: the largest weight; 2 to 3 is usual.

    Returns:
      The weights; 1 where masked.

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
    """Group relative policy optimisation (arXiv:2402.03300, eq. 3) and its relatives, which differ in the normaliser.

    sum over tokens of (clipped_policy + beta * k3(logprobs, reference)) / normaliser

    | TRL's loss_type | normaliser |
    |---|---|
    | grpo | the response's own length, at least 1 |
    | dr_grpo | a constant: the longest response that sampling allows (arXiv:2503.20783) |
    | dapo | the mean response length of the optimiser batch (arXiv:2503.14476); bnpo's is that of the micro-batch |

    Args:
      logprobs: log pi(y_t | x, y_<t) in nats.
      old_logprobs: the same under the policy that sampled, constant.
      reference: the same under the frozen reference, constant; not read, and may be None, with beta 0.
      advantages: one per response (`formulas.advantages.group_advantages`), constant.
      mask: true on response tokens.
      clip_low, clip_high: as in `clipped_policy`.
      beta: weight of the KL divergence, per nat.
      normaliser: in tokens, as above. The mean of the results over all responses is TRL's number.
      weights: of the tokens' surrogates, constant: `truncated_importance`.

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
    """REINFORCE leave-one-out (arXiv:2402.14740): a response is one action, with one ratio that is clipped as in PPO.

    At the first step on a batch, where the ratio is 1, its gradient is REINFORCE's, -advantage * grad sum_logprobs. The
    penalty for leaving the reference belongs into the reward: reward - beta * (old_sum_logprobs - reference's), as in TRL.

    Args:
      sum_logprobs: `sum_logprob` of each response under the policy, nats.
      old_sum_logprobs: the same under the policy that sampled, constant.
      advantages: one per response (`formulas.advantages.group_advantages` with kind="rloo"), constant.
      clip_low: by how much the ratio of a response may fall; 0.2 is TRL's, and little for a long one.
      clip_high: by how much it may rise.
      weights: of the responses' surrogates, constant: `truncated_importance` of their sums.

    Returns:
      The loss of each response, and 1 where it was clipped, else 0.

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
    """On-policy distillation at the sampled tokens: `ppo` whose advantage is teacher - old_logprobs.

    That is the policy gradient of each token's KL(policy, teacher). On the policy that sampled the value is KL's k1
    estimate and the expected gradient that of KL itself; what a token does to the KL of later ones does not count. The
    teacher is the policy with the principles in its prompt, or any other model with these tokens.

    TRL's SDFT ("Self-Distillation Enables Continual Learning") has the same gradient there with
    distillation_mode="sampled_token"; its default compares the policy's 100 likeliest tokens by a Jensen-Shannon
    divergence. It differs once the policy has moved: its advantage moves along (teacher - logprobs), its ratio is capped at
    2 instead of clipped, its teacher is the start model unless told otherwise; and it divides by each response's length.

    Args:
      logprobs: log pi(y_t | x, y_<t) in nats.
      teacher: the same tokens under the teacher, constant.
      old_logprobs: the same under the policy that sampled, constant.
      mask: true on response tokens.
      clip_low, clip_high: as in `clipped_policy`.
      normaliser: a mean response length in tokens, as in `blend`.
      weights: of the tokens' surrogates, constant: `truncated_importance`.

    Returns:
      The loss of each response, and the share of its tokens that were clipped.
    """
    advantages = teacher - old_logprobs
    values, clipped = clipped_policy(logprobs, old_logprobs, advantages, mask, clip_low=clip_low, clip_high=clip_high)
    return _responses(weights * values, clipped, mask, normaliser)
