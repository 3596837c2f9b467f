"""Where a run stands: a small frozen tuple, threaded through the loop, and its commits to disk."""

import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ple_jax.core.files import read_jsonl, write_jsonl
from ple_jax.core.identity import FORMAT
from ple_jax.core.types import Backend
from ple_jax.training.costs import Costs
from ple_jax.training.run import Session
from ple_jax.training.sinks import line

CHECKPOINTS, WARM_UP, BEST = "checkpoints", "warm_up", "best"  # folders of a work directory


class State(NamedTuple):
    """Where a run stands, beside the weights; it is kept with them, in every checkpoint."""

    environment: Mapping[str, Any] = {}  # versions, devices and flags, of the process that began the run
    iteration: int = 0  # finished ones; of an algorithm that samples nothing, optimiser steps
    step: int = 0  # optimiser steps taken, those of the warm-up apart
    warm_up: int = 0  # optimiser steps of the warm-up taken
    costs: Costs = Costs()
    controller: Mapping[str, float] = {}  # what the algorithm carries from one iteration to the next
    mean_length: float = 0.0  # tokens of a response, over what the newest sample would be trained on; 0 before there is one
    metrics: Mapping[str, float] = {}  # of the newest iteration, for the line that is written after its evaluation
    lines: tuple[Mapping[str, Any], ...] = ()  # of metrics.jsonl, of the iterations before it
    points: tuple[Mapping[str, Any], ...] = ()  # the evaluations so far, as `training.points` has them
    examples: Mapping[str, int] = {}  # of an algorithm that samples nothing: how many there are of each set
    wall_seconds: float = 0.0
    peak_memory_bytes: int = 0


def newest(backend: Backend, checkpoints: Path) -> State | None:
    """The state of the newest checkpoint, which the backend takes up; None if there is none."""
    meta = backend.restore(checkpoints)
    if meta is None:
        return None
    kept = {name: value for name, value in meta.items() if name in State._fields} 
    kept |= {name: tuple(meta.get(name, ())) for name in ("lines", "points")}
    # of format 1 the counters stand beside the others
    costs = meta.get("costs", {name: value for name, value in meta.items() if name in Costs._fields})
    return State(**(kept | {"costs": Costs(**costs)}))


def resume(backend: Backend, session: Session) -> State | None:
    """Where a run stands that was begun before, its newest checkpoint; metrics.jsonl is made to stand there too."""
    state = newest(backend, session.workdir / CHECKPOINTS)
    log = session.workdir / "metrics.jsonl"
    if state is None:
        log.unlink(missing_ok=True)
        return None
    if said := changed(state.environment, backend.environment()):
        session.progress.log(said)
    state = state._replace(lines=before(state, log))
    write_jsonl(log, state.lines, ascii=True)  # as the sink writes them
    return state


def before(state: State, log: Path) -> tuple[Mapping[str, Any], ...]:
    """The lines of metrics.jsonl up to the iteration that `state` stands at, whose own is written when it is evaluated.

    The checkpoint has them; one of an earlier version has not, and what the file says stands.
    """
    if state.lines or not log.exists():
        return state.lines
    return tuple(line for line in read_jsonl(log, torn=True) if line["iteration"] < state.iteration)


def commit(state: State, backend: Backend, session: Session) -> State:
    """The commit point: from here on this state is where the run stands."""
    return _save(state, backend, session, CHECKPOINTS, state.iteration, keep=session.keep)


def commit_warm_up(state: State, backend: Backend, session: Session) -> State:
    """The commit point of an unfinished warm-up, which has a folder of its own until iteration 0 is committed."""
    return _save(state, backend, session, WARM_UP, state.warm_up, keep=1)


def commit_best(state: State, backend: Backend, session: Session, name: str) -> State:
    """Keeps the weights as they are beside the run's newest: the best under a budget, which has a folder of its own."""
    return _save(state, backend, session, f"{BEST}/{name}", state.step, keep=1)


def _save(state: State, backend: Backend, session: Session, folder: str, number: int, *, keep: int) -> State:
    state = state._replace(
        wall_seconds=state.wall_seconds + session.clock.lap(),
        peak_memory_bytes=max(state.peak_memory_bytes, peak_memory()),
    )
    meta = {"format": FORMAT, **state._asdict(), "costs": state.costs._asdict()}
    backend.save(session.workdir / folder, number, meta, keep=keep)
    return state


def logged(state: State, values: dict[str, float], session: Session) -> State:
    """Writes the metrics of the iteration that `state` stands at; the state with their line, which checkpoints keep."""
    for sink in session.sinks:
        sink(values, state.iteration)
    session.progress.metrics(values)
    return state._replace(lines=(*state.lines, line(values, state.iteration)))


def spent(state: State, session: Session) -> dict[str, float]:
    """Seconds and bytes of a run that ends here, for summary.json."""
    return {
        "wall_seconds": state.wall_seconds + session.clock.lap(),
        "peak_memory_bytes": max(state.peak_memory_bytes, peak_memory()),
    }


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """A warning where a run goes on in another environment; nothing in the same one."""
    keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    changes = ", ".join(f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in keys)
    return f"warning: the run began in another environment ({changes}); results need not be bit-identical" if keys else ""
