"""Fits `config.sampling.width` and `config.optimizer.micro_queries` of "auto" to the memory of a device, once.

Neither of them changes a formula. A larger pass of training takes more memory, and so do more rows decoded at once; what
they take is counted as `--mode=plan --topology` counts it, before any weight is read.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import FrozenConfigDict

from ple_jax.algorithms import Algorithm
from ple_jax.core import backends
from ple_jax.core.backends import Needs
from ple_jax.core.batches import round_up
from ple_jax.core.config import AUTO, FEW, flatten
from ple_jax.core.errors import UserError
from ple_jax.planning.outline import lengths_of, read_source, with_numbers
from ple_jax.reports.formats import readable_bytes
from ple_jax.training.opening import Inputs

_WIDTH, _MICRO = AUTO
_ROW = 8  # widths are multiples of so many rows


def fitted(inputs: Inputs, backend: str, topology: str | None = None) -> Inputs:
    """Returns the inputs with numbers in the place of "auto", and prints the numbers. Without "auto" they stay as they are.

    Args:
        topology: devices to fit to, which need not be there; those of this machine by default.

    Raises:
        UserError: if nothing fits, or the memory that the algorithm or the trainer needs is not counted.
    """
    config, algorithm = inputs.config, inputs.algorithm
    flat = flatten(config.to_dict())
    asked = [key for key in AUTO if flat[key] == "auto"]
    if not asked:
        return inputs
    if not isinstance(algorithm, Algorithm) or config.trainer == "trl":
        who = "config.trainer='trl'" if config.trainer == "trl" else f"algorithm {config.algorithm!r}"
        raise UserError(f"config.{asked[0]} is 'auto', and what {who} needs of memory is not counted: give a number")
    source = read_source(config.model.path, config.model.revision)
    sizes = lengths_of(config, source, algorithm, inputs.data.train, inputs.data.heldout, inputs.principles.text)
    module = backends.load_topology(backend)
    needs = module.needs(config, topology, algorithm=algorithm, source=source, sizes=sizes)
    found = {key: _NUMBER[key](config, algorithm, len(inputs.data.heldout), needs) for key in asked}
    print("fitted to memory:", ", ".join(f"config.{key} = {value}" for key, value in found.items()), flush=True)
    return inputs._replace(config=FrozenConfigDict(with_numbers(config, found)))


def width(config: Any, algorithm: Algorithm, heldout: int, needs: Needs) -> int:
    """Chooses how many rows are decoded at once: of the widths that fit, the one with which the run's samples cost least."""
    times, room = _groups(config, algorithm, heldout), needs.memory
    if config.sampling.server is not None:  # they are requests to a memory that is not ours
        room = None
    fits = _fitting(_WIDTH, _widths(times, config.mesh.data * config.mesh.fsdp), needs.sampling, room)
    return min(fits, key=lambda rows: _cost(times, rows, needs.reading))


def micro_queries(config: Any, algorithm: Algorithm, heldout: int, needs: Needs) -> int:
    """Chooses the number of queries of a training pass: the largest equal share of an optimiser batch that fits."""
    rows, batch = config.mesh.data * config.mesh.fsdp, config.optimizer.batch_queries
    sizes = [size for size in range(rows, batch + 1, rows) if batch % size == 0]
    return _fitting(_MICRO, sizes, needs.training, needs.memory)[-1]


_NUMBER = {_WIDTH: width, _MICRO: micro_queries}


def _groups(config: Any, algorithm: Algorithm, heldout: int) -> dict[int, int]:
    """Counts how often a run samples groups of responses, by the number of responses in a group."""
    slots = [slot for slot in algorithm.collect(config) if slot.source == "policy"]
    evaluations = math.ceil(config.iterations / config.eval.every)
    # before training what the principled prompt gives is evaluated too
    counts = (len(slots) * config.queries_per_iteration, config.iterations), (2 * heldout * config.eval.samples, 1)
    times: Counter[int] = Counter()
    for rows, often in (*counts, (heldout * config.eval.samples, evaluations)):
        times[rows] += often * (rows > 0)
    return dict(+times)


def _widths(groups: Mapping[int, int], multiple: int) -> list[int]:
    """Returns widths that leave few rows idle at the end: those that decode some group in 1, 2, 3 ... turns."""
    step = math.lcm(_ROW, multiple)
    found = {round_up(-(-rows // times), step) for rows in groups for times in range(1, rows + 1)}
    return sorted(width for width in found if width < FEW)


def _cost(times: Mapping[int, int], width: int, reading: int) -> int:
    """Computes the cost of all decoding, in rows: every step reads the weights, and computes all rows, idle ones too."""
    return sum(often * -(-rows // width) * (reading + width) for rows, often in times.items())


def _fitting(key: str, sizes: Sequence[int], need: Callable[[int], int], room: int | None) -> Sequence[int]:
    """Returns those of the ascending sizes that fit into `room` bytes.

    What is needed grows with the size, so only a few sizes are counted.

    Raises:
        UserError: if not even the smallest one fits.
    """
    if room is None or len(sizes) == 1 or need(sizes[-1]) <= room:
        return sizes
    fit, over = 0, len(sizes) - 1
    if (least := need(sizes[0])) > room:
        raise UserError(
            f"config.{key} is 'auto', and {sizes[0]}, the least, needs {readable_bytes(least)} of a device, of which"
            f" {readable_bytes(room)} can be filled: --mode=plan --topology says of what; or give a number"
        )
    while over - fit > 1:
        middle = (fit + over) // 2
        fit, over = (middle, over) if need(sizes[middle]) <= room else (fit, middle)
    return sizes[: fit + 1]
