"""From rollouts to the padded arrays of a Batch."""

from collections.abc import Sequence

import numpy as np

from ple_jax.core.config import UserError
from ple_jax.core.rollouts import bucket
from ple_jax.core.types import Batch, Rollout


def pack(rollouts: Sequence[Rollout], picks: Sequence[Sequence[int]], *, prompt_multiple: int, response_len: int) -> Batch:
    """One row a query: its prompt padded on the left, the chosen responses padded on the right, with token 0.

    Tokens go in as they were sampled: no EOS is appended, nothing is re-tokenised.

    Args:
      rollouts: the queries of one optimiser batch.
      picks: for each rollout the indices of the responses to train on, k for every one, in the order wanted.
      prompt_multiple: the smallest prompt bucket, in tokens; the longest prompt decides which bucket.
      response_len: width of the response arrays, in tokens.

    Returns:
      A Batch whose data holds, in float32, "valid" [query], all 1, and "own" [query, k], 1 where the policy gave the
      response to the very prompt of the batch: what a KL estimate may be made from.

    Raises:
      UserError: a chosen response has no token, or more than response_len.
    """
    queries, k = len(rollouts), len(picks[0])
    prompt_len = bucket(max(len(r.prompt_tokens) for r in rollouts), prompt_multiple)
    prompt = np.zeros((queries, prompt_len), np.int32)
    prompt_mask = np.zeros(prompt.shape, bool)
    response = np.zeros((queries, k, response_len), np.int32)
    response_mask = np.zeros(response.shape, bool)
    for i, (rollout, chosen) in enumerate(zip(rollouts, picks, strict=True)):
        start = prompt_len - len(rollout.prompt_tokens)
        prompt[i, start:] = rollout.prompt_tokens
        prompt_mask[i, start:] = True
        for j, pick in enumerate(chosen):
            tokens = rollout.responses[pick].tokens
            if not 0 < len(tokens) <= response_len:
                raise UserError(
                    f"query {rollout.query_id!r}: response {pick} has {len(tokens)} tokens, "
                    f"where 1 to {response_len} are needed; leave this query out"
                )
            response[i, j, : len(tokens)] = tokens
            response_mask[i, j, : len(tokens)] = True
    own = [[rollout.responses[i].kind == "plain" for i in chosen] for rollout, chosen in zip(rollouts, picks, strict=True)]
    data = {"valid": np.ones(queries, np.float32), "own": np.array(own, np.float32)}
    return Batch(prompt, prompt_mask, response, response_mask, data)
