"""What an NPU does badly, found while a program runs on whatever there is.

with Lint() as lint:
    step()
assert not lint.violations and lint.syncs <= 1
"""

import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SOFTMAX = {"_softmax", "_log_softmax", "_safe_softmax", "logsumexp", "logcumsumexp"}
_INDEXED = {"index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put", "_index_put_impl_"}
_HALF = (torch.bfloat16, torch.float16)


class Lint(TorchDispatchMode):
    """Records what operators on a device are asked for, forward and backward.

    Violations are float64, softmax and logsumexp of half precision, boolean indexing and whatever else has a result whose
    shape depends on values. Syncs are where the host waits for values: item(), bool(), and copies to the host.

    Of tensors on the CPU, cpu(), numpy() and tolist() never reach an operator: only another device shows them.

    Args:
        device: the kind of device that is looked at.
    """

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.device = device
        self.violations: list[str] = []
        self.sync_sites: list[str] = []

    @property
    def syncs(self) -> int:
        return len(self.sync_sites)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs, outputs = list(self._tensors((args, kwargs))), list(self._tensors(out))
        if inputs or outputs:
            for what in _violations(func, args, inputs, outputs):
                self.violations.append(f"{what}: {func} at {_site()}")
            if self._waits(func, inputs, out):
                self.sync_sites.append(f"{func} at {_site()}")
        return out

    def _tensors(self, tree: Any) -> Iterator[Tensor]:
        return (x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.device.type == self.device)

    def _waits(self, func: Any, inputs: list[Tensor], out: Any) -> bool:
        if torch.Tag.data_dependent_output in func.tags:
            return True
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        copied = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten._copy_from)
        return copied and bool(inputs) and self.device != "cpu" and any(x.device.type == "cpu" for x in results)


def _violations(func: Any, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> Iterator[str]:
    name = func.overloadpacket.__name__
    if any(x.dtype == torch.float64 for x in inputs + outputs):
        yield "float64"
    half_to_float = name in ("_softmax", "_log_softmax") and args[2]  # the operator itself computes in fp32
    if name in _SOFTMAX and inputs and inputs[0].dtype in _HALF and not half_to_float:
        yield "half precision"
    if name in _INDEXED:
        if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
            yield "boolean indexing"
    elif torch.Tag.dynamic_output_shape in func.tags:
        yield "a shape that depends on values"


def _site() -> str:
    """The innermost line that is not torch's or of this file."""
    skipped = (os.path.dirname(torch.__file__), __file__)
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(skipped):
            return f"{Path(frame.filename).name}:{frame.lineno}"
    return "?"
