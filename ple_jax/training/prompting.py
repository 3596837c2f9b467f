"""Turns records into tokens: renders prompts and given answers, cuts them to their limits, and finds what prompts share."""

import heapq
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ple_jax import prompts
from ple_jax.core.batches import left_padded
from ple_jax.core.config import names
from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import Unusable, UserError
from ple_jax.core.types import Batch, Query, Reward, Tokenizer
from ple_jax.data.formats import shorten
from ple_jax.data.left_out import QuerySet, check_share, fit
from ple_jax.data.load import Data
from ple_jax.data.mixture import draw_queries, format_of
from ple_jax.prompts import principles, template
from ple_jax.training.progress import Progress

_LOOKED_AT = 64  # queries that stand for all: for what principled prompts share, the longest of them, and the kind of record
_HELDOUT = "quickstart_heldout"  # the default


class Rendered(NamedTuple):
    """A rendered prompt: its tokens, as the backend gets them, and its text."""

    whole: tuple[int, ...]
    text: str


class Answer(NamedTuple):
    """An answer from a record, cut to config.task.max_answer_tokens if it is longer."""

    tokens: tuple[int, ...]
    whole: bool  # False: it was longer, and is cut; it has no EOS then
    text: str


class Prompts(NamedTuple):
    """The rendering of records as tokens.

    It depends on config.task's chat, thinking, date and limits, on config.principles_per_query and on config.seed.
    """

    config: Any
    tokenizer: Tokenizer
    principles: principles.Principles
    eos: tuple[int, ...] = ()  # what ends a response
    context: float = math.inf  # tokens that the model takes at once
    prefix: tuple[int, ...] = ()  # what the principled prompts share: computed once a call of generate, not for every prompt

    def of(self, query: Query, principled: bool) -> tuple[str, list[int]]:
        """Renders the prompt of a query as text and tokens; with the query's principles if it is `principled`.

        Raises:
            Unusable: if the chat template does not take it.
        """
        config, text = self.config, None
        if principled:
            k = config.principles_per_query
            text = principles.choose(self.principles, k, seed=config.seed, query_id=query.id) or None
        return prompts.render(query, text, self.tokenizer, **self._form)

    @property
    def _form(self) -> dict[str, Any]:
        task = self.config.task
        return {"chat": task.chat, "thinking": task.thinking, "date": task.date or prompts.DATE}

    def given(self, query: Query, source: str, *, limit: int | None = None) -> Answer:
        """Returns the answer that a record has: its `completion`, or the `rejected` one.

        Args:
            source: "completion" or "rejected".
            limit: most tokens of it; config.task.max_answer_tokens by default.

        Raises:
            Unusable: as `prompts.given`.
        """
        said = {"completion": query.completion, "rejected": query.rejected}[source]
        tokens, text = prompts.given(query.prompt, said, self.tokenizer, stops=self.eos, **self._form)
        limit = self.config.task.max_answer_tokens if limit is None else limit
        if len(tokens) <= limit:
            return Answer(tokens, True, text)
        return Answer(tokens[:limit], False, prompts.decoded(tokens[:limit], self.tokenizer, chat=self.config.task.chat))

    def render(self, query: Query, principled: bool) -> Rendered:
        """Renders the prompt of a query, as `of` does, for a backend."""
        text, ids = self.of(query, principled)
        return Rendered(tuple(ids), text)

    def sharing(self, queries: Sequence[Query]) -> "Prompts":
        """Returns these prompts with a `prefix`: the tokens that the principled prompts of some queries all begin with."""
        some = [self.of(query, True)[1] for query in queries[:_LOOKED_AT]]
        return self._replace(prefix=tuple(prompts.common_prefix(some)) if len(some) > 1 else ())

    def after_principles(self, batch: Batch, queries: Sequence[Query]) -> Batch:
        """Returns the batch with its queries' principled prompts in place of the plain ones, and the same responses."""
        tokens, mask = left_padded([self.of(query, True)[1] for query in queries], self.config.sampling.bucket)
        return batch._replace(prompt=tokens, prompt_mask=mask)


