"""PLE in PyTorch, for Huawei Ascend (torch_npu), CUDA and CPU: the backend behind `--backend=torch`.

Files and functions are named as their JAX twins in `ple_jax`. What torch and torch_npu read from the environment when they
are imported is set here: this file runs before any other of the package.
"""

import os

ENVIRONMENT = {
    # else `import torch` itself fails where torch_npu is and CANN is not; device.py imports torch_npu and says what is wrong
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    "TASK_QUEUE_ENABLE": "2",  # operators are launched by a second thread, in order
    "CPU_AFFINITY_CONF": "1",  # every process on the cores next to its device
    "HCCL_CONNECT_TIMEOUT": "1200",  # seconds: processes load their weights at different speeds
    "HCCL_EXEC_TIMEOUT": "7200",
    # the same sums in the same order in every run
    "HCCL_DETERMINISTIC": "true",
    "LCCL_DETERMINISTIC": "1",
    "CLOSE_MATMUL_K_SHIFT": "1",
    "ATB_LLM_LCOC_ENABLE": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
# the allocator's settings have an old and a new name, and both at once are an error
if "PYTORCH_ALLOC_CONF" not in os.environ:
    for _name in ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        os.environ.setdefault(_name, "expandable_segments:True")

from torch_ascend import device  # noqa: E402, F401  before transformers, which would fail with a torch_npu that is broken
