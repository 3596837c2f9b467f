"""Asks servers for numbers that rate texts: requests are retried, a few run at a time, and what came before a failure is
kept. Rewards and judges use it, for reward servers and for language models with OpenAI's chat completions alike.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import KW_ONLY, dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

import numpy as np
from jaxtyping import Float64

from ple_jax.core import retry
from ple_jax.core.answers import Incomplete
from ple_jax.core.errors import UserError
from ple_jax.core.plugins import check_types
from ple_jax.core.secrets import from_environment, redacted

_OPTIONS = ("url", "size", "concurrency", "timeout", "retries", "backoff", "max_failures", "api_key_env", "headers")
_LONGEST = 86400.0  # seconds


def _split(url: str) -> SplitResult | None:
    """Splits an address into its parts; returns None if it is no valid address."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # which is read when it is asked for
        return parts
    except ValueError:
        return None


@dataclass
class Endpoint:
    """A server that gives numbers for texts. Called with columns of texts (prompts and responses, say), it returns a number
    for every row.

    A request that fails for good leaves NaN for its rows.

    Raises:
        UserError: an option has an invalid value, or an environment variable is not set.
        Incomplete: in a call, after a request that retries cannot help, too many failures in a row, or `cancel`.
    """

    url: str  # where requests are posted
    _: KW_ONLY
    where: str  # the config key that holds these options, for errors
    body: Callable[..., Mapping[str, Any]]  # the JSON of a request, from the columns of some rows
    # the numbers in the JSON of an answer, given how many are expected; ValueError where they are not there
    read: Callable[[Any, int], Sequence[float]]
    size: int  # rows of one request
    concurrency: int  # requests under way at once
    timeout: float = 60.0  # seconds from a request to the last byte of its answer
    # tries after the first: if no connection comes about or it breaks, on status 408, 429 and 5xx, and on answers that
    # cannot be read
    retries: int = 5
    backoff: float = 1.0  # seconds before the first retry, doubled for every other; a longer Retry-After is honoured
    max_failures: int = 4  # so many requests that failed one after the other stop it all
    api_key_env: str | None = None  # environment variable whose value is sent as `Authorization: Bearer ...`
    headers: Mapping[str, str] = field(default_factory=dict)  # environment variables by the header for their value
    _secrets: dict[str, str] = field(init=False, repr=False)  # what no message may show
    _stops: set[threading.Event] = field(init=False, repr=False, default_factory=set)  # of calls under way
    _in_a_row: int = field(init=False, repr=False, default=0)  # failures, one after the other
    failure: str = field(init=False, repr=False, default="")  # why the newest rows without a number have none

    def __post_init__(self) -> None:
        check_types(Endpoint, {name: getattr(self, name) for name in _OPTIONS}, self.where)
        parts = _split(self.url)
        if parts is not None and parts.username is not None:  # it would be sent to whoever asks for it
            raise self._refused("url has a user name in it: name an environment variable with the key as api_key_env")
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise self._refused(f"url = {redacted(self.url)!r}: give an address such as http://localhost:5000/get_reward")
        numbers = (
            ("batch", self.size, 1, 10**6), ("retries", self.retries, 0, 1000), ("concurrency", self.concurrency, 1, 1000),
        )  # fmt: skip
        for key, number, least, most in numbers:
            if not least <= number <= most:
                raise self._refused(f"{key} = {number}: give at least {least}" + f" and at most {most}" * (number > most))
        if self.max_failures < 1 or not 0 < self.timeout <= _LONGEST or not 0 <= self.backoff <= _LONGEST:
            raise self._refused(
                f"max_failures = {self.max_failures}, timeout = {self.timeout}, backoff = {self.backoff}: give at least 1"
                f" failure, a timeout above 0 and a backoff of at least 0 seconds, and of each at most {_LONGEST:g}"
            )
        self._secrets = {header: from_environment(name, f"{self.where} headers") for header, name in self.headers.items()}
        if self.api_key_env is not None:
            self._secrets["Authorization"] = from_environment(self.api_key_env, f"{self.where} api_key_env")

    def __call__(self, *columns: Sequence[Any]) -> list[float]:
        values, why = np.full(len(columns[0]), np.nan), ""
        stop, pool = threading.Event(), ThreadPoolExecutor(self.concurrency)
        self._stops.add(stop)
        try:
            slices = [slice(start, start + self.size) for start in range(0, len(values), self.size)]
            under_way = {pool.submit(self._ask, [column[s] for column in columns], stop): s for s in slices}
            why = self._gather(under_way, values, stop)
            why = why or ("it is not to be asked any more" if stop.is_set() else "")
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            self._stops.discard(stop)
        if why:
            self._in_a_row = 0
            raise Incomplete(
                f"{redacted(self.url)}: {why}; mend that and give the same command again: what was scored is kept",
                values,
            )
        return values.tolist()

    def cancel(self) -> None:
        """Ends the calls that other threads have under way: requests already sent are not retried, and no more are sent."""
        for stop in list(self._stops):
            stop.set()

    def _gather(
        self, under_way: Mapping[Future[Sequence[float]], slice], values: Float64[np.ndarray, " n"], stop: threading.Event
    ) -> str:
        """Fills in the values as they arrive. Returns why it stopped early, or "" if it did not."""
        why = ""
        for request in as_completed(under_way):
            try:
                values[under_way[request]] = request.result()
                self._in_a_row = 0
            except CancelledError:
                continue
            except retry.Failed as error:
                self._in_a_row += 1
                self.failure = f"{redacted(self.url)}: {error}"
                if not why and (isinstance(error, retry.Refused) or self._in_a_row >= self.max_failures):
                    why = str(error)
                    stop.set()  # what is under way has this one try; its values still count
                    for other in under_way:
                        other.cancel()
        return why

    def _ask(self, columns: Sequence[Sequence[Any]], stop: threading.Event) -> Sequence[float]:
        if stop.is_set():
            raise CancelledError
        sent = dict(self._secrets)
        if self.api_key_env is not None:
            sent["Authorization"] = f"Bearer {sent['Authorization']}"
        try:
            return retry.request(
                "POST",
                self.url,
                self.body(*columns),
                read=lambda content: self.read(json.loads(content), len(columns[0])),
                headers=sent,
                patience=retry.Patience(self.timeout, self.retries, self.backoff),
                stop=stop,
            )
        except retry.Refused:
            stop.set()  # here: before this thread takes the next one
            raise

    def _refused(self, why: str) -> UserError:
        return UserError(f"{self.where} {why}")


