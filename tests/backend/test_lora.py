"""LoRA: against PEFT (logits and gradients, every option), as algebra, from a folder, and in the backend."""

import functools
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
import transformers
from families import VARIANTS
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import FrozenConfigDict
from peft import LoraConfig, PeftModel, get_peft_model
from speed import quick
from test_train import negative_likelihood, random_batch

from configs import tiny as tiny_config
from ple_jax import main, modes
from ple_jax.backend import backend as jax_backend
from ple_jax.backend import lora, sharding, train
from ple_jax.backend.model import Linear, LowRank, Model, fill
from ple_jax.core.config import validate
from ple_jax.core.errors import UserError
from ple_jax.core.packing import pack
from ple_jax.core.types import Sampling
from ple_jax.models import adapters, peft
from ple_jax.models import weights as checkpoints
from ple_jax.models.adapters import Lora
from ple_jax.models.config import ModelConfig
from ple_jax.models.families import FAMILIES as TABLE
from ple_jax.models.families import read
from ple_jax.models.layout import module_shapes

# what is compiled here runs once: most of the time would go into optimising it
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

LAYERS = 2
# split, fused (qkv_proj, gate_up_proj), fused and transposed (Conv1D), interleaved by head
FAMILIES = ("llama-bias", "phi3", "gpt2", "gpt_neox")
TOKENS = np.random.default_rng(0).integers(1, 256, (2, 10)).astype(np.int32)


def bare(family: str) -> transformers.PreTrainedModel:
    """transformers' model."""
    return families.build(VARIANTS[family], **{"n_layer" if family == "gpt2" else "num_hidden_layers": LAYERS})


CONFIGS = {family: read(bare(family).config.to_dict(), family) for family in FAMILIES}


@functools.cache
def weights(family: str) -> dict[str, np.ndarray]:
    named = {name: p.detach().numpy() for name, p in bare(family).named_parameters()}
    return {name.replace("lm_head", TABLE[CONFIGS[family].family].head): weight for name, weight in named.items()}


def build(
    config: ModelConfig, tensors: dict[str, np.ndarray], *, scan: bool, quantize: str = "none", **options: Any
) -> tuple[Model, Any]:
    model = Model.create(config, scan=scan, **options)
    return model, fill(model, tensors, lambda _, array: jax.tree.map(jnp.asarray, array), quantize=quantize)


@functools.cache
def held(family: str, scan: bool) -> tuple[Model, Any]:
    return build(CONFIGS[family], weights(family), scan=scan)


def logits(model: Model, base: Any, fused: Any) -> jax.Array:
    rows, time = TOKENS.shape
    positions = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32)[None], (rows, time))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((time, time), bool))[None], (rows, time, time))
    return model.logits(base, model.apply(base, fused, jnp.asarray(TOKENS), positions=positions, mask=mask)[0])


def randomised(adapter: adapters.Adapter, seed: int = 1) -> adapters.Adapter:
    """Matrices that do something, and magnitudes that are no longer the base's norms."""
    rng = np.random.default_rng(seed)

    def leaf(path: tuple, x: np.ndarray) -> np.ndarray:
        noise = rng.normal(0, 0.2, x.shape)
        return (x * (1 + noise) if path[-1].key == "m" else noise).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, adapter)


def low_ranks(fused: Any) -> list[LowRank]:
    return jax.tree.leaves(fused, is_leaf=lambda x: isinstance(x, LowRank))


def assert_near(ours: Any, expected: Any, atol: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=0), ours, expected)


# ---------------------------------------------------------------- against PEFT


CASES = {
    "split": ("llama-bias", Lora(4, 6.0)),
    "rslora": ("gpt2", Lora(4, 6.0, rslora=True)),
    "patterns": (
        "llama-bias",
        Lora(
            4, 6.0, ("q_proj", "v_proj", "mlp.up_proj"),
            {"q_proj": 2, r"layers\.[1-9]\.mlp\.up_proj": 7}, {"1.self_attn.v_proj": 11.0},
        ),
    ),
    "some layers": ("llama-bias", Lora(4, 6.0, ("layers.1.self_attn.k_proj", "0.mlp.down_proj"))),
    "dora": ("llama-bias", Lora(4, 6.0, dora=True)),
    "dora on a part of a kernel": ("llama-bias", Lora(4, 6.0, ("q_proj", "up_proj"), dora=True)),
    "dora on some layers": ("llama-bias", Lora(4, 6.0, ("1.self_attn.v_proj", "0.mlp.gate_proj"), dora=True)),
    "dora fused": ("phi3", Lora(4, 6.0, dora=True)),
    "dora transposed": ("gpt2", Lora(4, 6.0, ("c_attn", "mlp.c_proj"), dora=True)),
    "dora interleaved": ("gpt_neox", Lora(4, 6.0, dora=True)),
    "everything": (
        "phi3",
        Lora(
            4, 6.0, rank_pattern={"0.self_attn.qkv_proj": 3, "down_proj": 6}, alpha_pattern={"o_proj": 1.5},
            rslora=True, dora=True,
        ),
    ),
}  # fmt: skip
# scanned every other one, and both ways where layers differ
WAYS = {name: {i % 2 == 0} for i, name in enumerate(CASES)}
WAYS |= dict.fromkeys(("patterns", "dora on some layers", "everything"), {False, True})
QUICK = ("rslora", False), ("patterns", True), ("everything", False)


