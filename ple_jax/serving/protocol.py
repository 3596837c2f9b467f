"""vLLM's OpenAI-compatible API: the requests that are sent, and the answers that come back."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from ple_jax.core import retry
from ple_jax.core.types import Response, Sampling


def seed(noise: Float32[np.ndarray, " max_new"]) -> int:
    """Returns the seed of a request: a function of the row's noise alone.

    It has 53 bits, since some programs read a JSON number as a double.
    """
    data = np.ascontiguousarray(noise, "<f4").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 11


def request(
    prompt: Sequence[int], noise: Float32[np.ndarray, " max_new"], *, model: str | None, sampling: Sampling
) -> dict[str, Any]:
    """Returns the body of a request to /v1/completions."""
    return {
        "model": model,
        "prompt": [int(token) for token in prompt],
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        # what is not said comes from the model's generation_config.json
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        # it stops at the run's EOS and at no other: the server's own list may differ
        "stop_token_ids": list(sampling.eos),
        "ignore_eos": True,
        "seed": seed(noise),
        "return_token_ids": True,  # new in vLLM 0.10.2 (its pull request 22587)
        "logprobs": 0,  # of the sampled token, and of no other
    }


def response(content: bytes, *, eos: Sequence[int], limit: int, vocab: int) -> Response:
    """Returns the response in an answer of /v1/completions; EOS is its last token if and only if it was sampled.

    Raises:
        ValueError: the answer is no completion.
        retry.Refused: the answer is one that only another start of the server mends.
    """
    answer = json.loads(content)
    try:
        (choice,) = answer["choices"]
        tokens, reason, stopped = choice.get("token_ids"), choice["finish_reason"], choice.get("stop_reason")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"this is no completion: {str(answer)[:100]}") from error
    if reason not in ("stop", "length"):
        raise ValueError(f"the completion ended with finish_reason {reason!r}")
    if tokens is None:
        raise retry.Refused("its completions have no token_ids: vLLM has them since 0.10.2; start a newer one", 200)
    if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
        raise ValueError(f"token_ids are no token ids: {str(tokens)[:100]}")
    if reason == "stop" and not eos_at(tokens, eos) and stopped in eos:
        tokens = [*tokens, stopped]  # vLLM keeps the token that it stopped at; a server that does not still says which
    finished = eos_at(tokens, eos) > 0
    tokens = tokens[: eos_at(tokens, eos) or None]
    if not tokens:
        raise ValueError("the completion is empty")
    if max(tokens) >= vocab or min(tokens) < 0:
        raise retry.Refused(f"it sampled token {max(tokens)} of {vocab}: it serves another base model than this run's", 200)
    if not finished and reason == "stop":
        raise retry.Refused(
            f"it stopped at {stopped!r}, which is no EOS of this run ({', '.join(map(str, eos))}): start it with"
            " --generation-config vllm",
            200,
        )
    if len(tokens) > limit or (not finished and len(tokens) < limit):
        raise retry.Refused(
            f"it sampled {len(tokens)} of {limit} tokens and no EOS: start it with a larger --max-model-len and with"
            " --generation-config vllm",
            200,
        )
    return Response(tuple(tokens), finished, logprobs=_logprobs(choice, len(tokens)))


def _logprobs(choice: Mapping[str, Any], count: int) -> tuple[float, ...]:
    """Returns the log-probability of each token, in nats; () if the answer does not have one for all of them."""
    said = choice.get("logprobs")
    found = said.get("token_logprobs") if isinstance(said, dict) else None
    if not isinstance(found, list) or len(found) < count:
        return ()
    numbers = [x for x in found[:count] if isinstance(x, int | float) and math.isfinite(x)]
    return tuple(map(float, numbers)) if len(numbers) == count else ()


def eos_at(tokens: Sequence[int], eos: Sequence[int]) -> int:
    """Returns how many tokens there are up to the first EOS, itself included; 0 if there is none."""
    return next((i + 1 for i, token in enumerate(tokens) if token in eos), 0)


def models(content: bytes) -> list[dict[str, Any]]:
    """Returns the entries in an answer of /v1/models. Raises ValueError if it has none."""
    found = json.loads(content)
    entries = found.get("data") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not all(isinstance(e, dict) and isinstance(e.get("id"), str) for e in entries):
        raise ValueError(f"this is no list of models: {str(found)[:100]}")
    return entries


def version(content: bytes) -> str:
    """Returns the version of vLLM in an answer of /version. Raises ValueError if it has none."""
    found = json.loads(content)
    if not isinstance(found, dict) or "version" not in found:
        raise ValueError(f"this is no version: {str(found)[:100]}")
    return str(found["version"])


def same(ours: str, theirs: str) -> bool:
    """Says whether two names or paths may be those of one model: user/name, name, /models/name."""
    return Path(ours).name.lower() == Path(theirs).name.lower()
