"""Evaluations as points, reward against KL. The best one under every KL budget is kept, and a run that has spent them stops.

Every method gains reward by moving away from where it began (arXiv:2210.10760), so a reward alone is half of what an
evaluation finds. KL is KL(policy, start) in nats per response, over all plain held-out responses.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from ple_jax import losses
from ple_jax.core import commits
from ple_jax.core.batches import pack
from ple_jax.core.errors import UserError
from ple_jax.core.types import Rollout
from ple_jax.formulas import intervals, texts
from ple_jax.training import scoring
from ple_jax.training.run import Run, Session
from ple_jax.training.state import BEST, CHECKPOINTS, State, commit_best, newest
from ple_jax.training.steps import sampler_logprobs

_ANY = "any"  # the folder of the best there is, where there is no budget


class Point(NamedTuple):
    """An evaluation: where in the run it was made, and means over its held-out queries under the plain prompt."""

    iteration: int  # finished ones
    step: int  # optimiser steps taken
    within: bool  # whether in the middle of the iteration after these
    reward: float
    second: float | None  # of a reward that training never sees, where there is one
    kl: float  # nats per response, and its 95% interval
    kl_low: float
    kl_high: float
    kl_token: float  # nats per token
    length: float  # tokens of a response
    truncated: float  # share of the responses
    distinct_2: float
    repetition: float
    generated_tokens: int  # of training, so far
    training_tokens: int
    seconds: float  # of training, so far
    perplexity: float = math.nan  # of the responses under the start
    overlap: float = math.nan  # share of their trigrams that stand in the principles

    @property
    def where(self) -> str:
        return f"step {self.step}" if self.within else f"iteration {self.iteration}"


# ---------------------------------------------------------------- measured


# of a point what metrics.jsonl calls otherwise: its field -> the name there; the others are called heldout_FIELD
_NAMED = {"kl": "kl_response", "kl_low": "kl_response_low", "kl_high": "kl_response_high", "kl_token": "kl"}


def metric(field: str) -> str:
    """Returns the name that a field of a `Point` has as a metric in metrics.jsonl."""
    return f"heldout_{_NAMED.get(field, field)}"


class Divergences(NamedTuple):
    """KL estimates and reference log-probabilities of all plain responses, in nats, summed over the tokens of a response."""

    kl: Float64[np.ndarray, "query k"]
    logprob: Float64[np.ndarray, "query k"]  # under the reference


def divergences(run: Run[Any], rollouts: Sequence[Rollout], *, moved: bool = True) -> Divergences:
    """Estimates KL(policy, reference) of every plain response, in nats.

    It is the sum over the tokens of r - 1 - log r with r = reference / policy. Each token's estimate is unbiased, given the
    tokens before it, and so is the sum (Schulman, "Approximating KL divergence", 2020). The policy's log-probabilities are
    those that the tokens were drawn with. Where a server samples they are computed: its own may be of another temperature.

    Args:
        rollouts: responses of the current policy, the same number for each query.
        moved: whether the policy may differ from the reference; if not, the reference is not computed.
    """
    config = run.config
    picks = [[i for i, response in enumerate(rollout.responses) if response.own] for rollout in rollouts]
    kl, logprob = (np.zeros((len(rollouts), len(picks[0]))) for _ in range(2))
    size, heat = config.eval.diagnostic_queries, config.sampling.temperature or 1.0
    shape = {"prompt_multiple": config.sampling.bucket, "response_len": config.sampling.max_new_tokens}
    run.session.progress.phase("kl", len(rollouts))
    for start in range(0, len(rollouts), size):
        run.session.stop.check()
        some, own = rollouts[start : start + size], picks[start : start + size]
        batch = pack(some, own, **shape)
        policy = sampler_logprobs(some, np.array(own), batch)
        if config.sampling.server is not None or np.isnan(policy[batch.response_mask]).any():  # of an earlier version too
            policy = run.backend.logprobs(batch, temperature=heat).logprobs
        reference = run.backend.logprobs(batch, reference=True, temperature=heat).logprobs if moved else policy
        policy, reference = (np.where(batch.response_mask, x, 0.0).astype(np.float64) for x in (policy, reference))
        kl[start : start + size] = losses.kl_estimate(policy, reference, kind="k3").sum(-1)
        logprob[start : start + size] = reference.sum(-1)
        run.session.progress.advance(len(some))
    return Divergences(kl, logprob)


def described(run: Run[Any], rollouts: Sequence[Rollout], found: Divergences) -> dict[str, float]:
    """Returns the metrics of an evaluation apart from its reward, by their names in metrics.jsonl."""
    plain = [x._replace(responses=tuple(r for r in x.responses if not r.principled)) for x in rollouts]
    said = [r for rollout in plain for r in rollout.responses]
    tokens = [r.tokens for r in said]
    second = [] if run.second is None else scoring.values(plain, run.second, run.session)
    principles = run.base.tokenizer.encode(run.prompts.principles.text, add_special_tokens=False)
    low, high = intervals.bootstrap_ci(found.kl.mean(1), seed=run.config.seed)
    return {
        "heldout_kl_response": float(found.kl.mean()),
        "heldout_kl_response_low": low,
        "heldout_kl_response_high": high,
        "heldout_kl": float(found.kl.sum() / sum(map(len, tokens))),
        "heldout_perplexity": texts.perplexity(found.logprob.ravel(), [len(t) for t in tokens]),
        "heldout_length": float(np.mean([len(t) for t in tokens])),
        "heldout_truncated": float(np.mean([not r.finished for r in said])),
        "heldout_distinct_2": texts.distinct_n(tokens, 2),
        "heldout_repetition": texts.repetition([r.text for r in said]),
        "heldout_overlap": float(np.mean([texts.ngram_overlap(t, principles, 3) for t in tokens])),
        **({} if run.second is None else {"heldout_second": texts.mean(list(map(texts.mean, second)))}),
    }


def point(state: State, values: Mapping[str, float], *, within: bool = False) -> Point:
    """Makes the point of an evaluation from its metrics `values` and from where the run stands.

    Args:
        within: whether it was made in the middle of the iteration that `state` stands before.
    """
    same = ("reward", "length", "truncated", "distinct_2", "repetition", "perplexity", "overlap")
    totals = state.costs.totals()
    return Point(
        state.iteration,
        state.step,
        within,
        second=values.get(metric("second")),
        **{name: values[metric(name)] for name in (*same, *_NAMED)},
        generated_tokens=int(totals["total_generated_tokens"]),
        training_tokens=int(totals["total_training_tokens"]),
        seconds=totals["total_seconds"],
    )


def place(state: State) -> str:
    """Returns where the state stands, in a word or two: "iteration 3", or "step 40" within an iteration."""
    last = newest_of(state)
    return f"iteration {state.iteration}" if last is None else last.where


def newest_of(state: State) -> Point | None:
    """Returns the newest evaluation of exactly the state's weights, or None if there was none."""
    return next((point for point in reversed(of(state)) if point.step == state.step), None)


