"""The training step: packed rows against separate ones, gradients against torch and PEFT, AdamW against torch's."""

import dataclasses
import re
from collections.abc import Callable
from types import SimpleNamespace

import exact
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from speed import quick
from test_model import build

from ple_jax.backend import backend as jax_backend
from ple_jax.backend import forward, lora, sharding, train
from ple_jax.backend.model import Model, fill
from ple_jax.core import packing
from ple_jax.core.errors import UserError
from ple_jax.core.packing import pack
from ple_jax.core.types import Batch
from ple_jax.models import adapters

_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_batch(rows=4, k=2, prompt_len=16, response_len=8, vocab=tiny.CONFIG.vocab_size, seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    prompts, lengths = rng.integers(2, prompt_len + 1, rows), rng.integers(1, response_len + 1, (rows, k))
    prompt_mask = np.arange(prompt_len)[None] >= prompt_len - prompts[:, None]
    mask = np.arange(response_len)[None, None] < lengths[..., None]
    prompt = np.where(prompt_mask, rng.integers(1, vocab, prompt_mask.shape), 0).astype(np.int32)
    response = np.where(mask, rng.integers(1, vocab, mask.shape), 0).astype(np.int32)
    return Batch(prompt, prompt_mask, response, mask, {"valid": np.ones(rows, np.float32)})


def negative_likelihood(outputs, batch):
    return -outputs.logprobs.sum((1, 2)), {"tokens": batch.response_mask.sum((1, 2)).astype(jnp.float32)}


def backend(mesh=None, tensors=None, adapter=None, scan=False, width=4, weight_decay=0.01, settings=tiny.LORA, fold=False):
    mesh = mesh or sharding.make_mesh()
    tensors = tensors or tiny.weights()
    model = Model.create(tiny.CONFIG, scan=scan)

    def put(name, array):
        place = sharding.spec(name, array.shape, mesh, kv_heads=tiny.CONFIG.num_kv_heads)
        return jax.device_put(array, jax.sharding.NamedSharding(mesh, place))

    return jax_backend.JaxBackend(
        model,
        fill(model, tensors, put),
        tiny.random_adapter(tiny.CONFIG) if adapter is None else adapter,
        mesh,
        settings=settings,
        width=width,
        bucket=16,
        fold=fold,
        clip_norm=1.0,
        weight_decay=weight_decay,
    )


def separate_logprobs(model, batch):
    """Each response in a row of its own through torch, no packing, no padding."""
    import torch

    values = torch.zeros(batch.response.shape)
    for i in range(len(batch.prompt)):
        for j in range(batch.response.shape[1]):
            prompt = batch.prompt[i][batch.prompt_mask[i]]
            response = batch.response[i, j][batch.response_mask[i, j]]
            ids = torch.tensor(np.concatenate([prompt, response])).long()[None]
            logp = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            values[i, j, : len(response)] = logp.gather(-1, torch.tensor(response).long()[:, None])[:, 0]
    return values


def peft_model(rank=4):
    import torch
    from peft import LoraConfig, get_peft_model

    adapter = tiny.random_adapter(tiny.CONFIG, rank)
    targets = sorted({path.rsplit(".", 1)[1] for path in adapter})
    model = get_peft_model(
        tiny.transformers_model(tiny.RAW, tiny.weights()),
        LoraConfig(r=rank, lora_alpha=tiny.LORA.alpha, target_modules=targets),
    )
    named = {k.replace(".weight", ".default.weight"): torch.tensor(v) for k, v in adapters.to_peft(adapter).items()}
    model.load_state_dict(named, strict=False)
    return model, adapter


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scan", quick([False, True], False))
def test_packed_rows_equal_separate_rows_in_peft(scan, shared):
    """Log-probabilities and LoRA gradients of [prompt | y1 | y2] and of two queries in one row, against PEFT's own rows."""
    batch = random_batch()
    places = np.arange(4), np.array([1, 0, 1, 0]), np.array([0, 0, 31, 27]), np.zeros(4, int)
    one = packing.Pass(*places, 2, 64, 99) if shared else None
    theirs, adapter = peft_model()
    model, base = build(scan=scan)
    expected = separate_logprobs(theirs, batch)
    fused = lora.fuse(model, adapter, tiny.LORA)
    packed = pack(batch, one)
    ours = jax.jit(lambda packed: forward.outputs(model, base, fused, packed, entropy=True))(packed)
    np.testing.assert_allclose(ours.logprobs, expected.detach().numpy(), atol=1e-4)
    assert not np.asarray(ours.logprobs)[~batch.response_mask].any()

    (-expected.sum() / 4).backward()
    grads, metrics = jax.jit(
        lambda a: train.gradients(
            model, tiny.LORA, negative_likelihood, base, a, batch, packed, jnp.float32(1 / 4), jax.random.key(0)
        )
    )(adapter)
    named = {name.replace(".default", ""): p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}
    ours_named = adapters.to_peft(grads)
    assert sorted(named) == sorted(ours_named)
    for name, gradient in named.items():
        np.testing.assert_allclose(ours_named[name], gradient, atol=1e-4 * max(1, np.abs(gradient).max()))
    assert float(metrics["loss"]) == pytest.approx(-expected.sum().item() / 4, rel=1e-5)
    assert float(metrics["tokens"]) == batch.response_mask.sum() / 4


@pytest.mark.parametrize(("softcap", "temperature"), [(None, 1.0), (None, 0.6), (2.0, 1.7)])
def test_token_logprobs_and_entropy_against_the_closed_form(softcap, temperature):
    rng = np.random.default_rng(0)
    head, hidden = rng.normal(size=(300, 16)).astype(np.float32), rng.normal(size=(3, 700, 16)).astype(np.float32)
    targets = rng.integers(0, 300, (3, 700)).astype(np.int32)
    raw = hidden.astype(np.float64) @ head.T.astype(np.float64)
    logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
    logp = logits / temperature - np.log(np.exp(logits / temperature).sum(-1, keepdims=True))
    options = {"softcap": softcap, "temperature": temperature}

    def said(h):
        return forward.token_logprobs(jnp.asarray(head), h, targets, 700, softcap, temperature)

    # 3 x 700 tokens: more than one chunk, and a rest
    np.testing.assert_allclose(jax.jit(said)(hidden), np.take_along_axis(logp, targets[..., None], -1)[..., 0], atol=1e-4)
    value, spread = forward.token_entropy(head, hidden, targets, 700, **options)
    np.testing.assert_allclose(spread, -(np.exp(logp) * logp).sum(-1), atol=1e-4)
    np.testing.assert_allclose(value, jax.jit(said)(hidden), atol=1e-5)
    g = rng.normal(size=targets.shape).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda h: (said(h) * g).sum()))(hidden)
    error = (np.eye(300)[targets] - np.exp(logp)) / temperature * (1 if softcap is None else 1 - (logits / softcap) ** 2)
    np.testing.assert_allclose(gradient, g[..., None] * (error @ head), atol=1e-4)


