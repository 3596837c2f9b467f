"""A reward that is 1 if a response matches a regular expression, one for all or the record's own, and 0 otherwise."""

import re
from collections.abc import Sequence
from typing import Any

from ple_jax.core.errors import UserError
from ple_jax.core.types import Reward
from ple_jax.rewards import WHERE, accepted

VERSION = "2"  # another one with every change of the values


def make(pattern: str | None = None, *, column: str | None = None, answer: str | None = None) -> Reward:
    """Returns a reward that is 1 if the pattern matches somewhere in the response, and 0 otherwise.

    With an `answer`, the last match must be that answer. A pattern with nested repetitions, (a+)+, may take forever on some
    texts, as always with Python's `re`.

    Args:
        pattern: a regular expression, as Python's `re` reads it.
        column: instead of a pattern, the record's field with a pattern of its own, or a list, of which one must match.
        answer: the record's field with the answer, or a list of which one must fit: what the first group of the last match
            must be (or the whole match, if there is no group), apart from case and blanks around it. Empty matches do not
            count.

    Raises:
        UserError: if neither a pattern nor a column is given, or both, or if the pattern is no regular expression.
    """
    if (pattern is None) == (column is None):
        raise UserError(f"{WHERE} of reward 'regex': give a pattern, or the column of the record that has one")
    fixed = [] if pattern is None else [_compiled(pattern, f"{WHERE} pattern:")]
    reads = tuple(dict.fromkeys(name for name in (column, answer) if name is not None))

    def matches(response: str, told: dict[str, Any]) -> bool:
        patterns = fixed if column is None else map(re.compile, accepted(told[column]))
        right = None if answer is None else {text.strip().casefold() for text in accepted(told[answer])}
        return any(_matches(one, response, right) for one in patterns)

    def reward(prompts: Sequence[str], responses: Sequence[str], /, **fields: Sequence[Any]) -> list[float]:
        told = [{name: fields[name][i] for name in reads} for i in range(len(responses))]
        return [float(matches(*one)) for one in zip(responses, told, strict=True)]

    def refuses(prompt: str, /, **fields: Any) -> str:
        if lacking := [name for name in reads if not accepted(fields[name])]:
            return f"has nothing in its `{lacking[0]}`"
        return "" if column is None else next(filter(None, (_wrong(one, column) for one in accepted(fields[column]))), "")

    version = f"{VERSION} {pattern!r} {column} {answer}"
    return Reward("regex", reward, version=version, scale=(0.0, 1.0), reads=reads, refuses=refuses)


def _matches(pattern: re.Pattern[str], response: str, right: set[str] | None) -> bool:
    if right is None:
        return pattern.search(response) is not None
    said = [(match[min(1, pattern.groups)] or "").strip() for match in pattern.finditer(response)]
    said = [text for text in said if text]
    return bool(said) and said[-1].casefold() in right


def _wrong(pattern: str, column: str) -> str:
    try:
        _compiled(pattern, f"`{column}`:")
    except UserError as error:
        return f"has no pattern in {error}"
    return ""


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{where} {pattern!r} is no regular expression: {error}") from error
