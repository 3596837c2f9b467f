"""losses.py in numpy, JAX (eager and jitted) and torch, against closed forms, finite differences and TRL."""

import doctest
import math
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

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


def constant(x: np.ndarray, like) -> np.ndarray:
    """An array of the library, and the precision, of `like`."""
    return torch.tensor(x) if isinstance(like, torch.Tensor) else jnp.asarray(x, like.dtype)


def dpo_loss(logprobs, mask):
    ref = REFERENCE if isinstance(logprobs, np.ndarray) else constant(REFERENCE, logprobs)
    policy, ref = losses.sum_logprob(logprobs, mask), losses.sum_logprob(ref, mask)
    return losses.dpo(policy[:, 0], policy[:, 1], ref[:, 0], ref[:, 1], beta=0.7)


def dpo_oracle(x: np.ndarray) -> list[float]:
    pairs = zip(rows(x), rows(REFERENCE), strict=True)
    return [reference.rank_loss(p, rank="dpo", margin=0.0, beta=0.7, reference=r) for p, r in pairs]


def blend_loss(logprobs, mask):
    weights = WEIGHTS if isinstance(logprobs, np.ndarray) else constant(WEIGHTS, logprobs)
    return losses.blend(losses.sum_logprob(logprobs, mask), weights, normaliser=3.5)


def blend_oracle(x: np.ndarray) -> list[float]:
    return [
        -sum(w * sum(lp) for w, lp in zip(ws, p, strict=True)) / 3.5 for ws, p in zip(WEIGHTS, rows(x), strict=True)
    ]


def nll_loss(logprobs, mask):
    return losses.nll(logprobs, mask, normaliser=3.5)[:, 0]


CASES = {
    "hinge": pairwise("hinge", margin=0.0),
    "hinge_margin": pairwise("hinge", margin=0.6),
    "hinge_prob": pairwise("hinge_prob"),
    "sigmoid": pairwise("sigmoid", beta=2.5),
    "dpo": (dpo_loss, dpo_oracle),
    "blend": (blend_loss, blend_oracle),
    "nll": (nll_loss, lambda x: [-sum(p[0]) / 3.5 for p in rows(x)]),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_same_in_numpy_jax_and_torch_and_those_of_the_oracle(name):
    loss, oracle = CASES[name]
    expected = np.array(oracle(LOGPROBS))
    assert np.count_nonzero(expected) > 1  # a hinge that is never active would prove nothing
    slope = reference.gradient(lambda x: sum(oracle(x)), LOGPROBS)

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


def test_a_mean_of_nll_over_the_batch_is_a_mean_over_its_tokens():
    logprobs, mask = LOGPROBS[:, 0], MASK[:, 0]
    value = losses.nll(logprobs, mask, normaliser=mask.sum(axis=-1).mean()).mean()
    np.testing.assert_allclose(value, -np.mean(logprobs[mask]), rtol=1e-12)


def trl_loss(loss_type: str, *, beta: float, logprobs: np.ndarray, ref: np.ndarray, lengths: np.ndarray) -> float:
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


def test_the_examples_in_the_docstrings_hold():
    failed, attempted = doctest.testmod(losses)
    assert attempted > 0 and failed == 0
