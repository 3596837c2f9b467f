"""The parts of a run: a few small tuples, made once when the run is opened. Each stage takes those that it reads."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from ple_jax.core.answers import Cache
from ple_jax.core.types import Backend, Loss, Reward, Sink, Tokenizer
from ple_jax.data.load import Data
from ple_jax.training.interrupt import Stop
from ple_jax.training.progress import Progress
from ple_jax.training.prompting import Prompts

_START = time.monotonic()  # and not the time of day, which may be set back
A = TypeVar("A")  # Algorithm or OfflineAlgorithm


class Base(NamedTuple):
    """The facts about the frozen base model that do not depend on the backend."""

    name: str
    tokenizer: Tokenizer
    eos: tuple[int, ...]
    context: int  # tokens that it was trained to see at once
    transposed: bool  # its linear weights are [in, out], which PEFT wants to know
    parameters: int  # that a token is multiplied with
    revision: str | None = None  # the commit, of a model from a hub


class Clock:
    """A clock that measures wall time in laps: a resumed run adds up what every process spent until its last commit."""

    def __init__(self) -> None:
        self._last = _START

    def lap(self) -> float:
        """Returns the seconds since the last lap. The first lap counts from the start of the process."""
        now = time.monotonic()
        elapsed, self._last = max(now - self._last, 0.0), now
        return elapsed


class Session(NamedTuple):
    """The work of this process on a directory: where it writes, what it shows, and when it is to stop."""

    workdir: Path
    sinks: list[Sink]
    keep: int  # newest checkpoints that stay
    cache: Cache
    progress: Progress
    stop: Stop
    clock: Clock
    profile: bool = False  # whether an iteration is traced
    before: Mapping[str, Any] = {}  # environment.json of the process before this one


class Run(NamedTuple, Generic[A]):
    """An open run: everything that `modes` open and that the training loops pass on."""

    config: Any
    base: Base
    backend: Backend
    algorithm: A
    loss: Loss
    data: Data
    prompts: Prompts
    reward: Reward
    session: Session
    second: Reward | None = None  # that training never sees: evaluations say what it gives