def in_peft(family: str, options: Lora) -> Any:
    """PEFT's model of the same settings, with random matrices and magnitudes."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules="all-linear" if "all-linear" in options.targets else list(options.targets),
        rank_pattern=dict(options.rank_pattern),
        alpha_pattern=dict(options.alpha_pattern),
        use_rslora=options.rslora,
        use_dora=options.dora,
        fan_in_fan_out=family == "gpt2",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(bare(family), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= 1 + 0.3 * torch.randn_like(parameter)
            elif "lora_" in name:
                parameter.normal_(0, 0.2)
    return model


@pytest.mark.parametrize(
    "case", quick([(name, scan) for name, ways in WAYS.items() for scan in sorted(ways)], *QUICK), ids=str
)
def test_logits_and_gradients_equal_peft(case):
    name, scan = case
    family, options = CASES[name]
    theirs = in_peft(family, options)
    named = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    # in memory a magnitude is a module's weight, in a file it has the module's name
    named = {n.removesuffix(".weight") if "magnitude" in n else n: p for n, p in named.items()}
    adapter = adapters.from_peft({n: p.detach().numpy() for n, p in named.items()})
    assert adapter.keys() == set(adapters.resolve(CONFIGS[family], options.targets))
    model, base = held(family, scan)
    mix = np.random.default_rng(1).normal(size=(*TOKENS.shape, families.VOCAB)).astype(np.float32)

    @jit
    def ours(adapter, base):
        def total(adapter):
            said = logits(model, base, lora.fuse(model, adapter, options, base=base))
            return (mix * said).sum(), said

        return jax.grad(total, has_aux=True)(adapter)

    gradients, said = ours(adapter, base)
    kernels = jit(lambda base, adapter: lora.fold(model, base, adapter, options))(base, adapter)
    folded = jit(lambda base: logits(model, base, {}))(lora.folded(base, kernels))
    np.testing.assert_allclose(folded, said, atol=1e-4, rtol=0)
    expected = theirs(input_ids=torch.tensor(TOKENS).long()).logits
    np.testing.assert_allclose(said, expected.detach().numpy(), atol=1e-4, rtol=0)
    (torch.from_numpy(mix) * expected).sum().backward()
    gradients = adapters.to_peft(gradients)
    assert gradients.keys() == named.keys()
    for n, parameter in named.items():
        largest = parameter.grad.abs().max().item()
        assert largest > 0
        np.testing.assert_allclose(gradients[n], parameter.grad.numpy(), atol=1e-4 * largest, rtol=0, err_msg=n)


TARGETS = {
    "llama-bias": [("q_proj",), ("self_attn.o_proj", "mlp.up_proj"), ("layers.0.mlp.down_proj",), ("1.mlp.gate_proj",)],
    "gpt2": [("c_proj",), ("attn.c_proj",), ("c_attn", "mlp.c_proj"), ("h.1.mlp.c_proj", "c_fc")],
    "gpt_neox": [("dense",), ("query_key_value", "dense_h_to_4h")],
    "phi3": [("qkv_proj",), ("gate_up_proj", "down_proj")],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_mean_what_they_mean_in_peft(family):
    for targets in [("all-linear",), *TARGETS[family]]:
        names = targets[0] if "all-linear" in targets else list(targets)
        config = LoraConfig(target_modules=names, fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM")
        theirs = get_peft_model(bare(family), config).targeted_module_names
        ours = adapters.resolve(CONFIGS[family], targets)
        assert set(ours) == set(theirs) and len(ours) == len(theirs)


@pytest.mark.parametrize("targets", [("q_porj",), ("q_proj", "c_proj"), ("proj",), ("lm_head",), ("layers.3.mlp.up_proj",)])
def test_targets_that_are_not_there(targets):
    says = re.escape(f"names {targets[-1]!r}, which is no linear module of this llama model")
    with pytest.raises(UserError, match=says) as error:
        adapters.resolve(tiny.CONFIG, targets)
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(error.value)
    assert targets != ("q_porj",) or "did you mean 'q_proj'" in str(error.value)


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing(name):
    with pytest.raises(UserError, match="'up_porj', which is the end of no adapted module's path, such as model.layers.0"):
        adapters.init(tiny.CONFIG, Lora(**{name: {"q_proj": 4, "up_porj": 2}}), seed=0)


# ---------------------------------------------------------------- a fresh adapter


def test_init():
    options = Lora(rank=4, targets=("q_proj", "down_proj"), rank_pattern={"1.mlp.down_proj": 6})
    adapter = adapters.init(tiny.CONFIG, options, seed=0)
    assert list(adapter) == [p for p, *_ in module_shapes(tiny.CONFIG) if p.endswith(("q_proj", "down_proj"))]
    ranks = {path: 6 if path == "model.layers.1.mlp.down_proj" else 4 for path in adapter}
    for path, _, inp, out in module_shapes(tiny.CONFIG):
        if path in adapter:
            assert adapter[path]["a"].shape == (inp, ranks[path]) and adapter[path]["b"].shape == (ranks[path], out)
            # Kaiming's uniform bound with a = sqrt(5) is 1 / sqrt(fan_in), as in PEFT
            assert 0.8 * inp**-0.5 < np.abs(adapter[path]["a"]).max() <= inp**-0.5
            assert not adapter[path]["b"].any()
    again = adapters.init(tiny.CONFIG, Lora(rank=4, targets=("2.mlp.down_proj",)), seed=0)
    for path, module in again.items():  # a module's noise does not depend on which others there are
        np.testing.assert_array_equal(module["a"], adapter[path]["a"])
    assert len({module["a"].tobytes() for module in adapter.values()}) == len(adapter)
    assert adapters.count(adapter) == sum(ranks[p] * (i + o) for p, _, i, o in module_shapes(tiny.CONFIG) if p in adapter)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", ["llama-bias", "gpt2"])
def test_a_fresh_adapter_is_the_base_bit_for_bit(family, scan):
    model, base = held(family, scan)
    options = Lora(rank_pattern={next(module_shapes(CONFIGS[family]))[0]: 3})  # another rank in one layer
    adapter = adapters.init(CONFIGS[family], options, seed=0)
    said = jit(lambda base, adapter: logits(model, base, lora.fuse(model, adapter, options)))
    np.testing.assert_array_equal(said(base, adapter), said(base, {}))


@pytest.mark.parametrize(
    ("dtype", "quantize", "scan"),
    [
        ("float32", "none", True),
        pytest.param("bfloat16", "none", False, marks=pytest.mark.slow),
        pytest.param("float32", "int8", False, marks=pytest.mark.slow),
        pytest.param("bfloat16", "nf4", True, marks=pytest.mark.slow),
    ],
)
def test_a_fresh_dora_is_the_base_as_it_is_held(dtype, quantize, scan):
    """Rounded or quantised: the norms of the stored weights would change what the model says from the first step on."""
    options = Lora(dora=True, targets=("q_proj", "o_proj", "up_proj"))
    model, base = build(tiny.CONFIG, tiny.weights(), scan=scan, dtype=jnp.dtype(dtype), quantize=quantize)
    adapter = lora.magnitudes(model, base, adapters.init(tiny.CONFIG, options, seed=0), options)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(adapter))
    fused = jit(lambda base, adapter: lora.fuse(model, adapter, options, base=base))(base, adapter)
    assert len(low_ranks(fused)) == 3 * (1 if scan else tiny.CONFIG.num_layers)
    for low in low_ranks(fused):
        np.testing.assert_allclose(low.gain, 1, atol=1e-6)
    if (dtype, quantize) == ("float32", "none"):
        for path, module in adapter.items():
            exact = np.linalg.norm(tiny.weights()[f"{path}.weight"].astype(np.float64), axis=1)
            np.testing.assert_allclose(module["m"], exact, rtol=1e-6)


def test_an_output_without_weights_has_a_gradient_under_dora():
    """It has no direction: a division by its norm would be NaN, which the clipping would spread to everything."""
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = tiny.weights()
    tensors[name] = tensors[name] * (np.arange(48) != 5)[:, None]
    options = Lora(4, dora=True, targets=("up_proj",))
    model, base = build(tiny.CONFIG, tensors, scan=False)
    adapter = lora.magnitudes(model, base, adapters.init(tiny.CONFIG, options, seed=0), options)
    gradients = jit(jax.grad(lambda a: (logits(model, base, lora.fuse(model, a, options, base=base)) ** 2).sum()))(adapter)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


# ---------------------------------------------------------------- as algebra


@st.composite
def options_of(draw, family: str, *, dora: bool = False) -> Lora:
    paths = [path for path, *_ in module_shapes(CONFIGS[family])]
    names = {module.name for _, module, *_ in module_shapes(CONFIGS[family])}
    some = st.lists(st.sampled_from(paths + sorted(names)), min_size=1, max_size=4)
    targets = draw(st.just(["all-linear"]) | some)
    patterns = st.dictionaries(st.sampled_from(adapters.resolve(CONFIGS[family], targets)), st.integers(1, 6), max_size=3)
    rank, alpha = draw(st.integers(1, 5)), draw(st.floats(0.5, 8))
    return Lora(rank, alpha, targets, draw(patterns), draw(patterns), rslora=draw(st.booleans()), dora=dora)


def kernels(model: Model, base: Any, fused: Any) -> list[dict[str, jax.Array]]:
    """The kernels that a fused adapter makes of the base's, by layer."""

    def layer(tree: Any, i: int) -> Any:
        return jax.tree.map(lambda x: x[i], tree) if model.scan else tree[i]

    made = []
    for i in range(model.config.num_layers):
        made.append({name: part["kernel"] for name, part in layer(base["layers"], i).items() if "kernel" in part})
        for name, low in (layer(fused["layers"], i) if fused else {}).items():
            whole = made[i][name] + jnp.tensordot(low.down, low.up, 1)
            made[i][name] = whole if low.gain is None else low.gain[None] * whole
    return made


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3)
@given(data=st.data(), dora=st.booleans(), seed=st.integers(0, 99))
def test_merging_is_applying(family, data, dora, seed):
    options = data.draw(options_of(family, dora=dora))
    adapter = adapters.init(CONFIGS[family], options, seed=0)
    if dora:
        norms = {f"{path}.weight": weights(family)[f"{path}.weight"] for path in adapter}
        axis = 0 if family == "gpt2" else 1
        adapter = {p: module | {"m": np.linalg.norm(norms[f"{p}.weight"], axis=axis)} for p, module in adapter.items()}
    adapter = randomised(adapter, seed)
    merged = adapters.merge(CONFIGS[family], weights(family), adapter, options)
    expected = kernels(*build(CONFIGS[family], merged, scan=False), {})

    @jit
    def ours(bases, adapter):
        models = {scan: held(family, scan)[0] for scan in bases}
        return [kernels(m, bases[s], lora.fuse(m, adapter, options, base=bases[s])) for s, m in models.items()]

    unrolled, scanned = ours({scan: held(family, scan)[1] for scan in (False, True)}, adapter)
    assert_near(unrolled, expected, 2e-5)
    assert_near(scanned, expected, 2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20)
