"""The speed of earlier runs on this machine, by which a plan says how long a run will take.

A run that ends leaves its rates in the user's cache folder, under what they depend on most: backend, model, dtype, mesh,
processor, the number of its cores, and whether a server sampled. Only plans read them.
"""

import contextlib
import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from ple_jax.core import processor
from ple_jax.core.errors import UserError
from ple_jax.core.files import read_json, user_cache, write_json


class Rates(NamedTuple):
    """The speed of a run.

    The first iteration, which compiles, does not count for sampling and training if there are others.
    """

    generate: float  # tokens of responses a second, whatever their prompts cost
    train: float  # tokens of prompts and responses a second
    score: float  # responses a second
    evaluate: float  # held-out responses a second, sampled, scored and measured
    other: float  # seconds of nothing of this (loading, compiling, diagnosis), as a share of the seconds of all of it
    day: str  # YYYY-MM-DD
    device: str


def file() -> Path:
    """Returns the path of the file that keeps the rates."""
    return user_cache() / "rates.json"


def measured(
    lines: Sequence[Mapping[str, Any]], environment: Mapping[str, Any], summary: Mapping[str, Any], *, answers: int
) -> Rates | None:
    """Computes the rates of a run from its metrics; those of sampling, training and evaluating are medians.

    Args:
        lines: the lines of metrics.jsonl.
        environment: the environment of the backend.
        summary: the contents of summary.json.
        answers: the number of held-out responses of an evaluation.

    Returns:
        The rates, or None if no iteration sampled and trained in one process.
    """
    ran = [line for line in lines if line.get("generate_tokens_per_second") and line.get("train_tokens_per_second")]
    if not ran:
        return None
    kept = ran[1:] or ran
    scoring = sum(line.get("seconds_score", 0.0) for line in lines)
    generate, train = (
        statistics.median(line[f"{name}_tokens_per_second"] for line in kept) for name in ("generate", "train")
    )
    cores = environment.get("cores", "?")
    device = f"{environment.get('device', '')}, {cores} core{'' if cores == 1 else 's'}"
    score = ran[-1]["total_reward_calls"] / max(scoring, 1e-6)
    # of an iteration that sampled in several processes there is no rate, and it may be the only one that was evaluated
    evaluations = [[line["seconds_evaluate"] for line in of if "seconds_evaluate" in line] for of in (kept, lines)]
    if not (spent := next(filter(None, evaluations), None)):
        return None
    evaluating = statistics.median(spent)
    of_phases = max(math.fsum(summary["seconds"].values()), 1e-6)
    other = max(summary["wall_seconds"] / of_phases - 1, 0.0)
    return Rates(generate, train, score, answers / max(evaluating, 1e-6), other, date.today().isoformat(), device)


def keep(config: Any, backend: str, found: Rates | None) -> None:
    """Adds the rates that were measured to those in the file, if there are any and the folder can be written."""
    if found is None:
        return
    with contextlib.suppress(OSError):
        file().parent.mkdir(parents=True, exist_ok=True)
        write_json(file(), {**_all(), _key(config, backend): found._asdict()})


def read(config: Any, backend: str) -> Rates | None:
    """Reads the rates of the newest run like this one; None if there was none."""
    found = _all().get(_key(config, backend))
    try:
        return Rates(**found) if found else None
    except TypeError:  # of another version
        return None


def _all() -> dict[str, Any]:
    with contextlib.suppress(UserError, OSError):  # what is damaged is measured again
        return read_json(file()) or {}
    return {}


def _key(config: Any, backend: str) -> str:
    model, mesh = config.model, "x".join(str(n) for n in config.mesh.values())
    served = "" if config.sampling.server is None else " served"  # a server's devices sample, not these
    return f"{backend} {model.path} {model.dtype} {model.quantize} {mesh} {processor.digest()} {processor.cores()}{served}"


def expected(rates: Rates | None, *, sampled: int, trained: int, scored: int, evaluated: int) -> str:
    """Returns a line of a plan: how long a run takes at most, and by whose rates.

    Args:
        sampled, trained: most tokens that are sampled to train on, and that are trained on.
        scored: most responses that are scored in training.
        evaluated: most held-out responses that are evaluated.
    """
    if rates is None:
        return "not known: no run of this model, dtype and backend has ended on as many cores of this machine yet"
    parts = {
        "sampling": sampled / rates.generate,
        "scoring": scored / rates.score,
        "training": trained / rates.train,
        "evaluating": evaluated / rates.evaluate,
    }
    parts["all else"] = rates.other * sum(parts.values())
    said = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
    return (
        f"at most {duration(sum(parts.values()))} ({said}), by {rates.generate:,.0f} tokens sampled and {rates.train:,.0f}"
        f" trained on a second ({rates.device}, {rates.day})"
    )


def duration(seconds: float) -> str:
    """Formats seconds in the unit that suits them: 40 s, 12 min, 3.5 h, 2.1 days."""
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}" if size > 60 else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
