"""PPO: what is rewarded, what the head of values learns, and that it stays out of what is exported."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_model
import test_train
import tiny
import torch
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file
from test_baselines import LENGTHS, SCORES, config, labelled, outputs, rollouts
from test_families import jit
from test_torch_train import assert_gradients, backend, first_gradients

from ple_jax import modes
from ple_jax.algorithms import Context
from ple_jax.backend import forward as jax_forward
from ple_jax.backend import lora as jax_lora
from ple_jax.core.packing import pack
from ple_jax.models import adapters
from torch_ascend import lora


def ready(c, carried=None, seed: int = 3):
    module, rows = labelled("ppo", c, rollouts(c.ppo.samples))
    batch = module.batch(rows, Context(c))
    batch.data.update(old_logprobs=outputs(batch).logprobs, reference_logprobs=outputs(batch, 1).logprobs)
    values = np.random.default_rng(seed).normal(size=batch.response.shape)
    batch.data["old_values"] = np.where(batch.response_mask, values, 0.0)
    return module, module.prepare(batch, Context(c, controller=carried or module.controller(c)))


def advantages_by_hand(batch, i: int, k: int, *, beta: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """GAE of one response as its definition says it: sums over all later tokens."""
    n, data = LENGTHS[i][k], batch.data
    gap = (data["old_logprobs"] - data["reference_logprobs"])[i, k, :n].astype(float)
    rewards = -beta * gap
    rewards[-1] += SCORES[i][k]
    values = np.append(data["old_values"][i, k, :n], 0.0)
    delta = rewards + values[1:] - values[:-1]
    advantages = np.array([sum(lam ** (later - t) * delta[later] for later in range(t, n)) for t in range(n)])
    return advantages, advantages + values[:-1]


def test_advantages_and_returns_by_hand():
    c = config("ppo", ppo__samples=2, ppo__kl_coefficient=0.3, ppo__lam=0.8, ppo__whiten_advantages=False)
    _, batch = ready(c)
    for i in range(3):
        for k in range(2):
            advantages, returns = advantages_by_hand(batch, i, k, beta=0.3, lam=0.8)
            n = LENGTHS[i][k]
            np.testing.assert_allclose(batch.data["advantages"][i, k, :n], advantages, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(batch.data["returns"][i, k, :n], returns, rtol=1e-5, atol=1e-6)
            assert not batch.data["advantages"][i, k, n:].any()
    gap = (batch.data["old_logprobs"] - batch.data["reference_logprobs"]).sum(-1)
    np.testing.assert_allclose(batch.data["kl_response"], gap, rtol=1e-5)


def test_every_knob_of_the_advantages_is_read():
    c = config(
        "ppo", ppo__samples=2, ppo__gamma=0.5, ppo__lam=0.8, ppo__kl_coefficient=0.3, ppo__kl_estimator="k3",
        ppo__whiten_rewards=True, ppo__whiten_advantages=False,
    )  # fmt: skip
    _, batch = ready(c)
    data, mask = batch.data, batch.response_mask
    gap = np.where(mask, data["old_logprobs"] - data["reference_logprobs"], 0.0)
    rewards = -0.3 * (np.exp(-gap) - 1 + gap)
    for i, k in np.ndindex(3, 2):
        rewards[i, k, LENGTHS[i][k] - 1] += SCORES[i][k]
    real = rewards[mask]
    rewards = (rewards - real.mean()) / np.sqrt(real.var(ddof=1) + 1e-8) + real.mean()
    for i, k in np.ndindex(3, 2):
        n = LENGTHS[i][k]
        wanted = reference.advantages(data["old_values"][i, k, :n], rewards[i, k, :n], gamma=0.5, lam=0.8)
        np.testing.assert_allclose(data["advantages"][i, k, :n], wanted, rtol=1e-4, atol=1e-5)


def test_whitening_is_over_the_optimiser_batch():
    c = config("ppo", ppo__samples=2)
    _, batch = ready(c)
    real = batch.data["advantages"][batch.response_mask]
    assert real.mean() == pytest.approx(0, abs=1e-6) and real.std(ddof=1) == pytest.approx(1, rel=1e-5)


def test_a_response_that_was_cut_off_pays():
    c = config("ppo", ppo__whiten_advantages=False, ppo__missing_eos_penalty=2.0)
    module, rows = labelled("ppo", c, rollouts(1))
    cut = [row._replace(responses=(row.responses[0]._replace(finished=i != 1),)) for i, row in enumerate(rows)]
    found = []
    for given in (rows, cut):
        batch = module.batch(given, Context(c))
        zeros = np.zeros(batch.response.shape)
        batch.data.update(old_logprobs=zeros, reference_logprobs=zeros, old_values=zeros)
        found.append(module.prepare(batch, Context(c, controller=module.controller(c))).data["returns"][:, 0])
    last = [length[0] - 1 for length in LENGTHS]
    assert [(b - a)[n] for a, b, n in zip(*found, last, strict=True)] == [0, -2, 0]


def test_the_coefficient_goes_on_from_the_last_iteration():
    c = config("ppo", ppo__samples=2, ppo__kl="adaptive", ppo__kl_target=2.0, ppo__kl_horizon=80)
    module, batch = ready(c)
    assert set(batch.data["kl_coefficient"]) == {np.float32(0.05)}
    far, near = (module.control({"kl_coefficient": 0.4}, {"kl_response": kl}, c) for kl in (9.0, 1.9))
    # two responses to eight queries of a horizon of 80, an error that is cut at a fifth: up by 4%; and by -5% of a fifth
    assert far["kl_coefficient"] == pytest.approx(0.4 * 1.04)
    assert near["kl_coefficient"] == pytest.approx(0.4 * (1 - 0.05 / 5))
    assert ready(c, far)[1].data["kl_coefficient"][0] == np.float32(far["kl_coefficient"])
    c.ppo.kl = "fixed"
    assert module.control({"kl_coefficient": 0.05}, {"kl_response": 9.0}, c) == {"kl_coefficient": 0.05}


def test_the_loss_at_the_first_step():
    """The ratio is one: the policy's part is the mean advantage, the head's half the squared error of its return."""
    c = config("ppo", ppo__samples=2, ppo__value_weight=0.7)
    module, batch = ready(c)
    found = outputs(batch)._replace(values=batch.data["old_values"])
    value, metrics = module.make_loss(c)(found, batch)
    mask, tokens = batch.response_mask, batch.response_mask.sum()
    error = np.where(mask, batch.data["old_values"] - batch.data["returns"], 0.0)
    expected = -batch.data["advantages"][mask].sum() / tokens + 0.7 * (error**2).sum() / 2 / tokens
    assert value.mean() == pytest.approx(expected, rel=1e-5)
    assert metrics["value_loss"].mean() == pytest.approx((error**2).sum() / 2 / tokens, rel=1e-5)
    assert not metrics["clipped"].any() and not metrics["value_clipped"].any()


def test_the_ratio_is_clipped_where_ppo_clip_says():
    c = config("ppo", ppo__samples=2, ppo__clip=0.1, ppo__value_weight=0.0)
    module, batch = ready(c)
    batch.data["advantages"] = np.where(batch.response_mask, 1.0, 0.0)
    moved = outputs(batch)
    moved = moved._replace(
        logprobs=batch.data["old_logprobs"] + np.where(batch.response_mask, 1.0, 0.0), values=batch.data["old_values"]
    )
    value, metrics = module.make_loss(c)(moved, batch)
    assert value.mean() == pytest.approx(-1.1, rel=1e-5) and (metrics["clipped"] == 1).all()


def value_head() -> adapters.Adapter:
    return {adapters.VALUE: {"w": np.random.default_rng(5).normal(size=(32, 1)).astype(np.float32)}}


def on_device(batch):
    """With tokens of the tiny model."""
    return batch._replace(response=np.where(batch.response_mask, batch.response % 101, 0).astype(np.int32))


def test_gradients_of_policy_and_head_are_the_same_in_both_backends():
    c = config("ppo", ppo__samples=2)
    module, batch = ready(c)
    batch, loss = on_device(batch), module.make_loss(c)
    adapter = tiny.random_adapter(tiny.CONFIG) | value_head()
    model, base = test_model.build()
    arrays = jax.tree.map(lambda x: jnp.asarray(np.float32(x) if x.dtype == np.float64 else x), batch)

    def total(adapter):
        fused = jax_lora.fuse(model, adapter, tiny.LORA)
        found = jax_forward.outputs(model, base, fused, pack(batch), value=adapter[adapters.VALUE]["w"])
        return loss(found, arrays)[0].mean()

    value, wanted = jit(jax.value_and_grad(total))(adapter)
    policy = backend(adapter, clip_norm=1e9)
    assert policy.update([batch], loss, lr=0.0)["loss"] == pytest.approx(float(value), rel=1e-5)
    gradients = first_gradients(policy)
    assert np.abs(gradients["value/w"]).max() > 0
    assert_gradients(gradients, lora.leaves(wanted), 1e-5)


def test_values_are_read_where_a_token_is_predicted():
    """Of a one-token response: the hidden state of the last prompt token, which transformers' model gives."""
    adapter = {path: {k: np.zeros_like(x) for k, x in m.items()} for path, m in tiny.random_adapter(tiny.CONFIG).items()}
    c = config("ppo", ppo__samples=2)
    _, batch = ready(c)
    batch, head = on_device(batch), value_head()
    theirs = tiny.transformers_model(tiny.RAW, tiny.weights())
    ours = [
        backend(adapter | head).logprobs(batch).values,
        test_train.backend(adapter=adapter | head).logprobs(batch).values,
    ]
    for i in range(3):
        for k in range(2):
            prompt, response = batch.prompt[i][batch.prompt_mask[i]], batch.response[i, k][batch.response_mask[i, k]]
            tokens = torch.tensor(np.concatenate([prompt, response])[None].astype(np.int64))
            states = theirs.model(tokens).last_hidden_state[0, len(prompt) - 1 : -1].detach().numpy()
            expected = states @ head[adapters.VALUE]["w"][:, 0]
            for found in ours:
                np.testing.assert_allclose(found[i, k, : len(response)], expected, atol=1e-4)
                assert not found[i, k, len(response) :].any()


