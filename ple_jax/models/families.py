"""The table of model families: how a Hugging Face config.json becomes a `ModelConfig`, and where the weights are.

A family is one row of `FAMILIES`; the decoder itself knows none of them. Names of modules are Hugging Face's, which are
also PEFT's, so adapters need no translation.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from ple_jax.core.config import UserError
from ple_jax.models.config import LayerKind, ModelConfig

Raw = Mapping[str, Any]  # a config.json


class Module(NamedTuple):
    """One linear module of a layer, and what it holds of one of the decoder's kernels."""

    name: str  # below the layer: "self_attn.q_proj"
    kernel: str  # qkv | o | gate_up | down
    parts: tuple[str, ...]  # of q, k, v; of gate, up; or the kernel itself


@dataclass(frozen=True)
class Family:
    features: Callable[[dict], dict[str, Any]]  # a config.json -> fields of ModelConfig that are this family's own
    modules: tuple[Module, ...]
    norms: Mapping[str, str]  # ours -> theirs, below the layer
    qk_norms: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=dict)  # router, gate, up, down -> theirs, {} the expert's number
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what config.json may leave out
    names: Mapping[str, str] = field(default_factory=dict)  # config keys that go by another name here
    layers: str = "model.layers"
    embed: str = "model.embed_tokens"
    positions: str = ""
    norm: str = "model.norm"
    head: str = "lm_head"
    prefix: str = "model."  # checkpoints of the bare backbone leave it out
    renamed: str = ""  # prefix that earlier versions wrote instead
    transposed: bool = False  # weights are [in, out] (GPT-2's Conv1D)
    interleaved: bool = False  # q, k, v of one head are neighbours


_SPLIT = (
    Module("self_attn.q_proj", "qkv", ("q",)),
    Module("self_attn.k_proj", "qkv", ("k",)),
    Module("self_attn.v_proj", "qkv", ("v",)),
    Module("self_attn.o_proj", "o", ("o",)),
    Module("mlp.gate_proj", "gate_up", ("gate",)),
    Module("mlp.up_proj", "gate_up", ("up",)),
    Module("mlp.down_proj", "down", ("down",)),
)
_ATTENTION = tuple(module for module in _SPLIT if module.kernel in ("qkv", "o"))


def _mixture(path: str, gate: str, up: str, down: str) -> dict[str, str]:
    names = {"gate": gate, "up": up, "down": down}
    return {"router": f"{path}.gate"} | {ours: f"{path}.experts.{{}}.{theirs}" for ours, theirs in names.items()}


_PRE = {"pre_attention_norm": "input_layernorm", "pre_mlp_norm": "post_attention_layernorm"}
_POST = {"post_attention_norm": "post_attention_layernorm", "post_mlp_norm": "post_feedforward_layernorm"}
_SANDWICH = {"pre_attention_norm": "input_layernorm", "pre_mlp_norm": "pre_feedforward_layernorm", **_POST}
_QK = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_FULL, _SLIDING = "full_attention", "sliding_attention"


# ---------------------------------------------------------------- rotary frequencies


def frequencies(rope: Raw, dim: int) -> tuple[tuple[float, ...], float]:
    """Inverse frequencies of `dim` rotated dimensions, and the factor on cos and sin.

    Args:
        rope: `rope_type` and its numbers as config.json has them, with `rope_theta` and, where a scaling needs it,
            `original_max_position_embeddings` and `max_position_embeddings`.

    Raises:
        UserError: a kind of scaling that is not supported.
    """
    inverse = (rope["rope_theta"] ** -(np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))).astype(np.float32)
    scale = 1.0
    match rope.get("rope_type", rope.get("type", "default")):
        case "default":
            pass
        case "linear":
            inverse = inverse / rope["factor"]
        case "llama3":
            inverse = _llama3(rope, inverse)
        case "yarn":
            inverse, scale = _yarn(rope, inverse, dim)
        case "longrope" | "su":
            # the short factors: they hold up to the original context, which is as far as `max_positions` then allows
            inverse = inverse / np.asarray(rope["short_factor"], np.float32)
            original = rope["original_max_position_embeddings"]
            factor = rope.get("factor") or rope["max_position_embeddings"] / original
            scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            scale = rope.get("attention_factor") or scale
        case other:
            raise UserError(f"RoPE scaling {other!r} is not supported (default, linear, llama3, yarn, longrope)")
    return tuple(float(f) for f in inverse), scale


