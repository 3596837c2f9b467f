"""Computes what another reward, threshold, transform or selection would have made of the responses in a run's journals.

Nothing is sampled, no weights are read, and no reward is asked unless it is another one than the run's. Every iteration of
WORKDIR/rollouts is labelled again, as the config now says, and compared with what happened. An unchanged config gives every
score, margin, decision and weight as it was, bit by bit. A replay does not know what the policy would have answered later,
had it learned from other labels.

WORKDIR/replay/ has replay.json, flips.jsonl (a line for each query that is decided otherwise), rollouts/ (the journals as
they would have been) and the data sets that `journal_records` makes of them.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ple_jax import algorithms, rewards
from ple_jax.algorithms import Algorithm, Context
from ple_jax.core import identity
from ple_jax.core.answers import Cache
from ple_jax.core.config import flatten
from ple_jax.core.errors import UserError
from ple_jax.core.files import plain, write_json, write_jsonl
from ple_jax.core.types import Query, Reward, Rollout
from ple_jax.data.load import load_data
from ple_jax.evaluation import journal_records
from ple_jax.training import journal, prompting, scoring
from ple_jax.training.opening import training_reward
from ple_jax.training.workdir import begun, lock, recorded

FOLDER = "replay"  # of a work directory
# keys that say how responses are labelled: any other one had a part in what was sampled, and no replay can undo that
_LABELS = ("reward.", "ple.", "raft.", "dpo.", "grpo.", "rloo.", "ppo.", "algorithm_kwargs", "iterations")
# keys of what is not done here
_NOT_ASKED = ("backend", "format", "inputs", "sampling.server", "sampling.server_sleep", "task.date")
_UNREAD = ("eval.", "export.", "generate.", "compare.", "probe.", "inputs.", "optimizer.", "offline.", "checkpoint.")


class Iteration(NamedTuple):
    """The rollouts of an iteration as they were labelled, and as they are labelled now."""

    number: int
    pairs: list[tuple[Rollout | None, Rollout]]  # what happened, None where the query was left out; and what is now
    left_out: int  # queries that have no finite reward now

    @property
    def after(self) -> list[Rollout]:
        return [now for _, now in self.pairs]


def replay(config: Any, workdir: Path, backend: str) -> dict[str, Any]:
    """Labels the run's iterations again, writes what that gives, and returns what replay.json holds.

    Raises:
        UserError: there is no run, or no finished iteration; the algorithm does not sample, or asks for other responses; or
            the reward fails.
    """
    if not (kept := recorded(workdir)):
        raise UserError(f"--workdir={workdir} holds no run; train one first: --mode=train")
    algorithm = algorithms.load(config.algorithm)
    if not isinstance(algorithm, Algorithm):
        raise UserError(f"--mode=replay needs an algorithm that samples, and config.algorithm is {config.algorithm!r}")
    config = algorithms.with_defaults(algorithm, begun(config, workdir, backend))
    changed = _changed(kept, config, backend)
    another = {"reward.name", "reward.kwargs"} & changed.keys()
    with lock(workdir / FOLDER):  # a run that goes on is not disturbed
        found = list(_iterations(config, workdir, backend, algorithm, another=another))
        if not found:
            raise UserError(f"{workdir / 'rollouts'} holds no finished iteration: there is nothing to replay")
        result = {
            "changed": {key: pair for key, pair in changed.items() if key.startswith(_LABELS)},
            "sampled_otherwise": {key: pair for key, pair in changed.items() if not key.startswith(_LABELS)},
            "same": all(_same(iteration) for iteration in found),
            "iterations": [_compared(iteration) for iteration in found],
        }
        _write(result, found, workdir / FOLDER, algorithm, config)
    return result


def _changed(was: Mapping[str, Any], config: Any, backend: str) -> dict[str, list[Any]]:
    """Returns the keys in which the config differs from the run's, each with the old and the new value."""
    now = plain(identity.run_keys(config, backend, {}))
    both = identity.completed(was, now), json.loads(json.dumps(now))
    before, after = (flatten(identity.comparable(keys)) for keys in both)
    keys = [key for key in after if key not in (*identity.EXECUTION, *_NOT_ASKED) and not key.startswith(_UNREAD)]
    return {key: [before[key], after[key]] for key in keys if key in before and before[key] != after[key]}


