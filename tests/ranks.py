"""Runs the entry several times, each with so many processes, as torchrun would start them; they are forked, so that torch is
imported once.

    python tests/ranks.py NAME=RANKS:ARGUMENTS ...    ARGUMENTS of the entry, split as a shell would

Prints a JSON object, NAME -> exit codes of its processes in order. $FAIL=RANK: that process runs out of memory in a step.
"""

import json
import os
import shlex
import sys

from forked import entry, processes

import torch_ascend  # noqa: F401  (its environment, before torch is imported)
from ple_jax import modes  # noqa: F401
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


def run(ranks: int, arguments: list[str]) -> list[int]:
    def one(rank: int, port: int) -> int:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        failing(rank)
        return entry(arguments)

    return processes(ranks, one)


if __name__ == "__main__":
    answers = {}
    for argument in sys.argv[1:]:
        name, _, rest = argument.partition("=")
        ranks, _, line = rest.partition(":")
        answers[name] = run(int(ranks), shlex.split(line))
    print(json.dumps(answers))
