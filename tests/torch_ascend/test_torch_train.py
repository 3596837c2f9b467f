"""The training step in torch: every loss and its gradient against JAX, ten updates, accumulation, dropout, what is held."""

import dataclasses
import json
from typing import Any

import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_model
import test_ple
import test_train
import tiny
import torch
from test_families import jit
from test_torch_model import build_tiny, packed_in_torch
from test_train import random_batch
from torch.utils._python_dispatch import TorchDispatchMode

from ple_jax.algorithms import Context, ple, reward, sft
from ple_jax.backend import forward as jax_forward
from ple_jax.backend import lora as jax_lora
from ple_jax.core import packing
from ple_jax.core.packing import pack
from ple_jax.core.types import Batch, Outputs, Sampling
from ple_jax.models import adapters
from ple_jax.models.adapters import Lora
from torch_ascend import backend as torch_backend
from torch_ascend import forward, lora
from torch_ascend.model import Model


def backend(
    adapter: adapters.Adapter | None = None, settings: Lora = tiny.LORA, *, model: Model | None = None, **options: Any
) -> torch_backend.TorchBackend:
    """The twin of `test_train.backend`: the same weights, adapter and settings."""
    return torch_backend.TorchBackend(
        model or build_tiny(settings),
        tiny.random_adapter(tiny.CONFIG) if adapter is None else adapter,
        **{"width": 4, "bucket": 16, "clip_norm": 1.0, "weight_decay": 0.01} | options,
    )


def negative_likelihood(outputs: Outputs, batch: Batch):
    return -outputs.logprobs.sum((1, 2)), {"tokens": batch.response_mask.sum((1, 2)).float()}


def part(batch: Batch, rows: slice) -> Batch:
    return Batch(*(x[rows] for x in batch[:4]), {name: x[rows] for name, x in batch.data.items()})


def first_gradients(policy: torch_backend.TorchBackend) -> dict[str, np.ndarray]:
    """The gradients of the only update so far: a tenth of them is Adam's mean."""
    assert policy.steps == 1
    return {name: 10 * policy.optimizer.state[leaf]["exp_avg"].numpy() for name, leaf in policy.leaves.items()}


def total(arrays: dict[str, np.ndarray]) -> float:
    return sum(float((x.astype(np.float64) ** 2).sum()) for x in arrays.values()) ** 0.5


def assert_gradients(ours: dict[str, np.ndarray], wanted: dict[str, np.ndarray], share: float) -> None:
    """Equal to a share of the largest entry."""
    assert ours.keys() == wanted.keys()
    scale = max(np.abs(x).max() for x in wanted.values())
    assert scale > 0
    for name, gradient in wanted.items():
        np.testing.assert_allclose(ours[name], gradient, atol=share * scale, rtol=0, err_msg=name)


# ---------------------------------------------------------------- every loss against JAX


class Jax:
    """Outputs of the JAX model, and the adapter's gradient for a gradient with respect to them: compiled once."""

    def __init__(self):
        model, base = test_model.build()

        def outputs(adapter, packed):
            fused = jax_lora.fuse(model, adapter, tiny.LORA)
            found = jax_forward.outputs(model, base, fused, packed, score=adapter[adapters.SCORE]["w"])
            return found.logprobs, found.scores

        self.outputs = jit(outputs)
        self.pull = jit(lambda adapter, packed, slope: jax.vjp(lambda a: outputs(a, packed), adapter)[1](slope)[0])

    def gradient(self, adapter, batch, loss) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """The loss and its metrics, averaged over queries, and the gradient."""
        on_jax, packed = test_ple.convert(batch, jnp.asarray), pack(batch)

        def total(found):
            value, metrics = loss(Outputs(found[0], scores=found[1]), on_jax)
            return value.mean(), {"loss": value.mean(), **{name: m.mean() for name, m in metrics.items()}}

        slope, metrics = jax.grad(total, has_aux=True)(self.outputs(adapter, packed))
        return {name: float(m) for name, m in metrics.items()}, lora.leaves(self.pull(adapter, packed, slope))


@pytest.fixture(scope="module")
def on_jax() -> Jax:
    return Jax()