def _iterations(
    config: Any, workdir: Path, backend: str, algorithm: Algorithm, *, another: Collection[str]
) -> Iterator[Iteration]:
    """Yields all finished iterations, labelled again.

    `another` has the keys of the reward that changed; if there are any, the new reward is loaded and asked.
    """
    reward, schedule = training_reward(config, backend) if another else None, algorithm.schedule(config)
    with Cache(workdir / FOLDER / "rewards.sqlite") as cache:
        for path in sorted((workdir / "rollouts").glob("iter_????.jsonl")):
            number, happened = int(path.stem[5:]), journal.read(path)
            _check_slots(happened, algorithm, config, path)
            before: list[Rollout | None] = [*happened]
            rollouts = happened
            if reward is not None:
                others = journal.left_out(path, happened)
                before, rollouts = [*before, *[None] * len(others)], _scored([*happened, *others], reward, config, cache)
            finite = [all(math.isfinite(r.reward) for r in rollout.responses) for rollout in rollouts]
            kept = [rollout for rollout, ok in zip(rollouts, finite, strict=True) if ok]
            context = Context(config, number, float(schedule(number)))
            after = scoring.labelled_again(kept, algorithm, context) if kept else []
            told = [rollout for rollout, ok in zip(before, finite, strict=True) if ok]
            yield Iteration(number, list(zip(told, after, strict=True)), len(rollouts) - len(kept))


def _check_slots(rollouts: Sequence[Rollout], algorithm: Algorithm, config: Any, path: Path) -> None:
    """Raises a UserError if the algorithm would have asked for other responses than there are."""
    wanted = [(slot.kind, slot.principled, slot.sample) for slot in algorithm.collect(config)]
    for rollout in rollouts:
        if (found := [(r.kind, r.principled, r.sample) for r in rollout.responses]) != wanted:
            said, asked = (", ".join(dict.fromkeys(kind for kind, *_ in some)) for some in (found, wanted))
            raise UserError(
                f"{path} has {len(found)} responses a query ({said}), and config.algorithm {config.algorithm!r} asks for"
                f" {len(wanted)} ({asked}): a replay labels what was sampled; give the run's own algorithm and numbers"
            )


def _scored(rollouts: Sequence[Rollout], reward: Reward, config: Any, cache: Cache) -> list[Rollout]:
    """Scores the rollouts with another reward than the run's; nan where it gives nothing finite, or takes no such query."""
    reads = rewards.reads(reward)
    known_none = bool(config.task.sets)  # else it is what a second reward read of a train record that has no such column
    told = [name in one.record and (known_none or one.record[name] is not None) for one in rollouts for name in reads]
    if not all(told):
        known = {query.id: query.record for query in load_data(config, reads=reads).train}
        rollouts = [rollout._replace(record={**rollout.record, **known.get(rollout.query_id, {})}) for rollout in rollouts]
    return [_unscored(one) if _refused(one, reward) else one for one in scoring.filled(rollouts, reward, cache)]


def _refused(rollout: Rollout, reward: Reward) -> bool:
    return bool(prompting.refusal(reward, Query(rollout.query_id, rollout.prompt, record=rollout.record)))


def _unscored(rollout: Rollout) -> Rollout:
    return rollout._replace(responses=tuple(response._replace(reward=math.nan) for response in rollout.responses))


# ---------------------------------------------------------------- compared


def _labels(rollout: Rollout) -> str:
    """Returns all values of a rollout's labels as one exact text, in which nan equals nan."""
    of_responses = [(r.reward, r.score, r.weight) for r in rollout.responses]
    return repr((rollout.query_id, rollout.tau, rollout.margin, rollout.decision, of_responses))


def _same(iteration: Iteration) -> bool:
    """Says whether every label is, bit by bit, as it was, and no query is left out."""
    return not iteration.left_out and all(
        one is not None and _labels(one) == _labels(other) for one, other in iteration.pairs
    )


