"""Converts raw records to queries, one function per config.task.format. Unusable records raise `Unusable` with a reason."""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ple_jax.core.conversation import Answer, Conversation, merge, parse, turn_of
from ple_jax.core.errors import Unusable
from ple_jax.core.types import Message, Query

NEEDS = ("prompt", "completion", "pair")  # what a record must have to be of use
FORMATS = ("records", "hh", "imdb", "tldr")
Values = Mapping[str, Any]

_BREAK = re.compile(r"< ?/? ?br\b[^<>]*>", re.IGNORECASE)
_TLDR_AT_END = re.compile(r"(?<!\w)tl ?[;:/]? ?dr ?[:;]?\Z", re.IGNORECASE)
_TLDR_AT_START = re.compile(r"\s*tl ?[;:/]? ?dr ?:", re.IGNORECASE)


def records(values: Values, *, needs: str) -> Query:
    """Reads neutral records, and those of TRL: texts or lists of turns.

    A record has `prompt`, alone, with `completion`, or with `chosen` and `rejected`; or `chosen` and `rejected` that both
    begin with the prompt; or `messages`, of which the last is the completion. It may have `tools`. A text is continued
    verbatim; an answer to turns is stripped. A column of None is none: a table has every column in every row.

    Args:
        values: the record's columns.
        needs: what the record must have: prompt, completion or pair.

    Raises:
        Unusable: the record lacks something that is needed, or is not of one of these forms.
    """
    values = {key: value for key, value in values.items() if value is not None}
    if needs == "pair" or "chosen" in values:
        return _preference(values, needs)
    if "messages" in values and "completion" not in values:
        turns = _turns(values, "messages")
        if turns[-1]["role"] != "assistant":
            if needs == "completion":
                raise Unusable("turns", ": `messages` does not end with the assistant's turn; there is no answer")
            return _conversation(turns, "", "", values, needs)
        return _conversation(turns[:-1], _answer(turns[-1]), "", values, needs)
    prompt = _column(values, "prompt")
    answer = _column(values, "completion") if needs == "completion" or "completion" in values else ""
    if isinstance(prompt, str) and isinstance(answer, str):
        return _text(prompt, answer, "", needs)
    turns = _asked(prompt)
    if isinstance(answer, str):
        return _conversation(turns, answer, "", values, needs)
    told = _turns(values, "completion")
    if told[-1]["role"] != "assistant":
        raise Unusable("turns", ": `completion` does not end with the assistant's turn")
    turns = _joined(turns, told, "completion", exact=not isinstance(prompt, str))
    return _conversation(turns[:-1], _answer(turns[-1]), "", values, needs)


def hh(values: Values, *, needs: str) -> Query:
    """Reads records of Anthropic's HH: two transcripts, `chosen` and `rejected`.

    The query is all that comes before the last answer. Answers to different queries are not a pair.

    Raises:
        Unusable: `chosen` has no query or no answer; or a pair is needed and `rejected` has none, answers another query, or
            gives the same answer.
    """
    query, answer = _transcript(values, "chosen")
    rejected = ""
    if needs == "pair":
        other, rejected = _transcript(values, "rejected")
        if other != query:
            raise Unusable("different queries", ": `chosen` and `rejected` answer different queries")
        _check_pair(answer, rejected)
    elif isinstance(values.get("rejected"), str):
        try:
            other, rejected = _transcript(values, "rejected")
        except Unusable:
            other = []
        if other != query:
            rejected = ""
    return Query("", Conversation(query), answer, rejected)


def imdb(values: Values, *, needs: str, words: tuple[int, int], seed: int, name: str, labelled: bool) -> Query:
    """Reads film reviews: the first words of `text` are the query, the others its completion.

    Args:
        words: fewest and most words of the query; the actual number depends on `seed` and `name` alone.
        name: the record's name.
        labelled: whether the data have labels. They are not used, but a record without its label is refused.

    Raises:
        Unusable: the text is missing, empty or too short, the label is missing, or a pair is needed.
    """
    text = _string(values, "text")
    label = values.get("label", None if labelled else 0)
    if label is None or label == "" or label != label:  # NaN
        raise Unusable("label", f": `label` is {'missing' if label is None else repr(label)}")
    found = _BREAK.sub(" ", " ".join(text.split())).split()
    if not found:
        raise Unusable("empty", ": `text` is empty; remove the line")
    low, high = words
    drawn = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")
    n = low + drawn % (high - low + 1)
    if len(found) <= n:
        raise Unusable("short", f": `text` has {len(found)} words, and the query takes {n}; nothing is left to complete")
    if needs == "pair":
        raise Unusable("pair", ": a review has no preference; take --config.task.format=hh, tldr or records")
    return Query("", " ".join(found[:n]), " " + " ".join(found[n:]))


