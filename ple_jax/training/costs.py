"""What a run costs: tokens, reward calls, operations, seconds. Counted where it is spent, kept in every checkpoint.

Seconds are those of the process that committed an iteration: what a killed one spent since its last checkpoint, and sampling
that was read from the journal afterwards, are in none of them.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ple_jax.core.types import Batch

# counters of a run's state: since the start of training, evaluations apart
COUNTERS = (
    "queries", "generated_tokens", "prompt_tokens", "principle_tokens", "reward_calls", "training_tokens", "flops",
)  # fmt: skip
PHASES = ("generate", "score", "prepare", "update", "evaluate")


def fresh() -> dict[str, Any]:
    """The counters of a run that has done nothing."""
    return {**dict.fromkeys(COUNTERS, 0), "seconds": dict.fromkeys(PHASES, 0.0)}


@contextmanager
def timed(state: dict[str, Any], phase: str) -> Iterator[None]:
    """Adds the seconds spent inside to a phase; nothing if it ends in an error, whose work is not kept."""
    started = time.perf_counter()
    yield
    state["seconds"][phase] += time.perf_counter() - started


def tokens(batch: Batch) -> int:
    """Real tokens of a packed batch: every prompt once, and its responses."""
    return int(batch.prompt_mask.sum() + batch.response_mask.sum())


def forward_flops(parameters: int, tokens: int) -> int:
    """2 * parameters * tokens: a multiplication and an addition a weight (arXiv:2001.08361, section 2.1).

    Args:
        parameters: that a token is multiplied with, in the layers (of a mixture its own experts') and in the head.
            Attention between tokens is left out.
    """
    return 2 * parameters * tokens


def update_flops(parameters: int, tokens: int) -> int:
    """A gradient step with a frozen base: once forward and once back to the activations, with no gradient of its weights.

    Recomputation (config.model.remat) and the adapter's own operations, a hundredth of that, are left out.
    """
    return 2 * forward_flops(parameters, tokens)


def totals(state: dict[str, Any]) -> dict[str, float]:
    """The counters and the seconds without evaluation, for a line of metrics.jsonl: what curves are drawn against."""
    seconds = sum(spent for phase, spent in state["seconds"].items() if phase != "evaluate")
    return {**{f"total_{name}": state[name] for name in COUNTERS}, "total_seconds": seconds}
