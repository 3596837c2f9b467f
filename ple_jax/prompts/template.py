"""Chat templates: the turns of a conversation as a model's own template writes them, with and without the last answer.

A template is code that comes with a checkpoint. Some templates refuse a system turn, some have no generation prompt, some
read the clock, some leave out the thoughts of earlier turns. All of them must write what was said.
"""

import functools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import date as Date
from typing import Any, NamedTuple

from ple_jax.core.conversation import THOUGHTS, Conversation
from ple_jax.core.types import Message, Tokenizer

DATE = "2024-07-26"  # of what belongs to no run, a reward model's conversations: it must not change from day to day
_MARK = "\ue000"  # around a text that is looked for: a short one may also be part of the markup
_ANSWER = "\ue001"  # the same, of the answer
_CLOCK = "strftime_now"  # what templates ask for the date, as transformers has it
# how prompts end that open thoughts
_OPENINGS = ("<think>", "<seed:think>", "[THINK]", "<|START_THINKING|>", "<|channel>thought")
_DIRECTIVES = "aAbBcdDeFGHIjmMpSTuUVwWxXyYZ"  # of strftime


class Form(NamedTuple):
    """The options with which prompts are written."""

    tokenizer: Tokenizer
    thinking: bool | None = None  # what templates of reasoning models read as `enable_thinking`; None: nothing
    date: str = DATE  # today's to a template that asks for it, YYYY-MM-DD


def opened(prompt: str, principles: str | None, form: Form) -> str:
    """Renders the turns of a prompt, open for the assistant's answer.

    If a template writes no generation prompt, the text ends with what it writes between a prompt and an answer.

    Raises:
        ValueError: the template refuses these turns; the message says why.
    """
    turns, tools = turns_of(prompt)
    text = _applied(turns, principles, form, tools, open_=True)
    if writes_header(form.tokenizer):
        return text
    try:
        followed = _applied([*turns, _said_by_assistant(_ANSWER)], principles, form, tools)
    except ValueError:  # it takes no answers
        return text
    before, found, _ = followed.partition(_ANSWER)
    start, eos = text.rstrip(), form.tokenizer.eos_token_id
    if not before.startswith(start) and eos is not None:  # some close every conversation with EOS
        start = start.removesuffix(form.tokenizer.decode([eos], skip_special_tokens=False))
    # a blank alone is part of the answer: behind it texts would have other tokens
    return before if found and before.startswith(start) and before[len(start) :].strip() else text


def closed(prompt: str, answer: Message, form: Form) -> str:
    """Renders the whole conversation, ending with `answer`, as the template does when no other answer is to follow.

    Raises:
        ValueError: the template refuses these turns; the message says why.
    """
    turns, tools = turns_of(prompt)
    return _applied([*turns, answer], None, form, tools)


def answered(prompt: str, opening: str, answer: Message, form: Form) -> str:
    """Returns what the template writes after the opened prompt if `answer` follows.

    Some templates write something else before an answer than at the end of a prompt, such as empty thoughts, or move the
    system turn. For them, only what they write from the answer on is returned.

    Raises:
        ValueError: as `closed`; or the template leaves out part of the answer, or writes something else before it.
    """
    whole = closed(prompt, answer, form)
    behind = whole[len(opening) :] if whole.startswith(opening) else _aligned(prompt, opening, answer, form)
    check_complete(behind, answer)
    return behind


