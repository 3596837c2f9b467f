"""The plan for devices that are not there: collectives read from programs, formulas against XLA, and the whole report."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train
import tiny
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from speed import quick

from configs import tiny as tiny_config
from ple_jax import algorithms
from ple_jax.backend import sharding
from ple_jax.backend.model import Model
from ple_jax.core import packing
from ple_jax.core.config import validate
from ple_jax.core.errors import UserError
from ple_jax.data.queries import Query, load_queries
from ple_jax.models.families import read
from ple_jax.planning import flops, hlo, outline, sheet, targets, topology
from ple_jax.planning.sheet import GIB

PLE = algorithms.load("ple")
ROOT = Path(__file__).parents[2]
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="needs the TPU's compiler: pip install 'ple_jax[tpu]'")


@pytest.fixture
def restored_cache():
    """Compiling for a TPU switches the compilation cache off; other tests of this process want it."""
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


# ---------------------------------------------------------------- collectives of a program's text

TPU_TEXT = """\
HloModule jit_step, is_scheduled=true

%condition (p.0: (s32[], bf16[8,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(32)
  %other = u32[]{:T(128)} constant(999)
  %p.0 = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.0), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%all-reduce-scatter.1 (input: bf16[64,64]) -> bf16[16,64] {
  %input = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.5 = bf16[64,64]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=5, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = bf16[16,64]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.5, %zero), dynamic_slice_sizes={16,64}
}

%started (w.1: bf16[16,64]) -> (bf16[16,64], bf16[64,64]) {
  %w.1 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%w.1), channel_id=7, dimensions={0}
  ROOT %call.1 = (bf16[16,64]{1,0}, bf16[64,64]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (w.2: bf16[16,64]) -> bf16[64,64] {
  %w.2 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.2 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%w.2), channel_id=7, dimensions={0}
  ROOT %call.2 = bf16[64,64]{1,0} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%body (p.1: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %p.1 = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %start = (bf16[16,64]{1,0}, bf16[64,64]{1,0}) fusion(%p.1), kind=kCustom, calls=%started
  %end = bf16[64,64]{1,0} fusion(%start), kind=kCustom, calls=%done
  ROOT %scattered = bf16[16,64]{1,0} fusion(%end), kind=kCustom, calls=%all-reduce-scatter.1
}

ENTRY %main (a: bf16[8,64]) -> f32[] {
  %a = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %loop = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)}) while(%a), condition=%condition, body=%body
  ROOT %sum = f32[]{:T(256)} all-reduce(%a), channel_id=9, replica_groups={}, to_apply=%add
}
"""


def test_collectives_of_a_tpu_program_by_hand():
    """One asynchronous gather that stands in two computations, one reduce-scatter in disguise, one sum outside."""
    found = {(c.kind, c.bytes, c.times, c.looped) for c in hlo.collectives(TPU_TEXT)}
    assert found == {
        ("all-gather", 64 * 64 * 2, 32, True),
        ("reduce-scatter", 64 * 64 * 2, 32, True),
        ("all-reduce", 8 * 64 * 2, 1, False),
    }


def test_a_loop_that_compares_with_nothing_is_there_all_the_same():
    """Of a loop whose end is not known: decoding ends when rows have, and its condition may have a 0 in it."""
    text = TPU_TEXT.replace("s32[]{:T(128)} constant(32)", "s32[]{:T(128)} constant(0)")
    assert text != TPU_TEXT and {(c.kind, c.times) for c in hlo.collectives(text) if c.looped} == {
        ("all-gather", 1),
        ("reduce-scatter", 1),
    }


def test_collectives_in_loops_of_a_compiled_program():
    """x @ w with the sum over a spread dimension is one all-reduce; a loop of 5 in a loop of at most 3 makes 15."""
    mesh = sharding.make_mesh(fsdp=8)

    def program(x, w):
        def inner(x, w):
            return jnp.tanh(jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P()))), None

        def outer(state):
            i, x = state
            return i + 1, jax.lax.scan(inner, x, w)[0]

        # it may end early, so that its trip count is known to nobody
        return jax.lax.while_loop(lambda s: (s[0] < 3) & (s[1][0, 0] < 2.0), outer, (0, x))[1]

    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P()))
    w = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp", None)))
    found = hlo.collectives(jax.jit(program).lower(x, w).compile().as_text())
    large = [c for c in found if c.kind == "all-reduce" and c.bytes > 4]  # the condition's scalar may need one too
    assert [(c.bytes, c.times, c.looped) for c in large] == [(16 * 64 * 4, 15, True)]


# ---------------------------------------------------------------- formulas against XLA's own count

SMALL = read(
    {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "test",
)  # fmt: skip


@pytest.mark.parametrize("remat", quick(["none", "full"], "none"))
def test_flops_against_xla(remat):
    """XLA counts right where nothing is in a loop: layers unrolled, one chunk of logits, one device."""
    rows, prompt, k, new = 2, 32, 2, 16
    time, rank = prompt + k * new, 4
    model = Model.create(SMALL, scan=False, remat=remat)
    mesh = sharding.make_mesh()
    base = topology.abstract_base(model, mesh)
    transform = topology.train.optimizer(clip_norm=1.0, weight_decay=0.0)
    settings = topology.adapters.Lora(rank=rank, alpha=8.0)
    adapter = topology.adapters.init(SMALL, settings, seed=0)
    made = topology.train.programs(model, adapter, mesh, transform=transform, settings=settings)
    batch = test_train.random_batch(rows=rows, k=k, prompt_len=prompt, response_len=new, vocab=512)
    packed = packing.pack(batch)
    forward = flops.forward_parts(
        SMALL, rows=rows, tokens=time, source=time, predicted=k * new, adapter=topology.adapters.count(adapter)
    )

    def counted(lowered):
        return lowered.compile().cost_analysis()["flops"]

    outputs = counted(made.outputs.lower(base, adapter, packed, entropy=False))
    assert sum(forward.values()) == pytest.approx(outputs, rel=0.1)
    data = batch, packed, jnp.float32(0.5), jax.random.key(0)
    step = counted(made.gradients.lower(base, adapter, *data, loss=test_train.negative_likelihood))
    assert flops.gradient_flops(forward, remat) == pytest.approx(step, rel=0.1)


# ---------------------------------------------------------------- shapes are those of training


@pytest.mark.parametrize("scan", [False, True])
def test_abstract_arrays_lie_where_training_puts_them(scan):
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    real = test_train.backend(mesh, scan=scan)
    shapes = topology.abstract_base(real.model, mesh)
    jax.tree.map(lambda x, s: (_same(x, s.shape, s.dtype), _placed(x, s.sharding)), real.base, shapes)
    there = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(real.base))
    assert topology.device_bytes(shapes) == there


def _same(x, shape, dtype):
    assert (x.shape, x.dtype) == (shape, dtype)


def _placed(x, place):
    assert x.sharding.is_equivalent_to(place, x.ndim)


def test_lengths_by_hand():
    config = tiny_config.get_config()
    config.task.max_prompt_tokens = 100
    assert outline.lengths(config, None, [], [], "") == (0, 128, 128, 8, 0, 108)  # buckets are 16, 32, 64, 128
    assert outline.lengths(config, None, [], [], "", ["completion"]).answer == config.task.max_answer_tokens

    source = outline.read_source("tiny")  # one token a byte
    train_set = [Query("a", "x" * 20), Query("b", "y" * 40)]
    heldout = [Query("c", "z" * 5), Query("d", "w" * 7)]
    extra = len(source.tokenizer.encode("", add_special_tokens=True))
    sizes = outline.lengths(config, source.tokenizer, train_set, heldout, "be kind")
    assert sizes == (len("be kind\n\n") + extra, 64, 64, 8, 0, len("be kind\n\n") + extra + 40 + 8)
    # a run leaves out what is too long, or cuts it, and what it needs of positions is not padded
    longer = [*train_set, Query("e", "v" * 3000)]
    assert outline.lengths(config, source.tokenizer, longer, heldout, "be kind") == sizes
    config.task.format = "tldr"
    cut = outline.lengths(config, source.tokenizer, longer, heldout, "be kind")
    assert (cut.trained, cut.positions) == (128, len("be kind\n\n") + extra + 100 + 8)
    config.task.format = "records"
    bare, config.task.chat = outline.read_source("tiny").tokenizer, True
    bare.chat_template = None  # the run refuses such a base in its own words
    assert outline.lengths(config, bare, train_set, heldout, "be kind").prefix == 0
    config.task.chat = False
    small = dataclasses.replace(source.config, max_positions=sizes.positions)
    assert outline.check_positions(config, sizes, small) == sizes
    with pytest.raises(UserError, match=f"{sizes.positions} positions are needed and tiny has {sizes.positions - 1}"):
        outline.check_positions(config, sizes, dataclasses.replace(small, max_positions=sizes.positions - 1))
    pairs = [Query("a", "x", "y" * 20, "z"), Query("b", "x", "y", "z" * 40)]
    assert outline.lengths(config, source.tokenizer, pairs, heldout, "", ["rejected", "completion"]).answer == 41  # with EOS
    config.algorithm, algorithm = "dpo", algorithms.load("dpo")
    batch = outline.example_batch(config, algorithm, 4, sizes._replace(answer=41), 258)
    assert batch.response.shape == (4, 2, 64) and batch.response_mask.sum() == 4 * 2 * 41


@pytest.mark.parametrize(
    ("algorithm", "rows", "prompt"),
    [("ple", 4, 32), ("grpo", 16, 32), ("dpo", 16, 32), ("self_distillation", 16, 128)],  # a teacher reads the principles
)
def test_the_largest_pass_without_gradients_is_planned_with_its_own_prompts(algorithm, rows, prompt):
    config = tiny_config.get_config()
    config.sampling.bucket, config.optimizer.batch_queries, config.eval.diagnostic_queries = 16, 16, 4
    found = outline.judged(config, algorithms.load(algorithm), outline.Lengths(prefix=70, sampled=32, trained=32, new=8))
    assert (found[0], found[1].trained, found[1].sampled) == (rows, prompt, 32)


# ---------------------------------------------------------------- models of which only the shapes are known

PARAMETERS = {  # as their model cards and papers count them
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "llama-2-7b": 6_738_415_616,
    "llama-3-70b": 70_553_706_496,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "phi-3-mini-4k": 3_821_079_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
}


def test_every_published_model_is_counted():
    assert sorted(PARAMETERS) == sorted(file.stem for file in outline.SHAPES.glob("*.json"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_published_models(name):
    """transformers builds the model of each config.json (without memory) with the published number of parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = json.loads((outline.SHAPES / f"{name}.json").read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(raw.pop("model_type"), **raw))
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = head.numel() if model.config.tie_word_embeddings and head is not embedding else 0
    assert sum(p.numel() for p in model.parameters()) - tied == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_are_read(name):
    source = outline.read_source(name)
    assert source.tokenizer is None
    shapes = jax.tree.leaves(Model.create(source.config, scan=True).shapes)
    assert sum(math.prod(x.shape) for x in shapes) == PARAMETERS[name]


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("name", ["v5e", "v5e:", "v5x:2x4", "2x4", "v5e:0x4", "v5e:2,4", "h100:2x4", "cpu:2x4", "h100:0"])
def test_unknown_topologies(name):
    with pytest.raises(UserError, match=re.escape(name)):
        targets.open_target(name)