def test_logits_of_all_tokens_never_exist():
    """No array of the compiled step, forward or backward, holds more than a chunk of logits."""
    model, base = build()
    batch = random_batch(rows=8, k=2, prompt_len=16, response_len=128)
    adapter = tiny.random_adapter(tiny.CONFIG)

    def step(a):
        data = batch, pack(batch), jnp.float32(1), jax.random.key(0)
        return train.gradients(model, tiny.LORA, negative_likelihood, base, a, *data)

    text = jax.jit(step).lower(adapter).compile().as_text()
    vocab = tiny.CONFIG.vocab_size
    sizes = [
        np.prod([int(n) for n in dims.split(",")])
        for dims in re.findall(r"f32\[([\d,]+)\]", text)
        if str(vocab) in dims.split(",")
    ]
    assert max(sizes) <= forward.CHUNK * vocab < 8 * 2 * 128 * vocab


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_gradient_of_confident_tokens_with_a_bfloat16_head(softcap):
    """Where p is nearly one, one-hot minus p is smaller than p's rounding: it must not be lost."""
    rng = np.random.default_rng(0)
    head = np.asarray(rng.normal(size=(300, 32)), jnp.bfloat16)
    targets = rng.integers(0, 300, (2, 20)).astype(np.int32)
    hidden = np.asarray(0.4 * head[targets].astype(np.float32) + 0.1 * rng.normal(size=(2, 20, 32)), jnp.bfloat16)
    h, w = hidden.astype(np.float64), head.astype(np.float64)
    raw = h @ w.T
    logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    assert np.median(np.take_along_axis(p, targets[..., None], -1)) > 0.97
    slope = 1.0 if softcap is None else 1 - (logits / softcap) ** 2
    expected = ((np.eye(300)[targets] - p) * slope) @ w
    given = jnp.asarray(head), jnp.asarray(hidden)
    gradient = jax.grad(lambda w, x: forward.token_logprobs(w, x, targets, 20, softcap).sum(), argnums=1)(*given)
    error = np.linalg.norm(np.asarray(gradient, np.float64) - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() < 0.02


def test_entropy_is_of_who_asks_for_it():
    batch, ours = random_batch(), backend()
    assert ours.logprobs(batch).entropy is None
    asked = ours.logprobs(batch, entropy=True)
    assert (asked.entropy[batch.response_mask] > 0).all() and not asked.entropy[~batch.response_mask].any()


def test_what_is_said_and_what_is_learned_at_a_temperature():
    """Logits are divided by it, in log-probabilities, entropies (read at the first tokens here) and a loss."""
    import torch

    batch, ours, (theirs, _) = random_batch(), backend(), peft_model()
    found = ours.logprobs(batch, temperature=0.6, entropy=True)
    expected = separate_logprobs(lambda ids: SimpleNamespace(logits=theirs(ids).logits / 0.6), batch).detach().numpy()
    np.testing.assert_allclose(found.logprobs, expected, atol=1e-4)
    for i, prompt in enumerate(batch.prompt):
        last = theirs(torch.tensor(prompt[batch.prompt_mask[i]]).long()[None]).logits[0, -1]
        entropy = torch.distributions.Categorical(logits=last / 0.6).entropy().item()
        np.testing.assert_allclose(found.entropy[i, :, 0], entropy, atol=1e-4)
    loss = ours.update([batch], negative_likelihood, lr=0.01, temperature=0.6)["loss"]
    assert loss == pytest.approx(-expected.sum() / 4, rel=1e-5)


def test_accumulated_micro_batches_equal_one_batch():
    batch = random_batch(rows=6)
    parts = [
        jax.tree.map(lambda x, r=rows: x[r], batch) for rows in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]  # the mean is over all rows of the optimiser batch
    whole, split = backend(), backend()
    one, three = whole.update([batch], negative_likelihood, lr=0.01), split.update(parts, negative_likelihood, lr=0.01)
    known = exact.Exact(tiny.random_adapter(tiny.CONFIG)).gradient(batch, exact.negative_likelihood)
    assert three["loss"] == pytest.approx(one["loss"], rel=known.loss_share)
    assert three["grad_norm"] == pytest.approx(one["grad_norm"], rel=known.share)
    # Adam's mean of the gradient, not the step: that divides a gradient by itself, rounding where it is nearly zero and all
    means, expected = (jax.device_get(optax.tree.get(b.state, "mu")) for b in (split, whole))
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=known.share * scale), means, expected)


