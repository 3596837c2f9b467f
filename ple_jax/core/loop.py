"""Algorithm 1 (arXiv:2408.02599), and the only place that knows its order.

Sample both kinds of responses, score, decide with the threshold, update, lower the threshold; evaluate before, during and
after. What is on disk decides where a run stands: the newest checkpoint (the commit point), and the journal of the
iteration that was being sampled.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ple_jax import losses
from ple_jax.core import metrics as measure
from ple_jax.core import prompts, rewards, tasks
from ple_jax.core.batches import pack
from ple_jax.core.config import UserError
from ple_jax.core.interrupt import Stop
from ple_jax.core.progress import Progress
from ple_jax.core.rollouts import Journal, bucket, plan_chunks, read, uniforms
from ple_jax.core.sinks import truncate_jsonl
from ple_jax.core.types import (
    Backend,
    Batch,
    Loss,
    Outputs,
    Query,
    Response,
    Reward,
    Rollout,
    Sampling,
    Sink,
    Slot,
    Tokenizer,
)

# iteration numbers of noise that is not an iteration's: every evaluation draws with the same
HELDOUT, GENERATE = -1, -2
_START = time.time()


class Run(NamedTuple):
    """Everything a run needs, made once by the entry."""

    config: Any
    workdir: Path
    backend: Backend
    tokenizer: Tokenizer
    eos: tuple[int, ...]
    base_model: str
    context: int  # tokens that the model was trained to see at once
    transposed: bool  # its linear weights are [in, out], which PEFT wants to know
    algorithm: ModuleType
    loss: Loss
    reward: Reward
    principles: str
    train: list[Query]
    heldout: list[Query]
    sinks: list[Sink]
    progress: Progress
    stop: Stop
    clock: "Clock"


class Clock:
    """Wall time in laps, so that a resumed run adds up what every process spent until its last commit."""

    def __init__(self) -> None:
        self._last = _START

    def lap(self) -> float:
        """Seconds since the last lap; the first one counts from the start of the process."""
        now = time.time()
        elapsed, self._last = now - self._last, now
        return elapsed


class Rendered(NamedTuple):
    """A prompt as the backend gets it: `prefix` (shared by all principled prompts) + `tokens`."""

    prefix: tuple[int, ...]
    tokens: tuple[int, ...]
    whole: tuple[int, ...]


# ---------------------------------------------------------------- the loop


def train(run: Run) -> dict[str, Any]:
    """Runs, or goes on with, the whole of Algorithm 1; returns the totals of the run."""
    config, schedule = run.config, run.algorithm.schedule(run.config)
    render = renderer(run)
    state = run.backend.restore(run.workdir / "checkpoints")
    if state is None:
        state = {
            "iteration": 0,
            "step": 0,
            "generated_tokens": 0,
            "training_tokens": 0,
            "wall_seconds": 0.0,
            "metrics": {},
        }
        state["environment"] = run.backend.environment()
        warm_up(run, state)
        commit(run, state)
    elif state["environment"] != run.backend.environment():
        run.progress.log(_changed(state["environment"], run.backend.environment()))
    run.progress.iteration(state["iteration"])
    truncate_jsonl(run.workdir / "metrics.jsonl", state["iteration"])
    finish(run, state, render)
    while state["iteration"] < config.iterations:
        iteration = state["iteration"]
        run.progress.iteration(iteration + 1)
        rollouts, seconds = collect(run, iteration, float(schedule(iteration)), render)
        values = summarise(rollouts, run.principles, run.tokenizer, config.sampling.max_new_tokens)
        started = time.perf_counter()
        values |= update(run, rollouts, state)
        seconds["update"] = time.perf_counter() - started
        generated = sum(len(r.tokens) for rollout in rollouts for r in rollout.responses)
        values |= {f"seconds_{name}": s for name, s in seconds.items()}
        if seconds["generate"]:  # and not read from the journal
            values["generate_tokens_per_second"] = generated / seconds["generate"]
        values["train_tokens_per_second"] = values["training_tokens"] / max(seconds["update"], 1e-9)
        state["iteration"] += 1
        state["generated_tokens"] += generated
        state["training_tokens"] += values["training_tokens"]
        state["metrics"] = {**values, "generated_tokens": generated}
        commit(run, state)
        finish(run, state, render)
    return state


def commit(run: Run, state: dict[str, Any]) -> None:
    """The commit point: from here on this state is where the run stands."""
    state["wall_seconds"] += run.clock.lap()
    state["peak_memory_bytes"] = max(state.get("peak_memory_bytes", 0), peak_memory())
    keep = run.config.checkpoint.keep
    run.backend.save(run.workdir / "checkpoints", state["iteration"], state, keep=keep)


def warm_up(run: Run, state: dict[str, Any]) -> None:
    """Step 0 of Algorithm 1: fine-tunes on the SFT set, if there is one; the policy then becomes the reference."""
    sft = run.config.sft
    if sft.data is None:
        return
    examples, empty = tasks.load_sft(sft.data)
    tasks.check_disjoint(examples, run.heldout)
    if empty:
        run.progress.log(f"{sft.data}: {len(empty)} examples without a completion are left out")
    size, chat = run.config.optimizer.batch_queries, run.config.task.chat
    rollouts = [_as_rollout(run, query, chat) for query in examples]
    longest = max(len(r.responses[0].tokens) for r in rollouts)
    check_context(run, examples, max(len(r.prompt_tokens) + len(r.responses[0].tokens) for r in rollouts))
    run.progress.phase("warm-up", -(-len(rollouts) // size) * sft.epochs)
    for epoch in range(sft.epochs):
        order = np.random.default_rng([run.config.seed, epoch]).permutation(len(rollouts))
        for start in range(0, len(order), size):
            run.stop.check()
            chosen = [rollouts[i] for i in order[start : start + size]]
            batch = pack(chosen, [(0,)] * len(chosen), prompt_multiple=run.config.sampling.bucket, response_len=longest)
            batch.data["normaliser"] = np.full(len(chosen), batch.response_mask.sum() / len(chosen), np.float32)
            run.backend.update(micro_batches(batch, run.config.optimizer.micro_queries), sft_loss, lr=sft.lr)
            state["training_tokens"] += int(batch.response_mask.sum() + batch.prompt_mask.sum())
            run.progress.advance(1)
    run.backend.freeze_reference()


def sft_loss(outputs: Outputs, batch: Batch) -> tuple[Any, dict[str, Any]]:
    """Cross-entropy per response token of the optimiser batch."""
    return losses.nll(outputs.logprobs[:, 0], batch.response_mask[:, 0], normaliser=batch.data["normaliser"]), {}


def _as_rollout(run: Run, query: Query, chat: bool) -> Rollout:
    _, ids = prompts.render(query, None, run.tokenizer, chat=chat)
    # a completion is the whole of what is wanted: it ends with EOS, which here is part of the data. Where a model stops
    # at several, the tokenizer's is the one that its own training used
    eos = [run.tokenizer.eos_token_id] if run.tokenizer.eos_token_id in run.eos else run.eos[:1]
    tokens = (*run.tokenizer.encode(query.completion, add_special_tokens=False), *eos)
    return Rollout(query.id, query.prompt, tuple(ids), (Response(tokens, True, kind="reference", text=query.completion),))


# ---------------------------------------------------------------- sampling


def renderer(run: Run) -> Callable[[Query, bool], Rendered]:
    """(query, principled) -> its prompt. All plain prompts are checked here, before anything is sampled.

    Raises:
        UserError: a prompt longer than task.max_prompt_tokens.
    """
    chat, limit, config = run.config.task.chat, run.config.task.max_prompt_tokens, run.config.sampling

    def ids(query: Query, principled: bool) -> tuple[int, ...]:
        return tuple(prompts.render(query, run.principles if principled else None, run.tokenizer, chat=chat)[1])

    for query in (*run.train, *run.heldout):
        if (n := len(ids(query, False))) > limit:
            raise UserError(
                f"query {query.id!r} has {n} tokens, above task.max_prompt_tokens={limit}; shorten it, leave it out,"
                f" or raise --config.task.max_prompt_tokens"
            )
    new = config.max_new_tokens
    check_context(run, run.train, max(len(ids(query, True)) for query in (*run.train, *run.heldout)) + new)
    # what the principled prompts share is computed once per call of generate instead of once per row
    some = [ids(query, True) for query in run.heldout[:64]]
    prefix = tuple(prompts.common_prefix(some)) if len(some) > 1 else ()

    def render(query: Query, principled: bool) -> Rendered:
        whole = ids(query, principled)
        if principled and prefix and whole[: len(prefix)] == prefix and len(whole) > len(prefix):
            return Rendered(prefix, whole[len(prefix) :], whole)
        return Rendered((), whole, whole)

    return render


def check_context(run: Run, queries: Sequence[Query], tokens: int) -> None:
    """Raises a UserError if the longest prompt and response together are more than the model was trained to see."""
    if tokens > run.context:
        raise UserError(
            f"the longest of {len(queries)} prompts and its response are {tokens} tokens, and {run.base_model} takes"
            f" {run.context}; shorten prompts, principles or --config.sampling.max_new_tokens"
        )


def sample(
    run: Run,
    queries: Sequence[Query],
    slots: Sequence[Slot],
    journal: Journal,
    iteration: int,
    render: Callable[[Query, bool], Rendered],
) -> list[Rollout]:
    """One response for every query and slot. Chunks that the journal already holds are not sampled again."""
    config = run.config
    rows = [(query, slot) for query in queries for slot in slots]
    rendered = [render(query, slot.principled) for query, slot in rows]
    groups = [(r.prefix, bucket(len(r.tokens), config.sampling.bucket)) for r in rendered]
    chunks = plan_chunks(groups, config.sampling.width)
    finished = journal.finished_chunks()
    sampling = Sampling(
        config.sampling.max_new_tokens,
        run.eos,
        temperature=config.sampling.temperature,
        top_k=config.sampling.top_k,
        top_p=config.sampling.top_p,
        min_p=config.sampling.min_p,
    )
    responses: dict[int, Response] = {}
    run.progress.phase("generate" if iteration >= 0 else "evaluate", len(chunks))
    for number, chunk in enumerate(chunks):
        run.stop.check()
        if number not in finished:
            noise = np.stack([_noise(config, iteration, *rows[i]) for i in chunk])
            prefix = rendered[chunk[0]].prefix
            sampled = run.backend.generate([rendered[i].tokens for i in chunk], noise, sampling=sampling, prefix=prefix)
            finished[number] = [_complete(run, rows[i][1], r) for i, r in zip(chunk, sampled, strict=True)]
            journal.append(number, finished[number])
        responses |= dict(zip(chunk, finished[number], strict=True))
        run.progress.advance(1, tokens=sum(len(r.tokens) for r in finished[number]))
    return [
        Rollout(
            query.id,
            query.prompt,
            render(query, False).whole,
            tuple(responses[i * len(slots) + j] for j in range(len(slots))),
        )
        for i, query in enumerate(queries)
    ]


def _noise(config: Any, iteration: int, query: Query, slot: Slot) -> np.ndarray:
    return uniforms(config.seed, iteration, query.id, slot.kind, slot.sample, config.sampling.max_new_tokens)


def _complete(run: Run, slot: Slot, response: Response) -> Response:
    text = run.tokenizer.decode(response.tokens, skip_special_tokens=True)
    return response._replace(kind=slot.kind, sample=slot.sample, text=text)


def score(run: Run, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Fills rewards, raw and transformed: on the plain query, whatever the prompt was."""
    run.progress.phase("score", 1)
    pairs = [(rollout.prompt, r.text) for rollout in rollouts for r in rollout.responses]
    raw = rewards.score(run.reward, [p for p, _ in pairs], [t for _, t in pairs])
    transformed = iter(zip(raw, rewards.transform(raw, run.config.reward.transform), strict=True))

    def fill(response: Response) -> Response:
        reward, score = next(transformed)
        return response._replace(reward=float(reward), score=float(score))

    scored = [rollout._replace(responses=tuple(fill(r) for r in rollout.responses)) for rollout in rollouts]
    run.progress.advance(1)
    return scored


