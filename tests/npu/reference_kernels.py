"""Reference implementations of torch_npu's fused operators, for where there is no torch_npu.

    define()  # torch.ops.npu.npu_rms_norm and the others, on every device, with gradients

The schemas are the real ones (npu_schemas.json), so a call that the real operators reject is rejected here. What their
documentation asks of shapes, dtypes and values is checked as well, and what it leaves undefined is NaN.
"""

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SCHEMAS = Path(__file__).with_name("npu_schemas.json")
_UNDEFINED = float("nan")
_library: list[torch.library.Library] = []  # operators last as long as their library


class Kernel(NamedTuple):
    """An operator: both functions take its arguments by the schema's names, those that the reference has."""

    compute: Callable
    rules: Callable  # yields (whether it is kept, what it says)


def define() -> None:
    """Registers the operators; again is harmless."""
    if _library:
        return
    if hasattr(torch.ops.npu, "npu_rms_norm"):
        raise RuntimeError("torch_npu is here, with operators of its own")
    library = torch.library.Library("npu", "FRAGMENT")
    for name, schema in json.loads(SCHEMAS.read_text())["schemas"].items():
        library.define(schema.removeprefix("npu::"))
        library.impl(name, _checked(name), "CompositeExplicitAutograd")
        library.impl(name, _differentiated(name), "Autograd", with_keyset=True)
    _library.append(library)


def _checked(name: str) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        given = _bind(name, args, kwargs)
        for kept, rule in KERNELS[name].rules(**given):
            if not kept:
                facts = [f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else x for x in given.values()]
                raise RuntimeError(f"{name}: {rule}; called with {dict(zip(given, facts, strict=True))}")
        return KERNELS[name].compute(**given)

    return run