def fitted(
    data: Data,
    rendering: Prompts,
    progress: Progress,
    *,
    sources: Sequence[str] = (),
    rewards: Sequence[Reward] = (),
    heldout_rewards: Sequence[Reward] = (),
) -> Data:
    """Returns the data without the queries that cannot be used, and logs how many answers are cut.

    A query is left out if the model, its chat template or a reward cannot take it. A plain prompt that is too long is left
    out as well; with format=tldr it is cut between paragraphs instead.

    Args:
        sources: which of a train record's own answers are trained on: "completion", "rejected".
        rewards: the rewards that score responses.
        heldout_rewards: rewards that score only responses to held-out queries.

    Raises:
        UserError: if the share of queries left out is above config.task.max_bad_share.
    """
    found: dict[str, QuerySet] = {}
    for which, queries in (("train", data.train), ("heldout", data.heldout)):
        progress.phase(f"check {which}", len(queries))
        asked, scored = (tuple(sources), rewards) if which == "train" else ((), [*rewards, *heldout_rewards])
        found[which], said = usable(queries, rendering, f"config.task.{which}", sources=asked, rewards=scored)
        progress.advance(len(queries))
        for line in said:
            progress.log(line)
    bad = {**data.bad, **{which: [*data.bad[which], *kept.bad] for which, kept in found.items()}}
    return Data(found["train"].queries, found["heldout"].queries, bad)


def usable(
    queries: Sequence[Query],
    rendering: Prompts,
    source: str,
    *,
    sources: Sequence[str] = (),
    rewards: Sequence[Reward] = (),
    principled: bool = True,
) -> tuple[QuerySet, list[str]]:
    """Separates the queries for which everything that is asked for can be made from the others.

    Args:
        source: where the queries come from, in words.
        sources, rewards: as in `fitted`.
        principled: whether there are principled prompts of them.

    Returns:
        Those queries and the others, and lines to log about long answers.

    Raises:
        UserError: as `fitted`.
    """
    task, known = rendering.config.task, dict[Any, str]()
    sizes: list[tuple[int, bool]] = []  # tokens of an answer, and whether it is whole: not the tokens, of all the data

    def judge(query: Query) -> Query:
        query = _short(query, rendering)
        if principled and task.chat:
            _check_principled(query, rendering, known)
        if reason := next(filter(None, (refusal(reward, query) for reward in rewards)), ""):
            raise Unusable("reward", f"cannot be scored: it {reason}")
        answers = [rendering.given(query, which) for which in sources]
        _check_answers(query, answers, rendering)
        sizes.extend((len(answer.tokens), answer.whole) for answer in answers)
        return query

    kept = QuerySet(*fit(queries, judge))
    check_share(kept, source, task.max_bad_share)
    return kept, _said_of(sizes, source, task.max_answer_tokens, rendering.config.sampling.max_new_tokens)


def _said_of(sizes: Sequence[tuple[int, bool]], source: str, limit: int, new: int) -> list[str]:
    """Returns lines to log about answers that are longer than task.max_answer_tokens, or longer than what is sampled."""
    cut = sum(not whole for _, whole in sizes)
    longer = sum(whole and tokens > new for tokens, whole in sizes)
    of = f"of {len(sizes)} answers of {source} are"
    more = "raise --config.task.max_answer_tokens to train on the whole"
    said = {
        f"{cut} {of} cut to {limit} tokens, and have no EOS: {more}": cut,
        f"{longer} {of} longer than sampling.max_new_tokens={new}, which cuts what is sampled: they are trained on whole": (
            longer
        ),
    }
    return [line for line, count in said.items() if count]


def _check_answers(query: Query, answers: Sequence[Answer], rendering: Prompts) -> None:
    """Raises Unusable if the two answers of a pair are the same, or prompt and answer are longer than the model takes."""
    if len({answer.tokens for answer in answers}) < len(answers):
        cut = "" if answers[0].whole else f" up to task.max_answer_tokens={len(answers[0].tokens)}, where they are cut"
        raise Unusable("pair", f"has two answers that are the same in tokens{cut}; remove the line")
    if answers:
        prompt, most = len(rendering.of(query, False)[1]), max(len(answer.tokens) for answer in answers)
        if prompt + most > rendering.context:
            room = f"and the model takes {rendering.context:g} at once"
            raise Unusable("over-long", f"has {prompt} tokens and an answer of {most}, {room}; remove the line")


def _short(query: Query, rendering: Prompts) -> Query:
    """Returns the query if its plain prompt is short enough; with format=tldr it is shortened to the limit.

    Raises:
        Unusable: if the prompt is too long, or has no tokens.
    """

    def length(query: Query) -> int:
        return len(rendering.of(query, False)[1])

    task = rendering.config.task
    limit = task.max_prompt_tokens
    if (n := length(query)) == 0:
        raise Unusable("empty", "has no tokens: the tokenizer knows nothing of its text; remove the line")
    if n <= limit:
        return query
    if format_of(task, query.id) == "tldr":
        shorter = shorten(query.prompt, lambda text: length(query._replace(prompt=text)) <= limit)
        if shorter is not None:
            return query._replace(prompt=shorter)
    raise Unusable(
        "over-long", f"has {n} tokens, above task.max_prompt_tokens={limit}; raise --config.task.max_prompt_tokens"
    )


