"""Continuous batching: rows are decoded together, and each is refilled when its response has ended.

A backend prefills a group of prompts into free rows (`Engine.begin`) and decodes until enough rows are free again
(`Engine.decode`). Which response is decoded where and when is decided here, on the host and for every backend.

A response depends on its prompt and its noise, not on its row, its neighbours or the order: shapes follow from all
that is asked for, including what is already known, and never from what is left of it.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float32, Int32

from ple_jax.core.batches import bucket, round_up
from ple_jax.core.types import Array, Response, Sampling, Tell

_PART = 8  # so many parts of the rows are refilled apart: more leave fewer of them idle, and read fewer prompts at once
_TOKENS = 128  # of prompts that are read at once, at least: of fewer a pass takes about as long
STEPS = 32  # most tokens of a row in one call of `decode`, after which what ended is told of and a run may be stopped


class Requests(NamedTuple):
    """The responses that are asked for: one to each of the prompts."""

    prompts: Sequence[tuple[int, ...]]
    uniforms: Float32[np.ndarray, "request new"]  # the noise of each
    sampling: Sampling
    prefix: tuple[int, ...] = ()  # what many prompts begin with


class Shape(NamedTuple):
    """The sizes of an engine's arrays."""

    rows: int  # decoded at once
    lanes: int  # parts of them that are refilled apart
    multiple: int  # of prompts that are read at once
    samples: int  # most responses for which a prompt is read once
    mean: int  # responses to a prompt, rounded down
    room: int  # positions of a row: of its prompt, without the prefix, and its response
    new: int  # most tokens of a response
    prefix: tuple[int, ...]  # what stands before the prompts that share it, and is held once

    @property
    def part(self) -> int:
        """The number of rows in a lane."""
        return self.rows // self.lanes

    @property
    def refill(self) -> int:
        """The number of free rows in a lane at which it is worth while to stop decoding and refill them."""
        return max(self.part // _PART, self.samples)

    def group(self, length: int) -> tuple[int, int]:
        """Returns how many prompts of `length` tokens are read at once, and how many responses to them begin at most."""
        prompts = min(self.part, max(1, self.refill // self.mean, -(-_TOKENS // length)))
        begun = min(self.part, max(self.samples, prompts * self.mean))
        return round_up(self.lanes * prompts, self.multiple), self.lanes * begun


class Group(NamedTuple):
    """Prompts of about the same length that are read at once, and the responses to them that begin.

    With several lanes, each lane has an equal part of the prompts and of the responses, and answers its own prompts.
    """

    tokens: Array  # "prompt length", padded on the right
    lengths: Array  # " prompt"
    shared: bool  # whether they stand after the prefix
    prompt: Array  # " begun": which one is answered
    row: Array  # " begun": where; the number of rows where nothing begins
    uniforms: Array  # "begun new"


class Decoded(NamedTuple):
    """The contents of the rows. A row that is done is free, or its response has just ended."""

    done: Bool[np.ndarray, " row"]
    lengths: Int32[np.ndarray, " row"]
    tokens: Int32[np.ndarray, "row new"]
    logprobs: Float32[np.ndarray, "row new"]  # nats


class Engine(Protocol):
    """The operations that a backend provides for `sample`."""

    def open(self, shape: Shape, sampling: Sampling) -> None:
        """Makes the rows, all of them free, and computes the prefix."""
        ...

    def begin(self, group: Group) -> None:
        """Prefills prompts, and draws the first token of every response to them."""
        ...

    def decode(self, free: int) -> Decoded:
        """Decodes until `free` rows of every lane, or all rows, are free, but at most `STEPS` tokens of a row."""
        ...

    def close(self) -> None:
        """Releases the rows."""
        ...


def sample(
    engine: Engine,
    requests: Requests,
    *,
    width: int,
    smallest: int,
    lanes: int = 1,
    multiple: int = 1,
    known: Mapping[int, Response] | None = None,
    tell: Tell | None = None,
) -> list[Response]:
    """Samples a response to every request.

    Args:
        width: rows decoded at once.
        smallest: the least length, in tokens, that prompts are padded to; `read_as` says to which.
        lanes: parts of the rows that are refilled independently: one for each process.
        multiple: the number of prompts read at once is a multiple of it.
        known: responses by the number of their request, which are not sampled again.
        tell: called with the responses that have ended, by the number of their request, and now and then with none. An
            error that it raises ends the sampling.
    """
    found = dict(known or {})
    if len(found) == len(requests.prompts):
        return [found[i] for i in range(len(found))]
    shape = shape_of(requests, width=width, smallest=smallest, lanes=lanes, multiple=multiple)
    queue = _Queue(requests, shape, smallest=smallest, known=found)
    engine.open(shape, requests.sampling)
    try:
        while queue.unfinished:
            while (group := queue.next_group()) is not None:
                engine.begin(group)
            ended = queue.ended(engine.decode(queue.enough))
            found |= ended
            if tell is not None:
                tell(ended)
    finally:
        engine.close()
    return [found[i] for i in range(len(requests.prompts))]


def shape_of(requests: Requests, *, width: int, smallest: int, lanes: int = 1, multiple: int = 1) -> Shape:
    """Returns the array sizes for all requests, whichever of them are known already; the arguments are as in `sample`."""
    prefix = requests.prefix if sum(map(_shares(requests.prefix), set(requests.prompts))) > 1 else ()
    own = [len(p) - len(prefix) * _shares(prefix)(p) for p in requests.prompts]
    samples, new, part = Counter(requests.prompts), requests.uniforms.shape[1], width // lanes
    mean = min(part, len(own) // len(samples))
    # a prompt that is asked for very often is read several times: rows are refilled in between
    most = min(max(samples.values()), max(part // _PART, mean))
    return Shape(width, lanes, multiple, most, mean, read_as(max(own), smallest) + new, new, prefix)


def read_as(length: int, smallest: int) -> int:
    """Returns how many tokens a prompt is padded to when it is read.

    These are the next doubling of `smallest`, or three quarters of it if that suffices and the doubling is above 128.
    """
    size = bucket(length, smallest)
    less = size // 4 * 3
    return less if length <= less and size > _TOKENS else size


def _shares(prefix: tuple[int, ...]) -> Callable[[tuple[int, ...]], bool]:
    """Returns a function that says whether a prompt begins with the prefix and goes on after it."""
    n = len(prefix)
    return lambda prompt: n > 0 and len(prompt) > n and prompt[:n] == prefix


class _Prompt(NamedTuple):
    """A prompt, and the requests that it is read for."""

    kind: tuple[int, bool]  # the length that it is padded to, and whether it stands after the prefix
    tokens: tuple[int, ...]  # without the prefix then
    requests: Sequence[int]


class _Queue:
    """The requests that wait, and the requests that are being decoded, with their rows."""

    def __init__(self, requests: Requests, shape: Shape, *, smallest: int, known: Mapping[int, Response]) -> None:
        self.requests, self.shape = requests, shape
        self.free = [list(range(shape.part * lane, shape.part * (lane + 1))) for lane in range(shape.lanes)]
        self.busy: dict[int, int] = {}  # row -> request
        self.waiting = deque(self._prompts(smallest, known))
        self.left = sum(len(prompt.requests) for prompt in self.waiting)  # requests that wait

    def _prompts(self, smallest: int, known: Mapping[int, Response]) -> list[_Prompt]:
        """Returns the prompts of all requests not yet known, long ones first, so that those of a kind are read together."""
        prefix, asked = self.shape.prefix, dict[tuple[int, ...], list[int]]()
        for i, prompt in enumerate(self.requests.prompts):
            if i not in known:
                asked.setdefault(prompt, []).append(i)
        made, part = [], self.shape.samples
        for prompt, numbers in asked.items():
            shared = _shares(prefix)(prompt)
            own = prompt[len(prefix) :] if shared else prompt
            kind = read_as(len(own), smallest), shared
            made += [_Prompt(kind, own, numbers[i : i + part]) for i in range(0, len(numbers), part)]
        return sorted(made, key=lambda prompt: prompt.kind, reverse=True)

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.busy)

    @property
    def enough(self) -> int:
        """The number of free rows in a lane at which decoding stops."""
        shape = self.shape
        if not self.waiting:
            return shape.part
        return min(shape.refill, max(len(self.waiting[0].requests), -(-self.left // shape.lanes)))

    def next_group(self) -> Group | None:
        """Returns the next group of prompts; None if none waits, or there are too few free rows."""
        if not self.waiting or min(map(len, self.free)) < self.enough:
            return None
        (length, shared), shape = self.waiting[0].kind, self.shape
        count, most = shape.group(length)
        tokens, lengths = np.zeros((count, length), np.int32), np.ones(count, np.int32)
        prompt, row = np.zeros(most, np.int32), np.full(most, shape.rows, np.int32)
        uniforms = np.zeros((most, shape.new), np.float32)
        count, most, each = count // shape.lanes, most // shape.lanes, -(-self.left // shape.lanes)
        for lane, free in enumerate(self.free):
            number, at = count * lane, most * lane
            rows = min(len(free), most, max(each, len(self.waiting[0].requests) if self.waiting else 0))
            while number < count * (lane + 1) and self._fits((length, shared), rows):
                own = self.waiting.popleft()
                tokens[number, : len(own.tokens)], lengths[number] = own.tokens, len(own.tokens)
                for request in own.requests:
                    prompt[at], row[at], uniforms[at] = number, free.pop(0), self.requests.uniforms[request]
                    self.busy[int(row[at])] = request
                    at += 1
                self.left, rows = self.left - len(own.requests), rows - len(own.requests)
                number += 1
        return Group(tokens, lengths, shared, prompt, row, uniforms)

    def _fits(self, kind: tuple[int, bool], rows: int) -> bool:
        return bool(self.waiting) and self.waiting[0].kind == kind and len(self.waiting[0].requests) <= rows

    def ended(self, decoded: Decoded) -> dict[int, Response]:
        """Returns the responses that have ended, by the number of their request, and frees their rows."""
        rows = sorted(row for row in self.busy if decoded.done[row])
        for row in rows:
            self.free[row // self.shape.part].append(row)
        return {self.busy.pop(row): self._response(decoded, row) for row in rows}

    def _response(self, decoded: Decoded, row: int) -> Response:
        """Returns the response in a row.

        Its log-probabilities are rounded to a millionth of a nat, which is less than float32 is sure of.
        """
        n = int(decoded.lengths[row])
        tokens = tuple(decoded.tokens[row, :n].tolist())
        nats = np.round(decoded.logprobs[row, :n].astype(np.float64), 6).tolist()
        return Response(tokens, finished=tokens[-1] in self.requests.sampling.eos, logprobs=tuple(nats))
