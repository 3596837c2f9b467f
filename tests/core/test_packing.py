"""Which queries share a row and a pass, how many programs that needs, and the arrays of packed rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batches import of_lengths

from ple_jax.core import packing
from ple_jax.core.packing import Cost, alone, pack, part, passes, reunited, row_counts, width
from ple_jax.core.types import Batch

FREE = Cost(0, 1e12)  # tokens alone are counted


def of_total(*total: int) -> Batch:
    """Queries of so many tokens, in arrays that are much wider."""
    batch = of_lengths([1] * len(total), [[n - 1] for n in total])
    wide = (0, 0), (0, 0), (0, 8192 - max(total))
    return batch._replace(response=np.pad(batch.response, wide), response_mask=np.pad(batch.response_mask, wide))


@pytest.mark.parametrize(
    ("longest", "tokens"), [(2, 8), (8, 8), (9, 12), (12, 12), (13, 16), (17, 24), (25, 32), (33, 48), (49, 64), (700, 768)]
)
def test_width_by_hand(longest, tokens):
    assert width(longest) == tokens


@given(st.integers(1, 5000))
def test_widths_have_two_sizes_a_doubling(longest):
    tokens = width(longest)
    assert longest <= tokens and (tokens == 8 or tokens < longest * 1.5)
    power = 2 ** (tokens - 1).bit_length()
    assert tokens in (power, 3 * power // 4)


@pytest.mark.parametrize(
    ("most", "counts"),
    [(8, [1, 2, 3, 4, 6, 8]), (1, [1]), (2, [1, 2]), (5, [1, 2, 3, 4, 5]), (12, [1, 2, 3, 4, 6, 8, 12])],
)
def test_numbers_of_rows_that_programs_are_compiled_for(most, counts):
    assert row_counts(most) == counts


def test_short_queries_share_rows_as_wide_as_the_longest():
    [one] = passes(of_total(100, 30, 60, 40, 20, 20, 10, 10), Cost(10_000, 1e12), most=8)
    # 128 tokens: 100 + 20, 60 + 40 + 20, 30 + 10 + 10; 192 tokens need two rows, which is no less
    assert (one.rows, one.time) == (3, 128)
    assert one.queries.tolist() == [0, 2, 3, 1, 5, 4, 7, 6]
    assert one.row.tolist() == [0, 1, 1, 2, 0, 1, 2, 2]
    assert one.offset.tolist() == [0, 0, 60, 0, 100, 100, 30, 40]


def shapes(found):
    return [(one.rows, one.time, sorted(one.queries[one.queries >= 0].tolist())) for one in found]


def test_a_wider_row_is_taken_where_it_leaves_less_empty():
    alone_, pairs = (passes(of_total(*total), Cost(10_000, 1e12), most=8) for total in ([60] * 8, [50, 45, 40, 40] * 2))
    assert shapes(alone_) == [(8, 64, [*range(8)])]  # two in 96 tokens, and three in 128: none has room
    assert shapes(pairs) == [(4, 96, [*range(8)])]


def test_what_attention_costs_keeps_rows_short():
    batch = of_total(500, *[60] * 7)
    assert shapes(passes(batch, Cost(100, 1e12), most=8)) == [(2, 512, [*range(8)])]
    apart = [(4, 64, [1, 2, 3, 4]), (2, 64, [5, 6]), (1, 64, [7]), (1, 512, [0])]
    assert shapes(passes(batch, Cost(100, 500), most=8)) == apart


def test_two_passes_where_one_costs_more():
    batch = of_total(100, 30, 1000, 120, 900, 40, 110, 35)
    assert shapes(passes(batch, Cost(10_000, 1e12), most=8)) == [(3, 1024, [*range(8)])]
    assert [one[2] for one in shapes(passes(batch, Cost(8, 500), most=8))] == [[0, 1, 5, 7], [3, 6], [2, 4]]


@given(
    st.lists(st.integers(2, 2000), min_size=1, max_size=33),
    st.integers(1, 8000),
    st.sampled_from([300.0, 3000.0, 1e9]),
    st.integers(1, 4),
)
@settings(deadline=None)
def test_passes_have_every_query_once_and_never_cost_more(total, a_pass, reach, shards):
    batch, cost, most = of_total(*total), Cost(a_pass, reach), len(total)
    found = passes(batch, cost, most=most, shards=shards)
    there = np.concatenate([one.queries for one in found])
    assert sorted(there[there >= 0]) == list(range(most))
    each = -(-most // shards)
    for one in found:
        assert len(one.queries) == each * shards and one.rows % shards == 0
        assert one.rows // shards in row_counts(each)
        taken = np.zeros((one.rows, one.time), int)
        for i in np.flatnonzero(one.queries >= 0):
            taken[one.row[i], one.offset[i] : one.offset[i] + total[one.queries[i]]] += 1
            assert one.row[i] // (one.rows // shards) == i // each  # of its device
        assert taken.max() == 1 and taken.sum() == sum(total[query] for query in one.queries if query >= 0)
    assert sum(cost.of(one.rows, one.time) for one in found) <= cost.of(each * shards, width(max(total)))


def test_rows_are_never_wider_than_the_batchs_own_arrays():
    """What a pass needs of memory at most is that of every query alone (`--mode=plan --topology`)."""
    batch = of_lengths([3, 3], [[9, 8], [9, 2]])
    assert shapes(passes(batch, Cost(100, 1e12), most=2)) == [(2, 21, [0, 1])]


@given(st.lists(st.lists(st.integers(2, 4000), min_size=8, max_size=8), min_size=1, max_size=30))
@settings(deadline=None, max_examples=30)
def test_few_programs_are_compiled(many):
    """Of batches of 8, whatever they hold, at most 6 for every width, of which there are two a doubling."""
    found = {(one.rows, one.time, len(one.queries)) for total in many for one in passes(of_total(*total), FREE, most=8)}
    widths = {time for _, time, _ in found}
    assert {queries for *_, queries in found} == {8} and len(found) <= 6 * len(widths) and len(widths) <= 20


def by_hand() -> Batch:
    """Prompts of 2 and 3 tokens, responses of 2 and 1, and of 1 and 3."""
    prompt = np.array([[0, 5, 6], [7, 8, 9]], np.int32)
    response = np.array([[[11, 12, 0], [21, 0, 0]], [[31, 0, 0], [41, 42, 43]]], np.int32)
    return Batch(prompt, prompt > 0, response, response > 0, {"valid": np.ones(2, np.float32)})


def test_a_row_has_no_padding_inside():
    packed = pack(by_hand())
    assert packed.tokens.tolist() == [[5, 6, 11, 12, 21, 0, 0, 0, 0], [7, 8, 9, 31, 41, 42, 43, 0, 0]]
    assert packed.positions[0, :5].tolist() == [0, 1, 2, 3, 2] and packed.positions[1, :7].tolist() == [0, 1, 2, 3, 3, 4, 5]
    assert packed.query.tolist() == [[0] * 5 + [-1] * 4, [1] * 7 + [-1] * 2]
    assert packed.response.tolist() == [[0, 0, 1, 1, 2, 0, 0, 0, 0], [0, 0, 0, 1, 2, 2, 2, 0, 0]]
    assert packed.last.tolist() == [1, 11] and packed.ends.tolist() == [[3, 4], [12, 15]]
    # first tokens of all responses, then the later ones
    assert packed.targets[0, :7].tolist() == [11, 21, 31, 41, 12, 42, 43] and packed.used == 7
    assert packed.before[0, :3].tolist() == [2, 13, 14]
    assert packed.places[by_hand().response_mask].tolist() == [0, 4, 1, 2, 3, 5, 6]


def test_two_queries_in_one_row():
    one = packing.Pass(np.array([0, 1]), np.array([0, 0]), np.array([7, 0]), np.array([0, 5]), 1, 16, 12)
    packed = pack(by_hand(), one)
    assert packed.tokens.tolist() == [[7, 8, 9, 31, 41, 42, 43, 5, 6, 11, 12, 21, 0, 0, 0, 0]]
    assert packed.positions[0, :12].tolist() == [0, 1, 2, 3, 3, 4, 5, 0, 1, 2, 3, 2]
    assert packed.query[0].tolist() == [1] * 7 + [0] * 5 + [-1] * 4
    assert packed.last.tolist() == [8, 2] and packed.ends.tolist() == [[10, 11], [3, 6]]
    assert packed.number[0, :12].tolist() == [*range(5, 12), *range(5)] and packed.total == 12
    assert packed.before[0, :3].tolist() == [9, 4, 5]


def test_places_are_those_of_a_device():
    """Every query on a device of its own: what one has is counted from its own first row."""
    packed = pack(by_hand(), shards=2)
    assert packed.last.tolist() == [1, 2] and packed.ends.tolist() == [[3, 4], [3, 6]]
    assert packed.targets[:, :2].tolist() == [[11, 21], [31, 41]]
    assert packed.targets[0, 2] == 12 and packed.targets[1, 2:4].tolist() == [42, 43] and packed.used == 4
    assert packed.before[0, :1].tolist() == [2] and packed.before[1, :2].tolist() == [4, 5]


def test_a_query_that_only_fills_the_shape_has_no_token_and_is_not_valid():
    batch = by_hand()
    one = packing.Pass(np.array([1, -1]), np.array([0, 0]), np.array([0, 0]), np.array([5, 5]), 1, 8, 12)
    own = part(batch, one)
    assert own.data["valid"].tolist() == [1, 0] and own.prompt.tolist() == [[7, 8, 9]] * 2
    packed = pack(own, one)
    assert packed.tokens.tolist() == [[7, 8, 9, 31, 41, 42, 43, 0]] and packed.used == 6
    inside = packed.before[packed.before < 8]
    assert packed.last[0] == 2 and packed.last[1] >= 8 and (packed.ends[1] >= 8).all() and inside.tolist() == [4, 5]
    assert (packed.places[1] >= packed.targets.shape[1]).all()


@given(st.integers(0, 10_000), st.integers(1, 4), st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=50)
def test_no_place_is_there_twice(seed, k, shards):
    rng = np.random.default_rng(seed)
    prompts = rng.integers(1, 9, 6).tolist()
    batch = of_lengths(prompts, rng.integers(1, 6, (6, k)).tolist())
    numbers: list[np.ndarray] = []
    for one in passes(batch, Cost(1, 1e9), most=6, shards=shards):
        own = part(batch, one)
        packed = pack(own, one, shards=shards)
        for name in ("last", "ends", "before", "places"):
            for places in getattr(packed, name).reshape(shards, -1):
                assert len(set(places.tolist())) == len(places), name
        flat = packed.tokens.reshape(shards, -1)
        assert packed.total == packing.lengths(batch).sum()
        numbers.append(packed.number[packed.query >= 0])
        for i in np.flatnonzero(one.queries >= 0):
            device = i // (len(one.queries) // shards)
            said = own.response[i][own.response_mask[i]]
            assert packed.targets[device][packed.places[i][own.response_mask[i]]].tolist() == said.tolist()
            assert flat[device][packed.last[i]] == own.prompt[i, -1]
            ends = [own.response[i, j][own.response_mask[i, j]][-1] for j in range(k)]
            assert flat[device][packed.ends[i]].tolist() == ends
    assert sorted(np.concatenate(numbers)) == list(range(packing.lengths(batch).sum()))  # wherever a token lies


def test_where_no_token_is_none_is_meant():
    """A response without tokens, a prompt without any: no place is another query's."""
    batch = by_hand()
    batch.response_mask[0, 0] = False
    batch.prompt_mask[1] = False
    packed = pack(batch)
    area = packed.tokens.size
    assert packed.last[0] == 1 and packed.last[1] >= area
    assert packed.ends[0, 0] >= area and packed.ends[0, 1] == 2 and packed.ends[1].tolist() == [9, 12]


def test_what_passes_computed_is_put_in_the_order_of_the_batch():
    batch = of_total(100, 30, 1000, 120, 900, 40, 110, 35)
    made = passes(batch, Cost(8, 100), most=8)
    assert len(made) > 1
    assert reunited([part(batch, one).data["weight"] for one in made], made).tolist() == list(range(8))
    assert alone(batch, 3).queries.tolist() == [*range(8), -1]
