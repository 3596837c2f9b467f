"""What a run is made of, and what every loop does with it: where it stands, its commits, its steps."""

import time
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ple_jax.core.answers import Cache
from ple_jax.core.types import Backend, Loss, Query, Reward, Sink, Tokenizer
from ple_jax.data.left_out import Bad
from ple_jax.prompts.principles import Principles
from ple_jax.training.interrupt import Stop
from ple_jax.training.progress import Progress

_START = time.time()


class Run(NamedTuple):
    """Everything a run needs, made once by the entry."""

    config: Any
    workdir: Path
    backend: Backend
    tokenizer: Tokenizer
    eos: tuple[int, ...]
    base_model: str
    context: int  # tokens that the model was trained to see at once
    transposed: bool  # its linear weights are [in, out], which PEFT wants to know
    parameters: int  # of the base, that a token is multiplied with
    algorithm: ModuleType
    loss: Loss
    reward: Reward
    cache: Cache
    principles: Principles
    train: list[Query]
    heldout: list[Query]
    bad: dict[str, list[Bad]]  # records left out, by which set
    sinks: list[Sink]
    progress: Progress
    stop: Stop
    clock: "Clock"


class Clock:
    """Wall time in laps, so that a resumed run adds up what every process spent until its last commit."""

    def __init__(self) -> None:
        self._last = _START

    def lap(self) -> float:
        """Seconds since the last lap; the first one counts from the start of the process."""
        now = time.time()
        elapsed, self._last = now - self._last, now
        return elapsed


# ---------------------------------------------------------------- where it stands




# ---------------------------------------------------------------- steps




# ---------------------------------------------------------------- the machine


