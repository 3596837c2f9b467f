"""Errors that a user can mend, each said in one line."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """An error that the user can mend; the entry prints it as one line and exits with code 2."""


class Damaged(UserError):
    """The error for a file of a run that is not as it was written.

    If what the file held can be made again, that is done without a message.
    """


class Unusable(UserError):
    """The error for one record that cannot be used.

    It has a kind, one or two words, and a reason, the end of a sentence that begins with the record's place.
    """

    def __init__(self, kind: str, reason: str, place: str = ""):
        super().__init__(f"{place} {reason}".lstrip())
        self.kind, self.reason = kind, reason


SLIP = 0.8  # a likeness of words above which one is a slip for the other, where it may well be a word of its own


def suggestion(word: str, words: Iterable[str], *, files: bool = False, least: float = 0.6) -> str:
    """Suggests the nearest of `words`, but not the word itself, as the end of a sentence; returns "" if none is near.

    `tau0` also finds `ple.tau_0`, by its last part. With `files`, the part after a dot is not compared alone. What is less
    like the word than `least`, from 0 to 1, is not near.
    """
    words = [w for w in words if w != word]
    by_last_part = {} if files else {w.rsplit(".", 1)[-1]: w for w in words}
    close = difflib.get_close_matches(word, words, n=1, cutoff=least) or [
        by_last_part[part] for part in difflib.get_close_matches(word.rsplit(".", 1)[-1], by_last_part, n=1, cutoff=least)
    ]
    return f"; did you mean {close[0]!r}?" if close else ""


_FULL = ("No space left on device", "Disk quota exceeded", "File too large", "Read-only file system", "Input/output error")


def of_the_machine(error: BaseException) -> str:
    """Returns the message for an error of the disk or the memory, not of the user or the program; "" for other errors."""
    text = str(error).strip()
    brief = text.splitlines()[0][:200] if text else type(error).__name__
    # before memory: of a full disk TensorStore says RESOURCE_EXHAUSTED too
    if any(problem in text for problem in _FULL):
        return f"the disk cannot be written ({brief}); make room there, or mend it, and give the same command again"
    if isinstance(error, FileNotFoundError) and error.filename and not Path(os.fsdecode(error.filename)).parent.exists():
        return f"the folder of {os.fsdecode(error.filename)} is gone: something removed it while the program was at work"
    # XLA's name for it on every platform, torch's on a device, and the system's
    names = ("resource_exhausted", "out of memory", "cannot allocate memory")
    if isinstance(error, MemoryError) or any(name in text.lower() for name in names):
        return (
            f"not enough memory ({brief}); lower --config.optimizer.micro_queries or set --config.model.remat=full, with the"
            " same --workdir, or lower --config.sampling.width, which makes another run"
        )
    return ""
