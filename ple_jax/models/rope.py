"""Rotary position embeddings as config.json describes them: frequencies and their scalings."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ple_jax.core.errors import UserError
from ple_jax.models.values import ROPE, check

Raw = Mapping[str, Any]  # a config.json


def frequencies(rope: Raw, dim: int) -> tuple[tuple[float, ...], float]:
    """Computes the inverse frequencies of the `dim` dimensions of a head that are rotated, and the factor on cos and sin.

    Args:
        rope: `rope_type` and its numbers as config.json has them, with `rope_theta` and, where a scaling needs them,
            `original_max_position_embeddings` and `max_position_embeddings`.

    Returns:
        The dim / 2 inverse frequencies, in radians per position, and the factor.

    Raises:
        UserError: if the kind of scaling is not supported, a number is impossible, or `dim` is not even and positive.
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
    """Applies Llama 3.1's scaling, arXiv:2407.21783.

    The frequencies of long wavelengths are divided by `factor`, short ones keep theirs, and those between are
    interpolated.
    """
    original, low, high = (rope[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise UserError(f"high_freq_factor {high} must be above low_freq_factor {low}")
    turns = original * inverse / (2 * math.pi)  # in the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - smooth) * inverse / rope["factor"] + smooth * inverse).astype(np.float32)


def _yarn(rope: Raw, inverse: np.ndarray, dim: int) -> tuple[np.ndarray, float]:
    """Applies YaRN's scaling, arXiv:2309.00071; also returns its factor on cos and sin.

    The frequencies of dimensions that turn often are kept, those of dimensions that turn rarely are interpolated.
    """
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
    """Returns the rotary settings of a config.json, as `frequencies` takes them.

    transformers 5 keeps them in rope_parameters, earlier versions in rope_scaling and in keys beside it. Where a config.json
    has both, the whole rope_scaling counts and rope_parameters is ignored, as in transformers.

    Args:
        layer_type: the type of layer whose settings are returned, where each type has its own.

    Raises:
        UserError: if each type of layer has its own settings, and this one has none.
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
