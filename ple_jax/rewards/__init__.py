"""Rewards: (prompts, responses) -> one float per response. A reward may also read fields of the record, by name.

A reward is a module here, whose `make(**kwargs)` checks its options and returns a `Reward` (core/types.py), or a function
of the user's own. `load` makes a reward by its name. `score` calls it on the responses that the cache has no value for,
checks the values and stores them. `transform` turns values into the scores that selection and weights use.

Stored values are keyed by a reward's name and version. The version of a module here covers all that its values depend on:
its VERSION, which changes with every change of the code that changes a value; its options; and the versions or digests of
the packages, weights and files that it reads. The version of a user's function is a digest of its source and its options.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from ple_jax.core import plugins
from ple_jax.core.answers import AGAIN, Cache, answered, digest, key
from ple_jax.core.config import names
from ple_jax.core.errors import UserError
from ple_jax.core.identity import without_how
from ple_jax.core.types import Reward

WHERE = "config.reward.kwargs"  # what errors call a reward's options
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})([^`]*)\Z")


class Scored(NamedTuple):
    """The values of a reward, one per response, as it gave them: NaN or infinite where it gave none."""

    values: Float64[np.ndarray, " n"]
    parts: dict[str, Float64[np.ndarray, " n"]]  # of a combined reward; empty of any other


# ---------------------------------------------------------------- loading


def load(name: str, kwargs: Mapping[str, Any], **offered: Any) -> Reward:
    """Loads a reward: a module here by its name, or a function of your own.

    A function is named `package.module:function` or `file.py:function` and called as (prompts, responses, **kwargs). A
    parameter that has no default and is not in kwargs is read from the record, one value for each response: `completion`,
    the record's own answer, `rejected`, or a column of the data.

    Args:
        name: as in config.reward.name.
        kwargs: as in config.reward.kwargs.
        offered: what the run offers (backend, mesh) to a module's `make` that has such a parameter, unless kwargs has it.

    Raises:
        UserError: if there is no such reward, a package that it needs is missing, or it does not take these kwargs.
    """
    if (module := plugins.built_in("rewards", name)) is not None:
        asked = inspect.signature(module.make).parameters
        extra = {word: value for word, value in offered.items() if word in asked and word not in kwargs}
        plugins.check_types(module.make, kwargs, WHERE)
        try:
            return module.make(**kwargs, **extra)
        except TypeError as error:
            raise UserError(f"{WHERE} {dict(kwargs)!r}: {error}{plugins.OF_ANOTHER * bool(kwargs)}") from error
    known, words = names("rewards", ".py"), ("prompts", "responses")
    found = plugins.load_function(name, "reward.name", given=words, kwargs=kwargs, known=known)
    if next(iter(inspect.signature(found.call).parameters), "") == "completions":  # it would get the prompts
        raise UserError(
            f"config.reward.name {name!r} takes `completions` first, as TRL calls it: here it is called as (prompts,"
            " responses), and gets columns of the data that it asks for by name"
        )
    version = digest(found.source, without_how(name, kwargs))
    return Reward(name, functools.partial(found.call, **kwargs), version=version, reads=found.asks)


def leaves(reward: Reward) -> list[Reward]:
    """Returns the rewards that a combination consists of, also through nested ones; any other reward as it is."""
    return [leaf for part in reward.parts.values() for leaf in leaves(part)] or [reward]


# ---------------------------------------------------------------- what they read of the record


def reads(*rewards: Reward | None) -> tuple[str, ...]:
    """Returns the names of the record's fields that these rewards read, each once."""
    return tuple(
        dict.fromkeys(name for reward in rewards if reward is not None for leaf in leaves(reward) for name in leaf.reads)
    )


def read(names: Sequence[str], records: Sequence[Mapping[str, Any]], who: str) -> list[dict[str, Any]]:
    """Returns the fields of every record that have these names.

    Args:
        names: names of fields, as `reads` returns them.
        records: the records' fields by name.
        who: what reads the fields, for the error message.

    Raises:
        UserError: if a record lacks one of them, since it was kept by a run whose rewards did not read it.
    """
    if lacking := [name for name in names if any(name not in record for record in records)]:
        raise UserError(
            f"{who} reads `{lacking[0]}` of the record, and what it is asked about has none: what was kept of records"
            " is what the rewards of their run read; name it there as eval.second_reward or generate.second_reward"
        )
    return [{name: record[name] for name in names} for record in records]


