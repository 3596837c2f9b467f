"""The loop of algorithms that sample nothing: epochs over fixed examples, with evaluations between steps.

It counts optimiser steps where the loop of Algorithm 1 counts iterations. Every evaluation has a checkpoint.
"""

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from ple_jax.algorithms import OfflineAlgorithm
from ple_jax.core import commits
from ple_jax.core.compact import Compact
from ple_jax.core.errors import Damaged, UserError
from ple_jax.core.files import plain, read_json, write_json
from ple_jax.core.types import Query, Tokenizer
from ple_jax.data.left_out import Bad, QuerySet, check_share, fit, note
from ple_jax.training import costs
from ple_jax.training.run import Run
from ple_jax.training.state import CHECKPOINTS, State, commit, logged, resume, spent
from ple_jax.training.steps import compared, over_queries, step

JUDGEMENT = "judgement.json"  # the newest evaluation, whole


def examples(run: Run[OfflineAlgorithm]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Encodes the train and held-out records as examples. Records that cannot be one are listed in the work directory.

    Raises:
        UserError: if their share is above config.task.max_bad_share, or a reward model would see more than its base takes.
    """
    if not commits.steps(run.session.workdir / CHECKPOINTS):  # one that was begun with more, its base may not mind
        check_room(run.algorithm, run.config, model=run.base.name, context=run.base.context)
    train, bad_train = _encoded("train", run.data.train, run)
    heldout, bad_heldout = _encoded("heldout", run.data.heldout, run)
    bad = {**run.data.bad}
    bad |= {"train": [*bad["train"], *bad_train], "heldout": [*bad["heldout"], *bad_heldout]}
    if listed := note(bad, run.session.workdir):
        run.session.progress.log(listed)
    return train, heldout


def check_room(algorithm: OfflineAlgorithm, config: Any, *, model: str, context: float) -> None:
    """Raises a UserError if a reward model would be trained on more tokens of a pair than its base takes.

    Args:
        model, context: the base model's name, and the most tokens that it takes.
    """
    most = config.reward_model.max_tokens
    if algorithm.needs(config).head == "score" and most > context:
        raise UserError(f"config.reward_model.max_tokens is {most}, and {model} takes {context}: set it to at most that")


def _encoded(which: str, queries: Sequence[Query], run: Run[OfflineAlgorithm]) -> tuple[Compact[Any], list[Bad]]:
    run.session.progress.phase(f"encode {which}", len(queries))
    found = encoded(which, queries, run.algorithm, run.base.tokenizer, run.config)
    run.session.progress.advance(len(queries))
    return found


def encoded(
    which: str, queries: Sequence[Query], algorithm: OfflineAlgorithm, tokenizer: Tokenizer, config: Any
) -> tuple[Compact[Any], list[Bad]]:
    """Encodes records as examples, and returns them and the records that cannot be one.

    Args:
        which: "train" or "heldout", for the error message.

    Raises:
        UserError: if the share of the latter is above config.task.max_bad_share.
    """
    kept = QuerySet(*fit(queries, lambda query: algorithm.encode(query, tokenizer, config)))
    check_share(kept, f"config.task.{which}", config.task.max_bad_share)
    return kept


def train(run: Run[OfflineAlgorithm]) -> State:
    """Trains from the start, or goes on from the newest checkpoint. Returns the state at the end of the run."""
    config, session, every = run.config, run.session, run.config.offline.eval_every
    trained, heldout = examples(run)
    batches = [
        some
        for epoch in range(config.offline.epochs)
        for some in run.algorithm.batches(trained, config.optimizer.batch_queries, seed=config.seed, epoch=epoch)
    ]
    state = begin(run)._replace(examples={"train": len(trained), "heldout": len(heldout)})
    session.progress.iteration(-(-state.iteration // every))
    state = log(run, state, heldout)
    while state.iteration < len(batches):
        end = min((state.iteration // every + 1) * every, len(batches))  # the former end of a longer run is no multiple
        session.progress.iteration(-(-end // every))
        due = ([trained[i] for i in some] for some in batches[state.iteration : end])
        state = commit(update(run, due, end - state.iteration, state, len(batches)), run.backend, session)
        state = log(run, state, heldout)
    return state


def begin(run: Run[OfflineAlgorithm]) -> State:
    """Returns the state to go on from: that of the newest checkpoint, or a first one, which is committed."""
    state = resume(run.backend, run.session)
    return state or commit(State(run.backend.environment()), run.backend, run.session)


def update(run: Run[OfflineAlgorithm], batches: Iterable[Sequence[Any]], count: int, state: State, total: int) -> State:
    """Takes the `count` optimiser steps up to the next evaluation. `total` is the number of steps of the whole run."""
    run.session.progress.phase("update", count)
    collected, sizes, spent, parameters = [], [], state.costs, run.base.parameters
    for number, some in enumerate(batches, state.iteration):
        batch, looked_up = compared(run.algorithm.batch(some), run)
        collected.append(step(run, batch, number, total))
        sizes.append(len(batch.prompt))
        trained = costs.tokens(batch)
        run.session.progress.advance(1, tokens=trained)
        flops = costs.forward_flops(parameters, looked_up) + costs.update_flops(parameters, trained)
        spent = spent.plus(training_tokens=trained, flops=flops)
    return state._replace(
        iteration=state.iteration + count,
        costs=spent,
        metrics={f"train_{name}": value for name, value in over_queries(collected, sizes).items()},
    )


def log(run: Run[OfflineAlgorithm], state: State, heldout: Sequence[Any]) -> State:
    """Evaluates the step that `state` stands at and writes its metrics line."""
    found = evaluate(run, heldout, state.iteration)
    numbers = {name: value for name, value in found.items() if isinstance(value, float)}
    values = {**state.metrics, **{f"heldout_{name}": value for name, value in numbers.items()}}
    return logged(state, values, run.session)


def evaluate(run: Run[OfflineAlgorithm], heldout: Sequence[Any], iteration: int) -> dict[str, Any]:
    """Evaluates the held-out examples by the algorithm's own measures, after `iteration` optimiser steps.

    The newest evaluation is kept in the work directory, and read from there if it is of this step.
    """
    path = run.session.workdir / JUDGEMENT
    with contextlib.suppress(Damaged):
        if (kept := read_json(path) or {}).pop("iteration", None) == iteration:
            return kept
    run.session.progress.phase("evaluate", 1)
    found = plain(run.algorithm.judge(run.backend, heldout, run.config))
    write_json(path, {"iteration": iteration, **found}, sealed=True)
    run.session.progress.advance(1)
    return found


def summary(run: Run[OfflineAlgorithm], backend: str, state: State) -> dict[str, Any]:
    """Returns the contents of summary.json: what a run did, in a few numbers."""
    judged = read_json(run.session.workdir / JUDGEMENT) or {}
    judged.pop("iteration", None)
    return {
        "algorithm": run.config.algorithm,
        "backend": backend,
        "seed": run.config.seed,
        **{f"heldout_{name}": value for name, value in judged.items()},
        **{f"{which}_examples": count for which, count in state.examples.items()},
        "epochs": run.config.offline.epochs,
        "steps": state.iteration,
        "training_tokens": state.costs.training_tokens,
        **spent(state, run.session),
    }