def collect(
    run: Run, iteration: int, tau: float, render: Callable[[Query, bool], Rendered]
) -> tuple[list[Rollout], dict[str, float]]:
    """Algorithm 1, lines 1 to 5: the iteration's labelled rollouts, from the journal where it is complete."""
    journal = Journal(run.workdir / "rollouts", iteration)
    started = time.perf_counter()
    rollouts = journal.read()
    if rollouts is not None:
        return rollouts, {"generate": 0.0}
    config = run.config
    queries = tasks.draw(run.train, config.queries_per_iteration, seed=config.seed, iteration=iteration)
    rollouts = sample(run, queries, run.algorithm.collect(config), journal, iteration, render)
    sampled = time.perf_counter()
    rollouts = run.algorithm.label(score(run, rollouts), tau, iteration, config)
    journal.complete(rollouts)
    # training reads what is on disk, here as after a resume
    return read(journal.path), {"generate": sampled - started, "score": time.perf_counter() - sampled}


# ---------------------------------------------------------------- training


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """The rows of a batch in parts of `size`; the backend accumulates gradients over them."""

    def part(i: int) -> Batch:
        rows = slice(i, i + size)
        data = {name: value[rows] for name, value in batch.data.items()}
        return Batch(batch.prompt[rows], batch.prompt_mask[rows], batch.response[rows], batch.response_mask[rows], data)

    return [part(i) for i in range(0, len(batch.prompt), size)]