def accepted(value: Any) -> list[str]:
    """Returns the accepted answers in a column of a record, as texts: all entries of a list, or else the one value.

    What is missing, such as a column that one data set of a mixture lacks, is no answer.
    """
    return [str(one) for one in (value if isinstance(value, list) else [value]) if one is not None]


def fenced_block(text: str, languages: Sequence[str], *, or_none: bool = False) -> str | None:
    """Returns the last block of a text that is between lines of ``` (or ~~~), the first of which names one of the languages.

    If there is none, it is the last block that names no language, and if there is none either, None. A block without an
    end, since the text was cut off, counts too.

    Args:
        or_none: whether a block that names no language is as good as one that names one of these.
    """
    blocks: list[tuple[str, list[str]]] = []
    fence, indent = "", 0
    for line in re.split(r"\r?\n", text):
        mark = _FENCE.match(line)
        if not fence and mark:
            fence, indent = mark[1], mark.start(1)
            blocks.append((mark[2].strip().casefold(), []))
        elif fence and mark and mark[1].startswith(fence) and not mark[2].strip():
            fence = ""
        elif fence:
            blocks[-1][1].append(line[min(indent, len(line) - len(line.lstrip(" \t"))) :])  # as in a list's item
    languages = (*languages, "") if or_none else languages
    named = [lines for language, lines in blocks if language.split(" ")[0] in languages]
    found = named or [lines for language, lines in blocks if not language]
    return "\n".join(found[-1]) + "\n" if found else None


def by_name(function: Callable[..., Any], given: int, names: Sequence[str]) -> Callable[..., Any]:
    """Wraps a function to be called with columns alone: it gets the first `given` by position, the others by these names."""
    return lambda *columns: function(*columns[:given], **dict(zip(names, columns[given:], strict=True)))


# ---------------------------------------------------------------- scoring


def score(
    reward: Reward,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    records: Sequence[Mapping[str, Any]] | None = None,
    cache: Cache | None = None,
) -> Scored:
    """Scores every response: from the cache, or else by the reward, in calls of `reward.batch` responses.

    Equal prompts and responses are scored once if the reward reads the same from their records. The values of a call are in
    the cache before the next call begins; values that are not finite are never cached.

    Args:
        records: the known fields of each response's record (`Query.record`); needed if the reward reads any.

    Raises:
        UserError: if the reward failed, gave a wrong number of values, something that is no number, or a value outside its
            scale, or if it reads a field that a record lacks.
        Incomplete: if the reward stopped before the end.
    """
    known_of = records if records is not None else [{}] * len(responses)
    if reward.combine is not None:
        return _combined(reward, prompts, responses, known_of, cache)
    assert reward.score is not None
    told = read(reward.reads, known_of, f"reward {reward.name!r}")
    asked = list(zip(prompts, responses, told, strict=True))
    keys = [key(reward.name, reward.version, *one) for one in asked]
    known = answered(
        {k: (p, r, *fields.values()) for k, (p, r, fields) in zip(keys, asked, strict=True)},
        by_name(reward.score, 2, reward.reads),
        lambda given, asked, answers, *_: _checked(reward, given, asked, answers).tolist(),
        cache=cache,
        batch=reward.batch,
        failed=lambda n: f"reward {reward.name!r} failed on {n} responses",
        again=AGAIN,
    )
    return Scored(np.array([known[k] for k in keys], np.float64), {})


def _combined(
    reward: Reward,
    prompts: Sequence[str],
    responses: Sequence[str],
    records: Sequence[Mapping[str, Any]],
    cache: Cache | None,
) -> Scored:
    values: dict[str, np.ndarray] = {}
    inner: dict[str, np.ndarray] = {}
    for name, part in reward.parts.items():
        values[name], nested = score(part, prompts, responses, records=records, cache=cache)
        inner |= {f"{name}.{deeper}": of_part for deeper, of_part in nested.items()}
    assert reward.combine is not None
    return Scored(_checked(reward, reward.combine(values), prompts, responses), values | inner)


