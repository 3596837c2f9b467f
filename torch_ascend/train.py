"""The training step. Its twin is `ple_jax/backend/train.py`; what is returned there is left in the leaves' `.grad` here."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ple_jax.core.types import Batch, Loss, Packed
from ple_jax.models import adapters
from torch_ascend import sharding
from torch_ascend.forward import Lazy
from torch_ascend.model import Model
from torch_ascend.sharding import World


def optimizer(leaves: Mapping[str, Tensor], *, weight_decay: float) -> torch.optim.AdamW:
    """Returns AdamW with all its state from the start. The caller clips before a step, and gives each its learning rate.

    Weight decay is for the low-rank matrices alone: it would pull DoRA's magnitudes to 0, and the base with them, and a head
    away from what it has learned.
    """
    made = torch.optim.AdamW(
        decaying(leaves, weight_decay), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, foreach=True
    )
    for leaf in leaves.values():  # as it will be after the first step: a checkpoint always holds the same tensors
        made.state[leaf] = {
            "step": torch.tensor(0.0), "exp_avg": torch.zeros_like(leaf), "exp_avg_sq": torch.zeros_like(leaf),
        }  # fmt: skip
    return made


def decaying(leaves: Mapping[str, Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Returns the leaves, named "path/kind", as groups for torch's optimizers: those that decay, and those that do not.

    A group without leaves is left out.
    """
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, leaf in leaves.items():
        groups[name.rpartition("/")[2] in adapters.DECAYED].append(leaf)
    return [{"params": own, "weight_decay": weight_decay * decays} for decays, own in groups.items() if own]


def gradients(
    model: Model,
    loss: Loss,
    adapter: adapters.Adapter,
    batch: Batch,
    packed: Packed,
    share: float,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Adds this micro-batch's part of the gradients of the mean loss over the optimiser batch to the leaves' `.grad`.

    Returns its part of the metrics.

    Args:
        adapter: leaves that accumulate gradients.
        batch: tensors on the model's device.
        packed: the batch's rows.
        share: 1 / the real rows of the optimiser batch.
        temperature: what the logits are divided by.
    """
    said: Any = Lazy(model, adapter, packed, temperature)
    value, metrics = loss(said, batch)
    valid: Tensor = batch.data["valid"]
    # chosen, not multiplied: of who only fills the shape a loss may be no number
    reduced = {name: torch.where(valid > 0, m * valid, 0.0).sum() * share for name, m in {"loss": value, **metrics}.items()}
    reduced["loss"].backward()
    model.numbers = None  # recomputation was the last to read them
    return {name: m.detach().to(torch.float32) for name, m in reduced.items()}


def apply_gradients(
    made: torch.optim.AdamW, leaves: Mapping[str, Tensor], *, clip_norm: float, lr: float, world: World
) -> Tensor:
    """Takes one AdamW step on the gradients of all processes, clipped by their global norm.

    Returns that norm before clipping.
    """
    for leaf in leaves.values():
        leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    grads = [leaf.grad for leaf in leaves.values()]
    sharding.add_up(world, grads)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    # as optax clips, without an epsilon in the denominator
    torch._foreach_mul_(grads, torch.where(norm < clip_norm, 1.0, clip_norm / norm))
    for group in made.param_groups:
        group["lr"] = lr
    made.step()
    made.zero_grad()
    return norm
