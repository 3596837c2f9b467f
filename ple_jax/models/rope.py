"""Rotary position embeddings as config.json describes them: frequencies and their scalings."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ple_jax.core.errors import UserError
from ple_jax.models.values import ROPE, check

Raw = Mapping[str, Any]  # a config.json


def frequencies(rope: Raw, dim: int) -> tuple[tuple[float, ...], float]:
    """Inverse frequencies of `dim` rotated dimensions, and the factor on cos and sin.

    Args:
        rope: `rope_type` and its numbers as config.json has them, with `rope_theta` and, where a scaling needs it,
            `original_max_position_embeddings` and `max_position_embeddings`.

    Raises:
        UserError: a kind of scaling that is not supported, a number that cannot be, or pairs that do not come out even.
    """
    check(rope, ROPE)
    if dim < 2 or dim % 2:
        raise UserError(f"{dim} dimensions of a head are to be rotated, which are turned in pairs: an even number is needed")
    powers = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    inverse: Any = (float(rope["rope_theta"]) ** -powers).astype(np.float32)
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
            if len(rope["short_factor"]) != len(inverse):
                raise UserError(f"short_factor has {len(rope['short_factor'])} numbers for {len(inverse)} frequencies")
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
    if high <= low:
        raise UserError(f"high_freq_factor {high} must be above low_freq_factor {low}")
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
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0, 1)
    interpolated = inverse / factor * ramp + inverse * (1 - ramp)

    def magnitude(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0

    scale = rope.get("attention_factor")
    if scale is None:
        m, m_all = rope.get("mscale"), rope.get("mscale_all_dim")
        scale = magnitude(m) / magnitude(m_all) if m and m_all else magnitude(1)
    return interpolated.astype(np.float32), float(scale)


def read_rope(raw: Raw, layer_type: str = "") -> Raw:
    """The rotary settings: transformers 5 keeps them in rope_parameters, earlier versions beside a rope_scaling.

    Where a config.json has both, the whole rope_scaling counts, as in transformers.
    """
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):  # one of each type of layers
        if layer_type not in rope:
            raise UserError(f"the rotary settings of {', '.join(rope)} are there, and none of {layer_type or 'all layers'}")
        rope = dict(rope[layer_type])
    for key in ("rope_theta", "partial_rotary_factor", "max_position_embeddings"):
        rope.setdefault(key, raw.get(key))
    rope.setdefault(
        "original_max_position_embeddings",
        raw.get("original_max_position_embeddings") or raw["max_position_embeddings"],
    )
    return rope
