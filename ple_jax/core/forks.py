"""Duties of forked children, which must not keep all that their parent has: a reward may well use multiprocessing, whose
workers can outlive the parent.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_duties: list[Callable[[], None]] = []


@contextmanager
def in_children(duty: Callable[[], None]) -> Iterator[None]:
    """Calls `duty`, while the context lasts, in every child that this process forks, before the child does anything else."""
    _duties.append(duty)
    try:
        yield
    finally:
        if duty in _duties:  # and not in such a child, which has none any more
            _duties.remove(duty)


def _born() -> None:
    while _duties:  # the newest first, as contexts end
        _duties.pop()()


os.register_at_fork(after_in_child=_born)
