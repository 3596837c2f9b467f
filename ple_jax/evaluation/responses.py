"""The responses of a model to a fixed set of queries, with everything that a comparison reads of them, never weights.

They are kept in WORKDIR/responses/NAME/, where NAME is trained, trained_principled, start or start_principled, followed by
_step_N for a policy in the middle of an iteration. For iteration N there are iter_NNNN.json (settings), iter_NNNN.jsonl (the
journal: texts, tokens, training reward) and iter_NNNN.scores.jsonl. The latter has a line for each query, in the journal's
order, with n values for its n responses:

    query_id, reference      the record's own answer, "" if it has none
    second                   [n] a second reward's values, where one was asked for; null where it gave nothing finite
    overlap                  [n] share of a response's trigrams that stand in the principles
    logprob                  [n] sum over a response's tokens of log pi, nats, under the prompt that it was sampled from
    base_logprob             [n] the same under the base without any adapter, and the plain prompt
    kl                       [n] sum over its tokens of r - 1 - log r, r = start / policy: nats, estimates KL(policy, start),
                             where start is what training began with: the base, an adapter, or the warmed-up policy (of
                             generate.policy=start, which comes before any warm-up, the policy itself)
    reference_logprob        of the reference and its EOS under the base, nats; null without a reference, or where the model
                             takes no text of that length
    reference_tokens         the number of tokens in that sum, 0 where it is null

The sum of the tokens' estimates is unbiased for the KL divergence of whole responses, since each is, given what came before
it (Schulman, "Approximating KL divergence", 2020). That holds where responses are sampled at temperature 1, without
truncation.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ple_jax import losses
from ple_jax.algorithms import Algorithm
from ple_jax.core import identity
from ple_jax.core.batches import bucket, left_padded, pack
from ple_jax.core.compact import Compact
from ple_jax.core.config import differing, flatten
from ple_jax.core.errors import Damaged, Unusable, UserError
from ple_jax.core.files import read_json, read_sealed, write_json, write_sealed
from ple_jax.core.noise import RESPONSES
from ple_jax.core.rules import Rule, choice, flag, mapping, misshapen, optional, text, whole
from ple_jax.core.types import Batch, Query, Response, Reward, Rollout, Slot
from ple_jax.data import mixture
from ple_jax.data.left_out import QuerySet
from ple_jax.data.load import Data, load_heldout
from ple_jax.data.queries import digest, record_digest, some
from ple_jax.formulas.texts import ngram_overlap
from ple_jax.training import ahead, opening, scoring
from ple_jax.training.journal import Journal
from ple_jax.training.journal import read as read_journal
from ple_jax.training.run import Run
from ple_jax.training.sampling import given, sample
from ple_jax.training.steps import sampler_logprobs

_AGAIN = "delete that folder and give --mode=generate again"


class Generated(NamedTuple):
    """The responses of one model to one set of queries."""

    settings: dict[str, Any]
    rollouts: list[Rollout]
    scores: list[dict[str, Any]]  # a line of iter_NNNN.scores.jsonl each, in the same order


def folder(workdir: Path, config: Any, step: int | None = None) -> Path:
    """Returns the folder of the responses that config.generate asks for.

    Args:
        step: optimiser steps taken, if the policy is of the middle of an iteration.
    """
    principled = "_principled" if config.generate.principled else ""
    return workdir / "responses" / (config.generate.policy + principled + ("" if step is None else f"_step_{step}"))


def file_of(workdir: Path, point: Mapping[str, Any]) -> Path:
    """Returns the path of the scores of the trained policy's answers at an evaluation, whether they are there or not.

    Args:
        point: the evaluation, of which `iteration`, `within` and, if that is true, `step` are read.
    """
    step = f"_step_{point['step']}" if point["within"] else ""
    return workdir / "responses" / f"trained{step}" / f"iter_{point['iteration']:04d}.scores.jsonl"


_VERSION = "second_reward_version"
# what says of principled answers which principles a query had, beside their name -> the key of config.json that says it too
RULES = {"principles_per_query": "principles_per_query", "principles_digest": "inputs.principles"}
_NEWER = (_VERSION, *RULES)  # which files of an earlier version lack
# what is read of the settings of responses
_SETTINGS: dict[str, Rule] = {
    "algorithm": text, "trainer": text, "seed": whole(0), "iteration": whole(0), "policy": choice("trained", "start"),
    "principled": flag, "principles": optional(text), "model": text, "adapter": optional(text), "data_digest": text,
    "samples": whole(1), "max_new_tokens": whole(1), "sampling": mapping, "reward": text, "reward_version": text,
    "second_reward": optional(text),
}  # fmt: skip


def read(path: Path, iteration: int | None = None) -> Generated:
    """Reads what `write` kept in a folder, of the newest iteration if none is given.

    Raises:
        UserError: there is nothing complete, or a file is missing or damaged.
    """
    complete = sorted(int(file.name[5:9]) for file in path.glob("iter_????.scores.jsonl"))
    if not complete or iteration not in (None, *complete):
        raise UserError(
            f"{path} holds no responses{'' if iteration is None else f' of iteration {iteration}'}; --mode=generate"
        )
    name = path / f"iter_{complete[-1] if iteration is None else iteration:04d}"
    scores = read_sealed(name.with_suffix(".scores.jsonl"), remedy="delete it and give --mode=generate again")
    settings = read_json(name.with_suffix(".json"), remedy=_AGAIN)
    if settings is None:
        raise UserError(f"{name}.json, the settings of these responses, is gone; delete that folder and generate again")
    if wrong := misshapen(settings, _SETTINGS, needed=_SETTINGS):
        raise Damaged(f"{name}.json is damaged ({wrong}); delete that folder and generate again")
    if not name.with_suffix(".jsonl").is_file():
        raise UserError(f"{name}.jsonl, the responses, is gone; delete that folder and generate again")
    found = Generated(settings, read_journal(name.with_suffix(".jsonl")), scores)
    if [rollout.query_id for rollout in found.rollouts] != [line["query_id"] for line in scores]:
        raise UserError(f"{name}.jsonl and {name.name}.scores.jsonl are of other queries; delete both and generate again")
    return found


def evaluation_set(config: Any, *, reads: Sequence[str] = ()) -> QuerySet:
    """Loads the queries of config.generate. Where a seed chooses among them it is 0, so that every run has the same ones.

    Args:
        reads: what the rewards read of their records, by name.

    Raises:
        UserError: as `load_heldout`.
    """
    from ml_collections import ConfigDict

    options, own = config.generate, ConfigDict(config.to_dict())
    own.seed = 0
    if options.data is not None:
        own.task.heldout, own.task.heldout_split, own.task.sets = options.data, options.split, {}
        own.task.max_heldout = options.max_queries
        if config.task.sets and mixture.SET in reads:  # it is of none
            found = load_heldout(own, reads=[name for name in reads if name != mixture.SET])
            told = (query._replace(record={**query.record, mixture.SET: ""}) for query in found.queries)
            return found._replace(queries=Compact(told))
    own.task.max_heldout = options.max_queries or own.task.max_heldout
    found = load_heldout(own, reads=reads)
    return found._replace(queries=some(found.queries, options.max_queries, 0)) if own.task.sets else found


def write(
    run: Run[Algorithm], queries: QuerySet, second: Reward | None, *, backend: str, iteration: int, step: int | None = None
) -> Path:
    """Samples responses from the run's policy as it is now, and scores them; what was finished before is not done again.

    Args:
        second: a reward that training never sees; None for that of training's evaluations, if they have one.
        iteration, step: of the policy; `step` as `folder` has it.

    Returns:
        The journal's path.

    Raises:
        UserError: responses with other settings are there.
    """
    options, path = run.config.generate, folder(run.session.workdir, run.config, step)
    path.mkdir(parents=True, exist_ok=True)
    if options.policy == "trained":
        _tell_of_overlap(run, queries)
    data = Data(run.data.train, queries.queries, {"train": [], "heldout": queries.bad})
    run = run._replace(data=data, session=run.session._replace(workdir=path))
    run = opening.fitted(run, *(() if second is None else (second,)))
    second = second or run.second
    journal, kind = Journal(path, iteration), "principled" if options.principled else "plain"
    _settle(journal.path.with_suffix(".json"), _settings(run, second, backend=backend, iteration=iteration))
    scored = journal.path.with_suffix(".scores.jsonl")
    if (rollouts := journal.read()) is None:
        scored.unlink(missing_ok=True)  # of responses that were deleted
        slots = [Slot(kind, options.principled, number) for number in range(options.samples)]
        with ahead.scoring(run.reward, run.session) as ask:
            sampled = sample(run, run.data.heldout, slots, journal, RESPONSES, ask)
        rollouts = scoring.score(sampled, run.reward, run.session)
        journal.complete(rollouts)
    if not scored.exists():
        asked = [run.prompts.render(query, options.principled).whole for query in run.data.heldout]
        write_sealed(scored, _scores(run, rollouts, second, asked), ascii=True)
    return journal.path


def _tell_of_overlap(run: Run[Algorithm], queries: QuerySet) -> None:
    """Logs a warning if some of the queries were trained on."""
    asked = {query.prompt for query in queries.queries}
    seen = {query.prompt for query in run.data.train if query.prompt in asked}
    if both := sum(query.prompt in seen for query in queries.queries):
        run.session.progress.log(f"warning: {both} of {len(queries.queries)} queries are among those that were trained on")


def _settle(path: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of responses; raises a UserError if responses with other settings are there."""
    kept = read_json(path, remedy=_AGAIN)
    if kept is not None:  # by whatever version these were scored, and with whatever principles of this name
        settings = {key: value for key, value in settings.items() if key in kept or key not in _NEWER}
    if kept is not None and kept != settings:
        keys = ", ".join(differing(flatten(kept), flatten(settings)))
        raise UserError(
            f"{path.parent} holds responses of iteration {settings['iteration']} with other settings ({keys}); move or"
            " delete that folder"
        )
    write_json(path, settings, sealed=True)


