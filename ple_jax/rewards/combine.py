"""Several rewards as one: a weighted sum or the worst of them, with vetoes and a price on length."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ple_jax import rewards
from ple_jax.core.errors import UserError, suggestion
from ple_jax.core.types import Reward

_KEYS = ("name", "weight", "kwargs", "veto_below")
_PENALTY = "length_penalty"


def make(
    *,
    parts: Mapping[str, Mapping[str, Any]],
    how: str = "sum",
    length_penalty: float = 0.0,
    veto_value: float | None = None,
    backend: str = "jax",
    mesh: Mapping[str, int] | None = None,
) -> Reward:
    """The parts of weight 0 decide nothing but their vetoes. Where a part that counts has no value, there is none.

    Args:
        parts: by names of your own, {"name": ..., "weight": 1.0, "kwargs": {}, "veto_below": None}, of which only `name`
            has no default. A part may be a combination itself.
        how: sum or min, of weight times value.
        length_penalty: is subtracted for every word of the response.
        veto_value: what a response gets that a part puts below its `veto_below`; the lowest value that the combination
            can have, if it is not given.
        backend, mesh: the run's, which offers them; they go on to the parts.

    Raises:
        UserError: a part that cannot be loaded, weights that are not finite or all 0, or a veto without a value.
    """
    where = "config.reward.kwargs"
    if how not in ("sum", "min"):
        raise UserError(f"{where} how = {how!r}: choose sum or min")
    if not (math.isfinite(length_penalty) and length_penalty >= 0):
        raise UserError(f"{where} {_PENALTY} = {length_penalty}: give a number of at least 0")
    loaded: dict[str, Reward] = {}
    weights: dict[str, float] = {}
    vetoes: dict[str, float] = {}
    for key, part in parts.items():
        of = f"{where} parts[{key!r}]"
        if not isinstance(part, Mapping) or "name" not in part:
            raise UserError(f"{of} is {part!r}: give a dictionary with a name, {{'name': 'vader'}}")
        if unknown := [word for word in part if word not in _KEYS]:
            raise UserError(f"{of} has {unknown[0]!r}; it takes {', '.join(_KEYS)}{suggestion(unknown[0], _KEYS)}")
        if key == _PENALTY:
            raise UserError(f"{of}: the word is taken; give the part another one")
        weight = part.get("weight", 1.0)
        if not math.isfinite(weight):
            raise UserError(f"{of} has weight {weight}: give a finite number")
        try:
            loaded[key] = rewards.load(part["name"], part.get("kwargs", {}), backend=backend, mesh=mesh)
        except UserError as error:
            raise UserError(f"{of}: {error}") from error
        if weight:
            weights[key] = weight
        if part.get("veto_below") is not None:
            vetoes[key] = part["veto_below"]
    if not weights:
        raise UserError(f"{where} parts: give at least one part, of a weight that is not 0")
    choose: Any = {"sum": (sum, np.sum), "min": (min, np.min)}[how]
    ends = [sorted(weight * end for end in loaded[key].scale) for key, weight in weights.items()]
    low, high = (choose[0](end) for end in zip(*ends, strict=True))
    if length_penalty:
        low = -math.inf
        loaded[_PENALTY] = Reward(
            _PENALTY,
            lambda prompts, responses: [-length_penalty * len(response.split()) for response in responses],
            version=repr(length_penalty),
            scale=(-math.inf, 0.0),
        )
    if vetoes:
        if veto_value is None and low == -math.inf:
            raise UserError(f"{where} veto_value is missing: this combination has no lowest value; give what a veto costs")
        veto = low if veto_value is None else veto_value
        low, high = min(low, veto), max(high, veto)

    def combine(values: Mapping[str, np.ndarray]) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # inf - inf is no value
            total = choose[1]([weight * values[key] for key, weight in weights.items()], axis=0)
            if length_penalty:
                total = total + values[_PENALTY]
        if vetoes:
            unknown = np.any([np.isnan(values[key]) for key in vetoes], axis=0)
            below = np.any([values[key] < bound for key, bound in vetoes.items()], axis=0)
            total = np.where(below, veto, np.where(unknown, math.nan, total))
        return total

    return Reward("combine", parts=loaded, combine=combine, scale=(low, high))
