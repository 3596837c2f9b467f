"""The pure training step, and the compiled programs of a run. Its twin is `torch_ascend/train.py`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from ple_jax.backend import generate, lora, sharding
from ple_jax.backend.forward import heads, outputs
from ple_jax.backend.model import Model
from ple_jax.core.types import Batch, Loss, Outputs, Packed
from ple_jax.models import adapters


def optimizer(*, clip_norm: float, weight_decay: float) -> optax.GradientTransformation:
    """Returns AdamW, preceded by clipping by the global norm. The caller applies the learning rate, so that it may change.

    Weight decay is for the low-rank matrices alone: it would pull DoRA's magnitudes to 0, and the base with them, and a head
    away from what it has learned.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        optax.add_decayed_weights(weight_decay, mask=_decayed),
    )


def _decayed(adapter: adapters.Adapter) -> dict[str, dict[str, bool]]:
    return {path: {kind: kind in adapters.DECAYED for kind in module} for path, module in adapter.items()}


def gradients(
    model: Model, settings: adapters.Lora, loss: Loss, base: Any, adapter: Any, batch: Batch, packed: Packed, share: Array,
    key: Array, temperature: float = 1.0,
) -> tuple[Any, dict[str, Array]]:  # fmt: skip
    """Computes this micro-batch's part of the gradients of the mean loss over the optimiser batch, and of the metrics.

    Args:
        share: 1 / the real rows of the optimiser batch.
        key: draws the adapter's dropout, where there is any.
        temperature: what the logits are divided by.
    """

    def total(adapter: Any) -> tuple[Array, dict[str, Array]]:
        fused = lora.fuse(model, adapter, settings, base=base, dropout=(key, packed.number))
        said = outputs(model, base, fused, packed, temperature=temperature, **heads(adapter))
        value, metrics = loss(said, batch)
        valid = batch.data["valid"]
        # chosen, not multiplied: of who only fills the shape a loss may be no number
        reduced = {name: jnp.where(valid > 0, m * valid, 0).sum() * share for name, m in {"loss": value, **metrics}.items()}
        return reduced["loss"], reduced

    return jax.grad(total, has_aux=True)(adapter)


def apply_gradients(
    transform: optax.GradientTransformation, adapter: Any, state: Any, grads: Any, lr: Array
) -> tuple[Any, Any, Array]:
    """Takes one AdamW step.

    Returns the new adapter, the new optimizer state, and the gradient's global norm before clipping.
    """
    with jax.numpy_dtype_promotion("standard"):  # optax mixes Python scalars and integer counters with arrays
        norm = optax.tree.norm(grads)
        updates, state = transform.update(grads, state, adapter)
        return jax.tree.map(lambda p, u: p - lr * u, adapter, updates), state, norm


class Programs(NamedTuple):
    """The compiled programs of a run, as `jax.jit` objects. `--mode=plan --topology` compiles these, too."""

    fuse: Any  # (base, adapter) -> fused adapter
    fold: Any  # (base, adapter) -> kernels with the adapter in them: sampling takes base and `fused`, or these and {}
    rows: Any  # (base, *, count, room, new) -> Rows, all of them free
    prefix: Any  # (base, fused, tokens) -> Cache
    begin: Any  # (base, fused, prefix, rows, *group, *, sampling) -> Rows; donates the rows
    decode: Any  # (base, fused, prefix, rows, free, steps, *, sampling, within) -> Rows; donates the rows
    outputs: Any  # (base, adapter, packed, *, entropy, temperature) -> Outputs
    scores: Any  # (base, adapter, packed) -> scores
    gradients: Any  # (base, adapter, batch, packed, share, key, *, loss, temperature) -> (gradients, metrics)
    accumulate: Any  # (gradients, gradients) -> gradients; donates the first
    apply: Any  # (adapter, state, gradients, lr) -> (adapter, state, norm); donates adapter and state


def placement(adapter: adapters.Adapter, transform: optax.GradientTransformation, mesh: Mesh) -> tuple[Any, Any]:
    """Returns the NamedShardings of an adapter and of its optimizer state; reads shapes alone."""
    return sharding.adapter(adapter, mesh), sharding.adapter(jax.eval_shape(transform.init, adapter), mesh)


def programs(
    model: Model, adapter: adapters.Adapter, mesh: Mesh, *, transform: optax.GradientTransformation, settings: adapters.Lora
) -> Programs:
    """Returns the programs of one model on one mesh; nothing is compiled before it is called or lowered.

    Args:
        adapter: the adapter, or its shapes.
    """
    place = placement(adapter, transform, mesh)

    def fuse(base: Any, adapter: Any) -> Any:
        return lora.fuse(model, adapter, settings, base=base)

    def fold(base: Any, adapter: Any) -> Any:
        kernels = lora.fold(model, base, adapter, settings)
        return jax.lax.with_sharding_constraint(kernels, sharding.kernels(kernels, mesh, model.config.num_kv_heads))

    def say(base: Any, adapter: Any, packed: Packed, **how: Any) -> Outputs:
        return outputs(model, base, fuse(base, adapter), packed, **how, **heads(adapter))

    def slope(base: Any, adapter: Any, *data: Any, loss: Loss, **how: Any) -> tuple[Any, dict[str, Array]]:
        return gradients(model, settings, loss, base, adapter, *data, **how)

    return Programs(
        fuse=jax.jit(fuse),
        fold=jax.jit(fold),
        **_sampling(model, mesh),
        outputs=jax.jit(say, static_argnames=("entropy", "temperature")),
        scores=jax.jit(lambda *data: say(*data).scores),
        gradients=jax.jit(
            slope, static_argnames=("loss", "temperature"), out_shardings=(place[0], sharding.replicated(mesh))
        ),
        accumulate=jax.jit(functools.partial(jax.tree.map, jnp.add), donate_argnums=0),
        apply=jax.jit(
            functools.partial(apply_gradients, transform),
            donate_argnums=(0, 1),  # of the gradients no output has the shape left over
            out_shardings=(*place, sharding.replicated(mesh)),
        ),
    )


def _sampling(model: Model, mesh: Mesh) -> dict[str, Any]:
    """Returns the programs that sample. They leave rows and their caches on the devices that hold them."""

    def spread(made: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a function so that its results are sharded as rows and their caches are."""

        @functools.wraps(made)
        def call(*data: Any, **how: Any) -> Any:
            found = made(*data, **how)
            return jax.lax.with_sharding_constraint(found, sharding.decoded_rows(found, mesh))

        return call

    def empty(base: Any, *, count: int, room: int, new: int) -> generate.Rows:
        return generate.empty_rows(model, count, room, new, base["embed"].dtype)

    begin = functools.partial(generate.begin, model)
    # an accelerator's host waits for the answer whether enough have ended
    decode = functools.partial(generate.decode, model, unasked=1 if mesh.devices.flat[0].platform == "cpu" else 8)
    return {
        "rows": jax.jit(spread(empty), static_argnames=("count", "room", "new")),
        "prefix": jax.jit(spread(functools.partial(generate.read_prefix, model))),
        "begin": jax.jit(spread(begin), static_argnames="sampling", donate_argnums=3),
        "decode": jax.jit(spread(decode), static_argnames=("sampling", "within"), donate_argnums=3),
    }