def tldr(values: Values, *, needs: str) -> Query:
    """Reads Reddit posts and their summaries in every published layout.

    The layouts are `prompt` with `label`, `completion`, or `chosen` and `rejected`; comparisons with `info`, `summaries` and
    `choice`; and `subreddit`, `title`, `post` and `summary`. The query is written as in Stiennon et al. 2020,
    arXiv:2009.01325.

    Raises:
        Unusable: the post or what is needed of its summaries is missing.
    """
    post = values["info"] if isinstance(values.get("info"), Mapping) else values
    if "post" in post:
        parts = [_string(post, key).strip() for key in ("subreddit", "title", "post")]
        if not parts[2]:
            raise Unusable("empty", ": `post` is empty; remove the line")
        prompt = f"SUBREDDIT: r/{parts[0].removeprefix('r/')}\n\nTITLE: {parts[1]}\n\nPOST: {parts[2]}"
    else:
        prompt = _string(values, "prompt")
        if not without_tldr(prompt):
            raise Unusable("empty", ": `prompt` is empty; remove the line")
    prompt = f"{without_tldr(prompt)}\n\nTL;DR:"
    if "summaries" in values:
        chosen, rejected = _compared(values)
    else:
        chosen, rejected = _summaries(values, needs)
    return _text(prompt, chosen, rejected, needs)


def without_tldr(text: str) -> str:
    """Returns a post without "TL;DR:" at its end, however it is spelled and however often it is there."""
    while True:
        text = text.rstrip()
        if (found := _TLDR_AT_END.search(text, max(0, len(text) - 12))) is None:
            return text
        text = text[: found.start()]


def _compared(values: Values) -> tuple[str, str]:
    try:
        texts = [_summary(_string(summary, "text")) for summary in values["summaries"]]
    except (TypeError, AttributeError):
        texts = []
    choice = values.get("choice")
    if len(texts) != 2 or type(choice) is not int or choice not in (0, 1):
        raise Unusable("pair", f": `summaries` must be two and `choice` 0 or 1, not {len(texts)} and {choice!r}")
    return texts[choice], texts[1 - choice]


def _summaries(values: Values, needs: str) -> tuple[str, str]:
    if needs == "pair" or "chosen" in values:
        rejected = _string(values, "rejected") if needs == "pair" or "rejected" in values else ""
        return _summary(_string(values, "chosen")), _summary(rejected)
    key = next((key for key in ("label", "completion", "summary") if key in values), "completion")
    return _summary(_string(values, key)) if needs == "completion" or key in values else "", ""


def _summary(text: str) -> str:
    text = text[found.end() :] if (found := _TLDR_AT_START.match(text)) else text
    return f" {text.strip()}" if text.strip() else ""


def _preference(values: Values, needs: str) -> Query:
    chosen = _column(values, "chosen")
    rejected = _column(values, "rejected") if needs == "pair" or "rejected" in values else ""
    if isinstance(chosen, str) and isinstance(rejected, str):
        if "prompt" not in values:
            transcripts = any(turn["role"] == "assistant" for turn in parse(chosen))
            return hh(values, needs=needs) if transcripts else _common(chosen, rejected, needs)
        prompt = _column(values, "prompt")
        if isinstance(prompt, str):
            return _text(prompt, chosen, rejected, needs)
        return _conversation(_asked(prompt), chosen, rejected, values, needs)
    before = _asked(_column(values, "prompt")) if "prompt" in values else []
    query, answer = _answered(before, values, "chosen")
    if needs != "pair" and not rejected:
        return _conversation(query, answer, "", values, needs)
    other, worse = _answered(before, values, "rejected")
    if other != query and needs == "pair":
        raise Unusable("different queries", ": `chosen` and `rejected` answer different queries")
    return _conversation(query, answer, worse if other == query else "", values, needs)


