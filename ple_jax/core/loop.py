"""Algorithm 1 (arXiv:2408.02599), and the only place that knows its order.

Sample both kinds of responses, score, decide with the threshold, update, lower the threshold; evaluate before, during and
after. What is on disk decides where a run stands: the newest checkpoint (the commit point), and the journal of the
iteration that was being sampled.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ple_jax import losses
from ple_jax.core import costs, data, rewards, statistics, tasks
from ple_jax.core import metrics as measure
from ple_jax.core.batches import pack
from ple_jax.core.rollouts import Journal, read
from ple_jax.core.run import Run, check_finite, commit, logged, micro_batches, peak_memory, prepared, restore
from ple_jax.core.sampling import (
    Rendered,
    after_principles,
    check_context,
    given,
    prompt_of,
    quarantine,
    raw_rewards,
    renderer,
    sample,
    score,
    transformed,
    write_bad,
)
from ple_jax.core.sinks import truncate_jsonl
from ple_jax.core.types import Batch, Outputs, Query, Response, Rollout, Slot

# the number of noise that is no iteration's: every evaluation draws with the same (`generations.NOISE` is another)
HELDOUT = -1
_LEAK = 0.1  # share of trigrams above which principles are said to leak


# ---------------------------------------------------------------- the loop


def train(run: Run) -> dict[str, Any]:
    """Runs, or goes on with, the whole of Algorithm 1; returns the totals of the run."""
    render, schedule = renderer(run), run.algorithm.schedule(run.config)
    state = begin(run, render)
    while state["iteration"] < run.config.iterations:
        with one_iteration(run, state, render) as values:
            rollouts = collect(run, state["iteration"], float(schedule(state["iteration"])), render, state)
            values |= summarise(run, rollouts)
            warn_of_leak(run, values)
            values |= update(run, rollouts, state)
    return state


def begin(run: Run, render: Callable[[Query, bool], Rendered]) -> dict[str, Any]:
    """Where the run stands, evaluated: a fresh one after its warm-up, or its newest checkpoint."""
    state = restore(run, fresh=warm_up)
    run.progress.iteration(state["iteration"])
    truncate_jsonl(run.workdir / "metrics.jsonl", state["iteration"])
    finish(run, state, render)
    return state


@contextmanager
def one_iteration(
    run: Run, state: dict[str, Any], render: Callable[[Query, bool], Rendered]
) -> Iterator[dict[str, float]]:
    """One iteration, whatever updates inside: its metrics go into what this gives, and its end commits and evaluates.

    The metrics get what the iteration cost, as the counters of `state` say. An error inside leaves the last commit in force.
    """
    run.progress.iteration(state["iteration"] + 1)
    before = {**state, "seconds": dict(state["seconds"])}
    values: dict[str, float] = {}
    yield values
    phases = [phase for phase in costs.PHASES if phase != "evaluate"]
    spent = {phase: state["seconds"][phase] - before["seconds"][phase] for phase in phases}
    new = {name: state[name] - before[name] for name in ("generated_tokens", "training_tokens")}
    if spent["generate"]:  # and not read from the journal
        values["generate_tokens_per_second"] = new["generated_tokens"] / spent["generate"]
    values["train_tokens_per_second"] = new["training_tokens"] / max(spent["update"], 1e-9)
    state["iteration"] += 1
    state["metrics"] = {**values, **new, **{f"seconds_{name}": s for name, s in spent.items()}}
    commit(run, state)
    finish(run, state, render)


def warm_up(run: Run, state: dict[str, Any]) -> None:
    """Step 0 of Algorithm 1: fine-tunes on the SFT set, if there is one; the policy then becomes the reference."""
    sft = run.config.sft
    if sft.data is None:
        return
    found = data.load_sft(run.config)
    examples, both = tasks.disjoint(found.queries, run.heldout)
    run.bad["sft"] = found.bad + both
    write_bad(run)
    size, wanted = run.config.optimizer.batch_queries, Slot("reference", source="completion")
    rollouts = [
        Rollout(query.id, query.prompt, tuple(prompt_of(run, query, False)[1]), (given(run, query, wanted),))
        for query in examples
    ]
    longest = max(len(r.responses[0].tokens) for r in rollouts)
    check_context(run, examples, max(len(r.prompt_tokens) + len(r.responses[0].tokens) for r in rollouts))
    run.progress.phase("warm-up", -(-len(rollouts) // size) * sft.epochs)
    for epoch in range(sft.epochs):
        order = np.random.default_rng([run.config.seed, epoch]).permutation(len(rollouts))
        for start in range(0, len(order), size):
            run.stop.check()
            chosen = [rollouts[i] for i in order[start : start + size]]
            batch = pack(chosen, [(0,)] * len(chosen), prompt_multiple=run.config.sampling.bucket, response_len=longest)
            batch.data["normaliser"] = np.full(len(chosen), batch.response_mask.sum() / len(chosen), np.float32)
            with costs.timed(state, "update"):
                run.backend.update(micro_batches(batch, run.config.optimizer.micro_queries), sft_loss, lr=sft.lr)
            state["training_tokens"] += costs.tokens(batch)
            state["flops"] += costs.update_flops(run.parameters, costs.tokens(batch))
            run.progress.advance(1)
    run.backend.freeze_reference()


def sft_loss(outputs: Outputs, batch: Batch) -> tuple[Any, dict[str, Any]]:
    """Cross-entropy per response token of the optimiser batch."""
    return losses.nll(outputs.logprobs[:, 0], batch.response_mask[:, 0], normaliser=batch.data["normaliser"]), {}


def collect(
    run: Run, iteration: int, tau: float, render: Callable[[Query, bool], Rendered], state: dict[str, Any]
) -> list[Rollout]:
    """Algorithm 1, lines 1 to 5: the iteration's labelled rollouts, from the journal where it is complete."""
    config, journal = run.config, Journal(run.workdir / "rollouts", iteration)
    slots = run.algorithm.collect(config)
    if (rollouts := journal.read()) is None:
        queries = tasks.draw(run.train, config.queries_per_iteration, seed=config.seed, iteration=iteration)
        with costs.timed(state, "generate"):
            sampled = sample(run, queries, slots, journal, iteration, render)
        with costs.timed(state, "score"):
            kept = transformed(quarantine(run, score(run, sampled), f"iter_{iteration:04d}"), config.reward.transform)
        journal.complete(run.algorithm.label(kept, tau, iteration, config))
        # training reads what is on disk, here as after a resume
        rollouts = read(journal.path)
    quarantined = run.workdir / "quarantine" / journal.path.name
    bad = read(quarantined) if quarantined.exists() else []  # was sampled and scored too
    count(run, [*rollouts, *bad], [slot for slot in slots if slot.source == "policy"], render, state)
    return rollouts


