"""Runs the entry several times, each in so many processes of JAX with so many CPU devices each; they are forked, so that
what it needs is imported once.

    python tests/hosts.py NAME=PROCESSES x DEVICES:ARGUMENTS ...    ARGUMENTS of the entry, split as a shell would

Prints a JSON object, NAME -> exit codes of its processes in order. $FAIL=PROCESS:KIND: in its second step that process has
too little memory (memory), finds something to mend (mend), or has a bug (bug). $KILL=PROCESS:SIGNAL: it gets that signal
then.
"""

import json
import os
import shlex
import signal
import sys
import time

import jax
from forked import entry, processes

import ple_jax.backend.processes  # noqa: F401
from ple_jax import modes  # noqa: F401
from ple_jax.backend import backend
from ple_jax.core import together
from ple_jax.core.errors import UserError


def disturbed(process: int) -> None:
    """This process's second step is not what it was."""
    fails, kills = (os.environ.get(name, "").split(":") for name in ("FAIL", "KILL"))
    if str(process) not in (fails[0], kills[0]):
        return
    whole, calls = backend.JaxBackend.update.__wrapped__, 0

    def update(self, *arguments, **options):
        nonlocal calls
        calls += 1
        if calls == 2 and kills[0]:
            os.kill(os.getpid(), getattr(signal, kills[1]))
        if calls == 2 and fails[0]:
            if fails[1] == "memory":
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes.")
            raise UserError("the disk of this host is missing") if fails[1] == "mend" else KeyError("a bug")
        return whole(self, *arguments, **options)

    backend.JaxBackend.update = together.together(update)


def run(count: int, devices: int, arguments: list[str]) -> list[int]:
    def one(process: int, port: int) -> int:
        # most of the time would go into optimising what runs once
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        launched = ["--coordinator", f"localhost:{port}", "--processes", str(count), "--process", str(process)]
        disturbed(process)
        return entry([*arguments, *launched])

    return processes(count, one)


if __name__ == "__main__":
    answers = {}
    for argument in sys.argv[1:]:
        name, _, rest = argument.partition("=")
        size, _, line = rest.partition(":")
        began = time.monotonic()
        answers[name] = run(*map(int, size.split("x")), shlex.split(line))
        print(f"{name} ended after {time.monotonic() - began:.1f} s", file=sys.stderr)
    print(json.dumps(answers))
