"""Dots whose operands are bfloat16 and whose result is float32, and so are the dots of their gradients.

That is what matrix units compute. On CPUs XLA gives them bf16 x bf16 -> fp32 alone: with a bfloat16 result, or with an
operand of each kind, as JAX's own transpose of such a dot has them, the same dot is slower there than in float32. What is
added to a dot is added before it is rounded.

Where the first operand is float32, all is left to JAX.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

MATMULS = "matmuls"  # name of the results of weights' matmuls, rounded, for a remat policy


def project(x: Array, kernel: Array) -> Array:
    """x [*batch, in] @ a frozen kernel [in, *out]; float32. No gradient reaches the kernel."""
    return contract(_of(x, kernel), x, kernel, frozen=True)


def low_rank(x: Array, down: Array, up: Array) -> Array:
    """x [*batch, in] @ down [in, rank] @ up [rank, *out]; float32, and so are the gradients of down and up.

    They are rounded to the dtype of x where they are multiplied, and nowhere else.
    """
    h = contract(_of(x, down), x, down).astype(x.dtype)
    return contract(_of(h, up), h, up)


def grouped(x: Array, kernels: Array, sizes: Array) -> Array:
    """Every slice of x [n, in], so long as `sizes` says, @ its own frozen kernel of [groups, in, out]; float32."""
    if x.dtype == jnp.float32:
        return jax.lax.ragged_dot(x, kernels, sizes)
    return _grouped(x, kernels, sizes)


def _of(x: Array, kernel: Array) -> str:
    batch, out = "abcdefgh"[: x.ndim - 1], "mnopq"[: kernel.ndim - 1]
    return f"{batch}i,i{out}->{batch}{out}"


def contract(spec: str, a: Array, b: Array, *, frozen: bool = False) -> Array:
    """`jnp.einsum` of two operands, in float32; b is rounded to the dtype of a, and its gradient is not.

    Args:
        spec: every index of an operand is in the other one or in the result.
        frozen: no gradient reaches b.
    """
    if a.dtype == jnp.float32:
        return jnp.einsum(spec, a, jax.lax.stop_gradient(b) if frozen else b)
    return _contract(spec, frozen, a, b)


def _wide(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract(spec: str, frozen: bool, a: Array, b: Array) -> Array:
    return _wide(spec, a, b.astype(a.dtype))


def _forward(spec: str, frozen: bool, a: Array, b: Array) -> tuple[Array, tuple[Array | None, Array]]:
    return _contract(spec, frozen, a, b), (None if frozen else a, b)


def _backward(spec: str, frozen: bool, saved: tuple[Array | None, Array], g: Array) -> tuple[Array, Array | None]:
    a, b = saved
    operands, result = spec.split("->")
    of_a, of_b = operands.split(",")
    narrow = b.dtype if a is None else a.dtype
    g = g.astype(narrow)
    to_a = _wide(f"{result},{of_b}->{of_a}", g, b.astype(narrow)).astype(narrow)
    return to_a, None if a is None else _wide(f"{of_a},{result}->{of_b}", a, g).astype(b.dtype)


_contract.defvjp(_forward, _backward)


@jax.custom_vjp
def _grouped(x: Array, kernels: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot(x, kernels, sizes, preferred_element_type=jnp.float32)


def _grouped_forward(x: Array, kernels: Array, sizes: Array) -> tuple[Array, tuple[Array, Array]]:
    return _grouped(x, kernels, sizes), (kernels, sizes)


def _grouped_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, None, None]:
    kernels, sizes = saved
    back = _grouped(g.astype(kernels.dtype), kernels.swapaxes(1, 2), sizes)
    return back.astype(kernels.dtype), None, None


_grouped.defvjp(_grouped_forward, _grouped_backward)
