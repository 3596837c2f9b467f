"""The operators: plain torch against float64 numpy, torch_npu's (by reference kernels) against it, and both in models."""

import copy
import functools
from collections import Counter
from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch
import transformers
from npu import reference_kernels, simulator
from speed import quick
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from ple_jax.core.errors import UserError
from torch_ascend import ops
from torch_ascend.ops import NPU, REFERENCE

reference_kernels.define()
TABLES = pytest.mark.parametrize("table", [REFERENCE, NPU], ids=["reference", "npu"])
ROWS, HEADS, KV_HEADS, TIME, SOURCE, DIM = 3, 6, 2, 5, 7, 8


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng([seed, *shape]).normal(size=shape)).to(dtype)


def qkv(dtype=torch.float32):
    shapes = (ROWS, HEADS, TIME, DIM), (ROWS, KV_HEADS, SOURCE, DIM), (ROWS, KV_HEADS, SOURCE, DIM)
    return [draw(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def mask():
    """Random, but for a row's first queries, which see nothing, and a query that sees a single source."""
    visible = draw(ROWS, 1, TIME, SOURCE, seed=9) > -0.3
    visible[0, :, :2] = False
    visible[1, :, 3] = torch.arange(SOURCE) == 4
    return visible


def angles(rows=ROWS, time=TIME, dim=DIM):
    """One angle for each pair of entries, as cosines and sines of whole heads."""
    angle = draw(rows, 1, time, dim // 2, seed=7)
    return angle, torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()


def gradients(f, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = f(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, draw(*out.shape, seed=11).to(out))]


def close(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.double(), b.double(), **tolerance)


# ---------------------------------------------------------------- against float64


def softmax_attention(q, k, v, visible, scale, softcap):
    """Query by query; a query that sees nothing gets zeros."""
    q, k, v, visible = (x.double().numpy() for x in (q, k, v, visible))
    out = np.zeros(q.shape)
    for row, head, time in np.ndindex(*q.shape[:3]):
        seen = visible[row, 0, time] > 0
        if seen.any():
            shared = head // (HEADS // KV_HEADS)
            score = k[row, shared, seen] @ q[row, head, time] * scale
            if softcap is not None:
                score = softcap * np.tanh(score / softcap)
            weight = np.exp(score - score.max())
            out[row, head, time] = weight @ v[row, shared, seen] / weight.sum()
    return out


@TABLES
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_is_softmax_over_what_is_visible(table, softcap):
    q, k, v = qkv()
    out = table.attention(q, k, v, mask(), scale=0.7, softcap=softcap)
    np.testing.assert_allclose(out, softmax_attention(q, k, v, mask(), 0.7, softcap), rtol=1e-5, atol=1e-6)


@TABLES
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_query_that_sees_one_source_gets_its_value(table, softcap):
    q, k, v = qkv()
    visible = torch.zeros(ROWS, 1, TIME, SOURCE, dtype=torch.bool)
    source = torch.tensor([3, 0, 6, 1, 5])
    visible[:, :, torch.arange(TIME), source] = True
    out = table.attention(q, k, v, visible, scale=0.7, softcap=softcap)
    np.testing.assert_allclose(out, v[:, :, source].repeat_interleave(HEADS // KV_HEADS, 1), rtol=1e-6)


@TABLES
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_that_see_nothing_give_zeros_and_no_gradient(table, softcap, dtype):
    visible = torch.zeros(ROWS, 1, TIME, SOURCE, dtype=torch.bool)
    visible[1:] = True
    out, *found = gradients(lambda q, k, v: table.attention(q, k, v, visible, scale=0.7, softcap=softcap), *qkv(dtype))
    assert not out[0].any() and out[1:].all()
    for gradient in found:
        assert not gradient[0].any() and gradient[1:].isfinite().all() and gradient[1:].any()


def test_heads_too_wide_for_sdpa_are_computed_all_the_same(monkeypatch):
    q, k, v = qkv()
    monkeypatch.setattr(ops, "SDPA_DIM", DIM - 1)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    out = REFERENCE.attention(q, k, v, mask(), scale=0.7)
    np.testing.assert_allclose(out, softmax_attention(q, k, v, mask(), 0.7, None), rtol=1e-5, atol=1e-6)


@TABLES
def test_rms_norm(table):
    x, weight = draw(2, 5, 16), 1 + 0.3 * draw(16)
    wide = x.double().numpy()
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.1) * weight.double().numpy()
    np.testing.assert_allclose(table.rms_norm(x, weight, 0.1), expected, rtol=1e-5)


@TABLES
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_of_bfloat16_is_rounded_once(table, weight_dtype):
    x, weight = draw(64, 16, dtype=torch.bfloat16), (1 + 0.3 * draw(16)).to(weight_dtype)
    out = table.rms_norm(x, weight, 1e-5)
    assert out.dtype == torch.bfloat16
    exact = torch.nn.functional.rms_norm(x.double(), [16], weight.double(), eps=1e-5)
    assert (out == exact.to(torch.bfloat16)).float().mean() > 0.99  # but for ties that fp32 breaks
    np.testing.assert_allclose(out.double(), exact, rtol=2**-8)


@TABLES
def test_rope_turns_pairs_of_entries_by_an_angle(table):
    angle, cos, sin = angles()
    x = draw(ROWS, HEADS, TIME, DIM)
    pairs = x[..., : DIM // 2].double().numpy() + 1j * x[..., DIM // 2 :].double().numpy()
    turned = pairs * np.exp(1j * angle.double().numpy())
    np.testing.assert_allclose(table.rope(x, cos, sin), np.concatenate([turned.real, turned.imag], -1), rtol=1e-5, atol=1e-6)


@TABLES
def test_rope_with_angles_in_fp32_is_rounded_once(table):
    _, cos, sin = angles()
    x = draw(ROWS, HEADS, TIME, DIM, dtype=torch.bfloat16)
    exact = table.rope(x.float(), cos, sin)
    out = table.rope(x, cos, sin)
    assert out.dtype == torch.bfloat16 and torch.equal(out, exact.to(torch.bfloat16))


@TABLES
def test_swiglu(table):
    gate, up = 3 * draw(2, 5, 16), draw(2, 5, 16, seed=1)
    g = gate.double().numpy()
    np.testing.assert_allclose(table.swiglu(gate, up), g / (1 + np.exp(-g)) * up.double().numpy(), rtol=1e-5, atol=1e-7)


@TABLES
def test_token_logprob(table):
    logits, targets = 5 * draw(2, 3, 40), torch.tensor([[0, 39, 7], [11, 11, 2]])
    wide = logits.double().numpy()
    normaliser = np.log(np.exp(wide).sum(-1))
    logprob, found = table.token_logprob(logits, targets)
    assert logprob.dtype == found.dtype == torch.float32
    np.testing.assert_allclose(found, normaliser, rtol=1e-6)
    chosen = np.take_along_axis(wide, targets[..., None].numpy(), -1)[..., 0]
    np.testing.assert_allclose(logprob, chosen - normaliser, rtol=1e-5)


# ---------------------------------------------------------------- the two tables, with gradients


def norm(table, x):
    return table.rms_norm(x, (1 + 0.3 * draw(DIM)).to(x), 0.1)


def turn(table, x, rows=ROWS):
    return table.rope(x, *(y.to(x) for y in angles(rows)[1:]))


def attend(table, q, k, v, visible=None, **options):
    visible = mask() if visible is None else visible
    return table.attention(q, k, v, visible.to(q.device), scale=0.7, **options)


CALLS = {
    "rms_norm": (norm, [draw(2, 5, DIM)]),
    "rms_norm of heads": (lambda table, x: norm(table, x.transpose(1, 2)), [draw(2, 5, 3, DIM)]),
    "rope": (turn, [draw(ROWS, HEADS, TIME, DIM)]),
    "rope, one angle for all rows": (lambda table, x: turn(table, x, rows=1), [draw(ROWS, HEADS, TIME, DIM)]),
    "swiglu": (lambda table, gate, up: table.swiglu(gate, up), [draw(2, 5, 16), draw(2, 5, 16, seed=1)]),
    "attention": (attend, qkv()),
    "attention, one key for each head": (lambda table, q, k, v: attend(table, q[:, :KV_HEADS], k, v), qkv()),
    "attention, one mask for all rows": (lambda table, q, k, v: attend(table, q, k, v, mask()[1:2]), qkv()),
    "attention with a cap": (lambda table, q, k, v: attend(table, q, k, v, softcap=1.5), qkv()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", CALLS)
def test_the_tables_agree_in_values_and_gradients(call, dtype):
    f, inputs = CALLS[call]
    inputs = [x.to(dtype) for x in inputs]
    plain, fused = (gradients(functools.partial(f, table), *inputs) for table in (REFERENCE, NPU))
    close(fused, plain, **{"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-5})


@TABLES
@pytest.mark.parametrize("call", CALLS)
def test_gradients_are_finite_differences(call, table):
    f, inputs = functools.partial(CALLS[call][0], table), CALLS[call][1]
    step = [1e-2 * draw(*x.shape, seed=13) for x in inputs]
    out, *found = gradients(f, *inputs)
    ahead, behind = (f(*(x + sign * d for x, d in zip(inputs, step, strict=True))) for sign in (1, -1))
    change = ((ahead - behind).double() * draw(*out.shape, seed=11)).sum() / 2
    np.testing.assert_allclose(sum((g * d).double().sum() for g, d in zip(found, step, strict=True)), change, rtol=5e-3)


# ---------------------------------------------------------------- what a call must be


def test_a_call_that_the_schemas_do_not_have_is_rejected():
    x, weight = draw(2, 16), draw(16)
    with pytest.raises(RuntimeError, match="Unknown keyword argument 'eps'"):
        torch.ops.npu.npu_rms_norm(x, weight, eps=1e-6)
    with pytest.raises(AttributeError, match="npu_clip_grad_norm_fused"):
        torch.ops.npu.npu_clip_grad_norm_fused(x)
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match="Unknown keyword argument 'attn_mask'"):
        torch.ops.npu.npu_fusion_attention(q, k, v, HEADS, "BNSD", attn_mask=mask())


def test_what_the_documentation_asks_is_asked():
    x, (q, k, v) = draw(2, 16), qkv()
    fusion, hidden = torch.ops.npu.npu_fusion_attention, ~mask()
    _, cos, sin = angles()
    with pytest.raises(RuntimeError, match="one dtype"):
        torch.ops.npu.npu_rms_norm(x, draw(16).bfloat16())
    with pytest.raises(RuntimeError, match=r"lie in \[-1, 1\]"):
        torch.ops.npu.npu_rotary_mul(q, 1.2 * cos.abs().ceil(), sin)
    with pytest.raises(RuntimeError, match="bool mask"):
        fusion(q, k, v, HEADS, "BNSD", atten_mask=hidden.float())
    with pytest.raises(RuntimeError, match="B1SS"):
        fusion(q, k, v, HEADS, "BNSD", atten_mask=hidden[:, 0])
    with pytest.raises(RuntimeError, match="no reference for keep_prob"):
        fusion(q, k, v, HEADS, "BNSD", atten_mask=hidden, keep_prob=0.9)
    with pytest.raises(RuntimeError, match=r"lie in \[0, C\)"):
        torch.ops.npu.npu_cross_entropy_loss(x, torch.tensor([1, -100]), reduction="none")
    out = fusion(q, k, v, HEADS, "BNSD", atten_mask=hidden, inner_precise=0)[0]
    assert out[0, :, :2].isnan().all() and out[1:].isfinite().all()


def test_auto_is_npu_on_an_npu_alone():
    cpu = torch.device("cpu")
    assert ops.choose("auto", cpu) is ops.choose("reference", cpu) is REFERENCE
    assert ops.choose("auto", SimpleNamespace(type="npu")) is ops.choose("npu", cpu) is NPU  # of reference kernels, here
    with pytest.raises(UserError, match="operators 'fused' are none of auto, reference, npu"):
        ops.choose("fused", cpu)


def test_absent_operators_are_an_error(monkeypatch):
    monkeypatch.setattr(ops, "OPERATORS", ("npu_rms_norm", "npu_layer_norm"))
    with pytest.raises(UserError, match="no operators npu_layer_norm: install the torch-npu of torch 2"):
        ops.choose("npu", torch.device("cpu"))


def test_operators_of_another_device_are_an_error(monkeypatch):
    library = torch.library.Library("npu", "FRAGMENT")
    library.define("elsewhere(Tensor x) -> Tensor")
    library.impl("elsewhere", lambda x: x, "PrivateUse1")
    monkeypatch.setattr(ops, "OPERATORS", ("elsewhere",))
    assert ops.choose("npu", SimpleNamespace(type="npu")) is NPU
    with pytest.raises(UserError, match="operators 'npu' do not run on device cpu: take 'auto' or 'reference'"):
        ops.choose("npu", torch.device("cpu"))


# ---------------------------------------------------------------- inside transformers' models


def _expected(name: str, model: transformers.PreTrainedModel) -> dict[str, int]:
    layers, norms = families.LAYERS, sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    found = {"rms_norm": norms, "rope": layers, "swiglu": layers}
    if name.startswith("gpt"):  # LayerNorm, and a gelu without a gate; GPT-NeoX turns a part of the head
        found = {}
    elif name.startswith("gemma"):  # a gelu in the gate
        del found["swiglu"]
    elif name in ("mixtral", "qwen3_moe"):  # experts
        del found["swiglu"]
    elif name in ("phi3-partial", "phi3-longrope", "llama-yarn", "smollm3-yarn"):  # a part of the head; angles scaled up
        del found["rope"]
    return found


class Calls(TorchDispatchMode):
    """How often each fused operator runs."""

    def __init__(self):
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "npu":
            self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def outcome(model: transformers.PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of real tokens, and a gradient of them with respect to the embeddings; the second row is left-padded."""
    tokens = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (2, 12)))
    real = torch.ones(2, 12, dtype=torch.int64)
    real[1, :4] = 0
    x = model.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=x, attention_mask=real, use_cache=False).logits
    logits = logits.flatten(0, 1).index_select(0, real.flatten().nonzero()[:, 0])
    return logits.detach(), torch.autograd.grad(logits, x, draw(*logits.shape))[0]


def _attend(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    table = NPU if module.config._attn_implementation == "npu" else REFERENCE
    return table.attention(query, key, value, attention_mask, scale=scale, softcap=softcap).transpose(1, 2), None


def _mask(*args, **kwargs):
    return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})


for _name in ("npu", "reference"):
    ALL_ATTENTION_FUNCTIONS.register(_name, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name, _mask)


@pytest.mark.parametrize("name", quick(families.VARIANTS, "llama", "gemma3_text", "phi3-partial"))
def test_an_installed_model_computes_what_transformers_does(name):
    model = families.build(families.VARIANTS[name]).requires_grad_(False)
    logits, gradient = outcome(model)
    replaced = Counter()
    for line in ops.install(model, NPU):
        what, count = line.split(": ")
        replaced[what.split(" in ")[0]] += int(count)
    expected = _expected(name, model)
    assert replaced == expected
    with Calls() as calls:
        found, found_gradient = outcome(model)
    rope = 2 * families.LAYERS - (2 if name == "smollm3" else 0)  # which has a layer without positions
    images = name == "gemma3"  # a norm of theirs does not run
    assert calls.count == Counter(
        npu_rms_norm=expected.get("rms_norm", 0) - images,
        npu_swiglu=expected.get("swiglu", 0),
        npu_rotary_mul=rope * ("rope" in expected),
    )
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found_gradient, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("table", ["npu", "reference"])
@pytest.mark.parametrize("name", quick(families.VARIANTS, "gemma2", "gpt2"))
def test_attention_of_a_model_is_transformers_own(name, table):
    model = families.build(families.VARIANTS[name]).requires_grad_(False)
    logits, gradient = outcome(model)
    model.set_attn_implementation(table)
    with Calls() as calls:
        found, found_gradient = outcome(model)
    fused = 0 if table == "reference" or name == "gemma2" else families.LAYERS  # Gemma 2 caps scores
    assert calls.count["npu_fusion_attention"] == fused
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found_gradient, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", quick(["llama", "gemma3_text", "olmo2"], "gemma3_text"))
def test_an_installed_model_in_bfloat16_is_no_less_exact(name):
    model = families.build(families.VARIANTS[name]).requires_grad_(False)
    exact = outcome(model)[0]
    model.to(torch.bfloat16)
    plain = outcome(model)[0]
    ops.install(model, NPU)
    fused = outcome(model)[0]
    assert fused.dtype == torch.bfloat16
    error = [float((x.float() - exact).square().mean().sqrt()) for x in (fused, plain)]
    assert error[0] < 1.2 * error[1]


def test_a_norm_around_one_is_exact_in_bfloat16():
    """One plus a small weight, rounded to bfloat16, would lose most of the weight."""
    model = families.build(families.VARIANTS["gemma3_text"]).to(torch.bfloat16)
    norm, x = model.model.layers[0].input_layernorm, draw(32, families.HEADS * families.HEAD_DIM, dtype=torch.bfloat16)
    with torch.no_grad():
        norm.weight.mul_(0.01)
    plain = norm(x)
    ops.install(model, NPU)
    assert (norm(x) == plain).float().mean() > 0.99


def test_a_norm_that_shares_a_forward_with_gemmas_is_left_alone():
    class Centred(GemmaRMSNorm):
        def _norm(self, x):
            return super()._norm(x - x.mean(-1, keepdim=True))

    model = families.build(families.VARIANTS["gemma2"])
    before = ops.install(copy.deepcopy(model), NPU)
    model.model.norm = Centred(families.HEADS * families.HEAD_DIM)
    assert before[0] == "rms_norm in Gemma2RMSNorm: 13" and ops.install(model, NPU)[0] == "rms_norm in Gemma2RMSNorm: 12"


def _other(model: str, **options):
    """A family outside the decoder's table."""
    settings = getattr(transformers, model).config_class(**families.VARIANTS["llama"].options | options)
    settings._attn_implementation = "eager"
    torch.manual_seed(0)
    return getattr(transformers, model)(settings).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "model, replaced",
    [
        # pairs of neighbours; a norm that rounds elsewhere
        ("HeliumForCausalLM", ["swiglu in HeliumMLP: 3"]),
        # pairs of neighbours; a norm that subtracts the mean
        ("CohereForCausalLM", ["swiglu in CohereMLP: 3"]),
        # Llama's rotary function to the letter, on a rotate_half of the other sign; a norm without a weight; no gate
        ("NanoChatForCausalLM", []),
        # pairs of neighbours in a part of the head; the gate and what it lets through are one projection
        ("GlmForCausalLM", ["rms_norm in GlmRMSNorm: 7", "swiglu in GlmMLP: 3"]),
    ],
)
def test_what_only_resembles_an_operator_is_left_alone(model, replaced):
    built = _other(model, head_dim=families.HEAD_DIM)
    logits, gradient = outcome(built)
    assert ops.install(built, NPU) == replaced
    found, found_gradient = outcome(built)
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found_gradient, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_a_gate_that_is_not_silu_is_left_alone():
    model = families.build(families.VARIANTS["llama"], hidden_act="gelu")
    assert ops.install(model, NPU) == ["rms_norm in LlamaRMSNorm: 7", "rope in LlamaAttention: 3"]


def test_other_models_of_the_process_stay_as_they_were():
    variant = families.VARIANTS["llama"]
    installed, other = families.build(variant), families.build(variant)
    ops.install(installed, NPU)
    with Calls() as calls:
        outcome(other)
        outcome(families.build(variant))
    assert not calls.count


def test_a_copy_of_an_installed_model_computes_with_its_own_weights():
    model = families.build(families.VARIANTS["llama"]).requires_grad_(False)
    ops.install(model, NPU)
    before = outcome(model)[0]
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.zero_()
    assert not outcome(other)[0].any() and torch.equal(outcome(model)[0], before)


def test_the_reference_replaces_nothing():
    model = families.build(families.VARIANTS["llama"])
    assert ops.install(model, REFERENCE) == []
    assert not any("forward" in vars(module) for module in model.modules())


def test_models_without_storage_can_be_installed_and_traced():
    """Memory is planned with such models."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(families.config(families.VARIANTS["llama"])).to(torch.bfloat16)
    model.set_attn_implementation("npu")
    assert len(ops.install(model, NPU)) == 3
    x = torch.empty(2, 6, model.config.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    visible = torch.empty(2, 1, 6, 6, dtype=torch.bool, device="meta")
    model(inputs_embeds=x, attention_mask=visible, use_cache=False).logits.sum().backward()
    assert x.grad.shape == x.shape and x.grad.dtype == x.dtype


# ---------------------------------------------------------------- on a device that is not the CPU


@pytest.mark.skipif(bool(simulator.unavailable()), reason=simulator.unavailable())
@pytest.mark.slow
def test_both_tables_on_a_simulated_npu():
    simulator.run(
        """
        import torch, torch_npu
        from functools import partial
        from test_ops import CALLS, REFERENCE, close, draw, gradients
        from torch_ascend import ops

        npu = torch.device("npu:0")
        for f, inputs in CALLS.values():
            expected = gradients(partial(f, REFERENCE), *inputs)
            for name in ("auto", "reference"):
                table = ops.choose(name, npu)
                found = gradients(partial(f, table), *(x.to(npu) for x in inputs))
                assert table.name == ("npu" if name == "auto" else name) and all(x.device == npu for x in found)
                close([x.cpu() for x in found], expected, rtol=1e-4, atol=1e-5)
        logits, targets = draw(2, 3, 40), torch.tensor([[0, 39, 7], [11, 11, 2]])
        found = ops.choose("auto", npu).token_logprob(logits.to(npu), targets.to(npu))
        close([x.cpu() for x in found], REFERENCE.token_logprob(logits, targets), rtol=1e-5, atol=1e-5)
        """,
        env={"NPU_SIM_FUSED": "1"},
    )