@given(data=st.data(), seed=st.integers(0, 99))
def test_unmerging_gives_the_base_back(family, data, seed):
    options = data.draw(options_of(family))
    adapter = randomised(adapters.init(CONFIGS[family], options, seed=0), seed)
    merged = adapters.merge(CONFIGS[family], weights(family), adapter, options)
    again = adapters.unmerge(CONFIGS[family], merged, adapter, options)
    assert again.keys() == weights(family).keys()
    for name, weight in weights(family).items():
        assert np.array_equal(merged[name], weight) == (name.removesuffix(".weight") not in adapter)
        np.testing.assert_allclose(again[name], weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20)
@given(data=st.data(), seed=st.integers(0, 99))
def test_stacking_adds_up_and_commutes(family, data, seed):
    config, tensors = CONFIGS[family], weights(family)
    pairs = []
    for i in range(data.draw(st.integers(2, 3))):
        options = data.draw(options_of(family))
        pairs.append((randomised(adapters.init(config, options, seed=0), seed + i), options))
    one_after_the_other = tensors
    for pair in pairs:
        one_after_the_other = adapters.merge(config, one_after_the_other, *pair)
    for order in (pairs, pairs[::-1]):
        together, options = adapters.stack(order)
        assert together.keys() == set(adapters.resolve(config, options.targets))
        for path, module in together.items():
            assert options.scale_of(path) == 1 and options.rank_of(path) == len(module["b"])
            delta = sum(o.scale_of(path) * np.float64(a[path]["a"]) @ a[path]["b"] for a, o in pairs if path in a)
            np.testing.assert_allclose(np.float64(module["a"]) @ module["b"], delta, atol=1e-5, rtol=0)
        assert_near(adapters.merge(config, tensors, together, options), one_after_the_other, 1e-5)


