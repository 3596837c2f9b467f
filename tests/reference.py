"""An oracle in plain Python floats and loops, from the method's definition; it shares no code with the library.

A pair is two lists of token log-probabilities, without padding: [plain or losing, principled or winning].
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

Pair = Sequence[Sequence[float]]


def sumlp(logprobs: Sequence[float]) -> float:
    total = 0.0
    for lp in logprobs:
        total += lp
    return total


def meanlp(logprobs: Sequence[float]) -> float:
    return sumlp(logprobs) / len(logprobs)


def minus_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x))


def rank_loss(pair: Pair, *, rank: str, margin: float, beta: float, reference: Pair | None) -> float:
    plain, principled = meanlp(pair[0]), meanlp(pair[1])
    if rank == "hinge":
        return max(0.0, plain - principled + margin)
    if rank == "hinge_prob":
        return max(0.0, math.exp(plain) - math.exp(principled))
    if rank == "sigmoid":
        return minus_log_sigmoid(beta * (principled - plain))
    gains = [sumlp(pair[i]) - sumlp(reference[i]) for i in (0, 1)]
    return minus_log_sigmoid(beta * (gains[1] - gains[0]))


def likelihood_loss(logprobs: Sequence[float], *, mean_length: float, length_norm: str) -> float:
    return -sumlp(logprobs) / (mean_length if length_norm == "mean" else len(logprobs))


def blend_weights(rewards: Sequence[float], *, blend: str, temperature: float) -> list[float]:
    if blend == "softmax":
        raw = [math.exp(r / temperature) for r in rewards]
    elif blend == "sigmoid":
        raw = [1 / (1 + math.exp(-r / temperature)) for r in rewards]
    elif blend == "uniform":
        raw = [1.0 for _ in rewards]
    else:
        raw = [1.0 if r == max(rewards) else 0.0 for r in rewards]
    return [w / sum(raw) for w in raw]


def batch_loss(
    pairs: Sequence[Pair],
    rewards: Sequence[Sequence[float]],
    *,
    tau: float,
    mean_length: float,
    selection: str = "threshold",
    rank: str = "hinge",
    margin: float = 0.0,
    beta: float = 1.0,
    rank_weight: float = 1.0,
    rank_sft_weight: float = 0.0,
    blend: str = "softmax",
    temperature: float = 1.0,
    blend_weight: float = 1.0,
    length_norm: str = "mean",
    kl_weight: float = 0.0,
    references: Sequence[Pair] | None = None,
) -> float:
    """The loss of one optimiser batch, from token log-probabilities and rewards, both as (plain, principled)."""
    total = 0.0
    for i, (pair, (r_plain, r_principled)) in enumerate(zip(pairs, rewards, strict=True)):
        reference = references[i] if references else None
        if kl_weight:
            apart = [kl(p, q, "k2") for p, q in zip(pair[0], reference[0], strict=True)]
            total += kl_weight * sum(apart) / (mean_length if length_norm == "mean" else len(apart))
        gap = r_principled - r_plain
        if selection == "symmetric" and gap < -tau:
            pair, reference = pair[::-1], reference[::-1] if reference else None
            ranked = True
        else:
            ranked = gap > tau
        if ranked:
            loss = rank_loss(pair, rank=rank, margin=margin, beta=beta, reference=reference)
            winner = likelihood_loss(pair[1], mean_length=mean_length, length_norm=length_norm)
            total += rank_weight * (loss + rank_sft_weight * winner)
        else:
            weights = blend_weights((r_plain, r_principled), blend=blend, temperature=temperature)
            for w, response in zip(weights, pair, strict=True):
                total += blend_weight * w * likelihood_loss(response, mean_length=mean_length, length_norm=length_norm)
    return total / len(pairs)


def preference_loss(pair: Pair, reference: Pair, *, beta: float, label_smoothing: float = 0.0) -> float:
    """DPO's expected loss where the label of the pair (rejected, chosen) is wrong with a known probability."""
    z = beta * ((sumlp(pair[1]) - sumlp(reference[1])) - (sumlp(pair[0]) - sumlp(reference[0])))
    return (1 - label_smoothing) * minus_log_sigmoid(z) + label_smoothing * minus_log_sigmoid(-z)


def identity_loss(pair: Pair, reference: Pair, *, beta: float) -> float:
    lead = (meanlp(pair[1]) - meanlp(reference[1])) - (meanlp(pair[0]) - meanlp(reference[0]))
    return (lead - 0.5 / beta) ** 2


def kl(p: float, q: float, kind: str) -> float:
    """Schulman's estimates at one sampled token, from its log-probabilities under the policy and the reference."""
    ratio = math.exp(q) / math.exp(p)
    return {"k1": -math.log(ratio), "k2": math.log(ratio) ** 2 / 2, "k3": ratio - 1 - math.log(ratio)}[kind]


def clipped_loss(ratio: float, advantage: float, low: float, high: float) -> float:
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def policy_loss(
    new: Sequence[float], old: Sequence[float], advantages: Sequence[float], *, low: float, high: float
) -> float:
    """PPO's, summed over the tokens of a response."""
    total = 0.0
    for p, q, advantage in zip(new, old, advantages, strict=True):
        total += clipped_loss(math.exp(p - q), advantage, low, high)
    return total


def value_loss(new: Sequence[float], old: Sequence[float], returns: Sequence[float], *, clip: float) -> float:
    total = 0.0
    for v, w, r in zip(new, old, returns, strict=True):
        total += max((v - r) ** 2, (min(max(v, w - clip), w + clip) - r) ** 2) / 2
    return total


def advantages(values: Sequence[float], rewards: Sequence[float], *, gamma: float, lam: float) -> list[float]:
    """GAE as the sum that defines it; the value after the last token is 0."""
    values = [*values, 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** i * d for i, d in enumerate(deltas[t:])) for t in range(len(deltas))]


def gradient(f: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central finite differences of a scalar function."""
    result = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        result[index] = (f(up) - f(down)) / (2 * step)
    return result
