"""What a forked child must not keep of its parent: a reward may well use multiprocessing, whose workers can outlive it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_duties: list[Callable[[], None]] = []


@contextmanager
def in_children(duty: Callable[[], None]) -> Iterator[None]:
    """While the context lasts, this is the first thing that every child does which this process forks."""
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