def uneven_batch() -> Batch:
    """Two long rows among six short ones."""
    batch = random_batch(rows=8, prompt_len=48)
    for row in (0, 1, 3, 4, 6, 7):
        batch.prompt_mask[row, :-4] = False
    batch.prompt_mask[[2, 5]] = True
    return batch._replace(prompt=np.where(batch.prompt_mask, np.maximum(batch.prompt, 1), 0).astype(np.int32))


def each_alone(batch, cost, *, most, shards=1):
    return [packing.alone(batch, shards)]


@pytest.mark.parametrize("a_pass", [8, 1000])
def test_queries_that_share_rows_and_short_ones_apart_change_no_number(a_pass, monkeypatch):
    batch, whole, shared = uneven_batch(), backend(), backend()
    monkeypatch.setattr(packing, "passes", each_alone)
    alone = whole.logprobs(batch, entropy=True), whole.update([batch], negative_likelihood, lr=0.01)
    monkeypatch.undo()
    made = packing.passes(batch, packing.Cost(a_pass, 1e9), most=8)
    assert len(made) > 1 if a_pass == 8 else made[0].rows < 8
    monkeypatch.setattr(packing, "cost", lambda platform, reach: packing.Cost(a_pass, 1e9))
    together = shared.logprobs(batch, entropy=True), shared.update([batch], negative_likelihood, lr=0.01)
    for name in ("logprobs", "entropy"):  # in the order of the batch
        np.testing.assert_allclose(getattr(together[0], name), getattr(alone[0], name), atol=2e-5)
    known = exact.Exact(tiny.random_adapter(tiny.CONFIG)).gradient(batch, exact.negative_likelihood)
    assert together[1] == pytest.approx(alone[1], rel=max(known.share, known.loss_share))


