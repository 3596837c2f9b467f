"""The decoder in torch: every family against transformers, PEFT and JAX's decoder; cache, windows, LoRA, recomputation."""

import functools
import json
from collections import Counter
from typing import Any, NamedTuple

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_families
import test_lora
import tiny
import torch
from exact import EPS, ROUNDINGS
from families import VARIANTS
from peft import get_peft_model_state_dict
from speed import quick
from test_families import LENGTHS, LORA, WIDTH, jit, padded, random_batch, seen, separate_logprobs, torch_logits
from torch.utils._python_dispatch import TorchDispatchMode

from ple_jax.backend import model as decoder
from ple_jax.core.errors import UserError
from ple_jax.core.packing import pack
from ple_jax.core.types import Batch, Packed
from ple_jax.models import adapters, weights
from ple_jax.models.adapters import Adapter, Lora
from ple_jax.models.families import read
from torch_ascend import forward as torch_forward
from torch_ascend import lora, ops
from torch_ascend import model as models
from torch_ascend.model import Cache, Model

CPU = torch.device("cpu")


class Family(NamedTuple):
    name: str
    theirs: Any  # transformers' model
    loaded: weights.Loaded
    model: Model  # with modules that an adapter may use


def build(config, raw, weights, settings: Lora = LORA, *, remat="none", dtype=torch.float32) -> Model:
    model = models.create(config, raw, dtype=dtype, device=CPU, ops=ops.REFERENCE, remat=remat)
    models.adapt(model, settings, adapters.resolve(config, settings.targets))
    models.fill(model, weights)
    return model


def build_tiny(settings: Lora = tiny.LORA, weights=None, **options: Any) -> Model:
    return build(tiny.CONFIG, tiny.RAW, weights or tiny.weights(), settings, **options)


def packed_in_torch(batch: Batch) -> Packed:
    """Its rows on the device, as the backend puts it there, every query in a row of its own."""

    def array(x: np.ndarray) -> torch.Tensor:
        return torch.tensor(x.astype(np.int64) if x.dtype == np.int32 else x)

    return jax.tree.map(array, pack(batch))