def _compared(iteration: Iteration) -> dict[str, Any]:
    """Makes a row of replay.json; in each pair of values the first is what happened, and the second is what is now."""
    both = [(one, other) for one, other in iteration.pairs if one is not None]
    before = [one for one, _ in both]
    moved = np.abs(np.subtract(_weights(before), _weights(other for _, other in both)))
    flips = Counter(f"{_decision(one)} -> {_decision(other)}" for one, other in iteration.pairs if _flipped(one, other))
    return {
        "iteration": iteration.number,
        "queries": len(iteration.pairs),
        "left_out": iteration.left_out,
        "tau": [_tau(before), _tau(iteration.after)],
        "ranked": [_share(before), _share(iteration.after)],
        "flips": dict(flips.most_common()),
        "weights_moved": int((moved > 0).sum()),
        "largest_move": float(moved.max(initial=0.0)),
        "same": _same(iteration),
    }


def _decision(rollout: Rollout | None) -> str:
    return "left out" if rollout is None else rollout.decision


def _flipped(one: Rollout | None, other: Rollout) -> bool:
    return _decision(one) != other.decision


def _weights(rollouts: Iterable[Rollout]) -> list[float]:
    return [0.0 if math.isnan(r.weight) else r.weight for rollout in rollouts for r in rollout.responses]


def _tau(rollouts: Sequence[Rollout]) -> float:
    return rollouts[0].tau if rollouts else math.nan


def _share(rollouts: Sequence[Rollout]) -> float:
    return float(np.mean([rollout.decision == "ranked" for rollout in rollouts])) if rollouts else math.nan


def _flips(iteration: Iteration) -> Iterator[dict[str, Any]]:
    for one, other in iteration.pairs:
        if _flipped(one, other):
            yield {
                "iteration": iteration.number,
                "query_id": other.query_id,
                "prompt": str(other.prompt),
                "decision": [_decision(one), other.decision],
                "margin": [math.nan if one is None else one.margin, other.margin],
                "tau": [math.nan if one is None else one.tau, other.tau],
            }


def _write(result: Mapping[str, Any], found: Sequence[Iteration], folder: Path, algorithm: Algorithm, config: Any) -> None:
    for stale in (folder / "rollouts").glob("iter_*.jsonl"):
        stale.unlink()
    for iteration in found:
        journal.write(folder / "rollouts" / f"iter_{iteration.number:04d}.jsonl", iteration.after)
    write_jsonl(folder / "flips.jsonl", (plain(flip) for iteration in found for flip in _flips(iteration)))
    labelled = {iteration.number: iteration.after for iteration in found}
    for name, rows in journal_records.of(labelled, algorithm, config).items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    write_json(folder / "replay.json", result)


def said(result: Mapping[str, Any]) -> Iterator[str]:
    """Yields the result as lines of text."""
    if result["sampled_otherwise"]:
        keys = ", ".join(result["sampled_otherwise"])
        yield f"warning: {keys} had a part in what was sampled, and a replay labels what is there"
    for key, (before, after) in result["changed"].items():
        yield f"{key}: {before!r} -> {after!r}"
    yield f"{'iteration':>9} {'queries':>8} {'tau':>15} {'ranked':>15} {'weights moved':>14}  decided otherwise"
    for row in result["iterations"]:
        tau, ranked = (" -> ".join(f"{value:.3g}" for value in row[key]) for key in ("tau", "ranked"))
        flips = ", ".join(f"{count} {flip}" for flip, count in row["flips"].items()) or "none"
        out = f"; {row['left_out']} left out" if row["left_out"] else ""
        number, moved = row["iteration"] + 1, row["weights_moved"]
        yield f"{number:>9} {row['queries']:>8} {tau:>15} {ranked:>15} {moved:>14}  {flips}{out}"
    yield _in_all(result)


def _in_all(result: Mapping[str, Any]) -> str:
    rows = result["iterations"]
    pairs, moved = (sum(row[key] for row in rows) for key in ("queries", "weights_moved"))
    flips = sum(sum(row["flips"].values()) for row in rows)
    if result["same"]:
        asked = {"reward.name", "reward.kwargs"} & result["changed"].keys()
        unasked = "" if asked else " (no reward was asked: the rewards are those of the run)"
        return f"every score, margin, decision and weight is as it was, bit by bit{unasked}"
    if flips or moved:
        return f"{flips} of {pairs} pairs are decided otherwise, and {moved} weights are other ones"
    return "every pair is decided as it was, with the same weights, though thresholds, scores or margins are other ones"
