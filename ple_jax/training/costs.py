"""The costs of a run (tokens, reward calls, operations, seconds), counted where they are spent and kept in every checkpoint.

The seconds of an iteration are those of the process that committed it. What a killed process spent since its last checkpoint
is not in them, nor is sampling that was read from the journal afterwards.
"""

from collections.abc import Mapping
from typing import NamedTuple

from ple_jax.core.types import Batch

PHASES = ("generate", "score", "prepare", "update", "evaluate")


class Costs(NamedTuple):
    """Counters since the start of training, without evaluations, and the seconds spent in each phase."""

    queries: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    principle_tokens: int = 0
    reward_calls: int = 0
    training_tokens: int = 0
    flops: int = 0
    seconds: Mapping[str, float] = dict.fromkeys(PHASES, 0.0)

    def plus(self, **more: int) -> "Costs":
        """Returns these costs with the named counters raised by the given amounts."""
        return self._replace(**{name: getattr(self, name) + n for name, n in more.items()})

    def took(self, phase: str, seconds: float) -> "Costs":
        """Returns these costs with `seconds` added to a phase, one of `PHASES`."""
        return self._replace(seconds={**self.seconds, phase: self.seconds[phase] + seconds})

    def counters(self) -> dict[str, int]:
        """Returns all counters by name, without the seconds."""
        return {name: value for name, value in self._asdict().items() if name != "seconds"}

    def totals(self) -> dict[str, float]:
        """Returns the counters and the seconds without evaluation, as `total_` metrics for a line of metrics.jsonl. Curves
        are drawn against them.
        """
        seconds = sum(spent for phase, spent in self.seconds.items() if phase != "evaluate")
        return {**{f"total_{name}": value for name, value in self.counters().items()}, "total_seconds": seconds}


COUNTERS = tuple(name for name in Costs._fields if name != "seconds")


def tokens(batch: Batch) -> int:
    """Counts the real tokens of a batch, without padding: every prompt once, and its responses."""
    return int(batch.prompt_mask.sum() + batch.response_mask.sum())


def forward_flops(parameters: int, tokens: int) -> int:
    """Computes the operations of a forward pass, 2 * parameters * tokens: a multiplication and an addition per weight and
    token (arXiv:2001.08361, section 2.1).

    Args:
        parameters: number of weights that a token is multiplied with, in the layers (in a mixture of experts only those of
            its own experts) and in the head. Attention between tokens is left out.
        tokens: number of tokens in the pass.
    """
    return 2 * parameters * tokens


def update_flops(parameters: int, tokens: int) -> int:
    """Computes the operations of a gradient step with a frozen base: one forward pass, and one backward pass to the
    activations without gradients of the base's weights.

    Recomputation (config.model.remat) and the adapter's own operations, a hundredth of that, are left out. Arguments are as
    in `forward_flops`.
    """
    return 2 * forward_flops(parameters, tokens)