def _settings(run: Run[Algorithm], second: Reward | None, *, backend: str, iteration: int) -> dict[str, Any]:
    config, options = run.config, run.config.generate
    settings = {
        "algorithm": config.algorithm,
        "trainer": config.trainer,
        "backend": backend,
        "seed": config.seed,
        "iteration": iteration,
        "policy": options.policy,
        "principled": options.principled,
        "principles": config.principles if options.principled else None,
        "model": run.base.name,
        "adapter": config.model.adapter,
        "weights_digest": _digest(run),
        "data": options.data or mixture.source(config, "heldout"),
        "data_digest": digest(run.data.heldout),
        "queries": len(run.data.heldout),
        "samples": options.samples,
        "max_new_tokens": config.sampling.max_new_tokens,
        "sampling": {key: config.sampling[key] for key in ("temperature", "top_k", "top_p", "min_p")},
        "reward": run.reward.name,
        "reward_version": run.reward.version,
        "second_reward": None if second is None else second.name,
        _VERSION: None if second is None else second.version,
    }
    if options.principled:
        known = config.principles_per_query, run.prompts.principles.digest
        settings |= dict(zip(RULES, known, strict=True))
    if _moved(config):
        settings["kl"] = "start"  # and not the base, as in files of an earlier version
    if read := record_digest(run.data.heldout):
        settings["record_digest"] = read
    return json.loads(json.dumps(settings))


