"""Several vLLM servers as one: the adapter is loaded on all, and each request goes to the one with the fewest under way.

A server that is gone is left out, and the requests that it had not answered go to the others: every request is answered
once, by one of them. The next time all are tried again.
"""

import contextlib
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from ple_jax.core import retry
from ple_jax.serving.server import Gone, Server

T = TypeVar("T")
_LOOK = 1.0  # seconds after which who waits for completions is asked whether they are still wanted


class Fleet:
    """One or more servers of the same base model. Nothing is asked of them before the first call."""

    def __init__(self, servers: Sequence[Server], *, log: Callable[[str], None] = print):
        """Takes the servers, and asks nothing of them yet.

        Args:
            servers: at least one; all have the same folder.
            log: takes a message about a server that is left out.
        """
        self.servers, self._log = list(servers), log
        self._here = set(range(len(self.servers)))  # numbers of those that are not left out
        self._under_way = [0] * len(self.servers)  # requests
        self._lock = threading.Lock()
        self._stopping = threading.Event()  # set: nobody waits for what is under way

    @property
    def url(self) -> str:
        """The addresses of all servers, for messages."""
        return ", ".join(server.url for server in self.servers)

    @property
    def folder(self) -> Path:
        """The folder of the adapters that the servers are asked to load."""
        return self.servers[0].folder

    @property
    def patience(self) -> retry.Patience:
        return self.servers[0].patience

    @patience.setter
    def patience(self, patience: retry.Patience) -> None:
        for server in self.servers:
            server.patience = patience

    @property
    def version(self) -> str:
        """The version of vLLM that the servers run; all versions, if they differ."""
        found: list[str] = []
        self.each(lambda server: found.append(server.version))
        return ", ".join(sorted(set(found)))

    def each(self, call: Callable[[Server], Any]) -> None:
        """Makes the same call to all servers, including those that were left out before.

        Raises:
            UserError: a server refuses, or all are gone.
        """
        self._here = set(range(len(self.servers)))
        for number, server in enumerate(self.servers):
            server.alone = len(self._here) == 1
            try:
                call(server)
            except Gone as error:
                self._leave_out(number, error)

    def rest(self) -> None:
        """Puts the servers to sleep, if they sleep at times, before something is computed in this process."""
        for number in sorted(self._here) if self.servers[0].sleeps else ():
            try:
                self.servers[number].rest()
            except Gone as error:
                self._leave_out(number, error)

    def complete(
        self, bodies: Mapping[int, Mapping[str, Any]], *, read: Callable[[bytes], T], width: int, tokens: int
    ) -> Generator[dict[int, T], None, None]:
        """Yields the completions of all requests as they arrive, by number; while none arrives, {} about once a second.

        `width` requests are under way at once, of at most `tokens` tokens each. The first that fails ends all; what had
        arrived is yielded before.
        """
        pool, failed = ThreadPoolExecutor(width), threading.Event()

        def answer(body: Mapping[str, Any]) -> T:
            if failed.is_set():  # here: before this thread asks for the next one
                raise CancelledError
            try:
                return self._answer(body, read, tokens)
            except BaseException:
                failed.set()
                raise

        try:
            waiting = {pool.submit(answer, body): number for number, body in bodies.items()}
            while waiting:
                done, _ = wait(waiting, timeout=_LOOK, return_when=FIRST_COMPLETED)
                numbers = {future: waiting.pop(future) for future in done}
                yield {number: future.result() for future, number in numbers.items() if future.exception() is None}
                for future in numbers:
                    if not isinstance(future.exception(), CancelledError):  # the error itself comes too
                        future.result()
        finally:
            self._stopping.set()
            with contextlib.ExitStack() as stack:
                for server in self.servers:
                    stack.enter_context(server.stopping())
                pool.shutdown(cancel_futures=True)
            self._stopping.clear()

    def _answer(self, body: Mapping[str, Any], read: Callable[[bytes], T], tokens: int) -> T:
        """Returns one completion, by whichever server is there."""
        while True:
            number = self._least_busy()
            try:
                self.servers[number].alone = len(self._here) == 1
                return self.servers[number].answer(body, read=read, tokens=tokens)
            except Gone as error:
                if self._stopping.is_set():
                    raise
                self._leave_out(number, error)
            finally:
                with self._lock:
                    self._under_way[number] -= 1

    def _least_busy(self) -> int:
        with self._lock:
            number = min(self._here, key=lambda i: (self._under_way[i], i))
            self._under_way[number] += 1
            return number

    def _leave_out(self, number: int, error: Gone) -> None:
        """Leaves a server out until all are asked again. If it is the last one, its error is that of all, and is raised."""
        with self._lock:
            if self._here <= {number}:
                raise error
            if number in self._here:
                self._here.discard(number)
                self._log(f"warning: {error.brief}; it is left out, and the other servers answer in its place")
