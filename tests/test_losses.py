"""losses.py in numpy, JAX (eager and jitted) and torch, against closed forms, finite differences and TRL."""

import doctest
import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch

from ple_jax import losses

RNG = np.random.default_rng(4)
LENGTHS = np.array([[3, 5], [1, 2], [6, 6], [4, 1]])
MASK = np.arange(6) < LENGTHS[..., None]
LOGPROBS = np.where(MASK, -RNG.exponential(1.0, MASK.shape), 0.0)
REFERENCE = np.where(MASK, -RNG.exponential(1.0, MASK.shape), 0.0)
WEIGHTS = np.array([[0.2, 0.8], [0.5, 0.5], [1.0, 0.0], [0.7, 0.3]])
# ratios on both sides of both bounds, with advantages of both signs
OLD = np.where(MASK, LOGPROBS - RNG.normal(0, 0.4, MASK.shape), 0.0)
ADVANTAGES = np.where(MASK, RNG.normal(0, 1, MASK.shape), 0.0)
GROUP = np.array([[1.2, -1.2], [0.3, -0.3], [-0.8, 0.8], [0.5, -0.5]])
# what a sampler with another arithmetic says, on both sides of the cap; of its padding nothing is known
SAMPLER = np.where(MASK, OLD - RNG.normal(0, 0.4, MASK.shape), np.nan)
BOUNDS = {"clip_low": 0.2, "clip_high": 0.28}


def rows(x: np.ndarray) -> list[list[list[float]]]:
    return [[list(x[i, j, : LENGTHS[i, j]]) for j in range(2)] for i in range(len(x))]


def pairwise(name: str, **options: float):
    def loss(logprobs, mask):
        lp = losses.mean_logprob(logprobs, mask)
        return getattr(losses, name)(lp[:, 0], lp[:, 1], **options)

    def oracle(x: np.ndarray) -> list[float]:
        margin, beta = options.get("margin", 0.0), options.get("beta", 1.0)
        return [reference.rank_loss(p, rank=name, margin=margin, beta=beta, reference=None) for p in rows(x)]

    return loss, oracle


def constant(x: np.ndarray, like) -> Any:
    """An array of the library, and the precision, of `like`."""
    if isinstance(like, np.ndarray):
        return x
    return torch.tensor(x) if isinstance(like, torch.Tensor) else jnp.asarray(x, like.dtype)


def preference(name: str, **options: float):
    """A loss of (rejected, chosen) against the reference, on sums; IPO on means."""
    total = losses.mean_logprob if name == "ipo" else losses.sum_logprob

    def loss(logprobs, mask):
        policy, ref = total(logprobs, mask), total(constant(REFERENCE, logprobs), mask)
        return getattr(losses, name)(policy[:, 0], policy[:, 1], ref[:, 0], ref[:, 1], **options)

    def oracle(x: np.ndarray) -> list[float]:
        one = reference.identity_loss if name == "ipo" else reference.preference_loss
        return [one(p, r, **options) for p, r in zip(rows(x), rows(REFERENCE), strict=True)]

    return loss, oracle


def blend_loss(logprobs, mask):
    return losses.blend(losses.sum_logprob(logprobs, mask), constant(WEIGHTS, logprobs), normaliser=3.5)


def blend_oracle(x: np.ndarray) -> list[float]:
    return [
        -sum(w * sum(lp) for w, lp in zip(ws, p, strict=True)) / 3.5 for ws, p in zip(WEIGHTS, rows(x), strict=True)
    ]


def nll_loss(logprobs, mask):
    return losses.nll(logprobs, mask, normaliser=3.5)[:, 0]


def per_response(one: Callable[..., float], *arrays: np.ndarray) -> list[list[float]]:
    """`one` of the tokens of every response."""
    return [[one(*tokens) for tokens in zip(*pair, strict=True)] for pair in zip(*map(rows, arrays), strict=True)]


def kl_case(kind: str):
    def loss(logprobs, mask):
        return losses.masked_sum(losses.kl_estimate(logprobs, constant(REFERENCE, logprobs), kind=kind), mask)

    def one(policy: list[float], ref: list[float]) -> float:
        return sum(reference.kl(p, q, kind) for p, q in zip(policy, ref, strict=True))

    return loss, lambda x: per_response(one, x, REFERENCE)


def policy_oracle(x: np.ndarray, advantages: np.ndarray) -> np.ndarray:
    return np.array(per_response(partial(reference.policy_loss, low=0.2, high=0.28), x, OLD, advantages))


def ppo_loss(logprobs, mask):
    old, advantages = constant(OLD, logprobs), constant(ADVANTAGES, logprobs)
    return losses.ppo(logprobs, old, advantages, mask, normaliser=3.5, **BOUNDS)[0]


def value_loss(values, mask):
    old, returns = constant(OLD, values), constant(ADVANTAGES, values)
    return losses.masked_sum(losses.clipped_value(values, old, returns, mask, clip=0.2)[0], mask)


