"""Mixtures of experts: against their definition in float64, on meshes, rematerialised, quantised, and their sizes.

That whole models equal transformers' is in test_families.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from speed import quick
from test_quantize import normal_float_levels

from ple_jax.backend import lora, sharding
from ple_jax.backend.experts import mix
from ple_jax.backend.model import Model, fill, quantized_axis
from ple_jax.backend.quantize import quantize
from ple_jax.core.errors import UserError
from ple_jax.models import adapters, families, layout
from ple_jax.models.config import ModelConfig

_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_experts_per_tok": 2,
}  # fmt: skip
RAWS = {
    "mixtral": _SIZES | {"model_type": "mixtral", "intermediate_size": 64, "num_local_experts": 5},
    "qwen3_moe": _SIZES | {"model_type": "qwen3_moe", "moe_intermediate_size": 64, "num_experts": 5},
}
LORA = adapters.Lora(rank=4)
MESHES = [{"data": 4, "fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}]


# what is compiled here runs once: most of the time would go into optimising it
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def weights(c: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: (1 + 0.1 * rng.normal(size=shape) if len(shape) == 1 else 0.3 * rng.normal(size=shape)).astype(np.float32)
        for name, shape in layout.expected_shapes(c).items()
    }


def put(mesh: Mesh | None, leaf: str, array: np.ndarray) -> jax.Array:
    if mesh is None:
        return jnp.asarray(array)
    return jax.device_put(array, NamedSharding(mesh, sharding.spec(leaf, array.shape, mesh, kv_heads=2)))


def build(name: str, mesh: Mesh | None = None, **options: Any) -> tuple[Model, Any]:
    """A random model on the devices of a mesh."""
    c = families.read(RAWS[name], name)
    model = Model.create(c, mesh=mesh, **{"scan": True} | options)
    return model, fill(model, weights(c), functools.partial(put, mesh))


def tokens_of(rows: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 64, (rows, 12)).astype(np.int32)


def loss(model: Model, base: Any, adapter: Any, tokens: jax.Array) -> jax.Array:
    rows, time = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (rows, time))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((time, time), bool)), (rows, time, time))
    fused = lora.fuse(model, adapter, LORA)
    hidden, _ = model.apply(base, fused, tokens, positions=positions, mask=mask)
    logp = jax.nn.log_softmax(model.logits(base, hidden)[:, :-1])
    return -jnp.take_along_axis(logp, tokens[:, 1:, None], -1).mean()


def random_adapter(model: Model) -> Any:
    rng, fresh = np.random.default_rng(2), adapters.init(model.config, LORA, seed=0)
    return {p: {k: (0.1 * rng.normal(size=x.shape)).astype(np.float32) for k, x in m.items()} for p, m in fresh.items()}


def gradients(model: Model, base: Any, tokens: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    step = jit(jax.value_and_grad(functools.partial(loss, model), argnums=1))
    value, grads = step(base, random_adapter(model), tokens)
    return float(value), adapters.to_peft(jax.device_get(grads))


@functools.cache
def on_one_device(name: str, rows: int) -> tuple[float, dict[str, np.ndarray]]:
    return gradients(*build(name), tokens_of(rows))


def assert_equal(ours: tuple, expected: tuple, tolerance: float = 1e-5) -> None:
    assert ours[0] == pytest.approx(expected[0], rel=tolerance)
    scale = max(np.abs(x).max() for x in expected[1].values())
    for name, x in expected[1].items():
        np.testing.assert_allclose(ours[1][name], x, atol=tolerance * scale, rtol=0, err_msg=name)


# ---------------------------------------------------------------- one layer


def layer_inputs(experts: int = 6, hidden: int = 16, size: int = 24) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(3)
    router = rng.normal(size=(hidden, experts))
    router[:, 1] = -10 * np.abs(router).sum(1)  # and inputs that are positive: an expert that nobody asks
    kernels = (0.3 * rng.normal(size=s) for s in ((experts, hidden, size), (experts, hidden, size), (experts, size, hidden)))
    return tuple(x.astype(np.float32) for x in (np.abs(rng.normal(size=(3, 7, hidden))), router, *kernels))


def definition(x, router, gate, up, down, *, per_token: int, normalize: bool) -> np.ndarray:
    """Token by token and expert by expert, float64."""
    x, router, gate, up, down = (np.asarray(a, np.float64) for a in (x, router, gate, up, down))
    out = np.zeros_like(x)
    for where in np.ndindex(x.shape[:2]):
        logits = x[where] @ router
        p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        best = sorted(range(len(p)), key=lambda e: -p[e])[:per_token]
        for e in best:
            h = x[where] @ gate[e]
            y = (h / (1 + np.exp(-h)) * (x[where] @ up[e])) @ down[e]
            out[where] += y * (p[e] / p[best].sum() if normalize else p[e])
    return out


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("per_token", quick([1, 2, 6], 2))
def test_a_layer_and_its_gradient_are_the_definition(per_token, normalize):
    x, *rest = layer_inputs()
    options = {"per_token": per_token, "normalize": normalize}
    ours = jax.jit(functools.partial(mix, activation=jax.nn.silu, **options))
    expected = definition(x, *rest, **options)
    np.testing.assert_allclose(ours(x, *rest), expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    half = np.asarray(ours(*(jnp.asarray(a, jnp.bfloat16) for a in (x, *rest))).astype(jnp.float32))
    rounded = definition(*(np.asarray(jnp.asarray(a, jnp.bfloat16)) for a in (x, *rest)), **options)
    np.testing.assert_allclose(half, rounded, atol=0.03 * np.abs(rounded).max(), rtol=0)
    # along one direction, by central differences of the definition
    rng = np.random.default_rng(4)
    along, weight, step = rng.normal(size=x.shape), rng.normal(size=x.shape), 1e-5
    above, below = (definition(x + sign * step * along, *rest, **options) for sign in (1, -1))
    gradient = jax.grad(lambda x: (ours(x, *rest) * weight.astype(np.float32)).sum())(x)
    assert (gradient * along).sum() == pytest.approx((weight * (above - below)).sum() / (2 * step), rel=1e-4)


# ---------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("axes", "scan", "rows"),
    [
        (MESHES[1], False, 8),
        pytest.param(MESHES[0], True, 8, marks=pytest.mark.slow),
        pytest.param(MESHES[2], True, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_meshes_give_the_numbers_of_one_device(axes, scan, rows):
    """The last has one row for eight devices, as a prefix that all prompts share."""
    model, base = build("qwen3_moe", sharding.make_mesh(**axes), scan=scan, remat="full")
    assert_equal(gradients(model, base, tokens_of(rows)), on_one_device("qwen3_moe", rows))


def test_every_device_orders_its_own_tokens():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    model, base = build("mixtral", mesh)
    tokens = sharding.put_rows(mesh, np.tile(tokens_of(8), (3, 1)))
    step = jit(jax.grad(functools.partial(loss, model), argnums=1))
    text = step.lower(base, random_adapter(model), tokens).compile().as_text()
    copies = 24 * 12 * 2  # every token goes to two experts
    assert f"[{copies // 4}," in text
    assert f"[{copies}," not in text
    for leaf, share in {"gate": 4, "up": 4, "down": 4, "router": 2}.items():
        kernel = base["layers"]["experts"][leaf]
        assert kernel.addressable_shards[0].data.size * share == kernel.size, leaf


def test_what_is_recomputed():
    """remat=dots keeps the experts' matmuls like all others; remat=full repeats them."""
    matmuls = {}
    for remat in ("none", "dots", "full"):
        model, base = build("mixtral", remat=remat)
        step = jax.grad(functools.partial(loss, model), argnums=1)
        matmuls[remat] = str(jax.make_jaxpr(step)(base, random_adapter(model), tokens_of(4))).count("ragged_dot_general[")
    assert matmuls["dots"] == matmuls["none"] < matmuls["full"]
    assert_equal(gradients(*build("mixtral", remat="dots"), tokens_of(4)), on_one_device("mixtral", 4))