def update(run: Run, rollouts: Sequence[Rollout], state: dict[str, Any]) -> dict[str, float]:
    """Algorithm 1, line 6: the iteration's optimiser steps, and diagnostics from before and after them."""
    config, optimizer = run.config, run.config.optimizer
    size = optimizer.batch_queries
    diagnosed = run.algorithm.batch(rollouts[: config.eval.diagnostic_queries], config)
    before = diagnose(run, diagnosed, with_loss=True)
    groups = [rollouts[i : i + size] for i in range(0, len(rollouts), size)]
    run.progress.phase("update", len(groups) * optimizer.epochs)
    collected: list[dict[str, float]] = []
    tokens = 0
    for epoch in range(optimizer.epochs):
        # the first pass takes the queries as drawn, which is already a random order
        order = np.random.default_rng([config.seed, state["iteration"], epoch]).permutation(len(groups))
        for group in order if epoch else range(len(groups)):
            run.stop.check()
            batch = with_reference(run, run.algorithm.batch(groups[group], config))
            lr = optimizer.lr * min(1.0, (state["step"] + 1) / max(1, optimizer.warmup_steps))
            values = run.backend.update(micro_batches(batch, optimizer.micro_queries), run.loss, lr=lr)
            collected.append({**check_finite(values, state["step"], lr), "lr": lr})
            state["step"] += 1
            trained = int(batch.prompt_mask.sum() + batch.response_mask.sum())
            tokens += trained
            run.progress.advance(1, tokens=trained)
    after = diagnose(run, diagnosed, with_loss=True)
    means = {name: float(np.mean([m[name] for m in collected])) for name in collected[0]}
    # the policy that sampled these responses is the one before the update; log-probabilities are compared over iterations
    named = {name: before[name] for name in ("kl", "entropy")}
    named |= {name: after[name] for name in ("lp_plain", "lp_principled") if name in after}
    if "hinge_active" in before:
        means.pop("hinge_active")
        named |= {"hinge_active_before": before["hinge_active"], "hinge_active_after": after["hinge_active"]}
    return {**means, **named, "lr": collected[-1]["lr"], "training_tokens": tokens}


