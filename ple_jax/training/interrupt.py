"""Stops a program on SIGTERM or SIGINT: at the next safe point, and within 20 seconds whatever it is doing.

Everything on disk is consistent at any moment (the journal and the checkpoints see to that), so leaving in the middle of a
compilation loses only the unit of work in hand.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType

from ple_jax.core.forks import in_children

_GRACE = 20.0  # seconds until the program is ended; machines that are taken back give 30
_ONE = 1.0  # seconds within which two signals are one
MESSAGE = "stopped; nothing finished is lost: give the same command again to continue"


_in_force: "list[Stop]" = []


def ask(number: int) -> None:
    """Sends this process the signal of that number, so that it stops because another process was asked to. If a stop was
    asked for here already, it has no effect.
    """
    if not any(stop.asked for stop in _in_force):
        os.kill(os.getpid(), number)


class Interrupted(KeyboardInterrupt):
    """The exception by which a `Stop` ends a program. It is not an Exception, so that handlers of errors do not catch it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """A context in which SIGTERM and SIGINT ask for a stop instead of ending the program at once.

    Python runs signal handlers only between bytecodes, and a compilation may take a minute without one. So a thread waits at
    the pipe that the interpreter's C handler writes to, and ends the program when `_GRACE` seconds are over. Forked children
    have neither the handlers nor the pipe.

    Args:
        at_once: for programs without safe points: SIGTERM raises `Interrupted` wherever the program is, as SIGINT does
            without a Stop.
    """

    def __init__(self, *, at_once: bool = False):
        self._at_once = at_once
        self._number = 0
        self._asked = 0.0  # when, in seconds of the monotonic clock
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Stop":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        numbers = (signal.SIGTERM,) if self._at_once else (signal.SIGTERM, signal.SIGINT)
        self._handlers = {number: signal.signal(number, self._asked_for) for number in numbers}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._stack.enter_context(in_children(self._forget))
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        _in_force.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        _in_force.remove(self)
        self._stack.close()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._write)  # ends the thread
        self._thread.join(1.0)
        if kind is None:
            self.check()  # was asked for after the last safe point

    def _forget(self) -> None:
        """Restores, in a forked child, the signal handlers from before, and closes the child's copy of the pipe: signals
        that the child receives are not reported to the parent.
        """
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)

    def _asked_for(self, number: int, frame: object) -> None:
        if self._at_once:
            raise Interrupted(number)

    @property
    def asked(self) -> bool:
        """Whether a stop was asked for."""
        return bool(self._number)

    def check(self) -> None:
        """Raises `Interrupted` if a stop was asked for; called between units of work."""
        if self._number:
            raise Interrupted(self._number)

    def _watch(self) -> None:
        for number in self._bytes():
            if number not in self._handlers:
                continue
            if self._number:
                # asked twice: at once. But of Ctrl-C a launcher's processes hear twice, from the terminal and from it
                if time.monotonic() - self._asked > _ONE:
                    self._leave()
                continue
            self._number, self._asked = number, time.monotonic()
            if not self._at_once:
                print(f"\n{signal.Signals(number).name}: stopping at the next safe point", file=sys.stderr, flush=True)
            timer = threading.Timer(_GRACE, self._leave)
            timer.daemon = True
            timer.start()

    def _bytes(self) -> Iterator[int]:
        while data := os.read(self._read, 64):
            yield from data
        os.close(self._read)

    def _leave(self) -> None:
        print(MESSAGE, file=sys.stderr, flush=True)
        os._exit(128 + self._number)
