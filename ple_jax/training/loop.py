"""The loop of Algorithm 1 (arXiv:2408.02599), and the only place that knows its order.

It samples both kinds of responses, scores them, decides with the threshold, updates the policy and lowers the threshold; it
evaluates before, during and after training. What is on disk decides where a run stands: the newest checkpoint (the commit
point), and the journal of the iteration that was being sampled.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ple_jax.algorithms import Algorithm, Context, given_sources
from ple_jax.core.errors import Damaged
from ple_jax.core.types import Compiled, Query, Rollout, Slot
from ple_jax.data.mixture import draw_queries
from ple_jax.training import ahead, costs, points
from ple_jax.training.journal import Journal, check, left_out, read
from ple_jax.training.measures import evaluate, evaluate_within, forget_within, log_iteration, mean_length, summarise
from ple_jax.training.run import Run
from ple_jax.training.sampling import given, sample
from ple_jax.training.scoring import labelled_again, sorted_out
from ple_jax.training.state import WARM_UP, State, changed, commit, resume
from ple_jax.training.steps import update
from ple_jax.training.warm_up import warm_up
from ple_jax.training.workdir import changed_since

PROFILE = "profile"  # a folder of the work directory
# what an iteration learns: the state after it, its rollouts, and its metrics
Learn = Callable[[State], tuple[State, list[Rollout], dict[str, float]]]


def train(run: Run[Algorithm]) -> State:
    """Executes Algorithm 1 to its end, from the start or from the newest checkpoint. Returns the final state."""
    schedule = run.algorithm.schedule(run.config)

    def learn(state: State) -> tuple[State, list[Rollout], dict[str, float]]:
        return learn_from_samples(run, state, context_of(run, state, float(schedule(state.iteration))))

    state = begin(run)
    # the second iteration of this process, as the first compiles; of one iteration that one
    traced = min(state.iteration + 1, run.config.iterations - 1) if run.session.profile else None
    while not points.ended(run.config, state):
        with profiled(run) if state.iteration == traced else contextlib.nullcontext():
            state = one_iteration(run, state, learn)
    return at_the_end(run, state)


@contextlib.contextmanager
def profiled(run: Run[Algorithm]) -> Iterator[None]:
    """Traces the work that is done inside the context, into WORKDIR/profile."""
    folder = run.session.workdir / PROFILE
    with run.backend.profile(folder):
        yield
    run.session.progress.log(f"profile of this iteration: {folder}")


def at_the_end(run: Run[Algorithm], state: State) -> State:
    """Returns the state that it is given, and logs the reason if the run ends early."""
    if why := points.stopped(run.config, state):
        run.session.progress.log(f"stopped after {state.iteration} of {run.config.iterations} iterations: {why}")
    return state


def begin(run: Run[Algorithm]) -> State:
    """Prepares a run for its next iteration and returns the state, evaluated if that is due.

    A fresh run is warmed up; another one is resumed from its newest checkpoint, after its files were checked.
    """
    state = resume(run.backend, run.session)
    points.forget_later(run.session, state)
    if state is not None:
        check(run.session.workdir, state.iteration)
        if goes_another_way(run, state):  # those are of a policy that will not be again
            forget_within(run.session.workdir, state.step)
    else:
        fresh = State(run.backend.environment(), controller=numbers(run.algorithm.controller(run.config)))
        state = commit(warm_up(run, fresh), run.backend, run.session)
    shutil.rmtree(run.session.workdir / WARM_UP, ignore_errors=True)  # what it was resumed from has no use any more
    run.session.progress.iteration(state.iteration)
    state = log_iteration(run, state)
    return state if state.iteration else state._replace(mean_length=first_length(run))


def goes_another_way(run: Run[Algorithm], state: State) -> bool:
    """Says whether the unfinished iteration after `state` may take other steps now than it took before it was stopped.

    It took them in the environment of the process before this one, which need not be that in which the run began.
    """
    mended = changed_since(run.session.workdir, state.iteration) - {"after", "iterations"}
    now = run.backend.environment()
    last = {key: value for key, value in run.session.before.items() if key in {**state.environment, **now}}
    return bool(mended) or any(changed(then, now) for then in (state.environment, last or now))


def first_length(run: Run[Algorithm]) -> float:
    """Computes C of the first iteration, in tokens: the mean length of the responses that would be learned from, in the
    evaluation before it.

    For algorithms that learn from the records' own answers it is the mean over all train records, and stays the same in
    later iterations.
    """
    if not (slots := [slot for slot in run.algorithm.collect(run.config) if slot.source != "policy"]):
        return mean_length(evaluate(run, 0), run)
    rollouts = (Rollout(q.id, q.prompt, (), tuple(given(q, slot, run.prompts) for slot in slots)) for q in run.data.train)
    return mean_length(rollouts, run)


def one_iteration(run: Run[Algorithm], state: State, learn: Learn) -> State:
    """Performs one iteration, whatever `learn` does in it, and ends it with a commit and the evaluation that may be due. An
    error leaves the last commit in force.
    """
    run.session.progress.iteration(state.iteration + 1)
    compiled = run.backend.compiled()
    begun = Journal(run.session.workdir / "rollouts", state.iteration).partial.exists()  # by a process that was stopped
    after, rollouts, values = learn(state)
    values = numbers(values) | newly_compiled(run, compiled)
    spent = {name: after.costs.seconds[name] - state.costs.seconds[name] for name in costs.PHASES if name != "evaluate"}
    new = {name: getattr(after.costs, name) - getattr(state.costs, name) for name in ("generated_tokens", "training_tokens")}
    if spent["generate"] and not begun:  # this process sampled all of it
        values["generate_tokens_per_second"] = new["generated_tokens"] / spent["generate"]
    values["train_tokens_per_second"] = new["training_tokens"] / max(spent["update"], 1e-9)
    kept = given_sources(run.algorithm.collect(run.config))  # C of the records' own answers is that of all of them
    after = after._replace(
        iteration=state.iteration + 1,
        controller=numbers(run.algorithm.control(state.controller, values, run.config)),
        mean_length=state.mean_length if kept else mean_length(rollouts, run),
        metrics={**values, **new, **{f"seconds_{name}": s for name, s in spent.items()}},
    )
    return log_iteration(run, commit(after, run.backend, run.session))


def numbers(values: Mapping[str, float]) -> dict[str, float]:
    """Converts numpy's scalars, which a variant's metrics may be, to Python's, which a checkpoint's JSON takes."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}


