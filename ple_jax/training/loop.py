"""Algorithm 1 (arXiv:2408.02599), and the only place that knows its order.

Sample both kinds of responses, score, decide with the threshold, update, lower the threshold; evaluate before, during and
after. What is on disk decides where a run stands: the newest checkpoint (the commit point), and the journal of the
iteration that was being sampled.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ple_jax.core.types import Query, Rollout, Slot
from ple_jax.data.queries import draw
from ple_jax.training import costs
from ple_jax.training.journal import Journal, read
from ple_jax.training.measures import finish, summarise, warn_of_leak
from ple_jax.training.prompting import Rendered, renderer
from ple_jax.training.run import Run
from ple_jax.training.sampling import sample
from ple_jax.training.scoring import quarantine, score, transformed
from ple_jax.training.sinks import truncate_jsonl
from ple_jax.training.state import commit, restore
from ple_jax.training.steps import update
from ple_jax.training.warm_up import warm_up

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


def collect(
    run: Run, iteration: int, tau: float, render: Callable[[Query, bool], Rendered], state: dict[str, Any]
) -> list[Rollout]:
    """Algorithm 1, lines 1 to 5: the iteration's labelled rollouts, from the journal where it is complete."""
    config, journal = run.config, Journal(run.workdir / "rollouts", iteration)
    slots = run.algorithm.collect(config)
    if (rollouts := journal.read()) is None:
        queries = draw(run.train, config.queries_per_iteration, seed=config.seed, iteration=iteration)
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




# ---------------------------------------------------------------- metrics and evaluation