def value_oracle(x: np.ndarray) -> list[list[float]]:
    return per_response(partial(reference.value_loss, clip=0.2), x, OLD, ADVANTAGES)


def grpo_case(beta: float, normaliser: np.ndarray | float):
    def loss(logprobs, mask):
        old, ref, group = (constant(x, logprobs) for x in (OLD, REFERENCE, GROUP))
        divisor = constant(normaliser, logprobs) if isinstance(normaliser, np.ndarray) else normaliser
        ref = ref if beta else None
        return losses.grpo(logprobs, old, ref, group, mask, beta=beta, normaliser=divisor, **BOUNDS)[0]

    def oracle(x: np.ndarray) -> np.ndarray:
        penalty = np.array(kl_case("k3")[1](x))
        return (policy_oracle(x, GROUP[..., None] * np.ones(x.shape)) + beta * penalty) / normaliser

    return loss, oracle


def rloo_loss(logprobs, mask):
    old = losses.sum_logprob(constant(OLD, logprobs), mask)
    return losses.rloo(losses.sum_logprob(logprobs, mask), old, constant(GROUP, logprobs), **BOUNDS)[0]


def rloo_oracle(x: np.ndarray) -> list[list[float]]:
    ratios = per_response(lambda new, old: math.exp(reference.sumlp(new) - reference.sumlp(old)), x, OLD)
    pairs = zip(ratios, GROUP, strict=True)
    return [[reference.clipped_loss(r, a, 0.2, 0.28) for r, a in zip(*pair, strict=True)] for pair in pairs]


def distillation_loss(logprobs, mask):
    teacher, old = constant(REFERENCE, logprobs), constant(OLD, logprobs)
    return losses.distillation(logprobs, teacher, old, mask, normaliser=3.5, **BOUNDS)[0]


def tokens_weights(like) -> Any:
    return losses.truncated_importance(constant(OLD, like), constant(SAMPLER, like), constant_mask(like), cap=1.3)


def constant_mask(like) -> Any:
    if isinstance(like, np.ndarray):
        return MASK
    return torch.tensor(MASK) if isinstance(like, torch.Tensor) else jnp.asarray(MASK)


def weighted_ppo(logprobs, mask):
    old, advantages = constant(OLD, logprobs), constant(ADVANTAGES, logprobs)
    return losses.ppo(logprobs, old, advantages, mask, normaliser=3.5, weights=tokens_weights(logprobs), **BOUNDS)[0]


def weighted_oracle(x: np.ndarray) -> np.ndarray:
    """Token by token, in Python's floats."""

    def one(new, old, advantages, sampler):
        weights = [min(math.exp(o - s), 1.3) for o, s in zip(old, sampler, strict=True)]
        return reference.policy_loss(new, old, [w * a for w, a in zip(weights, advantages, strict=True)], low=0.2, high=0.28)

    return np.array(per_response(one, x, OLD, ADVANTAGES, SAMPLER)) / 3.5


def weighted_rloo(logprobs, mask):
    old, sampler = (losses.sum_logprob(constant(x, logprobs), mask) for x in (OLD, SAMPLER))
    weights = losses.truncated_importance(old, sampler, mask.any(-1), cap=1.3)
    return losses.rloo(losses.sum_logprob(logprobs, mask), old, constant(GROUP, logprobs), weights=weights, **BOUNDS)[0]


def weighted_rloo_oracle(x: np.ndarray) -> np.ndarray:
    def one(old, sampler):
        return min(math.exp(reference.sumlp(old) - reference.sumlp(sampler)), 1.3)

    return np.array(per_response(one, OLD, SAMPLER)) * np.array(rloo_oracle(x))


