"""A reward on the form of a response: the share of some rules that it keeps, from 0 to 1."""

import re
from collections.abc import Sequence
from itertools import groupby

from ple_jax.core.answers import digest
from ple_jax.core.errors import UserError
from ple_jax.core.types import Reward
from ple_jax.rewards import WHERE

VERSION = "1"  # another one with every change of the values
_SENTENCE = re.compile(r"[.!?…。！？]['\"’”»)\]*]*\s*\Z")  # closing quotes, brackets and emphasis may follow


def make(
    *, require: Sequence[str] = (), forbid: Sequence[str] = (), max_repeats: int | None = None, sentence: bool = False
) -> Reward:
    """Returns a reward that is the share of these rules that a response keeps.

    Every pattern is one rule, and `max_repeats` and `sentence` are one rule each.

    Args:
        require: regular expressions that a response must match somewhere.
        forbid: regular expressions that it must not match anywhere.
        max_repeats: how many times the same word, in any case, or the same line may stand in a row; 1: never twice.
        sentence: whether a response must end as a sentence does.

    Raises:
        UserError: if there is no rule at all, `max_repeats` is below 1, or a pattern is no regular expression.
    """
    required, forbidden = _compiled("require", require), _compiled("forbid", forbid)
    if max_repeats is not None and max_repeats < 1:
        raise UserError(f"{WHERE} max_repeats = {max_repeats}: give at least 1")
    if not (require or forbid or max_repeats or sentence):
        raise UserError("config.reward.kwargs of reward 'rules' has no rule: give require, forbid, max_repeats or sentence")

    def kept(text: str) -> list[bool]:
        found = [pattern.search(text) is not None for pattern in required]
        found += [pattern.search(text) is None for pattern in forbidden]
        found += [_longest_run(text) <= max_repeats] if max_repeats is not None else []
        return found + ([_SENTENCE.search(text) is not None] if sentence else [])

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [sum(rules) / len(rules) for rules in map(kept, responses)]

    version = f"{VERSION} {digest(list(require), list(forbid), max_repeats, sentence)}"
    return Reward("rules", reward, version=version, scale=(0.0, 1.0))


def _compiled(key: str, patterns: Sequence[str]) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{WHERE} {key}: {pattern!r} is no regular expression: {error}") from error
    return compiled


def _longest_run(text: str) -> int:
    """Returns how many times the most repeated word, or line that is not empty, stands in a row."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    runs = [len(list(run)) for units in (text.lower().split(), lines) for _, run in groupby(units)]
    return max(runs, default=0)
