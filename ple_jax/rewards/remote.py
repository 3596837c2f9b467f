"""A reward from a server with OpenRLHF's protocol, such as `python -m openrlhf.cli.serve_rm`."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ple_jax import prompts
from ple_jax.core.answers import digest
from ple_jax.core.endpoints import Endpoint
from ple_jax.core.secrets import redacted
from ple_jax.core.types import Reward
from ple_jax.rewards import WHERE

VERSION = "2"  # another one with every change of the values


def make(
    url: str,
    *,
    name: str = "remote",
    version: str | None = None,
    labels: str | None = None,
    batch: int = 8,
    concurrency: int = 4,
    **http: Any,
) -> Reward:
    """Returns a reward that a server computes.

    It gets {"query": [prompt and response], "prompts": [...], "labels": [...]} by POST, and answers {"rewards": [...]}.

    Args:
        url: address of the server, such as http://localhost:5000/get_reward.
        name: name of the reward.
        version: a version of what the server computes, by which stored values are keyed; by default the url. Give one if
            the address changes between runs, and another one when the model behind it changes.
        labels: the record's column, or `completion`, its own answer, that is sent as labels; by default each label is "".
        batch: number of responses in one request.
        concurrency: number of requests under way at once.
        http: timeout, retries, backoff, max_failures, api_key_env, headers of `endpoints.Endpoint`.

    Raises:
        UserError: as `endpoints.Endpoint` does.
    """

    def body(queries: Sequence[str], responses: Sequence[str], *known: Sequence[Any]) -> dict[str, Any]:
        whole = [q + prompts.completion(q, r, chat=False) for q, r in zip(queries, responses, strict=True)]
        return {"query": whole, "prompts": [str(q) for q in queries], "labels": [*known[0]] if known else [""] * len(whole)}

    def reward(queries: Sequence[str], responses: Sequence[str], /, **fields: Sequence[Any]) -> list[float]:
        return score(queries, responses, *fields.values())

    score = Endpoint(url, where=WHERE, body=body, read=_read, size=batch, concurrency=concurrency, **http)
    many = 4 * batch * concurrency  # enough for every connection to stay busy, and little to lose
    version = f"{VERSION} {version or _known_by(url)}" + (f" {labels}" if labels else "")
    reads = (labels,) if labels else ()
    return Reward(name, reward, version=version, batch=many, reads=reads, cancel=score.cancel, failure=lambda: score.failure)


def _known_by(url: str) -> str:
    """Returns an address as a version, without its secrets.

    Where something was removed, such as a query, which may hold a key and may name a model, a digest stands beside it.
    """
    return url if redacted(url) == url else f"{redacted(url)} {digest(url)[:16]}"


def _read(answer: Any, n: int) -> list[float]:
    """Reads the `n` rewards in a server's answer: one list, in which each may be in a list of its own.

    null, which is how JSON spells NaN, means that there is no reward.

    Raises:
        ValueError: if the answer has no rewards, another number of them, or something that is no number.
    """
    if not isinstance(answer, dict) or "rewards" not in answer:
        raise ValueError(f'the answer has no "rewards": {str(answer)[:100]}')
    flat = np.asarray(answer["rewards"], object).ravel()
    if len(flat) != n:
        raise ValueError(f"the answer has {len(flat)} rewards for {n} texts")
    if wrong := [value for value in flat if isinstance(value, bool) or not isinstance(value, int | float | None)]:
        raise ValueError(f"a reward in the answer is no number: {str(wrong[0])[:100]!r}")
    return [math.nan if value is None else float(value) for value in flat]
