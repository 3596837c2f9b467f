"""A mixture of experts in the place of a layer's MLP: a router sends every token to a few of many small MLPs.

Mixtral, arXiv:2401.04088; Qwen3-MoE, arXiv:2505.09388. Router and experts are frozen, so nothing balances their load.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from ple_jax.backend import dots
from ple_jax.backend.quantize import QArray, dequantize
from ple_jax.backend.sharding import BATCH, row_multiple
from ple_jax.models.config import ModelConfig


class Experts(nnx.Module):
    """The router [in, experts] and the experts' gated MLPs: gate and up [experts, in, size], down [experts, size, out]."""

    def __init__(self, c: ModelConfig, dtype: Any, activation: Callable[[Array], Array], mesh: Mesh | None):
        inner = (c.experts, c.hidden_size, c.intermediate_size)
        self.router = nnx.Param(jnp.zeros((c.hidden_size, c.experts), dtype))
        self.gate = nnx.Param(jnp.zeros(inner, dtype))
        self.up = nnx.Param(jnp.zeros(inner, dtype))
        self.down = nnx.Param(jnp.zeros((c.experts, c.intermediate_size, c.hidden_size), dtype))
        self.mesh = mesh
        self.mix = partial(mix, per_token=c.experts_per_token, normalize=c.normalize_experts, activation=activation)

    def __call__(self, x: Float[Array, "row time hidden"]) -> Float[Array, "row time hidden"]:
        kernels = self.gate[...], self.up[...], self.down[...]
        if any(isinstance(kernel, QArray) for kernel in kernels):
            # checkpoint: as in quantize.project, no expanded kernel may be kept for the backward pass
            return jax.checkpoint(self._expanded)(x, self.router[...], *kernels)
        return _on_shards(self.mix, self.mesh)(x, self.router[...], *kernels)

    def _expanded(self, x: Array, router: Array, *kernels: QArray) -> Array:
        expand = jax.vmap(partial(dequantize, dtype=x.dtype))
        return _on_shards(self.mix, self.mesh)(x, router, *(expand(jax.lax.stop_gradient(k)) for k in kernels))


def mix(
    x: Float[Array, "row time hidden"],
    router: Float[Array, "hidden experts"],
    gate: Float[Array, "experts hidden size"],
    up: Float[Array, "experts hidden size"],
    down: Float[Array, "experts size hidden"],
    *,
    per_token: int,
    normalize: bool,
    activation: Callable[[Array], Array],
) -> Float[Array, "row time hidden"]:
    """Computes sum_e p_e down_e(activation(gate_e x) * up_e x) over the `per_token` most probable experts of every token.

    Args:
        normalize: whether the probabilities of those experts, from a softmax over all, are scaled to sum to one.
    """
    tokens = x.reshape(-1, x.shape[-1])
    logits = dots.contract("td,de->te", tokens, router, frozen=True)
    share, expert = jax.lax.top_k(jax.nn.softmax(logits, -1), per_token)
    if normalize:
        share = share / share.sum(-1, keepdims=True)
    # every token once per expert of its, ordered by expert: each expert's tokens are then one slice
    order = jnp.argsort(expert.reshape(-1))
    sizes = jnp.bincount(expert.reshape(-1), length=gate.shape[0]).astype(jnp.int32)
    copies = _permuted(jnp.repeat(tokens, per_token, 0), order)
    h = activation(_grouped(copies, gate, sizes)) * _grouped(copies, up, sizes)
    out = _permuted(_grouped(h, down, sizes), jnp.argsort(order)).reshape(-1, per_token, x.shape[-1])
    return (out.astype(jnp.float32) * share[..., None]).sum(1).astype(x.dtype).reshape(x.shape)


def _grouped(x: Float[Array, "n inp"], kernels: Float[Array, "experts inp out"], sizes: Int[Array, " experts"]) -> Array:
    """Multiplies every slice of x by its expert's kernel; `sizes` are the lengths of the slices."""
    return checkpoint_name(dots.grouped(x, kernels, sizes).astype(x.dtype), dots.MATMULS)


def _permuted(x: Float[Array, "n inp"], order: Int[Array, " n"]) -> Float[Array, "n inp"]:
    # no index twice: then the gradient's scatter needs no order among its additions
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")


def _on_shards(mix: Callable, mesh: Mesh | None) -> Callable:
    """Wraps `mix` to run on each device's own rows and slice of every expert. A dimension that does not divide is not split.

    The compiler by itself orders the tokens of all devices together: for 128 experts on v5e:2x4 that took 6 times the
    operations of this, and 5 times the memory.
    """
    if mesh is None or mesh.size == 1:
        return mix

    def run(x: Array, router: Array, gate: Array, up: Array, down: Array) -> Array:
        rows = PartitionSpec(BATCH if x.shape[0] % row_multiple(mesh) == 0 else None)
        tensor = "tensor" if gate.shape[2] % mesh.shape["tensor"] == 0 else None

        def local(*arrays: Array) -> Array:
            out = mix(*arrays)
            return jax.lax.psum(out, "tensor") if tensor else out

        inner, outer = PartitionSpec(None, None, tensor), PartitionSpec(None, tensor)
        specs = rows, PartitionSpec(), inner, inner, outer
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows)(x, router, gate, up, down)

    return run
