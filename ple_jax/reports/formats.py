"""Formats numbers as people read them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

MISSING = "–"


def number(value: Any, digits: int = 4) -> str:
    """Formats an integer with thousands separated, and a float with `digits` significant digits.

    None becomes a dash, and anything that is not a number becomes its text.
    """
    if value is None:
        return MISSING
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def short(value: float) -> str:
    """Formats a number for the ticks of an axis: 0.25, 1500, 20k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.4g}"


def share(value: float | None, decimals: int = 1) -> str:
    """Formats a share in percent: 0.123 -> "12.3%"; None becomes a dash."""
    return MISSING if value is None else f"{value:.{decimals}%}"


def signed(value: float | None) -> str:
    """Formats a number with its sign: 0.123 -> "+0.12"; None becomes a dash."""
    return MISSING if value is None else f"{value:+.2f}"


def duration(seconds: float) -> str:
    """Formats a number of seconds as a duration, such as "4 min 32 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def readable_bytes(count: float) -> str:
    """Formats a number of bytes with three significant digits: 512 B, 1.50 MiB, 128 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:#.3g} {unit}"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def decimals(values: Iterable[Any]) -> int:
    """Returns the number of decimals, from 0 to 4, with which the largest value has three digits.

    With it the numbers of one column are all written alike.
    """
    largest = max((abs(value) for value in values if is_number(value)), default=0.0)
    return min(max(2 - math.floor(math.log10(largest)), 0), 4) if largest else 3


def interval(value: float | None, bounds: Sequence[float | None] | None, digits: int, sign: str = "") -> str:
    """Formats a value with its interval: "0.42 [0.31, 0.55]".

    The brackets are left out where the interval is not known; None becomes a dash.
    """
    if value is None:
        return MISSING
    low, high = bounds or (None, None)
    around = "" if low is None or high is None else f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
    return f"{value:{sign}.{digits}f}{around}"


def p_value(p: float | None) -> str:
    return MISSING if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"