def newly_compiled(run: Run[Algorithm], before: Compiled) -> dict[str, float]:
    """Returns the seconds spent on compiling since `before`, as a metric, and logs how many programs were compiled, if any
    were. Nothing is compiled any more once every shape has been met.

    Like all seconds they are those of this process. For a backend that compiles nothing there is no metric.
    """
    now = run.backend.compiled()
    programs, seconds = now.programs - before.programs, now.seconds - before.seconds
    if not now.programs:
        return {}
    if programs:
        run.session.progress.log(f"compiled {programs} programs in {seconds:.1f} s")
    return {"seconds_compile": seconds}


def learn_from_samples(run: Run[Algorithm], state: State, context: Context) -> tuple[State, list[Rollout], dict[str, float]]:
    """Performs lines 1 to 6 of Algorithm 1, with the evaluations that are due between the optimiser steps.

    Returns:
        The state after the iteration, its rollouts, and its metrics.
    """
    state, rollouts = collect(run, context, state)
    values, between = summarise(rollouts, run), state

    def pause(taken: int, total: int, tokens: int, seconds: Mapping[str, float]) -> float:
        nonlocal between
        if not evaluates_within(run.config, state.iteration, taken, total):
            return 0.0
        started = time.perf_counter()
        so_far = {**between.costs.seconds, **{phase: state.costs.seconds[phase] + s for phase, s in seconds.items()}}
        spent = between.costs._replace(training_tokens=state.costs.training_tokens + tokens, seconds=so_far)
        between = evaluate_within(run, between._replace(step=state.step + taken, costs=spent))
        return time.perf_counter() - started

    after, learned = update(run, rollouts, context, state, pause)
    seconds = {**after.costs.seconds, "evaluate": between.costs.seconds["evaluate"]}
    kept = {name: getattr(between, name) for name in ("points", "wall_seconds", "peak_memory_bytes")}
    return after._replace(**kept, costs=after.costs._replace(seconds=seconds)), rollouts, values | learned


def evaluates_within(config: Any, iteration: int, taken: int, total: int) -> bool:
    """Says whether an iteration is evaluated after `taken` of its `total` optimiser steps.

    The config.eval.points evaluations of an iteration divide its steps equally, where the iteration's end is evaluated too.
    """
    wanted, due = config.eval.points, (iteration + 1) % config.eval.every == 0 or iteration + 1 == config.iterations
    return due and taken in {round(total * part / wanted) for part in range(1, wanted)}


