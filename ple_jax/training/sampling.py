"""From queries to responses: sampled in chunks that survive a kill, or taken from the records."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ple_jax import prompts
from ple_jax.core.batches import bucket, plan_chunks
from ple_jax.core.identity import digest
from ple_jax.core.noise import uniforms
from ple_jax.core.types import Query, Response, Rollout, Sampling, Slot
from ple_jax.training.journal import Journal
from ple_jax.training.prompting import Prompts, Rendered
from ple_jax.training.run import Run

Row = tuple[Query, Slot]  # one response that is asked for


def sample(
    run: Run[Any], queries: Sequence[Query], slots: Sequence[Slot], journal: Journal, stream: int
) -> list[Rollout]:
    """One response for every query and slot. Chunks that the journal already holds are not sampled again.

    Args:
        stream: of the noise: the iteration, or one of those of `core.noise` that are none.
    """
    config, progress, k = run.config, run.session.progress, len(slots)
    rows = [(query, slot) for query in queries for slot in slots]
    responses = {i: given(*row, run.prompts) for i, row in enumerate(rows) if row[1].source != "policy"}
    asked = [i for i in range(len(rows)) if i not in responses]
    rendered = {i: run.prompts.render(rows[i][0], rows[i][1].principled) for i in asked}
    groups = [(rendered[i].prefix, bucket(len(rendered[i].tokens), config.sampling.bucket)) for i in asked]
    chunks = [[asked[j] for j in chunk] for chunk in plan_chunks(groups, config.sampling.width)]
    # a reward that was mended may refuse other prompts: then chunks are of others, and what is there answers none of them
    asked_of = [digest(repr((rows[i][0].id, rows[i][1], rendered[i].whole)).encode() for i in chunk) for chunk in chunks]
    finished = journal.finished_chunks(asked_of)
    progress.phase("generate" if stream >= 0 else "evaluate", len(chunks))
    for number, chunk in enumerate(chunks):
        run.session.stop.check()
        if number not in finished:
            finished[number] = _drawn(run, [rows[i] for i in chunk], [rendered[i] for i in chunk], stream)
            journal.keep(number, finished[number], asked_of[number])
        responses |= dict(zip(chunk, finished[number], strict=True))
        progress.advance(1, tokens=sum(len(r.tokens) for r in finished[number]))
    return [
        Rollout(q.id, q.prompt, run.prompts.render(q, False).whole, tuple(responses[i * k + j] for j in range(k)))
        for i, q in enumerate(queries)
    ]


def _drawn(run: Run[Any], rows: Sequence[Row], rendered: Sequence[Rendered], stream: int) -> list[Response]:
    """The responses of one chunk, whose prompts share their prefix."""
    settings, thinking = sampling_of(run.config, run.base.eos), run.config.task.thinking
    noise = np.stack([_noise(run.config, stream, *row) for row in rows])
    tokens, prefix = [prompt.tokens for prompt in rendered], rendered[0].prefix
    drawn = run.backend.generate(tokens, noise, sampling=settings, prefix=prefix)
    texts = [
        prompts.answer(response.tokens, run.base.tokenizer, prompt=prompt.text, thinking=thinking)
        for response, prompt in zip(drawn, rendered, strict=True)
    ]
    return [_for_slot(response, slot, text) for response, (_, slot), text in zip(drawn, rows, texts, strict=True)]


def sampling_of(config: Any, eos: tuple[int, ...]) -> Sampling:
    """config.sampling as a backend takes it."""
    return Sampling(eos=eos, **{key: config.sampling[key] for key in Sampling._fields if key != "eos"})


def given(query: Query, slot: Slot, rendering: Prompts, *, limit: int | None = None) -> Response:
    """A response that the record has: its completion or the rejected one, as `Prompts.given`."""
    answer = rendering.given(query, slot.source, limit=limit)
    return _for_slot(Response(answer.tokens, answer.whole), slot, answer.text)


def _for_slot(response: Response, slot: Slot, text: str) -> Response:
    return response._replace(
        kind=slot.kind, sample=slot.sample, text=text, principled=slot.principled, source=slot.source
    )


def _noise(config: Any, stream: int, query: Query, slot: Slot) -> np.ndarray:
    return uniforms(config.seed, stream, query.id, slot.kind, slot.sample, config.sampling.max_new_tokens)
