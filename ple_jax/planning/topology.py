"""Measures what every phase of a run needs of a device, from the compiler and without the devices.

This is `--mode=plan --topology=v5e:2x4`. The programs are those that train (`train.programs`); weights are shapes with
shardings. libtpu compiles for a slice of TPUs on any machine. Where it is not installed the same sheet is made on simulated
CPU devices.
"""

import functools
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from ple_jax import algorithms
from ple_jax.algorithms import Algorithm
from ple_jax.backend import backend, compilation, lora, reward_model, sharding, train
from ple_jax.backend import quantize as quantization
from ple_jax.backend.model import Model, quantized_axis
from ple_jax.core import packing, processor, refill, together
from ple_jax.core.backends import Needs
from ple_jax.core.types import Batch, Packed, Query, Sampling
from ple_jax.models import adapters, families, weights
from ple_jax.models.config import ModelConfig
from ple_jax.planning import hlo, outline, sheet
from ple_jax.planning.flops import forward_parts, gradient_flops
from ple_jax.planning.outline import Lengths, Source, example_batch, judged, lengths_of, read_source
from ple_jax.planning.targets import Target, make_mesh, open_target
from ple_jax.reports.formats import readable_bytes

# ---------------------------------------------------------------- shapes on devices


def abstract_base(model: Model, mesh: Mesh, quantize: str = "none") -> Any:
    """Returns the base model as shapes with the shardings that training gives it, with `quantize` as a quantised one."""

    def leaf(path: tuple, x: jax.ShapeDtypeStruct) -> Any:
        name = "/".join(str(k.key) for k in path if not str(k.key).isdigit())
        axis = quantized_axis(name) if quantize != "none" else None
        parts = x if axis is None else quantization.shapes(x, quantize, axis=axis + model.scan)

        def placed(part: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            place = sharding.spec(name, part.shape, mesh, kv_heads=model.config.num_kv_heads)
            return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=NamedSharding(mesh, place))

        return jax.tree.map(placed, parts)

    return jax.tree_util.tree_map_with_path(leaf, model.shapes)


def _abstract(tree: Any, places: Any) -> Any:
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def _placed(mesh: Mesh, batch: Batch) -> tuple[Batch, Packed]:
    """Returns a batch as shapes with its shardings on the devices, where every query has a row of its own."""
    shards = sharding.row_multiple(mesh)
    data = packing.laid_out(batch, packing.alone(batch, shards), shards=shards)

    def leaf(x: np.ndarray) -> jax.ShapeDtypeStruct:
        dtype = np.float32 if x.dtype == np.float64 else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding.rows(mesh, x.ndim))

    return jax.tree.map(leaf, data)


