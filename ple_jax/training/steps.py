"""Optimiser steps: what a loss compares with, the steps of an iteration, and what is diagnosed beside them."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ple_jax.algorithms import Algorithm, Context, Needs
from ple_jax.core.batches import micro_batches
from ple_jax.core.errors import UserError
from ple_jax.core.types import Array, Backend, Batch, Outputs, Rollout
from ple_jax.training import costs
from ple_jax.training.run import Run
from ple_jax.training.state import State


def update(
    run: Run[Algorithm], rollouts: Sequence[Rollout], context: Context, state: State
) -> tuple[State, dict[str, float]]:
    """Algorithm 1, line 6: the iteration's optimiser steps; its metrics, with diagnostics from before and after them."""
    few = optimiser_batch(run, rollouts[: run.config.eval.diagnostic_queries], context)
    said, kl = diagnose(few, run)
    before = run.loss(said, few)[1]
    started = time.perf_counter()
    batches, compared = prepare(run, rollouts, context)
    prepared = time.perf_counter()
    collected, sizes = steps(run, batches, state.iteration, state.step)
    updated = time.perf_counter()
    after = run.loss(diagnose(few, run)[0], few)[1]
    trained = run.config.optimizer.epochs * sum(map(costs.tokens, batches))
    spent = state.costs.plus(
        training_tokens=trained,
        flops=costs.forward_flops(run.base.parameters, compared) + costs.update_flops(run.base.parameters, trained),
    )
    spent = spent.took("prepare", prepared - started).took("update", updated - prepared)
    means = over_queries(collected, sizes)
    # the policy that sampled these responses is the one before the update
    metrics = {**run.algorithm.measures(means, before, after), **kl, "lr": collected[-1]["lr"]}
    return state._replace(step=state.step + len(collected), costs=spent), metrics