def _check_principled(query: Query, rendering: Prompts, known: dict[Any, str]) -> None:
    """Raises Unusable if the chat template does not take the query's turns with principles.

    Whether it does depends on the roles of the turns, so only one query with each sequence of roles is rendered. `known`
    keeps what was found.
    """
    kind = tuple(turn["role"] for turn in query.prompt.messages) if isinstance(query.prompt, Conversation) else ("user",)
    if kind not in known:
        try:
            rendering.of(query, True)
            known[kind] = ""
        except Unusable as error:
            known[kind] = error.reason
    if known[kind]:
        raise Unusable("template", f"{known[kind]} (with the principles)")


def refusal(reward: Reward, query: Query) -> str:
    """Says why a reward, or a part of it, cannot score answers to a query. Returns an empty text if it can."""
    if said := next(filter(None, (refusal(part, query) for part in reward.parts.values())), ""):
        return said
    return reward.refuses(query.prompt, **{name: query.record[name] for name in reward.reads}) if reward.refuses else ""


def notes(config: Any, tokenizer: Tokenizer, eos: Sequence[int]) -> list[str]:
    """Returns what a user should know about how responses end and how prompts are written, one line each."""
    said = []
    if not eos:
        said.append(
            "warning: nothing stops a response: neither the model's files nor its tokenizer name an EOS, and no chat"
            " template ends a turn with a special token; every response will have sampling.max_new_tokens tokens"
        )
    elif tuple(eos) != (tokenizer.eos_token_id,):
        named = ", ".join(f"{tokenizer.decode([token], skip_special_tokens=False)!r} ({token})" for token in eos)
        said.append(f"a response ends at {named}: the model's EOS, the tokenizer's and the chat template's end of turn")
    if config.task.chat and tokenizer.chat_template is not None and not template.writes_header(tokenizer):
        said.append(
            "the chat template has no generation prompt: what it writes between a prompt and an answer stands at the end of"
            " prompts"
        )
    return said


def of_records(config: Any, data: Data, tokenizer: Tokenizer) -> Iterator[str]:
    """Yields a warning where records are hardly meant to be read as they are: turns as text, or another task's held-out."""
    task = config.task
    turns = any(isinstance(query.prompt, Conversation) for query in data.train[:_LOOKED_AT])
    if turns and not task.chat and tokenizer.chat_template is not None:
        yield (
            'warning: the records are conversations and config.task.chat is False: the model sees transcripts ("Human: ..."'
            ' "Assistant:"), not its chat template; --config.task.chat=True gives it that'
        )
    if not task.sets and task.heldout == _HELDOUT and task.train not in names("data", ".jsonl"):
        yield (
            f"warning: config.task.train is {task.train!r}, and config.task.heldout still {_HELDOUT!r}, openings of film"
            " reviews: evaluations are of these, and choose the best checkpoint; name held-out records of your own task"
        )


def longest(data: Data, rendering: Prompts) -> int:
    """Returns the number of tokens of the longest principled prompt, sought among the queries with the longest texts."""

    def size(query: Query) -> int:  # in bytes, nearer to tokens than characters are; with its tools
        tools = json.dumps(list(query.prompt.tools)) if isinstance(query.prompt, Conversation) and query.prompt.tools else ""
        return len(query.prompt.encode(errors="replace")) + len(tools)

    # principles add about as many tokens to every prompt: the longest of the principled is among the longest of the plain
    some = heapq.nlargest(_LOOKED_AT, itertools.chain(data.train, data.heldout), key=size)
    return max(len(rendering.of(query, True)[1]) for query in some)


def check_run(data: Data, rendering: Prompts, *, model: str) -> None:
    """Raises a UserError if too few train queries are left for an iteration, or a prompt with its response is too long.

    Args:
        data: the records that are used.
        model: the base model's name.
    """
    draw_queries(rendering.config, data.train, 0)
    needed = longest(data, rendering) + rendering.config.sampling.max_new_tokens
    check_context(needed, len(data.train), model=model, context=rendering.context)


def check_context(tokens: int, queries: int, *, model: str, context: float) -> None:
    """Raises a UserError if the longest prompt and its response together are longer than the model was trained to see.

    Args:
        tokens: number of tokens of that prompt and its response.
        queries: number of prompts, for the message.
        context: most tokens that the model takes.
    """
    if tokens > context:
        raise UserError(
            f"the longest of {queries} prompts and its response are {tokens} tokens, and {model} takes"
            f" {context}; shorten prompts, principles or --config.sampling.max_new_tokens"
        )
