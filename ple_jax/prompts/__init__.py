"""Prompts as the policy sees them, plain or with the principles, and responses as a reward sees them."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from ple_jax.core.conversation import THOUGHTS, Answer, Conversation, more_than_text, turn_of
from ple_jax.core.errors import Unusable
from ple_jax.core.types import Query, Tokenizer
from ple_jax.prompts import template
from ple_jax.prompts.template import DATE, Form

_OPEN, _CLOSE = "<think>", "</think>"  # what reasoning models write around their thoughts


def render(
    query: Query, principles: str | None, tokenizer: Tokenizer, *, chat: bool, thinking: bool = False, date: str = DATE
) -> tuple[str, list[int]]:
    """Renders a query's prompt as text and as token ids; with `principles` it is the principled prompt.

    Raw (not `chat`): the principles come before the query, separated by an empty line. Chat: they are the system turn, or
    the end of the query's own one. Where the template refuses a system turn, leaves it out or repeats it, its text is put at
    the beginning of the first user turn. A plain prompt keeps whatever system turn the query has or the template adds.

    A special token that is spelled out in a query ("<|im_end|>") becomes that token, as is transformers' default.

    Args:
        thinking: passed to templates of reasoning models as `enable_thinking`.
        date: today's date for templates that ask for it, YYYY-MM-DD.

    Raises:
        Unusable: in chat, if there is no chat template, or it refuses the turns, or it leaves out what a user says or a tool
            that was called.
    """
    prompt = query.prompt
    if not chat:
        text = str(prompt)
        if principles is not None:  # a transcript begins with an empty line itself
            text = f"{principles}\n\n" + (text.removeprefix("\n\n") if isinstance(prompt, Conversation) else text)
        return text, open_ended(text, tokenizer)
    try:
        text = template.opened(prompt, principles, Form(tokenizer, thinking, date))
    except ValueError as error:
        raise Unusable(
            "template",
            f"is refused by the tokenizer's chat template: {error}; take a model whose template takes it, or set"
            " --config.task.chat=False for raw prompts",
            f"query {query.id!r}",
        ) from error
    return text, list(tokenizer.encode(text, add_special_tokens=False))


def open_ended(text: str, tokenizer: Tokenizer) -> list[int]:
    """Encodes a text that is to be continued: without the EOS that some tokenizers put after every text."""
    tokens = list(tokenizer.encode(text, add_special_tokens=True))
    return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens


def completion(prompt: str, text: str, *, chat: bool) -> str:
    """Returns what follows the rendered prompt when `text` is its reference answer.

    A raw transcript ends without a space, so the answer begins with one there, as what was sampled does already.
    """
    begins = isinstance(prompt, Conversation) and not chat and not text[:1].isspace()
    return f" {text}" if begins else text


# ---------------------------------------------------------------- answers that the data give


class Given(NamedTuple):
    """An answer from a record, with all of its tokens."""

    tokens: tuple[int, ...]
    text: str  # what a reward sees


def given(
    prompt: str,
    said: str,
    tokenizer: Tokenizer,
    *,
    stops: Sequence[int],
    chat: bool,
    thinking: bool = False,
    date: str = DATE,
) -> Given:
    """Converts an answer of the data to the tokens that follow the plain prompt's, including the token that ends it.

    Chat: the tokens that the template renders after the prompt, up to the first stop; if there is none, trailing blanks are
    removed and EOS is added. Raw: the tokens of prompt and answer as one text, without the prompt's, and EOS.

    Args:
        prompt: the query's prompt.
        said: the answer.
        stops: the tokens that end a response.

    Raises:
        Unusable: the template refuses the conversation or leaves out part of the answer; plain text cannot hold the answer;
            it spells a stop before its end; its tokens cannot be separated from the prompt's, or it has none.
    """
    form = Form(tokenizer, thinking, date)
    opening, ids = render(Query("", prompt), None, tokenizer, chat=chat, thinking=thinking, date=date)
    behind = _in_template(prompt, opening, said, form) if chat else _as_text(prompt, said)
    tokens = _behind(opening, ids, behind, tokenizer, chat=chat)
    end = next((i for i, token in enumerate(tokens) if token in stops), None)
    if end is None:
        tokens = _behind(opening, ids, behind.rstrip(), tokenizer, chat=chat) if chat else tokens
        tokens = [*tokens, *_eos(tokenizer, stops)]
    else:
        _check_end(said, tokenizer.decode([tokens[end]], skip_special_tokens=False))
        tokens = tokens[: end + 1]
    if not tokens:
        raise Unusable("empty", "has an answer without tokens; remove the line")
    plain = not isinstance(said, Answer) and not (thinking and _CLOSE in said)
    return Given(tuple(tokens), str(said) if plain else answer(tokens, tokenizer, prompt=opening, thinking=thinking))


def _in_template(prompt: str, opening: str, said: str, form: Form) -> str:
    """Returns what a chat template writes after the opened prompt for an answer.

    Raises:
        Unusable: the template refuses the conversation, or does not write all of the answer.
    """
    try:
        return template.answered(prompt, opening, turn_of(said), form)
    except ValueError as error:
        thoughts = (any(map(turn_of(said).get, THOUGHTS)) or _CLOSE in said) and not form.thinking
        hint = "; set --config.task.thinking=True" if thoughts else ""
        raise Unusable("template", f"has an answer that the chat template does not hold: {error}{hint}") from error


def _as_text(prompt: str, said: str) -> str:
    """Returns what follows a prompt that is plain text.

    Raises:
        Unusable: the answer is more than its text.
    """
    _check_text(said)
    return completion(prompt, str(said), chat=False)


def _check_text(said: str) -> None:
    """Raises Unusable if the answer is more than its text: if it calls tools or has thoughts."""
    if beside := more_than_text(turn_of(said)):
        raise Unusable(
            "answer",
            f"has an answer with {' and '.join(beside)}, which plain text cannot hold: set --config.task.chat=True, or take"
            " that out",
        )


def _check_end(said: str, stop: str) -> None:
    """Raises Unusable if a stop token that is spelled out in the answer would end it early."""
    own = said.strip()
    while stop and own.endswith(stop):  # some data have written it down themselves
        own = own.removesuffix(stop)
    if stop and any(stop in part for part in (own, *template.beside(turn_of(said)))):
        raise Unusable("answer", f"has an answer that spells {stop!r} before its end, where a response stops; take that out")


def _behind(opening: str, ids: list[int], behind: str, tokenizer: Tokenizer, *, chat: bool) -> list[int]:
    """Returns the tokens of a text that follows an opening, whose own tokens are `ids`.

    They are the tokens of the whole text without those of the opening. If one token spans the end of the opening and the
    beginning of what follows, the text is encoded after another short text instead, as by itself some tokenizers would begin
    it with a blank.

    Raises:
        Unusable: the tokens cannot be separated from those of the opening.
    """
    text = opening + behind
    whole = list(tokenizer.encode(text, add_special_tokens=False)) if chat else open_ended(text, tokenizer)
    if whole[: len(ids)] == ids:
        return whole[len(ids) :]
    said = tokenizer.decode(whole, skip_special_tokens=False)
    for other in ("\n", "a", " "):
        before = list(tokenizer.encode(other, add_special_tokens=False))
        both = list(tokenizer.encode(other + behind, add_special_tokens=False))
        found = both[len(before) :]
        if both[: len(before)] == before and tokenizer.decode([*ids, *found], skip_special_tokens=False) == said:
            return found
    raise Unusable("answer", "has an answer whose first token begins in its prompt, and cannot be told from it")


def _eos(tokenizer: Tokenizer, stops: Sequence[int]) -> list[int]:
    """Returns, in a list, the token that ends a text: the tokenizer's EOS if it is a stop, else the first stop.

    The tokenizer's EOS is the token that its own training used. The list is empty if there is neither.
    """
    own = tokenizer.eos_token_id
    return [own] if own is not None and own in stops else list(stops[:1])


# ---------------------------------------------------------------- what rewards see


def decoded(tokens: Sequence[int], tokenizer: Tokenizer, *, chat: bool) -> str:
    """Returns the text of a response without special tokens.

    Raw, it is what stands behind a prompt: some decoders (Llama 2, Mistral) drop the blank before a first word, which parts
    it from the prompt's last one.
    """
    if chat:
        return tokenizer.decode(tokens, skip_special_tokens=True)
    near = list(tokenizer.encode("a", add_special_tokens=False))
    before = tokenizer.decode(near, skip_special_tokens=True)
    return tokenizer.decode([*near, *tokens], skip_special_tokens=True).removeprefix(before)


def answer(tokens: Sequence[int], tokenizer: Tokenizer, *, prompt: str, thinking: bool, chat: bool = True) -> str:
    """Returns the text of a response that a reward sees: without special tokens, and without a reasoning model's thoughts.

    Args:
        tokens: the response's token ids.
        prompt: the rendered prompt, in which some templates open the thoughts.
        thinking: whether the model may think. If so, the answer is what follows the last "</think>"; it is empty if thoughts
            were opened and not closed, and the whole text if there are none.
        chat: whether the prompt was rendered by a chat template; see `decoded`.
    """
    if not thinking:
        return decoded(tokens, tokenizer, chat=chat)
    whole = tokenizer.decode(tokens, skip_special_tokens=False)
    closed = whole.count(_CLOSE)
    if _OPEN in whole.rpartition(_CLOSE)[2] or (not closed and prompt.rstrip().endswith(_OPEN)):
        return ""
    if not closed:
        return tokenizer.decode(tokens, skip_special_tokens=True)

    def count(n: int) -> int:
        return tokenizer.decode(tokens[:n], skip_special_tokens=False).count(_CLOSE)

    # in tokens: without special tokens the text may have no "</think>", which is one in some vocabularies
    end = bisect_left(range(len(tokens)), closed, key=count)
    # the token that closes may hold more than the bracket: ">\n\n"
    begins = tokenizer.decode(tokens[:end], skip_special_tokens=False).rpartition(_CLOSE)[2]
    return re.sub(r"\A\s*\n", "", begins + tokenizer.decode(tokens[end:], skip_special_tokens=True))


def dialogue(prompt: str, response: str, tokenizer: Tokenizer) -> list[int]:
    """Encodes a prompt and its response as a reward model sees them, with its own tokenizer.

    With a chat template it is the conversation that ends in the response; without one, the two texts one after the other. A
    template that asks for the date always gets the same one, so that the tokens do not depend on the day.

    Raises:
        Unusable: the template refuses the turns, or leaves out what a user says or a tool that was called; or an answer of
            the data is more than its text, and the template leaves that out or there is no template.
    """
    if tokenizer.chat_template is None:
        _check_text(response)
        return list(tokenizer.encode(prompt + completion(prompt, response, chat=False), add_special_tokens=True))
    try:
        text = template.closed(prompt, turn_of(response), Form(tokenizer))
        if isinstance(response, Answer):
            template.check_complete(text, response.message)
    except ValueError as error:
        raise Unusable(
            "template",
            f"is refused by the reward model's chat template: {error}; take a reward model whose template takes it",
            f"the conversation {prompt[:60]!r}",
        ) from error
    return list(tokenizer.encode(text, add_special_tokens=False))


def common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Returns the tokens that all prompts begin with, and leaves every prompt at least one token of its own."""
    shortest = min(len(prompt) for prompt in prompts) - 1
    for i in range(shortest):
        if any(prompt[i] != prompts[0][i] for prompt in prompts):
            return list(prompts[0][:i])
    return list(prompts[0][: max(shortest, 0)])