def assert_passes_change_nothing(monkeypatch, update: Callable[[], dict[str, float]]) -> None:
    """Of an update whose "ratio" is 1: in as many passes as there are lengths, which are filled up, and in one."""
    found = []
    for a_pass in (1, 100_000):
        monkeypatch.setattr(packing, "cost", lambda platform, reach, a_pass=a_pass: packing.Cost(a_pass, 1e9))
        found.append(update())
    assert found[0] == pytest.approx(found[1], rel=1e-3) and found[0]["ratio"] == pytest.approx(1, rel=1e-3)


def test_of_who_only_fills_the_shape_a_loss_may_be_no_number(monkeypatch):
    """A ratio to a likelihood that is not its own overflows: neither the loss nor a gradient has anything of it."""
    batch = random_batch(rows=6, response_len=64)
    ours = backend()
    batch.data["old"] = ours.logprobs(batch).logprobs.sum((1, 2))
    assert (batch.data["old"] + batch.response_mask.sum((1, 2))).min() < -100  # exp of it is infinite

    def ratio(outputs, batch):
        value = jnp.exp(outputs.logprobs.sum((1, 2)) - batch.data["old"])
        return value, {"ratio": value}

    assert_passes_change_nothing(monkeypatch, lambda: backend().update([batch], ratio, lr=0.01))


def test_rows_that_are_not_valid_do_not_count():
    batch = random_batch(rows=6)
    batch.data["valid"][4:] = 0
    four = jax.tree.map(lambda x: x[:4], batch)
    known = exact.Exact(tiny.random_adapter(tiny.CONFIG)).gradient(four, exact.negative_likelihood)
    for some in (batch, four):
        loss = backend().update([some], negative_likelihood, lr=0.01)["loss"]
        exact.assert_metrics_near({"loss": loss}, known)


