"""Functions for a grid of overrides: its points, the names of their folders, and the best point."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ple_jax.core.errors import UserError


def grid(axes: Sequence[str]) -> list[dict[str, str]]:
    """Returns the points of a grid; the last axis varies fastest. ["optimizer.lr=1e-3,3e-3", "seed=0,1"] has four.

    Raises:
        UserError: if there is no axis, an axis has no key or no values, or a key or a value is given twice.
    """
    if not axes:
        raise UserError("--grid KEY=VALUE,VALUE is missing, e.g. --grid optimizer.lr=3e-4,1e-3")
    values: dict[str, list[str]] = {}
    for axis in axes:
        key, _, text = axis.partition("=")
        found = _split(text)
        if not key or not all(found) or len(set(found)) < len(found) or key in values:
            raise UserError(
                f"--grid {axis!r} must read like optimizer.lr=3e-4,1e-3: a key of its own, and values that differ"
            )
        values[key] = found
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def _split(text: str) -> list[str]:
    """Splits a text at the commas outside brackets: "('a','b'),('c',)" is two values."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def name_of(point: Mapping[str, str]) -> str:
    """Returns a name for a point's folder, made of its overrides, that `--runs` can hold.

    Where characters had to be replaced or the name was cut, a digest of the overrides is added.
    """
    text = "__".join(f"{key}-{value}" for key, value in point.items())
    name = re.sub(r"[^\w.+-]+", "_", text)[:120]
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def best(
    points: Sequence[Mapping[str, str]], values: Sequence[float], *, lowest: bool = False
) -> tuple[dict[str, str], list[float]] | None:
    """Returns the point, without its seed, whose mean over seeds is the highest, and its values; None if there is none.

    The first of equal points is returned.

    Args:
        values: the value of every point, or nan if it has none. A point needs a value for each of its seeds.
        lowest: whether the lowest mean is the best.
    """
    seeds: dict[str, tuple[dict[str, str], list[float]]] = {}
    for point, value in zip(points, values, strict=True):
        rest = {k: v for k, v in point.items() if k != "seed"}
        seeds.setdefault(json.dumps(rest), (rest, []))[1].append(value)
    whole = [found for found in seeds.values() if not any(map(math.isnan, found[1]))]
    sign = 1 if lowest else -1
    return min(whole, key=lambda found: sign * math.fsum(found[1]) / len(found[1]), default=None)


def flags(point: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the overrides of a point as command-line arguments."""
    return tuple(f"--config.{key}={value}" for key, value in point.items())


def number(value: Any) -> float:
    """Returns a value of a summary as a float, or nan if it is no number."""
    return float(value) if isinstance(value, int | float) else math.nan