def test_dora_neither_stacks_nor_unmerges():
    options = Lora(4, dora=True)
    adapter = adapters.init(tiny.CONFIG, options, seed=0)
    with pytest.raises(ValueError, match="do not add up"):
        adapters.stack([(adapter, options), (adapter, options)])
    with pytest.raises(ValueError, match="keep the base weights"):
        adapters.unmerge(tiny.CONFIG, tiny.weights(), adapter, options)


@pytest.mark.parametrize("dora", [False, True])
def test_names_go_there_and_back(dora):
    adapter = randomised(adapters.init(tiny.CONFIG, Lora(3, dora=dora), seed=0))
    named = adapters.to_peft(adapter)
    prefix = "base_model.model.model.layers.2.mlp.down_proj"
    assert named[f"{prefix}.lora_A.weight"].shape == (3, 48) and named[f"{prefix}.lora_B.weight"].shape == (32, 3)
    assert (f"{prefix}.lora_magnitude_vector" in named) == dora
    np.testing.assert_equal(adapters.from_peft(named), adapter)


# ---------------------------------------------------------------- precision and dropout


def test_over_a_bfloat16_base_the_adapter_is_rounded_where_it_is_multiplied_alone():
    """A product of roundings, added in fp32, and rounded once; weights and gradients stay fp32."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((2, 5, 16), (16, 8)))
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((16, 3), (3, 8)))
    linear = Linear((16, 8), False, jnp.bfloat16, whole=True)
    linear.kernel = nnx.Param(w)
    ours = np.asarray(linear(x, LowRank(jnp.asarray(a), jnp.asarray(b))))
    assert ours.dtype == ml_dtypes.bfloat16

    def rounded(values) -> np.ndarray:
        return np.asarray(values, np.float64).astype(ml_dtypes.bfloat16).astype(np.float64)

    low = rounded(np.asarray(x, np.float64) @ rounded(a)) @ rounded(b)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64) + low
    np.testing.assert_array_equal(ours, exact.astype(ml_dtypes.bfloat16))
    gradients = jax.grad(lambda a, b: linear(x, LowRank(a, b)).astype(jnp.float32).sum(), (0, 1))(a, b)
    assert {g.dtype for g in gradients} == {np.dtype(np.float32)}


def dropped(key: int, rate: float, x: np.ndarray) -> np.ndarray:
    """What is left of an adapter's input."""
    one = jnp.eye(x.shape[-1])
    linear = Linear((x.shape[-1],) * 2, False, jnp.float32, whole=True)  # the kernel is zero
    number = jnp.arange(x[..., 0].size).reshape(x.shape[:-1])
    return np.asarray(linear(jnp.asarray(x), LowRank(one, one, dropout=(jax.random.key(key), number, jnp.float32(rate)))))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_share_and_the_mean(rate):
    x = np.ones((64, 50, 32), np.float32)
    left = dropped(0, rate, x)
    np.testing.assert_allclose(left[left != 0], 1 / (1 - rate), rtol=1e-6)
    deviation = (rate * (1 - rate) / x.size) ** 0.5
    assert abs((left == 0).mean() - rate) < 4 * deviation
    assert abs(left.mean() - 1) < 4 * deviation / (1 - rate)
    for axis, size in enumerate(x.shape):  # whole rows, positions or features are not dropped together
        others = tuple({0, 1, 2} - {axis})
        assert (left == 0).mean(others).std() < 2 * deviation * size**0.5
    np.testing.assert_array_equal(left, dropped(0, rate, x))
    assert (left != dropped(1, rate, x)).mean() > rate * (1 - rate)


