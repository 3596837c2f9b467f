"""Stand-ins on tensors without memory: the fused operators of an NPU, and weights that are only shapes."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from ple_jax.models.config import ModelConfig
from ple_jax.models.layout import expected_shapes


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


class _Operator(torch.autograd.Function):
    """An operator whose results and gradients have shapes, but no values.

    For the backward pass it keeps what torch_npu's operator keeps.
    """

    @staticmethod
    def forward(ctx: Any, results: Callable[..., tuple[Tensor, ...]], kept: slice, *inputs: Tensor) -> tuple[Tensor, ...]:
        made = results(*inputs)
        ctx.inputs = len(inputs)
        ctx.save_for_backward(*inputs, *made[kept])
        ctx.mark_non_differentiable(*made[1:])
        return made

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors[: ctx.inputs]
        wanted = zip(inputs, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(torch.empty_like(x) if want else None for x, want in wanted)


def _rms_norm(input: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, ...]:
    def results(x: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)

    return _Operator.apply(results, slice(1, None), input, gamma)


def _rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str) -> Tensor:
    return _Operator.apply(lambda x, *_: (torch.empty_like(x),), slice(0), input, r1, r2)[0]


def _swiglu(input: Tensor, dim: int) -> Tensor:
    def results(x: Tensor) -> tuple[Tensor, ...]:
        return (torch.empty_like(x.chunk(2, dim)[0], memory_format=torch.contiguous_format),)

    return _Operator.apply(results, slice(0), input)[0]


def _fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, *, atten_mask: Tensor, **_: Any
) -> tuple[Tensor, ...]:
    def results(q: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        # the largest score of every query and the sum of the exponentials, 8 times each
        largest, total = (q.new_empty((*q.shape[:-1], 8), dtype=torch.float32) for _ in range(2))
        return torch.empty_like(q, memory_format=torch.contiguous_format), largest, total

    return _Operator.apply(results, slice(None), query, key, value, atten_mask)


def _cross_entropy_loss(input: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, ...]:
    row = functools.partial(torch.empty_like, input[:, 0])
    return row(), torch.empty_like(input), row(), row()
FUSED = {
    "npu_rms_norm": _rms_norm,
    "npu_rotary_mul": _rotary_mul,
    "npu_swiglu": _swiglu,
    "npu_fusion_attention": _fusion_attention,
    "npu_cross_entropy_loss": _cross_entropy_loss,
}


class Weights(Mapping[str, np.ndarray]):
    """A model's weights by name, all zero, in memory that is never touched and therefore never taken."""

    def __init__(self, config: ModelConfig, dtype: str):
        self.shapes, self.dtype = expected_shapes(config), np.dtype(getattr(ml_dtypes, dtype, dtype))

    def __getitem__(self, name: str) -> np.ndarray:
        return np.zeros(self.shapes[name], f"i{self.dtype.itemsize}").view(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