def check_finite(values: dict[str, float], step: int, lr: float) -> dict[str, float]:
    """Raises a UserError where a step's loss or gradient is not finite: before anything of it is committed."""
    if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
        raise UserError(
            f"optimiser step {step} at learning rate {lr:g} gave loss {values['loss']} and gradient norm"
            f" {values['grad_norm']}; the newest checkpoint is from before it: lower --config.optimizer.lr (in a new"
            " --workdir)"
        )
    return values


def with_reference(run: Run, batch: Batch) -> Batch:
    """Adds the reference's log-probabilities where the algorithm's loss reads them."""
    if run.algorithm.needs_reference(run.config):
        batch.data["reference_logprobs"] = run.backend.logprobs(batch, reference=True).logprobs
    return batch


def diagnose(run: Run, batch: Batch, *, with_loss: bool) -> dict[str, float]:
    """What the policy says of a few queries: KL to the reference and entropy per token, and the loss's own metrics.

    KL is the mean over response tokens of r - 1 - log r with r = reference / policy: unbiased where the tokens are the
    policy's own, never negative, of low variance (Schulman, "Approximating KL divergence", 2020). The principled
    responses were sampled under another prompt, so they are left out of it.
    """
    run.progress.phase("diagnose", 1)
    policy, reference = run.backend.logprobs(batch), run.backend.logprobs(batch, reference=True)
    run.progress.advance(1)
    mask = batch.response_mask
    if "swapped" in batch.data:
        mask = mask & (np.arange(mask.shape[1]) == batch.data["swapped"][:, None])[..., None]
    log_ratio = np.asarray(reference.logprobs - policy.logprobs, np.float64)[mask]
    values = {
        "kl": float((np.expm1(log_ratio) - log_ratio).mean()),
        "entropy": float(np.asarray(policy.entropy)[mask].mean()),
    }
    if with_loss:
        if run.algorithm.needs_reference(run.config):
            batch.data["reference_logprobs"] = reference.logprobs
        _, own = run.loss(policy, batch)
        values |= {name: float(np.mean(value)) for name, value in own.items()}
        if "hinge_active" in own and "ranked" in own:  # a share of the ranked pairs
            values["hinge_active"] = float(own["hinge_active"].sum() / max(own["ranked"].sum(), 1))
    return values


