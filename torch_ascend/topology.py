"""`--mode=plan --backend=torch --topology=910b:8`: what every phase of a run holds on a device, without the devices.

The code that trains is run, as one of so many processes, on tensors without memory (FakeTensorMode), and the bytes of the
tensors that are alive are counted. Collectives do nothing. What kernels and libraries take for themselves is not counted.
"""

import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from ml_collections import ConfigDict
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForSequenceClassification

from ple_jax import algorithms
from ple_jax.algorithms import Algorithm
from ple_jax.core import packing, processor, refill
from ple_jax.core.backends import Needs
from ple_jax.core.errors import UserError, suggestion
from ple_jax.core.types import Batch, Query, Sampling
from ple_jax.models.config import ModelConfig
from ple_jax.models.layout import expected_shapes
from ple_jax.models.weights import Loaded
from ple_jax.planning import sheet
from ple_jax.planning.outline import (
    FULL,
    Lengths,
    Source,
    decoded_rows,
    example_batch,
    judged,
    lengths_of,
    read_source,
    reading,
    reward_folder,
    reward_models,
    with_numbers,
)
from ple_jax.reports.formats import readable_bytes
from torch_ascend import backend, forward, generate, lora, ops, sharding
from torch_ascend import device as devices
from torch_ascend.backend import TorchBackend
from torch_ascend.counting import Counter, count_bytes
from torch_ascend.fakes import FUSED, Weights, replaced
from torch_ascend.sharding import Place, World

STEPS = 3  # tokens decoded: the cache has its whole size from the start, and what grows with what is read of it is small


# ---------------------------------------------------------------- devices


class Chip(NamedTuple):
    """A kind of device to plan for; there need not be one here."""

    kind: str  # npu | cuda | cpu: whose operators, and what it can do
    memory: float | None  # GiB that torch has of it; None: not ours to know


# the memory is what torch_npu and torch.cuda call the total, in their messages and properties: less than the name says
CHIPS = {
    "910b": Chip("npu", 60.97),
    "a100": Chip("cuda", 79.1),
    "h100": Chip("cuda", 79.18),
    "cpu": Chip("cpu", None),
}


class Target(NamedTuple):
    """The devices to plan for; they need not be here."""

    name: str
    chip: Chip
    devices: int


def open_target(topology: str) -> Target:
    """Returns the devices that a topology names: `910b:8`, `h100:8`, `cpu:2` ...

    Raises:
        UserError: the topology is unknown.
    """
    match = re.fullmatch(r"([a-z0-9]+):([1-9]\d*)", topology)
    if match is None or match[1] not in CHIPS:
        raise UserError(
            f"--topology={topology} is not known; with --backend=torch give KIND:DEVICES, KIND one of {', '.join(CHIPS)}:"
            f" 910b:8, cpu:2{suggestion(topology.split(':', 1)[0], list(CHIPS))}"
        )
    return Target(topology, CHIPS[match[1]], int(match[2]))


def check_mesh(mesh: Any, target: Target) -> None:
    """Raises a UserError unless the mesh takes exactly the target's devices."""
    count = target.devices
    if mesh.tensor != 1 or mesh.data * mesh.fsdp != count:
        raise UserError(
            f"mesh data={mesh.data} x fsdp={mesh.fsdp} x tensor={mesh.tensor} is {mesh.data * mesh.fsdp * mesh.tensor}"
            f" devices, --topology={target.name} has {count}, and the torch backend has no tensor parallelism; set"
            f" --config.mesh.tensor=1 and --config.mesh.data={count} --config.mesh.fsdp=1 (a whole base on every device) or"
            f" --config.mesh.data=1 --config.mesh.fsdp={count} (one spread over all)"
        )


@contextlib.contextmanager
def process_of(target: Target, config: ConfigDict, model: ModelConfig) -> Iterator[Place]:
    """Opens a context with stand-ins for the target's devices and operators; gives process 0's place among the devices.

    Its tensors are on the "CPU", which can do what the chip can: a tensor without memory may be on any device, but only one
    that this build of torch has can be differentiated on.
    """
    chip = target.chip
    memory = None if chip.memory is None else int(chip.memory * sheet.GIB)
    with contextlib.ExitStack() as stack:
        for name, operator in FUSED.items() if chip.kind == "npu" else ():
            stack.enter_context(replaced(torch.ops.npu, name, operator))
        if target.devices > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=target.devices)
            stack.callback(dist.destroy_process_group)
        able, world = devices.CAPABILITIES[chip.kind], World(0, target.devices)
        yield backend.choose_place(config, model, torch.device("cpu"), able, memory, world)


