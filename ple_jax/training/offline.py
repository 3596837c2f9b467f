"""The loop of algorithms that sample nothing: epochs over fixed examples, with evaluations between steps.

Such an algorithm is a module with `encode` (a record -> an example, or why it cannot be one), `batches` (which examples an
epoch puts together), `batch`, `make_loss`, `judge` (backend and held-out examples -> measures), and what it `NEEDS` of the
records. Steps are counted where Algorithm 1's loop counts iterations; every evaluation commits a checkpoint.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ple_jax.core.batches import micro_batches
from ple_jax.core.files import write_json
from ple_jax.data.left_out import QuerySet, check_share, fit
from ple_jax.training.prompting import write_bad
from ple_jax.training.run import Run
from ple_jax.training.sinks import truncate_jsonl
from ple_jax.training.state import commit, logged, peak_memory, restore
from ple_jax.training.steps import check_finite, prepared

JUDGEMENT = "judgement.json"  # the newest evaluation, whole


def examples(run: Run) -> tuple[list[Any], list[Any]]:
    """The train and held-out examples.

    Raises:
        UserError: more records that cannot be one than config.task.max_bad_share.
    """

    def encode(which: str, queries: Sequence[Any]) -> list[Any]:
        run.progress.phase(f"encode {which}", len(queries))
        good, bad = fit(queries, lambda q: run.algorithm.encode(q, run.tokenizer, run.config), kind="unfit")
        run.bad[which] += bad
        check_share(QuerySet(good, bad), f"config.task.{which}", run.config.task.max_bad_share)
        run.progress.advance(len(queries))
        return good

    found = encode("train", run.train), encode("heldout", run.heldout)
    write_bad(run)
    return found


def train(run: Run) -> dict[str, Any]:
    """Trains, or goes on where the newest checkpoint stands; returns the totals of the run."""
    config, optimizer = run.config, run.config.optimizer
    trained, heldout = examples(run)
    every = config.reward_model.eval_every
    steps = [
        [trained[i] for i in some]
        for epoch in range(config.reward_model.epochs)
        for some in run.algorithm.batches(trained, optimizer.batch_queries, seed=config.seed, epoch=epoch)
    ]
    state = restore(run)
    state["examples"] = {"train": len(trained), "heldout": len(heldout)}
    truncate_jsonl(run.workdir / "metrics.jsonl", state["iteration"])
    log(run, state, heldout)
    while (begin := state["iteration"]) < len(steps):
        end = min(begin + every, len(steps))
        run.progress.iteration(-(-end // every))
        run.progress.phase("update", end - begin)
        collected = []
        for step in range(begin, end):
            run.stop.check()
            batch = prepared(run, run.algorithm.batch(steps[step]), state["metrics"])
            lr = optimizer.lr * min(1.0, (step + 1) / max(1, optimizer.warmup_steps))
            values = run.backend.update(micro_batches(batch, optimizer.micro_queries), run.loss, lr=lr)
            collected.append({**check_finite(values, step, lr), "lr": lr})
            tokens = int(batch.prompt_mask.sum() + batch.response_mask.sum())
            state["training_tokens"] += tokens
            run.progress.advance(1, tokens=tokens)
        state["iteration"] = end
        state["metrics"] = {f"train_{name}": float(np.mean([m[name] for m in collected])) for name in collected[0]}
        commit(run, state)
        log(run, state, heldout)
    return state


def log(run: Run, state: dict[str, Any], heldout: Sequence[Any]) -> None:
    """Evaluates the step that `state` stands at and writes its metrics line, unless it is there."""
    if state["iteration"] in logged(run.workdir / "metrics.jsonl"):
        return
    found = evaluate(run, heldout)
    numbers = {name: value for name, value in found.items() if isinstance(value, float)}
    values = {**state["metrics"], **{f"heldout_{name}": value for name, value in numbers.items()}}
    for sink in run.sinks:
        sink(values, state["iteration"])
    run.progress.metrics(values)


def evaluate(run: Run, heldout: Sequence[Any]) -> dict[str, Any]:
    """The algorithm's measures of the held-out examples, which are kept in the work directory."""
    run.progress.phase("evaluate", 1)
    found = run.algorithm.judge(run.backend, heldout, run.config)
    write_json(run.workdir / JUDGEMENT, found)
    run.progress.advance(1)
    return found


def summary(run: Run, backend: str, state: dict[str, Any]) -> dict[str, Any]:
    """summary.json: what a run did, in a few numbers."""
    judged = json.loads((run.workdir / JUDGEMENT).read_text(encoding="utf-8"))
    return {
        "algorithm": run.config.algorithm,
        "backend": backend,
        "seed": run.config.seed,
        **{f"heldout_{name}": value for name, value in judged.items()},
        **{f"{which}_examples": count for which, count in state["examples"].items()},
        "steps": state["iteration"],
        "training_tokens": state["training_tokens"],
        "wall_seconds": state["wall_seconds"] + run.clock.lap(),
        "peak_memory_bytes": max(state["peak_memory_bytes"], peak_memory()),
    }