def step_within(state: State) -> int | None:
    """Returns the optimiser steps taken if the state's weights were evaluated within an iteration; otherwise None."""
    last = newest_of(state)
    return state.step if last is not None and last.within else None


def of(state: State) -> list[Point]:
    """Returns the points of a run so far."""
    return [Point(**kept) for kept in state.points]


# ---------------------------------------------------------------- the best


def budgets(config: Any) -> dict[str, float]:
    """Returns the KL budgets in nats per response, ascending, by the names of the folders in `best/`.

    The best evaluation is kept under each. Where no budget is named there is one folder without a limit; where
    config.eval.best is "none" there is no folder.
    """
    if config.eval.best == "none":
        return {}
    return {f"kl_{budget:g}": float(budget) for budget in sorted(config.eval.max_kl)} or {_ANY: math.inf}


def best(points: Sequence[Point], by: str, budget: float) -> Point | None:
    """Returns the point with the highest `by`, "reward" or "second", among those within the budget.

    It is the first one of equal points, and None if no point is within the budget.
    """
    fit = [p for p in points if p.kl <= budget and not math.isnan(_value(p, by))]
    return max(fit, key=lambda p: _value(p, by), default=None)


def _value(point: Point, by: str) -> float:
    value = getattr(point, by)
    return math.nan if value is None else value


