"""The table of model families: how a Hugging Face config.json becomes a `ModelConfig`, and under which names weights are.

A family is one row of `FAMILIES`; the decoder's own code knows no family. Modules have Hugging Face's names, which PEFT
uses too, so adapters need no translation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ple_jax.core.errors import UserError
from ple_jax.models.config import LayerKind, ModelConfig
from ple_jax.models.rope import Raw, frequencies, read_rope
from ple_jax.models.values import check


class Module(NamedTuple):
    """One linear module of a layer, and which parts of one of the decoder's fused kernels it holds."""

    name: str  # below the layer: "self_attn.q_proj"
    kernel: str  # qkv | o | gate_up | down
    parts: tuple[str, ...]  # of q, k, v; of gate, up; or the kernel itself


@dataclass(frozen=True)
class Family:
    """One family of models: how its config.json is read, and the names and the layout of its weights."""

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
_EXPERTS = 2**17  # of all layers together: their tensors are named one by one


# ---------------------------------------------------------------- kinds of layers


def _kind(raw: Raw, rope: Raw, window: int | None = None) -> LayerKind:
    dim = int(_head_dim(raw) * (rope.get("partial_rotary_factor") or 1.0))
    return LayerKind(*frequencies(rope, dim), window)


def _head_dim(raw: Raw) -> int:
    return raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]


def _layers(raw: Raw, types: list[str], kinds: Mapping[str, LayerKind]) -> dict[str, Any]:
    """Returns `kinds` and `pattern` of a `ModelConfig`, given every layer's type and the kind of each type."""
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
    """Returns `kinds` and `pattern` for layers that differ only in their attention window.

    `default` says of a layer's index whether that layer has a sliding window, for a config that does not list the types.
    """
    window = raw.get("sliding_window")
    count = raw["num_hidden_layers"]
    types = raw.get("layer_types") or [_SLIDING if window and default(i) else _FULL for i in range(count)]
    windows = {_FULL: None, _SLIDING: window}
    kinds = {t: _kind(raw, read_rope(raw, t), windows[t]) for t in dict.fromkeys(types) if t in windows}
    return _layers(raw, list(types), kinds)


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
    if (most := raw["num_hidden_layers"] * count) > _EXPERTS:
        raise UserError(f"{raw['num_hidden_layers']} layers of {count} experts are {most:,}: more than {_EXPERTS:,}")
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
    # before transformers 5: scaling and rope_theta are the global layers'; with both names the scaling comes on top
    nested = raw.get("rope_parameters") or {}
    full = {**(nested.get(_FULL) or {}), **(raw.get("rope_scaling") or {})}
    local = {"rope_theta": raw.get("rope_local_base_freq", 10000.0), **(nested.get(_SLIDING) or {})}
    rope = read_rope({**raw, "rope_parameters": full, "rope_scaling": None})
    kinds = {_FULL: _kind(raw, rope), _SLIDING: _kind(raw, local, raw["sliding_window"])}
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
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type")) in ("longrope", "su", "yarn"):  # all three names were written
        original = raw["original_max_position_embeddings"]
        scaling = {**rope, "rope_type": "longrope", "original_max_position_embeddings": original}
        return {**_windowed(raw | {"rope_scaling": scaling}, lambda _: True), "max_positions": original}
    return _windowed(raw, lambda _: True)


def _smollm3(raw: Raw) -> dict[str, Any]:
    count, interval = raw["num_hidden_layers"], raw["no_rope_layer_interval"]
    rotated = raw.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(count)]
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    types = raw.get("layer_types") or [_FULL if r or not window else _SLIDING for r in rotated]
    full = _kind(raw, read_rope(raw, _FULL))
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
    rope = read_rope(raw | {"partial_rotary_factor": raw["rotary_pct"], "rope_theta": raw["rotary_emb_base"]})
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


# ---------------------------------------------------------------- the table


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


# ---------------------------------------------------------------- reading a config.json


def read(raw: Raw, where: str) -> ModelConfig:
    """Converts a Hugging Face config.json to a `ModelConfig`.

    Args:
        raw: the content of the file.
        where: its path, for error messages.

    Raises:
        UserError: if the family is unknown, a feature is not supported, or a value is missing or impossible.
    """
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{where}: model_type {name!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[name]
    try:
        text = {**family.defaults, **raw.get("text_config", raw)}
        raw = text | {ours: text[theirs] for ours, theirs in family.names.items() if theirs in text}
        check(raw, names=family.names)
        fields = _numbers(raw) | {"norms": tuple(family.norms)} | family.features(dict(raw))
        return ModelConfig(family=name, **fields)
    except KeyError as error:
        raise UserError(f"{where} has no {error.args[0]}; it is not a complete {name} config") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{where}: a setting has a value that it cannot have ({error})") from error


def _numbers(raw: Raw) -> dict[str, Any]:
    """Returns the fields of a `ModelConfig` that all families share, from a config.json whose keys have Llama's names."""
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
        "norm_eps": float(raw["rms_norm_eps"]),
        "activation": _ACTIVATIONS[raw["hidden_act"]],
        "tie_embeddings": bool(raw.get("tie_word_embeddings")),
        "max_positions": raw["max_position_embeddings"],
    }
    if raw.get("head_dim") is None and hidden % heads:
        raise UserError(f"hidden_size {hidden} does not divide into {heads} attention heads")
    if heads % fields["num_kv_heads"]:
        raise UserError(f"{heads} attention heads do not divide into {fields['num_kv_heads']} KV heads")
    return fields
