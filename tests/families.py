"""Every model family, tiny and random, as transformers builds it: what the decoder here is measured against.

Sizes are small, but each feature of a family (its RoPE, windows, caps, biases, norms) is set so that it changes the logits
of a dozen tokens visibly; `Variant.without` says how each is switched off, and a test holds transformers itself to that.
"""

import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from ple_jax.models.tokenizer import byte_tokenizer

LAYERS, HEADS, HEAD_DIM, WINDOW, VOCAB = 3, 4, 16, 6, 264
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 257,
}
# an epsilon large enough to be seen; a theta small enough to be
_LLAMA = _SIZES | {
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
}
_QWEN3 = _LLAMA | {"head_dim": HEAD_DIM}
_GEMMA2 = _QWEN3 | {"sliding_window": WINDOW, "query_pre_attn_scalar": 40}
_WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"]
_LOCAL = {"sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
_GLOBAL = {"full_attention": {"rope_type": "linear", "rope_theta": 400.0, "factor": 4.0}}
_THETA = {"rope_type": "default", "rope_theta": 400.0}
_GEMMA3 = _GEMMA2 | {"layer_types": _WINDOWS, "rope_parameters": _LOCAL | _GLOBAL}
_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
_NEOX = _SIZES | {
    "layer_norm_eps": 1e-2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20.0, "partial_rotary_factor": 0.25},
}
_GPT2 = {
    "vocab_size": VOCAB, "n_embd": HEADS * HEAD_DIM, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128,
    "layer_norm_epsilon": 1e-2, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257,
}  # fmt: skip
_PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_NO_EPSILON = {"rms_norm_eps": 1e-6}


class Variant(NamedTuple):
    model: str  # class of transformers; its config's class is found from it
    options: dict[str, Any]
    without: dict[str, dict[str, Any]] = {}  # a feature -> the options that switch it off, the weights staying as they are


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 300.0, **parameters}}


_SCALED = {"RoPE scaling": _rope(rope_type="default")}

VARIANTS = {
    "llama": Variant("LlamaForCausalLM", _LLAMA, {"theta": _PLAIN_ROPE, "epsilon": _NO_EPSILON}),
    "llama-llama3": Variant(
        "LlamaForCausalLM",
        _LLAMA
        | _rope(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        ),
        _SCALED,
    ),
    "llama-linear": Variant("LlamaForCausalLM", _LLAMA | _rope(rope_type="linear", factor=3.0), _SCALED),
    "llama-yarn": Variant(
        "LlamaForCausalLM", _LLAMA | _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32), _SCALED
    ),
    "llama-bias": Variant("LlamaForCausalLM", _LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": Variant("LlamaForCausalLM", _LLAMA | {"tie_word_embeddings": True}),
    "llama-head_dim": Variant("LlamaForCausalLM", _LLAMA | {"head_dim": 24}),
    "mistral": Variant("MistralForCausalLM", _LLAMA | {"sliding_window": WINDOW}, {"window": {"sliding_window": None}}),
    "mistral-global": Variant("MistralForCausalLM", _LLAMA | {"sliding_window": None}),
    "qwen2": Variant("Qwen2ForCausalLM", _LLAMA),
    "qwen2-window": Variant(
        "Qwen2ForCausalLM",
        _LLAMA | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        {"window": {"use_sliding_window": False}, "first layer global": {"max_window_layers": 0}},
    ),
    "qwen3": Variant("Qwen3ForCausalLM", _QWEN3 | {"tie_word_embeddings": True}, {"epsilon": _NO_EPSILON}),
    "gemma2": Variant(
        "Gemma2ForCausalLM",
        _GEMMA2 | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
        {
            "cap on scores": {"attn_logit_softcapping": None},
            "cap on logits": {"final_logit_softcapping": None},
            "scale of queries": {"query_pre_attn_scalar": HEAD_DIM},
            "local layers": {"layer_types": ["full_attention"] * LAYERS},
            "global layers": {"layer_types": ["sliding_attention"] * LAYERS},
            "activation": {"hidden_activation": "silu"},
        },
    ),
    "gemma3_text": Variant(
        "Gemma3ForCausalLM",
        _GEMMA3,
        {
            "local layers": {"layer_types": ["full_attention"] * LAYERS},
            "global layers": {"layer_types": ["sliding_attention"] * LAYERS},
            "local theta": {"rope_parameters": {"sliding_attention": _THETA, **_GLOBAL}},
            "global scaling": {"rope_parameters": {**_LOCAL, "full_attention": _THETA}},
            "scale of queries": {"query_pre_attn_scalar": HEAD_DIM},
        },
    ),
    "gemma3": Variant(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _GEMMA3,
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "boi_token_index": 260,
            "eoi_token_index": 261,
            "image_token_index": 262,
            "eos_token_id": 256,
            "pad_token_id": 257,
        },
    ),  # fmt: skip
    "phi3": Variant("Phi3ForCausalLM", _LLAMA | {"sliding_window": WINDOW}, {"window": {"sliding_window": None}}),
    "phi3-partial": Variant(
        "Phi3ForCausalLM",
        _LLAMA | _rope(rope_type="default", partial_rotary_factor=0.5),
        {"part that is rotated": _rope(rope_type="default", partial_rotary_factor=1.0)},
    ),
    "phi3-longrope": Variant(
        "Phi3ForCausalLM",
        _LLAMA
        | {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
        | _rope(
            rope_type="longrope",
            short_factor=[1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.1, 4.0],
            long_factor=[1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0],
        ),
        _SCALED,
    ),
    "smollm3": Variant(
        "SmolLM3ForCausalLM", _LLAMA | {"no_rope_layers": [1, 0, 1]}, {"layer without RoPE": {"no_rope_layers": [1, 1, 1]}}
    ),
    "smollm3-yarn": Variant(
        "SmolLM3ForCausalLM",
        _LLAMA
        | {"no_rope_layers": [1, 0, 1]}
        | _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.3),
        _SCALED,
    ),
    "olmo2": Variant("Olmo2ForCausalLM", _LLAMA, {"epsilon": _NO_EPSILON}),
    "gpt2": Variant(
        "GPT2LMHeadModel",
        _GPT2,
        {"epsilon": {"layer_norm_epsilon": 1e-6}, "approximate activation": {"activation_function": "relu"}},
    ),
    "gpt_neox": Variant(
        "GPTNeoXForCausalLM",
        _NEOX,
        {
            "parallel residual": {"use_parallel_residual": False},
            "part that is rotated": {"rope_parameters": _NEOX["rope_parameters"] | {"partial_rotary_factor": 1.0}},
            "epsilon": {"layer_norm_eps": 1e-6},
        },
    ),
    "gpt_neox-sequential": Variant("GPTNeoXForCausalLM", _NEOX | {"use_parallel_residual": False}),
    "mixtral": Variant(
        "MixtralForCausalLM",
        _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
        {"experts per token": {"num_experts_per_tok": 1}, "window": {"sliding_window": None}},
    ),
    "qwen3_moe": Variant(
        "Qwen3MoeForCausalLM",
        _QWEN3 | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True},
        {"shares that add up to one": {"norm_topk_prob": False}, "experts per token": {"num_experts_per_tok": 2}},
    ),
}

