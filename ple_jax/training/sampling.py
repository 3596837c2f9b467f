"""Turns queries into responses, which are sampled, and each kept as soon as it has ended, or taken from the records."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ple_jax import prompts
from ple_jax.core.identity import digest
from ple_jax.core.noise import uniforms
from ple_jax.core.types import Query, Response, Rollout, Sampling, Slot
from ple_jax.training import ahead
from ple_jax.training.journal import Journal
from ple_jax.training.prompting import Prompts
from ple_jax.training.run import Run

Row = tuple[Query, Slot]  # one response that is asked for


def sample(
    run: Run[Any],
    queries: Sequence[Query],
    slots: Sequence[Slot],
    journal: Journal,
    stream: int,
    score: ahead.Ask = ahead.nobody,
) -> list[Rollout]:
    """Returns a rollout for every query, with one response for each slot; what the journal already holds is not sampled
    again.

    Args:
        stream: the stream of the noise: the iteration, or one of the streams of `core.noise` that are no iteration's.
        score: a function that is given responses that have ended, as soon as they are in the journal.
    """
    k, rows = len(slots), [(query, slot) for query in queries for slot in slots]
    responses = {i: given(*row, run.prompts) for i, row in enumerate(rows) if row[1].source != "policy"}
    asked = [i for i in range(len(rows)) if i not in responses]
    if asked:
        drawn = _drawn(run, [rows[i] for i in asked], journal, stream, score)
        responses |= dict(zip(asked, drawn, strict=True))
    return [
        Rollout(
            q.id,
            q.prompt,
            run.prompts.render(q, False).whole,
            tuple(responses[i * k + j] for j in range(k)),
            record=q.record,
        )
        for i, q in enumerate(queries)
    ]


def _drawn(run: Run[Any], rows: Sequence[Row], journal: Journal, stream: int, score: ahead.Ask) -> list[Response]:
    """Samples the policy's responses and returns them in the order of the rows."""
    config, progress = run.config, run.session.progress
    rendered = [run.prompts.render(query, slot.principled) for query, slot in rows]
    # a reward that was mended may refuse other prompts: then numbers are of others, and what is there answers none of them
    asked = [
        digest([repr((query.id, slot, prompt.whole)).encode()]) for (query, slot), prompt in zip(rows, rendered, strict=True)
    ]
    found = journal.finished(asked)
    progress.phase("generate" if stream >= 0 else "evaluate", len(rows))
    progress.advance(len(found))
    if len(found) == len(rows):
        return [found[i] for i in range(len(rows))]
    run.session.stop.check()
    noise = np.stack([_noise(config, stream, *row) for row in rows])

    def tell(ended: dict[int, Response]) -> None:
        if ended:
            texts = {i: _text(run, response, rendered[i].text) for i, response in ended.items()}
            made = {
                i: _for_slot(response, rows[i][1], texts[i])._replace(noise=digest([noise[i].tobytes()])[:8])
                for i, response in ended.items()
            }
            journal.keep(made, asked)
            found.update(made)
            score([(rows[i][0].prompt, text, rows[i][0].record) for i, text in texts.items()])
            progress.advance(len(made), tokens=sum(len(r.tokens) for r in made.values()))
        run.session.stop.check()

    run.backend.generate(
        [prompt.whole for prompt in rendered],
        noise,
        sampling=sampling_of(config, run.base.eos),
        prefix=run.prompts.prefix,
        known=dict(found),
        tell=tell,
    )
    return [found[i] for i in range(len(rows))]


def _text(run: Run[Any], response: Response, prompt: str) -> str:
    task = run.config.task
    return prompts.answer(response.tokens, run.base.tokenizer, prompt=prompt, thinking=task.thinking, chat=task.chat)


def sampling_of(config: Any, eos: tuple[int, ...]) -> Sampling:
    """Returns config.sampling in the form that a backend takes."""
    return Sampling(eos=eos, **{key: config.sampling[key] for key in Sampling._fields if key != "eos"})


def given(query: Query, slot: Slot, rendering: Prompts, *, limit: int | None = None) -> Response:
    """Returns a response that the record has, its completion or the rejected one, as `Prompts.given` does."""
    answer = rendering.given(query, slot.source, limit=limit)
    return _for_slot(Response(answer.tokens, answer.whole), slot, answer.text)


def _for_slot(response: Response, slot: Slot, text: str) -> Response:
    return response._replace(kind=slot.kind, sample=slot.sample, text=text, principled=slot.principled, source=slot.source)


def _noise(config: Any, stream: int, query: Query, slot: Slot) -> np.ndarray:
    return uniforms(config.seed, stream, query.id, slot.kind, slot.sample, config.sampling.max_new_tokens)
