"""Several rewards as one: a weighted sum or the worst of them, with vetoes and a penalty on length."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ple_jax import rewards
from ple_jax.core.answers import digest
from ple_jax.core.errors import UserError, suggestion
from ple_jax.core.rules import is_number
from ple_jax.core.types import Reward
from ple_jax.formulas import texts
from ple_jax.rewards import WHERE

VERSION = "2"  # another one with every change of the values
_HOW = ("sum", "min")
_KEYS = ("name", "weight", "kwargs", "veto_below")
_PENALTY = "length_penalty"


def make(
    *,
    parts: Mapping[str, Any],
    how: str = "sum",
    length_penalty: float = 0.0,
    veto_value: float | None = None,
    backend: str = "jax",
    mesh: Mapping[str, int] | None = None,
) -> Reward:
    """Returns the combination of several rewards, which has no value where a part that counts has none.

    Args:
        parts: by names of your own, {"name": ..., "weight": 1.0, "kwargs": {}, "veto_below": None}, of which only `name`
            has no default. A part may be a combination itself. A part of weight 0 has no effect but its veto.
        how: sum or min, of weight times value.
        length_penalty: is subtracted for every word of the response.
        veto_value: the value of a response that a part scores below its `veto_below`; by default the lowest value that the
            combination can have.
        backend, mesh: those of the run, which offers them; they are passed on to the parts.

    Raises:
        UserError: if a part cannot be loaded, weights are not finite or all 0, or a veto has no value.
    """
    loaded = {key: _part(key, part, backend=backend, mesh=mesh) for key, part in parts.items()}
    weights = {key: weight for key, part in parts.items() if (weight := part.get("weight", 1.0))}
    vetoes = {key: below for key, part in parts.items() if (below := part.get("veto_below")) is not None}
    if not weights:
        raise UserError(f"{WHERE} parts: give at least one part, of a weight that is not 0")
    loaded |= _penalty(length_penalty)
    low, high = _scale(loaded, weights, how)
    veto = low if veto_value is None else veto_value
    if vetoes:
        low, high = min(low, veto), max(high, veto)
        if veto_value is None and veto == -math.inf:
            raise UserError(f"{WHERE} veto_value is missing: this combination has no lowest value; give what a veto costs")
    versions = [(key, part.name, part.version) for key, part in loaded.items()]
    version = f"{VERSION} {digest(versions, weights, vetoes, how, length_penalty, veto_value)}"
    combine = functools.partial(_combined, weights=weights, vetoes=vetoes, how=how, veto=veto)
    return Reward("combine", version=version, parts=loaded, combine=combine, scale=(low, high))


def _part(key: str, part: Any, *, backend: str, mesh: Mapping[str, int] | None) -> Reward:
    """Checks the settings of a part and loads the reward that it names."""
    of = f"{WHERE} parts[{key!r}]"
    if not isinstance(part, Mapping) or "name" not in part:
        raise UserError(f"{of} is {part!r}: give a dictionary with a name, {{'name': 'vader'}}")
    if unknown := [word for word in part if word not in _KEYS]:
        raise UserError(f"{of} has {unknown[0]!r}; it takes {', '.join(_KEYS)}{suggestion(unknown[0], _KEYS)}")
    if key == _PENALTY:
        raise UserError(f"{of}: the word is taken; give the part another one")
    if not is_number(weight := part.get("weight", 1.0)) or not math.isfinite(weight):
        raise UserError(f"{of} has weight {weight!r}: give a finite number")
    if (below := part.get("veto_below")) is not None and not is_number(below):
        raise UserError(f"{of} has veto_below {below!r}: give a number")
    if not isinstance(part["name"], str) or not isinstance(part.get("kwargs", {}), Mapping):
        raise UserError(f"{of} is {part!r}: its name must be a text, and its kwargs a dictionary")
    try:
        return rewards.load(part["name"], part.get("kwargs", {}), backend=backend, mesh=mesh)
    except UserError as error:
        raise UserError(f"{of}: {error}") from error


def _penalty(each: float) -> dict[str, Reward]:
    """Returns the penalty on the words of a response as one more part, or no part if `each` word costs nothing."""
    if not (math.isfinite(each) and each >= 0):
        raise UserError(f"{WHERE} {_PENALTY} = {each}: give a number of at least 0")
    cost = Reward(
        _PENALTY,
        lambda prompts, responses: [-each * texts.word_count(response) for response in responses],
        version=f"{VERSION} {each!r}",
        scale=(-math.inf, 0.0),
    )
    return {_PENALTY: cost} if each else {}


def _scale(parts: Mapping[str, Reward], weights: Mapping[str, float], how: str) -> tuple[float, float]:
    """Returns the lowest and the highest value that the combination can have without vetoes."""
    if how not in _HOW:
        raise UserError(f"{WHERE} how = {how!r}: choose {' or '.join(_HOW)}")
    ends = [sorted(weight * end for end in parts[key].scale) for key, weight in weights.items()]
    low, high = ((sum if how == "sum" else min)(end) for end in zip(*ends, strict=True))
    return (-math.inf if _PENALTY in parts else low), high


def _combined(
    values: Mapping[str, np.ndarray], *, weights: Mapping[str, float], vetoes: Mapping[str, float], how: str, veto: float
) -> np.ndarray:
    """Computes the values of the combination from those of its parts."""
    with np.errstate(invalid="ignore"):  # inf - inf is no value
        weighted = [weight * values[key] for key, weight in weights.items()]
        total = (np.sum if how == "sum" else np.min)(weighted, axis=0)
        if _PENALTY in values:
            total = total + values[_PENALTY]
    if vetoes:
        unknown = np.any([np.isnan(values[key]) for key in vetoes], axis=0)
        below = np.any([values[key] < bound for key, bound in vetoes.items()], axis=0)
        total = np.where(below, veto, np.where(unknown, math.nan, total))
    return total