def head() -> dict[str, Any]:
    return {adapters.SCORE: {"w": np.random.default_rng(5).normal(size=(32, 1)).astype(np.float32)}}


def ple_batch(config) -> Batch:
    context = Context(config, tau=test_ple.TAU, mean_length=test_ple.MEAN)
    batch = ple.batch(ple.label(test_ple.make_rollouts(), context), context)
    batch.data["reference_logprobs"] = test_ple.token_logprobs(batch, 1).astype(np.float32)
    return batch


@pytest.mark.parametrize("name", [*test_ple.CASES, "sft", "reward"])
def test_every_loss_and_its_gradient_are_those_of_jax(name, on_jax):
    config = test_ple.settings(**test_ple.CASES.get(name, {}))
    losses = {"sft": sft.make_loss(None), "reward": reward.make_loss(None)}
    loss, batch, adapter = losses.get(name) or ple.make_loss(config), ple_batch(config), tiny.random_adapter(tiny.CONFIG)
    wanted, gradient = on_jax.gradient(adapter | head(), batch, loss)
    if name == "reward":
        adapter |= head()
    else:
        assert not gradient.pop("score/w").any()
    policy = backend(adapter, clip_norm=1e9)
    said = policy.update([batch], loss, lr=0.0)
    del said["grad_norm"]
    known = exact.Exact(adapter).gradient(batch, loss)
    for metrics, found in ((said, first_gradients(policy)), (wanted, gradient)):
        exact.assert_metrics_near(metrics, known)
        exact.assert_near(found, known)


@pytest.mark.slow
def test_the_gradient_of_options_is_jaxs():
    """DoRA with a scale of rsLoRA's, ranks and scales by module."""
    options = Lora(4, 8.0, rank_pattern={"q_proj": 2, "1.mlp.down_proj": 6}, alpha_pattern={"o_proj": 3.0}, rslora=True,
                   dora=True)  # fmt: skip
    rng = np.random.default_rng(3)
    adapter = {
        path: {kind: (x * (1 + 0.3 * rng.normal(size=x.shape)) if kind == "m" else 0.1 * rng.normal(size=x.shape)).astype(
            np.float32
        ) for kind, x in module.items()}
        for path, module in adapters.init(tiny.CONFIG, options, seed=0).items()
    }  # fmt: skip
    model, base = test_model.build()
    batch = random_batch()

    def loss(adapter, batch):
        fused = jax_lora.fuse(model, adapter, options, base=base)
        return -jax_forward.outputs(model, base, fused, pack(batch)).logprobs.sum() / 4

    value, wanted = jit(jax.value_and_grad(lambda adapter: loss(adapter, batch)))(adapter)
    policy = backend(adapter, options, clip_norm=1e9)
    said = policy.update([batch], negative_likelihood, lr=0.0)["loss"]
    known = exact.Exact(adapter, options).gradient(batch, lambda *both: (negative_likelihood(*both)[0], {}))
    for loss_, found in ((said, first_gradients(policy)), (float(value), lora.leaves(wanted))):
        exact.assert_metrics_near({"loss": loss_}, known)
        exact.assert_near(found, known)


def test_packed_rows_equal_separate_rows_in_peft():
    """Rows of their own, in float64; and so near to it PEFT is in float32 too."""
    batch = random_batch()
    theirs, adapter = test_train.peft_model()
    known = exact.Exact(adapter).gradient(batch, negative_likelihood)
    expected = test_train.separate_logprobs(theirs, batch)
    policy = backend(adapter, clip_norm=1e9)
    found = policy.logprobs(batch).logprobs
    for logprobs in (found, expected.detach().numpy()):
        exact.assert_logprobs_near(logprobs, known)
    assert not found[~batch.response_mask].any()
    (-expected.sum() / 4).backward()
    named = {name.replace(".default", ""): p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}
    exact.assert_near(lora.leaves(adapters.from_peft(named)), known)
    said = policy.update([batch], negative_likelihood, lr=0.0)
    norm = said.pop("grad_norm")
    exact.assert_metrics_near(said, known)
    assert said["tokens"] == batch.response_mask.sum() / 4
    gradients = first_gradients(policy)
    exact.assert_near(gradients, known)
    assert list(policy.adapter()) == list(named)
    assert norm == pytest.approx(total(gradients), rel=1e-5)  # the same numbers, added up in another order


