"""Several data sets used as one (config.task.sets): how each is read, and how many of its queries an iteration draws."""

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
    """Returns, by the name of every set, its weight and its own keys of config.task.

    The dictionary is empty if there is only one data set.
    """
    return config.task.sets.to_dict()


def source(config: Any, which: str) -> str:
    """Says where the records are from; `which` is train or heldout."""
    return ", ".join(sets(config)) or config.task[which]


def set_of(query_id: str) -> str:
    """Returns the name of the set that a query belongs to, with which its id begins."""
    return query_id.partition("/")[0]


def by_set(config: Any, of: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    """Groups pairs (query id, value) by set: returns the values by the name of their set, in the order of the config.

    Sets without values are left out. The dictionary is empty if there is only one data set.
    """
    found: dict[str, list[T]] = {name: [] for name in sets(config)}
    for query_id, what in of if found else ():
        found[set_of(query_id)].append(what)
    return {name: some for name, some in found.items() if some}


def config_of(config: Any, name: str) -> Any:
    """Returns the config as it is for one of the sets alone."""
    own = ConfigDict(config.to_dict())
    with own.ignore_type():
        for key, value in sets(config)[name].items():
            if key != "weight":
                own.task[key] = value
    own.task.sets = {}
    return FrozenConfigDict(own)


def format_of(task: Any, query_id: str) -> str:
    """Returns the format in which the record of a query was read."""
    return task.sets.get(set_of(query_id), {}).get("format", task.format) if task.sets else task.format


def counts(config: Any) -> dict[str, int]:
    """Returns how many of an iteration's queries are drawn from each set.

    They are shared by weight, and what is left over goes to the sets with the largest remainders.

    Raises:
        UserError: a set would get no query.
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
    """Draws the queries of an iteration: as `queries.draw` does, from each set separately, and then shuffled.

    Raises:
        UserError: there are fewer queries than the iteration draws, in all or in one set.
    """
    if not config.task.sets:
        batch = config.optimizer.batch_queries
        if (fit := len(queries) // batch * batch) and config.queries_per_iteration > len(queries):
            raise UserError(
                f"config.queries_per_iteration is {config.queries_per_iteration} but there are {len(queries)} train queries;"
                f" use at most {fit}, the largest multiple of config.optimizer.batch_queries={batch} among them"
            )
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
