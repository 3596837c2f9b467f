"""The state of a run: a small immutable tuple that is passed through the loop, and its commits to disk."""

import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ple_jax.core import commits
from ple_jax.core.files import write_jsonl
from ple_jax.core.identity import FORMAT, other_format
from ple_jax.core.types import Backend
from ple_jax.training.costs import Costs
from ple_jax.training.run import Session
from ple_jax.training.sinks import line

CHECKPOINTS, WARM_UP, BEST = "checkpoints", "warm_up", commits.BEST  # folders of a work directory


class State(NamedTuple):
    """The progress of a run, apart from the weights. It is kept with them, in every checkpoint."""

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
    """Loads the newest checkpoint into the backend and returns its state; None if there is none.

    Raises:
        UserError: it is of another format.
    """
    meta = backend.restore(checkpoints)
    if meta is None:
        return None
    if (kind := meta.get("format")) != FORMAT:
        raise other_format(f"{checkpoints} holds a checkpoint", kind)
    kept = {name: value for name, value in meta.items() if name in State._fields}
    kept |= {name: tuple(meta.get(name, ())) for name in ("lines", "points")}
    return State(**(kept | {"costs": Costs(**meta["costs"])}))


def resume(backend: Backend, session: Session) -> State | None:
    """Loads the newest checkpoint of a run that was begun before, and cuts metrics.jsonl back to where it stands.

    Returns None if there is no checkpoint. Logs a warning if the environment has changed.
    """
    state = newest(backend, session.workdir / CHECKPOINTS)
    log = session.workdir / "metrics.jsonl"
    if state is None:
        log.unlink(missing_ok=True)
        return None
    if said := changed(state.environment, backend.environment()):
        session.progress.log(said)
    write_jsonl(log, state.lines, ascii=True)  # as the sink writes them
    return state


def commit(state: State, backend: Backend, session: Session) -> State:
    """Commits the state with the weights: from here on this is where the run stands. Returns the state as it was saved."""
    return _save(state, backend, session, CHECKPOINTS, state.iteration, keep=session.keep)


def commit_warm_up(state: State, backend: Backend, session: Session) -> State:
    """Commits an unfinished warm-up, in a folder of its own, which is needed until iteration 0 is committed."""
    return _save(state, backend, session, WARM_UP, state.warm_up, keep=1)


def commit_best(state: State, backend: Backend, session: Session, name: str, *, keep: int) -> State:
    """Commits the current weights as the best under a budget, in the folder `name` of `best/`, beside the run's newest.

    The newest `keep` of that folder stay.
    """
    return _save(state, backend, session, f"{BEST}/{name}", state.step, keep=keep)


def _save(state: State, backend: Backend, session: Session, folder: str, number: int, *, keep: int) -> State:
    state = state._replace(
        wall_seconds=state.wall_seconds + session.clock.lap(),
        peak_memory_bytes=max(state.peak_memory_bytes, peak_memory()),
    )
    meta = {"format": FORMAT, **state._asdict(), "costs": state.costs._asdict()}
    backend.save(session.workdir / folder, number, meta, keep=keep)
    return state


def logged(state: State, values: dict[str, float], session: Session) -> State:
    """Writes the metrics of the iteration that `state` stands at. Returns the state with their line, for checkpoints."""
    for sink in session.sinks:
        sink(values, state.iteration)
    session.progress.metrics(values)
    return state._replace(lines=(*state.lines, line(values, state.iteration)))


def spent(state: State, session: Session) -> dict[str, float]:
    """Returns the wall time in seconds and the peak memory in bytes of a run that ends here, for summary.json."""
    return {
        "wall_seconds": state.wall_seconds + session.clock.lap(),
        "peak_memory_bytes": max(state.peak_memory_bytes, peak_memory()),
    }


def peak_memory() -> int:
    """Returns the largest resident size of this process so far, in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Returns a warning if a run goes on in another environment than it began in; otherwise an empty text."""
    keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    changes = ", ".join(f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in keys)
    return f"warning: the run began in another environment ({changes}); results need not be bit-identical" if keys else ""