def _llama3(rope: Raw, inverse: np.ndarray) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between interpolated. Llama 3.1, arXiv:2407.21783."""
    original, low, high = (rope[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    turns = original * inverse / (2 * math.pi)  # in the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - smooth) * inverse / rope["factor"] + smooth * inverse).astype(np.float32)


def _yarn(rope: Raw, inverse: np.ndarray, dim: int) -> tuple[np.ndarray, float]:
    """YaRN, arXiv:2309.00071: dimensions that turn often are kept, those that turn rarely are interpolated."""
    theta, original = rope["rope_theta"], rope["original_max_position_embeddings"]
    factor = rope.get("factor") or rope["max_position_embeddings"] / original

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    interpolated = inverse / factor * ramp + inverse * (1 - ramp)

    def magnitude(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0

    scale = rope.get("attention_factor")
    if scale is None:
        m, m_all = rope.get("mscale"), rope.get("mscale_all_dim")
        scale = magnitude(m) / magnitude(m_all) if m and m_all else magnitude(1)
    return interpolated.astype(np.float32), float(scale)


def _rope(raw: Raw, layer_type: str = "") -> Raw:
    """The rotary settings: transformers 5 keeps them in rope_parameters, earlier versions beside a rope_scaling."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope = dict(rope.get(layer_type, rope))
    for key in ("rope_theta", "partial_rotary_factor", "max_position_embeddings"):
        rope.setdefault(key, raw.get(key))
    rope.setdefault(
        "original_max_position_embeddings",
        raw.get("original_max_position_embeddings") or raw["max_position_embeddings"],
    )
    return rope


def _kind(raw: Raw, rope: Raw, window: int | None = None) -> LayerKind:
    dim = int(_head_dim(raw) * (rope.get("partial_rotary_factor") or 1.0))
    return LayerKind(*frequencies(rope, dim), window)


def _head_dim(raw: Raw) -> int:
    return raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]


def _layers(raw: Raw, types: list[str], kinds: Mapping[str, LayerKind]) -> dict[str, Any]:
    """`kinds` and `pattern` from every layer's type."""
    unknown = sorted(set(types) - set(kinds))
    if unknown or len(types) != raw["num_hidden_layers"]:
        raise UserError(
            f"layer type {unknown[0]!r} is not supported"
            if unknown
            else f"layer_types has {len(types)} entries for {raw['num_hidden_layers']} layers"
        )
    used = list(dict.fromkeys(kinds[t] for t in types))
    return {"kinds": tuple(used), "pattern": tuple(used.index(kinds[t]) for t in types)}


def _windowed(raw: Raw, default: Callable[[int], bool]) -> dict[str, Any]:
    """Layers that differ in their window alone. `default` says which slide where the config does not list them."""
    window = raw.get("sliding_window")
    count = raw["num_hidden_layers"]
    types = raw.get("layer_types") or [_SLIDING if window and default(i) else _FULL for i in range(count)]
    rope = _rope(raw)
    return _layers(raw, list(types), {_FULL: _kind(raw, rope), _SLIDING: _kind(raw, rope, window)})


# ---------------------------------------------------------------- the families' own features


def _biases(raw: Raw) -> dict[str, Any]:
    attention = raw.get("attention_bias", False)
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": raw.get("mlp_bias", False)}


def _llama(raw: Raw) -> dict[str, Any]:
    return {**_windowed(raw, lambda _: False), **_biases(raw)}


def _mistral(raw: Raw) -> dict[str, Any]:
    return _windowed(raw, lambda _: True)


def _qwen2(raw: dict) -> dict[str, Any]:
    raw = raw if raw.get("use_sliding_window") else raw | {"sliding_window": None}
    return {**_windowed(raw, lambda i: i >= raw["max_window_layers"]), "qkv_bias": True}


def _qwen3(raw: dict) -> dict[str, Any]:
    return {**_qwen2(raw), **_biases(raw), "qk_norm": "head"}


def _experts(raw: Raw) -> dict[str, Any]:
    count, chosen = raw.get("num_experts") or raw["num_local_experts"], raw["num_experts_per_tok"]
    if not 1 <= chosen <= count:
        raise UserError(f"num_experts_per_tok is {chosen}, of {count} experts")
    return {"experts": count, "experts_per_token": chosen}


def _mixtral(raw: Raw) -> dict[str, Any]:
    return {**_windowed(raw, lambda _: True), **_experts(raw)}


