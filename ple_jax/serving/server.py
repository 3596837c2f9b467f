"""A vLLM server: the requests that are made to it, and what a user should do if it refuses one."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ple_jax.core import retry
from ple_jax.core.errors import UserError
from ple_jax.serving import protocol

T = TypeVar("T")
PATIENCE = retry.Patience(timeout=600.0, retries=5, backoff=1.0)
_SOON = 60.0  # seconds in which one of several answers, where it has nothing to compute or to load
_LONG = ("/v1/completions", "/v1/load_lora_adapter", "/wake_up", "/sleep?level=1")
AGAIN = "and give the same command again: what was sampled is kept"


class Gone(UserError):
    """The error of a server that does not answer or has trouble of its own; `brief` is what happened, without the remedy."""

    def __init__(self, says: str, brief: str):
        super().__init__(says)
        self.brief = brief


@dataclass
class Server:
    """A vLLM server at an address. Nothing is asked of it before the first call."""

    url: str  # http://host:port
    folder: Path  # where the adapters are that it is asked to load; it must see them under the same path
    rank: int  # the --max-lora-rank that it needs
    key: str | None = None  # sent as `Authorization: Bearer ...`
    sleeps: bool = False  # whether it is put to sleep while the backend here computes
    patience: retry.Patience = PATIENCE  # of a completion one second more for every token
    awake: bool | None = None  # None: not known
    alone: bool = True  # no other one can answer in its place, so that it is given all the time there is
    _stop: threading.Event = field(init=False, repr=False, default_factory=threading.Event)  # set: nothing is tried again

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/").removesuffix("/v1")

    # -------------------------------------------------------------- what it does

    @functools.cached_property
    def version(self) -> str:
        """The version of vLLM that the server runs."""
        return self._ask("GET", "/version", read=protocol.version)

    def models(self) -> list[dict[str, Any]]:
        """Returns the models that the server has, adapters included, as /v1/models lists them."""
        return self._ask("GET", "/v1/models", read=protocol.models)

    def answer(self, body: Mapping[str, Any], *, read: Callable[[bytes], T], tokens: int) -> T:
        """Returns what `read` makes of the completion of one request, which has at most `tokens` tokens."""
        return self._ask("POST", "/v1/completions", body, read=read, slack=tokens)

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Keeps failed requests from being tried again while the context lasts."""
        self._stop.set()
        try:
            yield
        finally:
            self._stop.clear()

    def load(self, name: str) -> None:
        """Loads the adapter in the subfolder `name` of the server's folder, under that name."""
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
        """Wakes the server, if it sleeps at times."""
        if self.sleeps and not self.awake:
            self._ask("POST", "/wake_up", read=bytes)
            self.awake = True

    def rest(self) -> None:
        """Puts the server to sleep before something is computed here.

        Its weights go to the host's memory, and its KV cache is dropped. This is sleep level 1, and not 2, which drops the
        weights too.
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
        """Sends a request and returns what `read` makes of the answer.

        Raises:
            UserError: there is no usable answer; the message says what to do.
        """
        timeout, usual, backoff = self.patience
        if not self.alone:
            usual = min(usual, 1)
            timeout = timeout if path in _LONG else min(timeout, _SOON)
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
            says = f"{self.url}{path}: {why}; {self._remedy(path, status, why)}, {AGAIN}"
            # one that was started again has no adapter of ours, until it is asked the next time
            gone = status is None or (status == 404 and path == "/v1/completions" and not self.alone)
            raise (Gone(says, f"{self.url}{path}: {why}") if gone else UserError(says)) from error

    def _remedy(self, path: str, status: int | None, why: str) -> str:
        """Says what to do about a request that failed; `status` is None unless the server said that the request is wrong."""
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