def test_every_layer_and_kernel_has_a_draw_of_its_own():
    adapter, keys = tiny.random_adapter(tiny.CONFIG), {}
    for scan in (False, True):
        model = Model.create(tiny.CONFIG, scan=scan)
        draw = jax.random.key(3), jnp.arange(6).reshape(2, 3)
        lows = low_ranks(lora.fuse(model, adapter, replace(tiny.LORA, dropout=0.25), dropout=draw))
        assert all(np.all(low.dropout[2] == 0.25) for low in lows)
        data = [np.reshape(jax.random.key_data(low.dropout[0]), (-1, 2)).tolist() for low in lows]
        keys[scan] = {tuple(key) for layers in data for key in layers}
        # no key is given to sample or to evaluate, and none counts where the rate is zero
        for fused in (
            lora.fuse(model, adapter, replace(tiny.LORA, dropout=0.25)),
            lora.fuse(model, adapter, tiny.LORA, dropout=draw),
        ):
            assert all(low.dropout is None for low in low_ranks(fused))
    assert keys[False] == keys[True] and len(keys[True]) == 4 * tiny.CONFIG.num_layers


@pytest.mark.slow
def test_gradients_under_dropout():
    """The same key gives the same, however layers are arranged and whatever is recomputed; another key another."""
    options = replace(tiny.LORA, dropout=0.25)
    batch, adapter = random_batch(rows=2), tiny.random_adapter(tiny.CONFIG)

    def gradients(key: int, *, scan: bool, remat: str = "none") -> Any:
        model, base = build(tiny.CONFIG, tiny.weights(), scan=scan, remat=remat)

        @jit
        def step(base, adapter, key):
            data = batch, pack(batch), jnp.float32(1), key
            return train.gradients(model, options, negative_likelihood, base, adapter, *data)[0]

        return jax.device_get(step(base, adapter, jax.random.key(key)))

    one, other = gradients(0, scan=True), gradients(1, scan=True)
    size = max(np.abs(x).max() for x in jax.tree.leaves(one))
    assert max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True)) > 0.05 * size
    for again in (gradients(0, scan=False), gradients(0, scan=True, remat="full")):
        assert_near(again, one, 1e-4 * size)


