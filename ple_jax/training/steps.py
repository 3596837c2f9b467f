"""The optimiser steps of an iteration, the log-probabilities that its loss compares with, and diagnostics of the policy."""

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
    """An optimiser batch together with what its loss compares with, such as reference log-probabilities."""

    batch: Batch
    tokens: int  # of the forward passes for that, each counted with its own prompts
    seconds: float  # that they took


# (steps taken, of how many, tokens of them, seconds of their phases) -> seconds that it took
Pause = Callable[[int, int, int, Mapping[str, float]], float]


def update(
    run: Run[Algorithm], rollouts: Sequence[Rollout], context: Context, state: State, pause: Pause = lambda *_: 0.0
) -> tuple[State, dict[str, float]]:
    """Performs line 6 of Algorithm 1: the optimiser steps of an iteration.

    Args:
        pause: a function that is called between two steps and returns the seconds that it took.

    Returns:
        The state after the steps, and the iteration's metrics, with diagnostics from before and after the steps.

    Raises:
        UserError: if the policy, the loss or a gradient is not finite.
    """
    some = rollouts[: run.config.eval.diagnostic_queries]
    # the policy that sampled these responses is the one before the update
    few, kl, before = at_the_start(run, some, context)
    whole = prepare(run, rollouts, context, few)
    batches, compared = [one.batch for one in whole], sum(one.tokens for one in whole)
    prepared, started = sum(one.seconds for one in whole), time.perf_counter()
    collected, sizes, paused = steps(run, batches, state.iteration, state.step, pause, prepared)
    updated = time.perf_counter() - paused
    said = check_policy(policy_of(run, few.batch), run.config.optimizer.lr, "optimizer.lr")
    after = run.loss(said, few.batch)[1]
    trained = run.config.optimizer.epochs * sum(map(costs.tokens, batches))
    spent = state.costs.plus(
        training_tokens=trained,
        flops=costs.forward_flops(run.base.parameters, compared) + costs.update_flops(run.base.parameters, trained),
    )
    spent = spent.took("prepare", prepared).took("update", updated - started)
    means = over_queries(collected, sizes)
    metrics = {**run.algorithm.measures(means, before, after), **kl, "lr": collected[-1]["lr"]}
    return state._replace(step=state.step + len(collected), costs=spent), metrics


