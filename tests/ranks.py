"""Runs the entry several times, each with so many processes, as torchrun would start them; they are forked, so that torch is
imported once.

    python tests/ranks.py NAME=RANKS:ARGUMENTS ...    ARGUMENTS of the entry, split as a shell would

Prints a JSON object, NAME -> exit codes of its processes in order. $FAIL=RANK: that process runs out of memory in a step.
"""

import json
import os
import shlex
import socket
import sys
import traceback

import torch_ascend  # noqa: F401  (its environment, before torch is imported)
from ple_jax import (
    main,
    modes,  # noqa: F401
)
from torch_ascend import (
    backend,  # noqa: F401
    forward,
)


def failing(rank: int) -> None:
    if os.environ.get("FAIL") != str(rank):
        return
    whole, calls = forward.hidden_states, 0

    def hidden_states(*arguments):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise RuntimeError("DefaultCPUAllocator: out of memory")
        return whole(*arguments)

    forward.hidden_states = hidden_states


def one(rank: int, ranks: int, port: int, arguments: list[str]) -> int:
    """One process of a run; its exit code."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    sys.argv = ["ple_jax.main", *arguments]
    failing(rank)
    try:
        main.cli()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(ranks: int, arguments: list[str]) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        sys.stdout.flush()
        if not (child := os.fork()):
            os.dup2(2, 1)  # what a run prints is not the answer
            code = one(rank, ranks, port, arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    answers = {}
    for argument in sys.argv[1:]:
        name, _, rest = argument.partition("=")
        ranks, _, line = rest.partition(":")
        answers[name] = run(int(ranks), shlex.split(line))
    print(json.dumps(answers))