# ---------------------------------------------------------------- metrics and evaluation


def summarise(rollouts: Sequence[Rollout], principles: str, tokenizer: Tokenizer, limit: int) -> dict[str, float]:
    """The rollout metrics of one iteration (design: "Log for every iteration")."""
    by_kind: dict[str, list[Response]] = {}
    for rollout in rollouts:
        for response in rollout.responses:
            by_kind.setdefault(response.kind, []).append(response)
    text = tokenizer.encode(principles, add_special_tokens=False)
    values: dict[str, float] = {}
    for kind, responses in by_kind.items():
        tokens = [r.tokens for r in responses]
        values[f"reward_{kind}"] = float(np.mean([r.reward for r in responses]))
        values[f"score_{kind}"] = float(np.mean([r.score for r in responses]))
        values[f"length_{kind}"] = float(np.mean([len(t) for t in tokens]))
        values[f"distinct_2_{kind}"] = measure.distinct_n(tokens, 2)
        values[f"overlap_{kind}"] = float(np.mean([measure.ngram_overlap(t, text, 3) for t in tokens]))
    everything = [r for responses in by_kind.values() for r in responses]
    margins = np.array([rollout.margin for rollout in rollouts])
    values |= {
        "tau": rollouts[0].tau,
        "margin": float(margins.mean()),
        "negative_margin_share": float((margins < 0).mean()),
        "ranked_share": float(np.mean([rollout.decision == "ranked" for rollout in rollouts])),
        "truncated_share": float(np.mean([not r.finished and len(r.tokens) == limit for r in everything])),
    }
    if "principled" in by_kind and "plain" in by_kind:
        values["leak"] = values["overlap_principled"] - values["overlap_plain"]
    return values


