"""Schedules of the threshold: iteration -> tau. Pairs whose margin exceeds tau are ranked, all others are blended.

The exponential schedule is the paper's (Alg. 1, arXiv:2408.02599: tau_0 = 0.2, alpha = 0.9); the others are variants.
Iterations are counted from 0. Any `Callable[[int], float]` serves as a schedule. Values are Python floats (float64), in
units of the (transformed) reward.
"""

import math
from collections.abc import Callable

from ple_jax.core.errors import UserError

Schedule = Callable[[int], float]


def _scaled(tau_0: float, shape: Schedule) -> Schedule:
    if not tau_0 >= 0:  # written so that nan fails too
        raise UserError(
            f"ple.tau_0 = {tau_0}: give a number >= 0, or inf to blend every pair; "
            "below 0 a worse response would be ranked above a better one"
        )
    if math.isinf(tau_0):  # inf * 0 would be nan
        return lambda iteration: math.inf
    return lambda iteration: float(tau_0) * shape(iteration)


def _check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise UserError(f"iterations = {iterations}: a schedule that falls over the run needs at least 1")


def exponential(tau_0: float, alpha: float) -> Schedule:
    """Returns the schedule tau_i = tau_0 * alpha^i (Alg. 1, arXiv:2408.02599).

    Args:
      tau_0: threshold of iteration 0, >= 0, in units of the (transformed) reward; `inf` blends every pair.
      alpha: decay per iteration, 0 < alpha <= 1.

    Raises:
      UserError: tau_0 is negative or nan, or alpha is outside (0, 1].

    Examples:
      >>> [round(exponential(0.2, 0.9)(i), 4) for i in range(3)]
      [0.2, 0.18, 0.162]
    """
    if not 0 < alpha <= 1:
        raise UserError(f"ple.alpha = {alpha}: give a number with 0 < alpha <= 1 (1 keeps the threshold constant)")
    return _scaled(tau_0, lambda iteration: float(alpha) ** iteration)


def constant(tau_0: float) -> Schedule:
    """Returns the schedule tau_i = tau_0 (an ablation).

    Args:
      tau_0: the threshold, >= 0, in units of the (transformed) reward; `inf` blends every pair.

    Raises:
      UserError: tau_0 is negative or nan.
    """
    return _scaled(tau_0, lambda iteration: 1.0)


def linear(tau_0: float, iterations: int) -> Schedule:
    """Returns the schedule tau_i = tau_0 * (1 - i / iterations), which is 0 from i = iterations on.

    The last iteration, i = iterations - 1, still has the threshold tau_0 / iterations.

    Args:
      tau_0: threshold of iteration 0, >= 0, in units of the (transformed) reward; `inf` blends every pair.
      iterations: length of the run, at least 1.

    Raises:
      UserError: tau_0 is negative or nan, or iterations < 1.

    Examples:
      >>> [linear(1.0, 4)(i) for i in range(5)]
      [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    _check_iterations(iterations)
    return _scaled(tau_0, lambda iteration: 1 - min(iteration / iterations, 1.0))


def cosine(tau_0: float, iterations: int) -> Schedule:
    """Returns the schedule tau_i = tau_0 * (1 + cos(pi * i / iterations)) / 2, which is 0 from i = iterations on.

    Args:
      tau_0: threshold of iteration 0, >= 0, in units of the (transformed) reward; `inf` blends every pair.
      iterations: length of the run, at least 1.

    Raises:
      UserError: tau_0 is negative or nan, or iterations < 1.
    """
    _check_iterations(iterations)
    return _scaled(tau_0, lambda iteration: (1 + math.cos(math.pi * min(iteration / iterations, 1.0))) / 2)


def make(name: str, *, tau_0: float, alpha: float, iterations: int) -> Schedule:
    """Returns the schedule with the given name.

    Args:
      name: "exponential", "constant", "linear" or "cosine".
      tau_0: threshold of iteration 0, >= 0, in units of the (transformed) reward.
      alpha: decay per iteration of the exponential schedule; the others ignore it.
      iterations: length of the run, for the linear and the cosine schedule; the others ignore it.

    Raises:
      UserError: `name` is none of the four, or the schedule refuses a value.
    """
    match name:
        case "exponential":
            return exponential(tau_0, alpha)
        case "constant":
            return constant(tau_0)
        case "linear":
            return linear(tau_0, iterations)
        case "cosine":
            return cosine(tau_0, iterations)
    raise UserError(f"ple.schedule = {name!r}: choose exponential, constant, linear or cosine")
