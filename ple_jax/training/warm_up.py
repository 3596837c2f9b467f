"""Step 0 of Algorithm 1: supervised fine-tuning, after which the policy is the reference."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ple_jax.algorithms import Algorithm, sft
from ple_jax.core.batches import micro_batches, pack, response_width
from ple_jax.core.types import Batch, Loss, Query, Rollout, Slot
from ple_jax.data.left_out import note
from ple_jax.data.load import load_warm_up
from ple_jax.data.queries import disjoint
from ple_jax.training import costs
from ple_jax.training.prompting import usable
from ple_jax.training.run import Run
from ple_jax.training.sampling import given
from ple_jax.training.state import WARM_UP, State, commit_warm_up, newest
from ple_jax.training.steps import check_finite, check_first, check_policy


def warm_up(run: Run[Algorithm], state: State) -> State:
    """Fine-tunes on the records of config.warm_up, if there are any; the policy then becomes the reference.

    Of all that this leaves the iterations inherit the adapter alone: the optimiser starts afresh. A warm-up that was killed
    goes on where it was committed last, after as many queries as an iteration has.

    Raises:
        UserError: a step's loss or gradient is not finite, or the policy after the last one.
    """
    config = run.config
    if config.warm_up.data is None:
        return state
    rollouts = _rollouts(run)
    lengths = [len(r.responses[0].tokens) for r in rollouts]
    batches, every = groups(len(rollouts), config), config.queries_per_iteration // config.optimizer.batch_queries
    loss, last = sft.make_loss(config), len(batches)
    state = newest(run.backend, run.session.workdir / WARM_UP) or state
    run.session.progress.phase("warm-up", last)
    run.session.progress.advance(state.warm_up)
    for number in range(state.warm_up, last):
        run.session.stop.check()
        some = [rollouts[i] for i in batches[number]]
        batch = _packed(some, config)
        # C is of all of them, not of a batch that it divides
        batch.data["normaliser"] = np.full(len(some), np.mean(lengths), np.float32)
        state = _step(run, state, batch, loss)
        run.session.progress.advance(1)
        if state.warm_up % every == 0 and state.warm_up < last:
            state = commit_warm_up(state, run.backend, run.session)
    check_policy(run.backend.logprobs(batch), config.warm_up.lr, "warm_up.lr")
    run.backend.freeze_reference()
    return state


def groups(count: int, config: Any) -> list[np.ndarray]:
    """Which rollouts are trained on together, in all epochs, each in an order of its own.

    Batches of an epoch differ by one at most, so that none weighs much more than another.
    """
    batches = -(-count // config.optimizer.batch_queries)
    orders = [np.random.default_rng([config.seed, epoch]).permutation(count) for epoch in range(config.warm_up.epochs)]
    return [group for order in orders for group in np.array_split(order, batches)]


def _packed(rollouts: Sequence[Rollout], config: Any) -> Batch:
    longest = max(len(rollout.responses[0].tokens) for rollout in rollouts)
    width = response_width(longest, new=config.sampling.max_new_tokens, most=config.task.max_answer_tokens)
    return pack(rollouts, [(0,)] * len(rollouts), prompt_multiple=config.sampling.bucket, response_len=width)


def _step(run: Run[Algorithm], state: State, batch: Batch, loss: Loss) -> State:
    """One optimiser step, counted."""
    started, lr = time.perf_counter(), run.config.warm_up.lr
    values = run.backend.update(micro_batches(batch, run.config.optimizer.micro_queries), loss, lr=lr)
    if state.warm_up == 0:
        check_first(values, run.config)
    check_finite(values, f"step {state.warm_up} of the warm-up", lr, "warm_up.lr")
    tokens = costs.tokens(batch)
    spent = state.costs.plus(training_tokens=tokens, flops=costs.update_flops(run.base.parameters, tokens))
    return state._replace(warm_up=state.warm_up + 1, costs=spent.took("update", time.perf_counter() - started))


def _rollouts(run: Run[Algorithm]) -> list[Rollout]:
    """The records with their answers; what the model or its chat template does not take is left out and listed.

    Raises:
        UserError: there is more of it than config.task.max_bad_share.
    """
    found = load_warm_up(run.config)
    queries, both = disjoint(found.queries, run.data.heldout)
    kept, said = usable(queries, run.prompts, "config.warm_up.data", sources=("completion",), principled=False)
    listed = note({**run.data.bad, "warm_up": [*found.bad, *both, *kept.bad]}, run.session.workdir)
    for line in filter(None, (listed, *said)):
        run.session.progress.log(line)
    return [_answered(query, run) for query in kept.queries]


def _answered(query: Query, run: Run[Algorithm]) -> Rollout:
    answer = given(query, Slot("reference", source="completion"), run.prompts)
    return Rollout(query.id, query.prompt, tuple(run.prompts.of(query, False)[1]), (answer,))