def prepare(run: Run[Algorithm], rollouts: Sequence[Rollout], context: Context, few: Whole) -> list[Whole]:
    """Makes all optimiser batches of an iteration before its first step.

    What a loss compares with comes from the policy that sampled. Where queries were quarantined, batch sizes differ by one
    at most, so that none weighs much more than another.

    Args:
        few: the batch of the first queries, which is taken as the first one if it has the same size.
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
    run: Run[Algorithm], batches: Sequence[Batch], iteration: int, done: int, pause: Pause, prepared: float
) -> tuple[list[dict[str, float]], list[int], float]:
    """Takes the optimiser steps of an iteration, before which `done` steps were taken in the run.

    Args:
        prepared: seconds that it took to make the batches.

    Returns:
        The metrics of every step, the number of queries of each, and the seconds spent between steps, in `pause`.
    """
    epochs, paused, tokens, started = run.config.optimizer.epochs, 0.0, 0, time.perf_counter()
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
            if left := epochs * len(batches) - len(found):
                seconds = {"prepare": prepared, "update": time.perf_counter() - started - paused}
                if took := pause(len(found), len(found) + left, tokens, seconds):
                    paused += took
                    run.session.progress.phase("update", left)
    return found, sizes, paused


def over_queries(collected: Sequence[Mapping[str, float]], sizes: Sequence[int]) -> dict[str, float]:
    """Computes the mean of every metric over the queries of all steps.

    Batches are of unequal size where some queries were quarantined.

    Args:
        collected: for every step, means over its queries.
        sizes: for every step, the number of its queries.
    """
    return {name: float(np.average([metrics[name] for metrics in collected], weights=sizes)) for name in collected[0]}


def step(run: Run[Any], batch: Batch, number: int, total: int) -> dict[str, float]:
    """Takes optimiser step `number` of the run's `total`. Returns the metrics of its batch, and its learning rate.

    Raises:
        UserError: if the loss or the gradient is not finite.
    """
    run.session.stop.check()
    options = run.config.optimizer
    lr = options.lr * share_of_rate(options, number, total)
    micro = micro_batches(batch, options.micro_queries)
    values = run.backend.update(micro, run.loss, lr=lr, temperature=temperature(run))
    unchanged = "" if number else blamed(run.config)
    return {**check_finite(values, f"optimiser step {number}", lr, "optimizer.lr", run.config, unchanged), "lr": lr}


def temperature(run: Run[Any]) -> float:
    """Returns the temperature that logits are divided by.

    It is that of sampling, if above 0, where a loss has a ratio to the policy that sampled, and 1 elsewhere.
    """
    sampled_at: float = run.config.sampling.temperature
    return sampled_at if run.algorithm.needs(run.config).old_logprobs and sampled_at else 1.0


def planned(config: Any, iterations: int) -> int:
    """Computes the optimiser steps of so many iterations of a run that samples; fewer are taken if queries are left out."""
    return int(iterations * (config.queries_per_iteration // config.optimizer.batch_queries) * config.optimizer.epochs)


def share_of_rate(options: Any, step: int, total: int) -> float:
    """Computes the share of optimizer.lr that a step gets; `step` is counted from 0.

    It rises linearly to 1 over optimizer.warmup_steps. Then it follows optimizer.schedule: it stays 1, or falls to 0 in a
    line or in half a cosine (arXiv:1608.03983). The step after the last one would have 0.
    """
    warm = max(1, options.warmup_steps)
    if step + 1 < warm:
        return float((step + 1) / warm)
    if options.schedule == "constant":
        return 1.0
    gone = min(1.0, (step + 1 - warm) / max(1, total - warm + 1))
    return 1 - gone if options.schedule == "linear" else (1 + math.cos(math.pi * gone)) / 2


def blamed(config: Any) -> str:
    """Returns what may make a first step not finite, for an error message: the numbers among the options of the loss."""
    own = config.algorithm.removeprefix("ple_jax.algorithms.")
    section = {"reward": "reward_model"}.get(own, own)  # config.reward is the reward that is asked
    options = getattr(config, section, config.algorithm_kwargs).to_dict()
    numbers = [f"{name} = {x:g}" for name, x in options.items() if type(x) in (int, float)]
    if not numbers:
        return f"config.model.dtype ({config.model.dtype})"
    return f"an option of algorithm {config.algorithm!r} ({', '.join(numbers)})"


def check_finite(
    values: dict[str, float], step: str, lr: float, key: str, config: Any, unchanged: str = ""
) -> dict[str, float]:
    """Returns the values of a step if its loss and its gradient are finite.

    Args:
        step: what was done, for the error.
        lr, key: its learning rate, and the key of the config that sets it.
        unchanged: of the very first step, for which no learning rate is to blame: what may be, beside config.lora.alpha.

    Raises:
        UserError: if they are not, before anything of the step is committed.
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
    """Diagnoses the policy on a few queries before the first step of an iteration.

    One pass of the policy serves all of it where the algorithm trains on all of the policy's own responses.

    Returns:
        The optimiser batch of these queries, the metrics of `diagnose`, and the loss's metrics of every query.

    Raises:
        UserError: if the policy or the loss is not finite, for which no learning rate is to blame.
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
            f" {blamed(config)} is too large or too small; mend it (in a new --workdir)"
        )
    return few._replace(seconds=few.seconds + took), kl, metrics


def check_policy(said: Outputs, lr: float, key: str) -> Outputs:
    """Returns the outputs of the policy after the last step if its log-probabilities are finite.

    Args:
        lr, key: the learning rate, and the key of the config that sets it.

    Raises:
        UserError: if they are not.
    """
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
    """Completes the algorithm's batch of these rollouts with what its loss compares with, from the current policy.

    Args:
        policy: the outputs of the policy on the batch, if they are known.
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
    """Returns the sampler's log-probabilities of the tokens of a batch, in nats; nan where it gave none.

    They are looked up by tokens, whichever of a rollout's responses are in the batch.
    """
    picks = np.full(batch.response.shape[:2], -1)
    for (i, j), _ in np.ndenumerate(picks):
        tokens = tuple(batch.response[i, j][batch.response_mask[i, j]].tolist())
        own = [n for n, response in enumerate(rollouts[i].responses) if response.tokens == tokens and response.logprobs]
        picks[i, j] = own[0] if own else -1
    return sampler_logprobs(rollouts, picks, batch)


