"""Step 0 of Algorithm 1: supervised fine-tuning, after which the policy is the reference."""

import time

import numpy as np

from ple_jax.algorithms import Algorithm, sft
from ple_jax.core.batches import micro_batches, pack
from ple_jax.core.types import Query, Rollout, Slot
from ple_jax.data.left_out import note
from ple_jax.data.load import load_warm_up
from ple_jax.data.queries import disjoint
from ple_jax.training import costs
from ple_jax.training.prompting import check_context
from ple_jax.training.run import Run
from ple_jax.training.sampling import given
from ple_jax.training.state import State


def warm_up(run: Run[Algorithm], state: State) -> State:
    """Fine-tunes on the records of config.warm_up, if there are any; the policy then becomes the reference."""
    config = run.config
    if config.warm_up.data is None:
        return state
    rollouts = [_answered(query, run) for query in _records(run)]
    longest = max(len(r.responses[0].tokens) for r in rollouts)
    needed = max(len(r.prompt_tokens) + len(r.responses[0].tokens) for r in rollouts)
    check_context(needed, len(rollouts), model=run.base.name, context=run.base.context)
    size, loss, trained = config.optimizer.batch_queries, sft.make_loss(config), 0
    run.session.progress.phase("warm-up", -(-len(rollouts) // size) * config.warm_up.epochs)
    started = time.perf_counter()
    for epoch in range(config.warm_up.epochs):
        order = np.random.default_rng([config.seed, epoch]).permutation(len(rollouts))
        for start in range(0, len(order), size):
            run.session.stop.check()
            chosen = [rollouts[i] for i in order[start : start + size]]
            batch = pack(chosen, [(0,)] * len(chosen), prompt_multiple=config.sampling.bucket, response_len=longest)
            batch.data["normaliser"] = np.full(len(chosen), batch.response_mask.sum() / len(chosen), np.float32)
            run.backend.update(micro_batches(batch, config.optimizer.micro_queries), loss, lr=config.warm_up.lr)
            trained += costs.tokens(batch)
            run.session.progress.advance(1)
    run.backend.freeze_reference()
    spent = state.costs.plus(training_tokens=trained, flops=costs.update_flops(run.base.parameters, trained))
    return state._replace(costs=spent.took("update", time.perf_counter() - started))


def _records(run: Run[Algorithm]) -> list[Query]:
    """Those of the warm-up that are not held out; what is left out is listed in the work directory."""
    found = load_warm_up(run.config)
    queries, both = disjoint(found.queries, run.data.heldout)
    if listed := note({**run.data.bad, "warm_up": [*found.bad, *both]}, run.session.workdir):
        run.session.progress.log(listed)
    return queries


def _answered(query: Query, run: Run[Algorithm]) -> Rollout:
    answer = given(query, Slot("reference", source="completion"), run.config, run.base)
    return Rollout(query.id, query.prompt, tuple(run.prompts.of(query, False)[1]), (answer,))
