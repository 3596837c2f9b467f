"""Matrix products of bfloat16 operands with a float32 result, whose gradients are computed by products of the same kind.

That is what matrix units compute. On CPUs XLA uses these units for bf16 x bf16 -> fp32 alone: with a bfloat16 result, or
with operands of two dtypes, as in JAX's own transpose of such a product, it is slower there than in float32. What is added
to a product is added before it is rounded.

If the first operand is float32, so are all operands.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

MATMULS = "matmuls"  # name of the results of weights' matmuls, rounded, for a remat policy


@jax.custom_vjp
def project(x: Array, kernel: Array) -> Array:
    """Computes x [*batch, in] @ a frozen kernel [in, *out] in float32. No gradient reaches the kernel."""
    return _long(x, kernel)


def _project_backward(kernel: Array, g: Array) -> tuple[Array, None]:
    return _backward(_spec(g.ndim - kernel.ndim + 1, kernel), True, (None, kernel), g)[0], None


project.defvjp(lambda x, kernel: (project(x, kernel), kernel), _project_backward)


def low_rank(x: Array, down: Array, up: Array) -> Array:
    """Computes x [*batch, in] @ down [in, rank] @ up [rank, *out] in float32.

    Down and up are rounded to the dtype of x where they are multiplied, and nowhere else: their gradients are float32.
    """
    h = contract(_of(x, down), x, down).astype(x.dtype)
    return contract(_of(h, up), h, up)


def _of(x: Array, kernel: Array) -> str:
    return _spec(x.ndim - 1, kernel)


def _spec(batched: int, kernel: Array) -> str:
    batch, out = "abcdefgh"[:batched], "mnopq"[: kernel.ndim - 1]
    return f"{batch}i,i{out}->{batch}{out}"


_LONGEST_SUM = 1024


def _long(x: Array, kernel: Array) -> Array:
    """Computes x @ kernel; a long sum in float32 is computed as the sum of two products.

    XLA's CPU kernels add up in one fp32 accumulator: SmolLM2's logits were 16e-5 off float64, with halves they are 6e-5 off
    (torch: 9e-5).
    """
    size = kernel.shape[0]
    if x.dtype != jnp.float32 or size <= _LONGEST_SUM or size % 2:
        return _wide(_of(x, kernel), x, kernel)
    # one batched matmul: of two the slices would be copies of the kernel. Added, as a sum over two is much slower
    first, second = jnp.einsum("tch,cho->cto", x.reshape(-1, 2, size // 2), kernel.reshape(2, size // 2, -1))
    return (first + second).reshape(*x.shape[:-1], *kernel.shape[1:])


def grouped(x: Array, kernels: Array, sizes: Array) -> Array:
    """Multiplies every slice of x [n, in] by a frozen kernel of its own; returns float32 [n, out].

    Args:
        kernels: [groups, in, out].
        sizes: the length of every slice, [groups].
    """
    if x.dtype == jnp.float32:
        return jax.lax.ragged_dot(x, kernels, sizes)
    return _grouped(x, kernels, sizes)


def contract(spec: str, a: Array, b: Array, *, frozen: bool = False) -> Array:
    """Computes `jnp.einsum` of two operands in float32. b is rounded to the dtype of a, but its gradient is not.

    Args:
        spec: einsum's specification, in which every index of an operand is in the other one or in the result.
        frozen: whether b gets no gradient.
    """
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
    return to_a, None if a is None else _outer(of_a, a, result, g, of_b).astype(b.dtype)


def _outer(of_a: str, a: Array, of_g: str, g: Array, of_b: str) -> Array:
    """Computes the gradient of a contraction's second operand.

    Of its two factors the smaller comes first, since the first one is transposed.
    """
    (one, first), (two, second) = sorted(((of_a, a), (of_g, g)), key=lambda operand: operand[1].size)
    shared = [x for x in of_b if x in one and x in two]
    found = shared + [x for x in one if x in of_b and x not in two] + [x for x in two if x in of_b and x not in one]
    out = _wide(f"{one},{two}->{''.join(found)}", first, second)
    if found == list(of_b):
        return out
    # behind a barrier: XLA would swap the operands instead, and transpose the larger
    return jax.lax.optimization_barrier(out).transpose([found.index(x) for x in of_b])


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
