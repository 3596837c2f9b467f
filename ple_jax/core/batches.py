"""From rollouts to the padded arrays of a Batch."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32

from ple_jax.core.errors import UserError
from ple_jax.core.types import Batch, Rollout


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple that is no less."""
    return -(-count // multiple) * multiple


def bucket(length: int, smallest: int) -> int:
    """The smallest of smallest, 2 * smallest, 4 * smallest ... that holds `length` tokens."""
    size = smallest
    while size < length:
        size *= 2
    return size


def left_padded(
    prompts: Sequence[Sequence[int]], smallest: int
) -> tuple[Int32[np.ndarray, "row prompt_len"], Bool[np.ndarray, "row prompt_len"]]:
    """Prompts of one batch and their mask; the longest decides which bucket, of which `smallest` is the first, in tokens."""
    length = bucket(max(map(len, prompts)), smallest)
    tokens, mask = np.zeros((len(prompts), length), np.int32), np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return tokens, mask


def pack(rollouts: Sequence[Rollout], picks: Sequence[Sequence[int]], *, prompt_multiple: int, response_len: int) -> Batch:
    """One row a query: its prompt padded on the left, the chosen responses padded on the right, with token 0.

    Tokens go in as they were sampled: no EOS is appended, nothing is re-tokenised.

    Args:
      rollouts: the queries of one optimiser batch.
      picks: for each rollout the indices of the responses to train on, k for every one, in the order wanted.
      prompt_multiple: the smallest prompt bucket, in tokens; the longest prompt decides which bucket.
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
    """The width, in tokens, of arrays whose longest response has so many.

    Of sampled ones it is always the same. Answers of the data may be longer: they have the next doubling that holds them.

    Args:
        new: most tokens of a sampled response.
        most: most tokens of an answer.
    """
    return min(bucket(longest, new), max(new, most))


def lengths(batch: Batch) -> Int32[np.ndarray, " query"]:
    """Tokens of every row: of its prompt and its responses together."""
    return (batch.prompt_mask.sum(1) + batch.response_mask.sum((1, 2))).astype(np.int32)


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """The rows of a batch in parts of `size`; the backend accumulates gradients over them.

    Rows of about the same length are in one part.
    """
    order = np.argsort(lengths(batch), kind="stable")
    return [rows_of(batch, order[i : i + size]) for i in range(0, len(order), size)]


def rows_of(batch: Batch, rows: Int32[np.ndarray, " part"]) -> Batch:
    """Some rows of a batch."""
    data = {name: value[rows] for name, value in batch.data.items()}
    return Batch(batch.prompt[rows], batch.prompt_mask[rows], batch.response[rows], batch.response_mask[rows], data)
