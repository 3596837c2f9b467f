"""Several processes of the entry, forked, so that what a test's program has imported is imported once."""

import os
import socket
import sys
import traceback
from collections.abc import Callable

from ple_jax import main


def entry(arguments: list[str]) -> int:
    """The exit code of the entry with these arguments, in this process."""
    sys.argv = ["ple_jax.main", *arguments]
    try:
        main.cli()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def processes(count: int, one: Callable[[int, int], int]) -> list[int]:
    """Exit codes of so many processes at a time, in order: `one(number, port)` of each, with a port that was free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(count):
        sys.stdout.flush()
        if not (child := os.fork()):
            os.dup2(2, 1)  # what a run prints is not the answer
            code = one(number, port)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