def prepare(run: Run[Algorithm], rollouts: Sequence[Rollout], context: Context) -> tuple[list[Batch], int]:
    """The optimiser batches of an iteration, whole before the first step, and tokens whose log-probabilities that took.

    What a loss compares with is of the policy that sampled. Where queries were quarantined, batches differ by one at most:
    none weighs much more than another.
    """
    count = -(-len(rollouts) // run.config.optimizer.batch_queries)
    groups = [[rollouts[i] for i in some] for some in np.array_split(np.arange(len(rollouts)), count)]
    run.session.progress.phase("prepare", len(groups))
    batches, compared = [], 0
    for group in groups:
        run.session.stop.check()
        batch = optimiser_batch(run, group, context)
        compared += costs.tokens(batch) * sum(name.endswith("_logprobs") for name in batch.data)
        batches.append(batch)
        run.session.progress.advance(1)
    return batches, compared


def steps(
    run: Run[Algorithm], batches: Sequence[Batch], iteration: int, done: int
) -> tuple[list[dict[str, float]], list[int]]:
    """The metrics of every optimiser step of an iteration, `done` of which were taken before, and the queries of each."""
    epochs = run.config.optimizer.epochs
    found: list[dict[str, float]] = []
    sizes: list[int] = []
    run.session.progress.phase("update", len(batches) * epochs)
    for epoch in range(epochs):
        # the first pass takes the queries as drawn, which is already a random order
        order = np.random.default_rng([run.config.seed, iteration, epoch]).permutation(len(batches))
        for index in order if epoch else range(len(batches)):
            found.append(step(run, batches[index], done + len(found)))
            sizes.append(len(batches[index].prompt))
            run.session.progress.advance(1, tokens=costs.tokens(batches[index]))
    return found, sizes


def over_queries(collected: Sequence[Mapping[str, float]], sizes: Sequence[int]) -> dict[str, float]:
    """The mean of every metric over the queries of all steps: where some were quarantined, batches are of unequal size.

    Args:
        collected: of every step, means over its queries.
        sizes: the queries of every step.
    """
    return {name: float(np.average([metrics[name] for metrics in collected], weights=sizes)) for name in collected[0]}


def step(run: Run[Any], batch: Batch, number: int) -> dict[str, float]:
    """Optimiser step `number` of the run: the metrics of its batch, and its learning rate."""
    run.session.stop.check()
    options = run.config.optimizer
    lr = options.lr * warmed_up(options, number)
    values = run.backend.update(micro_batches(batch, options.micro_queries), run.loss, lr=lr)
    return {**check_finite(values, number, lr), "lr": lr}


def warmed_up(options: Any, step: int) -> float:
    """The share of optimizer.lr that a step gets, counted from 0: linear up to 1 over optimizer.warmup_steps."""
    return min(1.0, (step + 1) / max(1, options.warmup_steps))


def check_finite(values: dict[str, float], step: int, lr: float) -> dict[str, float]:
    """Raises a UserError where a step's loss or gradient is not finite: before anything of it is committed."""
    if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
        raise UserError(
            f"optimiser step {step} at learning rate {lr:g} gave loss {values['loss']} and gradient norm"
            f" {values['grad_norm']}; the newest checkpoint is from before it: lower --config.optimizer.lr (in a new"
            " --workdir)"
        )
    return values


# ---------------------------------------------------------------- batches


def optimiser_batch(run: Run[Algorithm], rollouts: Sequence[Rollout], context: Context) -> Batch:
    """The algorithm's batch of these rollouts, with what its loss compares with, of the policy as it is now."""
    batch, needs = run.algorithm.batch(rollouts, context), run.algorithm.needs(run.config)
    if needs.teacher:
        queries = {query.id: query for query in run.data.train}
        asked = run.prompts.after_principles(batch, [queries[rollout.query_id] for rollout in rollouts])
        batch.data["teacher_logprobs"] = run.backend.logprobs(asked).logprobs
    return run.algorithm.prepare(compared(batch, run.backend, needs), context)


def compared(batch: Batch, backend: Backend, needs: Needs) -> Batch:
    """A batch with the log-probabilities (and values) that a loss compares with, of the policy as it is now."""
    if needs.reference:
        batch.data["reference_logprobs"] = backend.logprobs(batch, reference=True).logprobs
    if needs.old_logprobs:
        old = backend.logprobs(batch)
        batch.data["old_logprobs"] = old.logprobs
        if old.values is not None:
            batch.data["old_values"] = old.values
    return batch


# ---------------------------------------------------------------- diagnostics


def diagnose(batch: Batch, run: Run[Any]) -> tuple[Outputs, dict[str, float]]:
    """What the policy says of a few queries, and from it KL to the reference and entropy, both in nats per token.

    KL is the mean over response tokens of r - 1 - log r with r = reference / policy: unbiased where the tokens are the
    policy's own, never negative, of low variance (Schulman, "Approximating KL divergence", 2020). Principled responses were
    sampled under another prompt, and a record's by nobody: they are left out of it, and where there are no others it is.
    """
    run.session.progress.phase("diagnose", 1)
    policy, reference = run.backend.logprobs(batch), batch.data.get("reference_logprobs")
    if reference is None:  # a batch that is trained on may hold them already
        reference = run.backend.logprobs(batch, reference=True).logprobs
    run.session.progress.advance(1)
    return policy, divergence(policy, reference, batch.response_mask & (batch.data["own"] > 0)[..., None])


def divergence(policy: Outputs, reference: Array, mask: np.ndarray) -> dict[str, float]:
    """`kl` and `entropy` of the tokens of a mask, in nats per token; nothing where there is none."""
    if not mask.any():
        return {}
    log_ratio = np.asarray(reference - policy.logprobs, np.float64)[mask]
    return {
        "kl": float((np.expm1(log_ratio) - log_ratio).mean()),
        "entropy": float(np.asarray(policy.entropy)[mask].mean()),
    }
