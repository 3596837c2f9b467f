"""What a run has reached, in words for the terminal, and what should make one doubt it."""

from collections.abc import Iterator, Mapping
from typing import Any

from ple_jax.core.rules import is_number

_CUT = 0.5  # share of responses cut off, above which it is said
_ALIKE = 0.5  # of the start's Distinct-2, below which responses are said to repeat one another


def of_two_rewards(kept: Mapping[str, Any]) -> Iterator[str]:
    """Yields a warning for every time that another version of the reward or of the second reward was accepted.

    Args:
        kept: the contents of config.json.
    """
    for change in kept.get("changed", ()):
        if "inputs.reward" in change:
            yield (
                f"warning: after iteration {change['after']} the reward is another version than before (--accept=reward):"
                " rewards before and after need not be of one scale, the gain over the start included"
            )
        if "inputs.second" in change or "eval.second_kwargs" in change:
            yield (
                f"warning: after iteration {change['after']} the second reward is another version than before"
                " (--accept=reward): its values before and after need not be of one scale"
            )


def reached(summary: Mapping[str, Any]) -> str:
    """Says what a run reached: the reward of the best evaluation under its largest budget, or else of the last evaluation.

    For a reward model it is the accuracy on held-out pairs.
    """
    if "heldout_reward_after" not in summary and "heldout_accuracy_ci95" not in summary:  # of an algorithm of one's own
        numbers = {key: value for key, value in summary.items() if key.startswith("heldout_") and is_number(value)}
        said = ", ".join(f"{key.removeprefix('heldout_').replace('_', ' ')} {value:.4g}" for key, value in numbers.items())
        return f"held-out {said}" if said else "trained"
    if "heldout_accuracy_ci95" in summary:
        low, high = summary["heldout_accuracy_ci95"]
        return (
            f"held-out accuracy {summary['heldout_accuracy']:.3f} (95% interval {low:.3f} to {high:.3f}), calibration error"
            f" {summary['heldout_calibration_error']:.3f}, over {summary['heldout_examples']} pairs"
        )
    after, (low, high), where = summary["heldout_reward_after"], summary["heldout_gain_ci95"], ""
    best = list(summary.get("best", {}).values())
    if best and best[-1]["step"] == 0 and len(summary["points"]) > 1:
        last = summary["points"][-1]
        return (
            f"held-out reward {best[-1]['reward']:.3f}, that of the start: {none_better(summary)} (the last one:"
            f" {last['reward']:.3f}, {last['kl']:.1f} nats a response from the start)"
        )
    if best:
        where = f", {best[-1]['kl']:.1f} nats a response from the start"
        if best[-1]["step"] != summary["points"][-1]["step"]:
            where += f" (the last evaluation: {after:.3f}, {summary['points'][-1]['kl']:.1f} nats)"
        after, (low, high) = best[-1]["reward"], best[-1].get("gain_ci95", (None, None))
    # of an evaluation whose file is gone, the reward is known and not the interval
    gain = "" if low is None else f" (95% interval of the gain {low:.3f} to {high:.3f})"
    return f"held-out reward {summary['heldout_reward_before']:.3f} -> {after:.3f}{gain}{where}"


def none_better(summary: Mapping[str, Any]) -> str:
    """Says that no evaluation was better than the start, within what budget and by which reward."""
    budget = next(reversed(summary["best"]), "")
    within = f" within {budget.removeprefix('kl_')} nats" if budget.startswith("kl_") else ""
    return f"no evaluation{within} was better{' by the second reward' if summary.get('best_by') == 'second' else ''}"


def doubts(summary: Mapping[str, Any], config: Any) -> Iterator[str]:
    """Yields the warnings about what a run reached that are said at its end."""
    yield from collapsed(summary)
    yield from cut_off(summary, config)


def collapsed(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yields a warning if the responses of what a run reached are much more alike than those of its start."""
    if (last := _last(summary)) is None:
        return
    before, after = summary["points"][0]["distinct_2"], last["distinct_2"]
    if after < _ALIKE * before:
        yield (
            f"warning: Distinct-2 of the held-out responses fell from {before:.2f} to {after:.2f}: they repeat one another,"
            " so look at them in the report before you believe the reward; a smaller --config.eval.max_kl keeps them closer"
            " to the start"
        )


def cut_off(summary: Mapping[str, Any], config: Any) -> Iterator[str]:
    """Yields a warning if most responses of what a run reached were cut off, though a chat's answers have an end."""
    if config.task.chat and (last := _last(summary)) is not None and last["truncated"] > _CUT:
        yield (
            f"warning: {last['truncated']:.0%} of the held-out responses were cut off at"
            f" config.sampling.max_new_tokens={config.sampling.max_new_tokens}: raise it"
        )


def _last(summary: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the evaluation that a run reached: the best under its largest budget, or else the last; None without any."""
    found = list(summary.get("best", {}).values()) or summary.get("points", [])
    return found[-1] if found else None
