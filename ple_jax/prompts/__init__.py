"""From a query to the token ids the policy sees, plain or with the principles, and from its tokens to what a reward sees."""

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import UserError
from ple_jax.core.types import Message, Query, Tokenizer

_OPEN, _CLOSE = "<think>", "</think>"  # what reasoning models write around their thoughts
_MARK = "\ue000"  # around the system text when it is looked for: a short one may also be part of the markup


def render(
    query: Query, principles: str | None, tokenizer: Tokenizer, *, chat: bool, thinking: bool = False
) -> tuple[str, list[int]]:
    """The prompt as text and as token ids; with `principles` it is the principled one.

    Raw: the principles stand before the query, an empty line between. Chat: they are the system turn, or the end of the
    query's own. Where the template refuses a system turn, leaves it out or repeats it, its text stands at the head of the
    first user turn. A plain prompt keeps whatever system turn the query has or the template puts in.

    A special token spelled in a query ("<|im_end|>") becomes that token, which is transformers' default.

    Args:
        thinking: what templates of reasoning models read as `enable_thinking`.

    Raises:
        UserError: chat without a chat template, or with one that refuses the turns or leaves out what a user says or a
            tool that was called.
    """
    prompt = query.prompt
    if not chat:
        text = str(prompt)
        if principles is not None:  # a transcript begins with an empty line itself
            text = f"{principles}\n\n" + (text.removeprefix("\n\n") if isinstance(prompt, Conversation) else text)
        tokens = list(tokenizer.encode(text, add_special_tokens=True))
        # some tokenizers close every text with EOS; a prompt is to be continued
        return text, tokens[:-1] if tokens[-1] == tokenizer.eos_token_id else tokens
    turns, tools = _turns(prompt)
    options = {"add_generation_prompt": True, "enable_thinking": thinking, **tools}
    try:
        text = _apply(tokenizer, turns, principles, options)
    except ValueError as error:
        raise UserError(
            f"the tokenizer's chat template does not take query {query.id!r}: {error}; take a model whose template does,"
            " or set --config.task.chat=False for raw prompts"
        ) from error
    return text, list(tokenizer.encode(text, add_special_tokens=False))


def completion(prompt: str, text: str, *, chat: bool) -> str:
    """What follows the rendered prompt when `text` is its reference answer: a raw transcript is open without a space."""
    return f" {text}" if isinstance(prompt, Conversation) and not chat else text


def answer(tokens: Sequence[int], tokenizer: Tokenizer, *, prompt: str, thinking: bool) -> str:
    """The text of a response that a reward sees: without special tokens, and of a reasoning model without its thoughts.

    Args:
        tokens: the response.
        prompt: the rendered prompt; some templates open the thoughts there.
        thinking: whether the model may think. What follows the last "</think>" is the answer then, nothing if thoughts
            were opened and not closed, and all of it if there are none.
    """
    if not thinking:
        return tokenizer.decode(tokens, skip_special_tokens=True)
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
    """A prompt and its response as a reward model sees them, by its own tokenizer.

    With a chat template the conversation that ends in the response; without one, the two texts one after the other.

    Raises:
        UserError: the template refuses the turns, or leaves out what a user says or a tool that was called.
    """
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(prompt + completion(prompt, response, chat=False), add_special_tokens=True))
    turns, tools = _turns(prompt)
    turns.append({"role": "assistant", "content": response})
    try:
        text = _apply(tokenizer, turns, None, {"add_generation_prompt": False, **tools})
    except ValueError as error:
        raise UserError(
            f"the reward model's chat template does not take the conversation {prompt[:60]!r}: {error};"
            " take a reward model whose template does"
        ) from error
    return list(tokenizer.encode(text, add_special_tokens=False))


def common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all prompts begin with, leaving every prompt at least one token of its own."""
    shortest = min(len(prompt) for prompt in prompts) - 1
    for i in range(shortest):
        if any(prompt[i] != prompts[0][i] for prompt in prompts):
            return list(prompts[0][:i])
    return list(prompts[0][: max(shortest, 0)])


def _turns(prompt: str) -> tuple[list[Message], dict[str, Any]]:
    """The turns of a prompt, and the tools as the template's argument, if it has some."""
    if not isinstance(prompt, Conversation):
        return [{"role": "user", "content": prompt}], {}
    return list(prompt.messages), {"tools": list(prompt.tools)} if prompt.tools else {}


def _apply(tokenizer: Tokenizer, turns: Sequence[Message], principles: str | None, options: Mapping[str, Any]) -> str:
    """The turns in the template, with the principles in the system turn or, if there is no room, in the first user turn.

    Raises:
        ValueError: the template takes neither; says why.
    """
    own, rest = (turns[0]["content"], turns[1:]) if turns[0]["role"] == "system" else ("", turns)
    system = "\n\n".join(part for part in (own, principles) if part)
    if not system:
        return _shown(tokenizer, turns, options)
    marked = f"{_MARK}{system}{_MARK}"
    for place in (_before, _merged):
        try:
            text = _shown(tokenizer, place(system, rest), options)
            found = _shown(tokenizer, place(marked, rest), options).count(marked)
            if found == 1:
                return text
            problem = f"it {'repeats' if found else 'leaves out'} {system[:60]!r}"
        except ValueError as error:
            problem = str(error)
    raise ValueError(problem)


def _before(system: str, turns: Sequence[Message]) -> list[Message]:
    return [{"role": "system", "content": system}, *turns]


def _merged(system: str, turns: Sequence[Message]) -> list[Message]:
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
    if first is None:  # the conversation was a system turn
        return [{"role": "user", "content": system}, *turns]
    user = {**turns[first], "content": f"{system}\n\n{turns[first]['content']}"}
    return [*turns[:first], user, *turns[first + 1 :]]


def _shown(tokenizer: Tokenizer, turns: Sequence[Message], options: Mapping[str, Any]) -> str:
    """The turns in the template, which has to show what the user says and what the assistant called.

    Raises:
        ValueError: it does not, or takes no such turns.
    """
    try:
        text: str = tokenizer.apply_chat_template([dict(turn) for turn in turns], tokenize=False, **options)
        missing = [said for turn in turns for said in _said(turn) if said.strip() not in text]
    except Exception as error:  # templates are code of the checkpoint's: they raise what they like
        raise ValueError(str(error)) from error
    if missing:
        raise ValueError(f"it leaves out {missing[0][:60]!r}")
    return text


def _said(turn: Message) -> list[str]:
    """What every template writes as it is of a turn: some drop the assistant's thoughts, some quote a tool's answer."""
    if turn["role"] == "user":
        return [turn["content"]]
    return [call.get("function", call)["name"] for call in turn.get("tool_calls", ())]
