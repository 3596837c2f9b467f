"""Which response is decoded in which row: everything is answered once, whatever ends when, and little is idle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ple_jax.core import refill
from ple_jax.core.refill import Decoded, Requests, Shape
from ple_jax.core.types import Response, Sampling

NEW = 20
PREFIX = (1, 2)
EOS = 0


class Rows:
    """An engine that says of every prompt how many tokens its response has: its last token. Refuses what makes no sense."""

    def __init__(self, lanes=1):
        self.lanes, self.opened, self.groups, self.steps = lanes, 0, [], []

    def open(self, shape, sampling):
        self.opened, self.shape = self.opened + 1, shape
        rows = shape.rows
        self.goal, self.length = np.zeros(rows, int), np.zeros(rows, int)
        self.noise, self.busy = np.zeros((rows, shape.new), np.float32), np.zeros(rows, bool)

    def begin(self, group):
        self.groups.append(group)
        count, length = group.tokens.shape
        assert (count, len(group.row)) == self.shape.group(length)
        lane_of_prompt, lane_of_response = count // self.lanes, len(group.row) // self.lanes
        for i, (prompt, row) in enumerate(zip(group.prompt, group.row, strict=True)):
            if row == self.shape.rows:
                continue
            assert not self.busy[row] and group.lengths[prompt] <= length <= self.shape.room
            assert prompt // lane_of_prompt == i // lane_of_response == row // self.shape.part
            tokens = group.tokens[prompt, : group.lengths[prompt]]
            self.goal[row], self.length[row], self.busy[row] = tokens[-1], 1, True
            self.noise[row] = group.uniforms[i]

    def decode(self, free):
        done, steps = self.length >= np.minimum(self.goal, self.shape.new), 0
        assert 0 < free <= self.shape.part
        while steps < refill.STEPS and (done.reshape(self.lanes, -1).sum(1) < free).any():
            self.length += ~done
            done, steps = self.length >= np.minimum(self.goal, self.shape.new), steps + 1
        self.steps.append(steps)
        self.busy &= ~done
        tokens = np.arange(self.shape.new)[None] + 10 + np.zeros((self.shape.rows, 1), int)
        tokens[np.arange(self.shape.rows), self.length - 1] = np.where(self.goal <= self.shape.new, EOS, 5)
        return Decoded(done, self.length.copy(), tokens, -self.noise)

    def close(self):
        self.opened -= 1


def asked(goals, *, samples=1, shared=(), length=4):
    """Requests whose responses end after so many tokens; above NEW they do not."""
    prompts = [((*PREFIX, 7) if i in shared else (9,)) + (i + 100,) * length + (goal,) for i, goal in enumerate(goals)]
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    noise = np.random.default_rng(0).random((len(prompts), NEW), dtype=np.float32)
    return Requests(prompts, noise, Sampling(NEW, (EOS,)), PREFIX)


def run(requests, *, lanes=1, **how):
    engine, told = Rows(lanes), []
    found = refill.sample(engine, requests, smallest=8, lanes=lanes, tell=told.append, **how)
    assert engine.opened == 0
    return engine, found, told


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(1, 6),
    st.sets(st.integers(0, 40)), st.sets(st.integers(0, 29)), st.integers(1, 12),
)  # fmt: skip
def test_everything_is_answered_once(goals, samples, lanes, width, known, shared, length):
    requests = asked(goals, samples=samples, shared=shared, length=length)
    there = {i: Response((3,), False) for i in known if i < len(requests.prompts)}
    engine, found, told = run(requests, lanes=lanes, width=width * lanes, known=there)
    for i, (response, prompt) in enumerate(zip(found, requests.prompts, strict=True)):
        if i in there:
            assert response is there[i]
            continue
        n = min(prompt[-1], NEW)
        assert len(response.tokens) == len(response.logprobs) == n and response.finished is (prompt[-1] <= NEW)
        assert response.logprobs == tuple(np.round(-requests.uniforms[i, :n].astype(float), 6))
    numbers = [i for ended in told for i in ended]
    assert sorted(numbers) == sorted(set(range(len(found))) - set(there))
    assert engine.opened == 0 and (not there or len(there) < len(found) or not engine.groups)


def test_rows_are_refilled_while_others_are_decoded():
    """A long response does not hold up the short ones: 8 rows take 40 of 2 tokens beside one of 20 in its time."""
    engine, _, told = run(asked([20, *[2] * 40]), width=8)
    assert sum(engine.steps) <= 21
    assert max(told[-1]) == 0 or 0 in told[-1]  # the long one is among the last
    static = 6 * 19  # all of a batch wait for it, or the next
    assert sum(engine.steps) < static


def test_a_prompt_is_read_once_for_all_its_responses():
    engine, _, _ = run(asked([5, 6, 7, 8], samples=4), width=8)
    assert sum((group.lengths > 1).sum() for group in engine.groups) == 4
    assert all((group.row < 8).sum() % 4 == 0 for group in engine.groups)


def test_more_responses_than_rows_are_read_for_in_parts():
    engine, found, _ = run(asked([3], samples=11), width=4)
    assert len(found) == 11 and [(group.row < 4).sum() for group in engine.groups] == [4, 4, 3]


def test_prompts_of_one_length_are_read_together_long_ones_first():
    requests = asked([5, 5, 5, 5], shared={1, 2})
    long = ((9,) * 20 + (5,), (9,) * 21 + (5,))
    prompts = [*requests.prompts[:2], *long, *requests.prompts[2:]]
    requests = requests._replace(prompts=prompts, uniforms=np.zeros((6, NEW), np.float32))
    engine, _, _ = run(requests, width=8)
    assert [(group.tokens.shape[1], group.shared) for group in engine.groups] == [(32, False), (8, True), (8, False)]
    assert engine.groups[1].tokens[0, :2].tolist() == [7, 101]  # without the prefix


@pytest.mark.parametrize("samples", [1, 2, 8])
@pytest.mark.parametrize("lanes", [1, 2])
def test_shapes_are_of_all_that_is_asked_and_not_of_what_is_left(samples, lanes):
    requests = asked([4, 9, 30, 2, 5, 5, 5, 5, 5], samples=samples, shared={0, 4})
    engines = []
    for known in ((), range(1, 5), range(len(requests.prompts) - 1)):
        engine, _, _ = run(requests, width=16, lanes=lanes, known={i: Response((1,), True) for i in known})
        engines.append(engine)
    assert len({engine.shape for engine in engines}) == 1
    kinds = [{(g.tokens.shape, len(g.row), g.shared) for g in engine.groups} for engine in engines]
    assert kinds[1] <= kinds[0] and kinds[2] <= kinds[0]


def test_shape_by_hand():
    requests = asked([5, 6, 7], samples=2, shared={0, 1}, length=9)
    # the longest is 9, 9 x 102 and 7, which is padded to 16; the others are as long without the prefix
    shape = refill.shape_of(requests, width=16, smallest=8, multiple=4)
    assert shape == Shape(rows=16, lanes=1, multiple=4, samples=2, mean=2, room=16 + NEW, new=NEW, prefix=PREFIX)
    assert shape.part == 16 and shape.refill == 2
    assert shape.group(8) == (16, 16) and shape.group(64) == (4, 4) and shape.group(512) == (4, 2)
    assert refill.shape_of(asked([5, 6], shared={0}), width=4, smallest=8).prefix == ()  # one prompt alone shares nothing
    assert refill.shape_of(asked([5], samples=9), width=4, smallest=64).samples == 4


def test_what_is_raised_ends_all():
    engine = Rows()

    def stop(ended):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refill.sample(engine, asked([5, 6]), width=2, smallest=8, tell=stop)
    assert engine.opened == 0
    assert refill.sample(engine, asked([5]), width=2, smallest=8, known={0: Response((1,), True)}) == [Response((1,), True)]
    assert len(engine.groups) == 1  # nothing was left to be asked for


def test_what_a_prompt_is_padded_to():
    """Doublings, and three quarters of long ones."""
    sizes = {1: 16, 16: 16, 17: 32, 65: 128, 128: 128, 129: 192, 192: 192, 193: 256, 257: 384, 385: 512, 635: 768, 769: 1024}
    assert {length: refill.read_as(length, 16) for length in sizes} == sizes
