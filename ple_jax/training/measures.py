"""What is measured of an iteration and of the held-out queries, and the summary of a run."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ple_jax import rewards
from ple_jax.core import noise
from ple_jax.core.batches import pack
from ple_jax.core.types import Query, Response, Rollout, Slot
from ple_jax.formulas import intervals
from ple_jax.formulas import texts as measure
from ple_jax.training import costs
from ple_jax.training.journal import Journal, read
from ple_jax.training.prompting import Rendered
from ple_jax.training.run import Run
from ple_jax.training.sampling import sample
from ple_jax.training.scoring import quarantine, raw_rewards, score
from ple_jax.training.state import logged, peak_memory
from ple_jax.training.steps import diagnose

_LEAK = 0.1  # share of trigrams above which principles are said to leak


def summarise(run: Run, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The rollout metrics of one iteration."""
    limit, transform = run.config.sampling.max_new_tokens, run.config.reward.transform
    by_kind: dict[str, list[Response]] = {}
    for rollout in rollouts:
        for response in rollout.responses:
            by_kind.setdefault(response.kind, []).append(response)
    text = run.tokenizer.encode(run.principles.text, add_special_tokens=False)
    values: dict[str, float] = {}
    for kind, responses in by_kind.items():
        tokens = [r.tokens for r in responses]
        values[f"reward_{kind}"] = float(np.mean([r.reward for r in responses]))
        values[f"score_{kind}"] = float(np.mean([r.score for r in responses]))
        for part in responses[0].parts:
            values[f"reward_{part}_{kind}"] = float(np.mean([r.parts[part] for r in responses]))
        values[f"length_{kind}"] = float(np.mean([len(t) for t in tokens]))
        values[f"distinct_2_{kind}"] = measure.distinct_n(tokens, 2)
        values[f"overlap_{kind}"] = float(np.mean([measure.ngram_overlap(t, text, 3) for t in tokens]))
    everything = [r for responses in by_kind.values() for r in responses]
    margins = np.array([rollout.margin for rollout in rollouts])
    values |= {
        **({"tau": rollouts[0].tau} if not math.isnan(rollouts[0].tau) else {}),
        **({"margin": float(margins.mean())} if not np.isnan(margins).any() else {}),
        "negative_margin_share": float((margins < 0).mean()),
        "ranked_share": float(np.mean([rollout.decision == "ranked" for rollout in rollouts])),
        "truncated_share": float(np.mean([not r.finished and len(r.tokens) == limit for r in everything])),
    }
    if "principled" in by_kind and "plain" in by_kind:
        values["leak"] = values["overlap_principled"] - values["overlap_plain"]
    pooled = rewards.statistics(raw_rewards(rollouts), transform)
    return values | {f"transform_{name}": value for name, value in pooled.items()}


def warn_of_leak(run: Run, values: dict[str, float]) -> None:
    """Says where principled responses repeat the principles more than plain ones do: the text would be learned with them."""
    if values.get("leak", 0.0) > _LEAK:
        run.progress.log(
            f"warning: {values['overlap_principled']:.0%} of the trigrams of principled responses stand in the principles"
            f" ({values['overlap_plain']:.0%} of the plain ones'): the policy quotes them, and training would teach it to;"
            " shorten or rephrase them"
        )


def evaluate(run: Run, iteration: int, render: Callable[[Query, bool], Rendered]) -> tuple[list[Rollout], int]:
    """Responses to the held-out queries as the policy now is, scored; and how many tokens were sampled for it.

    Noise is the same at every evaluation, so that differences between evaluations are paired. Before training the
    principled prompt is evaluated too: what the principles buy without any training.
    """
    journal = Journal(run.workdir / "evaluations", iteration)
    if (rollouts := journal.read()) is None:
        slots = [Slot("plain", False, s) for s in range(run.config.eval.samples)]
        if iteration == 0:
            slots += [Slot("principled", True, s) for s in range(run.config.eval.samples)]
        rollouts = score(run, sample(run, run.heldout, slots, journal, noise.HELDOUT, render))
        # those without a reward stay where they are: evaluations are of the same queries
        quarantine(run, rollouts, f"heldout_{iteration:04d}")
        journal.complete(rollouts)
    return rollouts, sum(len(r.tokens) for rollout in rollouts for r in rollout.responses)


def mean_rewards(rollouts: Sequence[Rollout], kind: str = "plain") -> np.ndarray:
    """Mean reward of every query over its responses of one kind that have one; nan where none has."""
    found = [[r.reward for r in rollout.responses if r.kind == kind] for rollout in rollouts]
    kept = [[reward for reward in rewards_ if not math.isnan(reward)] for rewards_ in found]
    return np.array([np.mean(rewards_) if rewards_ else math.nan for rewards_ in kept])


def finish(run: Run, state: dict[str, Any], render: Callable[[Query, bool], Rendered]) -> None:
    """Evaluates where it is due and writes the metrics line of the iteration that `state` stands at, unless it is there."""
    iteration, config = state["iteration"], run.config
    if iteration in logged(run.workdir / "metrics.jsonl"):
        return
    values = {**state["metrics"], **costs.totals(state)}
    if iteration % config.eval.every == 0 or iteration == config.iterations:
        started = time.perf_counter()
        rollouts, _ = evaluate(run, iteration, render)
        values["heldout_reward"] = float(np.nanmean(mean_rewards(rollouts)))
        if iteration == 0:
            values["heldout_reward_principled"] = float(np.nanmean(mean_rewards(rollouts, "principled")))
        picks = [range(config.eval.samples)] * config.eval.diagnostic_queries
        few = rollouts[: config.eval.diagnostic_queries]
        shape = {"prompt_multiple": config.sampling.bucket, "response_len": config.sampling.max_new_tokens}
        policy = diagnose(run, pack(few, picks[: len(few)], **shape), with_loss=False)
        values |= {f"heldout_{name}": value for name, value in policy.items()}
        values["seconds_evaluate"] = time.perf_counter() - started
        state["seconds"]["evaluate"] += values["seconds_evaluate"]
    for sink in run.sinks:
        sink(values, iteration)
    run.progress.metrics(values)


def summary(run: Run, backend: str, state: dict[str, Any]) -> dict[str, Any]:
    """summary.json: what a run did, in a few numbers."""
    config = run.config
    before = mean_rewards(read(Journal(run.workdir / "evaluations", 0).path))
    after = mean_rewards(read(Journal(run.workdir / "evaluations", config.iterations).path))
    both = ~np.isnan(before + after)
    before, after = before[both], after[both]
    evaluated = sum(
        len(r.tokens)
        for path in sorted((run.workdir / "evaluations").glob("iter_*.jsonl"))
        if not path.name.endswith(".partial.jsonl")
        for rollout in read(path)
        for r in rollout.responses
    )
    return {
        "algorithm": config.algorithm,
        "trainer": config.trainer,
        "backend": backend,
        "seed": config.seed,
        "heldout_reward_before": float(before.mean()),
        "heldout_reward_after": float(after.mean()),
        "heldout_gain_ci95": list(intervals.bootstrap_ci(after - before, seed=config.seed)),
        "heldout_queries": len(before),
        "iterations": config.iterations,
        **{name: state[name] for name in costs.COUNTERS},
        "evaluation_tokens": evaluated,
        "seconds": state["seconds"],
        "wall_seconds": state["wall_seconds"] + run.clock.lap(),
        "peak_memory_bytes": max(state["peak_memory_bytes"], peak_memory()),
    }
