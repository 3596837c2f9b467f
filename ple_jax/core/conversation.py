"""Conversations of turns with roles, and their text form: transcripts as in Anthropic's HH data."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

from ple_jax.core.types import Message

_SPEAKERS = {"user": "Human", "assistant": "Assistant"}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # the fields of a turn that hold them
_ROLES = {speaker: role for role, speaker in _SPEAKERS.items()}
_FIRST = re.compile(r"\s*(Human|Assistant):")
_MARK = re.compile(r"\n\r?\n(Human|Assistant):")  # begins with a letter of its own: that makes the search fast


class Conversation(str):
    """A prompt of several turns. As text it is their transcript, open for the assistant's next turn.

    Code that reads prompts as text (a user's own reward, the report) sees the transcript; a chat template gets `messages`.
    The last of these is no turn of the assistant.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]  # what the assistant may call, as the chat template takes it

    def __new__(cls, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Self:
        self = super().__new__(cls, render(messages) + "\n\nAssistant:")
        self.messages, self.tools = tuple(messages), tuple(tools)
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:  # for copies and pickles
        return self.messages, self.tools


class Answer(str):
    """An answer of the data that has tool calls or thoughts besides its text. As text it is what the answer says.

    A chat template gets `message`, the assistant's whole turn.
    """

    message: Message

    def __new__(cls, message: Message) -> Self:
        self = super().__new__(cls, message["content"])
        self.message = message
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:  # for copies and pickles
        return (self.message,)

    def __bool__(self) -> bool:  # a call says nothing, and is an answer
        return True


def turn_of(answer: str) -> Message:
    """Returns an answer as a turn of the assistant."""
    return answer.message if isinstance(answer, Answer) else {"role": "assistant", "content": answer}


def more_than_text(message: Message) -> list[str]:
    """Returns the names of a turn's fields that hold something its text does not say: tool calls and thoughts."""
    return [key for key in ("tool_calls", *THOUGHTS) if message.get(key)]


def render(messages: Sequence[Message]) -> str:
    """Renders turns as a transcript: "\\n\\nHuman: ...\\n\\nAssistant: ...".

    Roles other than user and assistant are written under their own names. A system turn that comes first has no name.
    """
    parts = []
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if i == 0 and role == "system":
            parts.append(content)
        else:
            parts.append(f"\n\n{_SPEAKERS.get(role, role.capitalize())}:{' ' if content else ''}{content}")
    return "".join(parts)


def parse(text: str) -> list[Message]:
    """Parses the turns of an HH transcript, and strips the whitespace around them.

    A turn begins at "Human:" or "Assistant:" after an empty line (of "\\n" or "\\r\\n"; other line separators are text), or
    at the very start, where newlines may be missing. Anywhere else the two words are part of what is said. Text before the
    first turn becomes a system turn. Empty turns, two turns of one speaker in a row, and a transcript that begins with the
    assistant are left as they are. `render` is the inverse, if no turn holds such a mark.
    """
    first = _FIRST.match(text)
    marks = [first] if first else []
    marks.extend(_MARK.finditer(text, first.end() if first else 0))
    before = text[: marks[0].start() if marks else None].strip()
    turns: list[Message] = [{"role": "system", "content": before}] if before else []
    ends = [mark.start() for mark in marks] + [len(text)]
    for mark, end in zip(marks, ends[1:], strict=True):
        turns.append({"role": _ROLES[mark[1]], "content": text[mark.end() : end].strip()})
    return turns


def merge(turns: Sequence[Message]) -> list[Message]:
    """Merges turns of one speaker in a row into one, with an empty line between their texts.

    Most chat templates require that speakers take turns.
    """
    merged: list[Message] = []
    for turn in turns:
        if merged and merged[-1]["role"] == turn["role"]:
            both = "\n\n".join(filter(None, (merged[-1]["content"], turn["content"])))
            merged[-1] = {"role": turn["role"], "content": both}
        else:
            merged.append(turn)
    return merged