def _answered(before: list[Message], values: Values, key: str) -> tuple[list[Message], str]:
    """Returns the turns before the last one, and what the last one says.

    Args:
        before: the turns of the prompt.
        key: the column of the answer, a text or turns.

    Raises:
        Unusable: the turns do not end with the assistant's.
    """
    if isinstance(_column(values, key), str):
        return before, _string(values, key)
    turns = _joined(before, _turns(values, key), key, exact=not isinstance(values.get("prompt"), str))
    if turns[-1]["role"] != "assistant":
        raise Unusable("turns", f": `{key}` does not end with the assistant's turn; there is no answer")
    return turns[:-1], _answer(turns[-1])


def _joined(before: list[Message], turns: list[Message], key: str, *, exact: bool) -> list[Message]:
    """Joins a prompt's turns and the `turns` of an answer to the whole conversation.

    `turns` may continue where the prompt ends, begin with what the prompt ends with, or hold the whole conversation.

    Args:
        exact: whether the prompt's column holds turns; a text there may be another spelling of what `turns` begin with.

    Raises:
        Unusable: with `exact`, the prompt ends with the user's turn and `turns` begin with another one.
    """
    if not before or turns[0]["role"] == "assistant":
        return before + turns
    asked, told = ([(turn["role"], turn["content"].strip()) for turn in part] for part in (before, turns))
    for n in range(len(asked), 0, -1):
        if asked[-n:] == told[:n]:
            return before + turns[n:]
    if any(told[i : i + len(asked)] == asked for i in range(len(told))):  # behind a system turn of its own
        return turns
    if before[-1]["role"] != "user":
        return before + turns
    if exact:
        raise Unusable("turns", f": `prompt` ends with the user's turn, and `{key}` begins with another one")
    return turns


def _answer(message: Message) -> str:
    """Returns what an assistant's turn says, as an `Answer` with the whole turn if there is more in it than text."""
    whole = {**message, "content": message["content"].strip()}
    more = any(value for key, value in whole.items() if key not in ("role", "content"))
    return Answer(whole) if more else whole["content"]


def _common(chosen: str, rejected: str, needs: str) -> Query:
    """Makes a query of two texts that have no prompt of their own: the prompt is the words that both begin with.

    Raises:
        Unusable: they begin with nothing in common.
    """
    n = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    while n and not (chosen[n : n + 1].isspace() and rejected[n : n + 1].isspace()):
        n -= 1
    if not chosen[:n].strip():
        raise Unusable("empty", ": `chosen` and `rejected` begin with nothing in common, and there is no `prompt`")
    return _text(chosen[:n], chosen[n:], rejected[n:], needs)


def _text(prompt: str, answer: str, rejected: str, needs: str) -> Query:
    if not prompt.strip():
        raise Unusable("empty", ": `prompt` is empty; remove the line")
    _check(answer, rejected, needs)
    return Query("", prompt, answer, rejected)


def _conversation(turns: list[Message], answer: str, rejected: str, values: Values, needs: str) -> Query:
    if not turns or not turns[-1]["content"].strip():
        raise Unusable("empty", ": the query is empty; remove the line")
    if turns[-1]["role"] == "assistant":
        raise Unusable("turns", ": the query ends with the assistant's turn; there must be one to answer")
    answer, rejected = (one if isinstance(one, Answer) else one.strip() for one in (answer, rejected))
    _check(answer, rejected, needs)
    return Query("", Conversation(turns, _tools(values)), answer, rejected)


def _check(answer: str, rejected: str, needs: str) -> None:
    if needs != "prompt" and _empty(answer):
        raise Unusable("empty", ": the answer is empty; remove the line")
    if needs == "pair":
        _check_pair(answer, rejected)


def _check_pair(answer: str, rejected: str) -> None:
    if _empty(rejected):
        raise Unusable("empty", ": the rejected answer is empty; remove the line")
    one, other = ({**turn_of(said), "content": said.strip()} for said in (answer, rejected))
    if one == other:
        raise Unusable("pair", ": `chosen` and `rejected` are the same; remove the line")


def _empty(answer: str) -> bool:
    return not answer.strip() and not turn_of(answer).get("tool_calls")


