"""A quantised base, QLoRA style: kernels stored in 8 or 4 bits, expanded where they are used. arXiv:2305.14314.

Quantising and the pytree of values and scales are qwix's (`QArray`). Expanding is done here: `qwix.dequantize` flattens an
nf4 kernel, which gathers one that is sharded, and on TPU it puts the expanded kernel into memory.

| kind | values | scales | bits a weight |
|---|---|---|---|
| int8 | int8 | fp32, one per output channel | 8 + 32 / in |
| nf4  | uint4, indices of 16 levels; XLA packs two in a byte | bfloat16, one per 64 inputs and output channel | 4.25 |

A quantised kernel takes the place of the array in the base's pytree. Both parts have the kernel's rank and axis order (the
scales' input axis is shorter), so each is sharded by the kernel's own rule.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from jaxtyping import Array, Float
from qwix import QArray

from ple_jax.backend import dots
from ple_jax.core.errors import UserError

_BLOCK, _SMALLEST_BLOCK = 64, 16  # nf4: weights that share a scale

# the 16 levels of NF4, arXiv:2305.14314 appendix E
_LEVELS = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip


def quantize(kernel: Float[np.ndarray, "..."], kind: str, *, axis: int = 0) -> QArray:
    """Quantises one kernel to the nearest level, each channel or block scaled by its largest magnitude.

    Args:
        kernel: [in, *out] of any floating dtype, finite. Dimensions before `axis` (stacked layers) have scales of their own.
        kind: "int8" or "nf4".
        axis: the input dimension.

    Returns:
        `qvalue` of the kernel's shape and `scale`, 1 (int8) or in / 64 (nf4) long along `axis`. Both are on the host: a
        model is quantised tensor by tensor, and the caller places the parts. If the inputs are no multiple of 64, nf4 blocks
        are 32 or 16 long.

    Raises:
        UserError: the kind is unknown, or nf4 is asked for an input dimension that is no multiple of 16.
    """
    return jax.device_get(_quantize(np.asarray(kernel, np.float32), kind, axis))


def shapes(kernel: jax.ShapeDtypeStruct, kind: str, *, axis: int = 0) -> QArray:
    """Returns what `quantize` would return for a kernel of this shape, as `jax.ShapeDtypeStruct`s; nothing is computed."""
    return jax.eval_shape(lambda k: _quantize(k, kind, axis), jax.ShapeDtypeStruct(kernel.shape, jnp.float32))


# jit: eagerly, the search for the nearest level stores all 16 distances of every weight
@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize(kernel: Float[Array, "..."], kind: str, axis: int) -> QArray:
    channels = tuple(i for i in range(kernel.ndim) if i != axis)
    if kind == "int8":
        return qwix.quantize(kernel, "int8", channelwise_axes=channels)
    if kind == "nf4":
        block = math.gcd(kernel.shape[axis], _BLOCK)
        if block < _SMALLEST_BLOCK:
            raise UserError(
                f"nf4 needs kernels whose input size is a multiple of {_SMALLEST_BLOCK}, this one's is"
                f" {kernel.shape[axis]}; quantise to int8"
            )
        return qwix.quantize(kernel, "nf4", channelwise_axes=channels, tiled_axes={axis: block}, scale_dtype=jnp.bfloat16)
    raise UserError(f"kernels cannot be quantised to {kind!r}; choose int8 or nf4")


def dequantize(kernel: QArray, dtype: jax.typing.DTypeLike) -> Float[Array, "inp *out"]:
    """Expands a quantised kernel to the [in, *out] that it stands for: computed in fp32, then cast to `dtype`."""
    values = kernel.qvalue
    if kernel.qtype == "nf4":
        expanded = jnp.asarray(_LEVELS)[values]
    else:
        expanded = values.astype(jnp.float32)
    scale = kernel.scale.astype(jnp.float32)[:, None]
    blocks = expanded.reshape(scale.shape[0], -1, *values.shape[1:])
    return (blocks * scale).reshape(values.shape).astype(dtype)


# checkpoint: without it every layer's expanded kernel would be kept for the backward pass, the whole model in x's dtype
@jax.checkpoint
def project(x: Float[Array, "*batch inp"], kernel: QArray) -> Float[Array, "..."]:
    """Computes x @ kernel, [*batch, *out], in float32. No gradient reaches the kernel."""
    return dots.project(x, dequantize(jax.lax.stop_gradient(kernel), x.dtype))
