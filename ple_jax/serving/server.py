"""A vLLM server: what is asked of it, and what a user should do where it refuses."""

import contextlib
import functools
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ple_jax.core import retry
from ple_jax.core.errors import UserError
from ple_jax.serving import protocol

T = TypeVar("T")
PATIENCE = retry.Patience(timeout=600.0, retries=5, backoff=1.0)
_LOOK = 1.0  # seconds after which who waits for completions is asked whether they are still wanted
AGAIN = "and give the same command again: what was sampled is kept"


@dataclass
class Server:
    """A server by its address. Nothing is asked of it before the first call."""

    url: str  # http://host:port
    folder: Path  # where the adapters are that it is asked to load; it must see them under the same path
    rank: int  # the --max-lora-rank that it needs
    key: str | None = None  # sent as `Authorization: Bearer ...`
    sleeps: bool = False  # whether it is put to sleep while the backend here computes
    patience: retry.Patience = PATIENCE  # of a completion one second more for every token
    awake: bool | None = None  # None: not known
    _stop: threading.Event = field(init=False, repr=False, default_factory=threading.Event)  # set: nothing is tried again

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/").removesuffix("/v1")

    # -------------------------------------------------------------- what it does

    @functools.cached_property
    def version(self) -> str:
        """vLLM's."""
        return self._ask("GET", "/version", read=protocol.version)

    def models(self) -> list[dict[str, Any]]:
        """What it serves, adapters included, as /v1/models has it."""
        return self._ask("GET", "/v1/models", read=protocol.models)

    def complete(
        self, bodies: Mapping[int, Mapping[str, Any]], *, read: Callable[[bytes], T], width: int, tokens: int
    ) -> Generator[dict[int, T], None, None]:
        """The completions of all requests as they come, by number: `width` requests under way at once, of at most `tokens`
        tokens each. The first that fails ends all; what had come is given before.
        """
        pool = ThreadPoolExecutor(width)
        try:
            ask = functools.partial(self._ask, "POST", "/v1/completions", read=read, slack=tokens)
            waiting = {pool.submit(ask, body): number for number, body in bodies.items()}
            while waiting:
                done, _ = wait(waiting, timeout=_LOOK, return_when=FIRST_COMPLETED)
                numbers = {future: waiting.pop(future) for future in done}
                yield {number: future.result() for future, number in numbers.items() if future.exception() is None}
                for future in numbers:
                    future.result()
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
            self._stop.clear()

    def load(self, name: str) -> None:
        """Loads the adapter in the folder of that name."""
        body = {"lora_name": name, "lora_path": str(self.folder / name)}
        try:
            self._ask("POST", "/v1/load_lora_adapter", body, read=bytes, retries=min(self.patience.retries, 1))
        except UserError:
            # an answer that was lost may have come after the adapter was loaded, and then another try is refused
            if name not in [model["id"] for model in self.models()]:
                raise

    def unload(self, name: str) -> None:
        """Unloads an adapter, if it is there."""
        # one that is not there any more, or cannot be unloaded now, does no harm: no name ever has other weights
        with contextlib.suppress(UserError):
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name}, read=bytes, retries=0)

    def wake(self) -> None:
        """Wakes it, if it sleeps at times."""
        if self.sleeps and not self.awake:
            self._ask("POST", "/wake_up", read=bytes)
            self.awake = True

    def rest(self) -> None:
        """Puts it to sleep before something is computed here: weights to the host's memory, KV cache dropped.

        Level 1 and not 2, which drops the weights too.
        """
        if self.sleeps and self.awake is not False:
            self._ask("POST", "/sleep?level=1", read=bytes)
            self.awake = False

    # -------------------------------------------------------------- requests

    def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        read: Callable[[bytes], T],
        slack: float = 0.0,
        retries: int | None = None,
    ) -> T:
        """What `read` makes of the answer; a UserError that says what to do where there is none."""
        timeout, usual, backoff = self.patience
        try:
            return retry.request(
                method,
                self.url + path,
                body,
                read=read,
                headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
                patience=retry.Patience(timeout + slack, usual if retries is None else retries, backoff),
                stop=self._stop,
            )
        except retry.Failed as error:
            why = str(error)
            status = error.status if isinstance(error, retry.Refused) else None
            raise UserError(f"{self.url}{path}: {why}; {self._remedy(path, status, why)}, {AGAIN}") from error

    def _remedy(self, path: str, status: int | None, why: str) -> str:
        """What to do about a request that failed; `status` is None where the server did not say that it is wrong."""
        if status == 200:  # a completion that is none for us: `why` says it all
            return "mend that"
        if status in (401, 403):
            return "name the environment variable with its key, --config.sampling.server_key_env=NAME"
        if path == "/v1/load_lora_adapter":
            options = f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora --max-lora-rank {self.rank}"
            if status in (404, 405) and "adapter" not in why.lower():
                return f"it does not load adapters: start it with {options}"
            if status == 404:
                return f"it does not see {self.folder}: run it on this machine, or where that is the same folder"
            return f"start it on the run's base model, with {options}"
        if path.startswith(("/sleep", "/wake_up")):
            return "start it with VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode, or unset --config.sampling.server_sleep"
        if path == "/v1/completions" and status is not None:
            return "the adapter is gone: was the server started again?" if status == 404 else "mend that"
        return "see that vLLM runs there (or unset --config.sampling.server, which is another run)"