def _qwen3_moe(raw: dict) -> dict[str, Any]:
    if raw["mlp_only_layers"] or raw["decoder_sparse_step"] != 1:
        raise UserError(
            "dense layers among mixtures of experts are not supported: mlp_only_layers must be empty, decoder_sparse_step 1"
        )
    raw = raw if raw.get("use_sliding_window") else raw | {"sliding_window": None}
    return {
        **_windowed(raw, lambda _: True),
        **_biases(raw),
        **_experts(raw),
        "qk_norm": "head",
        "intermediate_size": raw["moe_intermediate_size"],
        "normalize_experts": raw["norm_topk_prob"],
    }


def _gemma2(raw: Raw) -> dict[str, Any]:
    return {**_windowed(raw, lambda i: i % 2 == 0), **_gemma(raw)}


def _gemma3(raw: Raw) -> dict[str, Any]:
    period = raw.get("sliding_window_pattern") or 6
    count = raw["num_hidden_layers"]
    types = raw.get("layer_types") or [_FULL if (i + 1) % period == 0 else _SLIDING for i in range(count)]
    if _SLIDING in (raw.get("rope_parameters") or {}):
        local = _rope(raw, _SLIDING)
    else:  # before transformers 5: scaling and rope_theta are the global layers'
        local = {"rope_theta": raw.get("rope_local_base_freq", 10000.0)}
    kinds = {_FULL: _kind(raw, _rope(raw, _FULL)), _SLIDING: _kind(raw, local, raw["sliding_window"])}
    return {**_layers(raw, list(types), kinds), **_gemma(raw), "qk_norm": "head"}


def _gemma(raw: Raw) -> dict[str, Any]:
    if raw.get("use_bidirectional_attention"):
        raise UserError("use_bidirectional_attention is not supported: this is an encoder, not a language model")
    return {
        **_biases(raw),
        "norm": "rms_plus_one",
        "embed_scale": raw["hidden_size"] ** 0.5,
        "query_scale": raw["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": raw.get("attn_logit_softcapping"),
        "logits_softcap": raw.get("final_logit_softcapping"),
    }


def _phi3(raw: dict) -> dict[str, Any]:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) in ("longrope", "su", "yarn"):  # all three names were written
        key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
        original = rope.get("original_max_position_embeddings") or raw["original_max_position_embeddings"]
        scaling = {**rope, "rope_type": "longrope", "original_max_position_embeddings": original}
        return {**_windowed(raw | {key: scaling}, lambda _: True), "max_positions": original}
    return _windowed(raw, lambda _: True)


def _smollm3(raw: Raw) -> dict[str, Any]:
    count, interval = raw["num_hidden_layers"], raw["no_rope_layer_interval"]
    rotated = raw.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(count)]
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    types = raw.get("layer_types") or [_FULL if r or not window else _SLIDING for r in rotated]
    full = _kind(raw, _rope(raw))
    kinds: dict[str, LayerKind] = {}
    for rope in (True, False):
        turned = full if rope else full._replace(frequencies=(0.0,) * len(full.frequencies), rope_scale=1.0)
        kinds |= {f"{_FULL} {rope}": turned, f"{_SLIDING} {rope}": turned._replace(window=window)}
    return {**_layers(raw, [f"{t} {bool(r)}" for t, r in zip(types, rotated, strict=True)], kinds), **_biases(raw)}


def _olmo2(raw: Raw) -> dict[str, Any]:
    return {**_windowed(raw, lambda _: False), **_biases(raw), "qk_norm": "all"}


def _gpt2(raw: Raw) -> dict[str, Any]:
    if (
        not raw.get("scale_attn_weights", True)
        or raw.get("scale_attn_by_inverse_layer_idx")
        or raw.get("add_cross_attention")
    ):
        raise UserError(
            "GPT-2 is supported with its usual attention: scale_attn_weights, no inverse layer index, no cross-attention"
        )
    return {
        "kinds": (LayerKind(),),
        "pattern": (0,) * raw["num_hidden_layers"],
        "norm": "layer",
        "gated": False,
        "learned_positions": True,
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True),
    }


def _gpt_neox(raw: dict) -> dict[str, Any]:
    rope = _rope(raw | {"partial_rotary_factor": raw["rotary_pct"], "rope_theta": raw["rotary_emb_base"]})
    return {
        "kinds": (_kind(raw, rope),),
        "pattern": (0,) * raw["num_hidden_layers"],
        "norm": "layer",
        "gated": False,
        "parallel": raw["use_parallel_residual"],
        "qkv_bias": raw["attention_bias"],
        "o_bias": raw["attention_bias"],
        "mlp_bias": True,
    }


