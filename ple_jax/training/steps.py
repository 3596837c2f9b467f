"""Optimiser steps: what a loss compares with, the steps of an iteration, and what is diagnosed beside them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ple_jax.core.batches import micro_batches
from ple_jax.core.errors import UserError
from ple_jax.core.types import Batch, Rollout
from ple_jax.training import costs
from ple_jax.training.prompting import after_principles
from ple_jax.training.run import Run


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


def prepared(run: Run, batch: Batch, last: Mapping[str, float]) -> Batch:
    """The batch with what the algorithm's loss compares with, of the policy as it is now.

    `reference_logprobs` where it `needs_reference`, `old_logprobs` where it `needs_old_logprobs` (optional), beside them
    `old_values` where it trains a head of values, and what its `prepare` (optional) makes of them: a batch, the config and
    the metrics of the iteration before (`last`, {} in the first) give a batch.
    """
    algorithm, config = run.algorithm, run.config
    if algorithm.needs_reference(config):
        batch.data["reference_logprobs"] = run.backend.logprobs(batch, reference=True).logprobs
    if hasattr(algorithm, "needs_old_logprobs") and algorithm.needs_old_logprobs(config):
        old = run.backend.logprobs(batch)
        batch.data["old_logprobs"] = old.logprobs
        if old.values is not None:
            batch.data["old_values"] = old.values
    return algorithm.prepare(batch, config, last) if hasattr(algorithm, "prepare") else batch


def check_finite(values: dict[str, float], step: int, lr: float) -> dict[str, float]:
    """Raises a UserError where a step's loss or gradient is not finite: before anything of it is committed."""
    if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
        raise UserError(
            f"optimiser step {step} at learning rate {lr:g} gave loss {values['loss']} and gradient norm"
            f" {values['grad_norm']}; the newest checkpoint is from before it: lower --config.optimizer.lr (in a new"
            " --workdir)"
        )
    return values


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
