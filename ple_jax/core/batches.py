"""Pads rollouts into the arrays of a Batch, and splits a Batch into micro-batches."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32

from ple_jax.core.errors import UserError
from ple_jax.core.types import Batch, Rollout


def round_up(count: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is not less than `count`."""
    return -(-count // multiple) * multiple


def bucket(length: int, smallest: int) -> int:
    """Returns the smallest of smallest, 2 * smallest, 4 * smallest ... that holds `length` tokens."""
    size = smallest
    while size < length:
        size *= 2
    return size


def left_padded(
    prompts: Sequence[Sequence[int]], smallest: int
) -> tuple[Int32[np.ndarray, "row prompt_len"], Bool[np.ndarray, "row prompt_len"]]:
    """Pads the prompts of one batch on the left with token 0, and returns them with their mask.

    Their width, in tokens, is the `bucket` that holds the longest prompt; `smallest` is the first bucket.
    """
    length = bucket(max(map(len, prompts)), smallest)
    tokens, mask = np.zeros((len(prompts), length), np.int32), np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return tokens, mask


def pack(rollouts: Sequence[Rollout], picks: Sequence[Sequence[int]], *, prompt_multiple: int, response_len: int) -> Batch:
    """Packs queries into a Batch, one row per query: its prompt padded on the left, the chosen responses on the right.

    The padding is token 0. Tokens go in as they were sampled: no EOS is appended, nothing is re-tokenised.

    Args:
      rollouts: the queries of one optimiser batch.
      picks: for each rollout the indices of the responses to train on, k for every one, in the order wanted.
      prompt_multiple: the smallest prompt bucket, in tokens; the longest prompt decides which bucket is used.
      response_len: width of the response arrays, in tokens.

    Returns:
      A Batch whose data holds, in float32, "valid" [query], all 1.

    Raises:
      UserError: a chosen response has no token, or more than response_len.
    """
    queries, k = len(rollouts), len(picks[0])
    prompt, prompt_mask = left_padded([rollout.prompt_tokens for rollout in rollouts], prompt_multiple)
    response = np.zeros((queries, k, response_len), np.int32)
    response_mask = np.zeros(response.shape, bool)
    for i, (rollout, chosen) in enumerate(zip(rollouts, picks, strict=True)):
        for j, pick in enumerate(chosen):
            tokens = rollout.responses[pick].tokens
            if not 0 < len(tokens) <= response_len:
                raise UserError(
                    f"query {rollout.query_id!r}: response {pick} has {len(tokens)} tokens, "
                    f"where 1 to {response_len} are needed; leave this query out"
                )
            response[i, j, : len(tokens)] = tokens
            response_mask[i, j, : len(tokens)] = True
    return Batch(prompt, prompt_mask, response, response_mask, {"valid": np.ones(queries, np.float32)})


def response_width(longest: int, *, new: int, most: int) -> int:
    """Returns the width, in tokens, of response arrays whose longest response has `longest` tokens.

    For sampled responses the width is always `new`. Answers of the data may be longer: for them it is the next doubling
    of `new` that holds them, but no more than `most`.

    Args:
        new: the most tokens of a sampled response.
        most: the most tokens of an answer of the data.
    """
    return min(bucket(longest, new), max(new, most))


def lengths(batch: Batch) -> Int32[np.ndarray, " query"]:
    """Counts the tokens of every row, its prompt and its responses together."""
    return (batch.prompt_mask.sum(1) + batch.response_mask.sum((1, 2))).astype(np.int32)


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """Splits a batch into parts of at most `size` rows, over which the backend accumulates gradients.

    Rows of about the same length are in the same part.
    """
    order = np.argsort(lengths(batch), kind="stable")
    return [rows_of(batch, order[i : i + size]) for i in range(0, len(order), size)]


def rows_of(batch: Batch, rows: Int32[np.ndarray, " part"]) -> Batch:
    """Returns the Batch of the given rows."""
    data = {name: value[rows] for name, value in batch.data.items()}
    return Batch(batch.prompt[rows], batch.prompt_mask[rows], batch.response[rows], batch.response_mask[rows], data)
