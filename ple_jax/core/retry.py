"""Requests to a server that may be slow, busy or gone for a moment: they are retried, with pauses, a number of times."""

import functools
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from ple_jax.core.secrets import hidden, sent_in

T = TypeVar("T")
_LONGEST_PAUSE, _LONGEST_ASKED = 60.0, 600.0  # seconds: of our own, and of what a server may ask for
_SAID = 30.0  # seconds: a longer pause is told of
LARGEST = 64 * 2**20  # bytes of an answer: the numbers and tokens that are asked for take a thousandth
_CONNECTIONS = 256  # that are kept open to a server: more than requests are under way at once
# what an answer that is none makes of who reads it: JSON nested too deep, numbers that float64 has no room for
_UNREADABLE = (TimeoutError, ValueError, ArithmeticError, RecursionError)


class Failed(Exception):
    """The error of a request without a usable answer; it says why the last try had none."""


class Refused(Failed):
    """The error of a request that retries cannot help."""

    def __init__(self, why: str, status: int):
        super().__init__(why)
        self.status = status


class Patience(NamedTuple):
    """How long a server is given to answer, and how often a request is retried."""

    timeout: float  # seconds from a request to the last byte of its answer
    # tries after the first: if no connection comes about or it breaks, on status 408, 429 and 5xx, and on answers that
    # cannot be read
    retries: int
    backoff: float  # seconds before the first retry, doubled for every other; a longer Retry-After is honoured


def request(
    method: str,
    url: str,
    body: Mapping[str, Any] | None = None,
    *,
    read: Callable[[bytes], T],
    headers: Mapping[str, str],
    patience: Patience,
    stop: threading.Event,
) -> T:
    """Sends a request, and returns what `read` makes of the answer.

    No error message contains a key that is in the headers or the address.

    Args:
        body: sent as JSON.
        read: takes the answer's bytes. It raises ValueError, or what Python raises for too large numbers and too deep JSON,
            if they are no answer, and `Failed` if another try would not help.
        stop: once it is set, there is no further try.

    Raises:
        Failed: no try succeeded, `stop` was set before the next, or the server asks for too long a pause before it.
        Refused: the server says that the request is wrong.
    """
    import requests

    for attempt in range(patience.retries + 1):
        asked = None
        try:
            return read(_within(patience.timeout, lambda: _content(method, url, body, headers, patience.timeout)))
        except _Busy as error:
            why, asked = str(error), error.retry_after
        except (requests.RequestException, *_UNREADABLE) as error:
            why = f"{type(error).__name__}: {_brief(hidden(str(error), sent_in(url, headers)))}"
        seconds = pause(attempt, backoff=patience.backoff, asked=asked)
        if seconds > _LONGEST_ASKED:
            raise Failed(f"{why} (and asks for a pause of {seconds:.0f} s)")
        if attempt == patience.retries or _stopped(stop, seconds, f"{urlsplit(url).netloc}: {why}"):
            break
    raise Failed(why)


def _stopped(stop: threading.Event, seconds: float, why: str) -> bool:
    """Waits for `seconds`, and prints `why` if that is long. Returns whether `stop` was set in the meantime."""
    if seconds > _SAID:
        print(f"{why}; the next try is in {seconds:.0f} s", file=sys.stderr, flush=True)
    return stop.wait(seconds)


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Returns the result of a call, or raises TimeoutError if it takes longer than `seconds`.

    A socket's own timeout begins anew with every byte of a slow answer. After a timeout the call goes on in its thread,
    which nobody waits for.
    """
    found: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            found.append(call())
        except Exception as error:  # whatever it is, it belongs to who asked
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        raise TimeoutError(f"no whole answer within {seconds:g} s")
    return found[0]


class _Busy(Exception):
    """The error of an answer that another try may improve; `retry_after` is when, as the server says it."""

    def __init__(self, why: str, retry_after: str | None):
        super().__init__(why)
        self.retry_after = retry_after


@functools.cache
def _session(server: str) -> Any:
    """Returns the session of a server, whose connections stay open from one request to the next."""
    import requests
    from requests.adapters import HTTPAdapter

    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=_CONNECTIONS))
    return session


def _content(method: str, url: str, body: Mapping[str, Any] | None, headers: Mapping[str, str], timeout: float) -> bytes:
    """Returns the bytes of an answer; raises `Refused` or `_Busy` if its status is not one of success."""
    with _session("{0.scheme}://{0.netloc}".format(urlsplit(url))).request(
        method,
        url,
        json=body,
        headers=headers,
        timeout=timeout,
        allow_redirects=False,  # a key is for the server that was named
        auth=lambda request: request,  # or a .netrc would replace the key
        stream=True,  # nobody says beforehand how much comes
    ) as answer:
        content = _limited(answer)
    if answer.status_code < 300:
        return content
    # a server may repeat what it was sent
    text = hidden(answer.headers.get("Location") or content.decode(errors="replace"), sent_in(url, headers))
    why = f"it answered with status {answer.status_code}: {_brief(text)}"
    if answer.status_code < 500 and answer.status_code not in (408, 429):
        raise Refused(why, answer.status_code)
    raise _Busy(why, answer.headers.get("Retry-After"))


def _limited(answer: Any) -> bytes:
    """Reads the body of an answer, decompressed.

    Raises:
        Refused: it is longer than any expected answer, so that it must come from another kind of server.
    """
    parts, size = [], 0
    for part in answer.iter_content(2**16):
        parts.append(part)
        size += len(part)
        if size > LARGEST:
            raise Refused(f"its answer is longer than {LARGEST >> 20} MiB", answer.status_code)
    return b"".join(parts)


def pause(attempt: int, *, backoff: float, asked: str | None) -> float:
    """Returns the seconds before the next try, at random from half to all of the back-off, which doubles with every attempt.

    The back-off is at most a minute. The result is not less than what the server asks for with Retry-After, whose value
    is `asked`: seconds or a date.
    """
    own = min(backoff * 2.0**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)
    if asked is None:
        return own
    try:
        seconds = float(asked) if asked.strip().isdecimal() else parsedate_to_datetime(asked).timestamp() - time.time()
    except (ValueError, OverflowError):  # no date, or one with a year of thirty digits
        return own
    return max(own, seconds)


def _brief(text: str) -> str:
    return " ".join(text.split())[:300]
