"""Where a run stands, and its commits."""

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ple_jax.core.files import read_jsonl
from ple_jax.training import costs
from ple_jax.training.run import Run


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
    return {line["iteration"] for line in read_jsonl(path)}


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    changes = ", ".join(f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in keys)
    return f"warning: the run began in another environment ({changes}); results need not be bit-identical"