def _transcript(values: Values, key: str) -> tuple[list[Message], str]:
    """Returns the turns of a transcript before the last one, and what the last one says.

    Raises:
        Unusable: the transcript does not end with an answer of the assistant to something.
    """
    turns = merge(parse(_string(values, key)))
    if not any(turn["role"] == "assistant" for turn in turns):
        raise Unusable("turns", f": `{key}` has no assistant's turn (an empty line, and Assistant:); there is no answer")
    if turns[-1]["role"] != "assistant":
        raise Unusable("turns", f": `{key}` does not end with the assistant's turn; there is no answer")
    if not turns[-1]["content"]:
        raise Unusable("empty", f": the last answer of `{key}` is empty; remove the line")
    if len(turns) < 2 or not turns[-2]["content"]:
        raise Unusable("empty", f": `{key}` has nothing that is answered; remove the line")
    return turns[:-1], turns[-1]["content"]


def _column(values: Values, key: str) -> Any:
    """Returns a column that is a text or a list.

    Raises:
        Unusable: there is no such column, or it is of another type.
    """
    if key not in values:
        raise Unusable("column", f" has no `{key}`, only {', '.join(values) or 'nothing'}; rename the column")
    if not isinstance(values[key], str | list):
        raise Unusable("type", f": `{key}` is a {type(values[key]).__name__}, not a text")
    return values[key]


def _string(values: Values, key: str) -> str:
    value = _column(values, key)
    if not isinstance(value, str):
        raise Unusable("type", f": `{key}` is a {type(value).__name__}, not a text")
    return value


def _asked(prompt: str | list[Any]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _turns({"prompt": prompt}, "prompt")


def _turns(values: Values, key: str) -> list[Message]:
    """Returns a column of turns, without values that are None, and with every content as one text.

    Raises:
        Unusable: the column does not hold turns, or a content is not text.
    """
    column = _column(values, key)
    if isinstance(column, str) or not column:
        raise Unusable("turns", f": `{key}` is {'a text' if column else 'empty'}, not a list of turns")
    turns: list[Message] = []
    for i, turn in enumerate(column):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise Unusable("turns", f": turn {i} of `{key}` is {str(turn)[:60]!r}, not an object with `role` and `content`")
        content = turn.get("content")
        if isinstance(content, list):
            texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
            content = "".join(texts) if len(texts) == len(content) else content  # there are also images
        elif content is None and turn.get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            raise Unusable("type", f": `content` of turn {i} of `{key}` is {str(content)[:60]!r}, not a text")
        if not turn.get("tool_calls"):  # an empty list calls nothing, and some templates ask only whether there is one
            turn = {key: value for key, value in turn.items() if key != "tool_calls"}
        role = "system" if turn["role"] == "developer" else turn["role"]  # OpenAI's name; many templates skip one they lack
        turns.append(_without_nulls(turn) | {"role": role, "content": content})
    return turns


def _without_nulls(value: Any) -> Any:
    """Removes the entries of mappings that are None, at any depth.

    Tables write None for what only other rows have.
    """
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _tools(values: Values) -> Sequence[Mapping[str, Any]]:
    tools = _without_nulls(values.get("tools"))
    if isinstance(tools, str):  # tables hold them as JSON, for they differ from row to row
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise Unusable("tools", f": `tools` is not JSON ({error})") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Unusable("tools", f": `tools` is {str(tools)[:60]!r}, not a list of objects")
    return tools or ()


def shorten(prompt: str, fits: Callable[[str], bool]) -> str | None:
    """Shortens a query of format=tldr to as much of its post as fits; returns None if not even one word fits.

    As in Stiennon et al. (2020, arXiv:2009.01325), the post is cut at the end of the last line that fits; if not even the
    first line fits, at the end of a sentence, and else of a word. Subreddit, title and "TL;DR:" stay.

    Args:
        fits: says whether a text is short enough; if one is, all shorter ones must be.
    """
    if fits(prompt):
        return prompt
    body = without_tldr(prompt)
    begins = found.end() if (found := re.search(r"^POST:\s*", body, re.MULTILINE)) else 0

    def cut(end: int) -> str:
        return f"{body[:end].rstrip()}\n\nTL;DR:"

    for pattern in (r"\n", r"(?<=[.!?])\s", r"\s"):  # from the coarsest
        ends = [m.start() for m in re.finditer(pattern, body) if m.start() > begins] + [len(body)]
        n = bisect_left(ends, True, key=lambda end: not fits(cut(end)))
        if n and ends[n - 1] > begins:
            return cut(ends[n - 1])
    return None
