"""Metrics of an iteration's rollouts and of the held-out queries, and the summary of a run."""

import contextlib
import math
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ple_jax import rewards
from ple_jax.algorithms import Algorithm
from ple_jax.core.errors import Damaged
from ple_jax.core.noise import HELDOUT
from ple_jax.core.types import Response, Rollout, Slot
from ple_jax.data.mixture import by_set
from ple_jax.formulas import intervals, texts
from ple_jax.training import ahead, points
from ple_jax.training.journal import Journal, read
from ple_jax.training.run import Run
from ple_jax.training.sampling import sample
from ple_jax.training.scoring import net_rewards, sorted_out
from ple_jax.training.sinks import show_samples
from ple_jax.training.state import State, logged, spent
from ple_jax.training.steps import diagnose
from ple_jax.training.workdir import was_its_end

_SHOWN = 8  # held-out queries of which an experiment tracker shows the response
_LEAK = 0.1  # share of trigrams above which principles are said to leak


# ---------------------------------------------------------------- rollouts


def summarise(rollouts: Sequence[Rollout], run: Run[Algorithm]) -> dict[str, float]:
    """Computes the rollout metrics of one iteration, and logs a warning where principles leak into the responses."""
    transform = run.config.reward.transform
    by_kind = _by_kind(rollouts)
    principles = run.base.tokenizer.encode(run.prompts.principles.text, add_special_tokens=False)
    values: dict[str, float] = {}
    for kind, responses in by_kind.items():
        values |= {f"{name}_{kind}": value for name, value in _of_one_kind(responses, principles).items()}
    everything = [r for responses in by_kind.values() for r in responses]
    margins = np.array([rollout.margin for rollout in rollouts])
    values |= {
        **({"tau": rollouts[0].tau} if not math.isnan(rollouts[0].tau) else {}),
        **({"margin": float(margins.mean())} if not np.isnan(margins).any() else {}),
        "negative_margin_share": float((margins < 0).mean()),
        "ranked_share": float(np.mean([rollout.decision == "ranked" for rollout in rollouts])),
        "truncated_share": float(np.mean([not r.finished for r in everything])),
    }
    if len(given := {r.reward for r in everything}) == 1 and len(everything) > 1:
        run.session.progress.log(f"warning: all rewards of this iteration are {given.pop():g}: there is nothing to rank")
    guided = [kind for kind, responses in by_kind.items() if responses[0].principled]
    plain = [kind for kind, responses in by_kind.items() if responses[0].own]
    if guided and plain:
        quoted, by_chance = values[f"overlap_{guided[0]}"], values[f"overlap_{plain[0]}"]
        values["leak"] = quoted - by_chance
        if says := warn_of_leak(quoted, by_chance):
            run.session.progress.log(says)
    pooled = rewards.statistics(net_rewards(rollouts, run.config.reward.length_penalty), transform)
    for name, some in by_set(run.config, ((rollout.query_id, rollout) for rollout in rollouts)).items():
        of_kinds = {kind: np.mean([r.reward for r in responses]) for kind, responses in _by_kind(some).items()}
        values |= {f"reward_{kind}/{name}": float(mean) for kind, mean in of_kinds.items()}
        values[f"ranked_share/{name}"] = float(np.mean([rollout.decision == "ranked" for rollout in some]))
    return values | {f"transform_{name}": value for name, value in pooled.items()}


def _by_kind(rollouts: Sequence[Rollout]) -> dict[str, list[Response]]:
    by_kind: dict[str, list[Response]] = {}
    for rollout in rollouts:
        for response in rollout.responses:
            by_kind.setdefault(response.kind, []).append(response)
    return by_kind