def compared(batch: Batch, run: Run[Any], asked: Batch | None = None, policy: Outputs | None = None) -> tuple[Batch, int]:
    """Adds the log-probabilities (and values) that a loss compares with to the data of a batch, from the current policy.

    Args:
        asked: the same responses after the teacher's prompts, where there is a teacher.
        policy: the outputs of the policy on the batch, if they are known.

    Returns:
        The batch, and the number of tokens in the forward passes.
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
    """Computes the outputs of the current policy on a batch of a few queries."""
    run.session.progress.phase("diagnose", 1)
    said = run.backend.logprobs(batch, temperature=temperature(run), entropy=entropy)
    run.session.progress.advance(1)
    return said


def own_responses(run: Run[Any], batch: Batch, rollouts: Sequence[Rollout]) -> Int64[np.ndarray, "query k"] | None:
    """Finds, for each response of a batch that the policy gave to the plain prompt, its index among the responses of its
    rollout; -1 for other responses.

    Returns None if the batch cannot stand for `diagnose`: it lacks some of the policy's own responses, has other prompts
    than the plain ones, or is computed at another temperature than it was sampled at.
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
    """Measures the current policy on its own plain responses: KL to the reference and entropy, both in nats per token.

    With them come `sampler_gap` and `sampler_gap_max`, in nats: the mean and largest distance of a token's log-probability
    in the sampler from that in the trainer; `sampler_ratio_max`, the largest ratio of trainer to sampler; and `sampler_kl`,
    KL(sampler, trainer) in nats per token.

    KL is the mean over response tokens of r - 1 - log r with r = reference / policy: unbiased where the tokens are the
    policy's own, never negative, of low variance (Schulman, "Approximating KL divergence", 2020). It is therefore taken over
    every plain response that was sampled, at its sampling temperature, whichever of them are trained on: the best of several
    are no sample of the policy. Principled responses were sampled under another prompt, and a record's answers were not
    sampled. Without plain responses the result is empty, and only the held-out queries are measured.

    Args:
        rollouts: responses of the current policy, the same number for each query.
        kl: whether the KL is wanted, for which the reference is computed.
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
    """Computes the metrics of `diagnose` from outputs of the policy on a whole batch.

    Args:
        policy: these outputs.
        own: what `own_responses` found.
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
    """Returns the sampler's log-probabilities of the tokens of a batch, in nats; nan where it gave none.

    Args:
        picks: for each response of the batch, its index among the responses of its rollout; -1 if it is not to be looked up.
    """
    found = np.full(batch.response.shape, np.nan)
    for (i, j), pick in np.ndenumerate(picks):
        said = rollouts[i].responses[pick].logprobs if pick >= 0 else ()
        found[i, j, : len(said)] = said
    return found


def divergence(policy: Outputs, reference: Array | None, sampler: Array, mask: np.ndarray) -> dict[str, float]:
    """Computes `kl` (with a reference) and `entropy` over the tokens of a mask, both in nats per token.

    With them comes how far the sampler is from the trainer, as in `diagnose`.

    Args:
        reference, sampler: log-probabilities in nats, [query, k, response_len]; nan where the sampler gave none.
        mask: the tokens that count, of the same shape.
    """
    log_ratio = None if reference is None else np.asarray(reference - policy.logprobs, np.float64)[mask]
    off = (policy.logprobs - sampler)[mask & ~np.isnan(sampler)]
    return {
        **({} if log_ratio is None else {"kl": float((np.expm1(log_ratio) - log_ratio).mean())}),
        "entropy": float(np.asarray(policy.entropy)[mask].mean()),
        **(_apart(off) if off.size else {}),
    }


def _apart(log_ratio: Float64[np.ndarray, " token"]) -> dict[str, float]:
    """Measures how far sampler and trainer are apart, by the log-ratio of trainer to sampler on the sampler's own tokens."""
    gap = np.abs(log_ratio)
    return {
        "sampler_gap": float(gap.mean()),
        "sampler_gap_max": float(gap.max()),
        "sampler_ratio_max": float(np.exp(log_ratio.max())),
        "sampler_kl": float((np.expm1(log_ratio) - log_ratio).mean()),
    }
