"""Named principle sets: the text that guides the principled response.

A file holds a version line, a heading, numbered rules ("1. ..."), and possibly an ending after an empty line.
"""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from ple_jax.core import identity
from ple_jax.core.config import find, names
from ple_jax.core.errors import UserError, suggestion
from ple_jax.core.noise import uniforms

NONE = "none"  # the set without a rule: its prompts are the plain ones


class Principles(NamedTuple):
    """A set of rules from one file or from several."""

    name: str
    version: str  # of every file: "helpful_harmless 1 + concise 1"; one without a version has a digest of its text
    heading: str  # what stands before the rules; a file without numbered rules is all heading
    rules: tuple[str, ...]  # without their numbers
    ending: str

    @property
    def text(self) -> str:
        """The text that goes into the prompt; for a single file it is what the file holds after its version line."""
        numbered = "\n".join(f"{number}. {rule}" for number, rule in enumerate(self.rules, 1)).rstrip("\n")
        upper = "\n".join(part for part in (self.heading, numbered) if part)
        return "\n\n".join(part for part in (upper, self.ending) if part)

    @property
    def digest(self) -> str:
        """Hex digits that stand for the text, and tell it from others of the same name."""
        return identity.digest([self.text.encode()])


def load(source: str) -> Principles:
    """Loads a named set or a text file of your own, or several of them: "helpful_harmless+mine.txt".

    Several sets are joined: the heading of the first, the rules of all in their order (equal ones once), and the last ending
    that there is.

    Raises:
        UserError: a part is neither a named set nor a file, is empty or not UTF-8, or has no numbered rules to add to the
            first.
    """
    parts = [source] if Path(source).is_file() else [part.strip() for part in source.split("+")]
    first, *others = (_one(part) for part in parts)
    if not others:
        return first
    for other in others:
        if not other.rules:
            raise UserError(
                f"principles {other.name!r} have no numbered rules to add to {first.name!r};"
                ' begin every rule on a line of its own with its number: "1. "'
            )
    sets = (first, *others)
    rules: dict[str, str] = {}
    for rule in (rule for one in sets for rule in one.rules):
        rules.setdefault(rule.strip(), rule)
    endings = [one.ending for one in sets if one.ending]
    version = " + ".join(one.version for one in sets)
    return Principles(source, version, first.heading, tuple(rules.values()), endings[-1] if endings else "")


def choose(principles: Principles, k: int, *, seed: int, query_id: str) -> str:
    """Returns the text with `k` of the rules, in their original order.

    They are drawn from the seed and the query alone, so a query has the same rules in every iteration.

    Args:
        k: the number of rules; 0 for all of them.

    Raises:
        UserError: there are fewer than `k` rules.
    """
    n = len(principles.rules)
    if k > n:
        raise UserError(
            f"config.principles_per_query is {k}, but principles {principles.name!r} have {n} numbered rules;"
            f" set --config.principles_per_query={n}"
        )
    if k == 0:
        return principles.text
    drawn = uniforms(seed, 0, query_id, "principles", 0, n).argsort(kind="stable")[:k]
    return principles._replace(rules=tuple(principles.rules[i] for i in sorted(drawn))).text


def _one(source: str) -> Principles:
    built_in = find("prompts/principles", ".txt", source)
    path = built_in or Path(source)
    if not path.is_file():
        known = names("prompts/principles", ".txt")
        raise UserError(f"principles {source!r}: neither a file nor one of {', '.join(known)}{suggestion(source, known)}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except PermissionError as error:
        raise UserError(f"principles file {path} may not be read by this user ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"principles file {path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    version = ""
    if lines and lines[0].startswith("# version:"):
        version = lines.pop(0).removeprefix("# version:").strip()
    text = "\n".join(lines).strip()
    if not text and source != NONE:
        raise UserError(f"principles file {path} is empty; write a few rules into it")
    version = version or hashlib.sha256(text.encode()).hexdigest()[:8]
    heading, *rules = (part.removesuffix("\n") for part in re.split(r"^\d+\. ", text, flags=re.MULTILINE))
    ending = ""
    if rules:  # all other empty lines are between rules, and stay at the end of theirs
        rules[-1], _, ending = rules[-1].partition("\n\n")
    return Principles(source, f"{path.stem if path == built_in else path.name} {version}", heading, tuple(rules), ending)
