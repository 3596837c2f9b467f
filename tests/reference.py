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
    return -sumlp(logprobs) / (mean_length if length_norm == "batch" else len(logprobs))


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
    selection: str = "threshold",
    rank: str = "hinge",
    margin: float = 0.0,
    beta: float = 1.0,
    rank_weight: float = 1.0,
    rank_sft_weight: float = 0.0,
    blend: str = "softmax",
    temperature: float = 1.0,
    blend_weight: float = 1.0,
    length_norm: str = "batch",
    references: Sequence[Pair] | None = None,
) -> float:
    """The loss of one optimiser batch, from token log-probabilities and rewards, both as (plain, principled)."""
    lengths = [len(response) for pair in pairs for response in pair]
    mean_length = sum(lengths) / len(lengths)
    total = 0.0
    for i, (pair, (r_plain, r_principled)) in enumerate(zip(pairs, rewards, strict=True)):
        reference = references[i] if references else None
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


def gradient(f: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central finite differences of a scalar function."""
    result = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        result[index] = (f(up) - f(down)) / (2 * step)
    return result
