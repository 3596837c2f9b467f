"""Conversations: turns with roles, and the transcripts of Anthropic's HH data that stand for them as text."""

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

    Whatever reads prompts as text (a reward of the user's own, the report) reads the transcript; a chat template gets
    `messages`. The last of them is not the assistant's.
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
    """An answer of the data that is more than its text: it calls tools, or has thoughts. As text it is what it says.

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
    """The assistant's turn that an answer is."""
    return answer.message if isinstance(answer, Answer) else {"role": "assistant", "content": answer}


def more_than_text(message: Message) -> list[str]:
    """What a turn holds that its text does not say: the names of the fields."""
    return [key for key in ("tool_calls", *THOUGHTS) if message.get(key)]


def render(messages: Sequence[Message]) -> str:
    """Turns as a transcript: "\\n\\nHuman: ...\\n\\nAssistant: ...".

    Roles but the user's and the assistant's have their own names; a system turn that comes first has none.
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
    """The turns of an HH transcript, without the blanks around them.

    A turn begins at "Human:" or "Assistant:" after an empty line (of "\\n" or "\\r\\n"; other line separators are text), or
    at the very start, where newlines may be missing. Anywhere else the two words are what somebody says. Text before the
    first turn is a system turn. Empty turns, two of one speaker in a row, and a transcript that the assistant begins stay
    as they are. `render` undoes it, if no turn holds such a mark.
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
    """Two turns of one speaker in a row as one, an empty line between: most chat templates want speakers to take turns."""
    merged: list[Message] = []
    for turn in turns:
        if merged and merged[-1]["role"] == turn["role"]:
            both = "\n\n".join(filter(None, (merged[-1]["content"], turn["content"])))
            merged[-1] = {"role": turn["role"], "content": both}
        else:
            merged.append(turn)
    return merged