def _bind(name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments by name. Those that the reference has not must be as the schema has them."""
    given = {}
    for i, argument in enumerate(getattr(torch.ops.npu, name).default._schema.arguments):
        default = argument.default_value
        value = args[i] if i < len(args) else kwargs.get(argument.name, default)
        if argument.name in inspect.signature(KERNELS[name].compute).parameters:
            given[argument.name] = value
        elif value is not default and value != default:
            raise RuntimeError(f"{name}: there is no reference for {argument.name}={value}")
    return given


def _differentiated(name: str) -> Callable:
    def run(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        return _Gradient.apply(name, keyset & torch._C._after_autograd_keyset, kwargs, *args)

    return run


class _Gradient(torch.autograd.Function):
    """The first result's gradient: what autograd finds for the torch operations of the reference."""

    @staticmethod
    def forward(ctx, name, below, kwargs, *args):
        ctx.name, ctx.kwargs = name, kwargs
        ctx.args = [None if isinstance(x, Tensor) else x for x in args]
        ctx.tensors = [i for i, x in enumerate(args) if isinstance(x, Tensor)]
        ctx.save_for_backward(*(args[i] for i in ctx.tensors))
        out = getattr(torch.ops.npu, name).default.redispatch(below, *args, **kwargs)
        if isinstance(out, tuple):
            ctx.mark_non_differentiable(*(x for x in out[1:] if isinstance(x, Tensor)))
        return out

    @staticmethod
    def backward(ctx, gradient, *_):
        args, wanted = list(ctx.args), {i: None for i in ctx.tensors if ctx.needs_input_grad[3 + i]}
        for i, x in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            args[i] = x.detach().requires_grad_(i in wanted)
        with torch.enable_grad():
            out = KERNELS[ctx.name].compute(**_bind(ctx.name, args, ctx.kwargs))
            out = out[0] if isinstance(out, tuple) else out
        found = torch.autograd.grad(out, [args[i] for i in wanted], gradient)
        wanted |= zip(wanted, found, strict=True)
        return None, None, None, *(wanted.get(i) for i in range(len(args)))


def _everywhere(condition: Tensor) -> bool:
    return condition.is_meta or bool(condition.all())


# ---------------------------------------------------------------- the operators; the names of arguments are torch_npu's


def _rms_norm(input: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    dims = tuple(range(-gamma.dim(), 0))
    x = input.to(torch.float32)
    rstd = 1.0 / torch.sqrt((x * x).mean(dims, keepdim=True) + epsilon)
    return (x * rstd * gamma.to(torch.float32)).to(input.dtype), rstd


def _rms_norm_rules(input: Tensor, gamma: Tensor, epsilon: float) -> Iterator[tuple[bool, str]]:
    yield input.dtype == gamma.dtype, "input and gamma have one dtype"
    yield input.shape[-gamma.dim() :] == gamma.shape, "gamma has the last dimensions of input"


def _rotary_mul(input: Tensor, r1: Tensor, r2: Tensor) -> Tensor:
    half = input.shape[-1] // 2
    sign = torch.ones_like(r2)
    sign[..., :half] = -1
    return r1 * input + r2 * sign * input.roll(half, -1)


def _rotary_mul_rules(input: Tensor, r1: Tensor, r2: Tensor) -> Iterator[tuple[bool, str]]:
    yield input.dtype == r1.dtype == r2.dtype, "all have one dtype"
    yield input.dim() == 4 and r1.shape == r2.shape, "input has four dimensions, r1 the shape of r2"
    b, n, s, d = input.shape
    yield tuple(r1.shape) in ((1, 1, s, d), (b, 1, s, d), (b, n, s, d)), "r1 is 11SD, B1SD or BNSD where input is BNSD"
    yield d % 2 == 0 and d < 896 and b < 1000 and n < 1000, "D is even and below 896, B and N below 1000"
    one = 1 + torch.finfo(r1.dtype).eps
    yield _everywhere((r1.abs() <= one) & (r2.abs() <= one)), "r1 and r2 lie in [-1, 1]"


def _swiglu(input: Tensor, dim: int) -> Tensor:
    gate, up = input.to(torch.float32).chunk(2, dim)
    return (gate * torch.sigmoid(gate) * up).to(input.dtype)


def _swiglu_rules(input: Tensor, dim: int) -> Iterator[tuple[bool, str]]:
    yield input.shape[dim] % 2 == 0, "input has two halves"


def _fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    atten_mask: Tensor,
    scale: float,
    inner_precise: int,
    sparse_mode: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    group = head_num // key.shape[1]
    q, k, v = (x.to(torch.float32) for x in (query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)))
    score = torch.einsum("bnsd,bntd->bnst", q, k) * scale
    score = score.masked_fill(atten_mask, -1e30)
    largest = score.detach().amax(-1, keepdim=True)
    weight = torch.exp(score - largest).masked_fill(atten_mask, 0)
    total = weight.sum(-1, keepdim=True)
    out = torch.einsum("bnst,bntd->bnsd", weight / total.clamp(min=1e-30), v)
    if inner_precise != 2:
        out = out.masked_fill(total == 0, _UNDEFINED)
    largest, total = (x.repeat(1, 1, 1, 8) for x in (largest, total))
    return out.to(query.dtype), largest, total, query.new_empty(0), 0, 0, 0


def _fusion_attention_rules(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    atten_mask: Tensor | None,
    scale: float,
    inner_precise: int,
    sparse_mode: int,
) -> Iterator[tuple[bool, str]]:
    yield input_layout == "BNSD" and sparse_mode in (0, 1), "the reference is for input_layout BNSD and a whole mask"
    yield query.dtype == key.dtype == value.dtype, "query, key and value have one dtype"
    b, n, s, d = query.shape
    yield key.shape == value.shape and key.shape[0] == b and key.shape[3] == d, "query, key and value have one B and D"
    yield n == head_num and n <= 256 and n % key.shape[1] == 0, "head_num is query's N, up to 256, a multiple of key's N"
    yield 1 <= d <= 768, "D is in 1 ... 768"
    yield atten_mask is not None and atten_mask.dtype == torch.bool, "the reference is for a bool mask"
    shapes = [(*most, s, key.shape[2]) for most in ((b, n), (b, 1), (1, 1), ())]
    yield tuple(atten_mask.shape) in shapes, "atten_mask is BNSS, B1SS, 11SS or SS"


def _cross_entropy_loss(input: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shifted = input - input.detach().amax(1, keepdim=True)
    logprob = shifted - shifted.exp().sum(1, keepdim=True).log()
    loss = -logprob.gather(1, target[:, None])[:, 0]
    return loss, logprob, torch.full_like(loss, _UNDEFINED), torch.full_like(loss, _UNDEFINED)


def _cross_entropy_loss_rules(input: Tensor, target: Tensor, reduction: str) -> Iterator[tuple[bool, str]]:
    yield reduction == "none", "the reference is for reduction='none'"
    yield input.dim() == 2 and target.shape == input.shape[:1], "input is [N, C], target [N]"
    yield target.dtype == torch.int64 and input.shape[0] <= 200_000, "target is int64, N up to 200000"
    yield _everywhere((target >= 0) & (target < input.shape[1])), "targets lie in [0, C)"


KERNELS = {
    "npu_rms_norm": Kernel(_rms_norm, _rms_norm_rules),
    "npu_rotary_mul": Kernel(_rotary_mul, _rotary_mul_rules),
    "npu_swiglu": Kernel(_swiglu, _swiglu_rules),
    "npu_fusion_attention": Kernel(_fusion_attention, _fusion_attention_rules),
    "npu_cross_entropy_loss": Kernel(_cross_entropy_loss, _cross_entropy_loss_rules),
}
