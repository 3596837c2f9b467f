"""`--mode=plan --topology=v5e:2x4`: what every phase of a run needs of a device, from the compiler, without the devices.

The programs are those that train (`train.programs`); weights are shapes with shardings. libtpu compiles for a slice of
TPUs on any machine; where it is not installed the same report is made on simulated CPU devices.
"""

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ple_jax.algorithms import Algorithm
from ple_jax.backend import backend, generate, lora, sharding, train
from ple_jax.backend import quantize as quantization
from ple_jax.backend.model import Model, quantized_axis
from ple_jax.core.types import Batch, Query, Sampling
from ple_jax.models import adapters
from ple_jax.planning import hlo
from ple_jax.planning.flops import forward_flops, gradient_flops
from ple_jax.planning.outline import Lengths, check_positions, example_batch, lengths, read_source, readable
from ple_jax.planning.targets import Target, make_mesh, open_target

GIB = 2**30


# ---------------------------------------------------------------- shapes on devices


def abstract_base(model: Model, mesh: Mesh, quantize: str = "none") -> Any:
    """The base as shapes with the shardings that training gives it."""

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


def _rows(mesh: Mesh, tree: Any) -> Any:
    """A batch as it is on the devices: rows spread, padded to a multiple of the devices they are spread over."""
    multiple = sharding.row_multiple(mesh)

    def leaf(x: np.ndarray) -> jax.ShapeDtypeStruct:
        dtype = np.float32 if x.dtype == np.float64 else x.dtype
        rows = -(-x.shape[0] // multiple) * multiple
        return jax.ShapeDtypeStruct((rows, *x.shape[1:]), dtype, sharding=sharding.rows(mesh, x.ndim))

    return jax.tree.map(leaf, tree)


def device_bytes(tree: Any) -> int:
    """Bytes of abstract arrays on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * jax.dtypes.itemsize_bits(x.dtype) for x in leaves) // 8


# ---------------------------------------------------------------- floating-point operations, by formula




# ---------------------------------------------------------------- the phases


class Phase(NamedTuple):
    """One compiled program of a run."""

    name: str
    about: str
    given: int  # bytes on a device of weights and state among its arguments
    held: int  # bytes on a device of what stays there but is no argument of this program
    flops: float  # of all devices together
    lower: Callable[[], Any]


def phases(
    config: ConfigDict, model: Model, mesh: Mesh, sizes: Lengths, algorithm: Algorithm, eos: tuple[int, ...]
) -> Iterator[Phase]:
    """Everything a run compiles, in the order in which it happens."""
    c, opt = model.config, config.optimizer
    settings = adapters.settings(config)
    transform = train.optimizer(clip_norm=opt.clip_norm, weight_decay=opt.weight_decay)
    fresh = adapters.init(c, settings, seed=config.seed)
    if head := algorithm.needs(config).head:
        fresh = adapters.with_head(config, fresh, c, head)
    places = train.placement(fresh, transform, mesh)
    made = train.programs(model, fresh, mesh, transform=transform, settings=settings)
    base = abstract_base(model, mesh, config.model.quantize)
    adapter = _abstract(fresh, places[0])
    state = _abstract(jax.eval_shape(transform.init, fresh), places[1])
    frozen, trained, moments = map(device_bytes, (base, adapter, state))  # the reference is as large as the adapter

    def whole(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(mesh))

    def spread(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(mesh, len(shape)))

    def forward(rows: int, tokens: int, source: int, predicted: int) -> dict[str, float]:
        return forward_flops(c, rows=rows, tokens=tokens, source=source, predicted=predicted, adapter=adapters.count(fresh))

    s, width = config.sampling, config.sampling.width
    sampling = Sampling(sizes.new, eos, s.temperature, s.top_k, s.top_p, s.min_p)
    total = sizes.prefix + sizes.sampled + sizes.new

    def generation(new: int) -> Any:
        prompt = spread(width, sizes.sampled, dtype=jnp.int32), spread(width, sizes.sampled, dtype=jnp.bool_)
        noise = spread(width, new, dtype=jnp.float32)
        return made.generate.lower(base, adapter, *prompt, whole((sizes.prefix,), jnp.int32), noise, sampling=sampling)

    def decode() -> Any:
        fuse = jax.jit(lambda base, adapter: lora.fuse(model, adapter, settings, base=base))
        # fused before the loop in generate: where the compiler puts it is where the loop finds it
        fused = _abstract(jax.eval_shape(fuse, base, adapter), fuse.lower(base, adapter).compile().output_shardings)
        cache = jax.eval_shape(lambda: model.empty_cache(width, total, jnp.dtype(config.model.dtype)))
        heads = "tensor" if c.num_kv_heads % mesh.shape["tensor"] == 0 else None
        cached = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape,
                x.dtype,
                sharding=NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 4), sharding.BATCH, heads, None, None)),
            ),
            cache,
        )

        def step(
            base: Any, fused: Any, cache: Any, token: Any, position: Any, mask: Any, places: Any, index: Any, u: Any
        ) -> Any:
            hidden, cache = model.apply(
                base,
                fused,
                token,
                positions=position,
                mask=mask,
                cache=cache,
                index=index,
                source_positions=places,
            )
            return generate.sample_token(model.logits(base, hidden[:, -1]), u, sampling=sampling), cache

        token, position = spread(width, 1, dtype=jnp.int32), spread(width, 1, dtype=jnp.int32)
        mask, u = spread(width, 1, total, dtype=jnp.bool_), spread(width, dtype=jnp.float32)
        places, index = spread(width, total, dtype=jnp.int32), whole((), jnp.int32)
        return jax.jit(step, donate_argnums=2).lower(base, fused, cached, token, position, mask, places, index, u)

    policy = frozen + trained
    resident = trained + moments  # the reference and the optimizer's moments
    first = sum(forward(width, sizes.sampled, total, 1).values())
    first += sum(forward(1, sizes.prefix, sizes.prefix, 0).values())
    one = sum(forward(width, 1, total, 1).values())
    rows = f"{width} rows x [{f'{sizes.prefix} shared + ' if sizes.prefix else ''}{sizes.sampled} prompt"
    yield Phase("prefill", f"{rows} tokens]", policy, resident, first, lambda: generation(1))
    yield Phase("decode step", f"{width} rows x 1 token over {total} positions", policy, resident, one, decode)
    yield Phase(
        "generate", f"{rows} + {sizes.new} new tokens]", policy, resident, first + (sizes.new - 1) * one,
        lambda: generation(sizes.new),
    )  # fmt: skip

    def batch(queries: int) -> Batch:
        return _rows(mesh, example_batch(config, algorithm, queries, sizes, c.vocab_size))

    def packed(b: Batch) -> tuple[str, dict[str, float]]:
        queries, k, new = b.response.shape
        time_ = b.prompt.shape[1] + k * new
        about = f"{queries} rows x [{b.prompt.shape[1]} prompt + {k} x {new} response tokens]"
        return about, forward(queries, time_, time_, k * new)

    # log-probabilities are taken of a whole optimiser batch where the loss needs the reference's
    judged = batch(max(config.eval.diagnostic_queries, opt.batch_queries * algorithm.needs(config).reference))
    about, flops = packed(judged)
    yield Phase(
        "log-probs", about, policy, resident, sum(flops.values()),
        lambda: made.outputs.lower(base, adapter, judged, entropy=True),
    )  # fmt: skip
    micro, loss = batch(opt.micro_queries), algorithm.make_loss(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    about, flops = packed(micro)
    passes = opt.batch_queries // opt.micro_queries
    accumulated = trained if passes > 1 else 0
    yield Phase(
        "gradients",
        about + (f", {passes} times a step" if passes > 1 else ""),
        policy,
        resident + accumulated,
        gradient_flops(flops, config.model.remat),
        lambda: made.gradients.lower(base, adapter, micro, whole((), jnp.float32), key, loss=loss),
    )
    numbers = adapters.count(fresh)
    if passes > 1:
        yield Phase(
            "accumulate", f"{numbers:,} gradients", 2 * trained, policy + resident, numbers,
            lambda: made.accumulate.lower(adapter, adapter),
        )  # fmt: skip
    yield Phase(
        "apply", f"AdamW on {numbers:,} parameters", 2 * trained + moments, policy, 20.0 * numbers,
        lambda: made.apply.lower(adapter, state, adapter, whole((), jnp.float32)),
    )  # fmt: skip


# ---------------------------------------------------------------- what the compiler says


class Measured(NamedTuple):
    """Bytes on one device. What the compiler says of a program that it refuses is how much it would need in all."""

    arguments: int
    outputs: int
    temporaries: int
    peak: int
    collectives: list[hlo.Collective]
    seconds: float
    refused: bool = False


def measure(phase: Phase) -> Measured:
    """Lowers and compiles one phase."""
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
    """Bytes in the compiler's refusal: the largest amount that it names."""
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
    write: Callable[[str], None] = lambda line: print(line, flush=True),
) -> dict[str, Measured]:
    """Compiles every phase for the topology and writes, as it goes, what each needs and whether it fits.

    Args:
        topology: `v5e:2x4`, `cpu:8` ...
        algorithm: as `algorithms.load` gives it.
        write: takes one line at a time.

    Returns:
        What was measured, by phase.

    Raises:
        UserError: an unknown topology, a mesh that does not take its devices, a model that is not supported.
    """
    target = open_target(topology)
    mesh = make_mesh(target, **config.mesh)
    source = read_source(config.model.path, config.model.revision)
    c = source.config
    sizes = lengths(config, source.tokenizer, train_set, heldout, principles)
    check_positions(config, sizes, c)
    model = backend.make_model(config, c, mesh, platform=target.platform)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(model.shapes))
    limit = target.chip.hbm * GIB if target.chip else math.inf
    axes = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
    write(f"{config.model.path}: {count:,} parameters, {config.model.dtype}, remat {config.model.remat}")
    memory = f", {target.chip.hbm:g} GiB each" if target.chip else ""
    write(f"{target.name}: {len(target.devices)} devices, {axes}{memory}")
    write(target.note)
    for line in sharding.notes(mesh, kv_heads=c.num_kv_heads):
        write(line)
    if source.tokenizer is None:
        write(f"no tokenizer: every prompt counts as {sizes.sampled} tokens (task.max_prompt_tokens), principles included")
    write("\nMemory of one device: a program's arguments, outputs and temporaries, and what stays there besides")
    write(f"{'':<12}{'args':>10}{'out':>10}{'temp':>10}{'held':>10}{'total':>10}{'of HBM':>8}{'FLOPs':>10}{'compile':>9}")
    results: dict[str, tuple[Phase, Measured]] = {}
    for phase in phases(config, model, mesh, sizes, algorithm, source.eos):
        m = measure(phase)
        results[phase.name] = (phase, m)
        write(_row(phase, m, limit))
    write("")
    for phase, m in results.values():
        write(f"{phase.name}: {phase.about}")
        for line in ["not compiled"] if m.refused else _collectives(m.collectives):
            write(f"    {line}")
    write("")
    for line in verdict(config, target, [*results.values()]):
        write(line)
    return {name: m for name, (_, m) in results.items()}