def _of_one_kind(responses: Sequence[Response], principles: Sequence[int]) -> dict[str, float]:
    tokens = [r.tokens for r in responses]
    parts = {f"reward_{part}": float(np.mean([r.parts[part] for r in responses])) for part in responses[0].parts}
    return {
        "reward": float(np.mean([r.reward for r in responses])),
        "score": float(np.mean([r.score for r in responses])),
        **parts,
        "length": float(np.mean([len(t) for t in tokens])),
        "distinct_2": texts.distinct_n(tokens, 2),
        "overlap": float(np.mean([texts.ngram_overlap(t, principles, 3) for t in tokens])),
    }


def mean_length(rollouts: Iterable[Rollout], run: Run[Algorithm]) -> float:
    """Computes the mean length, in tokens, of the responses that the algorithm would train on.

    Returns 0 if no function of the algorithm says which they are (`Algorithm.learned` is None).
    """
    if (learned := run.algorithm.learned) is None:
        return 0.0
    return float(np.mean([len(r.tokens) for rollout in rollouts for r in learned(rollout, run.config)]))


def warn_of_leak(quoted: float, by_chance: float) -> str:
    """Returns a warning if principled responses repeat the principles more than plain ones do; otherwise an empty text.

    Training on such responses would teach the policy to quote the principles.

    Args:
        quoted: share of the trigrams of principled responses that stand in the principles.
        by_chance: the same of plain ones.
    """
    if quoted - by_chance <= _LEAK:
        return ""
    return (
        f"warning: {quoted:.0%} of the trigrams of principled responses stand in the principles ({by_chance:.0%} of the"
        " plain ones'): the policy quotes them, and training would teach it to; shorten or rephrase them"
    )


# ---------------------------------------------------------------- held-out queries


def evaluate(run: Run[Algorithm], iteration: int, *, step: int | None = None) -> list[Rollout]:
    """Samples responses of the current policy to the held-out queries, and scores them.

    Noise is the same at every evaluation, so that differences between evaluations are paired. Before training the principled
    prompt is evaluated too, which shows what the principles gain without any training. An evaluation that is on disk is
    read; a damaged one is made again.

    Args:
        iteration: number of finished iterations.
        step: number of optimiser steps taken, for an evaluation in the middle of the iteration after these; None otherwise.
    """
    journal, rollouts = evaluation(run.session.workdir, iteration, step), None
    with contextlib.suppress(Damaged):
        rollouts = journal.read()
    if rollouts is None:
        slots = [Slot("plain", False, s) for s in range(run.config.eval.samples)]
        if iteration == 0 and step is None:
            slots += [Slot("principled", True, s) for s in range(run.config.eval.samples)]
        with ahead.scoring(run.reward, run.session) as score:
            sampled = sample(run, run.data.heldout, slots, journal, HELDOUT, score)
        # those without a reward stay where they are: evaluations are of the same queries
        name = f"heldout_{iteration:04d}" + ("" if step is None else f"_step_{step}")
        rollouts, _ = sorted_out(sampled, name, run.config, run.reward, run.session)
        journal.complete(rollouts)
    return rollouts


def evaluation(workdir: Path, iteration: int, step: int | None = None) -> Journal:
    """Returns the journal of an evaluation; arguments are as in `evaluate`."""
    folder = workdir / "evaluations"
    return Journal(folder if step is None else folder / f"step_{step:06d}", iteration)


def forget_within(workdir: Path, step: int) -> None:
    """Removes evaluations in the middle of an iteration, of policies with more than `step` optimiser steps."""
    for folder in (workdir / "evaluations").glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)


def mean_rewards(rollouts: Sequence[Rollout], *, principled: bool = False) -> np.ndarray:
    """Computes the mean reward of every query over those of its plain (or principled) responses that have one.

    Returns:
        An array [query]; nan where no response has a reward.
    """
    found = [[r.reward for r in rollout.responses if r.principled is principled] for rollout in rollouts]
    kept = [[reward for reward in some if not math.isnan(reward)] for some in found]
    return np.array([np.mean(some) if some else math.nan for some in kept])


