"""Finds the first quantity in which two runs differ, by comparing what each did in the order in which it did it.

A run is deterministic, so two runs of the same config on the same machine do not differ. Where they do, everything after the
first difference may follow from it. The configs are compared first. Then follow, for every iteration, the evaluation before
it, the responses that it sampled (prompts, noise, tokens, log-probabilities), their rewards and scores, what was decided,
and the loss. Each quantity is compared for all queries before the next one.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ple_jax.core import identity
from ple_jax.core.config import flatten
from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import UserError
from ple_jax.core.files import read_jsonl
from ple_jax.core.types import Response, Rollout
from ple_jax.training import journal
from ple_jax.training.workdir import recorded

_TIMED = ("seconds", "per_second", "memory")  # parts of metrics' names that are never the same


class Difference(NamedTuple):
    """A place where two runs differ, and the value that each of them has there."""

    quantity: str  # config, prompt, noise, token, log-probability, reward, score, decision, loss, measure or length
    where: str
    one: Any
    other: Any

    def __str__(self) -> str:
        return f"{self.quantity}: {self.where}: {_shown(self.one)} against {_shown(self.other)}"


def _shown(value: Any) -> str:
    return repr(value) if not isinstance(value, str) or len(value) < 100 else repr(value[:100] + "...")


def of(one: Path, other: Path) -> list[Difference]:
    """Compares two runs, and returns the config keys that differ and the first difference in what the runs did.

    Args:
        one, other: work directories.

    Returns:
        The differences; an empty list where there is none.

    Raises:
        UserError: one of the folders holds no run, or a file is damaged.
    """
    for folder in (one, other):
        if not recorded(folder):
            raise UserError(f"{folder} holds no run: give two work directories, --workdir=A --against=B")
    return [*_configs(one, other), *_first(_done(one, other))]


def _first(found: Iterator[Difference]) -> list[Difference]:
    return [difference] if (difference := next(found, None)) is not None else []


def _configs(one: Path, other: Path) -> Iterator[Difference]:
    """Yields the differences in config keys that have a part in the result."""
    kept = [recorded(folder) or {} for folder in (one, other)]
    kept = [identity.completed(kept[i], kept[1 - i]) for i in (0, 1)]  # of an earlier version one has fewer keys
    flat = [flatten({k: v for k, v in identity.comparable(each).items() if k != "changed"}) for each in kept]
    for key in dict.fromkeys([*flat[0], *flat[1]]):
        values = [each.get(key) for each in flat]
        if values[0] != values[1] and key not in identity.EXECUTION:
            yield Difference("config", key, *values)


def _done(one: Path, other: Path) -> Iterator[Difference]:
    """Yields the differences in what the runs did, in the order of time."""
    lines = [_metrics(folder) for folder in (one, other)]
    journals = {int(path.stem[5:]) for folder in (one, other) for path in (folder / "rollouts").glob("iter_????.jsonl")}
    for number in sorted({*lines[0], *lines[1], *journals}):
        name = f"iter_{number:04d}.jsonl"
        yield from _of_metrics(lines, number, "loss")
        yield from _journals(one, other, Path("evaluations") / name, f"evaluation {number}")
        yield from _of_metrics(lines, number, "measure")
        yield from _journals(one, other, Path("rollouts") / name, f"iteration {number + 1}")
        within = {path.parent.name for folder in (one, other) for path in (folder / "evaluations").glob(f"step_*/{name}")}
        for step in sorted(within):
            yield from _journals(one, other, Path("evaluations") / step / name, f"evaluation at {step.replace('_', ' ')}")


def _journals(one: Path, other: Path, name: Path, where: str) -> Iterator[Difference]:
    there = [(folder / name).exists() for folder in (one, other)]
    if not all(there):
        if any(there):
            yield Difference("length", f"{where}, {name}", *("there" if found else "not there" for found in there))
        return
    kept = [journal.read(folder / name) for folder in (one, other)]
    left: list[list[Rollout]] = [[], []]  # of an evaluation nothing is
    if name.parent.name == "rollouts":
        left = [journal.left_out(folder / name, some) for folder, some in zip((one, other), kept, strict=True)]
    first, second = ({r.query_id: r for r in [*some, *beside]} for some, beside in zip(kept, left, strict=True))
    if set(first) != set(second) or not any(left):
        yield from _prompts(list(first.values()), list(second.values()), where)  # their order too
    both = [query for query in first if query in second]
    rollouts = [[some[query] for query in both] for some in (first, second)]
    for compare in (_prompts, _responses, _decisions):
        yield from compare(rollouts[0], rollouts[1], where)


def _prompts(one: Sequence[Rollout], other: Sequence[Rollout], where: str) -> Iterator[Difference]:
    ids = [[rollout.query_id for rollout in rollouts] for rollouts in (one, other)]
    for number, (a, b) in enumerate(zip(*ids, strict=False)):
        if a != b:
            yield Difference("prompt", f"{where}, query number {number + 1}", a, b)
    if len(one) != len(other):
        yield Difference("prompt", f"{where}, number of queries", len(one), len(other))
    for a, b in zip(one, other, strict=False):
        for what, read in (("text", _text), ("tokens", lambda rollout: rollout.prompt_tokens)):
            if read(a) != read(b):
                yield Difference("prompt", f"{where}, query {a.query_id!r}, {what}", read(a), read(b))


def _text(rollout: Rollout) -> Any:
    prompt = rollout.prompt
    return [prompt.messages, prompt.tools] if isinstance(prompt, Conversation) else prompt


# of a response, in the order in which they come about: quantity, and its values
_OF_A_RESPONSE: tuple[tuple[str, Callable[[Response], Sequence[Any]]], ...] = (
    ("prompt", lambda r: (r.kind, r.principled, r.sample, r.source)),
    ("noise", lambda r: (r.noise,)),
    ("token", lambda r: r.tokens),
    ("token", lambda r: (r.finished, r.text)),
    ("log-probability", lambda r: r.logprobs),
    ("reward", lambda r: (r.reward, *r.parts.values())),
)


def _responses(one: Sequence[Rollout], other: Sequence[Rollout], where: str) -> Iterator[Difference]:
    pairs = [
        (f"{where}, query {a.query_id!r}, {x.kind} response {x.sample}", x, y)
        for a, b in zip(one, other, strict=True)
        for x, y in zip(a.responses, b.responses, strict=False)
    ]
    for quantity, read in _OF_A_RESPONSE:
        for place, x, y in pairs:
            if quantity == "noise" and not (x.noise and y.noise):  # of an earlier version, or of a record
                continue
            yield from _values(quantity, place, read(x), read(y))


def _values(quantity: str, place: str, one: Sequence[Any], other: Sequence[Any]) -> Iterator[Difference]:
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if not _equal(a, b):
            number = f", {quantity} {i}" if quantity in ("token", "log-probability") and len(one) > 2 else ""
            yield Difference(quantity, place + number, a, b)
            return
    if len(one) != len(other):
        yield Difference(quantity, f"{place}, how many", len(one), len(other))


def _decisions(one: Sequence[Rollout], other: Sequence[Rollout], where: str) -> Iterator[Difference]:
    pairs = [(f"{where}, query {a.query_id!r}", a, b) for a, b in zip(one, other, strict=True)]
    for place, a, b in pairs:
        yield from _values("score", place, [r.score for r in a.responses], [r.score for r in b.responses])
    for what in ("tau", "margin", "decision"):
        for place, a, b in pairs:
            if not _equal(getattr(a, what), getattr(b, what)):
                yield Difference("decision", f"{place}, {what}", getattr(a, what), getattr(b, what))
    for place, a, b in pairs:
        yield from _values("decision", f"{place}, weight", [r.weight for r in a.responses], [r.weight for r in b.responses])


def _metrics(folder: Path) -> dict[int, Mapping[str, Any]]:
    path = folder / "metrics.jsonl"
    return {line["iteration"]: line for line in read_jsonl(path, torn=True)} if path.exists() else {}


def _of_metrics(lines: Sequence[Mapping[int, Mapping[str, Any]]], number: int, quantity: str) -> Iterator[Difference]:
    """Yields the differences between two lines of metrics.jsonl, the loss first; timings are not compared.

    The quantity "measure" stands for the metrics of the evaluation, and "loss" for all others.
    """
    both = [of.get(number) for of in lines]
    if both[0] is None or both[1] is None:
        if both[0] is not both[1]:
            yield Difference(
                "length", f"line {number} of metrics.jsonl", *("there" if line else "not there" for line in both)
            )
        return
    keys = [key for key in dict.fromkeys([*both[0], *both[1]]) if not any(part in key for part in _TIMED)]
    keys = [key for key in keys if key.startswith("heldout") == (quantity == "measure")]
    for key in sorted(keys, key=lambda key: key not in ("loss", "grad_norm")):
        if not _equal(both[0].get(key), both[1].get(key)):
            yield Difference(quantity, f"metrics of iteration {number}, {key}", both[0].get(key), both[1].get(key))


def _equal(one: Any, other: Any) -> bool:
    """Says whether two values are equal, where nan equals nan."""
    return one == other or (isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other))