# ---------------------------------------------------------------- a folder to start from


STORED = Lora(
    4, 6.0, ("q_proj", "v_proj", "down_proj"), {"1.self_attn.q_proj": 2}, {"down_proj": 3.0}, rslora=True, dora=True
)


def write(folder: Path, adapter: adapters.Adapter, options: Lora) -> None:
    peft.write(
        folder,
        adapters.to_peft(adapter),
        rank=options.rank,
        alpha=options.alpha,
        targets=options.targets,
        base_model="tiny",
        rank_pattern=options.rank_pattern,
        alpha_pattern=options.alpha_pattern,
        use_rslora=options.rslora,
        use_dora=options.dora,
    )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_a_written_adapter_is_read_in_fp32(tmp_path, dtype):
    adapter = randomised(adapters.init(tiny.CONFIG, STORED, seed=0))
    stored = jax.tree.map(lambda x: x.astype(dtype), adapter)
    write(tmp_path, stored, STORED)
    found = adapters.read(tmp_path, tiny.CONFIG, replace(STORED, dropout=0.3))  # which is no part of an adapter
    np.testing.assert_equal(found, jax.tree.map(lambda x: x.astype(np.float32), stored))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}


def test_an_adapter_that_peft_saved_is_read(tmp_path):
    family, options = CASES["everything"]
    theirs = in_peft(family, options)
    theirs.save_pretrained(tmp_path)
    adapter = adapters.read(tmp_path, CONFIGS[family], options)
    named = {n.replace(".default", ""): p.detach().numpy() for n, p in theirs.named_parameters() if p.requires_grad}
    expected = {n.removesuffix(".weight") if "magnitude" in n else n: p for n, p in named.items()}
    np.testing.assert_equal(adapters.to_peft(adapter), expected)


def damaged(change: str) -> adapters.Adapter:
    path = "model.layers.1.mlp.down_proj"
    adapter = randomised(adapters.init(tiny.CONFIG, STORED, seed=0))
    module = adapter[path]
    match change:
        case "nan":
            module["b"][1, 2] = np.nan
        case "infinite magnitude":
            module["m"][3] = np.inf
        case "name":
            adapter["model.layers.3.mlp.down_proj"] = adapter.pop(path)
        case "head":
            adapter["lm_head"] = adapter.pop(path)
        case "input":
            module["a"] = np.ones((40, 4), np.float32)
        case "output":
            module["b"] = np.ones((4, 40), np.float32)
        case "magnitude":
            module["m"] = module["m"][:-1]
    return adapter


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("nan", "not finite, in tensor base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"),
        ("infinite magnitude", "not finite, in tensor .*layers.1.mlp.down_proj.lora_magnitude_vector"),
        ("name", "adapts model.layers.3.mlp.down_proj, which this llama model does not have"),
        ("head", "adapts lm_head, which this llama model does not have"),
        ("input", r"lora_A.weight of model.layers.1.mlp.down_proj has shape \(4, 40\), this model's has \(4, 48\)"),
        ("output", r"lora_B.weight of model.layers.1.mlp.down_proj has shape \(40, 4\), this model's has \(32, 4\)"),
        ("magnitude", r"lora_magnitude_vector of .*1.mlp.down_proj has shape \(31,\), this model's has \(32,\)"),
    ],
)
def test_another_models_adapter_is_refused(tmp_path, change, says):
    write(tmp_path, damaged(change), STORED)
    with pytest.raises(UserError, match=says) as error:
        adapters.read(tmp_path, tiny.CONFIG, STORED)
    assert str(tmp_path) in str(error.value)


