"""What torch_ascend calls is what torch_npu has: a snapshot of its schemas always, the real operators where the wheel is."""

import json
import re
from pathlib import Path

import pytest
import torch
from npu import reference_kernels, wheel

from torch_ascend import ops

SNAPSHOT = json.loads(reference_kernels.SCHEMAS.read_text())
real = pytest.mark.skipif(bool(wheel.unavailable()), reason=wheel.unavailable())


def test_the_snapshot_is_of_the_version_that_is_asked_for():
    project = (wheel.ROOT / "pyproject.toml").read_text()
    assert f"torch-npu=={SNAPSHOT['torch_npu']};" in project


def test_every_operator_that_is_called_is_in_the_snapshot():
    called = set()
    for file in Path(ops.__file__).parent.glob("**/*.py"):
        called |= set(re.findall(r"\bops\.npu\.(\w+)", file.read_text()))
    assert called == set(SNAPSHOT["schemas"]) == set(reference_kernels.KERNELS) == set(ops.OPERATORS)


def test_the_reference_kernels_have_the_schemas_of_the_snapshot():
    reference_kernels.define()
    for name, schema in SNAPSHOT["schemas"].items():
        assert str(getattr(torch.ops.npu, name).default._schema) == schema


@real
@pytest.mark.slow
def test_the_snapshot_is_torch_npus():
    assert json.loads(wheel.run("schemas.py", *SNAPSHOT["schemas"]).splitlines()[-1]) == SNAPSHOT


@real
@pytest.mark.slow
def test_a_block_runs_forward_and_backward_on_torch_npu():
    found = json.loads(wheel.run("block.py").splitlines()[-1])
    assert found["torch_npu"] == wheel.wanted()
    assert found["replaced"] == ["rms_norm in LlamaRMSNorm: 3", "rope in LlamaAttention: 1", "swiglu in LlamaMLP: 1"]
    attention = ["npu_rms_norm", "npu_rotary_mul", "npu_rotary_mul", "npu_fusion_attention"]
    assert found["forward"] == [*attention, "npu_rms_norm", "npu_swiglu", "npu_rms_norm"]
    gradients = {"npu_fusion_attention": "npu_fusion_attention_grad"}
    assert found["backward"] == [gradients.get(name, f"{name}_backward") for name in reversed(found["forward"])]
    assert found["loss"] == ["npu_cross_entropy_loss"]
    assert found["out"] == found["gradient"] == [[[2, 8, 64], "torch.bfloat16", "npu:0"]]
    assert found["logprob"] == [[[2, 8], "torch.float32", "npu:0"]] * 2