@pytest.mark.parametrize(
    "name",
    [
        "v5e:2x8", "v5e:3x3", "v5e:32x32", "v5e:8x4", "v6e:8", "v5e:2x2x1", "v5p:4x4", "v5p:2x2x3", "v5p:8x4x4", "v5p:4x4x6",
        "v5p:16x24x24", "v4:16x16x16", "tpu7x:2x2",
    ],
)  # fmt: skip
def test_slices_that_nobody_can_have(name):
    """libtpu compiles for most of them."""
    with pytest.raises(UserError, match=f"--topology={name}: there is no such slice"):
        targets.open_target(name)


@pytest.mark.parametrize(
    ("name", "devices", "hosts", "memory"),
    [
        ("v5e:1x1", 1, 1, 15.75), ("v5e:2x2", 4, 1, 15.75), ("v6e:2x4", 8, 1, 31.25), ("v5p:2x2x1", 4, 1, 95.74),
        ("v5p:2x2x2", 8, 2, 95.74), ("tpu7x:2x2x1", 8, 1, 94.75), ("h100:8", 8, 1, 59.385),
    ],
)  # fmt: skip
def test_devices_and_hosts(monkeypatch, name, devices, hosts, memory):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    target = targets.open_target(name)
    assert (len(target.devices), target.hosts) == (devices, hosts) and target.chip.hbm == pytest.approx(memory)
    assert "an estimate" in target.note


