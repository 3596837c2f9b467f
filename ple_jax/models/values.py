"""The rules for the values of a config.json, which are checked before any value is used.

A checkpoint's config.json can come from anyone. An impossible value (no heads, half a head, a text for a number) is refused
by name, and so is one so large that merely naming the tensors would take forever.
"""

from collections.abc import Mapping
from typing import Any

from ple_jax.core.errors import UserError
from ple_jax.core.rules import Rule, flag, many, mapping, optional, real, text, whole
from ple_jax.core.secrets import shown

_SIZE = whole(1, 2**24)
_COUNT = whole(1, 2**16)
_FEW = whole(1, 2**12)
_TOKENS = whole(1, 2**31)
# what float32 has room for, and its inverse
_POSITIVE = real(lambda v: 1e-30 <= v <= 1e30, "above 0 and at most 1e30")
_NOT_NEGATIVE = real(lambda v: 0 <= v <= 1e30, "from 0 to 1e30")
_PART = real(lambda v: 0 < v <= 1, "above 0 and at most 1")


VALUES: dict[str, Rule] = {  # under Llama's names; what is not there is not checked
    "vocab_size": _TOKENS,
    "hidden_size": _SIZE,
    "intermediate_size": optional(_SIZE),  # GPT-2 leaves it out
    "num_hidden_layers": _FEW,
    "num_attention_heads": _COUNT,
    "num_key_value_heads": optional(_COUNT),
    "head_dim": optional(_COUNT),
    "max_position_embeddings": _TOKENS,
    "original_max_position_embeddings": optional(_TOKENS),
    "rms_norm_eps": real(lambda v: 0 <= v <= 1, "from 0 to 1"),
    "hidden_act": text,
    "tie_word_embeddings": optional(flag),
    "attention_bias": optional(flag),
    "mlp_bias": optional(flag),
    "rope_theta": optional(_POSITIVE),
    "rope_local_base_freq": optional(_POSITIVE),
    "rotary_emb_base": _POSITIVE,
    "rotary_pct": _PART,
    "partial_rotary_factor": optional(_PART),
    "rope_scaling": optional(mapping),
    "rope_parameters": optional(mapping),
    "use_sliding_window": optional(flag),
    "sliding_window": optional(_TOKENS),
    "sliding_window_pattern": optional(_COUNT),
    "max_window_layers": whole(0),
    "layer_types": optional(many(text, empty=True)),
    "no_rope_layers": optional(many(whole(0, 2), empty=True)),
    "no_rope_layer_interval": _COUNT,
    "query_pre_attn_scalar": _POSITIVE,
    "attn_logit_softcapping": optional(_POSITIVE),
    "final_logit_softcapping": optional(_POSITIVE),
    "use_parallel_residual": flag,
    "num_experts": optional(_FEW),
    "num_local_experts": _FEW,
    "num_experts_per_tok": _FEW,
    "moe_intermediate_size": _SIZE,
    "norm_topk_prob": flag,
    "decoder_sparse_step": whole(0),
    "pad_token_id": optional(whole(-1)),
}
ROPE: dict[str, Rule] = {  # of rope_parameters and rope_scaling
    "rope_theta": optional(_POSITIVE),
    "partial_rotary_factor": optional(_PART),
    "factor": optional(_POSITIVE),
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "attention_factor": optional(_POSITIVE),
    "beta_fast": optional(_POSITIVE),
    "beta_slow": optional(_POSITIVE),
    "mscale": optional(_NOT_NEGATIVE),
    "mscale_all_dim": optional(_NOT_NEGATIVE),
    "truncate": optional(flag),
    "short_factor": many(_POSITIVE),
    "long_factor": many(_POSITIVE),
    "original_max_position_embeddings": optional(_TOKENS),
    "max_position_embeddings": optional(_TOKENS),
}


def check(values: Mapping[str, Any], rules: Mapping[str, Rule] = VALUES, *, names: Mapping[str, str] | None = None) -> None:
    """Raises a UserError that names the first value that its rule refuses.

    A key without a rule may hold anything, and a key that is missing is not checked.

    Args:
        names: the file's own names for keys that have other names in `rules`, for the error.
    """
    for key, rule in rules.items():
        if key in values and (says := rule(values[key])):
            raise UserError(f"{(names or {}).get(key, key)} is {shown(values[key], 80)} but must be {says}")