MADE_WITH = {
    "rank and alpha": (Lora(16, 32.0), "--config.lora.rank=16 --config.lora.alpha=32.0"),
    "targets": (Lora(targets=("q_proj", "v_proj")), """--config.lora.targets='["q_proj", "v_proj"]'"""),
    "layers": (
        Lora(targets=("1.self_attn.q_proj",)),
        """--config.lora.targets='["model.layers.1.self_attn.q_proj"]'""",
    ),
    "rslora": (Lora(rslora=True), "--config.lora.rslora=true"),
    "dora": (Lora(dora=True), "--config.lora.dora=true"),
    "patterns": (
        Lora(rank_pattern={r"layers\.0\.mlp\.up_proj": 3, "q_proj": 2}, alpha_pattern={"o_proj|k_proj": 1.5}),
        r"""--config.lora.rank_pattern='[["layers\\.0\\.mlp\\.up_proj", 3], ["q_proj", 2]]'"""
        """ --config.lora.alpha_pattern='[["o_proj|k_proj", 1.5]]'""",
    ),
}


@pytest.mark.parametrize(("options", "overrides"), MADE_WITH.values(), ids=MADE_WITH)
def test_other_settings_are_named_with_what_to_give(tmp_path, options, overrides):
    """The overrides in the message, given to a shell as they stand, make the adapter fit."""
    model = checkpoints.load("tiny").config
    adapter = randomised(adapters.init(model, options, seed=0))
    write(tmp_path, adapter, options)
    config = Path(tiny_config.__file__)
    command = ["ple_jax.main", f"--config={config}", "--mode=plan", f"--config.model.adapter={tmp_path}"]
    with pytest.raises(UserError, match="was made with other settings than config.lora; give ") as error:
        adapters.start(main.parse(command).config, model)
    assert str(error.value).split("; give ")[1] == overrides
    np.testing.assert_equal(adapters.start(main.parse([*command, *shlex.split(overrides)]).config, model), adapter)


def test_other_words_for_the_same_targets(tmp_path):
    adapter = adapters.init(tiny.CONFIG, Lora(), seed=0)
    write(tmp_path, adapter, Lora(targets=tuple(adapter)))
    assert adapters.read(tmp_path, tiny.CONFIG, Lora()).keys() == adapter.keys()


# ---------------------------------------------------------------- in the backend


ALL = Lora(
    4, 6.0, ("q_proj", "v_proj", "down_proj"), {"0.mlp.down_proj": 6, "q_proj": 2}, {"v_proj": 3.0},
    rslora=True, dora=True, dropout=0.2,
)  # fmt: skip


def backend(options: Lora, *, seed: int = 1, scan: bool = False, mesh: Any = None) -> jax_backend.JaxBackend:
    mesh = mesh or sharding.make_mesh()
    model = Model.create(tiny.CONFIG, scan=scan)

    def put(name: str, array: np.ndarray) -> jax.Array:
        place = sharding.spec(name, array.shape, mesh, kv_heads=tiny.CONFIG.num_kv_heads)
        return jax.device_put(array, jax.sharding.NamedSharding(mesh, place))

    base = fill(model, tiny.weights(), put)
    adapter = lora.magnitudes(model, base, adapters.init(tiny.CONFIG, options, seed=0), options)
    return jax_backend.JaxBackend(
        model, base, randomised(adapter, seed), mesh, settings=options, width=4, bucket=16, clip_norm=1.0, weight_decay=0.01,
        seed=5,
    )  # fmt: skip


@pytest.mark.slow
def test_training_with_every_option_goes_on_bit_for_bit(tmp_path):
    """Ranks that differ between layers, magnitudes, dropout: two more steps after a restore are those without one."""
    batches = [random_batch(seed=seed) for seed in range(3)]
    ours, again = backend(ALL), backend(ALL, seed=2)
    ours.update(batches[:2], negative_likelihood, lr=0.01)
    ours.save(tmp_path, 1, {"iteration": 1}, keep=1)
    start = ours.adapter()
    assert again.restore(tmp_path) == {"iteration": 1}
    said = [[b.update(batches[1:], negative_likelihood, lr=0.01) for _ in range(2)] for b in (ours, again)]
    assert said[0] == said[1]
    for name, array in ours.adapter().items():
        np.testing.assert_array_equal(again.adapter()[name], array, err_msg=name)
        assert np.abs(array - start[name]).max() > 0, name


