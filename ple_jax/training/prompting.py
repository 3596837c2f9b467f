"""From queries to prompts, and which queries fit the model."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ple_jax import prompts
from ple_jax.core.batches import left_padded
from ple_jax.core.errors import UserError
from ple_jax.core.types import Batch, Query
from ple_jax.data.formats import shorten
from ple_jax.data.left_out import QuerySet, check_share, fit, note
from ple_jax.prompts import principles
from ple_jax.training.run import Run


class Rendered(NamedTuple):
    """A prompt as the backend gets it: `prefix` (shared by all principled prompts) + `tokens`."""

    prefix: tuple[int, ...]
    tokens: tuple[int, ...]
    whole: tuple[int, ...]
    text: str


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
            shorter = shorten(query.prompt, lambda text: length(query._replace(prompt=text)) <= limit)
            if shorter is not None:
                return query._replace(prompt=shorter)
        return f"has {n} tokens, above task.max_prompt_tokens={limit}; raise --config.task.max_prompt_tokens"

    def kept(which: str, queries: list[Query]) -> list[Query]:
        run.progress.phase(f"check {which}", len(queries))
        good, bad = fit(queries, judge, kind="over-long")
        run.bad[which] += bad
        check_share(QuerySet(good, bad), f"config.task.{which}", run.config.task.max_bad_share)
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
    if listed := note(run.bad, run.workdir):
        run.progress.log(listed)


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