def device_bytes(tree: Any) -> int:
    """Computes the bytes that abstract arrays take on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * jax.dtypes.itemsize_bits(x.dtype) for x in leaves) // 8


# ---------------------------------------------------------------- the phases


class Spread(NamedTuple):
    """The arrays and programs of a run on the devices of a mesh, as shapes without values."""

    config: ConfigDict
    model: Model
    mesh: Mesh
    sizes: Lengths
    sampling: Sampling
    made: train.Programs
    base: Any
    adapter: Any
    state: Any
    numbers: int  # parameters of the adapter

    def whole(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """Returns the shape of an array that every device has as a whole."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(self.mesh))

    def rows(self, *shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        """Returns the shape of an array whose rows are spread over the devices."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(self.mesh, len(shape)))

    def forward(self, rows: int, tokens: int, source: int, predicted: int) -> dict[str, float]:
        """Computes the operations of a forward pass, by part of the model; arguments are as in `forward_parts`."""
        counts = {"rows": rows, "tokens": tokens, "source": source, "predicted": predicted}
        return forward_parts(self.model.config, **counts, adapter=self.numbers)


def spread(
    config: ConfigDict, model: Model, mesh: Mesh, sizes: Lengths, algorithm: Algorithm, eos: tuple[int, ...]
) -> Spread:
    """Makes the arrays and programs of a run as they are when training starts, as shapes."""
    opt, s, settings = config.optimizer, config.sampling, adapters.settings(config)
    transform = train.optimizer(clip_norm=opt.clip_norm, weight_decay=opt.weight_decay)
    fresh = adapters.init(model.config, settings, seed=config.seed)
    if head := algorithm.needs(config).head:
        fresh = adapters.with_head(config, fresh, model.config, head)
    places = train.placement(fresh, transform, mesh)
    return Spread(
        config,
        model,
        mesh,
        sizes,
        Sampling(sizes.new, eos, s.temperature, s.top_k, s.top_p, s.min_p),
        train.programs(model, fresh, mesh, transform=transform, settings=settings),
        abstract_base(model, mesh, config.model.quantize),
        _abstract(fresh, places[0]),
        _abstract(jax.eval_shape(transform.init, fresh), places[1]),
        adapters.count(fresh),
    )


class Phase(NamedTuple):
    """One program that a run compiles."""

    name: str
    about: str
    given: int  # bytes on a device of weights and state among its arguments
    held: int  # bytes on a device of what stays there but is no argument of this program
    flops: float  # of all devices together
    lower: Callable[[], Any]


def phases(
    config: ConfigDict, model: Model, mesh: Mesh, sizes: Lengths, algorithm: Algorithm, eos: tuple[int, ...]
) -> Iterator[Phase]:
    """Yields every program of the policy that a run compiles, in the order in which they run."""
    on, reward = spread(config, model, mesh, sizes, algorithm, eos), reward_bytes(config, mesh)
    sampling = _sampling(on, algorithm) if config.sampling.server is None else ()  # else others sample
    for phase in itertools.chain(sampling, _training(on, algorithm)):
        yield phase._replace(held=phase.held + reward)


def reward_bytes(config: ConfigDict, mesh: Mesh) -> int:
    """Returns the bytes on a device of the weights of reward models, those of parts and of the second reward too.

    They are spread as the policy is, and stay. What torch computes is not counted.
    """
    ours = (kwargs for kwargs in outline.reward_models(config) if kwargs.get("framework") != "torch")
    return sum(_reward_bytes(outline.reward_folder(kwargs), kwargs.get("dtype", "float32"), mesh) for kwargs in ours)


def _reward_bytes(folder: Path, dtype: str, mesh: Mesh) -> int:
    raw = weights.read_json(folder / "config.json")
    if raw.get("model_type") not in families.FAMILIES:  # which is torch's
        return 0
    known = weights.classifier_config(raw, str(folder / "config.json"))
    return device_bytes(abstract_base(reward_model.decoder(known, dtype, mesh), mesh))


def _sampling(on: Spread, algorithm: Algorithm) -> Iterator[Phase]:
    """Yields the program that reads the longest prompts, and the one that decodes.

    The rows, the prefix and the fused adapter are in memory in both.
    """
    sizes = on.sizes
    shape = outline.decoded_rows(on.config, algorithm, sizes, multiple=sharding.row_multiple(on.mesh))
    count, _ = shape.group(sizes.sampled)
    programs = _generation(on, shape)
    # the adapter, the reference, the optimizer's moments; and the kernels of the base, where others sample
    held = 2 * device_bytes(on.adapter) + device_bytes(on.state)
    held += device_bytes(_kernels(on.base)) if on.config.sampling.fold_adapter else 0
    before = f"{sizes.prefix} shared + " if sizes.prefix else ""
    given = sum(map(device_bytes, programs.kept))
    yield Phase(
        "prefill", f"{count} prompts x [{before}{sizes.sampled} tokens]", given, held,
        sum(on.forward(count, sizes.sampled, sizes.prefix + sizes.sampled, 1).values()), programs.begin,
    )  # fmt: skip
    about = f"{shape.rows} rows x 1 token over [{before}{shape.room}] positions"
    yield Phase(
        "decode step", about, given, held,
        sum(on.forward(shape.rows, 1, sizes.prefix + shape.room, 1).values()), programs.decode,
    )  # fmt: skip


def _kernels(base: Any) -> list[Any]:
    found = jax.tree_util.tree_leaves_with_path(base["layers"])
    return [x for path, x in found if path[-1].key == "kernel"]


class _Generation(NamedTuple):
    """The programs that sample, to be lowered, and the arrays that they find on the devices."""

    kept: tuple[Any, ...]  # the base as it samples, the fused adapter, the prefix, the rows
    begin: Callable[[], Any]
    decode: Callable[[], Any]


def _generation(on: Spread, shape: refill.Shape) -> _Generation:
    made, ints = on.made, jnp.int32
    count, begun = shape.group(on.sizes.sampled)

    def compiled(program: Any, *given: Any, **static: Any) -> Any:
        """Compiles a program, and returns its results as shapes with the shardings that it gives them."""
        places = program.lower(*given, **static).compile().output_shardings
        return _abstract(jax.eval_shape(functools.partial(program, **static), *given), places)

    base, fused = on.base, {}
    if on.config.sampling.fold_adapter:
        base = lora.folded(on.base, compiled(made.fold, on.base, on.adapter))
    else:
        fused = compiled(made.fuse, on.base, on.adapter)
    prefix = compiled(made.prefix, base, fused, on.whole((on.sizes.prefix,), ints)) if on.sizes.prefix else None
    rows = compiled(made.rows, base, count=shape.rows, room=shape.room, new=shape.new)
    numbers, noise = on.whole((begun,), ints), on.whole((begun, shape.new), jnp.float32)
    prompts = on.rows(count, on.sizes.sampled, dtype=ints), on.rows(count, dtype=ints)
    group = *prompts, numbers, numbers, noise
    there, limit = (base, fused, prefix, rows), on.whole((), ints)
    return _Generation(
        there,
        lambda: made.begin.lower(*there, *group, sampling=on.sampling),
        lambda: made.decode.lower(*there, limit, limit, sampling=on.sampling),
    )


def _training(on: Spread, algorithm: Algorithm) -> Iterator[Phase]:
    config, opt = on.config, on.config.optimizer
    frozen, trained, moments = map(device_bytes, (on.base, on.adapter, on.state))  # the reference is as large as the adapter
    policy, resident = frozen + trained, trained + moments

    def data(queries: int, sizes: Lengths) -> tuple[Any, str, dict[str, float]]:
        made = _placed(on.mesh, example_batch(config, algorithm, queries, sizes, on.model.config.vocab_size))
        return made, *_packed(on, made[0])

    said, about, flops = data(*judged(config, algorithm, on.sizes))
    yield Phase(
        "log-probs", about, policy, resident, sum(flops.values()),
        lambda: on.made.outputs.lower(on.base, on.adapter, said[1], entropy=True),
    )  # fmt: skip
    micro, about, flops = data(opt.micro_queries, on.sizes)
    key, loss = jax.eval_shape(lambda: jax.random.key(0)), algorithm.make_loss(config)
    passes = opt.batch_queries // opt.micro_queries
    accumulated = trained if passes > 1 else 0
    yield Phase(
        "gradients", about + (f", {passes} times a step" if passes > 1 else ""), policy, resident + accumulated,
        gradient_flops(flops, config.model.remat),
        lambda: on.made.gradients.lower(on.base, on.adapter, *micro, on.whole((), jnp.float32), key, loss=loss),
    )  # fmt: skip
    if passes > 1:
        yield Phase(
            "accumulate", f"{on.numbers:,} gradients", 2 * trained, policy + resident, on.numbers,
            lambda: on.made.accumulate.lower(on.adapter, on.adapter),
        )  # fmt: skip
    yield Phase(
        "apply", f"AdamW on {on.numbers:,} parameters", 2 * trained + moments, policy, 20.0 * on.numbers,
        lambda: on.made.apply.lower(on.adapter, on.state, on.adapter, on.whole((), jnp.float32)),
    )  # fmt: skip


def _packed(on: Spread, batch: Batch) -> tuple[str, dict[str, float]]:
    """Describes the shape of a batch in packed rows, and computes the operations of a forward pass over it."""
    queries, k, new = batch.response.shape
    prompt = batch.prompt.shape[1]
    time_ = prompt + k * new
    about = f"{queries} rows x [{prompt} prompt + {k} x {new} response tokens]"
    return about, on.forward(queries, time_, time_, k * new)


# ---------------------------------------------------------------- what the compiler says


class Measured(NamedTuple):
    """The memory of a program on one device, in bytes.

    Of a program that the compiler refuses only the total that it would need is known.
    """

    arguments: int
    outputs: int
    temporaries: int
    peak: int
    collectives: list[hlo.Collective]
    seconds: float
    refused: bool = False


def measure(phase: Phase) -> Measured:
    """Lowers and compiles one phase, and returns what it needs; `refused` says that the compiler found it too large."""
    start = time.perf_counter()
    try:
        compiled = phase.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = max(_needed(str(error)), phase.given)
        seconds = time.perf_counter() - start
        return Measured(phase.given, 0, needed - phase.given, needed, [], seconds, refused=True)
    seconds = time.perf_counter() - start
    m = compiled.memory_analysis()
    outputs = m.output_size_in_bytes - m.alias_size_in_bytes  # donated arguments become outputs
    # the sum: temporaries are one block, reserved for the whole call. peak_memory_in_bytes counts on-chip memory on a TPU
    peak = m.argument_size_in_bytes + outputs + m.temp_size_in_bytes + m.generated_code_size_in_bytes
    return Measured(
        m.argument_size_in_bytes, outputs, m.temp_size_in_bytes, peak, hlo.collectives(compiled.as_text()), seconds
    )


def _needed(message: str) -> int:
    """Reads the bytes that a program needs from the compiler's refusal: the largest amount that it names."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return max((int(float(n) * units[u]) for n, u in re.findall(r"\b(\d+(?:\.\d+)?)([KMGT])\b", message)), default=0)


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
) -> dict[str, Measured]:
    """Compiles every phase for the topology (`v5e:2x4`, `cpu:8` ...) and writes, as it goes, what each needs of a device.

    Arguments and errors are those of `TopologyModule.report`. Returns what was measured, by phase.
    """
    target = open_target(topology)
    mesh = make_mesh(target, **config.mesh)
    source = read_source(config.model.path, config.model.revision)
    sizes = lengths_of(config, source, algorithm, train_set, heldout, principles)
    model = backend.make_model(config, source.config, mesh, platform=target.platform)
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(model.shapes))
    hosts = [f"{target.hosts} hosts: the same command on each"] if target.hosts > 1 else []
    notes = [target.note, *hosts, *sharding.notes(mesh, kv_heads=source.config.num_kv_heads)]
    there = on_sheet(target)
    sheet.head(config, there, parameters=parameters, sizes=sizes, tokenizer=source.tokenizer, notes=notes, write=write)
    results: dict[str, Measured] = {}

    def rows() -> Iterator[sheet.Row]:
        for phase in phases(config, model, mesh, sizes, algorithm, source.eos):
            results[phase.name] = measure(phase)
            yield row(phase, results[phase.name])

    title = "Memory of one device: a program's arguments, outputs and temporaries, and what stays there besides"
    sheet.body(config, there, title, rows(), write)
    return results