def _row(phase: Phase, m: Measured, limit: float) -> str:
    parts = [readable(n) for n in (m.arguments, m.outputs, m.temporaries)]
    total = m.peak + phase.held
    share = f"{total / limit:.0%}" if limit < math.inf else ""
    cells = "".join(f"{cell:>10}" for cell in (*parts, readable(phase.held), readable(total)))
    return f"{phase.name:<12}{cells}{share:>8}{phase.flops:>10.2e}{m.seconds:>7.1f} s" + (
        "  the compiler refuses" if m.refused else ""
    )


def _collectives(found: Sequence[hlo.Collective]) -> list[str]:
    lines = []
    for kind in sorted({x.kind for x in found}):
        mine = [x for x in found if x.kind == kind]
        terms = [f"{sum(not x.looped for x in mine)}"] if any(not x.looped for x in mine) else []
        for times in sorted({x.times for x in mine if x.looped}):
            terms.append(f"{sum(x.looped and x.times == times for x in mine)} in a loop of {times}")
        moved = readable(sum(x.bytes * x.times for x in mine))
        lines.append(f"{kind}: {sum(x.times for x in mine)} ({' + '.join(terms)}), {moved}")
    return lines or ["no collectives"]


def verdict(config: ConfigDict, target: Target, results: Sequence[tuple[Phase, Measured]]) -> list[str]:
    """Which phase is the largest, and for each that does not fit what to change."""
    name, total = max(((phase.name, m.peak + phase.held) for phase, m in results), key=lambda pair: pair[1])
    if target.chip is None:
        return [f"The largest phase is {name}: {readable(total)} a device."]
    limit = target.chip.hbm * GIB
    lines = [f"The largest phase is {name}: {readable(total)} of {target.chip.hbm:g} GiB ({total / limit:.0%})."]
    over: dict[str, list[str]] = {}
    for phase, m in results:
        if m.refused or m.peak + phase.held > limit:
            over.setdefault(advice(config, phase, m, limit), []).append(phase.name)
    lines += [f"Too large: {', '.join(names)}: {what}." for what, names in over.items()]
    return lines if over else [*lines, f"Everything fits on {target.name}."]