# ---------------------------------------------------------------- language models


def chat(
    url: str,
    *,
    question: Callable[[str, str], tuple[str, str]],
    read: Callable[[Any], float],
    fields: Mapping[str, Any],
    **options: Any,
) -> Endpoint:
    """Returns an Endpoint for a language model that is asked row by row.

    The model is behind any server with OpenAI's chat completions (vLLM, SGLang, llama.cpp).

    Args:
        url: the address of the API, such as http://localhost:8000/v1.
        question: returns, for a row, the instruction to the model and the texts to judge.
        read: returns the number in the model's reply; raises ValueError if there is none and the model is to be asked again.
        fields: the other fields of the request: model, temperature ...
        options: passed to `Endpoint`.
    """

    def body(first: Sequence[str], second: Sequence[str]) -> dict[str, Any]:
        task, texts = question(first[0], second[0])
        turns = [{"role": "system", "content": task}, {"role": "user", "content": texts}]
        return {"messages": turns, **fields}

    base, query = url.partition("?")[::2]  # a query, which may hold a key or a version, stays behind the path
    address = f"{base.rstrip('/')}/chat/completions" + (f"?{query}" if query else "")
    return Endpoint(address, body=body, read=lambda answer, n: [read(said(answer))], size=1, **options)


def said(answer: Any) -> Any:
    """Returns the content of the model's reply in a chat completion.

    Raises:
        ValueError: the answer is no chat completion.
    """
    try:
        return answer["choices"][0]["message"]["content"]
    except (TypeError, KeyError, IndexError):
        raise ValueError(f"the answer is no chat completion: {str(answer)[:100]}") from None