CASES = {
    "hinge": pairwise("hinge", margin=0.0),
    "hinge_margin": pairwise("hinge", margin=0.6),
    "hinge_prob": pairwise("hinge_prob"),
    "sigmoid": pairwise("sigmoid", beta=2.5),
    "dpo": preference("dpo", beta=0.7),
    "dpo_smoothed": preference("dpo", beta=0.7, label_smoothing=0.2),
    "ipo": preference("ipo", beta=0.4),
    "blend": (blend_loss, blend_oracle),
    "nll": (nll_loss, lambda x: [-sum(p[0]) / 3.5 for p in rows(x)]),
    "k1": kl_case("k1"),
    "k2": kl_case("k2"),
    "k3": kl_case("k3"),
    "ppo": (ppo_loss, lambda x: policy_oracle(x, ADVANTAGES) / 3.5),
    "clipped_value": (value_loss, value_oracle),
    "grpo": grpo_case(0.3, LENGTHS.astype(np.float64)),
    "dr_grpo": grpo_case(0.3, 6.0),
    "grpo_no_kl": grpo_case(0.0, 3.5),
    "rloo": (rloo_loss, rloo_oracle),
    "distillation": (distillation_loss, lambda x: policy_oracle(x, REFERENCE - OLD) / 3.5),
    "ppo_weighted": (weighted_ppo, weighted_oracle),
    "rloo_weighted": (weighted_rloo, weighted_rloo_oracle),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_same_in_numpy_jax_and_torch_and_those_of_the_oracle(name):
    loss, oracle = CASES[name]
    expected = np.array(oracle(LOGPROBS))
    assert np.count_nonzero(expected) > 1  # a hinge that is never active would prove nothing
    slope = reference.gradient(lambda x: float(np.sum(oracle(x))), LOGPROBS)

    np.testing.assert_allclose(loss(LOGPROBS, MASK), expected, rtol=1e-12)

    x = jnp.asarray(LOGPROBS, jnp.float32)
    mask = jnp.asarray(MASK)
    for wrap in (lambda f: f, jax.jit):
        np.testing.assert_allclose(wrap(loss)(x, mask), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            wrap(jax.grad(lambda x: loss(x, mask).sum()))(x), np.where(MASK, slope, 0.0), rtol=1e-4, atol=1e-6
        )

    y = torch.tensor(LOGPROBS, requires_grad=True)
    values = loss(y, torch.tensor(MASK))
    values.sum().backward()
    np.testing.assert_allclose(values.detach(), expected, rtol=1e-12)
    np.testing.assert_allclose(y.grad, np.where(MASK, slope, 0.0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("convert", "to_float"), [(np.asarray, float), (jnp.asarray, float), (torch.tensor, lambda t: t.item())]
)
def test_masked_positions_count_for_nothing_even_if_they_are_nan(convert, to_float):
    logprobs = convert(np.array([[-1.0, -2.0, np.nan], [np.nan, np.nan, np.nan]], np.float32))
    mask = convert(np.array([[True, True, False], [False, False, False]]))
    assert [to_float(x) for x in losses.sum_logprob(logprobs, mask)] == [-3.0, 0.0]
    assert [to_float(x) for x in losses.mean_logprob(logprobs, mask)] == [-1.5, 0.0]
    assert [to_float(x) for x in losses.masked_mean(-logprobs, mask)] == [1.5, 0.0]
    as_numbers = convert(np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], np.float32))
    assert [to_float(x) for x in losses.mean_logprob(logprobs, as_numbers)] == [-1.5, 0.0]


def test_gradients_at_masked_positions_are_zero_even_if_they_are_nan():
    logprobs, mask = np.array([[-1.0, np.nan]], np.float32), np.array([[True, False]])
    slope = jax.grad(lambda x: losses.mean_logprob(x, jnp.asarray(mask)).sum())(jnp.asarray(logprobs))
    np.testing.assert_array_equal(slope, [[1.0, 0.0]])
    x = torch.tensor(logprobs, requires_grad=True)
    losses.mean_logprob(x, torch.tensor(mask)).sum().backward()
    np.testing.assert_array_equal(x.grad, [[1.0, 0.0]])


@pytest.mark.parametrize("loss", [partial(losses.hinge, margin=0.0), losses.hinge_prob])
def test_the_gradient_of_a_hinge_at_its_corner_is_zero_in_both_backends(loss):
    a = np.array([-1.5], np.float32)
    for fn in (jax.grad(lambda x: loss(x, jnp.asarray(a)).sum()), jax.jit(jax.grad(lambda x: loss(x, x).sum()))):
        np.testing.assert_array_equal(fn(jnp.asarray(a)), [0.0])
    x = torch.tensor(a, requires_grad=True)
    loss(x, torch.tensor(a)).sum().backward()
    np.testing.assert_array_equal(x.grad, [0.0])


def test_ranking_losses_pull_the_principled_response_up_and_the_plain_one_down():
    """Closed-form gradients, sign included: a swapped pair or a lost minus sign fails here."""
    a, b = jnp.array([-1.0, -3.0]), jnp.array([-2.0, -1.0])  # out of order, in order
    for loss, slopes in (
        (partial(losses.hinge, margin=0.0), [1.0, 0.0]),
        (partial(losses.hinge, margin=5.0), [1.0, 1.0]),
        (partial(losses.sigmoid, beta=2.0), [2 / (1 + math.exp(-2.0)), 2 / (1 + math.exp(4.0))]),
    ):
        plain, principled = jax.grad(lambda x, y, loss=loss: loss(x, y).sum(), argnums=(0, 1))(a, b)
        np.testing.assert_allclose(plain, slopes, rtol=1e-5)
        np.testing.assert_allclose(principled, -np.array(slopes), rtol=1e-5)
    plain, principled = jax.grad(lambda x, y: losses.hinge_prob(x, y).sum(), argnums=(0, 1))(a, b)
    np.testing.assert_allclose(plain, [math.exp(-1.0), 0.0], rtol=1e-5)
    np.testing.assert_allclose(principled, [-math.exp(-2.0), 0.0], rtol=1e-5)