def needs(config: ConfigDict, topology: str | None, *, algorithm: Algorithm, source: Source, sizes: Lengths) -> Needs:
    """Returns what the compiler says that the programs that sample and train need; see `TopologyModule.needs`."""
    target = open_target(topology) if topology else None
    if target is None and config.model.compile_cache:
        compilation.keep()
    mesh = make_mesh(target, **config.mesh) if target else sharding.make_mesh(**config.mesh)
    platform = target.platform if target else mesh.devices.flat[0].platform

    def need(width: int, queries: int, name: str = "") -> int:
        on = outline.with_numbers(config, {"sampling.width": width, "optimizer.micro_queries": queries})
        if target is None:
            return _need_here(on, source.config, source.eos, sizes, name)
        return _need(on, source.config, source.eos, sizes, name, algorithm, mesh, platform)

    return Needs(
        _room(target, mesh),
        reading=outline.reading(platform),
        sampling=lambda width: need(width, mesh.size),
        training=lambda queries: need(mesh.size, queries, "gradients"),
    )


# where there are several processes all compile: some compilers share the work among them, and wait for one another
@together.together
def _need_here(config: ConfigDict, model: ModelConfig, eos: tuple[int, ...], sizes: Lengths, name: str) -> int:
    if config.model.compile_cache:
        compilation.keep()
    mesh, algorithm = sharding.make_mesh(**config.mesh), algorithms.load(config.algorithm)
    return _need(config, model, eos, sizes, name, algorithm, mesh, mesh.devices.flat[0].platform)