# ---------------------------------------------------------------- log-probabilities of tokens


def head_only(vocab: int, softcap: float | None) -> tuple[Model, np.ndarray]:
    """A model whose output matrix alone is read."""
    config = dataclasses.replace(tiny.CONFIG, vocab_size=vocab)
    weights = tiny.weights(config)
    from test_torch_model import build

    model = build(config, tiny.RAW | {"vocab_size": vocab}, weights)
    model.config = dataclasses.replace(config, logits_softcap=softcap)
    return model, weights["lm_head.weight"].astype(np.float64)


@pytest.mark.parametrize(("softcap", "temperature"), [(None, 1.0), (None, 0.6), (2.0, 1.7)])
def test_token_logprobs_and_entropy_against_the_closed_form(softcap, temperature):
    """3 x 700 tokens: more than one chunk, and a rest."""
    model, weights = head_only(300, softcap)
    rng = np.random.default_rng(0)
    hidden, targets = rng.normal(size=(3, 700, 32)).astype(np.float32), rng.integers(0, 300, (3, 700))
    raw = hidden.astype(np.float64) @ weights.T
    logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
    logp = logits / temperature - np.log(np.exp(logits / temperature).sum(-1, keepdims=True))
    h = torch.tensor(hidden, requires_grad=True)
    ours = forward.token_logprobs(model, h, torch.tensor(targets), temperature)
    expected = np.take_along_axis(logp, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(ours.detach().numpy(), expected, atol=1e-5)
    value, entropy = forward.token_entropy(model, h, torch.tensor(targets), temperature)
    torch.testing.assert_close(value, ours, rtol=0, atol=0)
    np.testing.assert_allclose(entropy.numpy(), -(np.exp(logp) * logp).sum(-1), atol=1e-5)
    assert not entropy.requires_grad
    g = rng.normal(size=targets.shape).astype(np.float32)
    (ours * torch.tensor(g)).sum().backward()
    slope = (1.0 if softcap is None else 1 - (logits / softcap) ** 2) / temperature
    exact = g[..., None] * (((np.eye(300)[targets] - np.exp(logp)) * slope) @ weights)
    np.testing.assert_allclose(h.grad.numpy(), exact, atol=1e-5)


class Largest(TorchDispatchMode):
    """Most entries of an array over the vocabulary."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and tiny.CONFIG.vocab_size in out.shape and out.dim() > 1:
            self.found = max(self.found, out.numel())
        return out


def test_logits_of_all_tokens_never_exist():
    packed = packed_in_torch(random_batch(rows=8, k=2, prompt_len=16, response_len=128))
    model, adapter = build_tiny(), lora.trainable(tiny.random_adapter(tiny.CONFIG), torch.device("cpu"))
    with Largest() as largest:
        forward.outputs(model, adapter, packed).logprobs.sum().backward()
        forward.outputs(model, adapter, packed, entropy=True)
    assert largest.found == forward.CHUNK * tiny.CONFIG.vocab_size < 8 * 2 * 128 * tiny.CONFIG.vocab_size


# ---------------------------------------------------------------- updates


@pytest.mark.slow
def test_ten_updates_are_those_of_jax():
    """Accumulated over micro-batches, clipped (the norm is far above one), with weight decay and a rate that changes."""
    ours, theirs = backend(), test_train.backend()
    start = theirs.adapter()
    for step in range(10):
        batch, lr = random_batch(rows=6, seed=step), 1e-3 * min(1.0, (step + 1) / 4)
        parts = [part(batch, slice(i, i + 2)) for i in (0, 2, 4)]
        said = ours.update(parts, negative_likelihood, lr=lr)
        wanted = theirs.update(parts, test_train.negative_likelihood, lr=lr)
        assert said == pytest.approx(wanted, rel=1e-4) and said["grad_norm"] > 1
    one, other = ours.adapter(), theirs.adapter()
    assert one.keys() == other.keys()
    apart, moved = ({name: x - y[name] for name, x in other.items()} for y in (one, start))
    assert max(np.abs(x).max() for x in apart.values()) < 1e-4
    # where a gradient is all rounding Adam makes a whole step of it: that it is few of them, the norm says
    assert total(apart) < 1e-3 * total(moved) and all(np.abs(x).max() > 2e-3 for x in moved.values())


def test_weight_decay_and_clipping_by_hand():
    """One step from a closed form: Adam's first step is the sign, times the rate; decay takes its share of the weight."""
    policy = backend(clip_norm=1e-3, weight_decay=0.3)
    before = {name: leaf.detach().clone() for name, leaf in policy.leaves.items()}
    said = policy.update([random_batch()], negative_likelihood, lr=0.1)
    gradients = first_gradients(policy)
    assert said["grad_norm"] > 1 and total(gradients) == pytest.approx(1e-3, rel=1e-5)
    for name, leaf in policy.leaves.items():
        g = gradients[name].astype(np.float64)
        step = g / (np.abs(g) + 1e-8)
        exact = before[name].numpy() * (1 - 0.1 * 0.3) - 0.1 * step
        np.testing.assert_allclose(leaf.detach().numpy(), exact, atol=1e-4)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 2), (1, 5)])