def _moved(config: Any) -> bool:
    """Says whether a run may start from something else than the base."""
    return config.model.adapter is not None or config.warm_up.data is not None


def _digest(run: Run[Algorithm]) -> str:
    """Computes a digest of the policy's adapter, since the same iteration of another training is another policy."""
    return identity.digest(name.encode() + tensor.tobytes() for name, tensor in sorted(run.backend.adapter().items()))


def _scores(
    run: Run[Algorithm], rollouts: Sequence[Rollout], second: Reward | None, prompts: Sequence[tuple[int, ...]]
) -> Iterator[dict[str, Any]]:
    """Yields the lines of the file of scores; `prompts` are the token ids that the responses were sampled from."""
    samples, size = len(rollouts[0].responses), run.config.optimizer.micro_queries
    values = None if second is None else scoring.values(rollouts, second, run.session)
    principles = run.base.tokenizer.encode(run.prompts.principles.text, add_special_tokens=False)
    # what the sampler says of its tokens is of its temperature, and a server may say it of whatever
    apart = run.config.sampling.temperature not in (0, 1) or run.config.sampling.server is not None
    run.session.progress.phase("log-probabilities", len(rollouts))
    for first in range(0, len(rollouts), size):
        run.session.stop.check()
        some = rollouts[first : first + size]
        plain = _packed(run, some, [range(samples)] * len(some), run.config.sampling.max_new_tokens)
        policy = sampler_logprobs(some, np.tile(np.arange(samples), (len(some), 1)), plain)
        if apart or np.isnan(policy[plain.response_mask]).any():  # of an earlier version
            asked = left_padded(prompts[first : first + size], run.config.sampling.bucket)
            policy = run.backend.logprobs(plain._replace(prompt=asked[0], prompt_mask=asked[1])).logprobs
        base = run.backend.logprobs(plain, base=True).logprobs
        start = run.backend.logprobs(plain, reference=True).logprobs if _moved(run.config) else base
        policy, base, start = (np.where(plain.response_mask, x, 0.0).astype(np.float64) for x in (policy, base, start))
        kl = losses.kl_estimate(policy, start, kind="k3").sum(-1)
        references = _references(run, run.data.heldout[first : first + size], some)
        for i, rollout in enumerate(some):
            line: dict[str, Any] = {"query_id": rollout.query_id, "reference": run.data.heldout[first + i].completion}
            if values is not None:
                line["second"] = [float(x) if math.isfinite(x) else None for x in values[first + i]]
            line["overlap"] = [ngram_overlap(response.tokens, principles, 3) for response in rollout.responses]
            line |= {"logprob": policy[i].sum(-1).tolist(), "base_logprob": base[i].sum(-1).tolist(), "kl": kl[i].tolist()}
            yield {**line, "reference_logprob": references[i][0], "reference_tokens": references[i][1]}
        run.session.progress.advance(len(some))


