"""Optimiser steps: what a loss compares with, the steps of an iteration, and what is diagnosed beside them."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from ple_jax.algorithms import Algorithm, Context
from ple_jax.core.batches import micro_batches, pack
from ple_jax.core.errors import UserError
from ple_jax.core.types import Array, Batch, Outputs, Rollout
from ple_jax.training import costs
from ple_jax.training.run import Run
from ple_jax.training.state import State


class Whole(NamedTuple):
    """An optimiser batch with what its loss compares with."""

    batch: Batch
    tokens: int  # of the forward passes for that, each counted with its own prompts
    seconds: float  # that they took


Pause = Callable[[int, int, int], float]  # (steps taken, of how many, tokens of them) -> seconds that it took


def update(
    run: Run[Algorithm], rollouts: Sequence[Rollout], context: Context, state: State, pause: Pause = lambda *_: 0.0
) -> tuple[State, dict[str, float]]:
    """Algorithm 1, line 6: the iteration's optimiser steps; its metrics, with diagnostics from before and after them.

    Args:
        pause: called between two steps.
    """
    some = rollouts[: run.config.eval.diagnostic_queries]
    # the policy that sampled these responses is the one before the update
    few, kl, before = at_the_start(run, some, context)
    whole = prepare(run, rollouts, context, few)
    batches, compared = [one.batch for one in whole], sum(one.tokens for one in whole)
    started = time.perf_counter()
    collected, sizes, paused = steps(run, batches, state.iteration, state.step, pause)
    updated = time.perf_counter() - paused
    said = check_policy(policy_of(run, few.batch), run.config.optimizer.lr, "optimizer.lr")
    after = run.loss(said, few.batch)[1]
    trained = run.config.optimizer.epochs * sum(map(costs.tokens, batches))
    spent = state.costs.plus(
        training_tokens=trained,
        flops=costs.forward_flops(run.base.parameters, compared) + costs.update_flops(run.base.parameters, trained),
    )
    spent = spent.took("prepare", sum(one.seconds for one in whole)).took("update", updated - started)
    means = over_queries(collected, sizes)
    metrics = {**run.algorithm.measures(means, before, after), **kl, "lr": collected[-1]["lr"]}
    return state._replace(step=state.step + len(collected), costs=spent), metrics


def prepare(run: Run[Algorithm], rollouts: Sequence[Rollout], context: Context, few: Whole) -> list[Whole]:
    """The optimiser batches of an iteration, whole before the first step.

    What a loss compares with is of the policy that sampled. Where queries were quarantined, batches differ by one at most:
    none weighs much more than another.

    Args:
        few: the batch of the first queries, which may be the first one.
    """
    count = -(-len(rollouts) // run.config.optimizer.batch_queries)
    groups = [[rollouts[i] for i in some] for some in np.array_split(np.arange(len(rollouts)), count)]
    run.session.progress.phase("prepare", len(groups))
    found: list[Whole] = []
    for group in groups:
        run.session.stop.check()
        first = not found and len(group) == len(few.batch.prompt)
        found.append(few if first else optimiser_batch(run, run.algorithm.batch(group, context), group, context))
        run.session.progress.advance(1)
    return found


def steps(
    run: Run[Algorithm], batches: Sequence[Batch], iteration: int, done: int, pause: Pause
) -> tuple[list[dict[str, float]], list[int], float]:
    """The metrics of every optimiser step of an iteration, before which `done` were taken; the queries of each; and the
    seconds between them.
    """
    epochs, paused, tokens = run.config.optimizer.epochs, 0.0, 0
    found: list[dict[str, float]] = []
    sizes: list[int] = []
    run.session.progress.phase("update", len(batches) * epochs)
    for epoch in range(epochs):
        # the first pass takes the queries as drawn, which is already a random order
        order = np.random.default_rng([run.config.seed, iteration, epoch]).permutation(len(batches))
        for index in order if epoch else range(len(batches)):
            found.append(step(run, batches[index], done + len(found), planned(run.config, run.config.iterations)))
            sizes.append(len(batches[index].prompt))
            tokens += costs.tokens(batches[index])
            run.session.progress.advance(1, tokens=costs.tokens(batches[index]))
            if len(found) < epochs * len(batches):
                paused += pause(len(found), epochs * len(batches), tokens)
    return found, sizes, paused


def over_queries(collected: Sequence[Mapping[str, float]], sizes: Sequence[int]) -> dict[str, float]:
    """The mean of every metric over the queries of all steps: where some were quarantined, batches are of unequal size.

    Args:
        collected: of every step, means over its queries.
        sizes: the queries of every step.
    """
    return {name: float(np.average([metrics[name] for metrics in collected], weights=sizes)) for name in collected[0]}


def step(run: Run[Any], batch: Batch, number: int, total: int) -> dict[str, float]:
    """Optimiser step `number` of the run's `total`: the metrics of its batch, and its learning rate."""
    run.session.stop.check()
    options = run.config.optimizer
    lr = options.lr * share_of_rate(options, number, total)
    micro = micro_batches(batch, options.micro_queries)
    values = run.backend.update(micro, run.loss, lr=lr, temperature=temperature(run))
    blamed = "" if number else _options(run.config)
    return {**check_finite(values, f"optimiser step {number}", lr, "optimizer.lr", run.config, blamed), "lr": lr}