def fused_ops(config: ConfigDict, chip: Chip) -> ops.Ops:
    """Returns the table of operators that the config gets on a chip.

    Raises:
        UserError: the config asks for the fused operators, and the chip is no NPU.
    """
    if config.model.ops == "npu" and chip.kind != "npu":
        raise UserError(f"config.model.ops is 'npu', whose operators do not run on {chip.kind}: take 'auto' or 'reference'")
    return ops.NPU if chip.kind == "npu" and config.model.ops != "reference" else ops.REFERENCE


def attention(table: ops.Ops, model: ModelConfig) -> str:
    """Describes the memory that attention is assumed to take; ops.py decides which function is called."""
    if model.attention_softcap is not None:
        return "plain torch makes all scores, as there is a softcap"
    name, size = ("npu_fusion_attention", 64) if table is ops.NPU else ("scaled_dot_product_attention", 4)
    return f"{name} keeps its output and {size} bytes for every query of a head, and makes no scores"


# ---------------------------------------------------------------- the phases


class Phase(NamedTuple):
    """A part of an iteration on one device: its name, a description, and the work itself."""

    name: str
    about: str
    work: Callable[[], Any]


class Measured(NamedTuple):
    """The bytes that a phase takes on one device."""

    held: int  # what is there before, during and after it
    besides: int  # the most there was at one time on top of that
    seconds: float  # that counting took

    @property
    def total(self) -> int:
        return self.held + self.besides


def build(config: ConfigDict, source: Source, table: ops.Ops, place: Place) -> TorchBackend:
    """Builds the backend of one process as for training, but with weights that are all zero."""
    given, tokenizer = Weights(source.config, config.model.dtype), cast(Any, None)
    loaded = Loaded(source.config, given, tokenizer, source.eos, config.model.path, dict(source.raw), None)
    return backend.assemble(config, loaded, place, table, head=algorithms.load(config.algorithm).needs(config).head)


def parts(backend: TorchBackend) -> dict[str, int]:
    """Returns the bytes that stay on this process's device, by what they are for."""
    sizes, before = {}, 0
    seen: list[Tensor] = []
    for name, own in _parts(backend).items():
        seen += own
        sizes[name] = count_bytes(seen) - before
        before += sizes[name]
    return sizes


def _parts(backend: TorchBackend) -> dict[str, list[Tensor]]:
    module = backend.model.module
    quantized = [x for part in module.modules() for x in vars(part).values() if isinstance(x, Tensor)]
    return {
        "base": [*module.parameters(), *module.buffers(), *quantized],
        "head in fp32": [backend.model.head],  # made when it is first asked for; on some devices the base's own
        "adapter": [*backend.leaves.values()],
        "reference": [*lora.leaves(backend.reference).values()],
        "optimizer": [x for moments in backend.optimizer.state.values() for x in moments.values()],
    }


def reward_bytes(config: ConfigDict) -> int:
    """Returns the bytes of the weights of reward models, those of parts and of the second reward too.

    Like the policy, every process has them on its device. What JAX or a CPU computes is not counted.
    """
    return sum(map(_reward_bytes, reward_models(config)))


def _reward_bytes(kwargs: Mapping[str, Any]) -> int:
    if kwargs.get("framework") == "jax" or kwargs.get("device") == "cpu":
        return 0
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(reward_folder(kwargs)))
    return sum(x.numel() for x in model.parameters()) * getattr(torch, kwargs.get("dtype", "float32")).itemsize


def phases(
    backend: TorchBackend, config: ConfigDict, source: Source, sizes: Lengths, algorithm: Algorithm
) -> Iterator[Phase]:
    """Yields the phases of one process's iteration, in the order in which they happen."""
    if config.sampling.server is None:
        yield _sampling(backend, config, source, sizes, algorithm)
    yield from _training(backend, config, source, sizes, algorithm)