def test_the_base_is_what_is_left_without_an_adapter():
    _, batch = ready(config("ppo", ppo__samples=2))
    batch, adapter = on_device(batch), tiny.random_adapter(tiny.CONFIG)
    none = {path: {k: np.zeros_like(x) for k, x in m.items()} for path, m in adapter.items()}
    for make in (backend, lambda given: test_train.backend(adapter=given)):
        adapted, bare = make(adapter | value_head()), make(none)
        found = adapted.logprobs(batch, base=True)
        np.testing.assert_allclose(found.logprobs, bare.logprobs(batch).logprobs, atol=1e-6)
        assert found.values is None and np.abs(found.logprobs - adapted.logprobs(batch).logprobs).max() > 1e-3


@pytest.mark.slow
def test_the_head_is_trained_kept_and_not_exported(tmp_path):
    c = config("ppo", iterations=2)
    c.optimizer.epochs = 2
    c.ppo.kl, c.ppo.kl_coefficient = "adaptive", 0.2
    for name in ("jax", "torch"):
        assert modes.train(FrozenConfigDict(c), tmp_path / name, name) == 0
        names = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        assert names and not any("value" in key for key in names)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert lines[1]["kl_coefficient"] == pytest.approx(0.2) != lines[2]["kl_coefficient"]
        assert lines[2]["value_loss"] > 0 and lines[2]["grad_norm"] > 0
    one, other = (json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("jax", "torch"))
    for key in ("heldout_reward", "kl_response", "value_loss", "policy_loss", "kl_coefficient"):
        assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key


def test_a_head_learns_the_return_of_a_constant_reward():
    """Its loss falls, on the same batch, to a share of what it was."""
    c = config("ppo", ppo__samples=2, ppo__value_weight=1.0, ppo__value_clip=10.0)
    module, batch = ready(c)
    batch, loss = on_device(batch), module.make_loss(c)
    batch.data.update(returns=np.where(batch.response_mask, 1.0, 0.0), advantages=np.zeros(batch.response.shape))
    policy = backend(tiny.random_adapter(tiny.CONFIG) | adapters.init_head(tiny.CONFIG, adapters.VALUE))
    losses = [policy.update([batch], loss, lr=3e-2)["value_loss"] for _ in range(30)]
    assert losses[0] == pytest.approx(0.5, rel=1e-5) and losses[-1] < 0.1


@pytest.mark.slow
def test_a_plan_has_the_head_and_all_that_the_loss_reads(tmp_path, capsys):
    c = config("ppo")
    for name, algorithm in (("jax", "ppo"), ("torch", "ppo"), ("torch", "rloo"), ("torch", "self_distillation")):
        c.algorithm = algorithm
        assert modes.plan(FrozenConfigDict(c), Path("."), name, topology="cpu:1") == 0
        assert "gradients" in capsys.readouterr().out
