"""Reads from the text of a compiled program which collectives it runs, loops included."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_COLLECTIVE = re.compile(rf"^(.*?) ({_KINDS})(-start)?\(([^)]*)\)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+\w*)\[([\d,]*)\]")
_CONSTANT = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = s(?:32|64)\[\]\S* constant\((\d+)\)")
_LESS = re.compile(r" compare\(([^)]*)\), direction=LT")


class Collective(NamedTuple):
    """One collective operation of a program."""

    kind: str
    bytes: int  # of the whole array on one device: what an all-gather gives, what a reduce-scatter takes
    times: int  # how often it runs: the product of the trip counts of the loops around it, at most
    looped: bool


def collectives(text: str) -> list[Collective]:
    """Finds the collectives of a compiled program in its text, `compiled.as_text()`.

    A loop's trip count is the compiler's own where it is known, else the constant that the loop's condition compares with: a
    loop that may end early counts in full. A loop with neither counts once.
    """
    entry, bodies = _computations(text)
    found: dict[tuple, Collective] = {}
    for name, times, looped in _walk(entry, bodies, 1, False):
        types = {m[1]: m[2] for line in bodies[name] if (m := _INSTRUCTION.match(line))}
        for own, line in types.items():
            match = _COLLECTIVE.match(line)
            if match is None or not times:
                continue
            result, kind, start, operands = match.groups()
            sizes = _sizes(result)
            # what starts asynchronously carries its operands, then its results, then scalars
            given = sum(sizes[len(sizes) // 2 :]) if start and kind != "all-reduce" else sum(sizes)
            taken = sum(sum(_sizes(types[o].split("(%", 1)[0])) for o in re.findall(r"%([\w.-]+)", operands) if o in types)
            # the TPU compiler writes a reduce-scatter as an all-reduce in a fusion of this name
            kind = "reduce-scatter" if kind == "all-reduce" and name.startswith("all-reduce-scatter") else kind
            # an asynchronous collective stands in several computations, under one channel
            channel = re.search(r"channel_id=(\d+)", line)
            key = (kind, channel[1]) if channel else (name, own)
            if key not in found or found[key].times < times:
                found[key] = Collective(kind, max(given, taken), times, looped)
    return list(found.values())


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    entry, name = "", ""
    bodies: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            entry = name if match[1] else entry
            bodies[name] = []
        elif name and line.startswith(" "):
            bodies[name].append(line)
    return entry, bodies


def _walk(name: str, bodies: dict[str, list[str]], times: int, looped: bool) -> Iterator[tuple[str, int, bool]]:
    """Yields every computation reached from `name`, how often it runs, and whether it runs inside a loop."""
    yield name, times, looped
    for line in bodies[name]:
        if match := _WHILE.search(line):
            condition, body = match.groups()
            trips = times * _trips(line, condition, bodies)
            yield from _walk(condition, bodies, trips, True)
            yield from _walk(body, bodies, trips, True)
            continue
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += re.findall(r"[\w.-]+", branches)
        for other in called:
            if other in bodies:
                yield from _walk(other, bodies, times, looped)


def _trips(line: str, condition: str, bodies: dict[str, list[str]]) -> int:
    if match := _TRIPS.search(line):
        return int(match[1])
    compared: list[int] = []
    for name, *_ in _walk(condition, bodies, 1, True):
        constants = {m[1]: int(m[2]) for text in bodies[name] if (m := _CONSTANT.match(text))}
        for text in bodies[name]:
            if match := _LESS.search(text):
                compared += [constants[o] for o in re.findall(r"%([\w.-]+)", match[1]) if o in constants]
    # a comparison inside a fusion is given its constant by the condition
    given = [int(m[2]) for text in bodies[condition] if (m := _CONSTANT.match(text))]
    # a loop that ends by something else may compare with 0 on the way; its collectives are there all the same
    return max([1, *(compared or given)])


def _sizes(type_: str) -> list[int]:
    """Computes the bytes of each array in the text of a type. Scalars are left out if there are arrays beside them."""
    arrays = [(kind, [int(n) for n in dims.split(",") if n]) for kind, dims in _ARRAY.findall(type_)]
    if any(dims for _, dims in arrays):
        arrays = [(kind, dims) for kind, dims in arrays if dims]
    return [math.prod(dims) * _bits(kind) // 8 for kind, dims in arrays]


def _bits(kind: str) -> int:
    return 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