def test_the_sigmoid_neither_overflows_nor_dies_far_from_zero():
    x, zero = jnp.array([1e4, -1e4], jnp.float32), jnp.zeros(2, jnp.float32)
    loss = partial(losses.sigmoid, beta=1.0)
    np.testing.assert_allclose(jax.jit(loss)(x, zero), [1e4, 0.0])
    np.testing.assert_allclose(jax.grad(lambda x: loss(x, zero).sum())(x), [1.0, 0.0])
    y = torch.tensor([1e4, -1e4], requires_grad=True)
    loss(y, torch.zeros(2)).sum().backward()
    np.testing.assert_allclose(y.grad, [1.0, 0.0])


def test_preference_losses_pull_the_chosen_response_up_and_the_rejected_one_down():
    """Closed forms of the slopes, for the chosen response; for the rejected one their negatives."""
    rejected, chosen, ref = jnp.array([-1.0, -3.0]), jnp.array([-2.0, -1.0]), jnp.zeros(2)
    lead = np.array([-1.0, 2.0])
    for loss, slopes in (
        (partial(losses.dpo, beta=2.0), -2 / (1 + np.exp(2 * lead))),
        (partial(losses.dpo, beta=2.0, label_smoothing=0.1), 2 * (0.1 - 1 / (1 + np.exp(2 * lead)))),
        (partial(losses.ipo, beta=0.1), 2 * (lead - 5)),
    ):
        assert (slopes < 0).sum() > 0
        found = jax.grad(lambda x, y, loss=loss: loss(x, y, ref, ref).sum(), argnums=(0, 1))(rejected, chosen)
        np.testing.assert_allclose(found, [-slopes, slopes], rtol=1e-5)


def test_policy_gradients_make_tokens_with_a_positive_advantage_likelier():
    """Where nothing has moved, the slope at every token is minus its advantage over the normaliser, not half of it."""
    logprobs, advantages = jnp.array([[-1.0, -2.0, -0.5]]), jnp.array([[2.0, -3.0, 0.0]])
    mask, shared = jnp.ones((1, 3), bool), jnp.array([2.0])
    teacher = logprobs + advantages
    ref = jnp.zeros_like(logprobs)
    cases = {
        "ppo": lambda x: losses.ppo(x, logprobs, advantages, mask, normaliser=2.0, **BOUNDS)[0],
        "distillation": lambda x: losses.distillation(x, teacher, logprobs, mask, normaliser=2.0, **BOUNDS)[0],
        "grpo": lambda x: losses.grpo(x, logprobs, None, shared, mask, beta=0.0, normaliser=2.0, **BOUNDS)[0],
        "rloo": lambda x: losses.rloo(x.sum(-1), logprobs.sum(-1), shared, **BOUNDS)[0],
        "towards the reference": lambda x: losses.grpo(
            x, logprobs, ref, 0 * shared, mask, beta=1.0, normaliser=1.0, **BOUNDS
        )[0],
    }
    expected = {
        "ppo": -advantages / 2,
        "distillation": -advantages / 2,
        "grpo": [[-1.0] * 3],
        "rloo": [[-2.0] * 3],
        "towards the reference": 1 - jnp.exp(-logprobs),
    }
    for name, loss in cases.items():
        np.testing.assert_allclose(jax.grad(lambda x, f=loss: f(x).sum())(logprobs), expected[name], rtol=1e-6)
        # and from a finite difference, so that the value has the sign of the slope
        step = 1e-2 * jnp.sign(jnp.asarray(expected[name]))
        assert float((loss(logprobs - step) - loss(logprobs)).sum()) < 0, name