def log_iteration(run: Run[Algorithm], state: State) -> State:
    """Evaluates if that is due, and writes the metrics line of the iteration that `state` stands at. Returns the state."""
    iteration, config = state.iteration, run.config
    values = {**state.metrics, **state.costs.totals()}
    due = iteration % config.eval.every == 0 or iteration == config.iterations
    if due or was_its_end(run.session.workdir, iteration):  # the best there is may be that end's
        started = time.perf_counter()
        rollouts = evaluate(run, iteration)
        values |= heldout_metrics(run, rollouts, moved=state.step > 0)
        show_samples(run.session.sinks, _samples(rollouts[:_SHOWN]), iteration)
        values["seconds_evaluate"] = time.perf_counter() - started
        state = state._replace(costs=state.costs.took("evaluate", values["seconds_evaluate"]))
        state = points.noted(run, state, points.point(state, values))
    return logged(state, values, run.session)


def _samples(rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    """Returns the first response to each query under the plain prompt, without any selection, as rows of a table."""
    first = [(rollout, next(r for r in rollout.responses if not r.principled)) for rollout in rollouts]
    return [
        {
            "query": rollout.query_id,
            "prompt": str(rollout.prompt),
            "response": response.text,
            "reward": None if math.isnan(response.reward) else response.reward,
            "finished": response.finished,
        }
        for rollout, response in first
    ]


def evaluate_within(run: Run[Algorithm], state: State) -> State:
    """Evaluates in the middle of the iteration that `state` stands before. Returns the state with one more point."""
    started = time.perf_counter()
    found = heldout_metrics(run, evaluate(run, state.iteration, step=state.step), moved=True)
    state = state._replace(costs=state.costs.took("evaluate", time.perf_counter() - started))
    return points.noted(run, state, points.point(state, found, within=True))


def heldout_metrics(run: Run[Algorithm], rollouts: Sequence[Rollout], *, moved: bool) -> dict[str, float]:
    """Computes the metrics of an evaluation: mean rewards, KL over all of it, and the policy's entropy on some of its
    queries.

    Args:
        moved: whether the policy may differ from the reference.
    """
    config = run.config
    values = {"heldout_reward": float(np.nanmean(mean_rewards(rollouts)))}
    if any(r.principled for r in rollouts[0].responses):
        values["heldout_reward_principled"] = float(np.nanmean(mean_rewards(rollouts, principled=True)))
    policy = diagnose(run, rollouts[: config.eval.diagnostic_queries], kl=False)
    values |= {f"heldout_{name}": value for name, value in policy.items()}
    found = points.divergences(run, rollouts, moved=moved)
    ids = [rollout.query_id for rollout in rollouts]
    for name, some in by_set(
        config, zip(ids, zip(mean_rewards(rollouts), found.kl.mean(1), strict=True), strict=True)
    ).items():
        reward, kl = np.nanmean(some, axis=0).tolist()
        values |= {f"heldout_reward/{name}": reward, f"heldout_kl_response/{name}": kl}
    return values | points.described(run, rollouts, found)


# ---------------------------------------------------------------- the end


def summary(run: Run[Algorithm], backend: str, state: State) -> dict[str, Any]:
    """Returns the contents of summary.json: what a run did, in a few numbers."""
    config, evaluations = run.config, run.session.workdir / "evaluations"
    before, after = before_and_after(run.session.workdir, state.iteration)
    evaluated = sum(
        len(r.tokens)
        for path in sorted(evaluations.rglob("iter_*.jsonl"))
        if not path.name.endswith(".partial.jsonl")
        for rollout in read(path)
        for r in rollout.responses
    )
    return {
        "algorithm": config.algorithm,
        "trainer": config.trainer,
        "backend": backend,
        "seed": config.seed,
        "heldout_reward_before": float(before.mean()) if len(before) else math.nan,
        "heldout_reward_after": float(after.mean()) if len(after) else math.nan,
        "heldout_gain_ci95": list(intervals.bootstrap_ci(after - before, seed=config.seed)),
        "heldout_queries": len(before),
        "iterations": state.iteration,
        "stopped": points.stopped(config, state) or None,
        "best": best_of(run, state),
        "best_by": config.eval.best,
        "points": [point._asdict() for point in points.of(state)],
        **state.costs.counters(),
        "evaluation_tokens": evaluated,
        "seconds": state.costs.seconds,
        **spent(state, run.session),
    }


def best_of(run: Run[Algorithm], state: State) -> dict[str, Any]:
    """Describes the best evaluation of each folder of `best/`, by the name of the folder.

    Each has the fields of its `Point`, the 95% interval of the gain since the first evaluation, the gain that lengths alone
    would give, the file of its responses, and for a mixture the gains of its data sets; without that file, its point alone.
    """
    found, by, workdir = {}, run.config.eval.best, run.session.workdir
    for name, budget in points.budgets(run.config).items():
        if (top := points.best(points.of(state), by, budget)) is not None:
            where = top.iteration, top.step if top.within else None
            found[name] = top._asdict()
            if not (file := evaluation(workdir, *where).path).exists():  # it was damaged, and so removed
                continue
            before, after = before_and_after(workdir, *where)
            gain = intervals.bootstrap_ci(after - before, seed=run.config.seed)
            length, said = gain_by_length(workdir, *where), file.relative_to(workdir).as_posix()
            found[name] |= {"gain_ci95": list(gain), "gain_by_length": length, "responses": said}
            if sets := gains_of_sets(run.config, workdir, *where):
                found[name]["sets"] = sets
    return found


def gains_of_sets(config: Any, workdir: Path, last: int, step: int | None = None) -> dict[str, dict[str, Any]]:
    """Computes, for every data set of a mixture, the mean rewards in the first evaluation and in another one, and the 95%
    interval of the gain.

    Args:
        last, step: the other evaluation, as `evaluate` takes them.
    """
    journals = [read(evaluation(workdir, 0).path), read(evaluation(workdir, last, step).path)]
    each = [dict(zip((r.query_id for r in some), mean_rewards(some), strict=True)) for some in journals]
    pairs = [(name, (before, each[1].get(name, math.nan))) for name, before in each[0].items()]
    found = {}
    for name, some in by_set(config, pairs).items():
        values = np.array([pair for pair in some if not math.isnan(sum(pair))], np.float64).reshape(-1, 2)
        gain = intervals.bootstrap_ci(values[:, 1] - values[:, 0], seed=config.seed)
        before, after = values.mean(0).tolist() if len(values) else (math.nan, math.nan)
        found[name] = {"queries": len(values), "before": before, "after": after, "gain_ci95": list(gain)}
    return found


def gain_by_length(workdir: Path, last: int, step: int | None = None) -> float:
    """Computes how much of the gain since the first evaluation the lengths of the responses alone would give.

    It is in units of the reward (`texts.gain_by_length`). Arguments are as in `gains_of_sets`.
    """
    plain = [
        [r for rollout in read(journal.path) for r in rollout.responses if not r.principled]
        for journal in (evaluation(workdir, 0), evaluation(workdir, last, step))
    ]
    rewards, lengths = [[r.reward for r in some] for some in plain], [[len(r.tokens) for r in some] for some in plain]
    return texts.gain_by_length(rewards, lengths)


def before_and_after(workdir: Path, last: int, step: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean rewards in the first evaluation and in another one, of the held-out queries that have one in both.

    A reward that was mended in between may score or refuse other queries than before. Arguments are as in `gains_of_sets`.

    Returns:
        Two arrays [query], in the same order.
    """
    first, then = read(evaluation(workdir, 0).path), read(evaluation(workdir, last, step).path)
    found = {rollout.query_id: mean for rollout, mean in zip(then, mean_rewards(then), strict=True)}
    pairs = [(b, found.get(r.query_id, math.nan)) for r, b in zip(first, mean_rewards(first), strict=True)]
    before, after = np.array(pairs, np.float64).reshape(-1, 2).T
    both = ~np.isnan(before + after)
    return before[both], after[both]
