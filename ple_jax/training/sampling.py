"""From queries to scored responses: prompts, sampling in chunks that survive a kill, rewards, and what is left out."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ple_jax import prompts
from ple_jax.core.batches import bucket, plan_chunks
from ple_jax.core.noise import uniforms
from ple_jax.core.types import Query, Response, Rollout, Sampling, Slot
from ple_jax.training.journal import Journal
from ple_jax.training.prompting import Rendered
from ple_jax.training.run import Run

# ---------------------------------------------------------------- prompts




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


