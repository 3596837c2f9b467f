"""A run's records: loaded as config.task says, checked, and cut to what the model takes."""

from typing import Any, NamedTuple

from ple_jax.core.types import Query
from ple_jax.data.left_out import Bad, QuerySet, check_share
from ple_jax.data.queries import disjoint, load_queries


class Data(NamedTuple):
    """What there is to train on and to evaluate with, and what was left out of each."""

    train: list[Query]
    heldout: list[Query]
    bad: dict[str, list[Bad]]  # by "train", "heldout" and "sft"


def load_data(config: Any, *, needs: str = "prompt", heldout_needs: str | None = None) -> Data:
    """The train and held-out records of a config.

    Args:
        needs: what a record must have to be of use: prompt, completion or pair.
        heldout_needs: what a held-out one must have; the same if it is not given.

    Raises:
        UserError: as `load_queries`; more bad records than config.task.max_bad_share; no train record is left.
    """
    task = config.task
    train = _read(config, task.train, task.train_split, task.max_train, needs)
    heldout = _read(config, task.heldout, task.heldout_split, task.max_heldout, heldout_needs or needs)
    queries, both = disjoint(train.queries, heldout.queries)
    return Data(queries, heldout.queries, {"train": train.bad + both, "heldout": heldout.bad})


def load_heldout(config: Any) -> QuerySet:
    """The held-out records of a config alone."""
    return _read(config, config.task.heldout, config.task.heldout_split, config.task.max_heldout, "prompt")


def load_warm_up(config: Any) -> QuerySet:
    """The records of the warm-up, config.warm_up.data, in the format of config.task."""
    return _read(config, config.warm_up.data, config.task.train_split, 0, "completion")


def _read(config: Any, source: str, split: str, limit: int, needs: str) -> QuerySet:
    task = config.task
    found = load_queries(
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
    check_share(found, source, task.max_bad_share)
    return found