def evaluate(run: Run, iteration: int, render: Callable[[Query, bool], Rendered]) -> tuple[list[Rollout], int]:
    """Responses to the held-out queries as the policy now is, scored; and how many tokens were sampled for it.

    Noise is the same at every evaluation, so that differences between evaluations are paired. Before training the
    principled prompt is evaluated too: what the principles buy without any training.
    """
    journal = Journal(run.workdir / "evaluations", iteration)
    if (rollouts := journal.read()) is None:
        slots = [Slot("plain", False, s) for s in range(run.config.eval.samples)]
        if iteration == 0:
            slots += [Slot("principled", True, s) for s in range(run.config.eval.samples)]
        rollouts = score(run, sample(run, run.heldout, slots, journal, HELDOUT, render))
        journal.complete(rollouts)
    return rollouts, sum(len(r.tokens) for rollout in rollouts for r in rollout.responses)


def mean_rewards(rollouts: Sequence[Rollout], kind: str = "plain") -> np.ndarray:
    """Mean reward of every query over its responses of one kind."""
    return np.array([np.mean([r.reward for r in rollout.responses if r.kind == kind]) for rollout in rollouts])


def finish(run: Run, state: dict[str, Any], render: Callable[[Query, bool], Rendered]) -> None:
    """Evaluates where it is due and writes the metrics line of the iteration that `state` stands at, unless it is there."""
    iteration, config = state["iteration"], run.config
    if iteration in logged(run.workdir / "metrics.jsonl"):
        return
    values = dict(state["metrics"])
    if iteration % config.eval.every == 0 or iteration == config.iterations:
        started = time.perf_counter()
        rollouts, _ = evaluate(run, iteration, render)
        values["heldout_reward"] = float(mean_rewards(rollouts).mean())
        if iteration == 0:
            values["heldout_reward_principled"] = float(mean_rewards(rollouts, "principled").mean())
        picks = [range(config.eval.samples)] * config.eval.diagnostic_queries
        few = rollouts[: config.eval.diagnostic_queries]
        shape = {"prompt_multiple": config.sampling.bucket, "response_len": config.sampling.max_new_tokens}
        policy = diagnose(run, pack(few, picks[: len(few)], **shape), with_loss=False)
        values |= {f"heldout_{name}": value for name, value in policy.items()}
        values["seconds_evaluate"] = time.perf_counter() - started
    for sink in run.sinks:
        sink(values, iteration)
    run.progress.metrics(values)


def logged(path: Path) -> set[int]:
    """Iterations that metrics.jsonl already holds."""
    if not path.exists():
        return set()
    return {json.loads(line)["iteration"] for line in path.read_bytes().splitlines()}


def summary(run: Run, backend: str, state: dict[str, Any]) -> dict[str, Any]:
    """summary.json: what a run did, in a few numbers."""
    config = run.config
    before = mean_rewards(read(Journal(run.workdir / "evaluations", 0).path))
    after = mean_rewards(read(Journal(run.workdir / "evaluations", config.iterations).path))
    evaluated = sum(
        len(r.tokens)
        for path in sorted((run.workdir / "evaluations").glob("iter_*.jsonl"))
        if not path.name.endswith(".partial.jsonl")
        for rollout in read(path)
        for r in rollout.responses
    )
    return {
        "algorithm": config.algorithm,
        "backend": backend,
        "seed": config.seed,
        "heldout_reward_before": float(before.mean()),
        "heldout_reward_after": float(after.mean()),
        "heldout_gain_ci95": list(measure.bootstrap_ci(after - before, seed=config.seed)),
        "heldout_queries": len(before),
        "iterations": config.iterations,
        "generated_tokens": state["generated_tokens"],
        "evaluation_tokens": evaluated,
        "training_tokens": state["training_tokens"],
        "wall_seconds": state["wall_seconds"] + run.clock.lap(),
        "peak_memory_bytes": max(state["peak_memory_bytes"], peak_memory()),
    }


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    changes = ", ".join(f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in keys)
    return f"warning: the run began in another environment ({changes}); results need not be bit-identical"
