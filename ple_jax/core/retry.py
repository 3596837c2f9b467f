"""Requests to a server that may be slow, busy or gone for a moment: tried again, with pauses, a number of times."""

import random
import threading
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
_LONGEST_PAUSE, _LONGEST_ASKED = 60.0, 600.0  # seconds: of our own, and of what a server may ask for


class Failed(Exception):
    """A request without a usable answer; says why the last try had none."""


class Refused(Failed):
    """A request that no repetition mends."""

    def __init__(self, why: str, status: int):
        super().__init__(why)
        self.status = status


class Patience(NamedTuple):
    """How long a server is given."""

    timeout: float  # seconds that it may be silent
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
    """What `read` makes of a server's answer.

    Args:
        body: sent as JSON.
        read: of the answer's bytes; ValueError where they are no answer, `Failed` where another try would not help.
        stop: when it is set there is no further try.

    Raises:
        Failed: no try gave any, or `stop` was set before the next.
        Refused: the server says that the request is wrong.
    """
    import requests

    for attempt in range(patience.retries + 1):
        asked = None
        try:
            return read(_content(method, url, body, headers, patience.timeout))
        except _Busy as error:
            why, asked = str(error), error.retry_after
        except (requests.RequestException, ValueError) as error:
            why = f"{type(error).__name__}: {_brief(str(error))}"
        wait = pause(attempt, backoff=patience.backoff, asked=asked)
        if attempt == patience.retries or stop.wait(wait):
            break
    raise Failed(why)


class _Busy(Exception):
    """An answer that another try may better; `retry_after` is when, as the server says it."""

    def __init__(self, why: str, retry_after: str | None):
        super().__init__(why)
        self.retry_after = retry_after


def _content(method: str, url: str, body: Mapping[str, Any] | None, headers: Mapping[str, str], timeout: float) -> bytes:
    """The bytes of an answer; `Refused` or `_Busy` where its status says that it is none."""
    import requests

    answer = requests.request(
        method,
        url,
        json=body,
        headers=headers,
        timeout=timeout,
        allow_redirects=False,  # a key is for the server that was named
        auth=lambda request: request,  # or a .netrc would replace the key
    )
    if answer.status_code < 300:
        return answer.content
    why = f"it answered with status {answer.status_code}: {_brief(answer.headers.get('Location') or answer.text)}"
    if answer.status_code < 500 and answer.status_code not in (408, 429):
        raise Refused(why, answer.status_code)
    raise _Busy(why, answer.headers.get("Retry-After"))


def pause(attempt: int, *, backoff: float, asked: str | None) -> float:
    """Seconds before the next try, at random from half to all of the back-off; not less than the server asked for."""
    own = min(backoff * 2.0**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)
    if asked is None:
        return own
    try:
        seconds = float(asked) if asked.strip().isdecimal() else parsedate_to_datetime(asked).timestamp() - time.time()
    except ValueError:
        return own
    return max(own, min(seconds, _LONGEST_ASKED))


def _brief(text: str) -> str:
    return " ".join(text.split())[:300]
