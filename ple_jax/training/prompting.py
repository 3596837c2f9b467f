"""From queries to prompts: rendered, cut to what the model takes, and what all principled ones share."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ple_jax import prompts
from ple_jax.core.batches import left_padded
from ple_jax.core.errors import UserError
from ple_jax.core.types import Batch, Query, Tokenizer
from ple_jax.data.formats import shorten
from ple_jax.data.left_out import QuerySet, check_share, fit
from ple_jax.data.load import Data
from ple_jax.prompts import principles
from ple_jax.training.progress import Progress

_LOOKED_AT = 64  # queries whose principled prompts tell what all of them share, and which is the longest


class Rendered(NamedTuple):
    """A prompt as the backend gets it: `prefix` (shared by all principled prompts) + `tokens`."""

    prefix: tuple[int, ...]
    tokens: tuple[int, ...]
    whole: tuple[int, ...]
    text: str


class Prompts(NamedTuple):
    """How queries become prompts: config.task's chat and thinking, config.principles_per_query, config.seed."""

    config: Any
    tokenizer: Tokenizer
    principles: principles.Principles
    prefix: tuple[int, ...] = ()  # what the principled prompts share: computed once a call of generate, not once a row

    def of(self, query: Query, principled: bool) -> tuple[str, list[int]]:
        """The prompt of a query as text and tokens."""
        config, text = self.config, None
        if principled:
            k = config.principles_per_query
            text = principles.choose(self.principles, k, seed=config.seed, query_id=query.id)
        return prompts.render(query, text, self.tokenizer, chat=config.task.chat, thinking=config.task.thinking)

    def render(self, query: Query, principled: bool) -> Rendered:
        """The same for a backend."""
        text, ids = self.of(query, principled)
        whole, n = tuple(ids), len(self.prefix)
        if principled and n and whole[:n] == self.prefix and len(whole) > n:
            return Rendered(self.prefix, whole[n:], whole, text)
        return Rendered((), whole, whole, text)

    def sharing(self, queries: Sequence[Query]) -> "Prompts":
        """These prompts, with what the principled ones of some queries share as their prefix."""
        some = [self.of(query, True)[1] for query in queries[:_LOOKED_AT]]
        return self._replace(prefix=tuple(prompts.common_prefix(some)) if len(some) > 1 else ())

    def after_principles(self, batch: Batch, queries: Sequence[Query]) -> Batch:
        """The same responses after the principled prompts of their queries."""
        tokens, mask = left_padded([self.of(query, True)[1] for query in queries], self.config.sampling.bucket)
        return batch._replace(prompt=tokens, prompt_mask=mask)


def fitted(data: Data, rendering: Prompts, progress: Progress) -> Data:
    """The data without queries whose plain prompt is too long; of format=tldr those are cut between paragraphs instead.

    Raises:
        UserError: there are more of them than config.task.max_bad_share.
    """
    task = rendering.config.task

    def length(query: Query) -> int:
        return len(rendering.of(query, False)[1])

    def judge(query: Query) -> Query | str:
        limit = task.max_prompt_tokens
        if (n := length(query)) <= limit:
            return query
        if task.format == "tldr":
            shorter = shorten(query.prompt, lambda text: length(query._replace(prompt=text)) <= limit)
            if shorter is not None:
                return query._replace(prompt=shorter)
        return f"has {n} tokens, above task.max_prompt_tokens={limit}; raise --config.task.max_prompt_tokens"

    found: Mapping[str, QuerySet] = {}
    for which, queries in (("train", data.train), ("heldout", data.heldout)):
        progress.phase(f"check {which}", len(queries))
        kept = QuerySet(*fit(queries, judge, kind="over-long"))
        check_share(kept, f"config.task.{which}", task.max_bad_share)
        found = {**found, which: kept}
        progress.advance(len(queries))
    bad = {**data.bad, **{which: [*data.bad[which], *kept.bad] for which, kept in found.items()}}
    return Data(found["train"].queries, found["heldout"].queries, bad)


def longest(data: Data, rendering: Prompts) -> int:
    """Tokens of the longest principled prompt."""
    # principles add about as many tokens to every prompt: the longest of the principled is among the longest of the plain
    some = sorted((*data.train, *data.heldout), key=lambda query: -len(query.prompt))[:_LOOKED_AT]
    return max(len(rendering.of(query, True)[1]) for query in some)


def check_context(tokens: int, queries: int, *, model: str, context: int) -> None:
    """Raises a UserError if the longest prompt and response together are more than the model was trained to see."""
    if tokens > context:
        raise UserError(
            f"the longest of {queries} prompts and its response are {tokens} tokens, and {model} takes"
            f" {context}; shorten prompts, principles or --config.sampling.max_new_tokens"
        )
