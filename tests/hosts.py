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
import socket
import sys
import time
import traceback

import jax

from ple_jax import (
    main,
    modes,  # noqa: F401
)
from ple_jax.backend import (
    backend,
    processes,  # noqa: F401
)
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


def one(process: int, count: int, devices: int, port: int, arguments: list[str]) -> int:
    """One process of a run; its exit code."""
    # most of the time would go into optimising what runs once
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    launched = ["--coordinator", f"localhost:{port}", "--processes", str(count), "--process", str(process)]
    sys.argv = ["ple_jax.main", *arguments, *launched]
    disturbed(process)
    try:
        main.cli()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(count: int, devices: int, arguments: list[str]) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for process in range(count):
        sys.stdout.flush()
        if not (child := os.fork()):
            os.dup2(2, 1)  # what a run prints is not the answer
            code = one(process, count, devices, port, arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    answers = {}
    for argument in sys.argv[1:]:
        name, _, rest = argument.partition("=")
        size, _, line = rest.partition(":")
        began = time.monotonic()
        answers[name] = run(*map(int, size.split("x")), shlex.split(line))
        print(f"{name} ended after {time.monotonic() - began:.1f} s", file=sys.stderr)
    print(json.dumps(answers))