@pytest.mark.parametrize(
    ("name", "count", "hosts"),
    [("v5e:8x8", 64, 16), ("v5p:4x4x4", 64, 16), ("v5p:16x16x24", 6144, 1536), ("h100:64", 64, 8), ("h100:4", 4, 1)],
)
def test_of_several_hosts(monkeypatch, name, count, hosts):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(targets, "simulated", range)
    target = targets.open_target(name)
    assert (len(target.devices), target.hosts) == (count, hosts)


@pytest.mark.parametrize(
    ("axes", "fits"),
    [
        ((1, 1, 1), "set --config.mesh.fsdp=8$"),
        ((2, 8, 1), "set --config.mesh.fsdp=4$"),
        ((1, 2, 2), "set --config.mesh.fsdp=4$"),
        ((3, 1, 1), "set --config.mesh.data=1 --config.mesh.tensor=1 --config.mesh.fsdp=8$"),
    ],
)
def test_a_mesh_that_does_not_take_the_devices(axes, fits):
    target = targets.open_target("cpu:8")
    with pytest.raises(UserError, match=fits):
        targets.make_mesh(target, data=axes[0], fsdp=axes[1], tensor=axes[2])


def test_without_libtpu_devices_are_simulated(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    target = targets.open_target("v5e:2x4")
    assert [d.platform for d in target.devices] == ["cpu"] * 8
    assert target.chip.hbm == 15.75 and target.platform == "tpu"
    assert "libtpu is not installed" in target.note


# ---------------------------------------------------------------- what to change


def _phase(name, held=0.0):
    return topology.Phase(name, "", 0, int(held * GIB), 0.0, lambda: None)


def _measured(arguments, temporaries):
    return topology.Measured(int(arguments * GIB), 0, int(temporaries * GIB), int((arguments + temporaries) * GIB), [], 0.0)


def test_advice_follows_what_dominates():
    config = tiny_config.get_config()
    config.mesh.data, config.sampling.width = 2, 8
    config.optimizer.micro_queries = config.optimizer.batch_queries = 8
    v5e = targets.Target("v5e:2x4", (), targets.CHIPS["v5e"], "tpu", "")

    def lines(phase, m):
        rows = [topology.row(_phase("apply"), _measured(1, 1)), topology.row(phase, m)]
        return "\n".join(sheet.verdict(config, topology.on_sheet(v5e), rows))

    assert "Everything fits" in lines(_phase("gradients"), _measured(8, 7))
    state = lines(_phase("gradients", held=9), _measured(8, 1))
    assert "largest phase is gradients: 18.0 GiB of 15.75" in state and "weights and state dominate" in state
    assert "model.dtype=bfloat16" in state and "model.quantize=nf4" in state and "mesh.data=1 --config.mesh.fsdp=2" in state
    assert "2 times the devices with --config.mesh.fsdp=2" in state  # 18 GiB into 2 x 15.75
    temporary = lines(_phase("gradients"), _measured(2, 30))
    assert "model.remat=full" in temporary and "optimizer.micro_queries=4" in temporary
    config.model.remat = "full"
    assert "remat" not in lines(_phase("gradients"), _measured(2, 30))
    assert "sampling.width=4" in lines(_phase("decode step"), _measured(2, 30))


def test_reward_models_stay_on_the_devices(tmp_path):
    """Spread as the policy is, in the dtype that they are asked for; torch's are elsewhere."""
    folder, c = _folder(tmp_path / "reward"), tiny.CONFIG
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "architectures": ["LlamaForSequenceClassification"]}))
    config = tiny_config.get_config()
    config.mesh.fsdp = 2
    mesh = targets.make_mesh(targets.open_target("cpu:2"), **config.mesh)
    assert topology.reward_bytes(config, mesh) == 0
    named = {"name": "model", "kwargs": {"path": str(folder), "dtype": "bfloat16"}}
    config.reward.name, config.reward.kwargs = "model", named["kwargs"]
    one = topology.reward_bytes(config, mesh)
    qkvo = 2 * c.hidden_size * c.head_dim * (c.num_heads + c.num_kv_heads)
    matrices = 128 * c.hidden_size + 2 * (qkvo + 3 * c.hidden_size * c.intermediate_size)
    assert one == 2 * (matrices // 2 + 5 * c.hidden_size)  # norms are whole everywhere
    with config.ignore_type():
        config.eval.second_reward = "combine"
        config.eval.second_kwargs = {"parts": {"a": named, "b": {"name": "length"}}}
    assert topology.reward_bytes(config, mesh) == 2 * one
    config.reward.kwargs.framework = "torch"
    assert topology.reward_bytes(config, mesh) == one
    source = outline.read_source("tiny")
    sizes, model = outline.lengths(config, None, [], [], ""), topology.backend.make_model(config, source.config, mesh)
    bare = tiny_config.get_config()
    bare.mesh.fsdp = 2
    held = [
        [(phase.name, phase.held) for phase in topology.phases(some, model, mesh, sizes, PLE, source.eos)]
        for some in (config, bare)
    ]
    assert [(name, more - one) for name, more in held[0]] == held[1] and held[1][0][0] == "prefill"
    config.sampling.server = "http://localhost:8000"
    assert "prefill" not in [phase.name for phase in topology.phases(config, model, mesh, sizes, PLE, source.eos)]


# ---------------------------------------------------------------- the whole report


def _folder(path: Path) -> Path:
    c = tiny.CONFIG
    raw = {
        "model_type": "llama", "vocab_size": 128, "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
        "num_hidden_layers": 2, "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim, "rms_norm_eps": c.norm_eps, "tie_word_embeddings": True, "max_position_embeddings": 512,
    }  # fmt: skip
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    return path


def _config(folder, **mesh):
    config = tiny_config.get_config()
    config.model.path = str(folder)
    config.task.max_prompt_tokens = 16
    config.optimizer.micro_queries = 4
    config.mesh.update(mesh)
    validate(config)
    return config


def _report(config, name):
    lines = []
    found = topology.report(config, name, algorithm=PLE, train_set=[], heldout=[], principles="be kind", write=lines.append)
    return found, "\n".join(lines)


PHASES = ["prefill", "decode step", "log-probs", "gradients", "apply"]


@needs_libtpu
def test_the_tpu_compiler_makes_the_report(tmp_path, restored_cache):
    """A folder with a config.json alone, on a slice of four chips."""
    found, text = _report(_config(_folder(tmp_path / "m"), fsdp=4), "v5e:2x2")
    assert list(found) == PHASES
    assert "v5e:2x2: 4 devices, data 1 x fsdp 4 x tensor 1, 15.75 GiB each" in text and "libtpu" in text
    assert "no tokenizer: every prompt counts as 16 tokens" in text and "Everything fits on v5e:2x2." in text
    for name, m in found.items():
        assert not m.refused and 0 < m.arguments and m.arguments + m.outputs + m.temporaries <= m.peak < 2**30, name
    # layers=auto scans on a TPU: fsdp makes something be gathered or reduced in the loop over both layers
    assert any(c.looped and c.times == 2 for c in found["gradients"].collectives)
    # it is looked whether rows have ended after every 8 tokens, each of which goes through both layers
    assert {c.times for c in found["decode step"].collectives if c.looped} <= {1, 2, 8, 16}
    assert any(c.times == 16 for c in found["decode step"].collectives)
    assert {c.times for c in found["prefill"].collectives} <= {1, 2}


@needs_libtpu
def test_a_slice_stands_in_for_gpus(restored_cache):
    target = targets.open_target("h100:8")
    assert len(target.devices) == 8 and target.devices[0].platform == "tpu" and "v5p:2x2x2" in target.note
    assert target.chip is targets.GPUS["h100"] and "an estimate" in target.note


@needs_libtpu
def test_a_program_that_the_tpu_compiler_refuses(restored_cache):
    devices = targets.open_target("v5e:2x2").devices
    mesh = jax.sharding.Mesh(np.array(devices), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    n = 2**18  # 256 GiB, 64 on each device
    x = jax.ShapeDtypeStruct((n, n), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    m = topology.measure(topology.Phase("much", "", 64 * GIB, 0, 0.0, lambda: jax.jit(lambda a: a @ a @ a.T).lower(x)))
    assert m.refused and m.arguments == 64 * GIB and m.peak == m.arguments + m.temporaries
    assert m.temporaries >= 64 * GIB  # the first product is as large as its argument


@pytest.mark.slow
def test_the_command_on_simulated_devices(tmp_path):
    """The whole command line, two devices, gradients accumulated over two micro-batches."""
    folder = _folder(tmp_path / "m")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [
        sys.executable, "-m", "ple_jax.main", "--config=configs/tiny.py", "--mode=plan", "--topology=cpu:2",
        f"--config.model.path={folder}", "--config.task.max_prompt_tokens=16", "--config.mesh.fsdp=2",
        "--config.model.layers=scan",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert "cpu:2: 2 devices, data 1 x fsdp 2 x tensor 1\n" in text
    rows = [line for line in text.splitlines() if line.endswith(" s")]
    assert [row[:12].strip() for row in rows] == [*PHASES[:-1], "accumulate", "apply"]
    assert "gradients: 2 rows x [16 prompt + 2 x 8 response tokens], 2 times a step" in text
    assert re.search(r"The largest phase is [\w -]+: [\d.]+ [KM]iB a device\.", text)


def test_a_sliding_window_is_planned(tmp_path):
    """Every phase of a model whose layers see less than the whole cache is lowered as it would run."""
    folder = _folder(tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "mistral", "sliding_window": 8}))
    c = tiny_config.get_config()
    c.model.path, c.task.max_prompt_tokens = str(folder), 16
    source = outline.read_source(str(folder))
    assert source.config.kinds[0].window == 8
    mesh = sharding.make_mesh()
    model = topology.backend.make_model(c, source.config, mesh)
    train_set = load_queries(c.task.train).queries
    sizes = outline.lengths(c, source.tokenizer, train_set, load_queries(c.task.heldout).queries, "")
    for phase in topology.phases(c, model, mesh, sizes, PLE, source.eos):
        phase.lower()


def test_topology_is_of_the_plan_alone():
    from ple_jax.main import parse

    with pytest.raises(UserError, match="--topology=cpu:2 goes with --mode=plan"):
        parse(["x", "--config=configs/tiny.py", "--workdir=w", "--topology=cpu:2"])
