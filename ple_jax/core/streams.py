"""Standard output and error that outlive their readers: training goes on when `head` has seen enough and exits."""

import errno
import io
import os
from typing import Any, TextIO

_NOBODY = (errno.EPIPE, errno.EIO)  # a pipe without a reader, a terminal that was closed


class _Raw(io.FileIO):
    """A file whose reader may go away: from then on, what is written to its descriptor is discarded."""

    def write(self, data: Any) -> int:  # any buffer
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _NOBODY:
                raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return len(data)


def lasting(stream: TextIO) -> TextIO:
    """Wraps a stream so that it does not fail when its reader is gone; returns one that is no file as it is."""
    try:
        stream.flush()
        raw = _Raw(stream.fileno(), "wb", closefd=False)
    except (AttributeError, OSError, ValueError):  # None, or a text in memory
        return stream
    through = bool(getattr(stream, "write_through", False))
    return io.TextIOWrapper(
        raw if through else io.BufferedWriter(raw),  # as python -u has it
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=bool(stream.line_buffering),
        write_through=through,
    )
