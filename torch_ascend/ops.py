"""The operators that decide a decoder's speed on an NPU: each in plain torch, and as torch_npu's fused one.

The functions of both tables take and return the same; a test holds them to it. Only this file knows what torch_npu calls its
operators, and what they ask of their arguments.
"""

import dis
import functools
import inspect
import types
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.gemma import modeling_gemma
from transformers.models.llama import modeling_llama
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.phi3 import modeling_phi3

from ple_jax.core.errors import UserError

SDPA_DIM = 512  # the widest head of torch_npu's scaled_dot_product_attention


class Ops(NamedTuple):
    """A table of operators; the shapes are those of the reference functions below."""

    name: str
    rms_norm: Callable[..., Tensor]
    rope: Callable[..., Tensor]
    swiglu: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    token_logprob: Callable[..., tuple[Tensor, Tensor]]


# ---------------------------------------------------------------- plain torch


def _rms_norm(x: Float[Tensor, "*batch size"], weight: Float[Tensor, " size"], eps: float) -> Float[Tensor, "*batch size"]:
    """Computes x / sqrt(mean(x^2) + eps) * weight in fp32, rounded once, to x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _rope(
    x: Float[Tensor, "row head time dim"], cos: Float[Tensor, "row 1 time dim"], sin: Float[Tensor, "row 1 time dim"]
) -> Float[Tensor, "row head time dim"]:
    """Rotates heads by their positions; entry i of a head is paired with entry i + dim/2 (Llama's order)."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def _swiglu(gate: Float[Tensor, "*batch n"], up: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    return F.silu(gate) * up


def _attention(
    q: Float[Tensor, "row head time dim"],
    k: Float[Tensor, "row kv_head source dim"],
    v: Float[Tensor, "row kv_head source dim"],
    visible: Bool[Tensor, "row 1 time source"],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Tensor, "row head time dim"]:
    """Computes softmax(scale * q k^T) v over what is visible; a query that may see nothing (padding) gets zeros.

    Args:
        visible: True = may be seen.
        softcap: scores go through softcap * tanh(score / softcap).
    """
    rows, heads, time, dim = q.shape
    kv_heads, source = k.shape[1:3]
    group = heads // kv_heads
    # the heads that share a key stand behind each other in time: keys are never repeated, nor the cache copied
    packed = q.reshape(rows, kv_heads, group * time, dim)
    # some devices' kernels give NaN to a query that sees nothing
    seen = visible.any(-1, keepdim=True)
    mask = (visible | ~seen)[:, :, None].expand(-1, -1, group, -1, -1).reshape(-1, 1, group * time, source)
    if softcap is None and dim <= SDPA_DIM:
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=mask, scale=scale)
    else:
        scores = (packed @ k.transpose(-1, -2)).float() * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v
    return out.reshape(rows, heads, time, -1) * seen


def _token_logprob(
    logits: Float32[Tensor, "*batch vocab"], targets: Int64[Tensor, "*batch"]
) -> tuple[Float32[Tensor, "*batch"], Float32[Tensor, "*batch"]]:
    """Computes log softmax(logits)[target], in nats, and logsumexp(logits). It is not differentiated."""
    normaliser = torch.logsumexp(logits, -1)
    return _of_target(logits, targets) - normaliser, normaliser


def _of_target(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.take_along_dim(logits, targets[..., None], -1)[..., 0]


REFERENCE = Ops("reference", _rms_norm, _rope, _swiglu, _attention, _token_logprob)


# ---------------------------------------------------------------- torch_npu's; tensors by position: their names have changed


def _npu_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # the operator wants one dtype; a weight kept in fp32 is not to be rounded
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return torch.ops.npu.npu_rms_norm(x.to(dtype), weight.to(dtype), epsilon=eps)[0].to(x.dtype)


def _npu_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, cos.dtype)  # some families turn in fp32
    return torch.ops.npu.npu_rotary_mul(x.to(dtype), cos.to(dtype), sin.to(dtype), rotary_mode="half").to(x.dtype)


def _npu_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.ops.npu.npu_swiglu(torch.cat([gate, up], -1), dim=-1)


def _npu_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    if softcap is not None:  # the operator has none
        return _attention(q, k, v, visible, scale=scale, softcap=softcap)
    hidden = ~visible  # the operator's masks say what may NOT be seen
    return torch.ops.npu.npu_fusion_attention(
        q,
        k,
        v,
        q.shape[1],
        "BNSD",
        atten_mask=hidden,
        scale=scale,
        sparse_mode=1,  # the mask is whole, with no pattern to be made use of
        inner_precise=2,  # queries that see nothing
    )[0]


def _npu_token_logprob(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    loss = torch.ops.npu.npu_cross_entropy_loss(logits.flatten(0, -2), targets.flatten(), reduction="none")[0]
    logprob = -loss.reshape(targets.shape)
    # the operator has a result for it, which it does not fill
    return logprob, _of_target(logits, targets) - logprob


NPU = Ops("npu", _npu_rms_norm, _npu_rope, _npu_swiglu, _npu_attention, _npu_token_logprob)
OPERATORS = ("npu_rms_norm", "npu_rotary_mul", "npu_swiglu", "npu_fusion_attention", "npu_cross_entropy_loss")


def npu() -> Ops:
    """Returns the fused operators of torch_npu.

    Raises:
        UserError: torch_npu is not imported, or lacks some of them.
    """
    if absent := [name for name in OPERATORS if not hasattr(torch.ops.npu, name)]:
        raise UserError(
            f"torch has no operators {', '.join(absent)}: install the torch-npu of torch {torch.__version__}, or take the"
            " reference operators"
        )
    return NPU


def choose(name: str, device: torch.device) -> Ops:
    """Returns the table of operators that `name` means on a device.

    Args:
        name: reference | npu; auto is npu on an NPU, and reference elsewhere.

    Raises:
        UserError: the name is unknown, there are no fused operators, or there are none for this kind of device.
    """
    if name not in ("auto", "reference", "npu"):
        raise UserError(f"operators {name!r} are none of auto, reference, npu")
    if name == "reference" or (name == "auto" and device.type != "npu"):
        return REFERENCE
    ops, key = npu(), {"npu": "PrivateUse1"}.get(device.type, device.type.upper())
    if not all(torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"npu::{name}", key) for name in OPERATORS):
        raise UserError(f"operators 'npu' do not run on device {device}: take 'auto' or 'reference'")
    return ops