def test_micro_batches_drop_each_their_own():
    batch, ours, losses = random_batch(), backend(replace(ALL, dropout=0.5)), []
    for count in (1, 2):
        ours.freeze_reference()  # steps, by which the draws are, are counted anew
        losses.append(ours.update([batch] * count, negative_likelihood, lr=0.0)["loss"])
    assert losses[1] != pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_dropout_is_for_training_alone():
    batch = random_batch()
    one, other = backend(ALL), backend(replace(ALL, dropout=0.0))
    np.testing.assert_array_equal(one.logprobs(batch).logprobs, other.logprobs(batch).logprobs)
    noise = np.random.default_rng(0).random((2, 8), dtype=np.float32)
    sampled = [b.generate([[3, 4, 5], [6]], noise, sampling=Sampling(8, ())) for b in (one, other)]
    assert sampled[0] == sampled[1]
    # anew in every step and micro-batch: at a learning rate of nothing, losses differ by what was dropped
    losses = [one.update([batch] * n, negative_likelihood, lr=1e-12)["loss"] for n in (1, 1, 2)]
    exact = [other.update([batch] * n, negative_likelihood, lr=1e-12)["loss"] for n in (1, 1, 2)]
    assert len(set(losses)) == 3 and len({round(loss, 3) for loss in exact}) == 1


@pytest.mark.slow
def test_every_option_on_many_devices():
    batch, losses, adapters = random_batch(rows=8), [], []
    for mesh in (sharding.make_mesh(), sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        ours = backend(ALL, scan=True, mesh=mesh)
        losses.append(ours.update([batch], negative_likelihood, lr=1e-3)["loss"])
        adapters.append(ours.adapter())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)  # the same draws, too
    assert_near(adapters[1], adapters[0], 2e-5)


def run(workdir: Path, **overrides: Any) -> FrozenConfigDict:
    """One iteration on the tiny model, exported."""
    config = tiny_config.get_config()
    config.update_from_flattened_dict({"iterations": 1, "sinks": (), "queries_per_iteration": 4, **overrides})
    validate(config)
    assert modes.train(FrozenConfigDict(config), workdir, "jax") == 0
    return FrozenConfigDict(config)


@pytest.mark.slow
def test_a_run_with_every_option_and_a_run_from_its_adapter(tmp_path):
    """PEFT loads what the first exports and says what our backend says; the second starts there and refers to it."""
    options = {
        "lora.rank": 4, "lora.dora": True, "lora.rslora": True, "lora.dropout": 0.1,
        "lora.rank_pattern": (("0.mlp.down_proj", 6),), "lora.alpha_pattern": (("v_proj", 3.0),),
    }  # fmt: skip
    first = run(tmp_path / "first", **options)
    folder, loaded = tmp_path / "first" / "adapter", checkpoints.load("tiny")
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**loaded.raw)).eval()
        theirs.load_state_dict({name: torch.tensor(value) for name, value in loaded.weights.items()}, strict=False)
        before = theirs(torch.tensor(TOKENS).long()).logits.numpy()
        after = PeftModel.from_pretrained(theirs, folder)(torch.tensor(TOKENS).long()).logits.numpy()
    assert np.abs(after - before).max() > 1e-2
    made = jax_backend.build(first, loaded)
    made.restore(tmp_path / "first" / "checkpoints")
    fused = lora.fuse(made.model, made.policy, adapters.settings(first), base=made.base)
    np.testing.assert_allclose(logits(made.model, made.base, fused), after, atol=1e-4, rtol=0)

    (tmp_path / "start").mkdir()
    for file in (peft.WEIGHTS, peft.CONFIG):
        (tmp_path / "start" / file).write_bytes((folder / file).read_bytes())
    second = run(tmp_path / "second", **options, **{"model.adapter": str(tmp_path / "start")})
    lines = [json.loads(line) for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["heldout_kl"] == 0 and lines[-1]["heldout_kl"] > 0  # to where this run started
    stored = peft.read(folder)[0]
    made = jax_backend.build(second, loaded)
    np.testing.assert_equal(made.adapter(), stored)
    made.restore(tmp_path / "second" / "checkpoints")
    np.testing.assert_equal(adapters.to_peft(jax.device_get(made.reference)), stored)
    assert all(np.abs(value - stored[name]).max() > 0 for name, value in made.adapter().items())
    # another adapter in the same folder is another run
    other = adapters.from_peft({name: value + 1 for name, value in stored.items()})
    write(tmp_path / "start", other, adapters.settings(second))
    with pytest.raises(UserError, match="inputs.adapter"):
        modes.train(second, tmp_path / "second", "jax")