def noted(run: Run[Any], state: State, new: Point) -> State:
    """Returns the state with another point. Its checkpoint is kept under every budget for which it is the best now."""
    state = state._replace(points=(*state.points, new._asdict()))
    points = of(state)
    for name, budget in budgets(run.config).items():
        folder = run.session.workdir / BEST / name
        kept = commits.steps(folder)
        # an iteration that is not finished may go another way yet: until then what was the best before it stays
        keep = len(kept) + 1 if new.within else 1
        if best(points, run.config.eval.best, budget) == new and kept[-1:] != [state.step]:  # not by one that was killed
            state = commit_best(state, run.backend, run.session, name, keep=keep)
        elif not new.within:
            commits.prune(folder, keep=1)
    return state


def forget_later(session: Session, state: State | None) -> None:
    """Removes the best checkpoints of steps after the state. A process that was killed before it committed those steps left
    them.
    """
    folder = session.workdir / BEST
    if state is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for kept in folder.glob("*"):
        for step in commits.steps(kept):
            if step > state.step:
                shutil.rmtree(kept / str(step))


def taken(run: Run[Any]) -> State:
    """Loads the checkpoint that config.checkpoint.use asks for into the backend, and returns its state.

    "best" is the best evaluation under the largest budget, or the newest checkpoint where none is kept.

    Raises:
        UserError: if there is no such checkpoint.
    """
    use, workdir = run.config.checkpoint.use, run.session.workdir
    kept = list(budgets(run.config))
    folder = workdir / CHECKPOINTS
    if use == "best" and kept and commits.steps(workdir / BEST / kept[-1]):
        folder = workdir / BEST / kept[-1]
    elif use not in ("best", "newest"):
        folder = workdir / BEST / use
        if not commits.steps(folder):
            there = [path.name for path in sorted((workdir / BEST).glob("*")) if commits.steps(path)]
            raise UserError(
                f"config.checkpoint.use is {use!r}, and {workdir} has {', '.join(['best', 'newest', *there])}: no evaluation"
                " was within that budget, or its checkpoint was removed"
            )
    if (state := newest(run.backend, folder)) is None:
        raise UserError(f"{folder} holds no checkpoint yet; train first: --mode=train")
    top = best(of(state), run.config.eval.best, budgets(run.config)[kept[-1]]) if use == "best" and kept else None
    if top is not None and top.step != state.step:
        run.session.progress.log(
            f"warning: the checkpoint of the best evaluation, {top.where}, is gone: this is that of {place(state)}"
        )
    return state


def told(config: Any, state: State) -> str:
    """Returns words that tell a user which checkpoint `taken` has found."""
    last, limits = newest_of(state), budgets(config)
    if last is None:
        return f"iteration {state.iteration}"
    reached = f"reward {last.reward:.3f}, {last.kl:.3g} nats a response from the start"
    if config.checkpoint.use == "newest":
        return f"{last.where}: {reached}"
    budget = limits.get(config.checkpoint.use, max(limits.values(), default=0.0))
    if best(of(state), config.eval.best, budget) != last:  # `taken` found none that is kept
        return f"{last.where}: {reached}"
    within = "" if math.isinf(budget) else f" within {budget:g} nats"
    start = "" if last.step else "; that is the start, and --config.checkpoint.use=newest takes the last one"
    return f"{last.where}, the best evaluated{within}: {reached}{start}"


# ---------------------------------------------------------------- the end


def ended(config: Any, state: State) -> bool:
    """Says whether there is nothing left to train."""
    return state.iteration >= config.iterations or bool(stopped(config, state))


def stopped(config: Any, state: State) -> str:
    """Says why training ends before config.iterations; returns an empty text if it goes on.

    It ends when the KL budgets are spent, or when no evaluation was better for config.eval.patience evaluations.
    """
    points = of(state)
    if not points or state.iteration >= config.iterations:
        return ""
    last, limits = points[-1], budgets(config)
    if config.eval.max_kl and config.eval.stop and last.kl > max(config.eval.max_kl):
        return (
            f"its budget is spent: {last.kl:.3g} nats a response from the start at {last.where}, of"
            f" {max(config.eval.max_kl):g} (longer responses need a larger config.eval.max_kl)"
        )
    if config.eval.patience and limits:
        top = best(points, config.eval.best, max(limits.values()))
        since = len(points) - 1 - (points.index(top) if top else 0)
        if since >= config.eval.patience:
            return f"no evaluation was better than that of {points[-1 - since].where} for {since}"
    return ""
