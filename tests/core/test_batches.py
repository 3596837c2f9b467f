"""How wide packed rows are, and which rows are in one micro-batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ple_jax.core.batches import lengths, micro_batches, packed_width, passes, rows_compiled, rows_of
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


@pytest.mark.parametrize(
    ("longest", "width"), [(2, 8), (8, 8), (9, 12), (12, 12), (13, 16), (17, 24), (25, 32), (33, 48), (49, 64), (700, 768)]
)
def test_packed_width_by_hand(longest, width):
    assert packed_width(of_lengths([1, 1], [[longest - 1], [1]])) == width


@given(st.integers(2, 5000))
def test_packed_width_wastes_a_third_at_most_and_has_two_sizes_a_doubling(longest):
    width = packed_width(of_lengths([1], [[longest - 1]]))
    assert longest <= width and (width == 8 or width < longest * 1.5)
    power = 2 ** (width - 1).bit_length()
    assert width in (power, 3 * power // 4)


def test_rows_of_about_the_same_length_are_together_and_whole():
    batch = of_lengths([4, 2, 9, 1, 4], [[1, 1], [3, 3], [2, 2], [1, 1], [1, 1]])
    parts = micro_batches(batch, 2)
    rows = [part.data["weight"].astype(int).tolist() for part in parts]
    assert rows == [[3, 0], [4, 1], [2]]  # of 3, 6, 6, 8 and 13 tokens; equals in their order
    for part, own in zip(parts, rows, strict=True):
        for field in ("prompt", "prompt_mask", "response", "response_mask"):
            np.testing.assert_array_equal(getattr(part, field), getattr(batch, field)[own])


def of_total(*total: int) -> Batch:
    return of_lengths([1] * len(total), [[n - 1] for n in total])


def test_short_rows_have_a_pass_of_their_own_where_that_is_worth_it():
    batch = of_total(100, 30, 1000, 120, 900, 40, 110, 35)
    # 4 x (1024 - 128) tokens of padding less, then 2 x (1024 - 128) of the long half's two short rows; the others are alike
    assert [rows.tolist() for rows in passes(batch, worth=1024)] == [[1, 7, 5, 0], [6, 3], [4, 2]]
    assert [rows.tolist() for rows in passes(batch, worth=2048)] == [[1, 7, 5, 0], [6, 3, 4, 2]]
    assert [sorted(rows) for rows in passes(batch, worth=4096)] == [list(range(8))]
    assert [len(rows) for rows in passes(batch, worth=1024, least=4)] == [4, 4]


@given(st.lists(st.integers(2, 2000), min_size=1, max_size=33), st.integers(1, 4096), st.integers(1, 4))
def test_passes_have_every_row_once_and_never_more_padding(total, worth, least):
    batch = of_total(*total)
    found = passes(batch, worth=worth, least=least)
    assert sorted(np.concatenate(found)) == list(range(len(total)))
    assert all(len(rows) >= min(least, len(total)) for rows in found)

    def slots(rows):
        return len(rows) * packed_width(rows_of(batch, rows))

    assert sum(map(slots, found)) <= slots(np.arange(len(total))) - worth * (len(found) - 1)
    programs = {rows_compiled(len(rows), len(total)) for rows in found}
    assert len(programs) <= np.log2(len(total)) + 1


@pytest.mark.parametrize(
    ("rows", "largest", "program"),
    [(8, 8, 8), (5, 8, 8), (4, 8, 4), (3, 8, 4), (1, 8, 1), (2, 6, 3), (1, 6, 3), (1, 1, 1), (3, 5, 5)],
)
def test_rows_that_programs_are_compiled_for(rows, largest, program):
    assert rows_compiled(rows, largest) == program