def mask_of(mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions, and what may be seen, of padded rows."""
    time = mask.shape[1]
    positions = torch.tensor(np.maximum(np.cumsum(mask, 1) - 1, 0))
    return positions, torch.ones(time, time, dtype=torch.bool).tril()[None] & torch.tensor(mask)[:, None]


@torch.no_grad()
def logits(model: Model, tokens: np.ndarray, mask: np.ndarray, adapter: Adapter | None = None) -> np.ndarray:
    positions, visible = mask_of(mask)
    return model.logits(
        model.apply(adapter or {}, torch.tensor(tokens).long(), positions=positions, mask=visible)
    ).numpy()


def jax_logits(loaded: weights.Loaded, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    model = decoder.Model.create(loaded.config, dtype=jnp.float32, scan=True)
    base = decoder.fill(model, loaded.weights, lambda _, array: jnp.asarray(array))

    @jit
    def ours(base, tokens, mask):  # to the letter test_families': what that compiled is found on disk
        positions, visible = seen(mask)
        hidden, _ = model.apply(base, {}, tokens, positions=positions, mask=visible)
        return model.logits(base, hidden)

    return np.asarray(ours(base, tokens, mask))


@pytest.fixture(scope="module", params=quick(VARIANTS, "gpt2", "gemma3_text", "qwen3_moe"))
def family(request, tmp_path_factory) -> Family:
    """One variant, saved by transformers and read by us."""
    theirs, folder = families.build(VARIANTS[request.param]), tmp_path_factory.mktemp(request.param)
    families.save(theirs, folder)
    loaded = weights.load(str(folder))
    return Family(request.param, theirs, loaded, build(loaded.config, loaded.raw, loaded.weights))


# ---------------------------------------------------------------- logits


def test_logits_equal_transformers_and_jax(family):
    for side in ("left", "right"):
        tokens, mask = padded(side)
        ours = logits(family.model, tokens, mask)
        assert np.isfinite(ours).all()  # padding, which sees nothing, too
        np.testing.assert_allclose(ours[mask], torch_logits(family.theirs, tokens, mask)[mask], atol=1e-4, rtol=0)
    np.testing.assert_allclose(ours[mask], jax_logits(family.loaded, tokens, mask)[mask], atol=1e-4, rtol=0)


@torch.no_grad()
def test_decoding_token_by_token_gives_the_same_logits(family):
    """The first tokens in one go, the others one at a time, each row at its own position; windows are shorter than rows."""
    model, prefill = family.model, 4
    tokens, mask = padded("left")
    positions, visible = mask_of(mask)
    cache = Cache.empty(model.config, len(LENGTHS), WIDTH, dtype=torch.float32, device=CPU)

    def some(start: int, end: int, index: int | torch.Tensor) -> torch.Tensor:
        hidden = model.apply(
            {}, torch.tensor(tokens[:, start:end]).long(), positions=positions[:, start:end], mask=visible[:, start:end],
            source_positions=positions, cache=cache, index=index,
        )  # fmt: skip
        return model.logits(hidden)

    steps = (some(i, i + 1, torch.tensor([i])) for i in range(prefill, WIDTH))
    ours = torch.cat([some(0, prefill, 0), *steps], 1).numpy()
    np.testing.assert_allclose(ours[mask], torch_logits(family.theirs, tokens, mask)[mask], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_smollm2_equals_jax():
    """The real model: logits of one prompt."""
    loaded = weights.load("smollm2-135m")
    tokens = np.array([loaded.tokenizer.encode("I had never heard of this director before my sister")], np.int32)
    mask = np.ones(tokens.shape, bool)
    ours = logits(build(loaded.config, loaded.raw, loaded.weights), tokens, mask)
    np.testing.assert_allclose(ours, jax_logits(loaded, tokens, mask), atol=1e-4, rtol=0)


def test_logits_of_bfloat16_weights_are_not_rounded():
    model = build_tiny(dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and {p.dtype for p in model.module.parameters()} == {torch.bfloat16}
    hidden = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = torch.tensor(tiny.weights()["lm_head.weight"]).bfloat16()
    exact = hidden.double() @ weights.double().T
    assert model.logits(hidden).dtype == torch.float32
    torch.testing.assert_close(model.logits(hidden).double(), exact, rtol=1e-5, atol=1e-5)


def test_what_is_made_is_frozen_and_made_once():
    """Parameters have no memory until they are filled; rotary frequencies, which no checkpoint has, are right at once."""
    model = models.create(tiny.CONFIG, tiny.RAW, dtype=torch.float32, device=CPU, ops=ops.REFERENCE)
    assert {p.device.type for p in model.module.parameters()} == {"meta"}
    assert {b.device.type for b in model.module.buffers()} == {"cpu"}
    places: list[set[str]] = []
    models.fill(model, tiny.weights(), layer_done=lambda layer: places.append({p.device.type for p in layer.parameters()}))
    assert places == [{"cpu"}] * 3
    assert not any(p.requires_grad or p.device.type == "meta" for p in model.module.parameters())
    assert not any(part.training for part in model.module.modules())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), r"layers\.1\.mlp\.up_proj.*is not among the weights"),
        (lambda w: w.update({"model.norm.weight": np.ones(31, np.float32)}), r"norm\.weight has shape \(31,\).*\(32,\)"),
    ],
)
def test_weights_that_do_not_fit(change, says):
    weights = tiny.weights()
    change(weights)
    with pytest.raises(UserError, match=says):
        build_tiny(weights=weights)


# ---------------------------------------------------------------- LoRA, packed rows and their gradients


def test_packed_rows_and_their_gradients_equal_peft(family):
    """[prompt | response 1 | response 2] in one row: each response's log-probabilities, and what they ask of LoRA."""
    theirs, batch = test_families.adapted(family), random_batch()
    adapter = adapters.from_peft({name: x.numpy() for name, x in get_peft_model_state_dict(theirs).items()})
    leaves = lora.trainable(adapter, CPU)
    weights = torch.tensor(np.random.default_rng(2).normal(size=batch.response.shape).astype(np.float32))
    ours = torch_forward.outputs(family.model, leaves, packed_in_torch(batch)).logprobs
    expected = separate_logprobs(theirs, batch)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)
    (weights * ours).sum().backward()
    (weights * expected).sum().backward()
    named = {n.replace(".default", ""): p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    gradients = adapters.to_peft({path: {k: x.grad for k, x in module.items()} for path, module in leaves.items()})
    assert sorted(gradients) == sorted(named)
    for name, wanted in named.items():
        np.testing.assert_allclose(gradients[name], wanted, atol=5e-5 * np.abs(wanted).max(), rtol=0, err_msg=name)


@functools.cache
def raw_of(name: str) -> dict[str, Any]:
    return json.loads(test_lora.bare(name).config.to_json_string())


@pytest.mark.parametrize("name", quick(test_lora.CASES, "patterns", "everything"))
def test_every_option_of_lora_equals_peft(name):
    """Scales, patterns, some modules alone, DoRA: logits and gradients."""
    kind, options = test_lora.CASES[name]
    theirs = test_lora.in_peft(kind, options)
    named = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    named = {n.removesuffix(".weight") if "magnitude" in n else n: p for n, p in named.items()}
    leaves = lora.trainable(adapters.from_peft({n: p.detach().numpy() for n, p in named.items()}), CPU)
    model = build(test_lora.CONFIGS[kind], raw_of(kind), test_lora.weights(kind), options)
    tokens = torch.tensor(test_lora.TOKENS).long()
    mix = torch.randn(*tokens.shape, families.VOCAB, generator=torch.Generator().manual_seed(1))
    positions, visible = mask_of(np.ones(tokens.shape, bool))
    # the head is frozen, and `logits` is no way to a gradient: the head's matrix is
    ours = model.logits(model.apply(leaves, tokens, positions=positions, mask=visible))
    expected = theirs(input_ids=tokens).logits
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    (mix * ours).sum().backward()
    (mix * expected).sum().backward()
    gradients = adapters.to_peft({path: {k: x.grad for k, x in module.items()} for path, module in leaves.items()})
    assert gradients.keys() == named.keys()
    for n, parameter in named.items():
        largest = parameter.grad.abs().max().item()
        np.testing.assert_allclose(gradients[n], parameter.grad.numpy(), atol=5e-5 * largest, rtol=0, err_msg=n)


@pytest.mark.parametrize("kind", ["llama-bias", "gpt2"])
def test_magnitudes_are_the_norms_of_what_is_adapted(kind):
    """Of W where b is zero, so that a fresh DoRA adapter is the base; of W + scale A B where it is not."""
    config, weights, options = test_lora.CONFIGS[kind], test_lora.weights(kind), Lora(4, 6.0, dora=True)
    model, axis = build(config, raw_of(kind), weights, options), 0 if kind == "gpt2" else 1
    fresh = lora.magnitudes(model.module, adapters.init(config, options, seed=0), CPU)
    for path, module in fresh.items():
        exact = np.linalg.norm(weights[f"{path}.weight"].astype(np.float64), axis=axis)
        np.testing.assert_allclose(module["m"], exact, rtol=1e-6)
    tokens, mask = padded("left")
    plain = logits(model, tokens, mask)
    np.testing.assert_allclose(logits(model, tokens, mask, lora.trainable(fresh, CPU))[mask], plain[mask], atol=1e-5)
    rng = np.random.default_rng(0)
    some = {p: m | {"b": rng.normal(0, 0.2, m["b"].shape).astype(np.float32)} for p, m in fresh.items()}
    for path, module in lora.magnitudes(model.module, some, CPU).items():
        low = 1.5 * (module["a"].astype(np.float64) @ module["b"])
        exact = np.linalg.norm(weights[f"{path}.weight"] + (low if axis == 0 else low.T), axis=axis)
        np.testing.assert_allclose(module["m"], exact, rtol=1e-5)


def test_an_output_without_weights_has_a_gradient_under_dora():
    """It has no direction: a division by its norm would be NaN, which the clipping would spread to everything."""
    weights = tiny.weights()
    weights["model.layers.1.mlp.up_proj.weight"] *= (np.arange(48) != 5)[:, None]
    options = Lora(4, dora=True, targets=("up_proj",))
    model = build_tiny(options, weights)
    leaves = lora.trainable(lora.magnitudes(model.module, adapters.init(tiny.CONFIG, options, seed=0), CPU), CPU)
    tokens, mask = padded("left")
    positions, visible = mask_of(mask)
    hidden = model.apply(leaves, torch.tensor(tokens % 101).long(), positions=positions, mask=visible)
    hidden.square().sum().backward()
    assert leaves["model.layers.1.mlp.up_proj"]["m"].grad.any()
    assert all(leaf.grad.isfinite().all() for leaf in lora.leaves(leaves).values())


def test_dropout_is_of_gradients_alone():
    """With A and B the identity, what an adapter adds is its input: whole without gradients, else zeroed or scaled up."""
    options, n = Lora(rank=64, alpha=64.0, dropout=0.25), 64
    base = torch.nn.Linear(n, n, bias=False).requires_grad_(False)
    adapter = {"m": {"a": torch.eye(n), "b": torch.eye(n)}}
    module = lora.Linear(base, "m", options, lambda: adapter, transposed=False)
    x = 1 + torch.rand(200, n)
    with torch.no_grad():
        torch.testing.assert_close(module(x) - base(x), x, atol=1e-5, rtol=0)
    ratio = (module(x) - base(x)) / x
    kept = ratio > 0.5
    torch.testing.assert_close(ratio, torch.where(kept, 1 / 0.75, 0.0), atol=1e-5, rtol=0)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=5 * (0.25 * 0.75 / kept.numel()) ** 0.5)


