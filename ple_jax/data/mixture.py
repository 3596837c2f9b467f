"""Several data sets as one, config.task.sets: how each is read, and how many of its queries an iteration draws."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from ple_jax.core.compact import compact
from ple_jax.core.errors import UserError
from ple_jax.core.types import Query
from ple_jax.data.queries import draw

SET = "set"  # what a reward reads of the record to be told the name of its set
T = TypeVar("T")


def sets(config: Any) -> dict[str, dict[str, Any]]:
    """Name -> its weight and the keys of config.task that are its own; nothing where there is one data set."""
    return config.task.sets.to_dict()


def source(config: Any, which: str) -> str:
    """Where the records are from, in words; `which` is train or heldout."""
    return ", ".join(sets(config)) or config.task[which]


def set_of(query_id: str) -> str:
    """The name of the set that a query is of: its id begins with it."""
    return query_id.partition("/")[0]


def by_set(config: Any, of: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    """Name -> what belongs to it, of pairs (query id, ...), in the order of the config; nothing where there is one set."""
    found: dict[str, list[T]] = {name: [] for name in sets(config)}
    for query_id, what in of if found else ():
        found[set_of(query_id)].append(what)
    return {name: some for name, some in found.items() if some}


def config_of(config: Any, name: str) -> Any:
    """The config as it is for one of the sets."""
    own = ConfigDict(config.to_dict())
    with own.ignore_type():
        for key, value in sets(config)[name].items():
            if key != "weight":
                own.task[key] = value
    own.task.sets = {}
    return FrozenConfigDict(own)


def format_of(task: Any, query_id: str) -> str:
    """How the record of a query was read."""
    return task.sets.get(set_of(query_id), {}).get("format", task.format) if task.sets else task.format


def counts(config: Any) -> dict[str, int]:
    """How many of an iteration's queries are of each set: by weight, and what is left over to the largest remainders.

    Raises:
        UserError: a set would never have one.
    """
    n, weights = config.queries_per_iteration, {name: of.get("weight", 1.0) for name, of in sets(config).items()}
    wanted = {name: n * weight / sum(weights.values()) for name, weight in weights.items()}
    found = {name: int(count) for name, count in wanted.items()}
    remainders = sorted(wanted, key=lambda name: found[name] - wanted[name])  # of equal ones the first
    for name in remainders[: n - sum(found.values())]:
        found[name] += 1
    if never := [name for name, count in found.items() if not count]:
        raise UserError(
            f"config.task.sets[{never[0]!r}] has a weight of {weights[never[0]]:g}, and an iteration of {n} queries none of"
            " its: raise that, or config.queries_per_iteration, or leave the set out"
        )
    return found


def draw_queries(config: Any, queries: Sequence[Query], iteration: int) -> list[Query]:
    """The queries of an iteration: as `queries.draw`, from each set by itself, and mixed.

    Raises:
        UserError: there are fewer, of all or of a set.
    """
    if not config.task.sets:
        return draw(queries, config.queries_per_iteration, seed=config.seed, iteration=iteration)
    queries = compact(queries)
    some, found = by_set(config, queries.places("id").items()), []
    for name, count in counts(config).items():
        if count > (size := len(some.get(name, ()))):
            raise UserError(
                f"an iteration draws {count} train queries of config.task.sets[{name!r}], and there are {size}: lower its"
                " weight or config.queries_per_iteration"
            )
        found += draw(some[name], count, seed=config.seed, iteration=iteration)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([config.seed, iteration, len(found)])))
    return [queries[found[i]] for i in rng.permutation(len(found)).tolist()]