def test_adamw_and_clipping_equal_torch():
    import torch

    theirs, _ = peft_model()
    ours = backend()
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.02, weight_decay=0.01)
    for step in range(4):
        batch = random_batch(seed=step)
        optimizer.zero_grad()
        (-separate_logprobs(theirs, batch).sum() / 4).backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in theirs.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        assert ours.update([batch], negative_likelihood, lr=0.02)["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    adapter = ours.adapter()
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            np.testing.assert_allclose(adapter[name.replace(".default", "")], p.detach().numpy(), atol=2e-3)


def test_reference_is_frozen():
    batch = random_batch()
    ours = backend()
    before = ours.logprobs(batch).logprobs
    ours.update([batch], negative_likelihood, lr=0.05)
    np.testing.assert_array_equal(ours.logprobs(batch, reference=True).logprobs, before)
    assert np.abs(ours.logprobs(batch).logprobs - before).max() > 1e-2
    ours.freeze_reference()
    np.testing.assert_array_equal(ours.logprobs(batch, reference=True).logprobs, ours.logprobs(batch).logprobs)


def nothing(outputs, batch):
    """A loss whose gradient is 0 everywhere."""
    return 0 * outputs.logprobs.sum((1, 2)), {}


def test_of_what_was_learned_before_the_reference_nothing_moves_on():
    """Adam's moments would: 50 steps at 1e-4 went on to move an adapter by 0.31 in 12 steps without any gradient."""
    batch, ours = random_batch(), backend(weight_decay=0.0)
    for _ in range(3):
        ours.update([batch], negative_likelihood, lr=0.01)
    still = backend(weight_decay=0.0, adapter=jax.device_get(ours.policy))
    ours.freeze_reference()
    frozen = ours.adapter()
    ours.update([batch], nothing, lr=0.01)
    for name, array in ours.adapter().items():
        np.testing.assert_array_equal(array, frozen[name])
    still.update([batch], nothing, lr=0.01)
    for one in (ours, still):  # the first step from here is as large as that of a fresh optimiser: no count is kept
        one.update([batch], negative_likelihood, lr=0.01)
    for name, array in ours.adapter().items():
        np.testing.assert_array_equal(array, still.adapter()[name])


def decayed_and_not() -> adapters.Adapter:
    """Low-rank matrices, magnitudes of DoRA, and a head; nothing is 0."""
    adapter = {path: dict(module, m=np.full(module["b"].shape[1], 2.0, np.float32))
               for path, module in tiny.random_adapter(tiny.CONFIG).items()}  # fmt: skip
    return adapter | {adapters.VALUE: {"w": np.full((tiny.CONFIG.hidden_size, 1), 3.0, np.float32)}}


def test_weight_decay_is_of_the_low_rank_matrices_alone():
    ours = backend(weight_decay=0.5, adapter=decayed_and_not(), settings=dataclasses.replace(tiny.LORA, dora=True))
    ours.update([random_batch()], nothing, lr=0.1)
    for path, module in decayed_and_not().items():
        for kind, array in module.items():
            left = 0.95 if kind in ("a", "b") else 1.0
            np.testing.assert_allclose(ours.policy[path][kind], left * array, rtol=1e-6, err_msg=f"{path}/{kind}")


def test_checkpoint_brings_back_everything(tmp_path):
    """Two more steps after a restore give the same bits as two more steps without one."""
    batches = [random_batch(seed=s) for s in range(3)]
    ours = backend()
    ours.update([batches[0]], negative_likelihood, lr=0.01)
    ours.freeze_reference()
    ours.update([batches[0]], negative_likelihood, lr=0.01)
    ours.save(tmp_path, 1, {"iteration": 1}, keep=2)
    again = backend(adapter=adapters.init(tiny.CONFIG, adapters.Lora(rank=4), seed=9))
    assert again.restore(tmp_path) == {"iteration": 1}
    for one in (ours, again):
        for batch in batches[1:]:
            one.update([batch], negative_likelihood, lr=0.01)
    for name, array in ours.adapter().items():
        np.testing.assert_array_equal(again.adapter()[name], array)
    np.testing.assert_array_equal(
        again.logprobs(batches[0], reference=True).logprobs, ours.logprobs(batches[0], reference=True).logprobs
    )


@pytest.mark.parametrize(
    ("rank", "targets", "says"),
    [(8, ("q_proj", "o_proj"), r"o_proj.*is \(3, .*this config needs"), (4, _ALL, "is nothing, this config needs")],
)
def test_checkpoint_of_another_shape_is_refused(tmp_path, rank, targets, says):
    backend(adapter=adapters.init(tiny.CONFIG, adapters.Lora(rank=4, targets=("q_proj", "o_proj")), seed=0)).save(
        tmp_path, 0, {}, keep=1
    )
    with pytest.raises(UserError, match=says):
        backend(adapter=adapters.init(tiny.CONFIG, adapters.Lora(rank=rank, targets=targets), seed=0)).restore(tmp_path)


def test_restore_without_a_checkpoint(tmp_path):
    assert backend().restore(tmp_path / "nothing") is None
    (tmp_path / "empty").mkdir()
    assert backend().restore(tmp_path / "empty") is None