UNSUPPORTED = {"olmoe": Variant("OlmoeForCausalLM", _LLAMA), "bloom": Variant("BloomForCausalLM", {})}


def config(variant: Variant, **changes: Any) -> transformers.PreTrainedConfig:
    """The variant's config, with some options changed."""
    return getattr(transformers, variant.model).config_class(**variant.options | changes)


def build(variant: Variant, **changes: Any) -> transformers.PreTrainedModel:
    """The model in eval mode, fp32, attention written out. Weights depend on their names alone, so not on `changes`."""
    settings = config(variant, **changes)
    settings._attn_implementation = "eager"
    model = getattr(transformers, variant.model)(settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(_random(name, tuple(parameter.shape), variant.model.startswith("Gemma"))))
    return model


def _random(name: str, shape: tuple[int, ...], gemma: bool) -> np.ndarray:
    """Biases and norms are no less random than matrices: what is forgotten must show."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if re.search(r"(norm|ln_\w+)\d*\.weight$", name):
        # Gemma adds a one itself; its last norm makes up for the small embedding
        centre = (3 if name.endswith(("model.norm.weight", "language_model.norm.weight")) else 0) if gemma else 1
        noise = centre + 0.3 * noise
    elif gemma and "embed_tokens" in name:
        noise = 0.04 * noise  # Gemma scales it up, and a tied head would then only repeat the last token
    else:
        noise = 0.2 * noise
    return noise.astype(np.float32)


def save(model: transformers.PreTrainedModel, folder: Path) -> None:
    """A checkpoint folder as a hub has it: config.json, generation_config.json, model.safetensors, tokenizer."""
    model.save_pretrained(folder, safe_serialization=True)
    byte_tokenizer().save_pretrained(folder)


def older(raw: dict[str, Any]) -> dict[str, Any]:
    """A config.json as transformers 4 wrote it, with all left out that equals the class's default.

    Hubs are full of these: RoPE in fields of its own, a pattern in place of a list of layers, little said of a text model
    inside another one.
    """
    raw = dict(raw)
    if "text_config" in raw:
        return raw | {"text_config": older(raw["text_config"])}
    kind, rope = raw["model_type"], raw.pop("rope_parameters", None)
    if "layer_types" in raw:
        del raw["layer_types"]
        raw |= {"sliding_window_pattern": LAYERS} if kind == "gemma3_text" else {}
    if kind == "gemma3_text":
        raw["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if kind == "gpt_neox":
        raw |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
    elif rope:
        scaling = {key: x for key, x in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        raw |= {"rope_theta": rope["rope_theta"], "rope_scaling": None if scaling == {"rope_type": "default"} else scaling}
        if kind == "phi3" and raw["rope_scaling"]:
            del scaling["original_max_position_embeddings"]  # stands beside it
            scaling["type"] = scaling.pop("rope_type")
        raw |= {"partial_rotary_factor": rope["partial_rotary_factor"]} if "partial_rotary_factor" in rope else {}
    defaults = transformers.CONFIG_MAPPING[kind]().to_dict()
    return {key: x for key, x in raw.items() if key == "model_type" or key not in defaults or x != defaults[key]}
