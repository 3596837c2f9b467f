"""Rewards behind an address: requests that are tried again, a few at a time, and what came before a failure is kept."""

import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from ple_jax.core import retry
from ple_jax.core.answers import Incomplete
from ple_jax.core.errors import UserError

_WHERE = "config.reward.kwargs"


def scorer(
    url: str,
    *,
    body: Callable[[Sequence[str], Sequence[str]], Mapping[str, Any]],
    read: Callable[[Any, int], Sequence[float]],
    size: int,
    concurrency: int,
    timeout: float = 60.0,
    retries: int = 5,
    backoff: float = 1.0,
    max_failures: int = 4,
    api_key_env: str | None = None,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
    """A reward's `score` that asks a server. A request that fails for good leaves NaN for its responses.

    Args:
        url: where requests are posted.
        body: the JSON of a request, from some prompts and responses.
        read: the values in the JSON of an answer, given how many are expected; ValueError where they are not there.
        size: responses of one request.
        concurrency: requests under way at once.
        timeout: seconds that a server may be silent.
        retries: tries after the first: if no connection comes about or it breaks, on status 408, 429 and 5xx, and on
            answers that cannot be read.
        backoff: seconds before the first retry, doubled for every other; a longer Retry-After is honoured.
        max_failures: so many requests that failed one after the other stop the scoring.
        api_key_env: environment variable whose value is sent as `Authorization: Bearer ...`.
        headers: environment variables by the header that their value is sent in.

    Raises:
        UserError: an option that cannot be, or an environment variable that is not set.
    """
    parts = urlsplit(url)
    if parts.username is not None:  # it would be written down with the config
        raise UserError(f"{_WHERE} url has a user name in it: name an environment variable with the key as api_key_env")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{_WHERE} url = {url!r}: give an address such as http://localhost:5000/get_reward")
    for key, number, least in (("batch", size, 1), ("retries", retries, 0), ("concurrency", concurrency, 1)):
        if number < least:
            raise UserError(f"{_WHERE} {key} = {number}: give at least {least}")
    if max_failures < 1 or not 0 < timeout < math.inf or not 0 <= backoff < math.inf:
        raise UserError(
            f"{_WHERE} max_failures = {max_failures}, timeout = {timeout}, backoff = {backoff}: give at least 1 failure,"
            " a timeout above 0 and a backoff of at least 0 seconds"
        )
    secrets = {header: _variable(name, "headers") for header, name in headers.items()}
    sent = dict(secrets)
    if api_key_env is not None:
        secrets["Authorization"] = _variable(api_key_env, "api_key_env")
        sent["Authorization"] = f"Bearer {secrets['Authorization']}"
    in_a_row = 0

    def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        nonlocal in_a_row
        stop = threading.Event()

        def ask(some: slice) -> Sequence[float]:
            n = len(responses[some])
            return retry.request(
                "POST",
                url,
                body(prompts[some], responses[some]),
                read=lambda content: read(json.loads(content), n),
                headers=sent,
                timeout=timeout,
                retries=retries,
                backoff=backoff,
                stop=stop,
            )

        values, why = np.full(len(responses), np.nan), ""
        pool = ThreadPoolExecutor(concurrency)
        try:
            slices = [slice(start, start + size) for start in range(0, len(responses), size)]
            under_way = {pool.submit(ask, some): some for some in slices}
            for request in as_completed(under_way):
                try:
                    values[under_way[request]] = request.result()
                    in_a_row = 0
                except CancelledError:
                    continue
                except retry.Failed as error:
                    in_a_row += 1
                    if not why and (isinstance(error, retry.Refused) or in_a_row >= max_failures):
                        why = str(error)
                        stop.set()  # what is under way has this one try; its values still count
                        for other in under_way:
                            other.cancel()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
        if why:
            in_a_row = 0
            for secret in secrets.values():  # a server may repeat what it was sent
                why = why.replace(secret, "***")
            raise Incomplete(f"{url}: {why}; mend that and give the same command again: what was scored is kept", values)
        return values.tolist()

    return score


def _variable(name: str, key: str) -> str:
    if not (value := os.environ.get(name, "").strip()):
        raise UserError(f"{_WHERE} {key}: the environment variable {name!r} is not set; export it with the key")
    return value
