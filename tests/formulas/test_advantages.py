"""formulas/advantages.py against closed forms, sums over all outcomes, and what TRL's trainers compute."""

import doctest
from collections import defaultdict
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ple_jax import losses
from ple_jax.core.errors import UserError
from ple_jax.formulas import advantages

RNG = np.random.default_rng(7)
LENGTHS = np.array([[3, 1, 2, 5], [4, 4, 1, 2]])
MASK = np.arange(5) < LENGTHS[..., None]
POLICY, REFERENCE, VALUES = (np.where(MASK, -RNG.exponential(1.0, MASK.shape), np.nan) for _ in range(3))
REWARDS = RNG.normal(0, 2, LENGTHS.shape)
KINDS = ("rloo", "grpo", "dr_grpo", "reinforce")


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("rloo", [[-3.0, 0.0, 3.0], [0.0, 0.0, 0.0]]),
        ("grpo", [[-2 / 2.0001, 0.0, 2 / 2.0001], [0.0, 0.0, 0.0]]),
        ("dr_grpo", [[-2.0, 0.0, 2.0], [0.0, 0.0, 0.0]]),
        ("reinforce", [[-3.0, -1.0, 1.0], [1.0, 1.0, 1.0]]),
    ],
)
def test_group_advantages(kind, expected):
    found = advantages.group_advantages([[1.0, 3.0, 5.0], [5.0, 5.0, 5.0]], kind=kind)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_leaving_one_out_is_what_it_says():
    found = advantages.group_advantages(REWARDS, kind="rloo")
    for row, result in zip(REWARDS, found, strict=True):
        np.testing.assert_allclose(result, [r - np.delete(row, i).mean() for i, r in enumerate(row)], rtol=1e-6)


@given(
    arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 5)), elements=st.floats(-100, 100)),
    st.floats(-1e3, 1e3),
    st.sampled_from(KINDS),
)
def test_group_advantages_do_not_depend_on_the_zero_of_the_reward_and_sum_to_zero(rewards, shift, kind):
    found = advantages.group_advantages(rewards, kind=kind)
    # of equal rewards the deviation is rounding alone, which 1e-4 in the denominator multiplies
    tolerance = {"rtol": 1e-5, "atol": 1e-7 if kind == "grpo" else 1e-4}
    np.testing.assert_allclose(advantages.group_advantages(rewards + shift, kind=kind), found, **tolerance)
    np.testing.assert_allclose(found.sum(axis=None if kind == "reinforce" else -1), 0.0, atol=1e-3)
    for row, result in zip(rewards, found, strict=True):
        assert (np.diff(result[np.argsort(row)]) >= -1e-6).all()


@pytest.mark.parametrize(("kind", "share"), [("rloo", 1.0), ("dr_grpo", 0.5)])
def test_the_expected_policy_gradient_is_that_of_the_expected_reward(kind, share):
    """Over all pairs of tokens that a policy can sample; with its own reward in the mean, (k - 1) / k of it."""
    logits = torch.tensor(RNG.normal(0, 1, 3), requires_grad=True)
    reward = RNG.normal(0, 1, 3)
    lp = logits.log_softmax(-1)
    expected = torch.autograd.grad((lp.exp() * torch.tensor(reward)).sum(), logits, retain_graph=True)[0]
    total = torch.zeros(())
    for pair in product(range(3), repeat=2):
        gap = torch.tensor(advantages.group_advantages(reward[None, pair], kind=kind)[0])
        new = lp[list(pair)]
        loss, _ = losses.rloo(new, new.detach(), gap, clip_low=0.2, clip_high=0.2)
        total = total + new.detach().sum().exp() * loss.mean()
    found = torch.autograd.grad(-total, logits)[0]
    np.testing.assert_allclose(found, share * expected, rtol=1e-5, atol=1e-8)


def test_what_cannot_be_compared_is_refused_with_a_remedy():
    with pytest.raises(UserError, match="rloo compares the responses of a query: it needs at least 2 of each, not 1"):
        advantages.group_advantages([[1.0], [2.0]], kind="rloo")
    with pytest.raises(UserError, match="kind 'gae': choose rloo, grpo, dr_grpo or reinforce"):
        advantages.group_advantages([[1.0]], kind="gae")
    np.testing.assert_array_equal(advantages.group_advantages([[1.0], [2.0]], kind="reinforce"), [[-0.5], [0.5]])


