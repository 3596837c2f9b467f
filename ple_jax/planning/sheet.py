"""The sheet of a plan for devices that are not there: what every phase needs of one, whether it fits, what to change.

JAX's and torch's `topology.py` both fill it in. Each counts in its own way; this file lays the numbers out and judges them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ple_jax.planning.outline import Lengths
from ple_jax.reports.formats import readable_bytes

GIB = 2**30
Write = Callable[[str], None]  # takes a line


class Target(NamedTuple):
    """The devices that a plan is for. They need not be there."""

    name: str
    devices: int
    memory: float | None  # GiB of each; None: not ours to know
    full: float = 1.0  # share of it that may be filled; the rest is left to what is not counted
    spreads_quantized: bool = True  # whether a quantised base can be spread over them

    @property
    def limit(self) -> float:
        """The bytes of a device that may be filled; infinite if its memory is not known."""
        return math.inf if self.memory is None else self.full * self.memory * GIB


class Row(NamedTuple):
    """A line of the sheet: what a phase needs of one device, in bytes."""

    name: str
    about: str  # its shapes
    cells: Mapping[str, int]  # how it is counted, by column
    stays: int  # weights and state: there before, during and after it
    passing: int  # what it makes for a while
    total: int  # the most there is at one time
    seconds: float  # that counting took
    flops: float | None = None  # of all devices together
    refused: bool = False  # by the compiler
    lines: Sequence[str] = ()  # what else there is to say


def head(
    config: ConfigDict,
    target: Target,
    *,
    parameters: int,
    sizes: Lengths,
    tokenizer: Any,
    notes: Iterable[str],
    write: Write,
) -> None:
    """Writes what the plan is about: model, devices, how it is made, and what a user should know."""
    mesh = " x ".join(f"{axis} {config.mesh[axis]}" for axis in ("data", "fsdp", "tensor"))
    memory = f", {target.memory:g} GiB each" if target.memory else ""
    write(f"{config.model.path}: {parameters:,} parameters, {config.model.dtype}, remat {config.model.remat}")
    write(f"{target.name}: {target.devices} devices, {mesh}{memory}")
    for note in notes:
        write(note)
    if tokenizer is None:
        write(f"no tokenizer: every prompt counts as {sizes.sampled} tokens (task.max_prompt_tokens), principles included")


def body(config: ConfigDict, target: Target, title: str, rows: Iterable[Row], write: Write) -> None:
    """Writes a line for every phase as it comes, then what each phase is and what there is to note, then the verdict."""
    write(f"\n{title}")
    done: list[Row] = []
    for row in rows:
        if not done:
            write(_columns(row))
        done.append(row)
        write(_line(row, target))
    write("")
    for row in done:
        write(f"{row.name}: {row.about}")
        for line in row.lines:
            write(f"    {line}")
    write("")
    for line in verdict(config, target, done):
        write(line)


def _columns(row: Row) -> str:
    names = "".join(f"{name:>10}" for name in (*row.cells, "total"))
    flops = "" if row.flops is None else f"{'FLOPs':>10}"
    return f"{'':<12}{names}{'of memory':>11}{flops}{'counted in':>12}"


def _line(row: Row, target: Target) -> str:
    cells = "".join(f"{readable_bytes(n):>10}" for n in (*row.cells.values(), row.total))
    share = f"{row.total / (target.memory * GIB):.0%}" if target.memory else ""
    flops = "" if row.flops is None else f"{row.flops:>10.2e}"
    refused = "  the compiler refuses" if row.refused else ""
    return f"{row.name:<12}{cells}{share:>11}{flops}{row.seconds:>10.1f} s{refused}"


def verdict(config: ConfigDict, target: Target, rows: Sequence[Row]) -> list[str]:
    """Says which phase is the largest and, for each one that does not fit, what to change."""
    largest = max(rows, key=lambda row: row.total)
    if target.memory is None:
        return [f"The largest phase is {largest.name}: {readable_bytes(largest.total)} a device."]
    share = f"{largest.total / (target.memory * GIB):.0%}"
    lines = [f"The largest phase is {largest.name}: {readable_bytes(largest.total)} of {target.memory:g} GiB ({share})."]
    over: dict[str, list[str]] = {}
    for row in rows:
        if row.refused or row.total > target.limit:
            over.setdefault(advice(config, target, row), []).append(row.name)
    room = f" ({target.full:.0%} may be filled)" if target.full < 1 else ""
    lines += [f"Too large{room}: {', '.join(names)}: {what}." for what, names in over.items()]
    return lines if over else [*lines, f"Everything fits on {target.name}."]


def advice(config: ConfigDict, target: Target, row: Row) -> str:
    """Says what to change for a phase that does not fit, depending on what takes most of its memory."""
    mesh = config.mesh
    larger = mesh.fsdp  # if all of it is spread as the weights are
    while row.total * mesh.fsdp > target.limit * larger:
        larger *= 2
    spreads = target.spreads_quantized or config.model.quantize == "none"
    more = f"{larger // mesh.fsdp} times the devices with --config.mesh.fsdp={larger}"
    if not spreads:
        more = "--config.model.quantize=none with --config.mesh.fsdp, as this backend keeps a quantised base whole"
    if row.stays >= row.passing:
        steps = ["--config.model.dtype=bfloat16"] if config.model.dtype == "float32" else []
        if config.model.quantize == "none" and (target.spreads_quantized or mesh.fsdp == 1):
            steps.append("--config.model.quantize=nf4")
        if mesh.data > 1 and spreads:
            steps.append(f"--config.mesh.data=1 --config.mesh.fsdp={mesh.data * mesh.fsdp}, which spreads the weights too")
        return f"weights and state dominate ({readable_bytes(row.stays)}); try {' or '.join([*steps, more])}"
    steps = [*_smaller(config, row.name), "shorter --config.task.max_prompt_tokens and --config.sampling.max_new_tokens"]
    return f"what the phase makes dominates ({readable_bytes(row.passing)}); try {', then '.join([*steps, more])}"


def _smaller(config: ConfigDict, phase: str) -> list[str]:
    """Returns settings that reduce the memory of what a phase makes."""
    opt, multiple = config.optimizer, config.mesh.data * config.mesh.fsdp
    if phase == "log-probs":
        return ["a smaller --config.eval.diagnostic_queries (or optimizer.batch_queries with a reference)"]
    if phase == "gradients":
        steps = ["--config.model.remat=full"] if config.model.remat != "full" else []
        if smaller := [n for n in range(multiple, opt.micro_queries, multiple) if opt.batch_queries % n == 0]:
            steps.append(f"--config.optimizer.micro_queries={smaller[-1]}")
        return steps
    if config.sampling.width > multiple:
        return [f"--config.sampling.width={max(multiple, config.sampling.width // 2 // multiple * multiple)}"]
    return []
