"""Rewards: (prompts, responses) -> one float per response; of the record, what a reward asks for by name.

A reward is a module here, whose `make(**kwargs)` checks its options and returns a `Reward` (core/types.py), or a function
of the user's own. `load` makes one by its name; `score` calls it on what the cache does not hold yet, checks what it gives
and stores it; `transform` turns values into the scores that selection and weights use.

Stored values go by a reward's name and version. That of a module here says what its values depend on: its VERSION, which is
another one with every change of the code that changes a value, its options, and the versions or digests of the packages,
weights and files that it reads. That of a user's function is a digest of its source and its options.
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
    """Values as the reward gave them: NaN or infinite where it gave none."""

    values: Float64[np.ndarray, " n"]
    parts: dict[str, Float64[np.ndarray, " n"]]  # of a combined reward; empty of any other


# ---------------------------------------------------------------- loading


def load(name: str, kwargs: Mapping[str, Any], **offered: Any) -> Reward:
    """A reward by the name of a module here, or a function of your own as `package.module:function` or
    `file.py:function`, which is called as (prompts, responses, **kwargs).

    An argument of it without a default that is not in kwargs is something it reads of the record: `completion`, the record's
    own answer, `rejected`, or a column of the data, a value for each response.

    Args:
        name: as in config.reward.name.
        kwargs: as in config.reward.kwargs.
        offered: what the run has for a module's `make` that asks for it by name (backend, mesh), unless kwargs has it.

    Raises:
        UserError: no such reward, a package it needs is missing, or keyword arguments that it does not take.
    """
    if (module := plugins.built_in("rewards", name)) is not None:
        asked = inspect.signature(module.make).parameters
        extra = {word: value for word, value in offered.items() if word in asked and word not in kwargs}
        plugins.check_types(module.make, kwargs, WHERE)
        try:
            return module.make(**kwargs, **extra)
        except TypeError as error:
            raise UserError(f"{WHERE} {dict(kwargs)!r}: {error}") from error
    known, words = names("rewards", ".py"), ("prompts", "responses")
    found = plugins.load_function(name, "reward.name", given=words, kwargs=kwargs, known=known)
    version = digest(found.source, without_how(kwargs))
    return Reward(name, functools.partial(found.call, **kwargs), version=version, reads=found.asks)


def leaves(reward: Reward) -> list[Reward]:
    """The rewards that a combination is made of in the end; of any other it itself."""
    return [leaf for part in reward.parts.values() for leaf in leaves(part)] or [reward]


# ---------------------------------------------------------------- what they read of the record


def reads(*rewards: Reward | None) -> tuple[str, ...]:
    """The names of what some rewards are told of the record, each once."""
    return tuple(
        dict.fromkeys(name for reward in rewards if reward is not None for leaf in leaves(reward) for name in leaf.reads)
    )


def read(names: Sequence[str], records: Sequence[Mapping[str, Any]], who: str) -> list[dict[str, Any]]:
    """Of every record what these names stand for.

    Raises:
        UserError: a record lacks one, as it was kept by a run whose rewards did not read it.
    """
    if lacking := [name for name in names if any(name not in record for record in records)]:
        raise UserError(
            f"{who} reads `{lacking[0]}` of the record, and what it is asked about has none: what was kept of records"
            " is what the rewards of their run read; name it there as eval.second_reward or generate.second_reward"
        )
    return [{name: record[name] for name in names} for record in records]


def accepted(value: Any) -> list[str]:
    """The answers that a column of a record has: of a list every one, else the one there is."""
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def fenced_block(text: str, languages: Sequence[str], *, or_none: bool = False) -> str | None:
    """The last block of a text that stands between lines of ``` (or ~~~) and whose first line names one of the languages,
    or if there is none, no language; None if there is no such either. One that does not end, as it was cut off, counts.

    Args:
        or_none: whether a block that names no language is as good as one that names one of these.
    """
    blocks: list[tuple[str, list[str]]] = []
    fence = ""
    for line in text.splitlines():
        mark = _FENCE.match(line)
        if not fence and mark:
            fence = mark[1]
            blocks.append((mark[2].strip().casefold(), []))
        elif fence and mark and mark[1].startswith(fence) and not mark[2].strip():
            fence = ""
        elif fence:
            blocks[-1][1].append(line)
    languages = (*languages, "") if or_none else languages
    named = [lines for language, lines in blocks if language.split(" ")[0] in languages]
    found = named or [lines for language, lines in blocks if not language]
    return "\n".join(found[-1]) + "\n" if found else None


def by_name(function: Callable[..., Any], given: int, names: Sequence[str]) -> Callable[..., Any]:
    """The function, to be called with columns alone: the first `given` in their places, the others by these names."""
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
    """The reward of every response: from the cache, or else from the reward, in calls of `reward.batch` responses.

    Equal prompts and responses, of records of which the reward reads the same, are scored once. What a call gave is in the
    cache before the next one begins; values that are not finite never are.

    Args:
        records: what is known of the record of each response (`Query.record`); needed where the reward reads some of it.

    Raises:
        UserError: the reward failed, or gave another number of values, something that is no number, or a value outside
            its scale; it reads of the record what is not there.
        Incomplete: it stopped in between.
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
    """What a reward gave as float64: one for each response, and within its scale where it is finite."""
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
    """A value that was not expected, on a short line."""
    return f"{type(value).__name__} {' '.join(repr(value).split())[:80]}"


# ---------------------------------------------------------------- transforms


def transform(raw: Float64[np.ndarray, " n"], name: str) -> Float64[np.ndarray, " n"]:
    """none | sigmoid | zscore | minmax | shuffle. Statistics are pooled over all responses; zero spread gives 0.

    Pooled, because statistics of each kind alone would erase the margin between the kinds. Beware: zscore on rewards that
    have converged blows noise up to differences of 1. shuffle is a control: the same rewards, but each is another
    response's; a method that learns as much from these does not learn from the reward.
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
    """The pooled statistics that `transform` took of the same numbers: none, mean and std, or low and high."""
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
