"""From a raw record to a query: one function for each config.task.format. What cannot be one is `Unusable`, and says why."""

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
    """Neutral records, and those of TRL: texts or lists of turns.

    `prompt` with `chosen` and `rejected`, or with `completion`; `chosen` and `rejected` that begin with the prompt;
    `messages`, of which the last is the completion; `tools`. A text is continued verbatim, an answer to turns is stripped.
    """
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
    """Anthropic's HH: two transcripts. The query is all before the last answer; answers to different queries are no pair."""
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
    """Film reviews: the first words are the query, the others its completion.

    Args:
        words: fewest and most words of the query; how many it are depends on `seed` and `name` alone.
        name: the record's.
        labelled: whether the data have labels. They are not used, but a record that lacks its own is suspicious.
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
    """Reddit posts and their summaries, in every published layout; the query as in Stiennon et al. 2020, arXiv:2009.01325.

    `prompt` with `label`, `completion`, or `chosen` and `rejected`; comparisons with `info`, `summaries` and `choice`;
    `subreddit`, `title`, `post` and `summary`.
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
    """A post without "TL;DR:" at its end, however it is spelled there, and however often."""
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
    """The turns before the last, and what the last says."""
    if isinstance(_column(values, key), str):
        return before, _string(values, key)
    turns = _joined(before, _turns(values, key), key, exact=not isinstance(values.get("prompt"), str))
    if turns[-1]["role"] != "assistant":
        raise Unusable("turns", f": `{key}` does not end with the assistant's turn; there is no answer")
    return turns[:-1], _answer(turns[-1])


def _joined(before: list[Message], turns: list[Message], key: str, *, exact: bool) -> list[Message]:
    """The whole conversation: `turns` go on where the prompt ends, or begin with what it ends with, or hold all of it.

    Args:
        exact: whether the prompt's column holds turns; a text there may be another spelling of what `turns` begin with.
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
    """What an assistant's turn says, with all of the turn where there is more in it."""
    whole = {**message, "content": message["content"].strip()}
    more = any(value for key, value in whole.items() if key not in ("role", "content"))
    return Answer(whole) if more else whole["content"]


def _common(chosen: str, rejected: str, needs: str) -> Query:
    """Texts whose prompt is the words they begin with in common."""
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
    """The turns before the last, and what the last says."""
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
    """A text or a list."""
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
    """A column of turns: without what is None, and with contents as texts."""
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
        turns.append(_without_nulls(turn) | {"content": content})
    return turns


def _without_nulls(value: Any) -> Any:
    """Without the entries that are None, at any depth: tables write so what is in another row alone."""
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
    """A query of format=tldr with as much of its post as fits; None if not one word does.

    As Stiennon et al. (2020, arXiv:2009.01325): cut at the last line's end that fits; if not even the first line does, at a
    sentence's, and then at a word's. Subreddit, title and "TL;DR:" stay.

    Args:
        fits: whether a text is short enough; if it is, so are shorter ones.
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
