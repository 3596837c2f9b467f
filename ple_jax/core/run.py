"""What a run is made of, and what every loop does with it: where it stands, its commits, its steps."""

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ple_jax.core import costs, tasks
from ple_jax.core.config import UserError
from ple_jax.core.interrupt import Stop
from ple_jax.core.principles import Principles
from ple_jax.core.progress import Progress
from ple_jax.core.rewards._cache import Cache
from ple_jax.core.types import Backend, Batch, Loss, Query, Reward, Sink, Tokenizer

_START = time.time()


class Run(NamedTuple):
    """Everything a run needs, made once by the entry."""

    config: Any
    workdir: Path
    backend: Backend
    tokenizer: Tokenizer
    eos: tuple[int, ...]
    base_model: str
    context: int  # tokens that the model was trained to see at once
    transposed: bool  # its linear weights are [in, out], which PEFT wants to know
    parameters: int  # of the base, that a token is multiplied with
    algorithm: ModuleType
    loss: Loss
    reward: Reward
    cache: Cache
    principles: Principles
    train: list[Query]
    heldout: list[Query]
    bad: dict[str, list[tasks.Bad]]  # records left out, by which set
    sinks: list[Sink]
    progress: Progress
    stop: Stop
    clock: "Clock"


class Clock:
    """Wall time in laps, so that a resumed run adds up what every process spent until its last commit."""

    def __init__(self) -> None:
        self._last = _START

    def lap(self) -> float:
        """Seconds since the last lap; the first one counts from the start of the process."""
        now = time.time()
        elapsed, self._last = now - self._last, now
        return elapsed


# ---------------------------------------------------------------- where it stands


def restore(run: Run, *, fresh: Callable[[Run, dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Where the run stands: the newest checkpoint, or a first one, before which `fresh` is called."""
    state = run.backend.restore(run.workdir / "checkpoints")
    if state is None:
        state = {
            "iteration": 0,
            "step": 0,
            **costs.fresh(),
            "wall_seconds": 0.0,
            "metrics": {},
        }
        state["environment"] = run.backend.environment()
        if fresh is not None:
            fresh(run, state)
        commit(run, state)
    elif state["environment"] != run.backend.environment():
        run.progress.log(_changed(state["environment"], run.backend.environment()))
    return state


def commit(run: Run, state: dict[str, Any]) -> None:
    """The commit point: from here on this state is where the run stands."""
    state["wall_seconds"] += run.clock.lap()
    state["peak_memory_bytes"] = max(state.get("peak_memory_bytes", 0), peak_memory())
    keep = run.config.checkpoint.keep
    run.backend.save(run.workdir / "checkpoints", state["iteration"], state, keep=keep)


def logged(path: Path) -> set[int]:
    """Iterations that metrics.jsonl already holds."""
    if not path.exists():
        return set()
    return {json.loads(line)["iteration"] for line in path.read_bytes().splitlines()}


# ---------------------------------------------------------------- steps


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """The rows of a batch in parts of `size`; the backend accumulates gradients over them."""

    def part(i: int) -> Batch:
        rows = slice(i, i + size)
        data = {name: value[rows] for name, value in batch.data.items()}
        return Batch(batch.prompt[rows], batch.prompt_mask[rows], batch.response[rows], batch.response_mask[rows], data)

    return [part(i) for i in range(0, len(batch.prompt), size)]


def prepared(run: Run, batch: Batch, last: Mapping[str, float]) -> Batch:
    """The batch with what the algorithm's loss compares with, of the policy as it is now.

    `reference_logprobs` where it `needs_reference`, `old_logprobs` where it `needs_old_logprobs` (optional), beside them
    `old_values` where it trains a head of values, and what its `prepare` (optional) makes of them: a batch, the config and
    the metrics of the iteration before (`last`, {} in the first) give a batch.
    """
    algorithm, config = run.algorithm, run.config
    if algorithm.needs_reference(config):
        batch.data["reference_logprobs"] = run.backend.logprobs(batch, reference=True).logprobs
    if hasattr(algorithm, "needs_old_logprobs") and algorithm.needs_old_logprobs(config):
        old = run.backend.logprobs(batch)
        batch.data["old_logprobs"] = old.logprobs
        if old.values is not None:
            batch.data["old_values"] = old.values
    return algorithm.prepare(batch, config, last) if hasattr(algorithm, "prepare") else batch


def check_finite(values: dict[str, float], step: int, lr: float) -> dict[str, float]:
    """Raises a UserError where a step's loss or gradient is not finite: before anything of it is committed."""
    if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
        raise UserError(
            f"optimiser step {step} at learning rate {lr:g} gave loss {values['loss']} and gradient norm"
            f" {values['grad_norm']}; the newest checkpoint is from before it: lower --config.optimizer.lr (in a new"
            " --workdir)"
        )
    return values


# ---------------------------------------------------------------- the machine


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    changes = ", ".join(f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in keys)
    return f"warning: the run began in another environment ({changes}); results need not be bit-identical"