# ---------------------------------------------------------------- recomputation


class Matmuls(TorchDispatchMode):
    """Counts them."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))

    def __call__(self) -> int:
        return sum(self.counts[op] for op in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm))

    def activations(self) -> int:
        return self.counts[torch.ops.aten.silu]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_changes_no_gradient(dropout):
    """`full` computes every layer twice, `dots` all but its matmuls; the adapter and the dropout are the forward pass's."""
    settings = Lora(rank=4, alpha=8.0, dropout=dropout)
    batch, found = random_batch(), {}
    vocab = tiny.CONFIG.vocab_size
    packed = packed_in_torch(batch._replace(prompt=batch.prompt % vocab, response=batch.response % vocab))
    for remat in ("none", "dots", "full"):
        model, leaves = build_tiny(settings, remat=remat), lora.trainable(tiny.random_adapter(tiny.CONFIG), CPU)
        torch.manual_seed(0)
        with Matmuls() as forward:
            total = torch_forward.outputs(model, leaves, packed).logprobs.sum()
        with Matmuls() as backward:
            total.backward()
        found[remat] = {name: leaf.grad for name, leaf in lora.leaves(leaves).items()}, forward, backward
    plain, forward, backward = found["none"]
    assert backward.activations() == 0 and found["dots"][2].activations() == found["full"][2].activations() == 3
    linear = 3 * 7 * 3  # each is W x, A x and B A x; a layer's last result is not needed again
    assert 0.9 * linear < found["full"][2]() - backward() <= linear <= forward()
    assert found["dots"][2]() == backward()
    for remat in ("dots", "full"):
        for name, gradient in found[remat][0].items():
            torch.testing.assert_close(gradient, plain[name], rtol=0, atol=1e-6 * plain[name].abs().max().item())


