"""The progress display of a run: live on a terminal, plain lines anywhere else."""

import math
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# metric -> label, format; in this order, and only those that a run has
_SHOWN = {
    "heldout_reward": ("held-out", "{:.3f}"),
    "reward_plain": ("plain", "{:.3f}"),
    "reward_principled": ("principled", "{:.3f}"),
    "ranked_share": ("ranked", "{:.0%}"),
    "tau": ("tau", "{:.3f}"),
    "heldout_kl_response": ("KL", "{:.1f} nats"),  # to the start, per response, as budgets have it
    "loss": ("loss", "{:.3f}"),
}


class Progress:
    """The progress display of a run, as a context manager.

    A terminal gets a live display (iteration, phase, tokens/s, rewards, ETA) under the lines of the finished iterations.
    Anything else gets plain lines, flushed at once and free of control characters: one for every phase that ended and one
    for every iteration.

    Args:
        total_iterations: I, the number of iterations; they count from 1, as in metrics.jsonl.
        console: where to draw; standard output by default. Pass `Console(file=stream)` for another stream.
        clock: a function that returns monotonic seconds.
    """

    def __init__(
        self,
        total_iterations: int,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_iterations = total_iterations
        self._console = console or Console()
        self._clock = clock
        self._iteration: int | None = None  # none has begun: the run is being opened
        self._finished = 0
        self._heading, self._numbers = "opening", ""
        self._phase = ""
        self._done = self._total = self._tokens = 0
        self._run_start = self._iteration_start = self._phase_start = clock()
        self._last_duration: float | None = None
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._console.is_interactive:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_phase()
        self._live.stop()

    def iteration(self, i: int) -> None:
        """Begins iteration `i`, counted from 1; 0 is the work before training (warm-up, first evaluation)."""
        self._end_phase()
        now = self._clock()
        if self._iteration:  # the latest iteration predicts the next best: the first one compiles
            self._last_duration = now - self._iteration_start
        self._iteration, self._iteration_start = i, now
        self._finished = max(i - 1, 0)

    def phase(self, name: str, total: int = 0) -> None:
        """Begins a phase, such as "generate plain", "score", "update", "evaluate" or "compile", and ends the one before it.

        Args:
            name: what is being done.
            total: how many units `advance` will count; 0 if that is unknown.
        """
        self._end_phase()
        self._phase, self._total, self._done, self._tokens = name, total, 0, 0
        self._phase_start = self._clock()

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        """Counts `n` more finished units of the phase, which took `tokens` tokens."""
        self._done += n
        self._tokens += tokens

    def metrics(self, metrics: Mapping[str, float | None]) -> None:
        """Shows the metrics of the iteration once it is over. Values that are missing, None or not finite are left out."""
        self._end_phase()
        self._finished = self._iteration or 0
        finite = {key: value for key, value in metrics.items() if value is not None and math.isfinite(value)}
        parts = [f"{label} {form.format(finite[key])}" for key, (label, form) in _SHOWN.items() if key in finite]
        self._numbers = "   ".join(parts)
        self._print(f"iteration {self._finished}/{self._total_iterations}   {self._numbers}".rstrip(), style="bold")

    def log(self, text: str) -> None:
        """Prints a line of its own, above the live display if there is one."""
        self._print(text)

    def heading(self, text: str) -> None:
        """Ends the phase, and prints a line that is the heading of the phases to come.

        Before the first iteration the live display shows it, as far as its first colon.
        """
        self._end_phase()
        self._heading = text.partition(":")[0]
        self._print(text)

    def _print(self, text: str, style: str = "") -> None:
        if self._live.is_started:
            self._console.print(Text(text, style=style), soft_wrap=True)
        else:
            print(text, file=self._console.file, flush=True)

    def _end_phase(self) -> None:
        if self._phase and not self._live.is_started:
            count = f"{self._done}/{self._total}" if self._total else f"{self._done}"
            where = "" if self._iteration is None else f"[{self._iteration}/{self._total_iterations}] "
            line = f"{where}{self._phase}: {count}"
            self._print(f"{line} in {self._clock() - self._phase_start:.1f} s{self._speed()}")
        self._phase = ""

    def _speed(self) -> str:
        return f", {self._tokens / max(self._clock() - self._phase_start, 1e-9):,.0f} tokens/s" if self._tokens else ""

    def _eta(self) -> str:
        if self._last_duration is None:
            return "-"
        current = max(self._last_duration - (self._clock() - self._iteration_start), 0.0)
        return _duration(current + self._last_duration * (self._total_iterations - (self._iteration or 0)))

    def _render(self) -> RenderableType:
        """Draws the live display. rich calls it four times a second from its own thread."""
        bars = Table.grid(padding=(0, 2))
        elapsed = _duration(self._clock() - self._run_start)
        bars.add_row(
            self._heading if self._iteration is None else f"iteration {self._iteration}/{self._total_iterations}",
            ProgressBar(total=self._total_iterations, completed=self._finished, width=30),
            f"{elapsed} elapsed" + ("" if self._iteration is None else f", ETA {self._eta()}"),
        )
        if self._phase:
            count = f"{self._done}/{self._total}" if self._total else f"{self._done}"
            bars.add_row(
                self._phase,
                ProgressBar(total=self._total or None, completed=self._done, width=30),
                f"{count}{self._speed()}",
            )
        return Group(bars, Text(self._numbers, style="dim")) if self._numbers else bars


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