def test_a_clipped_token_has_no_slope_and_is_counted():
    new = jnp.log(jnp.array([[1.5, 1.5, 0.5, 0.5, 1.1, 1.0]]))
    old, advantages = jnp.zeros((1, 6)), jnp.array([[1.0, -1.0, 1.0, -1.0, 1.0, 1.0]])
    mask = jnp.array([[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    values, clipped = jax.jit(partial(losses.clipped_policy, clip_low=0.3, clip_high=0.2))(new, old, advantages, mask)
    np.testing.assert_allclose(values, [[-1.2, 1.5, -0.5, 0.7, -1.1, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(clipped, [[True, False, False, True, False, False]])

    def loss(x):
        value, share = losses.ppo(x, old, advantages, mask, clip_low=0.3, clip_high=0.2, normaliser=1.0)
        return value.sum(), share

    slope, share = jax.grad(loss, has_aux=True)(new)
    np.testing.assert_allclose(slope, [[0.0, 1.5, -0.5, 0.0, -1.1, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(share, [2 / 5], rtol=1e-6)


def test_without_bounds_nothing_is_clipped():
    new, old, mask = np.array([[3.0, -9.0]]), np.zeros((1, 2)), np.ones((1, 2), bool)
    bounds = {"clip_low": math.inf, "clip_high": math.inf}
    for advantages in (np.ones((1, 2)), -np.ones((1, 2)), np.zeros((1, 2))):
        values, clipped = losses.clipped_policy(new, old, advantages, mask, **bounds)
        np.testing.assert_allclose(values, -np.exp(new) * advantages)
        assert not clipped.any()
    values, clipped = losses.clipped_value(new, old, old + 1, mask, clip=math.inf)
    np.testing.assert_allclose(values, (new - 1) ** 2 / 2)
    assert not clipped.any()


def test_a_value_that_moved_too_far_stops_only_where_it_went_the_right_way():
    """Towards its target it has no slope any more; away from it, it is pulled back."""
    values, old, returns = jnp.array([[1.0, 1.0, 0.1]]), jnp.zeros((1, 3)), jnp.array([[2.0, -1.0, 2.0]])
    mask = jnp.ones((1, 3), bool)
    loss, clipped = losses.clipped_value(values, old, returns, mask, clip=0.5)
    np.testing.assert_allclose(loss, [[1.5**2 / 2, 2.0, 1.9**2 / 2]], rtol=1e-6)
    np.testing.assert_array_equal(clipped, [[True, False, False]])
    slope = jax.grad(lambda v: losses.clipped_value(v, old, returns, mask, clip=0.5)[0].sum())(values)
    np.testing.assert_allclose(slope, [[0.0, 2.0, -1.9]], rtol=1e-6)


def masked_cases(convert) -> dict[str, tuple[Callable[[Any], Any], Any]]:
    """Losses of two responses, one of two tokens and one empty; what stands behind them is nan or would overflow."""
    mask = np.array([[True, True, False, False], [False] * 4])
    x, y, z = (convert(np.where(mask, v, [np.nan, np.nan, np.nan, 1e4])) for v in (-1.0, -1.1, -1.5))
    group, lengths, mask = convert(np.array([0.5, 0.5])), convert(np.array([2.0, 1.0])), convert(mask)

    def rloo(x):
        return losses.rloo(losses.sum_logprob(x, mask), losses.sum_logprob(y, mask), group, **BOUNDS)[0]

    return {
        "ppo": (lambda x: losses.ppo(x, y, z, mask, normaliser=2.0, **BOUNDS)[0], x),
        "value": (lambda x: losses.masked_sum(losses.clipped_value(x, y, z, mask, clip=1.0)[0], mask), x),
        "grpo": (lambda x: losses.grpo(x, y, z, group, mask, beta=0.1, normaliser=lengths, **BOUNDS)[0], x),
        "rloo": (rloo, x),
        "distillation": (lambda x: losses.distillation(x, z, y, mask, normaliser=2.0, **BOUNDS)[0], x),
    }


@pytest.mark.parametrize("name", masked_cases(np.asarray))
def test_policy_losses_ignore_what_is_masked_in_values_and_gradients_even_nan(name):
    loss, x = masked_cases(np.asarray)[name]
    value = loss(x)
    # no tokens have a ratio of 1 together; the slope is 0 all the same
    assert np.isfinite(value).all() and value[0] != 0 and value[1] == (-0.5 if name == "rloo" else 0.0)

    loss, x = masked_cases(lambda v: jnp.asarray(v, None if v.dtype == bool else jnp.float32))[name]
    for wrap in (lambda f: f, jax.jit):
        np.testing.assert_allclose(wrap(loss)(x), value, rtol=1e-5)
        slope = wrap(jax.grad(lambda x: loss(x).sum()))(x)
        assert (slope[0, :2] != 0).all() and (slope[0, 2:] == 0).all() and (slope[1] == 0).all()

    loss, x = masked_cases(torch.tensor)[name]
    x.requires_grad_()
    loss(x).sum().backward()
    assert (x.grad[0, :2] != 0).all() and (x.grad[0, 2:] == 0).all() and (x.grad[1] == 0).all()


def test_a_ratio_that_overflows_behind_its_bound_leaves_value_and_gradient_finite():
    new, old = np.array([1e3, -1e3], np.float32), np.zeros(2, np.float32)
    advantages = np.array([2.0, -2.0], np.float32)
    f = jax.value_and_grad(lambda x: losses.rloo(x, jnp.asarray(old), jnp.asarray(advantages), **BOUNDS)[0].sum())
    for value, slope in (f(jnp.asarray(new)), jax.jit(f)(jnp.asarray(new))):
        np.testing.assert_allclose(value, -2 * 1.28 + 2 * 0.8, rtol=1e-6)
        np.testing.assert_array_equal(slope, [0.0, 0.0])
    x = torch.tensor(new, requires_grad=True)
    losses.rloo(x, torch.tensor(old), torch.tensor(advantages), **BOUNDS)[0].sum().backward()
    np.testing.assert_array_equal(x.grad, [0.0, 0.0])


def test_kl_estimates_and_their_gradients_in_expectation_over_the_vocabulary():
    logits = torch.tensor(RNG.normal(0, 1, (3, 5)), requires_grad=True)
    other = torch.tensor(RNG.normal(0, 1, (3, 5))).log_softmax(-1)
    logp = logits.log_softmax(-1)
    forward, backward = (logp.exp() * (logp - other)).sum(), (other.exp() * (other - logp)).sum()
    slopes = {
        "k1": torch.zeros_like(logits),
        "k2": torch.autograd.grad(forward, logits, retain_graph=True)[0],
        "k3": torch.autograd.grad(backward, logits, retain_graph=True)[0],
    }
    for kind, slope in slopes.items():
        expected = (logp.exp().detach() * losses.kl_estimate(logp, other, kind=kind)).sum()
        if kind != "k2":
            np.testing.assert_allclose(expected.item(), forward.item(), rtol=1e-12)
        found = torch.autograd.grad(expected, logits, retain_graph=True)[0]
        np.testing.assert_allclose(found, slope, rtol=1e-10, atol=1e-15)
    with pytest.raises(ValueError, match="the KL estimator is 'k4': choose k1, k2 or k3"):
        losses.kl_estimate(logp, other, kind="k4")


def test_k3_is_exact_where_policy_and_reference_hardly_differ():
    """In float32 exp(-r) - 1 + r would be 0 or even negative."""
    ratio = jnp.array([1e-4, -1e-4, 0.0])
    np.testing.assert_allclose(losses.kl_estimate(ratio, jnp.zeros(3), kind="k3"), [5e-9, 5e-9, 0.0], rtol=1e-2)


def test_a_mean_of_nll_over_the_batch_is_a_mean_over_its_tokens():
    logprobs, mask = LOGPROBS[:, 0], MASK[:, 0]
    value = losses.nll(logprobs, mask, normaliser=mask.sum(axis=-1).mean()).mean()
    np.testing.assert_allclose(value, -np.mean(logprobs[mask]), rtol=1e-12)


def trl_loss(
    loss_type: str,
    *,
    beta: float,
    logprobs: np.ndarray,
    ref: np.ndarray,
    lengths: np.ndarray,
    label_smoothing: float = 0.0,
) -> float:
    """TRL's own loss of one (rejected, chosen) pair: DPOTrainer._compute_loss on a model with these log-probs."""
    from trl.trainer.dpo_trainer import DPOTrainer

    def chosen_first(x: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.ascontiguousarray(x[::-1]))

    mask = chosen_first(np.arange(1 + logprobs.shape[1]) <= lengths[:, None])
    mask[:, 0] = False  # one prompt token
    shape = logprobs.shape
    outputs = SimpleNamespace(
        log_probs=chosen_first(logprobs),
        entropy=torch.zeros(shape),
        mean_logits=torch.zeros(shape),
        is_top1=torch.zeros(shape, dtype=torch.bool),
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    ref_sums = torch.tensor(ref.sum(axis=1))
    inputs = {
        "input_ids": torch.zeros(mask.shape, dtype=torch.long),
        "attention_mask": torch.ones(mask.shape),
        "completion_mask": mask,
        "ref_rejected_logps": ref_sums[:1],
        "ref_chosen_logps": ref_sums[1:],
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False).item()


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_trl_computes_the_same_losses(beta):
    for logprobs, ref, mask, lengths in zip(LOGPROBS, REFERENCE, MASK, LENGTHS, strict=True):
        trl = partial(trl_loss, beta=beta, logprobs=logprobs, lengths=lengths)
        total, ref_total = losses.sum_logprob(logprobs, mask), losses.sum_logprob(ref, mask)
        mean, zeros = losses.mean_logprob(logprobs, mask), np.zeros_like(ref)
        np.testing.assert_allclose(losses.dpo(*total, *ref_total, beta=beta), trl("sigmoid", ref=ref), rtol=1e-6)
        np.testing.assert_allclose(losses.sigmoid(*mean, beta=beta), trl("sigmoid_norm", ref=zeros), rtol=1e-6)
        # TRL's hinge is relu(1 - beta * gap) on sums: ours with margin 1 / beta, scaled
        hinge = beta * losses.hinge(*total, margin=1 / beta)
        np.testing.assert_allclose(hinge, trl("hinge", ref=zeros), rtol=1e-6, atol=1e-12)
        ipo = losses.ipo(*mean, *losses.mean_logprob(ref, mask), beta=beta)
        np.testing.assert_allclose(ipo, trl("ipo", ref=ref), rtol=1e-6)
        # of a single pair, optimal transport (AOT) has nothing to sort, and is DPO; TRL smooths its labels, not DPO's
        smoothed = losses.dpo(*total, *ref_total, beta=beta, label_smoothing=0.1)
        np.testing.assert_allclose(smoothed, trl("aot_unpaired", ref=ref, label_smoothing=0.1), rtol=1e-6)


def trl_policy_loss(trainer: type, logprobs: torch.Tensor, inputs: dict[str, Any], **settings: Any):
    """TRL's own loss, and the metrics it logs, of responses to which the policy gives these log-probabilities."""
    queries, time = logprobs.shape
    inputs = {name: torch.tensor(value) for name, value in inputs.items()}
    inputs |= {
        "prompt_ids": torch.zeros(queries, 1, dtype=torch.long),
        "prompt_mask": torch.ones(queries, 1, dtype=torch.long),
        "completion_ids": torch.zeros(queries, time, dtype=torch.long),
        "num_items_in_batch": inputs["completion_mask"].sum(),
    }
    metrics: dict[str, Any] = defaultdict(lambda: defaultdict(list))
    accelerator = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
    options = {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        "model": SimpleNamespace(training=True),
        "accelerator": accelerator,
        "aux_loss_enabled": False,
        "epsilon_low": BOUNDS["clip_low"],
        "epsilon_high": BOUNDS["clip_high"],
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "use_vllm": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": 9,
        "args": SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        "_entropy_bonus_enabled": False,
        "_metrics": metrics,
    }
    return trainer._compute_loss(SimpleNamespace(**(options | settings)), None, inputs), metrics["train"]


def flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(8, *x.shape[2:])


# TRL's float32 constants aside, both compute in float64 here
CLOSE = {"rtol": 1e-6, "atol": 1e-9}


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_trl_weighs_tokens_as_we_do(beta):
    """Its weights multiply the surrogate and not the KL term."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    ratio = np.minimum(np.exp(np.where(MASK, OLD - SAMPLER, 0.0)), 2.0)  # what it computes of vllm's log-probabilities
    ours = losses.truncated_importance(OLD, SAMPLER, MASK, cap=2.0)
    np.testing.assert_allclose(ours, ratio, rtol=1e-12)
    assert (ours[MASK] == 2.0).any() and (ours[MASK] < 1).any()
    inputs = {"completion_mask": MASK.astype(int), "advantages": GROUP, "importance_sampling_ratio": ratio}
    inputs |= {"old_per_token_logps": OLD, "ref_per_token_logps": REFERENCE}
    inputs = {name: flat(value) for name, value in inputs.items()}
    theirs = torch.tensor(flat(LOGPROBS), requires_grad=True)
    weighing = {"use_vllm": True, "vllm_importance_sampling_correction": True}
    value, _ = trl_policy_loss(GRPOTrainer, theirs, inputs, loss_type="grpo", beta=beta, **weighing)
    value.backward()
    mine = torch.tensor(LOGPROBS, requires_grad=True)
    old, ref, group, real, weights = map(torch.tensor, (OLD, REFERENCE, GROUP, MASK, ours))
    loss, _ = losses.grpo(
        mine, old, ref, group, real, beta=beta, normaliser=torch.tensor(MASK.sum(-1) * 1.0), weights=weights, **BOUNDS
    )
    loss.mean().backward()
    np.testing.assert_allclose(loss.mean().item(), value.item(), **CLOSE)
    np.testing.assert_allclose(flat(mine.grad.numpy()), theirs.grad, **CLOSE)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "grpo with an empty response"])
def test_trl_computes_the_same_grpo_losses(loss_type, beta):
    from trl.trainer.grpo_trainer import GRPOTrainer

    mask = MASK.copy()
    if "empty" in loss_type:
        loss_type, mask[1, 0] = "grpo", False
    normaliser = {"grpo": np.maximum(mask.sum(-1), 1.0), "dr_grpo": 9.0}.get(loss_type, mask.sum(-1).mean())
    inputs = {"completion_mask": mask.astype(int), "advantages": GROUP}
    inputs |= {"old_per_token_logps": OLD, "ref_per_token_logps": REFERENCE}
    inputs = {name: flat(value) for name, value in inputs.items()}
    theirs = torch.tensor(flat(LOGPROBS), requires_grad=True)
    value, metrics = trl_policy_loss(GRPOTrainer, theirs, inputs, loss_type=loss_type, beta=beta)
    value.backward()

    ours = torch.tensor(LOGPROBS, requires_grad=True)
    old, ref, group, real = map(torch.tensor, (OLD, REFERENCE, GROUP, mask))
    normaliser = torch.tensor(normaliser) if isinstance(normaliser, np.ndarray) else normaliser
    loss, share = losses.grpo(ours, old, ref, group, real, beta=beta, normaliser=normaliser, **BOUNDS)
    loss.mean().backward()
    np.testing.assert_allclose(loss.mean().item(), value.item(), **CLOSE)
    np.testing.assert_allclose(flat(ours.grad.numpy()), theirs.grad, **CLOSE)

    clipped = float((share.numpy() * mask.sum(-1)).sum() / mask.sum())
    assert 0.1 < clipped < 0.9
    np.testing.assert_allclose(clipped, metrics["clip_ratio/region_mean"], rtol=1e-6)
    if beta:
        k3 = losses.kl_estimate(LOGPROBS, REFERENCE, kind="k3")[mask].mean()
        np.testing.assert_allclose(k3, metrics["kl"], rtol=1e-6)


def test_trl_computes_the_same_ppo_policy_loss():
    """TRL 1.16 has no PPO; its GRPO with an advantage for every token and the mean over tokens is PPO's policy loss."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    inputs = {"completion_mask": MASK.astype(int), "advantages": ADVANTAGES, "old_per_token_logps": OLD}
    theirs = torch.tensor(flat(LOGPROBS), requires_grad=True)
    inputs = {name: flat(value) for name, value in inputs.items()}
    value, _ = trl_policy_loss(GRPOTrainer, theirs, inputs, loss_type="bnpo", beta=0.0)
    value.backward()
    ours = torch.tensor(LOGPROBS, requires_grad=True)
    old, advantages, mask = map(torch.tensor, (OLD, ADVANTAGES, MASK))
    loss = losses.ppo(ours, old, advantages, mask, normaliser=MASK.sum(-1).mean(), **BOUNDS)[0].mean()
    loss.backward()
    np.testing.assert_allclose(loss.item(), value.item(), **CLOSE)
    np.testing.assert_allclose(flat(ours.grad.numpy()), theirs.grad, **CLOSE)


def test_trl_computes_the_same_rloo_loss():
    from trl.trainer.rloo_trainer import RLOOTrainer

    inputs = {"completion_mask": MASK.astype(int), "advantages": GROUP, "old_logps": OLD.sum(-1)}
    theirs = torch.tensor(flat(LOGPROBS), requires_grad=True)
    inputs = {name: flat(value) for name, value in inputs.items()}
    value, metrics = trl_policy_loss(RLOOTrainer, theirs, inputs)
    value.backward()
    ours = torch.tensor(LOGPROBS, requires_grad=True)
    old, group, mask = map(torch.tensor, (OLD, GROUP, MASK))
    sums = [losses.sum_logprob(x, mask) for x in (ours, old)]
    loss, clipped = losses.rloo(*sums, group, **BOUNDS)
    loss.mean().backward()
    np.testing.assert_allclose(loss.mean().item(), value.item(), **CLOSE)
    np.testing.assert_allclose(flat(ours.grad.numpy()), theirs.grad, **CLOSE)
    assert 0 < clipped.mean() < 1
    np.testing.assert_allclose(clipped.mean(), metrics["clip_ratio/region_mean"], rtol=1e-6)


@pytest.fixture
def sdft(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.sdft import loss_utils

    return loss_utils


def test_distillation_at_sampled_tokens_has_the_gradient_of_trls_sdft(sdft):
    student = torch.tensor(RNG.normal(0, 1, (4, 6, 7)), requires_grad=True)
    teacher = torch.tensor(RNG.normal(0, 1, (4, 6, 7)))
    ids, mask = torch.tensor(RNG.integers(0, 7, (4, 6))), torch.tensor(MASK[:, 0])
    theirs = sdft.compute_sampled_token_self_distillation_loss(student, teacher, ids, distillation_alpha=1.0)
    expected = torch.autograd.grad((theirs * mask).sum(), student)[0]
    lp, lp_teacher = (x.log_softmax(-1).gather(-1, ids[..., None])[..., 0] for x in (student, teacher))
    loss, _ = losses.distillation(lp, lp_teacher, lp.detach(), mask, normaliser=1.0, **BOUNDS)
    np.testing.assert_allclose(torch.autograd.grad(loss.sum(), student)[0], expected, **CLOSE)


def test_distillation_is_in_expectation_the_reverse_kl_of_the_whole_vocabulary_as_trl_computes_it(sdft):
    student = torch.tensor(RNG.normal(0, 1, (3, 5)), requires_grad=True)
    teacher = torch.tensor(RNG.normal(0, 1, (3, 5)))
    kl = sdft.compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=1.0)
    expected = torch.autograd.grad(kl.sum(), student)[0]
    lp, mask = student.log_softmax(-1)[..., None], torch.ones(3, 5, 1, dtype=torch.bool)  # every token is sampled once
    loss, _ = losses.distillation(lp, teacher.log_softmax(-1)[..., None], lp.detach(), mask, normaliser=1.0, **BOUNDS)
    weighted = (lp[..., 0].detach().exp() * loss).sum(-1)
    np.testing.assert_allclose(weighted.detach(), kl.detach(), rtol=1e-12)
    np.testing.assert_allclose(torch.autograd.grad(weighted.sum(), student)[0], expected, **CLOSE)


def test_the_examples_in_the_docstrings_hold():
    failed, attempted = doctest.testmod(losses)
    assert attempted > 0 and failed == 0