def trl_advantages(trainer: type, *, beta: float, **settings) -> np.ndarray:
    """What TRL's own _generate_and_score_completions computes of REWARDS, POLICY and REFERENCE."""
    count = REWARDS.size
    model, frozen = SimpleNamespace(training=True, is_gradient_checkpointing=False), object()
    scores = {id(model): POLICY, id(frozen): REFERENCE}
    prompts, tokens = [[1]] * count, [[2] * int(n) for n in LENGTHS.ravel()]
    sampled = {
        "RLOOTrainer": (prompts, tokens, [""] * count),
        "GRPOTrainer": (prompts, tokens, None, [""] * count, None, {}, None, None),
    }[trainer.__name__]

    def logps(model, *_, **__):
        return torch.tensor(np.nan_to_num(scores[id(model)]).reshape(count, -1)), None, None

    fake = SimpleNamespace(
        model=model,
        ref_model=frozen,
        beta=beta,
        num_generations=REWARDS.shape[1],
        num_iterations=1,
        args=SimpleNamespace(
            per_device_train_batch_size=count,
            gradient_checkpointing_kwargs=None,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
        ),
        accelerator=SimpleNamespace(
            device="cpu", process_index=0, num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        reward_weights=torch.ones(1, dtype=torch.float64),
        reward_func_names=["reward"],
        reward_clip_range=None,
        multi_objective_aggregation="sum_then_normalize",
        environment_factories=None,
        environments=None,
        tools=[],
        use_vllm=False,
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _generate=lambda prompts: sampled,
        _get_per_token_logps_and_entropies=logps,
        _calculate_rewards=lambda *_: torch.tensor(REWARDS.reshape(count, 1)),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _logs=defaultdict(list, rewards=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
        **settings,
    )
    output = trainer._generate_and_score_completions(fake, [{"prompt": ""}] * count)
    return output["advantages"].numpy().reshape(REWARDS.shape)


@pytest.mark.parametrize(("kind", "scale"), [("grpo", "group"), ("dr_grpo", "none")])
def test_trl_computes_the_same_grpo_advantages(kind, scale):
    from trl.trainer.grpo_trainer import GRPOTrainer

    expected = trl_advantages(GRPOTrainer, beta=0.1, scale_rewards=scale)  # there the penalty is not in the reward
    np.testing.assert_allclose(advantages.group_advantages(REWARDS, kind=kind), expected, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_trl_computes_the_same_rloo_advantages_of_rewards_with_the_kl_penalty(beta):
    from trl.trainer.rloo_trainer import RLOOTrainer

    expected = trl_advantages(RLOOTrainer, beta=beta, normalize_advantages=False)
    rewards = advantages.kl_penalised(REWARDS, POLICY, REFERENCE, MASK, coefficient=beta, estimator="k1")
    found = advantages.group_advantages(rewards.sum(axis=-1, dtype=np.float64), kind="rloo")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_reward_stands_at_the_last_token_and_the_penalty_at_every_one(estimator):
    found = advantages.kl_penalised(REWARDS, POLICY, REFERENCE, MASK, coefficient=0.3, estimator=estimator)
    assert found.dtype == np.float32
    for index, length in np.ndenumerate(LENGTHS):
        pairs = zip(POLICY[index][:length], REFERENCE[index][:length], strict=True)
        expected = [-0.3 * reference.kl(p, q, estimator) for p, q in pairs]
        expected[-1] += REWARDS[index]
        np.testing.assert_allclose(found[index], expected + [0.0] * (5 - length), rtol=1e-6)


def test_a_response_without_tokens_gets_no_reward():
    zero = np.zeros((1, 2))
    found = advantages.kl_penalised(np.ones(1), zero, zero, zero > 0, coefficient=1.0, estimator="k1")
    np.testing.assert_array_equal(found, zero)
    with pytest.raises(ValueError, match="choose k1, k2 or k3"):
        advantages.kl_penalised(np.ones(1), zero, zero, zero > 0, coefficient=1.0, estimator="k5")


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.97, 1.0), (0.0, 0.5)])
def test_gae_is_the_sum_that_defines_it(gamma, lam):
    rewards = np.where(MASK, RNG.normal(0, 1, MASK.shape), 7.0)  # of VALUES nan stands there
    found, returns = advantages.gae(VALUES, rewards, MASK, gamma=gamma, lam=lam)
    assert found.dtype == returns.dtype == np.float32
    for index, length in np.ndenumerate(LENGTHS):
        values, given = VALUES[index][:length], rewards[index][:length]
        expected = reference.advantages(values, given, gamma=gamma, lam=lam)
        padding = [0.0] * (5 - length)
        np.testing.assert_allclose(found[index], expected + padding, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(returns[index], [*(values + expected), *padding], rtol=1e-5, atol=1e-6)


def test_gae_at_its_ends():
    """lam=1: the returns are the discounted rewards to come, whatever the values; lam=0: one step, then the values."""
    rewards = np.where(MASK, RNG.normal(0, 1, MASK.shape), 0.0)
    for values in (VALUES, 5 * VALUES):
        _, returns = advantages.gae(values, rewards, MASK, gamma=1.0, lam=1.0)
        to_come = np.cumsum(rewards[..., ::-1], axis=-1)[..., ::-1]
        np.testing.assert_allclose(returns, np.where(MASK, to_come, 0.0), rtol=1e-5, atol=1e-6)
    _, returns = advantages.gae(VALUES, rewards, MASK, gamma=0.5, lam=0.0)
    following = np.append(np.nan_to_num(VALUES)[..., 1:], np.zeros((2, 4, 1)), axis=-1)
    np.testing.assert_allclose(returns, np.where(MASK, rewards + 0.5 * following, 0.0), rtol=1e-5, atol=1e-6)


def test_a_value_head_that_is_right_leaves_no_advantage():
    values = np.where(MASK, REWARDS[..., None], 0.0)
    rewards = advantages.kl_penalised(REWARDS, POLICY, POLICY, MASK, coefficient=1.0, estimator="k3")
    found, returns = advantages.gae(values, rewards, MASK, gamma=1.0, lam=0.95)
    np.testing.assert_allclose(found, 0.0, atol=1e-6)
    np.testing.assert_allclose(returns, values, rtol=1e-6)


def test_whiten():
    found = advantages.whiten(VALUES, MASK)
    assert found.dtype == np.float32 and (found[~MASK] == 0).all()
    np.testing.assert_allclose(found[MASK].mean(), 0.0, atol=1e-6)
    np.testing.assert_allclose(found[MASK].std(ddof=1), 1.0, rtol=1e-6)
    scaled = advantages.whiten(VALUES, MASK, shift_mean=False)
    np.testing.assert_allclose(scaled[MASK] - found[MASK], VALUES[MASK].mean(), rtol=1e-5)
    assert (scaled[~MASK] == 0).all()
    # nothing to scale by: neither nan nor a huge value
    np.testing.assert_array_equal(advantages.whiten(np.full((2, 2), 3.0), np.ones((2, 2), bool)), np.zeros((2, 2)))
    np.testing.assert_array_equal(advantages.whiten(np.full((1, 2), 3.0), np.array([[True, False]])), [[0.0, 0.0]])


def test_whitening_is_done_in_float64():
    """Of rewards with a large mean float32 would keep two digits of the differences."""
    x = 1e6 + np.arange(4.0)[None] / 100
    np.testing.assert_allclose(
        advantages.whiten(x, np.ones((1, 4), bool)), (x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-8), rtol=1e-5
    )


# ---------------------------------------------------------------- the rest


def test_a_missing_eos_costs_the_penalty():
    found = advantages.missing_eos_penalty(REWARDS, LENGTHS > 2, penalty=0.75)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, REWARDS - 0.75 * (LENGTHS <= 2), rtol=1e-6)


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (60.0, 1.02), (0.0, 0.98), (-3.0, 0.98)],  # an estimate may be negative
)
def test_the_adaptive_coefficient_rises_above_the_target_and_falls_below_it(kl, factor):
    options = {"target": 6.0, "horizon": 2560}
    found = advantages.adaptive_kl(0.2, kl, 256, **options)
    np.testing.assert_allclose(found, 0.2 * factor, rtol=1e-12)
    assert type(found) is float


def test_the_adaptive_coefficient_finds_the_one_that_holds_the_target():
    """Where the KL is 3 / coefficient, a target of 6 asks for 0.5."""
    coefficient = 0.05
    for _ in range(400):
        coefficient = advantages.adaptive_kl(coefficient, 3 / coefficient, 100, target=6.0, horizon=500)
    # more responses than the horizon: a fifth, and never a penalty that turns into a bonus
    assert advantages.adaptive_kl(0.05, 0.0, 48, target=6.0, horizon=9) == pytest.approx(0.04)
    assert advantages.adaptive_kl(0.05, 99.0, 48, target=6.0, horizon=9) == pytest.approx(0.06)
    np.testing.assert_allclose(coefficient, 0.5, rtol=1e-3)


def test_the_examples_in_the_docstrings_hold():
    failed, attempted = doctest.testmod(advantages)
    assert attempted > 0 and failed == 0
