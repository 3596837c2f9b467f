"""Step 0 of Algorithm 1: supervised fine-tuning, after which the policy becomes the reference."""

import time
from typing import Any

import numpy as np

from ple_jax.algorithms import Algorithm, Context, sft
from ple_jax.core.batches import micro_batches
from ple_jax.core.compact import Compact
from ple_jax.core.types import Batch, Loss, Query, Rollout
from ple_jax.data.left_out import note
from ple_jax.data.load import load_warm_up
from ple_jax.data.queries import disjoint
from ple_jax.training import costs
from ple_jax.training.prompting import usable
from ple_jax.training.run import Run
from ple_jax.training.sampling import given
from ple_jax.training.state import WARM_UP, State, commit_warm_up, newest
from ple_jax.training.steps import check_finite, check_policy


def warm_up(run: Run[Algorithm], state: State) -> State:
    """Fine-tunes on the records of config.warm_up, if there are any; the policy then becomes the reference.

    The iterations inherit only the adapter: the optimiser starts afresh. Commits are made after as many queries as an
    iteration has, and a warm-up that was killed goes on from the last one.

    Raises:
        UserError: if the loss or gradient of a step, or the policy after the last one, is not finite.
    """
    config = run.config
    if config.warm_up.data is None:
        return state
    rollouts = _rollouts(run)
    # C is of all of them, not of a batch that it divides
    context = Context(config, mean_length=float(np.mean([len(r.responses[0].tokens) for r in rollouts])))
    batches, every = groups(len(rollouts), config), config.queries_per_iteration // config.optimizer.batch_queries
    loss, last = sft.make_loss(config), len(batches)
    state = newest(run.backend, run.session.workdir / WARM_UP) or state
    run.session.progress.phase("warm-up", last)
    run.session.progress.advance(state.warm_up)
    for number in range(state.warm_up, last):
        run.session.stop.check()
        batch = sft.batch(sft.label([rollouts[i] for i in batches[number]], context), context)
        state = _step(run, state, batch, loss)
        run.session.progress.advance(1)
        if state.warm_up % every == 0 and state.warm_up < last:
            state = commit_warm_up(state, run.backend, run.session)
    check_policy(run.backend.logprobs(batch), config.warm_up.lr, "warm_up.lr")
    run.backend.freeze_reference()
    return state


def groups(count: int, config: Any) -> list[np.ndarray]:
    """Returns which rollouts are trained on together: an array of indices for each batch of all epochs.

    Each epoch has an order of its own. Its batches differ in size by one at most, so that none weighs much more than
    another.
    """
    batches = -(-count // config.optimizer.batch_queries)
    orders = [np.random.default_rng([config.seed, epoch]).permutation(count) for epoch in range(config.warm_up.epochs)]
    return [group for order in orders for group in np.array_split(order, batches)]


def _step(run: Run[Algorithm], state: State, batch: Batch, loss: Loss) -> State:
    """Takes one optimiser step. Returns the state with the step and its costs counted."""
    started, lr = time.perf_counter(), run.config.warm_up.lr
    values = run.backend.update(micro_batches(batch, run.config.optimizer.micro_queries), loss, lr=lr)
    blamed = "config.model.dtype" if state.warm_up == 0 else ""
    check_finite(values, f"step {state.warm_up} of the warm-up", lr, "warm_up.lr", run.config, blamed)
    tokens = costs.tokens(batch)
    spent = state.costs.plus(training_tokens=tokens, flops=costs.update_flops(run.base.parameters, tokens))
    return state._replace(warm_up=state.warm_up + 1, costs=spent.took("update", time.perf_counter() - started))


def _rollouts(run: Run[Algorithm]) -> Compact[Rollout]:
    """Makes rollouts of the warm-up records and their answers.

    Records that the model or its chat template does not take, or that are held out too, are left out and listed.

    Raises:
        UserError: if the share of those not taken is above config.task.max_bad_share.
    """
    found = load_warm_up(run.config)
    queries, both = disjoint(found.queries, run.data.heldout)
    kept, said = usable(queries, run.prompts, "config.warm_up.data", sources=("completion",), principled=False)
    listed = note({**run.data.bad, "warm_up": [*found.bad, *both, *kept.bad]}, run.session.workdir)
    for line in filter(None, (listed, *said)):
        run.session.progress.log(line)
    return Compact(_answered(query, run) for query in kept.queries)


def _answered(query: Query, run: Run[Algorithm]) -> Rollout:
    answers = tuple(given(query, slot, run.prompts) for slot in sft.collect(run.config))
    return Rollout(query.id, query.prompt, tuple(run.prompts.of(query, False)[1]), answers)
