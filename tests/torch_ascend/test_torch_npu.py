"""The torch backend on the simulated NPU: whole runs with every tensor there, some over hccl, and nothing dispatched that an
NPU does badly. What is simulated is the device, not its arithmetic: results must equal the CPU's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import journals
import numpy as np
import pytest
import tiny
import torch
from npu import simulator
from npu.lint import Lint
from test_train import random_batch

from ple_jax.core.types import Sampling
from torch_ascend import backend as torch_backend
from torch_ascend import device as devices
from torch_ascend import model, ops, sharding

pytestmark = pytest.mark.skipif(bool(simulator.unavailable()), reason=simulator.unavailable())
ROOT = Path(__file__).parents[2]
TINY = f"--config {ROOT / 'configs' / 'tiny.py'} --backend=torch --config.optimizer.micro_queries=4"

# every tensor of a backend is looked at when a run ends; and what hccl was asked for is counted
WATCHED = """
import os, sys, torch, torch.distributed as dist
from ple_jax import main
from torch_ascend import backend as torch_backend

def say(line):
    sys.stdout.flush()
    os.write(1, f"\\n{{line}}\\n".encode())  # whole, and on a line of its own: both processes write to one pipe

made = []
of = torch_backend.TorchBackend.__init__
def remember(self, *args, **kwargs):
    of(self, *args, **kwargs)
    made.append(self)
torch_backend.TorchBackend.__init__ = remember
destroy = dist.destroy_process_group
def last_words():
    backend = dist.group.WORLD._get_backend(torch.device("npu"))
    say(f"hccl {{dist.get_rank()}} {{dict(backend.calls)}}")
    destroy()
dist.destroy_process_group = last_words
sys.argv = ["ple_jax.main", *{arguments!r}.split()]
try:
    main.cli()
finally:
    (backend,) = made
    model = backend.model.module
    tensors = [*model.parameters(), *model.buffers(), *backend.tensors().values()]
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        assert local.device.type == "npu", (tensor.shape, tensor.device)
    split = sum(hasattr(tensor, "placements") for tensor in tensors)
    say(f"tensors {{len(tensors)}} split {{split}} memory {{torch.npu.max_memory_allocated()}}")
"""


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("cpu") / "run"
    command = [sys.executable, "-m", "ple_jax.main", *TINY.split(), "--workdir", str(workdir), "--config.model.device=cpu"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        pytest.param(1, "--config.model.ops=npu", id="fused"),
        pytest.param(1, "--config.model.ops=reference --config.model.remat=full", id="reference"),
        pytest.param(2, "--config.mesh.data=2", id="two"),
        pytest.param(2, "--config.mesh.fsdp=2 --config.model.remat=full", id="spread"),
    ],
)
def test_a_whole_run_with_every_tensor_on_the_npu(ranks, options, tmp_path, on_cpu):
    arguments = f"{TINY} --workdir {tmp_path / 'run'} --config.model.device=npu {options}"
    result = simulator.run(WATCHED.format(arguments=arguments), ranks=ranks, env={"NPU_SIM_FUSED": "1"})
    for kind in ("rollouts", "evaluations"):
        for file in (on_cpu / kind).iterdir():
            journals.assert_the_same(tmp_path / "run" / kind / file.name, file)
    curves = [
        [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
        for where in (on_cpu, tmp_path / "run")
    ]
    for a, b in zip(curves[0][1:], curves[1][1:], strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], atol=1e-5)
        np.testing.assert_allclose(b["grad_norm"], a["grad_norm"], rtol=1e-4)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["platform"] == "npu" and environment["processes"] == ranks
    assert environment["ops"] == ("reference" if "reference" in options else "npu")
    says = [line.split() for line in result.stdout.splitlines() if line.startswith("tensors ")]
    assert len(says) == ranks and all(int(words[5]) > 0 for words in says)
    assert all((int(words[3]) > 0) == ("fsdp" in options) for words in says)
    calls = [line for line in result.stdout.splitlines() if line.startswith("hccl ")]
    assert len(calls) == (ranks if ranks > 1 else 0)
    assert all("allreduce" in line for line in calls)
    assert all(("allgather" in line or "all_gather" in line) == ("fsdp" in options) for line in calls)


def backend(**options) -> torch_backend.TorchBackend:
    device = devices.resolve("npu")
    made = model.create(tiny.CONFIG, tiny.RAW, dtype=options.pop("dtype", torch.float32), device=device, ops=ops.npu())
    adapter = tiny.random_adapter(tiny.CONFIG)
    model.adapt(made, tiny.LORA, adapter)
    model.fill(made, tiny.weights())
    assert ops.install(made.module, made.ops)
    return torch_backend.TorchBackend(made, adapter, width=4, bucket=16, clip_norm=1.0, weight_decay=0.01, **options)


def likelihood(outputs, batch):
    return -outputs.logprobs.sum((1, 2)), {}


@pytest.mark.slow
@simulator.inside(NPU_SIM_FUSED="1")
def test_nothing_is_dispatched_that_an_npu_does_badly():
    for dtype in (torch.float32, torch.bfloat16):
        made = backend(dtype=dtype)
        prompts, noise = [[1, 2, 3]] * 4, np.random.default_rng(0).random((4, 40), dtype=np.float32)
        batch = random_batch()
        # once before: what is made once may be made with the host's help
        made.update([batch], likelihood, lr=1e-3)
        with Lint("npu") as lint:
            made.generate(prompts, noise, sampling=Sampling(40, (), top_k=20, top_p=0.9, min_p=0.01), prefix=[5, 6])
        assert not lint.violations, lint.violations
        # twice 32 tokens at most: how far rows are filled, every 16 tokens whether enough have ended, and at the end which
        # have, their lengths, tokens and log-probabilities
        assert lint.syncs == 2 * (1 + 2 + 4), (lint.syncs, lint.sync_sites)
        with Lint("npu") as lint:
            made.update([batch, batch], likelihood, lr=1e-3)
        assert not lint.violations, lint.violations
        assert lint.syncs == 1, (lint.syncs, lint.sync_sites)  # the metrics, at its end
        with Lint("npu") as lint:
            made.logprobs(batch)
        assert not lint.violations, lint.violations


@pytest.mark.slow
@simulator.inside(NPU_SIM_FUSED="1", NPU_SIM_MEMORY=str(2**20))
def test_a_base_that_does_not_fit_is_noticed_before_it_is_read():
    device = devices.resolve("npu")
    assert devices.total_memory(device) == 2**20
    data, fsdp, note = sharding.choose({"data": 2, "fsdp": 1}, 2**20, devices.total_memory(device))
    assert (data, fsdp) == (1, 2) and "do not fit" in note


@simulator.inside()
def test_without_the_fused_operators_an_npu_says_so():
    from ple_jax.core.errors import UserError

    with pytest.raises(UserError, match="has no operators npu_rms_norm"):
        ops.choose("auto", devices.resolve("npu"))
    assert ops.choose("reference", devices.resolve("npu")) is ops.REFERENCE
