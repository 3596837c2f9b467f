"""Progress: exact plain lines under a fake clock, and the terminal display as rich renders it."""

import io
import re

import pytest
from rich.console import Console

from ple_jax.training.progress import Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Stream(io.StringIO):
    """Counts what was written since the last flush."""

    pending = 0

    def write(self, text: str) -> int:
        self.pending += len(text)
        return super().write(text)

    def flush(self) -> None:
        self.pending = 0


def terminal() -> Console:
    return Console(record=True, force_terminal=True, width=99, file=io.StringIO(), color_system="standard", _environ={})


@pytest.fixture
def clock():
    return Clock()


def test_plain_lines(clock):
    stream = Stream()
    with Progress(5, console=Console(file=stream, _environ={}), clock=clock) as progress:
        progress.phase("load", 1)  # of a run that goes on: which iteration is next is not known yet
        progress.advance()
        progress.iteration(0)
        progress.phase("evaluate", 32)
        progress.advance(32)
        clock.now = 2.0
        progress.metrics({"heldout_reward": 0.20134})
        progress.iteration(1)
        progress.phase("generate plain", 48)
        clock.now = 4.5
        progress.advance(16, tokens=250)
        progress.advance(32, tokens=500)
        assert stream.getvalue().count("\n") == 3, "a phase is reported when it ends"
        progress.phase("compile")
        progress.advance()
        progress.log("seed 0 [bold] is not markup")
        progress.heading("a heading stands above its phases")
        progress.metrics({"reward_plain": 0.5, "reward_principled": 0.75, "ranked_share": 0.625, "tau": 0.2})
        assert stream.pending == 0
    assert stream.getvalue().splitlines() == [
        "load: 1/1 in 0.0 s",
        "[0/5] evaluate: 32/32 in 2.0 s",
        "iteration 0/5   held-out 0.201",
        "[1/5] generate plain: 48/48 in 2.5 s, 300 tokens/s",
        "seed 0 [bold] is not markup",
        "[1/5] compile: 1 in 0.0 s",
        "a heading stands above its phases",
        "iteration 1/5   plain 0.500   principled 0.750   ranked 62%   tau 0.200",
    ]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", stream.getvalue())


def test_long_plain_lines_are_not_wrapped():
    stream = Stream()
    with Progress(1, console=Console(file=stream, width=20, _environ={})) as progress:
        progress.log("x" * 300)
    assert stream.getvalue() == "x" * 300 + "\n"


@pytest.mark.parametrize("console", [lambda: Console(file=io.StringIO(), _environ={}), terminal])
@pytest.mark.parametrize("metrics", [{}, {"tau": None}, {"tau": float("nan"), "kl": float("inf")}, {"unknown": 1.0}])
def test_missing_metrics_are_left_out(console, metrics):
    console = console()
    with Progress(3, console=console) as progress:
        progress.iteration(1)
        progress.metrics(metrics)
    assert re.findall(r"iteration 1/3(?:   \S.*)?$", console.file.getvalue().replace("\x1b[0m", ""), re.M)
    assert "nan" not in console.file.getvalue() and "None" not in console.file.getvalue()


def test_an_interrupted_phase_shows_how_far_it_came(clock):
    stream = Stream()
    with (
        pytest.raises(KeyboardInterrupt),
        Progress(2, console=Console(file=stream, _environ={}), clock=clock) as progress,
    ):
        progress.iteration(1)
        progress.phase("update", 3)
        progress.advance()
        raise KeyboardInterrupt
    assert stream.getvalue() == "[1/2] update: 1/3 in 0.0 s\n"


def rendered(progress: Progress) -> str:
    console = terminal()
    console.print(progress._render())
    return console.export_text()


def test_terminal_display(clock):
    with Progress(5, console=terminal(), clock=clock) as progress:
        progress.iteration(1)
        assert "iteration 1/5" in rendered(progress) and "ETA -" in rendered(progress)
        clock.now = 90.0
        progress.metrics({"heldout_reward": 0.5, "reward_plain": 0.25, "reward_principled": 0.75, "tau": 0.2})
        progress.iteration(2)
        progress.phase("generate principled", 48)
        clock.now = 100.0
        progress.advance(12, tokens=2500)
        text = rendered(progress)
    assert "1:40 elapsed, ETA 5:50" in text  # 10 s into the 2nd of 5 iterations of 90 s: 80 + 3 * 90 are left
    assert "12/48, 250 tokens/s" in text
    assert "held-out 0.500   plain 0.250   principled 0.750   tau 0.200" in text


def test_work_without_iterations_shows_its_heading(clock):
    with Progress(5, console=terminal(), clock=clock) as progress:
        assert "opening" in rendered(progress) and "ETA" not in rendered(progress)
        progress.heading("probe, prompt 2 of 10: a rule: all of its words")
        progress.phase("generate plain", 48)
        text = rendered(progress)
    assert "probe, prompt 2 of 10 " in text and "a rule" not in text and "opening" not in text and "ETA" not in text


def test_bars_are_filled_in_proportion(clock):
    with Progress(4, console=terminal(), clock=clock) as progress:
        progress.iteration(3)
        progress.phase("score", 10)
        progress.advance(5)
        console = terminal()
        console.print(progress._render())
    spans = [re.findall(r"(\x1b\[[\d;]+m)(━+)", line) for line in console.file.getvalue().splitlines()[:2]]
    assert [[len(bar) for _, bar in line] for line in spans] == [[15, 14], [15, 14]]  # halves, with a half cell between


def test_the_display_ends_below_the_lines_of_the_iterations(clock):
    console = terminal()
    with Progress(2, console=console, clock=clock) as progress:
        progress.iteration(1)
        progress.metrics({"tau": 0.2})
        progress.iteration(2)
        progress.log("a [bold]note[/bold]")
        progress.metrics({"tau": 0.18})
    text = console.export_text()
    assert text.index("iteration 1/2   tau 0.200") < text.index("a [bold]note[/bold]")
    assert text.index("a [bold]note[/bold]") < text.index("iteration 2/2   tau 0.180")
    assert console.file.getvalue().count("\x1b[?25l") == console.file.getvalue().count("\x1b[?25h") == 1  # cursor


def test_hours_in_the_eta(clock):
    with Progress(3, console=terminal(), clock=clock) as progress:
        progress.iteration(1)
        clock.now = 3000.0
        progress.iteration(2)
        assert "50:00 elapsed, ETA 1:40:00" in rendered(progress)
