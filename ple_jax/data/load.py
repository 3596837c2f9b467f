"""The records of a run: loaded and checked as config.task says."""

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from ple_jax.core.compact import Compact
from ple_jax.core.errors import UserError
from ple_jax.core.types import Query
from ple_jax.data import mixture
from ple_jax.data.left_out import Bad, QuerySet, check_share
from ple_jax.data.queries import disjoint, load_queries, some
from ple_jax.data.records import on_hub


class Data(NamedTuple):
    """The records to train on and to evaluate with, and those that were left out of each."""

    train: Compact[Query]
    heldout: Compact[Query]
    bad: dict[str, list[Bad]]  # by "train" and "heldout"


def load_data(
    config: Any,
    *,
    needs: str = "prompt",
    heldout_needs: str | None = None,
    reads: Sequence[str] = (),
    heldout_reads: Sequence[str] = (),
) -> Data:
    """Loads the train and held-out records of a config. Train queries that are also held out are left out.

    Args:
        needs: what a record must have to be used: prompt, completion or pair.
        heldout_needs: the same for held-out records; if it is not given, it equals `needs`.
        reads: the names of what the rewards read from every record.
        heldout_reads: of what is read from every held-out record besides; in a train record it may be lacking, and is None
            then.

    Raises:
        UserError: as `load_queries`; there are more bad records than config.task.max_bad_share; no train record is left.
    """
    every = tuple(dict.fromkeys((*reads, *heldout_reads)))
    train = _train(config, needs, every, {*every} - {*reads})
    heldout = load_heldout(config, needs=heldout_needs or needs, reads=every)
    queries, both = disjoint(train.queries, heldout.queries)
    return Data(queries, heldout.queries, {"train": train.bad + both, "heldout": heldout.bad})


def _train(config: Any, needs: str, reads: Sequence[str], optional: Collection[str] = ()) -> QuerySet:
    if config.task.sets:
        return _mixed(config, lambda own, reads: _train(own, needs, reads, reads), reads, optional)
    task = config.task
    return _read(config, task.train, task.train_split, task.max_train, needs, reads, optional)


def load_heldout(
    config: Any, *, needs: str = "prompt", reads: Sequence[str] = (), optional: Collection[str] = ()
) -> QuerySet:
    """Loads only the held-out records of a config.

    The arguments are those of `load_data`, and `optional` that of `load_queries`.
    """
    if config.task.sets:
        return _mixed(config, lambda own, reads: load_heldout(own, needs=needs, reads=reads, optional=reads), reads)
    task = config.task
    return _read(config, task.heldout, task.heldout_split, task.max_heldout, needs, reads, optional)


def _mixed(
    config: Any, load: Callable[[Any, Sequence[str]], QuerySet], reads: Sequence[str], optional: Collection[str] = ()
) -> QuerySet:
    """Loads all sets of config.task.sets and takes one query of each in turn.

    A reward that reads `set` gets the name of the set, and None for a column that a set does not have.

    Raises:
        UserError: no set has a column that a reward reads and that is not optional; or as `load`.
    """
    each: list[Compact[Query]] = []
    bad: list[Bad] = []
    columns = [name for name in reads if name != mixture.SET]
    for name in mixture.sets(config):
        found, told = load(mixture.config_of(config, name), columns), {mixture.SET: name} if mixture.SET in reads else {}
        each.append(Compact(q._replace(id=f"{name}/{q.id}", record={**q.record, **told}) for q in found.queries))
        bad += found.bad
    queries = Compact(query for row in itertools.zip_longest(*each) for query in row if query is not None)
    needed = [name for name in columns if name not in optional]
    if lacking := [name for name in needed if all(query.record[name] is None for query in queries)]:
        raise UserError(
            f"no record of config.task.sets has a `{lacking[0]}`, and the reward reads it: give it in config.reward.kwargs,"
            " give the argument a default, or rename a column"
        )
    return QuerySet(queries, bad)


def load_warm_up(config: Any) -> QuerySet:
    """Loads the records of the warm-up (config.warm_up.data), in the format of config.task."""
    return _read(config, config.warm_up.data, config.task.train_split, 0, "completion")


def _read(
    config: Any,
    source: str,
    split: str,
    limit: int,
    needs: str,
    reads: Sequence[str] = (),
    optional: Collection[str] = (),
) -> QuerySet:
    task = config.task
    streaming = task.streaming and on_hub(source)  # of what is here, N are drawn from all
    found = load_queries(
        source,
        split=split,
        subsets=tuple(task.subsets),
        format=task.format,
        columns=dict(task.columns),
        words=tuple(task.words),
        streaming=streaming,
        limit=limit if streaming else 0,
        seed=config.seed,
        needs=needs,
        reads=reads,
        optional=optional,
    )
    check_share(found, source, task.max_bad_share)  # of all that was read, of which some are drawn
    return found._replace(queries=some(found.queries, limit, config.seed))
