"""From queries to scored responses: prompts, sampling in chunks that survive a kill, rewards, and what is left out."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ple_jax.core import data, principles, prompts, rewards, tasks
from ple_jax.core.batches import left_padded
from ple_jax.core.config import UserError
from ple_jax.core.rollouts import Journal, bucket, plan_chunks, uniforms, write
from ple_jax.core.run import Run
from ple_jax.core.types import Batch, Query, Response, Rollout, Sampling, Slot


class Rendered(NamedTuple):
    """A prompt as the backend gets it: `prefix` (shared by all principled prompts) + `tokens`."""

    prefix: tuple[int, ...]
    tokens: tuple[int, ...]
    whole: tuple[int, ...]
    text: str


# ---------------------------------------------------------------- prompts


def prompt_of(run: Run, query: Query, principled: bool) -> tuple[str, list[int]]:
    """The prompt of a query as text and tokens."""
    config = run.config
    text = None
    if principled:
        k = config.principles_per_query
        text = principles.choose(run.principles, k, seed=config.seed, query_id=query.id)
    return prompts.render(query, text, run.tokenizer, chat=config.task.chat, thinking=config.task.thinking)


def fitted(run: Run) -> Run:
    """The run without queries whose plain prompt is too long; of format=tldr those are cut between paragraphs instead.

    Raises:
        UserError: more of them than config.task.max_bad_share, or a prompt with its response is more than the model takes.
    """
    limit = run.config.task.max_prompt_tokens

    def length(query: Query, principled: bool = False) -> int:
        return len(prompt_of(run, query, principled)[1])

    def judge(query: Query) -> Query | str:
        if (n := length(query)) <= limit:
            return query
        if run.config.task.format == "tldr":
            shorter = tasks.shorten(query.prompt, lambda text: length(query._replace(prompt=text)) <= limit)
            if shorter is not None:
                return query._replace(prompt=shorter)
        return f"has {n} tokens, above task.max_prompt_tokens={limit}; raise --config.task.max_prompt_tokens"

    def kept(which: str, queries: list[Query]) -> list[Query]:
        run.progress.phase(f"check {which}", len(queries))
        good, bad = data.fit(queries, judge, kind="over-long")
        run.bad[which] += bad
        tasks.check_share(tasks.Task(good, bad), f"config.task.{which}", run.config.task.max_bad_share)
        run.progress.advance(len(queries))
        return good

    run = run._replace(train=kept("train", run.train), heldout=kept("heldout", run.heldout))
    write_bad(run)
    # principles add about as many tokens to every prompt: the longest of the principled is among the longest of the plain
    longest = sorted((*run.train, *run.heldout), key=lambda query: -len(query.prompt))[:64]
    needed = max(length(query, True) for query in longest) + run.config.sampling.max_new_tokens
    check_context(run, run.train, needed)
    return run


def write_bad(run: Run) -> None:
    """Lists what was left out in the work directory, and says so."""
    if note := data.note(run.bad, run.workdir):
        run.progress.log(note)


def renderer(run: Run) -> Callable[[Query, bool], Rendered]:
    """(query, principled) -> its prompt."""
    # what the principled prompts share is computed once per call of generate instead of once per row
    some = [prompt_of(run, query, True)[1] for query in run.heldout[:64]]
    prefix = tuple(prompts.common_prefix(some)) if len(some) > 1 else ()

    def render(query: Query, principled: bool) -> Rendered:
        text, ids = prompt_of(run, query, principled)
        whole = tuple(ids)
        if principled and prefix and whole[: len(prefix)] == prefix and len(whole) > len(prefix):
            return Rendered(prefix, whole[len(prefix) :], whole, text)
        return Rendered((), whole, whole, text)

    return render


def after_principles(run: Run, batch: Batch, ids: Sequence[str]) -> Batch:
    """The same responses after the principled prompts of their queries, which are train ones."""
    queries = {query.id: query for query in run.train}
    tokens, mask = left_padded([prompt_of(run, queries[name], True)[1] for name in ids], run.config.sampling.bucket)
    return batch._replace(prompt=tokens, prompt_mask=mask)


def check_context(run: Run, queries: Sequence[Query], tokens: int) -> None:
    """Raises a UserError if the longest prompt and response together are more than the model was trained to see."""
    if tokens > run.context:
        raise UserError(
            f"the longest of {len(queries)} prompts and its response are {tokens} tokens, and {run.base_model} takes"
            f" {run.context}; shorten prompts, principles or --config.sampling.max_new_tokens"
        )


# ---------------------------------------------------------------- responses


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
    limit = config.sampling.max_new_tokens
    responses = {i: given(run, query, slot, limit=limit) for i, (query, slot) in enumerate(rows) if slot.source != "policy"}
    sampled = [i for i in range(len(rows)) if i not in responses]
    rendered = {i: render(rows[i][0], rows[i][1].principled) for i in sampled}
    groups = [(rendered[i].prefix, bucket(len(rendered[i].tokens), config.sampling.bucket)) for i in sampled]
    chunks = [[sampled[j] for j in chunk] for chunk in plan_chunks(groups, config.sampling.width)]
    finished = journal.finished_chunks()
    sampling = Sampling(
        limit,
        run.eos,
        temperature=config.sampling.temperature,
        top_k=config.sampling.top_k,
        top_p=config.sampling.top_p,
        min_p=config.sampling.min_p,
    )
    run.progress.phase("generate" if iteration >= 0 else "evaluate", len(chunks))
    for number, chunk in enumerate(chunks):
        run.stop.check()
        if number not in finished:
            noise = np.stack([_noise(config, iteration, *rows[i]) for i in chunk])
            prefix = rendered[chunk[0]].prefix
            drawn = run.backend.generate([rendered[i].tokens for i in chunk], noise, sampling=sampling, prefix=prefix)
            finished[number] = [_complete(run, rows[i][1], rendered[i], r) for i, r in zip(chunk, drawn, strict=True)]
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


def given(run: Run, query: Query, slot: Slot, *, limit: int | None = None) -> Response:
    """A response that the record has: its completion or the rejected one, and EOS where it is no longer than `limit`."""
    text = {"completion": query.completion, "rejected": query.rejected}[slot.source]
    # it is the whole of what is wanted and ends with EOS, which here is part of the data. Where a model stops at several,
    # the tokenizer's is the one that its own training used
    eos = [run.tokenizer.eos_token_id] if run.tokenizer.eos_token_id in run.eos else run.eos[:1]
    written = prompts.completion(query.prompt, text, chat=run.config.task.chat)
    tokens = (*run.tokenizer.encode(written, add_special_tokens=False), *eos)
    if limit is None or len(tokens) <= limit:
        return Response(tokens, True, kind=slot.kind, sample=slot.sample, text=text)
    shown = run.tokenizer.decode(tokens[:limit], skip_special_tokens=True)
    return Response(tokens[:limit], False, kind=slot.kind, sample=slot.sample, text=shown)


def _noise(config: Any, iteration: int, query: Query, slot: Slot) -> np.ndarray:
    return uniforms(config.seed, iteration, query.id, slot.kind, slot.sample, config.sampling.max_new_tokens)


def _complete(run: Run, slot: Slot, rendered: Rendered, response: Response) -> Response:
    thinking = run.config.task.thinking
    text = prompts.answer(response.tokens, run.tokenizer, prompt=rendered.text, thinking=thinking)
    return response._replace(kind=slot.kind, sample=slot.sample, text=text)


# ---------------------------------------------------------------- rewards


def score(run: Run, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Fills rewards, on the plain query, whatever the prompt was; nan where the reward gave nothing finite."""
    run.progress.phase("score", 1)
    pairs = [(rollout.prompt, r.text) for rollout in rollouts for r in rollout.responses]
    found = rewards.score(run.reward, [p for p, _ in pairs], [t for _, t in pairs], cache=run.cache)
    values, at = np.where(np.isfinite(found.values), found.values, np.nan), iter(range(len(pairs)))

    def fill(response: Response) -> Response:
        i = next(at)
        parts = {name: float(part[i]) for name, part in found.parts.items()}
        return response._replace(reward=float(values[i]), parts=parts)

    scored = [rollout._replace(responses=tuple(fill(r) for r in rollout.responses)) for rollout in rollouts]
    run.progress.advance(1)
    return scored