_SMALL = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "hidden_act": "silu"}
_QWEN = _SMALL | {"max_position_embeddings": 32768, "max_window_layers": 28, "sliding_window": 4096}
_GEMMA = _SMALL | {
    "hidden_act": "gelu_pytorch_tanh",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
}
_GEMMA2 = Family(
    _gemma2,
    _SPLIT,
    _SANDWICH,
    defaults=_GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    names={"hidden_act": "hidden_activation"},
)
_GEMMA3 = Family(
    _gemma3,
    _SPLIT,
    _SANDWICH,
    _QK,
    defaults=_GEMMA | {"rope_theta": 1_000_000.0, "max_position_embeddings": 131072, "vocab_size": 262208},
    names={"hidden_act": "hidden_activation"},
)

FAMILIES: dict[str, Family] = {  # by config.json's model_type
    "llama": Family(_llama, _SPLIT, _PRE, defaults=_SMALL),
    "mistral": Family(
        _mistral,
        _SPLIT,
        _PRE,
        defaults=_SMALL | {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    ),
    "qwen2": Family(_qwen2, _SPLIT, _PRE, defaults=_QWEN),
    "qwen3": Family(_qwen3, _SPLIT, _PRE, _QK, defaults=_QWEN | {"head_dim": 128}),
    "mixtral": Family(
        _mixtral,
        _ATTENTION,
        _PRE,
        experts=_mixture("block_sparse_moe", "w1", "w3", "w2"),
        defaults=_SMALL
        | {
            "num_key_value_heads": 8,
            "rope_theta": 1_000_000.0,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_moe": Family(
        _qwen3_moe,
        _ATTENTION,
        _PRE,
        _QK,
        experts=_mixture("mlp", "gate_proj", "up_proj", "down_proj"),
        defaults=_QWEN
        | {
            "num_key_value_heads": 4,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "mlp_only_layers": (),
            "decoder_sparse_step": 1,
        },
    ),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "phi3": Family(
        _phi3,
        (
            Module("self_attn.qkv_proj", "qkv", ("q", "k", "v")),
            Module("self_attn.o_proj", "o", ("o",)),
            Module("mlp.gate_up_proj", "gate_up", ("gate", "up")),
            Module("mlp.down_proj", "down", ("down",)),
        ),
        _PRE,
        defaults=_SMALL
        | {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "pad_token_id": 32000,
        },
    ),
    "smollm3": Family(
        _smollm3,
        _SPLIT,
        _PRE,
        defaults=_SMALL
        | {
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
            "num_key_value_heads": 4,
            "rope_theta": 2_000_000.0,
            "max_position_embeddings": 32768,
            "pad_token_id": 128004,
        },
    ),
    "olmo2": Family(_olmo2, _SPLIT, _POST, _QK, defaults=_SMALL | {"rms_norm_eps": 1e-5, "pad_token_id": 1}),
    "gpt2": Family(
        _gpt2,
        (
            Module("attn.c_attn", "qkv", ("q", "k", "v")),
            Module("attn.c_proj", "o", ("o",)),
            Module("mlp.c_fc", "gate_up", ("up",)),
            Module("mlp.c_proj", "down", ("down",)),
        ),
        {"pre_attention_norm": "ln_1", "pre_mlp_norm": "ln_2"},
        defaults={
            "layer_norm_epsilon": 1e-5,
            "n_positions": 1024,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
        },
        names={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        layers="transformer.h",
        embed="transformer.wte",
        positions="transformer.wpe",
        norm="transformer.ln_f",
        prefix="transformer.",
        transposed=True,
    ),
    "gpt_neox": Family(
        _gpt_neox,
        (
            Module("attention.query_key_value", "qkv", ("q", "k", "v")),
            Module("attention.dense", "o", ("o",)),
            Module("mlp.dense_h_to_4h", "gate_up", ("up",)),
            Module("mlp.dense_4h_to_h", "down", ("down",)),
        ),
        _PRE,
        defaults={
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "hidden_act": "gelu",
            "use_parallel_residual": True,
            "attention_bias": True,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000.0,
        },
        names={"rms_norm_eps": "layer_norm_eps"},
        layers="gpt_neox.layers",
        embed="gpt_neox.embed_in",
        norm="gpt_neox.final_layer_norm",
        head="embed_out",
        prefix="gpt_neox.",
        interleaved=True,
    ),
}
# the text part of the multimodal checkpoints (4B and up)
FAMILIES["gemma3"] = Family(
    **vars(_GEMMA3)
    | {
        "layers": "model.language_model.layers",
        "embed": "model.language_model.embed_tokens",
        "norm": "model.language_model.norm",
        "prefix": "model.language_model.",
        "renamed": "language_model.model.",
    }
)
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def read(raw: Raw, where: str) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face config.json.

    Args:
        raw: its content.
        where: its path, for messages.

    Raises:
        UserError: an unknown family, a feature that is not supported, or a number missing.
    """
    if (name := raw.get("model_type")) not in FAMILIES:
        raise UserError(f"{where}: model_type {name!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[name]
    try:
        text = {**family.defaults, **raw.get("text_config", raw)}
        raw = text | {ours: text[theirs] for ours, theirs in family.names.items() if theirs in text}
        if raw["hidden_act"] not in _ACTIVATIONS:
            raise UserError(f"activation {raw['hidden_act']!r} is not supported ({', '.join(_ACTIVATIONS)})")
        heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
        fields = {
            "vocab_size": raw["vocab_size"],
            "hidden_size": hidden,
            "intermediate_size": raw.get("intermediate_size") or 4 * hidden,
            "num_layers": raw["num_hidden_layers"],
            "num_heads": heads,
            # what an older config.json leaves out
            "num_kv_heads": raw.get("num_key_value_heads") or heads,
            "head_dim": _head_dim(raw),
            "query_scale": _head_dim(raw) ** -0.5,
            "norms": tuple(family.norms),
            "norm_eps": raw["rms_norm_eps"],
            "activation": _ACTIVATIONS[raw["hidden_act"]],
            "tie_embeddings": raw.get("tie_word_embeddings", False),
            "max_positions": raw["max_position_embeddings"],
        }
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        if wrong := [size for size in (*sizes, "max_positions") if type(fields[size]) is not int]:
            raise TypeError(f"{wrong[0]} is {fields[wrong[0]]!r}")
        if heads % fields["num_kv_heads"]:
            raise UserError(f"{heads} attention heads do not divide into {fields['num_kv_heads']} KV heads")
        return ModelConfig(family=name, **fields | family.features(dict(raw)))
    except KeyError as error:
        raise UserError(f"{where} has no {error.args[0]}; it is not a complete {name} config") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where}: a setting has a value that it cannot have ({error})") from error


# ---------------------------------------------------------------- names, shapes and layout of the weights


def module_shapes(c: ModelConfig) -> Iterator[tuple[str, Module, int, int]]:
    """Every linear module inside the layers: its path, its row of the table, input size, output size."""
    family = FAMILIES[c.family]
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    inputs = {"qkv": c.hidden_size, "o": heads, "gate_up": c.hidden_size, "down": c.intermediate_size}
    outputs = {"q": heads, "k": kv, "v": kv, "o": c.hidden_size, "down": c.hidden_size}
    outputs |= dict.fromkeys(("gate", "up"), c.intermediate_size)
    for layer in range(c.num_layers):
        for module in family.modules:
            out = sum(outputs[part] for part in module.parts)
            yield f"{family.layers}.{layer}.{module.name}", module, inputs[module.kernel], out


def has_bias(c: ModelConfig, kernel: str) -> bool:
    return {"qkv": c.qkv_bias, "o": c.o_bias, "gate_up": c.mlp_bias, "down": c.mlp_bias}[kernel]


def expected_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every weight under Hugging Face's name, in its layout: linear layers [out, in] (GPT-2: [in, out])."""
    family, hidden = FAMILIES[c.family], c.hidden_size
    affine = ("weight", "bias") if c.norm == "layer" else ("weight",)
    shapes: dict[str, tuple[int, ...]] = {f"{family.embed}.weight": (c.vocab_size, hidden)}
    if c.learned_positions:
        shapes[f"{family.positions}.weight"] = (c.max_positions, hidden)
    for layer in range(c.num_layers):
        shapes |= {f"{family.layers}.{layer}.{n}.{kind}": (hidden,) for n in family.norms.values() for kind in affine}
        for ours, theirs in family.qk_norms.items():
            heads = {"q_norm": c.num_heads, "k_norm": c.num_kv_heads}[ours] if c.qk_norm == "all" else 1
            shapes[f"{family.layers}.{layer}.{theirs}.weight"] = (heads * c.head_dim,)
    for path, module, inp, out in module_shapes(c):
        shapes[f"{path}.weight"] = (inp, out) if family.transposed else (out, inp)
        if has_bias(c, module.kernel):
            shapes[f"{path}.bias"] = (out,)
    for layer in range(c.num_layers):
        shapes |= {f"{family.layers}.{layer}.{name}.weight": shape for name, shape in _expert_shapes(c)}
    shapes |= {f"{family.norm}.{kind}": (hidden,) for kind in affine}
    if not c.tie_embeddings:
        shapes[f"{family.head}.weight"] = (c.vocab_size, hidden)
    return shapes


def _expert_shapes(c: ModelConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """The router and the experts of one layer: names below it, shapes [out, in]."""
    inner, outer = (c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size)
    for kind, name in FAMILIES[c.family].experts.items():
        if kind == "router":
            yield name, (c.experts, c.hidden_size)
        else:
            yield from ((name.format(i), outer if kind == "down" else inner) for i in range(c.experts))


def active_weights(c: ModelConfig) -> int:
    """Weights in the layers' matmuls that one token goes through: of a mixture only its own experts'."""
    experts = c.hidden_size * (c.experts + c.experts_per_token * 3 * c.intermediate_size)
    return sum(inp * out for *_, inp, out in module_shapes(c)) + c.num_layers * experts


def stack_experts(c: ModelConfig, kind: str, get: Callable[[str], np.ndarray]) -> np.ndarray:
    """One leaf of `ple_jax.models.experts.Experts`: the router [in, experts], or a kernel of all experts [experts, in, out].

    Args:
        kind: router, gate, up or down.
        get: a module's name below the layer -> its weight [out, in].
    """
    name = FAMILIES[c.family].experts[kind]
    if kind == "router":
        return get(name).T
    return np.stack([get(name.format(i)).T for i in range(c.experts)])


def fuse(c: ModelConfig, kernel: str, modules: Mapping[str, Any]) -> Any:
    """Puts what modules hold into the layout of the decoder's kernel, zeros where a module is not there.

    Args:
        kernel: qkv, o, gate_up or down.
        modules: module name -> array [..., out of that module], numpy or JAX: a weight [in, out], a bias [out], LoRA's
            b [rank, out]; at least one.

    Returns:
        [..., out of the kernel]: qkv [..., kv_heads * (group + 2) * head_dim] (for every KV head its query heads, then
        k, then v, so that a shard holds whole heads), gate_up [..., 2 or 1, intermediate], o and down as they are.
    """
    family = FAMILIES[c.family]
    parts: dict[str, Any] = {}
    for module in family.modules:
        if module.kernel == kernel and module.name in modules:
            parts |= _parts(c, family, module, modules[module.name])
    if kernel in parts:
        return parts[kernel]
    wanted = {"q": c.group, "k": 1, "v": 1} if kernel == "qkv" else {"gate": 1, "up": 1} if c.gated else {"up": 1}
    like = next(iter(parts.values()))
    xp = array_namespace(like)

    def zeros(n: int) -> Any:
        return xp.zeros((*like.shape[:-2], n, like.shape[-1]), dtype=like.dtype)

    joined = xp.concat([parts[p] if p in parts else zeros(n) for p, n in wanted.items()], axis=-2)
    return xp.reshape(joined, (*joined.shape[:-3], -1)) if kernel == "qkv" else joined


def _parts(c: ModelConfig, family: Family, module: Module, x: Any) -> dict[str, Any]:
    """A module's output dimension by part: q, k, v as [..., kv_head, n, head_dim], gate and up as [..., 1, intermediate]."""
    xp, before = array_namespace(x), x.shape[:-1]
    if module.kernel in ("o", "down"):
        return {module.kernel: x}
    if module.kernel == "gate_up":
        x = xp.reshape(x, (*before, len(module.parts), c.intermediate_size))
        return {part: x[..., i : i + 1, :] for i, part in enumerate(module.parts)}
    if family.interleaved:
        x = xp.reshape(x, (*before, c.num_kv_heads, 3, c.head_dim))
        return {part: x[..., i : i + 1, :] for i, part in enumerate(module.parts)}
    heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
    parts, start = {}, 0
    for part in module.parts:
        end = start + heads[part] * c.head_dim
        parts[part] = xp.reshape(x[..., start:end], (*before, c.num_kv_heads, -1, c.head_dim))
        start = end
    return parts
