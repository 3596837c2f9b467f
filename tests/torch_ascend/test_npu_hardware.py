"""What only an Ascend NPU can tell: `pytest -m npu tests/torch_ascend/test_npu_hardware.py` there; skipped elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_train import random_batch

from ple_jax.core.types import Sampling
from torch_ascend import backend as torch_backend
from torch_ascend import device as devices
from torch_ascend import model, ops

pytestmark = pytest.mark.npu
ROOT = Path(__file__).parents[2]


def backend(device: torch.device, table: ops.Ops, dtype: torch.dtype = torch.float32) -> torch_backend.TorchBackend:
    made = model.create(tiny.CONFIG, tiny.RAW, dtype=dtype, device=device, ops=table)
    adapter = tiny.random_adapter(tiny.CONFIG)
    model.adapt(made, tiny.LORA, adapter)
    model.fill(made, tiny.weights())
    ops.install(made.module, table)
    return torch_backend.TorchBackend(made, adapter, width=4, bucket=16, clip_norm=1.0, weight_decay=0.01)


def likelihood(outputs, batch):
    return -outputs.logprobs.sum((1, 2)), {}


@pytest.mark.parametrize("fused", [True, False])
def test_log_probabilities_and_a_step_are_the_cpus(fused):
    on_npu = backend(devices.resolve("npu"), ops.npu() if fused else ops.REFERENCE)
    on_cpu = backend(torch.device("cpu"), ops.REFERENCE)
    batch = random_batch()
    a, b = on_npu.logprobs(batch), on_cpu.logprobs(batch)
    # an NPU multiplies fp32 matrices in a shorter format
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-2)
    np.testing.assert_allclose(a.entropy, b.entropy, atol=2e-2)
    one, other = (x.update([batch], likelihood, lr=1e-3) for x in (on_npu, on_cpu))
    np.testing.assert_allclose([one["loss"], one["grad_norm"]], [other["loss"], other["grad_norm"]], rtol=1e-2)


def test_fused_operators_in_bfloat16_are_the_reference():
    device = devices.resolve("npu")
    batch = random_batch()
    a, b = (backend(device, table, torch.bfloat16).logprobs(batch).logprobs for table in (ops.npu(), ops.REFERENCE))
    np.testing.assert_allclose(a, b, atol=0.15)


def test_responses_end_and_repeat():
    made = backend(devices.resolve("npu"), ops.npu())
    noise = np.random.default_rng(0).random((6, 40), dtype=np.float32)
    calls = [made.generate([[1, 2, 3]] * 6, noise, sampling=Sampling(40, (7,), top_k=20), prefix=[5, 6]) for _ in range(2)]
    assert calls[0] == calls[1]
    assert all(r.finished == (r.tokens[-1] == 7) and 1 <= len(r.tokens) <= 40 for r in calls[0])


@pytest.mark.parametrize("option", ["data", "fsdp"])
def test_all_devices_together(option, tmp_path):
    count = devices.module("npu").device_count()
    width = f"--config.sampling.width={8 * count} --config.queries_per_iteration={count}"
    width += f" --config.optimizer.batch_queries={count} --config.optimizer.micro_queries={count}"
    line = f"--config {ROOT / 'configs' / 'tiny.py'} --workdir {tmp_path / 'run'} --backend=torch --config.model.device=npu"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    mesh = f"--config.mesh.{option}={count}"
    subprocess.run([*torchrun, "-m", "ple_jax.main", *line.split(), *width.split(), mesh], check=True, cwd=ROOT)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 3
