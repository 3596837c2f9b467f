"""Rewards: (prompts, responses) -> one float per response. A module here has `make(**kwargs)`, which returns one."""

import functools
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from ple_jax.core.config import UserError, names, suggestion
from ple_jax.core.plugins import load_module
from ple_jax.core.types import Reward


def load(name: str, kwargs: Mapping[str, Any]) -> Reward:
    """A reward by the name of a module here, or a function of your own as `package.module:function` or
    `file.py:function`.

    Raises:
        UserError: no such reward, a package it needs is missing, or keyword arguments that it does not take.
    """
    known = names("core/rewards", ".py")
    if name in known:
        make = importlib.import_module(f"{__name__}.{name}").make
        try:
            return make(**kwargs)
        except TypeError as error:
            raise UserError(f"config.reward.kwargs {dict(kwargs)!r}: {error}") from error
    module, _, function = name.partition(":")
    if not function:
        raise UserError(
            f"config.reward.name {name!r} is not one of {', '.join(known)}{suggestion(name, known)};"
            " a function of your own is package.module:function or file.py:function"
        )
    found = getattr(load_module(module, "reward.name"), function, None)
    if not callable(found):
        raise UserError(f"config.reward.name {name!r}: {module} has no function {function!r}")
    try:
        inspect.signature(found).bind([], [], **kwargs)
    except TypeError as error:
        raise UserError(f"config.reward.name {name!r} is not called as (prompts, responses, **kwargs): {error}") from error
    return functools.partial(found, **kwargs) if kwargs else found


def score(reward: Reward, prompts: Sequence[str], responses: Sequence[str]) -> Float64[np.ndarray, " n"]:
    """Calls the reward on plain prompts and responses.

    Raises:
        UserError: it gave another number of values, or one that is not finite (quotes prompt and response).
    """
    try:
        values = np.asarray(reward(prompts, responses), np.float64)
    except UserError:
        raise
    except Exception as error:  # the reward is the user's code: anything may come out of it
        raise UserError(
            f"the reward failed on {len(responses)} responses: {type(error).__name__}: {error}; mend it and give the same"
            " command again: what was sampled is kept"
        ) from error
    if values.shape != (len(responses),):
        raise UserError(f"the reward gave values of shape {values.shape} for {len(responses)} responses; one each is needed")
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        i = bad[0]
        raise UserError(
            f"the reward of {bad.size} of {len(values)} responses is not finite: {values[i]} for prompt"
            f" {prompts[i][:80]!r}, response {responses[i][:80]!r}; mend the reward and give the same command again:"
            " what was sampled is kept"
        )
    return values


def transform(raw: Float64[np.ndarray, " n"], name: str) -> Float64[np.ndarray, " n"]:
    """none | sigmoid | zscore | minmax. Statistics are pooled over all responses; zero spread gives 0.

    Pooled, because statistics of each kind alone would erase the margin between the kinds. Beware: zscore on rewards that
    have converged blows noise up to differences of 1.
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
    raise UserError(f"config.reward.transform {name!r}: choose none, sigmoid, zscore or minmax")


def _unit(raw: np.ndarray) -> np.ndarray:
    return (raw - raw.min()) / (np.ptp(raw) or 1.0)
