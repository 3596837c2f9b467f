"""Runs the entry in this process and kills it, as `kill -9` would, at the n-th call of one function.

    python tests/killed.py MODULE:QUALIFIED.NAME N before|after MAIN-ARGUMENTS...

N = 0 never kills. Every call of Journal.keep is counted into the file named by $GENERATED, a line each: which journal, and
how many responses had ended. A run of one backend does not import what the other one is made of: torch's has no JAX.
"""

import functools
import importlib
import os
import signal
import sys
from pathlib import Path

from ple_jax import main


def patch(where: str, wrapper) -> None:
    module, _, qualified = where.partition(":")
    owner = importlib.import_module(module)
    *parents, name = qualified.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, wrapper(getattr(owner, name)))


def killing(n: int, when: str):
    calls = 0

    def wrapper(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == n and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    return wrapper


def counting(function):
    @functools.wraps(function)
    def call(self, responses, *args, **kwargs):
        with Path(os.environ["GENERATED"]).open("a") as file:
            file.write(f"{self.path.parent.name}/{self.path.stem} {len(responses)}\n")
        return function(self, responses, *args, **kwargs)

    return call


if __name__ == "__main__":
    where, n, when, *arguments = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parent.parent))
    if "--backend=torch" in arguments:
        other: tuple[str, ...] = ("jax", "jaxlib", "flax", "optax", "orbax", "qwix")
        sys.modules.update(dict.fromkeys(other))  # as if they were not installed
    else:
        other = ("torch",)
    patch("ple_jax.training.journal:Journal.keep", counting)
    patch(where, killing(int(n), when))
    sys.argv = ["ple_jax.main", *arguments]
    from ple_jax import main

    try:
        main.cli()
    finally:
        if imported := [name for name in other if sys.modules.get(name) is not None]:
            print(f"{', '.join(imported)} was imported", file=sys.stderr, flush=True)
            os._exit(97)