def temperature(run: Run[Any]) -> float:
    """What the logits are divided by: where a loss has a ratio to the policy that sampled, the temperature it sampled at."""
    sampled_at: float = run.config.sampling.temperature
    return sampled_at if run.algorithm.needs(run.config).old_logprobs and sampled_at else 1.0


def planned(config: Any, iterations: int) -> int:
    """The optimiser steps of so many iterations of a run that samples: fewer are taken where queries are left out."""
    return int(iterations * (config.queries_per_iteration // config.optimizer.batch_queries) * config.optimizer.epochs)


def share_of_rate(options: Any, step: int, total: int) -> float:
    """The share of optimizer.lr that a step gets, counted from 0: linear up to 1 over optimizer.warmup_steps, then as
    optimizer.schedule has it: 1, or down to 0, which the step after the last would have, in a line or half a cosine
    (arXiv:1608.03983).
    """
    warm = max(1, options.warmup_steps)
    if step + 1 < warm:
        return float((step + 1) / warm)
    if options.schedule == "constant":
        return 1.0
    gone = min(1.0, (step + 1 - warm) / max(1, total - warm + 1))
    return 1 - gone if options.schedule == "linear" else (1 + math.cos(math.pi * gone)) / 2


def _options(config: Any) -> str:
    """The numbers that an algorithm's loss is made with, for an error."""
    options = getattr(config, config.algorithm, config.algorithm_kwargs).to_dict()
    numbers = (f"{name} = {x:g}" for name, x in options.items() if type(x) in (int, float))
    return f"an option of algorithm {config.algorithm!r} ({', '.join(numbers) or 'none is a number'})"


def check_finite(
    values: dict[str, float], step: str, lr: float, key: str, config: Any, unchanged: str = ""
) -> dict[str, float]:
    """Raises a UserError where a step's loss or gradient is not finite: before anything of it is committed.

    Args:
        step: what was done, for the error.
        lr, key: its learning rate, and the key of the config that says it.
        unchanged: of the very first step, for which no rate is to blame: what may be, beside lora.alpha.
    """
    if np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"]):
        return values
    gave = f"gave loss {values['loss']} and gradient norm {values['grad_norm']}"
    if unchanged:
        raise UserError(
            f"the first optimiser step {gave}, before any weight was changed: {unchanged} or config.lora.alpha ="
            f" {config.lora.alpha:g} is too large or too small; mend it (in a new --workdir)"
        )
    raise UserError(
        f"{step} at learning rate {lr:g} {gave}; the newest checkpoint is from before it: lower --config.{key} (in a new"
        " --workdir)"
    )


def at_the_start(
    run: Run[Algorithm], rollouts: Sequence[Rollout], context: Context
) -> tuple[Whole, dict[str, float], dict[str, Array]]:
    """The batch of a few queries before the first step of an iteration, `diagnose` of them, and the loss's metrics.

    One pass of the policy serves all three where the algorithm trains on all that it said.

    Raises:
        UserError: the policy or the loss is not finite, which no learning rate is to blame for.
    """
    config, batch = run.config, run.algorithm.batch(rollouts, context)
    own = own_responses(run, batch, rollouts)
    started = time.perf_counter()
    said = policy_of(run, batch, entropy=own is not None)
    took = (time.perf_counter() - started) * run.algorithm.needs(config).old_logprobs
    if not np.isfinite(said.logprobs).all():
        raise UserError(
            f"before any step of iteration {context.iteration + 1} the policy's log-probabilities are not finite: to blame"
            f" are config.lora.alpha ({config.lora.alpha:g}), config.model.dtype ({config.model.dtype}) or the model's"
            " weights; mend that (in a new --workdir)"
        )
    few = optimiser_batch(run, batch, rollouts, context, said)
    kl = diagnose(run, rollouts) if own is None else drift(run, few.batch, rollouts, said, own)
    with np.errstate(all="ignore"):  # what overflows is told of below
        value, metrics = run.loss(said, few.batch)
    if not np.isfinite(value).all():
        raise UserError(
            f"before any step of iteration {context.iteration + 1} the loss is not finite, though the log-probabilities are:"
            f" {_options(config)} is too large or too small; mend it (in a new --workdir)"
        )
    return few._replace(seconds=few.seconds + took), kl, metrics


def check_policy(said: Outputs, lr: float, key: str) -> Outputs:
    """Raises a UserError where the last step left a policy whose log-probabilities are not finite."""
    if not np.isfinite(said.logprobs).all():
        raise UserError(
            f"after optimiser steps at learning rate {lr:g} the policy's log-probabilities are not finite; the newest"
            f" checkpoint is from before them: lower --config.{key} (in a new --workdir)"
        )
    return said


# ---------------------------------------------------------------- batches


def optimiser_batch(
    run: Run[Algorithm], batch: Batch, rollouts: Sequence[Rollout], context: Context, policy: Outputs | None = None
) -> Whole:
    """The algorithm's batch of these rollouts, with what its loss compares with, of the policy as it is now.

    Args:
        policy: what it says of the batch, where that is known.
    """
    started, asked = time.perf_counter(), None
    if run.algorithm.needs(run.config).teacher:
        train, places = run.data.train, run.data.train.places("id")
        queries = [train[places[rollout.query_id]] for rollout in rollouts]
        asked = run.prompts.after_principles(batch, queries)
    batch, tokens = compared(batch, run, asked, policy)
    if run.config.sampling.importance_cap and "old_logprobs" in batch.data:
        said = _sampled_as(batch, rollouts)
        batch.data["sampler_logprobs"] = np.where(np.isnan(said), batch.data["old_logprobs"], said).astype(np.float32)
    return Whole(run.algorithm.prepare(batch, context), tokens, time.perf_counter() - started)


def _sampled_as(batch: Batch, rollouts: Sequence[Rollout]) -> Float64[np.ndarray, "query k response_len"]:
    """What the sampler said of the tokens of a batch, whichever of its rollout's responses they are; nan where nothing."""
    picks = np.full(batch.response.shape[:2], -1)
    for (i, j), _ in np.ndenumerate(picks):
        tokens = tuple(batch.response[i, j][batch.response_mask[i, j]].tolist())
        own = [n for n, response in enumerate(rollouts[i].responses) if response.tokens == tokens and response.logprobs]
        picks[i, j] = own[0] if own else -1
    return sampler_logprobs(rollouts, picks, batch)


def compared(batch: Batch, run: Run[Any], asked: Batch | None = None, policy: Outputs | None = None) -> tuple[Batch, int]:
    """A batch with the log-probabilities (and values) that a loss compares with, of the policy as it is now.

    Args:
        asked: the same responses after the teacher's prompts, where there is a teacher.
        policy: what the policy says of the batch, where that is known.

    Returns:
        The batch, and the tokens of the forward passes.
    """
    needs, data, logprobs, heat = run.algorithm.needs(run.config), batch.data, run.backend.logprobs, temperature(run)
    tokens = costs.tokens(batch) * (needs.reference + needs.old_logprobs)
    if needs.reference:
        data["reference_logprobs"] = logprobs(batch, reference=True, temperature=heat).logprobs
    if needs.old_logprobs:
        old = policy or logprobs(batch, temperature=heat)
        data["old_logprobs"] = old.logprobs
        if old.values is not None:
            data["old_values"] = old.values
    if asked is not None:
        data["teacher_logprobs"] = logprobs(asked, temperature=heat).logprobs
        tokens += costs.tokens(asked)
    return batch, tokens


# ---------------------------------------------------------------- diagnostics


def policy_of(run: Run[Any], batch: Batch, *, entropy: bool = False) -> Outputs:
    """What the policy, as it is now, says of a few queries."""
    run.session.progress.phase("diagnose", 1)
    said = run.backend.logprobs(batch, temperature=temperature(run), entropy=entropy)
    run.session.progress.advance(1)
    return said


def own_responses(run: Run[Any], batch: Batch, rollouts: Sequence[Rollout]) -> Int64[np.ndarray, "query k"] | None:
    """Which response of its rollout one of a batch is, where the policy said it after the plain prompt, -1 elsewhere.

    None where the batch cannot stand for `diagnose`: some that it said are not in there, or it is asked at another
    temperature than it sampled at.
    """
    if temperature(run) != (run.config.sampling.temperature or 1.0):
        return None
    found = np.full(batch.response.shape[:2], -1)
    for i, rollout in enumerate(rollouts):
        there = [tuple(ids[mask].tolist()) for ids, mask in zip(batch.response[i], batch.response_mask[i], strict=True)]
        if tuple(batch.prompt[i][batch.prompt_mask[i]].tolist()) != rollout.prompt_tokens:
            return None
        for number, response in enumerate(rollout.responses):
            if response.own:
                places = [j for j, tokens in enumerate(there) if tokens == response.tokens and found[i, j] < 0]
                if not places:
                    return None
                found[i, places[0]] = number
    return found


def diagnose(run: Run[Any], rollouts: Sequence[Rollout], *, kl: bool = True) -> dict[str, float]:
    """KL to the reference and entropy of the policy as it is now, both in nats per token, from its own plain responses.

    With them `sampler_gap` and `sampler_gap_max`, in nats: what the sampler said of a token from what the trainer says;
    `sampler_ratio_max`, the largest ratio of trainer to sampler; `sampler_kl`, KL(sampler, trainer) in nats per token.

    KL is the mean over response tokens of r - 1 - log r with r = reference / policy: unbiased where the tokens are the
    policy's own, never negative, of low variance (Schulman, "Approximating KL divergence", 2020). So it is of every plain
    response that was sampled, at the temperature it was sampled at, whichever of them are trained on: the best of several
    are no sample of the policy. Principled responses were sampled under another prompt, and a record's by nobody; where
    there are no others there is nothing to measure, and the held-out queries tell.

    Args:
        rollouts: of the policy as it is now, as many responses each.
        kl: whether the KL is wanted, for which the reference is asked.
    """
    picks = [[i for i, response in enumerate(rollout.responses) if response.own] for rollout in rollouts]
    if not picks[0]:
        return {}
    run.session.progress.phase("diagnose", 1)
    shape = {"prompt_multiple": run.config.sampling.bucket, "response_len": run.config.sampling.max_new_tokens}
    batch, heat = pack(rollouts, picks, **shape), run.config.sampling.temperature or 1.0
    policy = run.backend.logprobs(batch, temperature=heat, entropy=True)
    reference = run.backend.logprobs(batch, reference=True, temperature=heat).logprobs if kl else None
    run.session.progress.advance(1)
    return divergence(policy, reference, sampler_logprobs(rollouts, np.array(picks), batch), batch.response_mask)


def drift(
    run: Run[Any], batch: Batch, rollouts: Sequence[Rollout], policy: Outputs, own: Int64[np.ndarray, "query k"]
) -> dict[str, float]:
    """`diagnose`, of what the policy says of a whole batch.

    Args:
        own: `own_responses`.
    """
    if (own < 0).all():
        return {}
    reference = batch.data.get("reference_logprobs")
    if reference is None:
        reference = run.backend.logprobs(batch, reference=True, temperature=temperature(run)).logprobs
    mask = batch.response_mask & (own >= 0)[..., None]
    return divergence(policy, reference, sampler_logprobs(rollouts, own, batch), mask)


def sampler_logprobs(
    rollouts: Sequence[Rollout], picks: Int64[np.ndarray, "query k"], batch: Batch
) -> Float64[np.ndarray, "query k response_len"]:
    """What the sampler said of the tokens of a batch, in nats; nan where it said nothing.

    Args:
        picks: which response of its rollout one of the batch is; -1: another's.
    """
    found = np.full(batch.response.shape, np.nan)
    for (i, j), pick in np.ndenumerate(picks):
        said = rollouts[i].responses[pick].logprobs if pick >= 0 else ()
        found[i, j, : len(said)] = said
    return found


def divergence(policy: Outputs, reference: Array | None, sampler: Array, mask: np.ndarray) -> dict[str, float]:
    """`kl` (with a reference) and `entropy` of the tokens of a mask, in nats per token, and how far it is to the sampler."""
    log_ratio = None if reference is None else np.asarray(reference - policy.logprobs, np.float64)[mask]
    off = (policy.logprobs - sampler)[mask & ~np.isnan(sampler)]
    return {
        **({} if log_ratio is None else {"kl": float((np.expm1(log_ratio) - log_ratio).mean())}),
        "entropy": float(np.asarray(policy.entropy)[mask].mean()),
        **(_apart(off) if off.size else {}),
    }


def _apart(log_ratio: Float64[np.ndarray, " token"]) -> dict[str, float]:
    """Sampler and trainer, by the log-ratio of trainer to sampler of tokens that the sampler drew."""
    gap = np.abs(log_ratio)
    return {
        "sampler_gap": float(gap.mean()),
        "sampler_gap_max": float(gap.max()),
        "sampler_ratio_max": float(np.exp(log_ratio.max())),
        "sampler_kl": float((np.expm1(log_ratio) - log_ratio).mean()),
    }
