"""What a run costs: tokens, reward calls, operations, seconds. Counted where it is spent, kept in every checkpoint.

Seconds are those of the process that committed an iteration: what a killed one spent since its last checkpoint, and sampling
that was read from the journal afterwards, are in none of them.
"""

from collections.abc import Mapping
from typing import NamedTuple

from ple_jax.core.types import Batch

PHASES = ("generate", "score", "prepare", "update", "evaluate")


class Costs(NamedTuple):
    """Counters since the start of training, evaluations apart, and seconds by phase."""

    queries: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    principle_tokens: int = 0
    reward_calls: int = 0
    training_tokens: int = 0
    flops: int = 0
    seconds: Mapping[str, float] = dict.fromkeys(PHASES, 0.0)

    def plus(self, **more: int) -> "Costs":
        """Counters raised by so much."""
        return self._replace(**{name: getattr(self, name) + n for name, n in more.items()})

    def took(self, phase: str, seconds: float) -> "Costs":
        """Seconds added to a phase."""
        return self._replace(seconds={**self.seconds, phase: self.seconds[phase] + seconds})

    def counters(self) -> dict[str, int]:
        """All but the seconds."""
        return {name: value for name, value in self._asdict().items() if name != "seconds"}

    def totals(self) -> dict[str, float]:
        """Counters and seconds without evaluation, for a line of metrics.jsonl: what curves are drawn against."""
        seconds = sum(spent for phase, spent in self.seconds.items() if phase != "evaluate")
        return {**{f"total_{name}": value for name, value in self.counters().items()}, "total_seconds": seconds}


COUNTERS = tuple(name for name in Costs._fields if name != "seconds")


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
