"""What a user can mend, said in one line."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend; the entry prints it as one line and exits with code 2."""


class Damaged(UserError):
    """A file of a run that is not as it was written. Where what it held can be made again, it is, without a word."""


class Unusable(UserError):
    """One record that cannot be used: a kind, one or two words, and the end of a sentence that begins with its place."""

    def __init__(self, kind: str, reason: str, place: str = ""):
        super().__init__(f"{place} {reason}".lstrip())
        self.kind, self.reason = kind, reason


def suggestion(word: str, words: Iterable[str], *, files: bool = False) -> str:
    """The nearest of `words`, but not the word itself, as the end of a sentence, or nothing.

    `tau0` also finds `ple.tau_0`; with `files` what follows a dot is no name.
    """
    words = [w for w in words if w != word]
    by_last_part = {} if files else {w.rsplit(".", 1)[-1]: w for w in words}
    close = difflib.get_close_matches(word, words, n=1) or [
        by_last_part[part] for part in difflib.get_close_matches(word.rsplit(".", 1)[-1], by_last_part, n=1)
    ]
    return f"; did you mean {close[0]!r}?" if close else ""
