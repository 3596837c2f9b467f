"""Advantages computed from rewards, for the policy gradients of `losses`. numpy; float64 inside, float32 results.

Rewards must be finite: a query with any other reward is quarantined before it comes here. Masks are true on the tokens of
right-padded responses.

References: GAE, arXiv:1506.02438; Ziegler et al., arXiv:1909.08593; RLOO, arXiv:2402.14740; GRPO, arXiv:2402.03300;
Dr. GRPO, arXiv:2503.20783.
"""

import numpy as np
from jaxtyping import Bool, Float, Float32
from numpy.typing import ArrayLike

from ple_jax import losses
from ple_jax.core.errors import UserError


def missing_eos_penalty(
    reward: ArrayLike, finished: Bool[np.ndarray, "*rows"], *, penalty: float
) -> Float32[np.ndarray, "*rows"]:
    """Subtracts `penalty` from the reward of every response that was cut off before its EOS.

    Args:
      reward: of each response.
      finished: whether the response ended with EOS.
      penalty: in units of the reward.

    Examples:
      >>> missing_eos_penalty([1.0, 1.0], [True, False], penalty=1.5).tolist()
      [1.0, -0.5]
    """
    return np.where(finished, reward, np.asarray(reward, np.float64) - penalty).astype(np.float32)


def group_advantages(rewards: ArrayLike, *, kind: str) -> Float32[np.ndarray, "query k"]:
    """Computes one advantage per response by comparing its reward with those of other responses, without a value head.

    | kind | advantage |
    |---|---|
    | rloo | reward - mean of the other k - 1 (arXiv:2402.14740, eq. 8) |
    | grpo | (reward - mean of all k) / (their standard deviation + 1e-4), with k - 1 in the deviation, as in TRL |
    | dr_grpo | reward - mean of all k: GRPO without the deviation, which favours queries that are too easy or too hard |
    | reinforce | reward - mean of the batch; the only kind that works with k = 1 |

    Args:
      rewards: of the k responses of every query, [query, k].
      kind: "rloo", "grpo", "dr_grpo" or "reinforce".

    Returns:
      One advantage per response, in units of the reward; for kind "grpo" without a unit. Where all k rewards of a query are
      equal it is 0, except for "reinforce".

    Raises:
      UserError: `kind` is unknown, or there is only one response per query and `kind` compares several.

    Examples:
      >>> [group_advantages([[0.0, 1.0, 5.0]], kind=kind).tolist() for kind in ("rloo", "dr_grpo")]
      [[[-3.0, -1.5, 4.5]], [[-2.0, -1.0, 3.0]]]
    """
    rewards = np.asarray(rewards, np.float64)
    k = rewards.shape[-1]
    if kind not in ("rloo", "grpo", "dr_grpo", "reinforce"):
        raise UserError(f"the advantages are of kind {kind!r}: choose rloo, grpo, dr_grpo or reinforce")
    if kind != "reinforce" and k < 2:
        raise UserError(f"{kind} compares the responses of a query: it needs at least 2 of each, not {k}; sample more")
    gap = rewards - rewards.mean(axis=None if kind == "reinforce" else -1, keepdims=True)
    if kind == "rloo":
        gap *= k / (k - 1)  # reward - (sum - reward) / (k - 1)
    if kind == "grpo":
        gap /= rewards.std(axis=-1, ddof=1, keepdims=True) + 1e-4
    return gap.astype(np.float32)


def kl_penalised(
    reward: Float[np.ndarray, "*rows"],
    logprobs: Float[np.ndarray, "*rows time"],
    reference: Float[np.ndarray, "*rows time"],
    mask: Bool[np.ndarray, "*rows time"],
    *,
    coefficient: float,
    estimator: str,
) -> Float32[np.ndarray, "*rows time"]:
    """Computes a reward for every token: -coefficient * KL estimate, plus the response's own reward at its last token.

    Args:
      reward: of each response. The reward of a response without tokens is lost, as there is no token to add it to.
      logprobs: log-probabilities of the tokens under the policy that sampled, nats.
      reference: the same under the frozen reference.
      mask: true on response tokens.
      coefficient: units of the reward per nat.
      estimator: the `kind` of `losses.kl_estimate`; with k1 the policy gradient is that of E[reward] - coefficient * KL.

    Returns:
      One reward per token, 0 where masked.

    Raises:
      ValueError: `estimator` is unknown.

    Examples:
      >>> zero, mask = np.zeros((1, 3)), np.array([[True, True, False]])
      >>> kl_penalised(np.ones(1), zero - 1, zero - 2, mask, coefficient=0.25, estimator="k1").tolist()
      [[-0.25, 0.75, 0.0]]
    """
    mask = np.asarray(mask, bool)
    policy, frozen = (np.where(mask, x, 0.0).astype(np.float64) for x in (logprobs, reference))
    penalty = coefficient * losses.kl_estimate(policy, frozen, kind=estimator)
    last = np.arange(mask.shape[-1]) == mask.sum(axis=-1, keepdims=True) - 1
    return (np.where(last, np.asarray(reward, np.float64)[..., None], 0.0) - penalty).astype(np.float32)


