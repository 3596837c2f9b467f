"""Stands in for torch_npu in tests: importing it registers the simulated device `npu` and the backend `hccl`.

NPU_SIM_FUSED=1 defines the fused operators, torch.ops.npu.*, as well: by their reference kernels.
"""

import os

import torch
import torch.distributed as dist
from npu import reference_kernels, simulator

__path__.append(str(simulator.build().parent))  # _C is there

from torch_npu import _C, npu  # noqa: E402

__version__ = torch.__version__.partition("+")[0]


def _hccl(store, rank, size, timeout):
    return _C.Hccl(dist.ProcessGroupGloo(dist.PrefixStore("hccl", store), rank, size, timeout))


torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
dist.Backend.register_backend("hccl", _hccl, devices=["npu"])
if os.environ.get("NPU_SIM_FUSED") == "1":
    reference_kernels.define()


def __getattr__(name):
    if name.startswith("npu_"):  # looked up when it is called: transformers imports one that it may never call
        return lambda *args, **kwargs: getattr(torch.ops.npu, name)(*args, **kwargs)
    raise AttributeError(f"module 'torch_npu' has no attribute {name!r}")
