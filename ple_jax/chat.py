"""A conversation on the terminal with a run's adapter, with its base model, or with both."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ple_jax import prompts
from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import UserError, suggestion
from ple_jax.core.noise import CHAT, uniforms
from ple_jax.core.types import Query, Sampling, Tokenizer

_INCOMPLETE = 3  # bytes of a UTF-8 character that may have come without its last

HELP = """\
  /adapter  /base  /both   who answers; each keeps a conversation of its own
  /principles on|off       put the run's principles into the prompt
  /template on|off         turns in the tokenizer's chat template, or every line as plain text to be continued
  /temperature X           0 is greedy
  /max N                   longest answer, in tokens
  /reset                   forget the conversation
  /quit                    leave (or Ctrl-D); Ctrl-C stops an answer
"""


class Options(NamedTuple):
    """The settings of a conversation that its commands change."""

    voices: tuple[str, ...]  # of "adapter", "base", in the order in which they answer
    principles: bool
    template: bool


class Chat:
    """A conversation and its state. `run` is the loop; it reads from a terminal or from a pipe."""

    def __init__(
        self,
        stream: Callable[..., Iterator[int]],
        tokenizer: Tokenizer,
        *,
        sampling: Sampling,
        principles: str,
        context: int,
        seed: int,
        date: str = prompts.DATE,
        template: bool = True,
        thinking: bool = False,
        write: Callable[[str], object],
    ):
        """Starts a conversation with the adapter, without principles.

        Args:
            stream: `Backend.stream`, which yields the tokens of one response.
            sampling: how to sample at the beginning; commands change it.
            principles: the text that `/principles on` puts into the prompt.
            context: the number of tokens that the model takes, prompt and answer together.
            seed: of the sampling noise; the adapter and the base answer a line with the same noise.
            date: today's date (YYYY-MM-DD) for chat templates that ask for it: that of the run.
            template: whether lines are turns in the chat template, if the tokenizer has one; else they are plain text.
            thinking: passed to templates of reasoning models as `enable_thinking`, as in training.
            write: prints a text as it is, and shows it at once.
        """
        self.stream, self.tokenizer, self.sampling, self.write = stream, tokenizer, sampling, write
        self.principles, self.context, self.seed = principles, context, seed
        self.date, self.thinking = date, thinking
        self.options = Options(("adapter",), principles=False, template=template and tokenizer.chat_template is not None)
        self.asked = 0
        self.history: dict[str, list[dict[str, str]]] = {"adapter": [], "base": []}

    def run(self, read: Callable[[], str]) -> None:
        """Answers lines until `/quit` or the end of the input.

        Args:
            read: returns the next line, and raises EOFError at the end (as `input` does).
        """
        while True:
            try:
                line = read().strip()
            except EOFError:
                return self._end()
            except KeyboardInterrupt:  # of a line being typed
                self._end()
                continue
            if line == "/quit":
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.answer(line)

    def _end(self) -> None:
        self.write("\n")

    # ---------------------------------------------------------------- commands

    def command(self, line: str) -> None:
        """Carries out a line that begins with a slash; a mistake in it is answered with one line."""
        try:
            match line.split():
                case ["/help"]:
                    self.write(HELP)
                case ["/adapter"]:
                    self._set(voices=("adapter",))
                case ["/base"]:
                    self._set(voices=("base",))
                case ["/both"]:
                    self._set(voices=("base", "adapter"))
                case ["/principles", "on" | "off" as value]:
                    self._set(principles=value == "on")
                case ["/template", "on"] if self.tokenizer.chat_template is None:
                    self.write("this model's tokenizer has no chat template\n")
                case ["/template", "on" | "off" as value]:
                    self._set(template=value == "on")
                case ["/temperature", value]:
                    self._sample(temperature=_number(float, value, lambda x: x == 0 or 1e-6 <= x < float("inf")))
                case ["/max", value]:
                    self._sample(max_new_tokens=_number(int, value, lambda n: n >= 1))
                case ["/reset"]:
                    for turns in self.history.values():
                        turns.clear()
                    self.write("the conversation is forgotten\n")
                case [name, *_]:
                    known = [part for part in HELP.split() if part.startswith("/")]
                    mistyped = f"{line!r} is not how {name} goes; see /help\n"
                    self.write(mistyped if name in known else f"there is no {name}{suggestion(name, known)} (see /help)\n")
        except ValueError:
            self.write(f"{line!r}: that value is not possible; see /help\n")

    def _set(self, **change: Any) -> None:
        self.options = self.options._replace(**change)
        self.write(self.status())

    def _sample(self, **change: Any) -> None:
        self.sampling = self.sampling._replace(**change)
        self.write(self.status())

    def status(self) -> str:
        """Says in one line who answers and how."""
        on = {True: "on", False: "off"}
        voices, principles, template = self.options
        return (
            f"{' and '.join(voices)}; principles {on[principles]}, chat template {on[template]}, temperature"
            f" {self.sampling.temperature:g}, at most {self.sampling.max_new_tokens} tokens\n"
        )

    # ---------------------------------------------------------------- answers

    def answer(self, text: str) -> None:
        """Lets the adapter, the base or both answer a line.

        Ctrl-C ends the answer; what was said so far stays in the conversation.
        """
        self.asked += 1
        try:
            for voice in self.options.voices:
                if len(self.options.voices) > 1:
                    self.write(f"{voice}: ")
                self._say(voice, text)
        except UserError as error:
            self.write(f"{error}\n")
        except KeyboardInterrupt:
            self.write("(stopped)\n")

    def _say(self, voice: str, text: str) -> None:
        turns = [*self.history[voice], {"role": "user", "content": text}]
        tokens = self._render(turns)
        room = self.context - len(tokens)
        if room < 1:
            raise UserError(
                f"the conversation is {len(tokens)} tokens and the model takes {self.context}; /reset forgets it"
            )
        sampling = self.sampling._replace(max_new_tokens=min(self.sampling.max_new_tokens, room))
        noise = uniforms(self.seed, CHAT, str(self.asked), "chat", 0, sampling.max_new_tokens)
        said = ""
        try:
            for piece in pieces(self.stream(tokens, noise, sampling=sampling, base=voice == "base"), self.tokenizer):
                self.write(piece)
                said += piece
        finally:
            self._end()
            if self.options.template:
                self.history[voice] = [*turns, {"role": "assistant", "content": said}]

    def _render(self, turns: Sequence[dict[str, str]]) -> list[int]:
        """Returns the tokens of a conversation: all of it in the chat template, or the last line as text to be continued."""
        principles = self.principles if self.options.principles else None
        prompt = Conversation(turns) if self.options.template else turns[-1]["content"]
        query, chat = Query("chat", prompt), self.options.template
        return prompts.render(query, principles, self.tokenizer, chat=chat, thinking=self.thinking, date=self.date)[1]


def _number(kind: Callable[[str], Any], value: str, fits: Callable[[Any], bool]) -> Any:
    number = kind(value)
    if not fits(number):
        raise ValueError(value)
    return number


def pieces(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yields the text of tokens as they arrive, without special tokens.

    Bytes that are not yet a whole character are held back.
    """
    ids: list[int] = []
    shown, text = 0, ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        broken = len(text) - len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        settled = len(text) - min(broken, _INCOMPLETE)
        if settled > shown:
            yield text[shown:settled]
            shown = settled
    if text[shown:]:
        yield text[shown:]
