"""How long rows are, and which are in one micro-batch."""

import numpy as np

from ple_jax.core.batches import lengths, micro_batches
from ple_jax.core.types import Batch


def of_lengths(prompts: list[int], responses: list[list[int]]) -> Batch:
    """A batch whose tokens are its rows' numbers."""
    count, widest = len(prompts), max(max(row) for row in responses)
    prompt_mask = np.arange(max(prompts))[None] >= max(prompts) - np.array(prompts)[:, None]
    mask = np.arange(widest)[None, None] < np.array(responses)[..., None]
    number = np.arange(count, dtype=np.int32)
    data = {"valid": np.ones(count, np.float32), "weight": number.astype(np.float32)}
    return Batch(
        np.where(prompt_mask, number[:, None], 0), prompt_mask, np.where(mask, number[:, None, None], 0), mask, data
    )


def test_lengths():
    assert lengths(of_lengths([3, 1], [[2, 5], [4, 1]])).tolist() == [10, 6]


def test_rows_of_about_the_same_length_are_together_and_whole():
    batch = of_lengths([4, 2, 9, 1, 4], [[1, 1], [3, 3], [2, 2], [1, 1], [1, 1]])
    parts = micro_batches(batch, 2)
    rows = [part.data["weight"].astype(int).tolist() for part in parts]
    assert rows == [[3, 0], [4, 1], [2]]  # of 3, 6, 6, 8 and 13 tokens; equals in their order
    for part, own in zip(parts, rows, strict=True):
        for field in ("prompt", "prompt_mask", "response", "response_mask"):
            np.testing.assert_array_equal(getattr(part, field), getattr(batch, field)[own])