def gae(
    values: Float[np.ndarray, "*rows time"],
    rewards: Float[np.ndarray, "*rows time"],
    mask: Bool[np.ndarray, "*rows time"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float32[np.ndarray, "*rows time"], Float32[np.ndarray, "*rows time"]]:
    """Computes generalised advantage estimates (arXiv:1506.02438, eq. 16) and the returns that a value head should predict.

    A_t = sum over l of (gamma * lam) ** l * delta_{t+l}, delta_t = r_t + gamma * V_{t+1} - V_t, return_t = A_t + V_t

    Args:
      values: V_t, what the value head predicted before token t, in units of the reward.
      rewards: one per token (`kl_penalised`).
      mask: true on response tokens. After the last one V is 0, also for a response that was cut off, as in TRL.
      gamma: discount per token; 1 is usual.
      lam: lambda; 0 trusts the values, 1 the rewards alone; 0.95 is usual.

    Returns:
      Advantages and returns of every token, in units of the reward; 0 where masked.

    Examples:
      >>> advantages, returns = gae(*np.array([[[0.5, 0.5]], [[0.0, 1.0]]]), np.ones((1, 2), bool), gamma=1.0, lam=0.5)
      >>> advantages.tolist(), returns.tolist()
      ([[0.25, 0.5]], [[0.75, 1.0]])
    """
    mask = np.asarray(mask, bool)
    values, rewards = (np.where(mask, x, 0.0).astype(np.float64) for x in (values, rewards))
    following = np.concatenate([values[..., 1:], np.zeros_like(values[..., :1])], axis=-1)
    delta = rewards + gamma * following - values
    advantages = np.zeros_like(delta)
    carried = np.zeros(delta.shape[:-1])
    for t in reversed(range(delta.shape[-1])):
        carried = advantages[..., t] = delta[..., t] + gamma * lam * carried
    return advantages.astype(np.float32), (advantages + values).astype(np.float32)


def whiten(
    x: Float[np.ndarray, "*rows time"], mask: Bool[np.ndarray, "*rows time"], *, shift_mean: bool = True
) -> Float32[np.ndarray, "*rows time"]:
    """Scales values to standard deviation 1 over all true positions of the batch, as TRL's PPO does.

    The variance is divided by n - 1, and 1e-8 is added to it under the root.

    Args:
      x: advantages or rewards of the tokens.
      mask: true on response tokens.
      shift_mean: whether to shift the mean to 0; otherwise it stays what it was, as is usual for rewards.

    Returns:
      The whitened values, 0 where masked.

    Examples:
      >>> whiten(np.array([[1.0, 2.0, 3.0, 9.0]]), np.array([[True, True, True, False]])).tolist()
      [[-1.0, 0.0, 1.0, 0.0]]
    """
    mask = np.asarray(mask, bool)
    real = np.asarray(x, np.float64)[mask]
    mean = real.mean()
    scale = np.sqrt(((real - mean) ** 2).sum() / max(len(real) - 1, 1) + 1e-8)
    result = np.zeros(mask.shape, np.float32)
    result[mask] = (real - mean) / scale + (0.0 if shift_mean else mean)
    return result


def adaptive_kl(coefficient: float, kl: float, n: int, *, target: float, horizon: int) -> float:
    """Computes the KL coefficient of the next iteration, which steers the KL to a target (arXiv:1909.08593, 2.2).

    coefficient * (1 + clip(kl / target - 1, -0.2, 0.2) * min(n / horizon, 1))

    The minimum is not the paper's: with more responses than five horizons the coefficient could become negative.

    Args:
      coefficient: of this iteration, in units of the reward per nat; 0.2 is usual for the first iteration.
      kl: estimate of the KL to the reference, summed over the tokens of a response, mean over the responses of this
        iteration, in nats.
      n: the number of these responses.
      target: the wanted `kl`, in nats per response; 6 is usual.
      horizon: number of responses in which the coefficient can change by a fifth; 10000 is usual.

    Examples:
      >>> adaptive_kl(0.2, 12.0, 500, target=6.0, horizon=10000)
      0.202
    """
    return coefficient * (1 + float(np.clip(kl / target - 1, -0.2, 0.2)) * min(n / horizon, 1.0))