def _checked(reward: Reward, given: Any, prompts: Sequence[str], responses: Sequence[str]) -> Float64[np.ndarray, " n"]:
    """Returns the values of a reward as float64.

    Raises:
        UserError: unless there is one number for each response, which is within the reward's scale if it is finite.
    """
    try:
        raw = np.asarray(given, object)  # as it is: float64 would make NaN of None, and a number of "1"
    except Exception as error:  # lists of different lengths, a tensor with a gradient
        raise UserError(f"reward {reward.name!r} gave {_brief(given)}, no row of numbers ({error}); {AGAIN}") from error
    if raw.shape != (len(responses),):
        raise UserError(
            f"reward {reward.name!r} gave {_brief(given)} of shape {raw.shape} for {len(responses)} responses, which need"
            f" one value each; {AGAIN}"
        )
    values = np.empty(len(raw))
    low, high = reward.scale
    slack = 1e-6 * max([1.0, *(abs(end) for end in reward.scale if math.isfinite(end))])  # what float32 rounds
    for i, value in enumerate(raw):
        where = f"for prompt {prompts[i][:80]!r}, response {responses[i][:80]!r}"
        try:
            if isinstance(value, str | bytes):  # which float() would read
                raise TypeError
            values[i] = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"reward {reward.name!r} gave {_brief(value)} {where}, which is no number; {AGAIN}") from error
        if math.isfinite(values[i]) and not low - slack <= values[i] <= high + slack:
            raise UserError(
                f"reward {reward.name!r} gave {values[i]:g} {where}, outside its scale of {low:g} to {high:g}; {AGAIN}"
            )
    return values + 0.0  # SQLite has no -0.0, and a stored value must not differ from a new one


def _brief(value: Any) -> str:
    """Returns the type and the start of an unexpected value, on one short line, for an error message."""
    return f"{type(value).__name__} {' '.join(repr(value).split())[:80]}"


# ---------------------------------------------------------------- transforms


def transform(raw: Float64[np.ndarray, " n"], name: str) -> Float64[np.ndarray, " n"]:
    """Transforms raw rewards into scores; `name` is none, sigmoid, zscore, minmax or shuffle.

    Statistics are pooled over all responses, since separate statistics for each kind of response would erase the margin
    between the kinds. Where all rewards are equal, zscore and minmax give 0. Beware: zscore on rewards that have converged
    amplifies noise to differences of 1. shuffle is a control: the same rewards are assigned to other responses. A method
    that learns as much from these does not learn from the reward.

    Raises:
        UserError: if there is no such transform.
    """
    raw = np.asarray(raw, np.float64)
    match name:
        case "none":
            return raw
        case "sigmoid":
            return np.exp(-np.logaddexp(0.0, -raw))
        case "zscore":
            unit = _unit(raw)  # the rounding of equal rewards would otherwise pass for a spread
            return (unit - unit.mean()) / (unit.std() or 1.0)
        case "minmax":
            return _unit(raw)
        case "shuffle":  # by their order alone, so that rounding draws no other one
            order = np.argsort(raw, kind="stable")
            return raw[np.random.default_rng(order.tolist()).permutation(len(raw))]
    raise UserError(f"config.reward.transform {name!r}: choose none, sigmoid, zscore, minmax or shuffle")


def statistics(raw: Float64[np.ndarray, " n"], name: str) -> dict[str, float]:
    """Returns the pooled statistics that `transform` uses for the same numbers: mean and std, low and high, or none."""
    raw = np.asarray(raw, np.float64)
    low, spread, unit = raw.min(), np.ptp(raw), _unit(raw)
    match name:
        case "zscore":
            return {"mean": float(low + spread * unit.mean()), "std": float(spread * unit.std())}
        case "minmax":
            return {"low": float(low), "high": float(raw.max())}
    return {}


def _unit(raw: np.ndarray) -> np.ndarray:
    return (raw - raw.min()) / (np.ptp(raw) or 1.0)