def quarantine(run: Run, rollouts: Sequence[Rollout], name: str) -> list[Rollout]:
    """The rollouts all of whose rewards are finite; the others go to quarantine/`name`.jsonl with their texts.

    Raises:
        UserError: they are more than config.reward.max_bad_share of all.
    """
    good = [rollout for rollout in rollouts if not any(math.isnan(r.reward) for r in rollout.responses)]
    bad = [rollout for rollout in rollouts if any(math.isnan(r.reward) for r in rollout.responses)]
    if not bad:
        return good
    path = run.workdir / "quarantine" / f"{name}.jsonl"
    write(path, bad)
    share, first = run.config.reward.max_bad_share, bad[0]
    text = next(r.text for r in first.responses if math.isnan(r.reward))
    says = (
        f"reward {run.reward.name} is not finite for {len(bad)} of {len(rollouts)} queries ({path}), such as prompt"
        f" {first.prompt[:80]!r}, response {text[:80]!r}"
    )
    if len(bad) > share * len(rollouts) or not good:
        raise UserError(
            f"{says}; that is more than reward.max_bad_share={share}: mend the reward and give the same command again (what"
            " was sampled is kept), or raise --config.reward.max_bad_share"
        )
    run.progress.log(f"{says}; they are left out")
    return good


def transformed(rollouts: Sequence[Rollout], name: str) -> list[Rollout]:
    """Fills the scores: the rewards, transformed with statistics of all of them."""
    scores = iter(rewards.transform(raw_rewards(rollouts), name))
    return [
        rollout._replace(responses=tuple(r._replace(score=float(next(scores))) for r in rollout.responses))
        for rollout in rollouts
    ]


def raw_rewards(rollouts: Sequence[Rollout]) -> np.ndarray:
    """Every response's reward, in order."""
    return np.array([r.reward for rollout in rollouts for r in rollout.responses])