def context_of(run: Run[Algorithm], state: State, tau: float) -> Context:
    """Returns what the algorithm is told about the iteration that `state` stands before; `tau` is its threshold."""
    return Context(run.config, state.iteration, tau, state.mean_length, state.controller)


def collect(run: Run[Algorithm], context: Context, state: State) -> tuple[State, list[Rollout]]:
    """Performs lines 1 to 5 of Algorithm 1: samples, scores and labels the rollouts of an iteration, or reads them if the
    journal is complete.

    Returns:
        The state with the costs of the iteration's queries, and the labelled rollouts.
    """
    config, session, iteration = run.config, run.session, context.iteration
    journal, slots = Journal(session.workdir / "rollouts", iteration), run.algorithm.collect(config)
    queries = draw_queries(config, run.data.train, iteration)
    rollouts = journal.read()
    if rollouts is not None and "inputs.algorithm" in changed_since(session.workdir, iteration):
        rollouts = decided_again(run, context, journal, rollouts, slots)
    if rollouts is None:
        started = time.perf_counter()
        with ahead.scoring(run.reward, session) as score:
            sampled = sample(run, queries, slots, journal, iteration, score)
            scoring = time.perf_counter()
        _, kept = sorted_out(sampled, journal.path.stem, config, run.reward, session)
        spent = state.costs.took("generate", scoring - started).took("score", time.perf_counter() - scoring)
        state = state._replace(costs=spent)
        journal.complete(run.algorithm.label(kept, context))
        # training reads what is on disk, here as after a resume
        rollouts = read(journal.path)
    bad = quarantined(journal, queries, rollouts)  # was sampled and scored too
    return state._replace(costs=counted(run, queries, [*rollouts, *bad], slots, state.costs)), rollouts


def decided_again(
    run: Run[Algorithm], context: Context, journal: Journal, rollouts: Sequence[Rollout], slots: Sequence[Slot]
) -> list[Rollout] | None:
    """Labels the rollouts of a complete journal by an algorithm whose file was mended since, and writes them back.

    Returns None, and removes the journal, if the algorithm asks for other responses now, which must be sampled.
    """
    wanted = [(slot.kind, slot.principled, slot.sample, slot.source) for slot in slots]
    found = ([(r.kind, r.principled, r.sample, r.source) for r in rollout.responses] for rollout in rollouts)
    if any(some != wanted for some in found):
        journal.path.unlink()
        return None
    journal.complete(labelled_again(rollouts, run.algorithm, context))
    return read(journal.path)


def quarantined(journal: Journal, queries: Sequence[Query], kept: Sequence[Rollout]) -> list[Rollout]:
    """Returns the rollouts of an iteration's queries that its journal leaves out because a reward was not finite.

    Raises:
        Damaged: if the journal has other queries, or what it leaves out is not in quarantine.
    """
    path = journal.path.parents[1] / "quarantine" / journal.path.name
    again = f"put a copy of it back, or delete it and {journal.path} to sample the iteration again"
    drawn, held = {query.id for query in queries}, {rollout.query_id for rollout in kept}
    if other := held - drawn:
        raise Damaged(
            f"{journal.path} has query {min(other)!r}, which this iteration does not draw; delete it to sample the iteration"
            " again"
        )
    if held == drawn:
        return []
    found = left_out(journal.path, kept, remedy=again)
    if lacking := drawn - held - {rollout.query_id for rollout in found}:
        raise Damaged(f"{path} is gone, or lacks query {min(lacking)!r}, which {journal.path.name} leaves out; {again}")
    return found


def counted(
    run: Run[Algorithm], queries: Sequence[Query], rollouts: Sequence[Rollout], slots: Sequence[Slot], spent: costs.Costs
) -> costs.Costs:
    """Adds the sampling and scoring of an iteration's queries to the costs. Tokens that principles add to prompts are
    counted separately.
    """
    drawn = {query.id: query for query in queries}
    asked = [slot for slot in slots if slot.source == "policy"]
    for rollout in rollouts:
        sampled = sum(len(r.tokens) for r in rollout.responses if r.source == "policy")
        plain = len(rollout.prompt_tokens) * len(asked)
        guided = [run.prompts.render(drawn[rollout.query_id], True).whole for slot in asked if slot.principled]
        added = sum(map(len, guided)) - len(rollout.prompt_tokens) * len(guided)
        spent = spent.plus(
            queries=1,
            generated_tokens=sampled,
            prompt_tokens=plain,
            principle_tokens=added,
            reward_calls=len(rollout.responses),
            flops=costs.forward_flops(run.base.parameters, sampled + plain + added),
        )
    return spent
