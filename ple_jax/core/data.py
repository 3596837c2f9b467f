"""A run's records: loaded as config.task says, checked, and cut to what the model takes."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ple_jax.core import tasks
from ple_jax.core.types import Query

FILE = "bad_records.jsonl"  # in the work directory: what was left out, and why


class Data(NamedTuple):
    """What there is to train on and to evaluate with, and what was left out of each."""

    train: list[Query]
    heldout: list[Query]
    bad: dict[str, list[tasks.Bad]]  # by "train", "heldout" and "sft"


def load(config: Any, *, needs: str = "prompt", heldout_needs: str | None = None) -> Data:
    """The train and held-out records of a config.

    Args:
        needs: what a record must have to be of use: prompt, completion or pair.
        heldout_needs: what a held-out one must have; the same if it is not given.

    Raises:
        UserError: as `tasks.load`; more bad records than config.task.max_bad_share; no train record is left.
    """
    task = config.task
    train = _read(config, task.train, task.train_split, task.max_train, needs)
    heldout = _read(config, task.heldout, task.heldout_split, task.max_heldout, heldout_needs or needs)
    queries, both = tasks.disjoint(train.queries, heldout.queries)
    return Data(queries, heldout.queries, {"train": train.bad + both, "heldout": heldout.bad})


def load_heldout(config: Any) -> tasks.Task:
    """The held-out records of a config alone."""
    return _read(config, config.task.heldout, config.task.heldout_split, config.task.max_heldout, "prompt")


def load_sft(config: Any) -> tasks.Task:
    """The records of the warm-up, config.sft.data, in the format of config.task."""
    return _read(config, config.sft.data, config.task.train_split, 0, "completion")


def _read(config: Any, source: str, split: str, limit: int, needs: str) -> tasks.Task:
    task = config.task
    found = tasks.load(
        source,
        split=split,
        subsets=tuple(task.subsets),
        format=task.format,
        columns=dict(task.columns),
        words=tuple(task.words),
        streaming=task.streaming,
        limit=limit,
        seed=config.seed,
        needs=needs,
    )
    tasks.check_share(found, source, task.max_bad_share)
    return found


def fit(queries: Sequence[Query], judge: Callable[[Query], Any], *, kind: str) -> tuple[list[Any], list[tasks.Bad]]:
    """What `judge` makes of every query, and those of which it gives a reason against them instead, a text."""
    good, bad = [], []
    for query in queries:
        found = judge(query)
        if type(found) is str:
            bad.append(tasks.Bad(query.id, kind, f"query {query.id!r} {found}", query.prompt[:300]))
        else:
            good.append(found)
    return good, bad


def note(bad: dict[str, list[tasks.Bad]], workdir: Path) -> str:
    """Writes what was left out to the work directory; a line that says how much it is, or nothing."""
    tasks.write_bad(workdir / FILE, bad)
    listed = counts(bad)
    return f"records left out: {listed}; listed in {workdir / FILE}" if listed else ""


def counts(bad: dict[str, list[tasks.Bad]]) -> str:
    """How many were left out, by kind; nothing if none was."""
    found = Counter(f"{record.kind} ({which})" for which, records in bad.items() for record in records)
    return ", ".join(f"{n} {kind}" for kind, n in found.items())
