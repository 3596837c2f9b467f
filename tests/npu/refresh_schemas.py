"""Writes npu_schemas.json: the schemas of the operators that torch_ascend calls, from the torch-npu of the installed torch.

    .venv/bin/python tests/npu/refresh_schemas.py

The wheel is downloaded (44 MB), unless TORCH_NPU_WHEEL names one or the cache, .pytest_cache/torch_npu, has it; it is never
installed. Needs gcc, not CANN. With the wheel in the cache, test_npu_schemas.py looks at the real operators too.
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from npu import wheel  # noqa: E402
from npu.reference_kernels import KERNELS, SCHEMAS  # noqa: E402

if __name__ == "__main__":
    if wheel.find() is None:
        wheel.CACHE.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", wheel.CACHE]
        subprocess.run([*pip, f"torch-npu=={wheel.wanted()}"], check=True)
    if reason := wheel.unavailable():
        sys.exit(reason)
    found = json.loads(wheel.run("schemas.py", *KERNELS).splitlines()[-1])
    SCHEMAS.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{SCHEMAS}: {len(found['schemas'])} operators of torch-npu {found['torch_npu']}")