# ---------------------------------------------------------------- into transformers' modules


def install(model: PreTrainedModel, ops: Ops) -> list[str]:
    """Makes a model of transformers compute with `ops`, where a module does just what an operator does.

    Whether it does is decided by the code of the module's `forward`: a family's copy of Llama's norm is compiled to the same
    instructions as Llama's. A module that differs in anything is left as it is. So are rotations of a part of the head or of
    neighbouring entries, gates that are not silu, experts, and LayerNorm. Only this model's own modules change. Attention
    itself is computed by the attention function that the model is created with.

    Returns:
        What was replaced, for the log. Nothing if `ops` is the reference, which transformers' own code is already.
    """
    if ops.name == REFERENCE.name:
        return []
    replaced: Counter[str] = Counter()
    whole = _turns_whole_heads(model)
    for module in model.modules():
        for operator, forward in (
            ("rms_norm", _norm(module, ops)),
            ("swiglu", _mlp(module, ops)),
            ("rope", _rotating(module, ops) if whole else None),
        ):
            if forward is not None:
                module.forward = types.MethodType(forward, module)
                replaced[f"{operator} in {type(module).__name__}"] += 1
    return [f"{name}: {count}" for name, count in sorted(replaced.items())]


def _norm(module: nn.Module, ops: Ops) -> Callable | None:
    if _same_class(module, modeling_llama.LlamaRMSNorm) or _same_class(module, modeling_olmo2.Olmo2RMSNorm):
        return lambda self, x: ops.rms_norm(x, self.weight, self.variance_epsilon)
    if _same_class(module, modeling_gemma.GemmaRMSNorm):
        return lambda self, x: ops.rms_norm(x, 1 + self.weight.float(), self.eps)
    return None


def _mlp(module: nn.Module, ops: Ops) -> Callable | None:
    silu = (nn.SiLU, type(ACT2FN["silu"]))
    if _same_class(module, modeling_llama.LlamaMLP) and isinstance(module.act_fn, silu):
        return lambda self, x: self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))
    if _same_class(module, modeling_phi3.Phi3MLP) and isinstance(module.activation_fn, silu):
        return lambda self, x: self.down_proj(ops.swiglu(*self.gate_up_proj(x).chunk(2, -1)))
    return None


def _rotating(module: nn.Module, ops: Ops) -> Callable | None:
    """Returns an attention module's forward with `ops.rope` in it, or None if the module does not rotate as that does.

    It is a copy of the module's own, with another rotary function in the place of the global of its file.
    """
    name = "apply_rotary_pos_emb"
    # decorators of these only rename deprecated arguments
    forward = inspect.unwrap(type(module).forward)
    if name not in forward.__code__.co_names or not (theirs := forward.__globals__.get(name)):
        return None
    known = (modeling_llama, modeling_olmo2, modeling_phi3)
    if not any(_same(theirs, file.apply_rotary_pos_emb) for file in known):
        return None
    # two families have Llama's function, and neighbours or the other sign in what it calls
    if not _same(inspect.unwrap(theirs).__globals__.get("rotate_half"), modeling_llama.rotate_half):
        return None

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return ops.rope(q, cos, sin), ops.rope(k, cos, sin)

    # the file's own global serves every model of the process, so it stays
    names = forward.__globals__ | {name: rotate}
    ours = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return ours


def _turns_whole_heads(model: PreTrainedModel) -> bool:
    """Says whether RoPE turns whole heads, by cosines and sines that are not scaled.

    The operator accepts none above 1, which YaRN has.
    """
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [kind for kind in parameters.values() if isinstance(kind, dict)] or [parameters]
    if any(kind.get("partial_rotary_factor", 1.0) != 1.0 for kind in kinds):
        return False
    scales = [x for part in model.modules() for name, x in vars(part).items() if name.endswith("attention_scaling")]
    return all(scale == 1.0 for scale in scales)


def _same_class(module: nn.Module, known: type) -> bool:
    """Says whether a module computes what the known class does, because each of its methods is the same."""
    skipped = ("__init__", "extra_repr")
    methods = {name: f for name, f in vars(known).items() if inspect.isfunction(f) and name not in skipped}
    return all(_same(getattr(type(module), name, None), f) for name, f in methods.items())


def _same(f: Any, g: Any) -> bool:
    """Says whether two functions are compiled to the same instructions; names of local variables do not count."""
    if not (inspect.isfunction(f) and inspect.isfunction(g)):  # some are replaced by objects, if a package is installed
        return False
    return _instructions(f) == _instructions(g)


@functools.cache
def _instructions(function: Callable) -> list[tuple[str, Any]]:
    steps = dis.get_instructions(inspect.unwrap(function))
    return [(step.opname, step.arg if step.opcode in dis.haslocal else step.argval) for step in steps]