def test_base_alone_takes_no_part_in_gradients():
    """An adapter given once is not there in the next call."""
    model = build_tiny()
    tokens, mask = padded("left")
    tokens = tokens % 101
    base = logits(model, tokens, mask)
    adapted = logits(model, tokens, mask, lora.trainable(tiny.random_adapter(tiny.CONFIG), CPU))
    assert np.abs(adapted - base)[mask].max() > 0.1
    np.testing.assert_array_equal(logits(model, tokens, mask), base)
    positions, visible = mask_of(mask)
    assert not model.apply({}, torch.tensor(tokens).long(), positions=positions, mask=visible).requires_grad


def test_gradient_of_jax_on_a_model_with_caps():
    """Gemma 2's logits are capped, and its scores: log-probabilities and their gradient are JAX's."""
    theirs = families.build(VARIANTS["gemma2"])
    raw = json.loads(theirs.config.to_json_string())
    weights = {n: p.detach().numpy() for n, p in theirs.named_parameters()}
    config = read(raw, "gemma2")
    adapter = test_lora.randomised(adapters.init(config, LORA, seed=0))
    batch = random_batch()
    mix = np.random.default_rng(2).normal(size=batch.response.shape).astype(np.float32)
    model = decoder.Model.create(config, dtype=jnp.float32, scan=False)
    base = decoder.fill(model, weights, lambda _, array: jnp.asarray(array))
    from ple_jax.backend import forward as jax_forward
    from ple_jax.backend import lora as jax_lora

    @jit
    def jax_gradient(adapter, base, packed):
        def total(adapter):
            said = jax_forward.outputs(model, base, jax_lora.fuse(model, adapter, LORA), packed).logprobs
            return (mix * said).sum(), said

        return jax.grad(total, has_aux=True)(adapter)

    wanted, said = jax_gradient(adapter, base, pack(batch))

    def torch_gradient(weights):
        leaves = lora.trainable(adapter, CPU)
        ours = torch_forward.outputs(build(config, raw, weights), leaves, packed_in_torch(batch)).logprobs
        (torch.tensor(mix) * ours).sum().backward()
        return ours.detach().numpy(), {name: leaf.grad.numpy() for name, leaf in lora.leaves(leaves).items()}

    ours, gradient = torch_gradient(weights)
    # the room that float32 is given: what as many roundings of all weights change (see exact.py, which knows Llama alone)
    rng = np.random.default_rng(0)
    near = {n: (x * (1 + ROUNDINGS * EPS * rng.normal(size=x.shape))).astype(np.float32) for n, x in weights.items()}
    others, moved = torch_gradient(near)
    room, scale = np.abs(others - ours).max(), max(np.abs(x).max() for x in jax.tree.leaves(wanted))
    assert room < 1e-3
    np.testing.assert_allclose(ours, said, atol=room, rtol=0)
    room = max(np.abs(moved[name] - x).max() for name, x in gradient.items())
    assert room < 1e-3 * scale
    for name, x in lora.leaves(wanted).items():
        np.testing.assert_allclose(gradient[name], x, atol=room, rtol=0, err_msg=name)
