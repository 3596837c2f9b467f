"""The losses, as pure functions on arrays: one file for numpy, JAX and torch, through the array-API standard.

Every function returns one value per example and leaves the reduction to the caller. Log-probabilities are in nats,
values in the dtype of the first argument (backends pass float32). Masks may be boolean or 0/1 arrays. Nothing here
needs a stop-gradient: whatever is constant was computed before and comes in as an argument.

References: PLE, arXiv:2408.02599; DPO, arXiv:2305.18290; RRHF, arXiv:2304.05302.
"""

from array_api_compat import array_namespace
from jaxtyping import Bool, Float

from ple_jax.core.types import Array


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
    xp = array_namespace(logprobs)
    return xp.sum(xp.where(xp.astype(mask, xp.bool), logprobs, 0.0), axis=-1)


def masked_mean(values: Float[Array, "*rows time"], mask: Bool[Array, "*rows time"]) -> Float[Array, "*rows"]:
    """Mean over the true positions of the last axis; 0 where there are none.

    >>> import numpy as np
    >>> float(masked_mean(np.array([1.0, 2.0, 9.0]), np.array([True, True, False])))
    1.5
    """
    xp = array_namespace(values)
    length = xp.sum(xp.astype(mask, values.dtype), axis=-1)
    return sum_logprob(values, mask) / xp.clip(length, min=1.0)


def mean_logprob(logprobs: Float[Array, "*rows time"], mask: Bool[Array, "*rows time"]) -> Float[Array, "*rows"]:
    """Length-normalised log-probability of each response, in nats per token; 0 for an empty one (RRHF, eq. 1).

    Args:
      logprobs: log pi(y_t | x, y_<t) in nats; anything where the mask is false.
      mask: true on response tokens.
    """
    return masked_mean(logprobs, mask)


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
) -> Float[Array, "*rows"]:
    """Direct preference optimisation (arXiv:2305.18290, eq. 7).

    -log sigmoid(beta * ((sum_chosen - ref_chosen) - (sum_rejected - ref_rejected)))

    Args:
      sum_rejected: `sum_logprob` of the rejected response under the policy, nats.
      sum_chosen: the same of the chosen one.
      ref_rejected: `sum_logprob` of the rejected response under the frozen reference.
      ref_chosen: the same of the chosen one.
      beta: strength of the pull towards the reference, per nat; 0.1 is usual.

    >>> import numpy as np
    >>> x = np.zeros(1)
    >>> round(float(dpo(x, x, x, x, beta=0.1)[0]), 4)  # log 2 before the first step
    0.6931
    """
    return -_log_sigmoid(beta * ((sum_chosen - ref_chosen) - (sum_rejected - ref_rejected)))


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


def blend(
    sumlp: Float[Array, "*rows k"], weights: Float[Array, "*rows k"], *, normaliser: Float[Array, "*rows"] | float
) -> Float[Array, "*rows"]:
    """Weighted likelihood of the k responses of a query: -sum_k weights_k * sumlp_k / normaliser.

    Args:
      sumlp: `sum_logprob` of each response, nats.
      weights: weight of each response, usually summing to 1 over k.
      normaliser: the mean response length C of the whole optimiser batch, in tokens. Not each response's own length: on
        a model's own samples that has an expected gradient towards shorter responses, where a fixed C has none.

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
      normaliser: the mean response length of the optimiser batch, in tokens: the mean over the batch is then the mean
        over its tokens.
    """
    return -sum_logprob(logprobs, mask) / normaliser