def _sampling(backend: TorchBackend, config: ConfigDict, source: Source, sizes: Lengths, algorithm: Algorithm) -> Phase:
    """Returns the sampling phase.

    It reads the longest prompts, as many as are read at once, and decodes a few tokens of this process's rows, with a cache
    that is full.
    """
    model, s, place = backend.model, config.sampling, {"device": backend.model.device}
    lanes = sharding.row_multiple(backend.world)
    sampling = Sampling(sizes.new, source.eos, s.temperature, s.top_k, s.top_p, s.min_p)
    shape = decoded_rows(config, algorithm, sizes, lanes=lanes)
    count, begun = (number // lanes for number in shape.group(sizes.sampled))
    room = shape.room + (0 if model.holds_prefix else sizes.prefix)

    def sample() -> None:
        numbers, length = (torch.zeros(begun, dtype=torch.int64, **place), torch.arange(begun, **place)), sizes.sampled
        prompts = torch.ones((count, length), dtype=torch.int64, **place), torch.full((count,), length, **place)
        group = refill.Group(*prompts, sizes.prefix > 0, *numbers, torch.zeros((begun, sizes.new), **place))
        prefix = None
        if sizes.prefix:
            tokens = torch.ones(sizes.prefix, dtype=torch.int64, **place)
            prefix = generate.read_prefix(model, backend.policy, tokens)
        rows = generate.Rows(model, shape.part, room, sizes.new, source.eos)
        generate.begin(model, backend.policy, prefix, rows, group, sampling=sampling)
        decoding = generate.Decoding(model, backend.policy, prefix, rows, sampling, recorded=False)
        for _ in range(STEPS):
            decoding.step(rows.cache.length)

    cache = generate.Rows(model, shape.part, room, sizes.new, source.eos).cache
    size = readable_bytes(count_bytes([*cache.keys, *cache.values]))
    shared = f"{sizes.prefix} shared + " if sizes.prefix else ""
    about = f"{shape.part} rows x [{shared}{sizes.sampled} prompt + {sizes.new} new tokens], KV cache {size}"
    return Phase("generate", about, sample)


def _training(
    backend: TorchBackend, config: ConfigDict, source: Source, sizes: Lengths, algorithm: Algorithm
) -> Iterator[Phase]:
    """Yields the training phases: log-probabilities, and the two halves of an update."""
    opt, processes = config.optimizer, sharding.row_multiple(backend.world)

    def batch(queries: int, sizes: Lengths) -> tuple[Batch, str]:
        made = example_batch(config, algorithm, queries, sizes, source.config.vocab_size)
        made = made._replace(response_mask=np.ones_like(made.response_mask))  # as long as they may be
        k, new = made.response.shape[1:]
        return made, f"{-(-queries // processes)} rows x [{sizes.trained} prompt + {k} x {new} response tokens]"

    said, about = batch(*judged(config, algorithm, sizes))

    def judge() -> None:
        rows = backend.put_rows(packing.laid_out(said, packing.alone(said, processes), shards=processes)[1])
        with torch.no_grad():
            forward.outputs(backend.model, backend.policy, rows, entropy=True)

    yield Phase("log-probs", about, judge)
    micro, about = batch(opt.micro_queries, sizes)
    passes, loss = opt.batch_queries // opt.micro_queries, algorithm.make_loss(config)
    found: dict[str, Tensor] = {}

    def gradients() -> None:
        # the second pass has the gradients of the first beside it
        found.update(backend.accumulate([micro] * min(passes, 2), loss))

    yield Phase("gradients", about + (f", {passes} times a step" if passes > 1 else ""), gradients)
    trained = sum(x.numel() for x in backend.leaves.values())
    yield Phase("step", f"AdamW on {trained:,} parameters", lambda: backend.step(found, lr=0.0))


class Found(NamedTuple):
    """What `measure` counted: the bytes that stay on a device, and those that each phase takes."""

    parts: dict[str, int]
    phases: list[tuple[Phase, Measured]]
    notes: list[str]  # what the backend says when a run starts


def count(
    config: ConfigDict, source: Source, target: Target, sizes: Lengths, algorithm: Algorithm, *, only: str = ""
) -> Found:
    """Counts, without memory, what one process of the target would hold; in one phase alone if `only` names it."""
    reward, table = reward_bytes(config), fused_ops(config, target.chip)
    # tables of a module, made when it was imported, have their values
    with process_of(target, config, source.config) as place, FakeTensorMode(allow_non_fake_inputs=True):
        found = measure(config, source, table, sizes, algorithm, place, only=only)
    if not reward:
        return found
    stays = [(phase, m._replace(held=m.held + reward)) for phase, m in found.phases]
    return found._replace(parts={**found.parts, "reward model": reward}, phases=stays)


def measure(
    config: ConfigDict,
    source: Source,
    table: ops.Ops,
    sizes: Lengths,
    algorithm: Algorithm,
    place: Place,
    *,
    only: str = "",
) -> Found:
    """Builds the backend of this process, runs the phases of an iteration, and counts the bytes that they hold.

    It works with tensors that have memory, too.

    Args:
        only: name of a phase that depends on no other; the others are then left out.
    """
    with Counter() as counter:
        backend = build(config, source, table, place)
        own, found = parts(backend), []
        counter.add(x for tensors in _parts(backend).values() for x in tensors)
        for phase in phases(backend, config, source, sizes, algorithm):
            if only not in ("", phase.name):
                continue
            held, start = counter.now, time.perf_counter()
            counter.reset()
            phase.work()
            found.append((phase, Measured(held, counter.peak - held, time.perf_counter() - start)))
    return Found(own, found, backend.notes)


# ---------------------------------------------------------------- the report


def report(
    config: ConfigDict,
    topology: str,
    *,
    algorithm: Algorithm,
    train_set: Sequence[Query],
    heldout: Sequence[Query],
    principles: str,
    write: sheet.Write = lambda line: print(line, flush=True),
) -> Found:
    """Counts what every phase holds on a device of the topology (`910b:8`, `cpu:2` ...), and writes whether it fits.

    Arguments and errors are those of `TopologyModule.report`.
    """
    target = open_target(topology)
    backend.check(config, config.mesh.fsdp)
    check_mesh(config.mesh, target)
    source = read_source(config.model.path, config.model.revision)
    sizes = lengths_of(config, source, algorithm, train_set, heldout, principles)
    table, there = fused_ops(config, target.chip), on_sheet(target)
    notes = [
        "the code that trains, run on tensors without memory; what kernels, collectives and libraries take is not counted",
        f"operators: {table.name}; attention: {attention(table, source.config)}",
    ]
    parameters = sum(math.prod(shape) for shape in expected_shapes(source.config).values())
    sheet.head(config, there, parameters=parameters, sizes=sizes, tokenizer=source.tokenizer, notes=notes, write=write)
    found = count(config, source, target, sizes, algorithm)
    for note in found.notes:
        write(note)
    write("\nWhat stays on a device")
    for name, size in (*found.parts.items(), ("together", sum(found.parts.values()))):
        write(f"{name:<14}{readable_bytes(size):>10}")
    title = "And the most that a phase holds besides, for a while"
    sheet.body(config, there, title, [row(phase, m) for phase, m in found.phases], write)
    return found


def needs(config: ConfigDict, topology: str | None, *, algorithm: Algorithm, source: Source, sizes: Lengths) -> Needs:
    """Returns what a run needs, as `TopologyModule.needs`: the code that trains is run on tensors without memory.

    Of this machine's devices only one is counted, with its own rows, since the processes have already joined.
    """
    rows = config.mesh.data * config.mesh.fsdp
    if topology is None:
        target, alone, room = _present(config), {"mesh.data": 1, "mesh.fsdp": 1}, _room(config)
    else:
        target, alone = open_target(topology), {}
        check_mesh(config.mesh, target)
        room = None if target.chip.memory is None else int(FULL * target.chip.memory * sheet.GIB)
    backend.check(config, config.mesh.fsdp)
    elsewhere = 0 if topology else _elsewhere(config, source.config, target)

    def need(phase: str, width: int, queries: int) -> int:
        shared = rows // target.devices  # by the processes that are not counted
        numbers = {"sampling.width": width, "optimizer.micro_queries": queries}
        numbers["optimizer.batch_queries"] = config.optimizer.batch_queries
        on = with_numbers(config, {**alone, **{key: number // shared for key, number in numbers.items()}})
        found = count(on, source, target, sizes, algorithm, only=phase)
        return next(m.total for one, m in found.phases if one.name == phase) - elsewhere

    return Needs(
        room,
        reading=reading(target.chip.kind),
        sampling=lambda width: need("generate", width, rows),
        training=lambda queries: need("gradients", rows, queries),
    )


def _elsewhere(config: ConfigDict, model: ModelConfig, target: Target) -> int:
    """Returns the bytes of the base that other devices of this machine hold.

    Embedding and head are whole on every device, and so are two layers while they are computed.
    """
    base, memory = backend.base_bytes(config, model), target.chip.memory
    _, fsdp, _ = sharding.choose(config.mesh, base, None if memory is None else int(memory * sheet.GIB))
    ends = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    layers = base - ends * getattr(torch, config.model.dtype).itemsize
    return int(max(0.0, (1 - 1 / fsdp) * (1 - 2 / model.num_layers)) * layers)


def _present(config: ConfigDict) -> Target:
    """Returns one device of this machine as a target."""
    device = devices.resolve(config.model.device)
    memory = devices.total_memory(device)
    return Target(device.type, Chip(device.type, memory and memory / sheet.GIB), 1)


def _room(config: ConfigDict) -> int | None:
    """Returns how many bytes of this process's device may be filled; None if unknown."""
    device = devices.resolve(config.model.device)
    if device.type != "cpu":
        return int(FULL * devices.free_memory(device))
    found, here = processor.free_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", sharding.world().size))
    return found and int(FULL * found / here)  # the processes of this host share its memory


def on_sheet(target: Target) -> sheet.Target:
    """Returns the target in the form that `planning.sheet` takes."""
    return sheet.Target(target.name, target.devices, target.chip.memory, full=FULL, spreads_quantized=False)


def row(phase: Phase, m: Measured) -> sheet.Row:
    """Returns the sheet's line for a phase."""
    return sheet.Row(phase.name, phase.about, {"besides": m.besides}, m.held, m.besides, m.total, m.seconds)