def _packed(run: Run[Algorithm], rollouts: Sequence[Rollout], picks: Sequence[Sequence[int]], length: int) -> Batch:
    return pack(rollouts, picks, prompt_multiple=run.config.sampling.bucket, response_len=length)


def _references(
    run: Run[Algorithm], queries: Sequence[Query], rollouts: Sequence[Rollout]
) -> list[tuple[float | None, int]]:
    """Computes the log-probability (nats) and the number of tokens of the records' own answers under the base.

    They are None and 0 where `_own` finds no answer.
    """
    room = [run.base.context - len(rollout.prompt_tokens) for rollout in rollouts]
    own = [_own(query, most, run) for query, most in zip(queries, room, strict=True)]
    if not any(own):
        return [(None, 0)] * len(own)
    # one token where there is none, which is not read
    answers = [answer or Response((0,), True) for answer in own]
    longest = bucket(max(len(answer.tokens) for answer in answers), run.config.sampling.bucket)
    rows = [rollout._replace(responses=(answer,)) for rollout, answer in zip(rollouts, answers, strict=True)]
    batch = _packed(run, rows, [(0,)] * len(rows), longest)
    logprobs = np.where(batch.response_mask, run.backend.logprobs(batch, base=True).logprobs, 0.0)
    sums = logprobs.astype(np.float64).sum((1, 2))
    return [(None, 0) if a is None else (float(s), len(a.tokens)) for a, s in zip(own, sums, strict=True)]


def _own(query: Query, room: int, run: Run[Algorithm]) -> Response | None:
    """Returns the record's own answer; None if there is none, the chat template cannot hold it, or it is too long."""
    try:
        answer = given(query, Slot("reference", source="completion"), run.prompts, limit=room) if query.completion else None
    except Unusable:
        return None
    return answer if answer is not None and answer.finished else None
