"""From queries to responses: sampled in chunks that survive a kill, or taken from the records."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ple_jax import prompts
from ple_jax.core.batches import bucket, plan_chunks
from ple_jax.core.noise import uniforms
from ple_jax.core.types import Query, Response, Rollout, Sampling, Slot
from ple_jax.training.journal import Journal
from ple_jax.training.run import Base, Run


def sample(
    run: Run[Any], queries: Sequence[Query], slots: Sequence[Slot], journal: Journal, stream: int
) -> list[Rollout]:
    """One response for every query and slot. Chunks that the journal already holds are not sampled again.

    Args:
        stream: of the noise: the iteration, or one of those of `core.noise` that are none.
    """
    config, render, progress = run.config, run.prompts.render, run.session.progress
    limit = config.sampling.max_new_tokens
    rows = [(query, slot) for query in queries for slot in slots]
    responses = {
        i: given(query, slot, config, run.base, limit=limit)
        for i, (query, slot) in enumerate(rows)
        if slot.source != "policy"
    }
    sampled = [i for i in range(len(rows)) if i not in responses]
    rendered = {i: render(rows[i][0], rows[i][1].principled) for i in sampled}
    groups = [(rendered[i].prefix, bucket(len(rendered[i].tokens), config.sampling.bucket)) for i in sampled]
    chunks = [[sampled[j] for j in chunk] for chunk in plan_chunks(groups, config.sampling.width)]
    finished = journal.finished_chunks()
    settings = sampling_of(config, run.base.eos)
    progress.phase("generate" if stream >= 0 else "evaluate", len(chunks))
    for number, chunk in enumerate(chunks):
        run.session.stop.check()
        if number not in finished:
            noise = np.stack([_noise(config, stream, *rows[i]) for i in chunk])
            prefix = rendered[chunk[0]].prefix
            drawn = run.backend.generate([rendered[i].tokens for i in chunk], noise, sampling=settings, prefix=prefix)
            texts = [
                prompts.answer(r.tokens, run.base.tokenizer, prompt=rendered[i].text, thinking=config.task.thinking)
                for i, r in zip(chunk, drawn, strict=True)
            ]
            finished[number] = [
                _for_slot(r, rows[i][1], text) for i, r, text in zip(chunk, drawn, texts, strict=True)
            ]
            journal.append(number, finished[number])
        responses |= dict(zip(chunk, finished[number], strict=True))
        progress.advance(1, tokens=sum(len(r.tokens) for r in finished[number]))
    return [
        Rollout(
            query.id,
            query.prompt,
            render(query, False).whole,
            tuple(responses[i * len(slots) + j] for j in range(len(slots))),
        )
        for i, query in enumerate(queries)
    ]


def sampling_of(config: Any, eos: tuple[int, ...]) -> Sampling:
    """config.sampling as a backend takes it."""
    return Sampling(eos=eos, **{key: config.sampling[key] for key in Sampling._fields if key != "eos"})


def given(query: Query, slot: Slot, config: Any, base: Base, *, limit: int | None = None) -> Response:
    """A response that the record has: its completion or the rejected one, and EOS where it is no longer than `limit`."""
    tokenizer, text = base.tokenizer, {"completion": query.completion, "rejected": query.rejected}[slot.source]
    # it is the whole of what is wanted and ends with EOS, which here is part of the data. Where a model stops at several,
    # the tokenizer's is the one that its own training used
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id in base.eos else base.eos[:1]
    written = prompts.completion(query.prompt, text, chat=config.task.chat)
    tokens = (*tokenizer.encode(written, add_special_tokens=False), *eos)
    if limit is None or len(tokens) <= limit:
        return _for_slot(Response(tokens, True), slot, text)
    shown = tokenizer.decode(tokens[:limit], skip_special_tokens=True)
    return _for_slot(Response(tokens[:limit], False), slot, shown)


def _for_slot(response: Response, slot: Slot, text: str) -> Response:
    return response._replace(
        kind=slot.kind, sample=slot.sample, text=text, principled=slot.principled, source=slot.source
    )


def _noise(config: Any, stream: int, query: Query, slot: Slot) -> np.ndarray:
    return uniforms(config.seed, stream, query.id, slot.kind, slot.sample, config.sampling.max_new_tokens)
