"""Runs code that a model wrote, and tests of it, within limits.

The reward `code` starts this file as a program and never imports it.

It reads {"code", "tests", "seconds", "megabytes", "mark"} as JSON from stdin. On stdout it writes "MARK ready alone", or
"MARK ready" where the system gives it no namespaces, and then "MARK NUMBER" for each test, as soon as that test passes.
"""

import contextlib
import ctypes
import json
import math
import os
import resource
import signal
import sys
import types
from collections.abc import Iterator

_USERS, _NETWORK, _PROCESSES = 0x10000000, 0x40000000, 0x20000000  # CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWPID of Linux
_DIES_WITH_PARENT, _DROP, _NO_NEW_PRIVILEGES = 1, 24, 38  # PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS
_CAPABILITIES = 64  # more than there are
_FILE = 16 << 20  # bytes of the largest file


def alone(libc: ctypes.CDLL) -> bool:
    """Leaves all networks and other processes, as a user of its own who has no right to return; says whether that worked.

    Processes that are forked from here on live in the new namespaces.
    """
    with contextlib.suppress(AttributeError, OSError):
        return libc.unshare(_USERS | _NETWORK | _PROCESSES) == 0
    return False


def without_rights(libc: ctypes.CDLL) -> None:
    """Gives up every capability of this process permanently."""
    with contextlib.suppress(AttributeError, OSError):
        for number in range(_CAPABILITIES):
            libc.prctl(_DROP, number, 0, 0, 0)
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc.capset(header, none)


def dies_with_parent(libc: ctypes.CDLL) -> None:
    with contextlib.suppress(AttributeError, OSError):
        libc.prctl(_DIES_WITH_PARENT, signal.SIGKILL, 0, 0, 0)


def limit(seconds: float, megabytes: int) -> None:
    """Limits this process permanently: CPU time, memory (in 2^20 bytes), the size of files, and new processes.

    `seconds` also limit the time from now on, whether the process computes or waits.
    """
    wanted = {
        "RLIMIT_CPU": math.ceil(seconds) + 1, "RLIMIT_AS": megabytes << 20, "RLIMIT_FSIZE": _FILE, "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 0,  # which root does not heed
    }  # fmt: skip
    for name, most in wanted.items():
        with contextlib.suppress(AttributeError, OSError, ValueError):  # of another system, or below what is allowed
            resource.setrlimit(getattr(resource, name), (most, most))
    signal.setitimer(signal.ITIMER_REAL, seconds)  # whose signal ends a process that does not catch it


def passed(code: str, tests: list[str]) -> Iterator[int]:
    """Yields the number of each test that passes, as soon as it does; none if the code itself fails."""
    module = types.ModuleType("response")
    sys.modules["response"] = module  # where dataclasses and pickle look for it
    try:
        exec(compile(code, "response", "exec"), module.__dict__)
    except BaseException:  # it may say sys.exit() too
        return
    for number, test in enumerate(tests):
        try:
            exec(compile(test, "test", "exec"), dict(module.__dict__))
        except BaseException:
            continue
        yield number


def run(asked: dict, said: int) -> None:
    """Limits this process, runs the code and its tests in it, and writes what passed to the file descriptor `said`."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    limit(asked["seconds"], asked["megabytes"])
    for number in passed(asked["code"], asked["tests"]):
        os.write(said, f"{asked['mark']} {number}\n".encode())


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    dies_with_parent(libc)
    asked, said = json.load(sys.stdin), os.dup(1)
    own = alone(libc)
    # the first process of a world heeds no signal that it does not catch, and all others end with it: it only waits
    for _ in range(2 if own else 0):
        if child := os.fork():
            os.waitpid(child, 0)
            os._exit(0)
        dies_with_parent(libc)
    without_rights(libc)
    os.write(said, f"{asked['mark']} ready{' alone' if own else ''}\n".encode())
    run(asked, said)


if __name__ == "__main__":
    main()