def advice(config: ConfigDict, phase: Phase, m: Measured, limit: float) -> str:
    """What to change, from what takes most of the memory; `limit` in bytes."""
    mesh, opt = config.mesh, config.optimizer
    multiple = mesh.data * mesh.fsdp
    larger = mesh.fsdp  # if all of it is spread as the weights are
    while (m.peak + phase.held) * mesh.fsdp > limit * larger:
        larger *= 2
    slice_ = f"{larger // mesh.fsdp} times the chips with --config.mesh.fsdp={larger}"
    if m.arguments + phase.held >= m.temporaries + m.outputs:
        steps = ["--config.model.dtype=bfloat16"] if config.model.dtype == "float32" else []
        if config.model.quantize == "none":
            steps.append("--config.model.quantize=nf4")
        if mesh.data > 1:
            steps.append(f"--config.mesh.data=1 --config.mesh.fsdp={multiple}, which spreads the weights too")
        steps.append(slice_)
        return f"weights and state dominate ({readable(m.arguments + phase.held)}); try {' or '.join(steps)}"
    steps = []
    if phase.name in ("gradients", "log-probs"):
        if phase.name == "gradients" and config.model.remat != "full":
            steps.append("--config.model.remat=full")
        if phase.name == "gradients" and opt.micro_queries > multiple:
            smaller = [n for n in range(multiple, opt.micro_queries, multiple) if opt.batch_queries % n == 0]
            steps.append(f"--config.optimizer.micro_queries={smaller[-1]}")
        if phase.name == "log-probs":
            steps.append("a smaller --config.eval.diagnostic_queries (or optimizer.batch_queries with a reference)")
    elif config.sampling.width > multiple:
        steps.append(f"--config.sampling.width={max(multiple, config.sampling.width // 2 // multiple * multiple)}")
    steps += ["shorter --config.task.max_prompt_tokens and --config.sampling.max_new_tokens", slice_]
    return f"temporaries dominate; try {', then '.join(steps)}"