def _need(
    config: ConfigDict, model_config: ModelConfig, eos: tuple[int, ...], sizes: Lengths, name: str, algorithm: Any,
    mesh: Mesh, platform: str,
) -> int:  # fmt: skip
    """Computes the bytes needed on a device: for the programs that sample, or for the training program of that `name`."""
    model = backend.make_model(config, model_config, mesh, platform=platform)
    run = spread(config, model, mesh, sizes, algorithm, eos)
    found = (one for one in _training(run, algorithm) if one.name == name) if name else _sampling(run, algorithm)
    return reward_bytes(config, mesh) + max(one.held + measure(one).peak for one in found)


def _room(target: Target | None, mesh: Mesh) -> int | None:
    """Returns the bytes of a device that may be filled; None if there is no limit, or it is not known."""
    if target is not None:
        return int(outline.FULL * target.chip.hbm * sheet.GIB) if target.chip else None
    stats = mesh.devices.flat[0].memory_stats()  # nothing of a CPU
    if stats and "bytes_limit" in stats:
        return int(outline.FULL * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    free = processor.free_memory()
    return free and int(outline.FULL * free / max(1, mesh.local_mesh.size if mesh.is_multi_process else mesh.size))


def on_sheet(target: Target) -> sheet.Target:
    """Returns the target in the form that the sheet takes."""
    return sheet.Target(target.name, len(target.devices), target.chip.hbm if target.chip else None)


def row(phase: Phase, m: Measured) -> sheet.Row:
    """Returns the line of the sheet for a phase."""
    cells = {"args": m.arguments, "out": m.outputs, "temp": m.temporaries, "held": phase.held}
    lines = ["not compiled"] if m.refused else _collectives(m.collectives)
    stays, passing = m.arguments + phase.held, m.temporaries + m.outputs
    return sheet.Row(
        phase.name, phase.about, cells, stays, passing, m.peak + phase.held, m.seconds, phase.flops, m.refused, lines
    )


def _collectives(found: Sequence[hlo.Collective]) -> list[str]:
    lines = []
    for kind in sorted({x.kind for x in found}):
        mine = [x for x in found if x.kind == kind]
        terms = [f"{sum(not x.looped for x in mine)}"] if any(not x.looped for x in mine) else []
        for times in sorted({x.times for x in mine if x.looped}):
            terms.append(f"{sum(x.looped and x.times == times for x in mine)} in a loop of {times}")
        moved = readable_bytes(sum(x.bytes * x.times for x in mine))
        lines.append(f"{kind}: {sum(x.times for x in mine)} ({' + '.join(terms)}), {moved}")
    return lines or ["no collectives"]
