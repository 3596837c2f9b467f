"""algorithms/ple.py from labels to the loss and its gradient, against the oracle; and core/batches.py."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch

from configs.default import get_config
from ple_jax import algorithms
from ple_jax.algorithms import Context, ple
from ple_jax.core.batches import pack
from ple_jax.core.errors import UserError
from ple_jax.core.types import Batch, Outputs, Response, Rollout, Slot
from ple_jax.training.measures import mean_length

LENGTHS = [(3, 5), (1, 2), (6, 6), (4, 1), (2, 2), (5, 3)]
# principled clearly better, slightly better, equal, clearly worse, just at tau = 0.25, better by a lot
REWARDS = [(0.0, 0.5), (0.1, 0.2), (0.4, 0.4), (0.9, -0.6), (0.0, 0.25), (-1.0, 1.0)]
TAU = 0.25
MEAN = 3.5  # tokens, of an earlier sample
RANKED = {"threshold": [0, 5], "symmetric": [0, 3, 5]}


def settings(**options):
    config = get_config()
    config.sampling.max_new_tokens = 8
    config.sampling.bucket = 4
    config.algorithm_kwargs = options.pop("algorithm_kwargs", {})
    config.ple.update(options)
    return config


def response(n: int, score: float, kind: str = "plain", first: int = 10, sample: int = 0) -> Response:
    return Response(tuple(range(first, first + n)), True, kind, sample, "", score, score)


def make_rollouts() -> list[Rollout]:
    return [
        Rollout(f"q{i}", "x", tuple(range(1, 2 + i)), (response(a, r), response(b, s, "principled", 30)))
        for i, ((a, b), (r, s)) in enumerate(zip(LENGTHS, REWARDS, strict=True))
    ]


def token_logprobs(batch: Batch, seed: int) -> np.ndarray:
    """Log-probabilities that depend on the token alone, so that reordering responses reorders them."""
    table = -np.random.default_rng(seed).exponential(1.0, 64)
    # rows of one query differ: else every pair would rank the same way
    rows = 1 + 0.3 * np.arange(len(batch.response))[:, None, None]
    return np.where(batch.response_mask, table[batch.response] * rows, 0.0)


def as_pairs(rollouts: list[Rollout], seed: int) -> list[list[list[float]]]:
    table = -np.random.default_rng(seed).exponential(1.0, 64)
    return [[[table[t] * (1 + 0.3 * i) for t in r.tokens] for r in x.responses] for i, x in enumerate(rollouts)]


def test_collect_asks_for_one_response_of_each_kind():
    assert ple.collect(settings()) == (Slot("plain", False), Slot("principled", True))
    percentile = ple.collect(settings(selection="percentile", samples=3))
    assert percentile == (Slot("plain", False, 0), Slot("plain", False, 1), Slot("plain", False, 2))


def test_schedule_reads_the_config():
    config = settings(tau_0=0.4, alpha=0.5)
    assert [ple.schedule(config)(i) for i in range(3)] == [0.4, 0.2, 0.1]
    config.iterations = 4
    config.ple.schedule = "linear"
    assert ple.schedule(config)(1) == pytest.approx(0.3)


@pytest.mark.parametrize("selection", RANKED)
def test_labels(selection):
    labelled = ple.label(make_rollouts(), Context(settings(selection=selection, blend_temperature=0.5), 0, TAU))
    assert [i for i, r in enumerate(labelled) if r.decision == "ranked"] == RANKED[selection]
    for rollout, rewards in zip(labelled, REWARDS, strict=True):
        assert rollout.tau == TAU
        assert rollout.margin == rewards[1] - rewards[0]
        weights = [r.weight for r in rollout.responses]
        if rollout.decision == "ranked":
            assert weights == [0.0, 0.0]
        else:
            assert rollout.decision == "blended"
            assert weights == pytest.approx(reference.blend_weights(rewards, blend="softmax", temperature=0.5))
    for before, after in zip(make_rollouts(), labelled, strict=True):  # nothing else has changed
        untouched = [r._replace(weight=0.0) for r in before.responses]
        assert [r._replace(weight=0.0) for r in after.responses] == untouched
        assert after[:3] == before[:3]


def test_labels_go_by_the_transformed_rewards():
    rollout = Rollout("q", "x", (1,), (response(1, 0.0)._replace(reward=9.0), response(1, 1.0)._replace(reward=-9.0)))
    (labelled,) = ple.label([rollout], Context(settings(), 0, 0.2))
    assert (labelled.decision, labelled.margin) == ("ranked", 1.0)
    assert [r.reward for r in labelled.responses] == [9.0, -9.0]


def test_an_infinite_threshold_blends_every_pair():
    assert {r.decision for r in ple.label(make_rollouts(), Context(settings(), 0, math.inf))} == {"blended"}


def test_a_batch_holds_the_tokens_as_they_were_sampled():
    config = settings()
    labelled = ple.label(make_rollouts(), Context(config, 0, TAU))
    batch = ple.batch(labelled, Context(config, mean_length=MEAN))
    assert batch.prompt.shape == (6, 8) and batch.response.shape == (
        6,
        2,
        8,
    )  # the longest prompt has 6 tokens: bucket 8
    assert (batch.prompt.dtype, batch.response.dtype) == (np.int32, np.int32)
    assert batch.prompt[1].tolist() == [0, 0, 0, 0, 0, 0, 1, 2]
    assert batch.prompt_mask[1].tolist() == [False] * 6 + [True] * 2
    assert batch.response[0].tolist() == [[10, 11, 12, 0, 0, 0, 0, 0], [30, 31, 32, 33, 34, 0, 0, 0]]
    assert batch.response_mask.sum(axis=-1).tolist() == [list(pair) for pair in LENGTHS]
    assert {name: x.dtype for name, x in batch.data.items()} == dict.fromkeys(batch.data, np.dtype(np.float32))
    assert batch.data["ranked"].tolist() == [1, 0, 0, 0, 0, 1]
    assert batch.data["valid"].tolist() == [1] * 6
    assert batch.data["normaliser"].tolist() == [MEAN] * 6  # and not the 40 / 12 of this batch
    assert batch.data["swapped"].tolist() == [0] * 6


def test_symmetric_puts_the_loser_first():
    config = settings(selection="symmetric")
    batch = ple.batch(ple.label(make_rollouts(), Context(config, 0, TAU)), Context(config, mean_length=MEAN))
    assert batch.response[:, 0, 0].tolist() == [10, 10, 10, 30, 10, 10]
    assert batch.response[:, 1, 0].tolist() == [30, 30, 30, 10, 30, 30]
    assert batch.data["swapped"].tolist() == [0, 0, 0, 1, 0, 0]
    outputs = Outputs(token_logprobs(batch, 0))
    _, metrics = ple.make_loss(config)(outputs, batch)
    pairs = as_pairs(make_rollouts(), 0)
    np.testing.assert_allclose(metrics["lp_plain"], [reference.meanlp(p[0]) for p in pairs])
    np.testing.assert_allclose(metrics["lp_principled"], [reference.meanlp(p[1]) for p in pairs])


CASES = {
    "default": {},
    "margin": {"rank_margin": 0.7},
    "hinge_prob": {"rank": "hinge_prob"},
    "sigmoid": {"rank": "sigmoid", "rank_beta": 2.0},
    "dpo": {"rank": "dpo", "rank_beta": 0.1},
    "rank_sft": {"rank": "sigmoid", "rank_sft_weight": 0.3, "rank_weight": 0.5},
    "symmetric": {"selection": "symmetric", "rank": "sigmoid", "rank_sft_weight": 1.0},
    "symmetric_dpo": {"selection": "symmetric", "rank": "dpo"},
    "without_ranking": {"rank_weight": 0.0},
    "without_blend": {"rank": "sigmoid", "blend_weight": 0.0},
    "sigmoid_weights": {"blend": "sigmoid", "blend_temperature": 0.5, "blend_weight": 0.7},
    "uniform": {"blend": "uniform"},
    "best": {"blend": "best"},
    "response_length": {"length_norm": "response", "rank_sft_weight": 1.0},
    "kl": {"kl_weight": 0.3},
    "kl_symmetric": {"kl_weight": 0.5, "selection": "symmetric", "rank": "dpo", "length_norm": "response"},
}
ORACLE_NAMES = {"rank_margin": "margin", "rank_beta": "beta", "blend_temperature": "temperature"}


def convert(batch: Batch, array) -> Batch:
    return Batch(*(array(x) for x in batch[:4]), {name: array(x) for name, x in batch.data.items()})


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_oracle_in_all_three_libraries(name):
    config = settings(**CASES[name])
    rollouts = make_rollouts()
    batch = ple.batch(ple.label(rollouts, Context(config, 0, TAU)), Context(config, mean_length=MEAN))
    logprobs = token_logprobs(batch, 0)
    assert ple.needs(config).reference == (config.ple.rank == "dpo" or config.ple.kl_weight > 0)
    if ple.needs(config).reference:
        batch.data["reference_logprobs"] = token_logprobs(batch, 1).astype(np.float32)
    options = {ORACLE_NAMES.get(k, k): v for k, v in CASES[name].items()}
    pairs = as_pairs(rollouts, 0)
    expected = reference.batch_loss(pairs, REWARDS, tau=TAU, mean_length=MEAN, references=as_pairs(rollouts, 1), **options)

    def oracle(x: np.ndarray) -> float:
        shifted = [
            [list(x[i, 1 - j if batch.data["swapped"][i] else j, : len(r)]) for j, r in enumerate(pair)]
            for i, pair in enumerate(pairs)
        ]
        return reference.batch_loss(shifted, REWARDS, tau=TAU, mean_length=MEAN, references=as_pairs(rollouts, 1), **options)

    slope = reference.gradient(oracle, logprobs)
    loss = ple.make_loss(config)

    np.testing.assert_allclose(np.mean(loss(Outputs(logprobs), batch)[0]), expected, rtol=1e-6)

    def mean(x, batch):
        value, _ = loss(Outputs(x), batch)
        return (value * batch.data["valid"]).sum() / batch.data["valid"].sum()

    x, on_jax = jnp.asarray(logprobs, jnp.float32), convert(batch, jnp.asarray)
    for wrap in (lambda f: f, jax.jit):
        value, gradient = wrap(jax.value_and_grad(mean))(x, on_jax)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)

    y = torch.tensor(logprobs, requires_grad=True)
    value = mean(y, convert(batch, torch.tensor))
    value.backward()
    np.testing.assert_allclose(value.item(), expected, rtol=1e-6)
    np.testing.assert_allclose(y.grad, slope, rtol=1e-5, atol=1e-8)


def test_ablations_leave_out_what_they_say():
    pairs, rewards = as_pairs(make_rollouts(), 0), REWARDS
    config = settings(rank_weight=0.0)
    batch = ple.batch(ple.label(make_rollouts(), Context(config, 0, TAU)), Context(config, mean_length=MEAN))
    value, _ = ple.make_loss(config)(Outputs(token_logprobs(batch, 0)), batch)
    assert (value[[0, 5]] == 0).all() and (value[1:5] > 0).all()
    everything = settings(rank_weight=0.0, tau_0=math.inf)
    batch = ple.batch(ple.label(make_rollouts(), Context(everything, 0, math.inf)), Context(everything, mean_length=MEAN))
    value, _ = ple.make_loss(everything)(Outputs(token_logprobs(batch, 0)), batch)
    assert value.mean() == pytest.approx(reference.batch_loss(pairs, rewards, tau=math.inf, mean_length=MEAN), rel=1e-6)


def test_metrics():
    config = settings(rank_margin=0.2)
    rollouts = ple.label(make_rollouts(), Context(config, 0, TAU))
    batch = ple.batch(rollouts, Context(config, mean_length=MEAN))
    logprobs = np.where(batch.response_mask, -1.0, 0.0)
    logprobs[5, 1] *= 0.5  # the winner of query 5 leads by 0.5 nats a token, that of query 0 by nothing
    value, metrics = ple.make_loss(config)(Outputs(logprobs), batch)
    assert metrics["ranked"].tolist() == [1, 0, 0, 0, 0, 1]
    assert metrics["hinge_active"].tolist() == [1, 0, 0, 0, 0, 0]
    assert metrics["lp_plain"].tolist() == [-1.0] * 6
    assert metrics["lp_principled"].tolist() == [-1.0] * 5 + [-0.5]
    np.testing.assert_allclose(metrics["rank_loss"], [0.2, 0, 0, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(value, metrics["rank_loss"] + metrics["blend_loss"])
    config.ple.rank = "hinge_prob"  # which has no margin
    _, metrics = ple.make_loss(config)(Outputs(logprobs), batch)
    assert metrics["hinge_active"].tolist() == [0] * 6


def test_what_is_measured_before_and_after_the_update():
    both = {"ranked": np.array([1.0, 1, 1, 0])}
    before, after = (
        {**both, "hinge_active": np.array(active), "lp_plain": np.full(4, plain), "lp_principled": np.full(4, other)}
        for active, plain, other in (([1.0, 1, 0, 0], -1.0, -2.0), ([1.0, 0, 0, 0], -3.0, -4.0))
    )
    found = ple.measures({"loss": 2.0, "hinge_active": 9.0, "lp_plain": 9.0, "lp_principled": 9.0}, before, after)
    assert found == pytest.approx(
        {"loss": 2.0, "lp_plain": -3.0, "lp_principled": -4.0, "hinge_active_before": 2 / 3, "hinge_active_after": 1 / 3}
    )


@pytest.mark.parametrize("case", ["default", "dpo", "response_length", "kl"])
def test_rows_that_only_fill_the_shape_change_nothing(case):
    config = settings(**CASES[case])
    batch = ple.batch(ple.label(make_rollouts(), Context(config, 0, TAU)), Context(config, mean_length=MEAN))
    batch.data["reference_logprobs"] = token_logprobs(batch, 1).astype(np.float32)
    filled = convert(batch, lambda x: jnp.asarray(np.concatenate([x, np.zeros_like(x[:2])])))
    batch = convert(batch, jnp.asarray)
    loss = ple.make_loss(config)

    def total(x, batch):
        return (loss(Outputs(x), batch)[0] * batch.data["valid"]).sum()

    x = jnp.asarray(token_logprobs(batch, 0), jnp.float32)
    padded = jnp.concatenate([x, jnp.zeros_like(x[:2])])
    value, gradient = jax.value_and_grad(total)(x, batch)
    value_filled, gradient_filled = jax.value_and_grad(total)(padded, filled)
    np.testing.assert_allclose(value_filled, value, rtol=1e-6)
    np.testing.assert_allclose(gradient_filled[:6], gradient, rtol=1e-6)
    np.testing.assert_array_equal(gradient_filled[6:], 0)


# ---------------------------------------------------------------- several principled responses


def several() -> list[Rollout]:
    """The best principled one is the second, the first of two equals, and a worse one than the plain one."""

    def guided(n: int, score: float, first: int, sample: int) -> Response:
        return response(n, score, "principled", first, sample)._replace(principled=True)

    rows = [(0.0, 0.1, 0.9, 0.2), (0.3, 0.4, 0.4, 0.1), (0.8, -0.9, -0.5, -0.7)]
    return [
        Rollout(
            f"q{i}", "x", (1,),
            (response(2, row[0]), *(guided(3 + j, s, 20 + 10 * j, j) for j, s in enumerate(row[1:]))),
        )
        for i, row in enumerate(rows)
    ]  # fmt: skip


@pytest.mark.parametrize("selection", ["threshold", "symmetric"])
def test_the_best_of_several_principled_responses_stands_for_all(selection):
    config = settings(candidates=3, selection=selection)
    assert [(s.kind, s.sample) for s in ple.collect(config)] == [
        ("plain", 0), ("principled", 0), ("principled", 1), ("principled", 2),
    ]  # fmt: skip
    labelled, context = ple.label(several(), Context(config, 0, TAU)), Context(config, mean_length=MEAN)
    assert [r.margin for r in labelled] == pytest.approx([0.9, 0.1, -1.3])
    symmetric = selection == "symmetric"
    assert [r.decision for r in labelled] == ["ranked", "blended", "ranked" if symmetric else "blended"]
    pair = reference.blend_weights((0.3, 0.4), blend="softmax", temperature=1.0)
    assert [r.weight for r in labelled[1].responses] == pytest.approx([pair[0], pair[1], 0.0, 0.0])
    batch, best = ple.batch(labelled, context), [1, 0, 1]
    # the pair is that of a run which sampled no others
    alone = [r._replace(responses=(r.responses[0], r.responses[1 + b])) for r, b in zip(several(), best, strict=True)]
    one = settings(selection=selection)
    expected = ple.batch(ple.label(alone, Context(one, 0, TAU)), Context(one, mean_length=MEAN))
    for ours, theirs in zip(batch[:4], expected[:4], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for name, value in expected.data.items():
        np.testing.assert_array_equal(batch.data[name], value)
    assert [len(ple.learned(r, config)) for r in several()] == [2, 2, 2]
    assert [ple.learned(r, config)[1].sample for r in several()] == best


def test_what_would_be_learned_is_chosen_by_the_scores_that_training_chooses_by():
    """A penalty of the length makes another candidate the best than the one with the highest reward."""
    config = settings(candidates=2)
    (given,) = [r._replace(responses=r.responses[:3]) for r in several()[:1]]
    rewarded = [r._replace(reward=reward) for r, reward in zip(given.responses, (1.0, 2.0, 1.8), strict=True)]
    scored = [r._replace(score=score) for r, score in zip(rewarded, (0.8, 0.0, 1.56), strict=True)]
    (labelled,) = ple.label([given._replace(responses=tuple(scored))], Context(config, 0, TAU))
    assert labelled.margin == pytest.approx(0.76) and labelled.decision == "ranked"
    assert ple.learned(labelled, config) == [labelled.responses[0], labelled.responses[2]]
    more = [r._replace(score=math.nan) for r in (rewarded[0], rewarded[0], *rewarded)]  # an evaluation of three samples
    assert ple.learned(given._replace(responses=tuple(more)), config) == [more[0], more[3]]
    unscored = given._replace(responses=tuple(r._replace(score=math.nan) for r in rewarded))  # as held-out queries are
    assert ple.learned(unscored, config) == [unscored.responses[0], unscored.responses[1]]


# ---------------------------------------------------------------- percentile


def percentile_rollouts() -> list[Rollout]:
    scores = [(1.0, 3.0, 2.0), (5.0, 0.0, 4.0), (2.0, 2.0, 2.0), (0.0, 0.5, 1.0)]
    return [
        Rollout(f"q{i}", "x", (1,), tuple(response(1 + j, s, first=10 * (j + 1), sample=j) for j, s in enumerate(row)))
        for i, row in enumerate(scores)
    ]


@pytest.mark.parametrize("how", ["as_intended", "as_released"])
def test_percentile_ranks_the_best_over_the_worst(how):
    config = settings(selection="percentile", rank="dpo", rank_beta=0.5, percentile=(0.1, 0.4), percentile_weights=how)
    labelled = ple.label(percentile_rollouts(), Context(config, 7, 0.2))  # after the last: floor(0.4 * 3) = 1
    assert [r.decision for r in labelled] == ["ranked", "ranked", "dropped", "ranked"]
    assert [r.margin for r in labelled] == [2.0, 5.0, 0.0, 1.0]
    weights = [1 / (1 + math.exp(-0.2)), 1.0, 0.0, 1 / (1 + math.exp(-0.1))]
    best = [1, 0, 0, 2]
    for rollout, w, b in zip(labelled, weights, best, strict=True):
        assert [r.weight for r in rollout.responses] == pytest.approx([w if j == b else 0.0 for j in range(3)])

    batch = ple.batch(labelled, Context(config, mean_length=MEAN))
    assert batch.response[[0, 1, 3], 0, 0].tolist() == [10, 20, 10]  # the worst
    assert batch.response[[0, 1, 3], 1, 0].tolist() == [20, 10, 30]  # the best
    logprobs, ref = token_logprobs(batch, 0), token_logprobs(batch, 1)
    batch.data["reference_logprobs"] = ref
    value, metrics = ple.make_loss(config)(Outputs(logprobs), batch)
    pairs = [0, 1, 3]
    losses = [
        reference.rank_loss(
            [list(logprobs[i, j][batch.response_mask[i, j]]) for j in (0, 1)],
            rank="dpo",
            margin=0.0,
            beta=0.5,
            reference=[list(ref[i, j][batch.response_mask[i, j]]) for j in (0, 1)],
        )
        for i in pairs
    ]
    w = [weights[i] if how == "as_intended" else 1.0 for i in pairs]
    assert value.mean() == pytest.approx(sum(a * b for a, b in zip(w, losses, strict=True)) / sum(w), rel=1e-6)
    assert value[2] == 0 and not metrics["blend_loss"].any()

    config.ple.update(rank_weight=0.5, rank_sft_weight=2.0)  # the pair's weight covers its likelihood term too
    value, _ = ple.make_loss(config)(Outputs(logprobs), batch)
    losses = [0.5 * (a - 2 * logprobs[i, 1].sum() / MEAN) for i, a in zip(pairs, losses, strict=True)]
    assert value.mean() == pytest.approx(sum(a * b for a, b in zip(w, losses, strict=True)) / sum(w), rel=1e-6)


def test_percentile_shares_follow_the_iterations():
    config = settings(selection="percentile", percentile=(0.1, 0.4, 1.0))
    ones = [[r.responses for r in ple.label(percentile_rollouts(), Context(config, i, 0.2))] for i in range(4)]
    assert [sum(x.weight == 1.0 for row in rows for x in row) for rows in ones] == [0, 1, 3, 3]


def test_a_batch_whose_pairs_were_all_dropped_has_no_gradient():
    config = settings(selection="percentile")
    dropped = ple.label([percentile_rollouts()[2]], Context(config, 0, 0.2))
    batch = ple.batch(dropped, Context(config, mean_length=MEAN))
    assert ple.make_loss(config)(Outputs(token_logprobs(batch, 0)), batch)[0].tolist() == [0.0]


# ---------------------------------------------------------------- what length normalisation does


THETA = np.array([-0.5, 0.3, -0.2, 0.8], np.float32)
OUTCOMES = np.array([1, 2, 3, 4, 4])  # lengths in tokens of all responses that there are; the last one is cut off


def expected_gradient(normaliser: Callable[[np.ndarray, np.ndarray], np.ndarray], **options) -> np.ndarray:
    """Exact expectation, over a policy's own samples, of the gradient of the uniformly blended loss.

    The policy stops after token t with probability sigmoid(theta_t), and is cut off after 4 tokens: 5 responses, 25
    pairs, drawn in one iteration and independently in the next one: 625 rows.

    Args:
        normaliser: from the pairs of lengths of the earlier iteration and of this one [625, 2] to what divides [625].
    """
    stops = np.array([True, True, True, True, False])
    mask = np.arange(4) < OUTCOMES[:, None]
    last = (np.arange(4) == OUTCOMES[:, None] - 1) & stops[:, None]
    drawn = np.stack(np.unravel_index(np.arange(625), (5, 5, 5, 5)), 1)  # earlier two, these two
    earlier, now = drawn[:, :2], drawn[:, 2:]

    config = settings(blend="uniform", **options)
    data = {
        "ranked": np.zeros(625),
        "weights": np.full((625, 2), 0.5),
        "pair_weights": np.ones(625),
        "normaliser": normaliser(OUTCOMES[earlier], OUTCOMES[now]),
        "swapped": np.zeros(625),
        "valid": enumerated_probabilities(THETA)[drawn].prod(1),  # an expectation instead of a mean
    }
    empty = jnp.zeros((625, 1), jnp.int32)
    batch = Batch(empty, empty, empty, jnp.asarray(mask[now]), {k: jnp.asarray(v, jnp.float32) for k, v in data.items()})
    loss = ple.make_loss(config)

    def total(theta):
        stop, go = jax.nn.log_sigmoid(theta)[None], jax.nn.log_sigmoid(-theta)[None]
        logprobs = jnp.where(mask, jnp.where(last, stop, go), 0.0)
        value, _ = loss(Outputs(logprobs[now]), batch)
        return (value * batch.data["valid"]).sum()

    return np.asarray(jax.jit(jax.grad(total))(jnp.asarray(THETA)))


def of_the_loop(earlier: np.ndarray, now: np.ndarray) -> np.ndarray:
    """What the loop hands to `ple.batch` after an iteration of this one pair."""
    run = type("Run", (), {"algorithm": algorithms.load("ple"), "config": settings()})()
    pairs = [(response(a, 0.0), response(b, 0.0, "principled")) for a, b in earlier.tolist()]
    return np.array([mean_length([Rollout("q", "x", (1,), pair)], run) for pair in pairs])


def enumerated_probabilities(theta: np.ndarray) -> np.ndarray:
    stop = 1 / (1 + np.exp(-np.asarray(theta, np.float64)))
    alive = np.concatenate([[1.0], np.cumprod(1 - stop)])
    return np.array([*(alive[:4] * stop), alive[4]])


def test_uniform_weights_on_own_samples_have_no_expected_gradient():
    np.testing.assert_allclose(expected_gradient(of_the_loop), 0.0, atol=1e-6)


def test_the_mean_length_of_the_very_batch_shortens_responses():
    """E[grad] = -grad E[length] (E[1 / mean] - 1 / E[mean]) and what else correlates: why C is of an earlier sample."""
    gradient = expected_gradient(lambda earlier, now: now.mean(1))
    assert gradient[0] < -0.01  # the logit of stopping after one token goes up


def test_normalising_each_response_by_its_own_length_shortens_responses():
    gradient = expected_gradient(lambda earlier, now: np.ones(len(now)), length_norm="response")
    inverse_length = np.array([1, 1 / 2, 1 / 3, 1 / 4, 1 / 4])
    lean = reference.gradient(lambda t: enumerated_probabilities(t) @ inverse_length, THETA.astype(np.float64))
    np.testing.assert_allclose(gradient, -lean, rtol=1e-4, atol=1e-6)  # descending the loss raises E[1 / length]
    assert gradient[0] < -0.05


# ---------------------------------------------------------------- errors, packing, variants


def test_a_context_without_an_earlier_sample_is_refused_where_one_is_needed():
    labelled = ple.label(make_rollouts(), Context(settings(), 0, TAU))
    with pytest.raises(UserError, match=r"the context's mean_length is nan: give .* Context\(config, mean_length="):
        ple.batch(labelled, Context(settings()))
    config = settings(length_norm="response")
    assert ple.batch(labelled, Context(config)).data["normaliser"].tolist() == [1.0] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "topk"}, "ple.selection = 'topk': choose threshold, symmetric or percentile"),
        ({"blend": "mean"}, "ple.blend = 'mean': choose"),
        ({"length_norm": "token"}, "ple.length_norm = 'token': choose mean or response"),
        ({"rank": "ipo"}, "ple.rank = 'ipo': choose hinge, hinge_prob, sigmoid or dpo"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(options, message):
    config = settings(**options)
    with pytest.raises(UserError, match=message):
        ple.batch(ple.label(make_rollouts(), Context(config, 0, TAU)), Context(config, mean_length=MEAN))
        ple.make_loss(config)


@pytest.mark.parametrize("n", [0, 9])
def test_a_response_that_is_empty_or_too_long_is_an_error_that_names_the_query(n):
    rollout = Rollout("imdb-17", "x", (1,), (response(2, 0.0), response(n, 1.0)))
    with pytest.raises(UserError, match=f"query 'imdb-17': response 1 has {n} tokens, where 1 to 8 are needed"):
        pack([rollout], [(0, 1)], prompt_multiple=4, response_len=8)


def test_pack_takes_any_number_of_responses_in_the_order_asked_for():
    rollouts = percentile_rollouts()[:2]
    one = pack(rollouts, [(2,), (0,)], prompt_multiple=16, response_len=4)
    assert one.prompt.shape == (2, 16)
    assert one.response.tolist() == [[[30, 31, 32, 0]], [[10, 0, 0, 0]]]
    three = pack(rollouts, [(2, 0, 1)] * 2, prompt_multiple=16, response_len=3)
    assert three.response[0].tolist() == [[30, 31, 32], [10, 0, 0], [20, 21, 0]]
    assert three.response_mask[0].sum(axis=-1).tolist() == [3, 1, 2]
    exact = pack([Rollout("q", "x", (5,) * 16, (response(1, 0.0),))], [(0,)], prompt_multiple=16, response_len=1)
    assert exact.prompt_mask.all()


def test_a_variant_is_one_short_file():
    path = Path(__file__).parents[1] / "variants" / "focal.py"
    assert len(path.read_text().splitlines()) < 30
    spec = importlib.util.spec_from_file_location("focal", path)
    focal = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(focal)
    assert (focal.collect, focal.batch) == (ple.collect, ple.batch)

    config = settings(rank="sigmoid", rank_weight=0.5, algorithm_kwargs={"gamma": 2.0})
    batch = focal.batch(focal.label(make_rollouts(), Context(config, 0, TAU)), Context(config, mean_length=MEAN))
    logprobs = token_logprobs(batch, 0)
    value, metrics = jax.jit(focal.make_loss(config))(
        Outputs(jnp.asarray(logprobs, jnp.float32)), convert(batch, jnp.asarray)
    )
    plain, _ = ple.make_loss(config)(Outputs(logprobs), batch)
    for i, pair in enumerate(as_pairs(make_rollouts(), 0)):
        p = 1 / (1 + math.exp(reference.meanlp(pair[0]) - reference.meanlp(pair[1])))
        expected = 0.5 * (1 - p) ** 2 * -math.log(p) if i in (0, 5) else plain[i]
        assert float(value[i]) == pytest.approx(expected, rel=1e-5)
