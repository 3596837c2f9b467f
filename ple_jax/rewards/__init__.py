"""Rewards: (prompts, responses) -> one float per response.

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
from collections.abc import Mapping, Sequence
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


class Scored(NamedTuple):
    """Values as the reward gave them: NaN or infinite where it gave none."""

    values: Float64[np.ndarray, " n"]
    parts: dict[str, Float64[np.ndarray, " n"]]  # of a combined reward; empty of any other


# ---------------------------------------------------------------- loading


def load(name: str, kwargs: Mapping[str, Any], **offered: Any) -> Reward:
    """A reward by the name of a module here, or a function of your own as `package.module:function` or
    `file.py:function`, which is called as (prompts, responses, **kwargs).

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
    found, source = plugins.load_function(name, "reward.name", given=words, kwargs=kwargs, known=known)
    return Reward(name, functools.partial(found, **kwargs), version=digest(source, without_how(kwargs)))


def leaves(reward: Reward) -> list[Reward]:
    """The rewards that a combination is made of in the end; of any other it itself."""
    return [leaf for part in reward.parts.values() for leaf in leaves(part)] or [reward]


# ---------------------------------------------------------------- scoring


def score(reward: Reward, prompts: Sequence[str], responses: Sequence[str], *, cache: Cache | None = None) -> Scored:
    """The reward of every response: from the cache, or else from the reward, in calls of `reward.batch` responses.

    Equal pairs of prompt and response are scored once. What a call gave is in the cache before the next one begins;
    values that are not finite never are.

    Raises:
        UserError: the reward failed, or gave another number of values, something that is no number, or a value outside
            its scale.
        Incomplete: it stopped in between.
    """
    if reward.combine is not None:
        values: dict[str, np.ndarray] = {}
        inner: dict[str, np.ndarray] = {}
        for name, part in reward.parts.items():
            values[name], nested = score(part, prompts, responses, cache=cache)
            inner |= {f"{name}.{deeper}": of_part for deeper, of_part in nested.items()}
        combined = _checked(reward, reward.combine(values), prompts, responses)
        return Scored(combined, values | inner)
    assert reward.score is not None
    keys = [key(reward.name, reward.version, p, r) for p, r in zip(prompts, responses, strict=True)]
    known = answered(
        dict(zip(keys, zip(prompts, responses, strict=True), strict=True)),
        reward.score,
        lambda given, asked, answers: _checked(reward, given, asked, answers).tolist(),
        cache=cache,
        batch=reward.batch,
        failed=lambda n: f"reward {reward.name!r} failed on {n} responses",
        again=AGAIN,
    )
    return Scored(np.array([known[k] for k in keys], np.float64), {})


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