@pytest.mark.parametrize(("kind", "axes"), [("int8", None), pytest.param("nf4", MESHES[1], marks=pytest.mark.slow)], ids=str)
def test_quantised_experts(kind, axes):
    """The numbers of a model that holds the expanded kernels in their place; every expert has scales of its own."""
    mesh = sharding.make_mesh(**axes) if axes else None
    model, base = build("qwen3_moe", mesh)
    quantised, expanded = dict(base["layers"]["experts"]), dict(base["layers"]["experts"])
    for leaf in ("gate", "up", "down"):
        name = f"layers/experts/{leaf}"
        q = quantize(jax.device_get(base["layers"]["experts"][leaf]), kind, axis=1 + quantized_axis(name))
        assert q.scale.shape[:2] == (model.config.num_layers, model.config.experts)
        quantised[leaf] = jax.tree.map(functools.partial(put, mesh, name), q)
        expanded[leaf] = put(mesh, name, by_definition(q))
    ours, expected = (
        gradients(model, {**base, "layers": {**base["layers"], "experts": experts}}, tokens_of(8))
        for experts in (quantised, expanded)
    )
    assert_equal(ours, expected)


def by_definition(q: Any) -> np.ndarray:
    """Level (or integer) times its block's scale, of kernels [layer, expert, in, out]."""
    values, scale = np.asarray(q.qvalue).astype(np.int64), np.asarray(q.scale).astype(np.float64)
    levels = normal_float_levels()[values] if q.qtype == "nf4" else values
    return (levels * np.repeat(scale, values.shape[2] // scale.shape[2], 2)).astype(np.float32)


# ---------------------------------------------------------------- sizes and names


@pytest.mark.parametrize(
    ("raw", "total", "active"),
    [
        # Mixtral-8x7B: "46.7B total parameters but only uses 12.9B parameters per token", mistral.ai/news/mixtral-of-experts
        (
            {"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
             "num_hidden_layers": 32, "num_attention_heads": 32},
            46.7e9, 12.9e9,
        ),
        # Qwen3-30B-A3B: 30.5B in total and 3.3B activated, says its model card
        (
            {"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48,
             "num_attention_heads": 32, "head_dim": 128},
            30.5e9, 3.3e9,
        ),
    ],
)  # fmt: skip
def test_sizes_are_the_published_ones(raw, total, active):
    c = families.read(raw, "config.json")
    assert sum(np.prod(shape) for shape in layout.expected_shapes(c).values()) == pytest.approx(total, rel=5e-3)
    outside = 2 * c.vocab_size * c.hidden_size
    assert layout.active_weights(c) + outside == pytest.approx(active, rel=2e-2)


@pytest.mark.parametrize("name", RAWS)
def test_adapters_are_on_the_attention(name):
    c = families.read(RAWS[name], name)
    modules = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(c.num_layers) for p in "qkvo"]
    assert adapters.resolve(c, ("all-linear",)) == modules
    with pytest.raises(UserError, match="down_proj.*no linear module"):
        adapters.resolve(c, ("down_proj",))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"num_experts_per_tok": 6}, "6, of 5 experts"),
    ],
)
def test_what_is_not_there_is_refused(change, says):
    with pytest.raises(UserError, match=says):
        families.read(RAWS["qwen3_moe"] | change, "config.json")