def count(
    run: Run,
    rollouts: Sequence[Rollout],
    slots: Sequence[Slot],
    render: Callable[[Query, bool], Rendered],
    state: dict[str, Any],
) -> None:
    """Adds what an iteration's sampling and scoring cost to the state; what principles add to prompts is counted apart."""
    kinds, queries = {slot.kind for slot in slots}, {query.id: query for query in run.train}
    state["queries"] += len(rollouts)
    for rollout in rollouts:
        sampled = [len(r.tokens) for r in rollout.responses if r.kind in kinds]
        plain = len(rollout.prompt_tokens) * len(slots)
        guided = [render(queries[rollout.query_id], True).whole for slot in slots if slot.principled]
        added = sum(map(len, guided)) - len(rollout.prompt_tokens) * len(guided)
        state["generated_tokens"] += sum(sampled)
        state["prompt_tokens"] += plain
        state["principle_tokens"] += added
        state["reward_calls"] += len(rollout.responses)
        state["flops"] += costs.forward_flops(run.parameters, sum(sampled) + plain + added)


# ---------------------------------------------------------------- training


def update(run: Run, rollouts: Sequence[Rollout], state: dict[str, Any]) -> dict[str, float]:
    """Algorithm 1, line 6: the iteration's optimiser steps, and diagnostics from before and after them."""
    config, optimizer = run.config, run.config.optimizer
    size = optimizer.batch_queries
    last = state["metrics"]
    diagnosed = optimiser_batch(run, rollouts[: config.eval.diagnostic_queries], last)
    before = diagnose(run, diagnosed, with_loss=True)
    # where queries were quarantined, batches differ by one at most: none weighs much more than another
    steps = -(-len(rollouts) // size)
    groups = [[rollouts[i] for i in some] for some in np.array_split(np.arange(len(rollouts)), steps)]
    run.progress.phase("prepare", len(groups))
    batches = []
    with costs.timed(state, "prepare"):
        for group in groups:  # before the first step: what a loss compares with is of the policy that sampled
            run.stop.check()
            batches.append(optimiser_batch(run, group, last))
            compared = sum(name.endswith("_logprobs") for name in batches[-1].data)
            state["flops"] += costs.forward_flops(run.parameters, compared * costs.tokens(batches[-1]))
            run.progress.advance(1)
    run.progress.phase("update", len(groups) * optimizer.epochs)
    collected: list[dict[str, float]] = []
    with costs.timed(state, "update"):
        for epoch in range(optimizer.epochs):
            # the first pass takes the queries as drawn, which is already a random order
            order = np.random.default_rng([config.seed, state["iteration"], epoch]).permutation(len(groups))
            for index in order if epoch else range(len(groups)):
                run.stop.check()
                batch = batches[index]
                lr = optimizer.lr * min(1.0, (state["step"] + 1) / max(1, optimizer.warmup_steps))
                values = run.backend.update(micro_batches(batch, optimizer.micro_queries), run.loss, lr=lr)
                collected.append({**check_finite(values, state["step"], lr), "lr": lr})
                state["step"] += 1
                trained = costs.tokens(batch)
                state["training_tokens"] += trained
                state["flops"] += costs.update_flops(run.parameters, trained)
                run.progress.advance(1, tokens=trained)
    after = diagnose(run, diagnosed, with_loss=True)
    means = {name: float(np.mean([m[name] for m in collected])) for name in collected[0]}
    # the policy that sampled these responses is the one before the update; log-probabilities are compared over iterations
    named: dict[str, float] = {name: before[name] for name in ("kl", "entropy") if name in before}
    named |= {name: after[name] for name in ("lp_plain", "lp_principled") if name in after}
    if "hinge_active" in before:
        means.pop("hinge_active")
        named |= {"hinge_active_before": before["hinge_active"], "hinge_active_after": after["hinge_active"]}
    return {**means, **named, "lr": collected[-1]["lr"]}


def optimiser_batch(run: Run, rollouts: Sequence[Rollout], last: Mapping[str, float]) -> Batch:
    """The algorithm's batch of these rollouts, with what its loss compares with, of the policy as it is now."""
    batch, algorithm = run.algorithm.batch(rollouts, run.config), run.algorithm
    if hasattr(algorithm, "needs_teacher") and algorithm.needs_teacher(run.config):
        teacher = run.backend.logprobs(after_principles(run, batch, [rollout.query_id for rollout in rollouts]))
        batch.data["teacher_logprobs"] = teacher.logprobs
    return prepared(run, batch, last)


def diagnose(run: Run, batch: Batch, *, with_loss: bool) -> dict[str, float]:
    """What the policy says of a few queries: KL to the reference and entropy per token, and the loss's own metrics.

    KL is the mean over response tokens of r - 1 - log r with r = reference / policy: unbiased where the tokens are the
    policy's own, never negative, of low variance (Schulman, "Approximating KL divergence", 2020). Principled responses were
    sampled under another prompt, and a record's by nobody: they are left out of it, and where there are no others it is.
    """
    run.progress.phase("diagnose", 1)
    policy, reference = run.backend.logprobs(batch), batch.data.get("reference_logprobs")
    if reference is None:  # a batch that is trained on may hold them already
        reference = run.backend.logprobs(batch, reference=True).logprobs
    run.progress.advance(1)
    mask = batch.response_mask & (batch.data["own"] > 0)[..., None]
    log_ratio = np.asarray(reference - policy.logprobs, np.float64)[mask]
    values: dict[str, float] = {}
    if mask.any():
        values = {
            "kl": float((np.expm1(log_ratio) - log_ratio).mean()),
            "entropy": float(np.asarray(policy.entropy)[mask].mean()),
        }
    if with_loss:
        _, own = run.loss(policy, batch)
        values |= {name: float(np.mean(value)) for name, value in own.items()}
        if "hinge_active" in own and "ranked" in own:  # a share of the ranked pairs
            values["hinge_active"] = float(own["hinge_active"].sum() / max(own["ranked"].sum(), 1))
    return values


# ---------------------------------------------------------------- metrics and evaluation


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
        rollouts = score(run, sample(run, run.heldout, slots, journal, HELDOUT, render))
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
        "heldout_gain_ci95": list(statistics.bootstrap_ci(after - before, seed=config.seed)),
        "heldout_queries": len(before),
        "iterations": config.iterations,
        **{name: state[name] for name in costs.COUNTERS},
        "evaluation_tokens": evaluated,
        "seconds": state["seconds"],
        "wall_seconds": state["wall_seconds"] + run.clock.lap(),
        "peak_memory_bytes": max(state["peak_memory_bytes"], peak_memory()),
    }