def _aligned(prompt: str, opening: str, answer: Message, form: Form) -> str:
    """Returns what follows the end of the opening in a whole conversation that does not begin with the opening.

    Raises:
        ValueError: the template writes something else between the prompt and this answer than after the prompt alone, or the
            prompt opens thoughts and this answer has none.
    """
    if opening.rstrip().endswith(_OPENINGS):
        raise ValueError("it opens thoughts in the prompt, and writes this answer without any")
    turns, tools = turns_of(prompt)
    marked = Conversation([*turns[:-1], {**turns[-1], "content": turns[-1]["content"] + _MARK}], tools)
    parts = closed(marked, {**answer, "content": f"{_ANSWER}{answer['content']}{_ANSWER}"}, form).split(_ANSWER)
    ours, theirs = (text.rpartition(_MARK)[2] for text in (opened(marked, None, form), parts[0]))
    closed_thoughts = "</think>" in ours and "</think>" in answer["content"]  # and the answer has some
    if len(parts) != 3 or closed_thoughts or not (theirs.startswith(ours) or ours.startswith(theirs)):
        raise ValueError("it writes something else between the prompt and this answer than behind the prompt alone")
    return theirs[len(ours) :] + parts[1] + parts[2]


def turns_of(prompt: str) -> tuple[list[Message], list[Mapping[str, Any]]]:
    """Returns the turns of a prompt and its tools; a plain text is one user turn."""
    if not isinstance(prompt, Conversation):
        return [{"role": "user", "content": prompt}], []
    return list(prompt.messages), list(prompt.tools)


def end_of_turn(tokenizer: Any) -> int | None:
    """Returns the special token that the template writes after an answer, or None if no special token follows.

    Of several tokens in a row it is the first, or EOS if EOS follows every answer, whether or not another turn comes after
    it: Command R closes its text and then the turn, Phi-4 mini the turn and then the conversation.
    """
    user = {"role": "user", "content": "a"}
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}

    def behind(*more: Message) -> list[str]:
        try:
            text = _written([user, _said_by_assistant(_ANSWER), *more], Form(tokenizer), [])
        except ValueError:
            return []
        return list(_leading(text.partition(_ANSWER)[2].lstrip(), special))

    last = behind()
    if not last:
        return None
    always = [special[a] for a, b in zip(last, behind(user), strict=False) if a == b]
    return tokenizer.eos_token_id if tokenizer.eos_token_id in always else special[last[0]]


def _leading(text: str, tokens: Collection[str]) -> Iterator[str]:
    """Yields the tokens that a text begins with, one directly after the other."""
    while found := [token for token in tokens if token and text.startswith(token)]:
        yield (longest := max(found, key=len))
        text = text.removeprefix(longest)


def reads_clock(tokenizer: Tokenizer) -> bool:
    """Says whether the template asks for today's date."""
    return _CLOCK in str(tokenizer.chat_template)


def writes_header(tokenizer: Tokenizer) -> bool:
    """Says whether the template writes a generation prompt: whether `add_generation_prompt` changes its output."""
    own: Any = tokenizer
    return _writes_header(own, str(tokenizer.chat_template))


@functools.lru_cache(maxsize=8)
def _writes_header(tokenizer: Any, template: str) -> bool:
    form, asked = Form(tokenizer), [{"role": "user", "content": _MARK}]
    try:
        return _written(asked, form, [], open_=True) != _written(asked, form, [])
    except ValueError:
        return True  # it will be refused for that


def _said_by_assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


# ---------------------------------------------------------------- where the system turn goes


def _applied(
    turns: Sequence[Message], principles: str | None, form: Form, tools: Sequence[Any], *, open_: bool = False
) -> str:
    """Renders the turns in the template, with the principles in the system turn or, if that fails, in the first user turn.

    Raises:
        ValueError: the template takes neither; the message says why.
    """
    own, rest = (turns[0]["content"], turns[1:]) if turns[0]["role"] == "system" else ("", turns)
    system = "\n\n".join(part for part in (own, principles) if part)
    if not system:
        return _shown(turns, form, tools, open_=open_)
    marked = f"{_MARK}{system}{_MARK}"
    for place in (_before, _merged):
        try:
            text = _shown(place(system, rest), form, tools, open_=open_)
            found = _shown(place(marked, rest), form, tools, open_=open_).count(marked)
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


# ---------------------------------------------------------------- what a template writes