def test_accumulated_micro_batches_equal_one_batch(sizes):
    """The mean is over all rows of the optimiser batch; a smaller part is filled up with rows that do not count."""
    batch, ends = random_batch(rows=6), np.cumsum(sizes)
    parts = [part(batch, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    whole, split = backend(), backend()
    one, several = (b.update(x, negative_likelihood, lr=0.01) for b, x in ((whole, [batch]), (split, parts)))
    known = exact.Exact(tiny.random_adapter(tiny.CONFIG)).gradient(batch, negative_likelihood)
    assert several == pytest.approx(one, rel=max(known.share, known.loss_share))
    assert_gradients(first_gradients(split), first_gradients(whole), known.share)


@pytest.mark.parametrize("a_pass", [8, 1000])
def test_queries_that_share_rows_and_short_ones_apart_change_no_number(a_pass, monkeypatch):
    batch, whole, shared = test_train.uneven_batch(), backend(), backend()
    monkeypatch.setattr(packing, "passes", test_train.each_alone)
    alone = whole.logprobs(batch, entropy=True), whole.update([batch], negative_likelihood, lr=0.01)
    monkeypatch.undo()
    monkeypatch.setattr(packing, "cost", lambda platform, reach: packing.Cost(a_pass, 1e9))
    together = shared.logprobs(batch, entropy=True), shared.update([batch], negative_likelihood, lr=0.01)
    for name in ("logprobs", "entropy"):  # in the order of the batch
        np.testing.assert_allclose(getattr(together[0], name), getattr(alone[0], name), atol=2e-5)
    known = exact.Exact(tiny.random_adapter(tiny.CONFIG)).gradient(batch, negative_likelihood)
    assert together[1] == pytest.approx(alone[1], rel=max(known.share, known.loss_share))
    assert_gradients(first_gradients(shared), first_gradients(whole), known.share)


def test_of_who_only_fills_the_shape_a_loss_may_be_no_number(monkeypatch):
    """A ratio to a likelihood that is not its own overflows: neither the loss nor a gradient has anything of it."""
    batch = random_batch(rows=6, response_len=64)
    batch.data["old"] = backend().logprobs(batch).logprobs.sum((1, 2))
    assert (batch.data["old"] + batch.response_mask.sum((1, 2))).min() < -100  # exp of it is infinite

    def ratio(outputs, batch):
        value = (outputs.logprobs.sum((1, 2)) - batch.data["old"]).exp()
        return value, {"ratio": value}

    test_train.assert_passes_change_nothing(monkeypatch, lambda: backend().update([batch], ratio, lr=0.01))


def test_rows_that_are_not_valid_do_not_count():
    """Not even where their loss is no number: 0 / 0 in what fills the shape up."""
    batch = random_batch(rows=6)
    batch.data["weight"] = np.arange(1, 7).astype(np.float32)
    batch.data["valid"][4:] = 0

    def loss(outputs, batch):
        value = -outputs.logprobs.sum((1, 2)) / batch.data["weight"]
        return value, {"inverse": 1 / batch.data["weight"]}

    found = [backend(), backend(), backend()]
    six = found[0].update([batch], loss, lr=0.01)
    four = found[1].update([part(batch, slice(0, 4))], loss, lr=0.01)
    filled = found[2].update([part(batch, slice(0, 3)), part(batch, slice(3, 4))], loss, lr=0.01)
    assert six == pytest.approx(four, rel=1e-5) and filled == pytest.approx(four, rel=1e-5)
    assert four["inverse"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_a_loss_sees_float32_and_tokens_that_index():
    batch = random_batch()
    batch.data.update(wide=np.ones(4, np.float64), count=np.arange(4, dtype=np.int32), flag=np.ones(4, bool))
    seen = {}

    def loss(outputs, batch):
        seen.update({name: x.dtype for name, x in batch.data.items()}, tokens=batch.response.dtype, mask=batch[1].dtype)
        return -outputs.logprobs.sum((1, 2)), {}

    backend().update([batch], loss, lr=0.01)
    assert seen == {
        "valid": torch.float32, "wide": torch.float32, "count": torch.int64, "flag": torch.bool, "tokens": torch.int64,
        "mask": torch.bool,
    }  # fmt: skip


def test_reference_is_frozen():
    batch, ours = random_batch(), backend()
    before = ours.logprobs(batch).logprobs
    ours.update([batch], negative_likelihood, lr=0.05)
    np.testing.assert_array_equal(ours.logprobs(batch, reference=True).logprobs, before)
    assert np.abs(ours.logprobs(batch).logprobs - before).max() > 1e-2
    ours.freeze_reference()
    np.testing.assert_array_equal(ours.logprobs(batch, reference=True).logprobs, ours.logprobs(batch).logprobs)


def nothing(outputs: Outputs, batch: Batch):
    """A loss whose gradient is 0 everywhere."""
    return 0 * outputs.logprobs.sum((1, 2)), {}


def test_of_what_was_learned_before_the_reference_nothing_moves_on():
    batch, ours = random_batch(), backend(weight_decay=0.0)
    for _ in range(3):
        ours.update([batch], negative_likelihood, lr=0.01)
    learned = {path: {k: x.detach().numpy().copy() for k, x in leaves.items()} for path, leaves in ours.policy.items()}
    fresh, frozen = backend(learned, weight_decay=0.0), ours.adapter()
    frozen = {name: array.copy() for name, array in frozen.items()}
    ours.freeze_reference()
    ours.update([batch], nothing, lr=0.01)
    for name, array in ours.adapter().items():
        np.testing.assert_array_equal(array, frozen[name])
    fresh.update([batch], nothing, lr=0.01)
    for one in (ours, fresh):
        one.update([batch], negative_likelihood, lr=0.01)
    for name, array in ours.adapter().items():
        np.testing.assert_array_equal(array, fresh.adapter()[name])


def test_weight_decay_is_of_the_low_rank_matrices_alone():
    settings = dataclasses.replace(tiny.LORA, dora=True)
    policy = backend(test_train.decayed_and_not(), settings, weight_decay=0.5)
    policy.update([random_batch()], nothing, lr=0.1)
    for path, module in test_train.decayed_and_not().items():
        for kind, array in module.items():
            left = 0.95 if kind in ("a", "b") else 1.0
            found = policy.policy[path][kind].detach().numpy()
            np.testing.assert_allclose(found, left * array, rtol=1e-6, err_msg=f"{path}/{kind}")


def test_logprobs_and_entropy_are_those_of_jax():
    batch = random_batch()
    ours, theirs = (made.logprobs(batch, entropy=True) for made in (backend(), test_train.backend()))
    for name in ("logprobs", "entropy"):
        x = getattr(ours, name)
        assert isinstance(x, np.ndarray) and x.dtype == np.float32
        np.testing.assert_allclose(x, getattr(theirs, name), atol=1e-4)


def test_bfloat16_weights_sample_and_train():
    """What sampling left behind does not hinder training; gradients are those of fp32 to what the rounding takes."""
    exact, rounded = backend(clip_norm=1e9), backend(model=build_tiny(dtype=torch.bfloat16), clip_norm=1e9)
    noise = np.random.default_rng(0).random((2, 5), dtype=np.float32)
    assert len(rounded.generate([[1, 2, 3], [4]], noise, sampling=Sampling(5, ()))) == 2
    batch = random_batch()
    assert rounded.logprobs(batch).logprobs.dtype == np.float32
    for policy in (exact, rounded):
        policy.update([batch], negative_likelihood, lr=0.0)
    a, b = (np.concatenate([x.ravel() for x in first_gradients(policy).values()]) for policy in (exact, rounded))
    assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(a)


# ---------------------------------------------------------------- dropout


DROPPING = dataclasses.replace(tiny.LORA, dropout=0.5)


def test_a_step_drops_the_same_in_every_run():
    batch = random_batch()
    torch.manual_seed(1)
    one = backend(settings=DROPPING, seed=3)
    said = [one.update([batch], negative_likelihood, lr=0.0)["loss"] for _ in range(3)]
    assert len(set(said)) == 3  # nothing but the draw changes from step to step
    torch.manual_seed(2)  # what else draws does not matter
    again, other = backend(settings=DROPPING, seed=3), backend(settings=DROPPING, seed=4)
    assert [again.update([batch], negative_likelihood, lr=0.0)["loss"] for _ in range(3)] == said
    assert other.update([batch], negative_likelihood, lr=0.0)["loss"] not in said


def test_micro_batches_drop_each_their_own():
    batch = random_batch()
    one, both = backend(settings=DROPPING, clip_norm=1e9), backend(settings=DROPPING, clip_norm=1e9)
    single = one.update([batch], negative_likelihood, lr=0.0)["loss"]
    assert both.update([batch, batch], negative_likelihood, lr=0.0)["loss"] != pytest.approx(single, rel=1e-4)


def test_a_restored_run_drops_what_it_would_have(tmp_path):
    batch, one = random_batch(), backend(settings=DROPPING)
    for _ in range(2):
        one.update([batch], negative_likelihood, lr=0.01)
    one.save(tmp_path, 2, {}, keep=1)
    again = backend(settings=DROPPING)
    assert again.restore(tmp_path) == {} and again.steps == 2
    said = [b.update([batch], negative_likelihood, lr=0.01) for b in (one, again)]
    assert said[0] == said[1]


def test_only_updates_drop():
    batch, dropping, plain = random_batch(), backend(settings=DROPPING), backend()
    np.testing.assert_array_equal(dropping.logprobs(batch).logprobs, plain.logprobs(batch).logprobs)
    noise = np.zeros((1, 12), np.float32)
    greedy = Sampling(12, (), temperature=0.0)
    assert dropping.generate([[1, 2]], noise, sampling=greedy) == plain.generate([[1, 2]], noise, sampling=greedy)


# ---------------------------------------------------------------- what is held


def test_a_head_gives_scores():
    """At the last token of every response, and where nothing but a prompt's is there no index before the first."""
    batch, adapter = random_batch(), tiny.random_adapter(tiny.CONFIG) | head()
    policy = backend(adapter)
    found = policy.scores(batch)
    assert found.shape == (4, 2) and found.dtype == np.float32
    np.testing.assert_allclose(found, policy.logprobs(batch).scores, atol=1e-5)
    for i, k in np.ndindex(4, 2):
        ids = np.concatenate([batch.prompt[i][batch.prompt_mask[i]], batch.response[i, k][batch.response_mask[i, k]]])
        time = torch.arange(len(ids))[None]
        with torch.no_grad():
            hidden = policy.model.apply(
                policy.policy, torch.tensor(ids).long()[None], positions=time, mask=(time <= time.mT)[None]
            )
        assert found[i, k] == pytest.approx((hidden[0, -1] @ torch.tensor(head()["score"]["w"])).item(), abs=1e-4)


def test_the_adapter_is_under_pefts_names():
    adapter = tiny.random_adapter(tiny.CONFIG) | head()
    found = backend(adapter).adapter()
    wanted = adapters.to_peft(adapter)
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array)


def test_environment_can_be_kept():
    found = backend().environment()
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__ and found["platform"] == "cpu" and found["ops"] == "reference"
    assert found["threads"] == torch.get_num_threads() == 1
