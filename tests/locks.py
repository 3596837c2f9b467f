"""Locks as file systems other than a local one have them."""

import errno
import fcntl
import os
from typing import IO

_FLOCK = fcntl.flock


def as_on_nfs(file: IO, operation: int) -> None:
    """Does what `fcntl.flock` does on NFS: an exclusive lock needs a file that is open for writing."""
    if operation & fcntl.LOCK_EX and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    _FLOCK(file, operation)