def _shown(turns: Sequence[Message], form: Form, tools: Sequence[Any], *, open_: bool) -> str:
    """Renders the turns in the template, and checks that the text has what the user says and the tools that were called.

    Raises:
        ValueError: the template leaves something out, or refuses these turns.
    """
    text = _written(turns, form, tools, open_=open_)
    try:
        missing = [said for turn in turns for said in _said(turn) if said.strip() not in text]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error
    if missing:
        raise ValueError(f"it leaves out {missing[0][:60]!r}")
    return text


def _said(turn: Message) -> list[str]:
    """Returns what every template must write verbatim for a turn: a user's or a system's text, and names of called tools.

    Some templates drop the assistant's thoughts, and some quote a tool's answer, so nothing else is expected.
    """
    if turn["role"] in ("user", "system"):
        return [turn["content"]]
    return [call.get("function", call)["name"] for call in turn.get("tool_calls", ())]


def check_complete(text: str, answer: Message) -> None:
    """Raises a ValueError if a text lacks part of an answer.

    Nothing may be missing from what is trained on.
    """
    said = answer["content"].partition("</think>")
    parts = [said[0].replace("<think>", ""), said[2], *beside(answer)]
    for part in map(str.strip, parts):
        if part not in text and json.dumps(part, ensure_ascii=False)[1:-1] not in text:
            raise ValueError(f"it leaves out {part[:60]!r}")


def beside(answer: Message) -> list[str]:
    """Returns the texts of an answer besides its content: its thoughts, and the tools that it calls with their arguments."""
    calls = [call.get("function", call) for call in answer.get("tool_calls", ())]
    return [*_texts([answer.get(key) for key in THOUGHTS]), *_texts(calls)]


def _texts(value: Any) -> Iterator[str]:
    """Yields all texts in a nested value, without the keys of its mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)


def _written(turns: Sequence[Message], form: Form, tools: Sequence[Any], *, open_: bool = False) -> str:
    """Returns the text that the template writes.

    Raises:
        ValueError: the template refuses these turns.
    """
    tokenizer = form.tokenizer
    options: dict[str, Any] = {"tools": list(tools)} if tools else {}
    if form.thinking is not None:
        options["enable_thinking"] = form.thinking
    try:
        if reads_clock(tokenizer):
            options["chat_template"] = dated(_template(tokenizer, options), form.date)
        return str(
            tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=open_, **options
            )
        )
    except Exception as error:  # templates are code of the checkpoint's: they raise what they like
        raise ValueError(str(error)) from error


def _template(tokenizer: Any, options: Mapping[str, Any]) -> str:
    """Returns the template for these options; a tokenizer may have several."""
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    return str(tokenizer.get_chat_template(tools=options.get("tools")))


@functools.lru_cache(maxsize=8)
def dated(template: str, date: str) -> str:
    """Returns the template with a fixed clock: it always reads midnight of `date`, YYYY-MM-DD.

    Transformers gives templates a function `strftime_now`, which cannot be replaced from outside. But a macro of that name
    in the template itself takes precedence.
    """
    day = Date.fromisoformat(date)
    words = {letter: day.strftime(f"%{letter}") for letter in _DIRECTIVES} | {"%": "%"}
    words |= {f"-{letter}": words[letter].lstrip("0 ") or "0" for letter in "deHIjmMSUVWyY"}
    macro = (
        "{% macro strftime_now(format) %}{% set ns = namespace(at='') %}{% for c in format %}"
        "{% if ns.at == '' %}{% if c == '%' %}{% set ns.at = '%' %}{% else %}{{ c }}{% endif %}"
        "{% elif c == '-' and ns.at == '%' %}{% set ns.at = '%-' %}"
        "{% else %}{{ WORDS[ns.at[1:] + c] }}{% set ns.at = '' %}{% endif %}{% endfor %}{% endmacro %}"
    )
    # an expression of nothing: blocks take a line's end behind them away, and it may be the template's own
    return macro.replace("WORDS", json.dumps(words)) + "{{ '' }}" + template
