"""A quantised base, QLoRA style: linear weights stored in 8 or 4 bits, expanded where they are used. arXiv:2305.14314.

Its twin, `ple_jax.backend.quantize`, has the same levels and scales: a model quantised by either backend is the same one.

| kind | values | scales | bits a weight |
|---|---|---|---|
| int8 | int8 | fp32, one per output channel | 8 + 32 / in |
| nf4  | indices of 16 levels, two in a byte | bfloat16, one per 64 inputs and output channel | 4.25 |
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ple_jax.core.errors import UserError

_BLOCK, _SMALLEST_BLOCK = 64, 16  # nf4: weights that share a scale

# the 16 levels of NF4, arXiv:2305.14314 appendix E
_LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
_BETWEEN = (_LEVELS[1:] + _LEVELS[:-1]) / 2


class Quantized(nn.Module):
    """A frozen linear module whose weight is quantised; its bias is not."""

    def __init__(self, base: nn.Module, kind: str, *, transposed: bool):
        """Prepares a module without values, which `fill` computes.

        Args:
            base: nn.Linear, or a module whose weight is [in, out] (`transposed`).
            kind: int8 or nf4.

        Raises:
            UserError: nf4 is asked for an input size that is no multiple of 16.
        """
        super().__init__()
        self.bias, self.kind, self.transposed, self.dtype = base.bias, kind, transposed, base.weight.dtype
        self.values: Any = None  # a tensor from `fill` on
        self.block = 0
        if kind == "nf4":
            size = base.weight.shape[0 if transposed else 1]
            self.block = math.gcd(size, _BLOCK)
            if self.block < _SMALLEST_BLOCK:
                raise UserError(
                    f"nf4 needs kernels whose input size is a multiple of {_SMALLEST_BLOCK}, this one's is {size}; take"
                    " --config.model.quantize=int8"
                )

    def fill(self, weight: Float[Tensor, "..."]) -> None:
        """Quantises the weight to the nearest level, each channel or block scaled by its largest magnitude."""
        w = (weight.T if self.transposed else weight).float().contiguous()  # [out, in]
        blocks = w.unflatten(1, (-1, self.block)) if self.block else w[:, None]
        # 127.5: the outermost bucket is as wide as the others. Reciprocals, as XLA divides
        scale = blocks.abs().amax(-1, keepdim=True) * (1.0 if self.block else 1 / 127.5)
        scale = torch.where(scale < torch.finfo(torch.float32).tiny ** 0.5, 1.0, scale)
        levels = blocks * (1 / scale)
        if self.block:
            values = torch.bucketize(levels, _BETWEEN.to(w.device), out_int32=True).to(torch.uint8).flatten(1)
            self.values = values[:, 0::2] | (values[:, 1::2] << 4)
            self.scale = scale.to(torch.bfloat16)
            self.levels = _LEVELS.to(w.device)
        else:
            self.values, self.scale = levels.round().clamp(-128, 127).to(torch.int8).flatten(1), scale

    def expand(self, dtype: torch.dtype) -> Float[Tensor, "out inp"]:
        """Expands the values to the weight [out, in] that they stand for: computed in fp32, then cast to `dtype`."""
        if self.block:
            both = torch.stack([self.values & 15, self.values >> 4], -1)
            wide = self.levels.index_select(0, both.flatten().to(torch.int32)).view(len(both), -1, self.block)
        else:
            wide = self.values[:, None].float()
        return (wide * self.scale.float()).flatten(1).to(dtype)

    @property
    def weight(self) -> Float[Tensor, "..."]:
        """The expanded weight, in the dtype and layout of the module that this one replaces."""
        whole = self.expand(self.dtype)
        return whole.T if self.transposed else whole

    def forward(self, x: Float[Tensor, "*batch inp"]) -> Float[Tensor, "*batch out"]:
        y = _Project.apply(x, self)
        return y if self.bias is None else y + self.bias


class _Project(torch.autograd.Function):
    """The product x W^T.

    The expanded weight is not kept for the backward pass: that would be the whole model in x's dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Quantized) -> Tensor:
        ctx.module = module
        return x @ module.expand(x.dtype).T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g @ ctx.module.expand(g.dtype), None
