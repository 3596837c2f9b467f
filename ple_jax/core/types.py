"""The types that all of the project shares: queries, responses, rollouts, batches, the contracts (Loss, Reward, Backend)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float32, Int32

Array = Any  # a jax, torch or numpy array: the losses are written once for all three
Message = Mapping[str, Any]  # {"role": ..., "content": ...}; what else it holds (tool_calls ...) is the template's business


class Query(NamedTuple):
    """One record of a task.

    `prompt` is what the policy sees: plain text, or a `conversation.Conversation` if it has turns. `completion` is a
    reference answer if there is one; of a preference pair it is the chosen answer, and `rejected` the other.
    """

    id: str
    prompt: str
    completion: str = ""
    rejected: str = ""
    record: Mapping[str, Any] = {}  # what the rewards read of it, by name (`Reward.reads`); plain values


class Slot(NamedTuple):
    """One response that an algorithm asks for: its kind, whether the principles are in the prompt, and its number."""

    kind: str
    principled: bool = False
    sample: int = 0
    source: str = "policy"  # or of the record: completion, rejected; those are not sampled


class Response(NamedTuple):
    """A response as sampled token ids, never re-tokenised. EOS is the last of them only if it was sampled (`finished`)."""

    tokens: tuple[int, ...]
    finished: bool
    kind: str = "plain"
    sample: int = 0
    text: str = ""  # decoded without special tokens, of a reasoning model the answer alone: what the reward sees
    reward: float = float("nan")  # as the reward gave it; nan until it did, or where it gave nothing finite
    score: float = float("nan")  # transformed reward: what selection and weights use
    weight: float = float("nan")  # weight in the blended loss
    parts: Mapping[str, float] = {}  # a combined reward's components, as they were given
    principled: bool = False  # of the slot that asked for it: whether the principles were in the prompt
    source: str = "policy"  # of that slot too: who gave it, the policy or the record
    logprobs: tuple[float, ...] = ()  # of every token, nats, as the sampler had them; empty where it gave none
    noise: str = ""  # a digest of what it was drawn with; empty where nothing was drawn here

    @property
    def own(self) -> bool:
        """Whether the policy gave the response to the plain prompt. A KL estimate may only be made from such responses."""
        return self.source == "policy" and not self.principled


class Rollout(NamedTuple):
    """A query with its responses and what was decided about them: one line of rollouts/iter_NNNN.jsonl."""

    query_id: str
    prompt: str
    prompt_tokens: tuple[int, ...]  # of the plain prompt: the one that training conditions on
    responses: tuple[Response, ...]
    tau: float = float("nan")
    margin: float = float("nan")
    decision: str = ""  # "ranked", "blended"; other algorithms use words of their own
    record: Mapping[str, Any] = {}  # of the query


class Sampling(NamedTuple):
    """The settings of sampling. A temperature of 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    max_new_tokens: int
    eos: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Batch(NamedTuple):
    """A batch of one row per query, with K responses each (PLE 2, DPO 2, SFT 1, GRPO n).

    It says what to train on; the backend decides how.
    """

    prompt: Int32[np.ndarray, "query prompt_len"]  # left-padded
    prompt_mask: Bool[np.ndarray, "query prompt_len"]
    response: Int32[np.ndarray, "query k response_len"]  # right-padded
    response_mask: Bool[np.ndarray, "query k response_len"]
    data: dict[str, np.ndarray]  # [query] or [query, k, ...]; "valid" is 0 on rows that only fill the shape


class Packed(NamedTuple):
    """Rows of queries [prompt | response 1 | ... | response K] one after another, without padding between them.

    They are made from a Batch by `core.packing.pack`, on the host. All devices have equal parts of the rows and of the
    queries. A place is an index among all tokens of a device's rows; one that stands for no token is outside of them, and
    never the same twice.
    """

    tokens: Array  # "row time"
    positions: Array  # "row time": every response's are those after the prompt
    query: Array  # "row time": whose token it is, -1 in the padding
    response: Array  # "row time": of which response, 1 to K, or 0 in the prompt
    last: Array  # " query": place of the prompt's last token, which predicts every response's first one
    ends: Array  # "query k": place of every response's last token
    before: Array  # "device later": places of the tokens that predict the later ones
    targets: Array  # "device query*k+later": what is predicted, first tokens of all responses before the later ones
    places: Array  # "query k response_len": of every response token among what is predicted on its device
    number: Array  # "row time": of every token among all of its batch: dropout's noise is of it, wherever it lies
    used: Array  # "": how much of `targets` is read, on the device that reads most
    total: Array  # "": tokens of the batch


class Outputs(NamedTuple):
    """What a model computes of a batch, in float32: the backend's arrays inside a loss, numpy arrays outside."""

    logprobs: Array  # "query k response_len", of the response tokens alone; 0 where masked, and of who only fills the shape
    entropy: Array | None = None  # the same shape
    values: Array | None = None  # the same shape, where an algorithm asks for a value head
    scores: Array | None = None  # "query k": a reward model's head at the last token of every response


class Compiled(NamedTuple):
    """The number of programs that a backend has compiled since its process began, and the seconds that took."""

    programs: int
    seconds: float


Loss = Callable[[Outputs, Batch], tuple[Array, dict[str, Array]]]  # value per query, metrics per query
Sink = Callable[[dict[str, float], int], None]  # (metrics, step)
Tell = Callable[[dict[int, Response]], None]  # of responses that have ended, by the number of their request


@dataclass(frozen=True)
class Reward:
    """What the method optimises: a function (prompts, responses) -> one float each, with a name and a scale.

    A prompt is the plain one, whatever the response was sampled from; if it has turns it is a `conversation.Conversation`,
    which reads as their transcript. The fields of the record that it `reads` are passed by name, a value for each response:
    (prompts, responses, completion=[...]).
    """

    name: str
    score: Callable[..., Sequence[float]] | None = None  # None: the combination of `parts`
    version: str = "1"  # another one wherever equal texts may get other values: stored values go by name and version
    scale: tuple[float, float] = (-math.inf, math.inf)  # lowest and highest value
    batch: int = 64  # responses of one call; what finished calls gave is kept when a later one fails
    reads: tuple[str, ...] = ()  # of the record: `completion`, its own answer, `rejected`, or a column of the data
    # why answers to a prompt cannot be scored, "" where they can; it is told what the reward reads too, by name
    refuses: Callable[..., str] | None = None
    parts: Mapping[str, "Reward"] = field(default_factory=dict)
    combine: Callable[[Mapping[str, np.ndarray]], np.ndarray] | None = None  # float64 [n] of every part -> float64 [n]
    # of a reward that a server computes: it may be asked while this process samples, and this ends what it is asked then
    cancel: Callable[[], None] | None = None
    failure: Callable[[], str] = str  # why the newest value that is missing is, where the reward knows; else nothing


class Tokenizer(Protocol):
    """What the project needs of a tokenizer; transformers' PreTrainedTokenizerFast has all of it."""

    eos_token_id: int | None
    bos_token_id: int | None
    pad_token_id: int | None
    chat_template: str | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...
    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, **variables: Any
    ) -> Any: ...


class Backend(Protocol):
    """The holder of the weights, which samples responses and takes optimiser steps. There is one per framework."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: Float32[np.ndarray, "row max_new"],
        *,
        sampling: Sampling,
        prefix: Sequence[int] = (),
        known: Mapping[int, Response] | None = None,
        tell: Tell | None = None,
    ) -> list[Response]:
        """Samples one response per prompt.

        Args:
            uniforms: the noise of each response, in [0, 1), as `core.noise` makes it.
            prefix: tokens that many of the prompts begin with, and that are computed once.
            known: responses by the number of their prompt, which are not sampled again.
            tell: called with responses as they end, in whatever order, and now and then with none; an error that it raises
                ends the sampling.
        """
        ...

    def stream(
        self,
        prompt: Sequence[int],
        uniforms: Float32[np.ndarray, " max_new"],
        *,
        sampling: Sampling,
        base: bool = False,
    ) -> Iterator[int]:
        """Yields the tokens of one response as they are sampled, EOS included.

        With `base`, they are sampled from the base model without the adapter.
        """
        ...

    def logprobs(
        self,
        batch: Batch,
        *,
        reference: bool = False,
        base: bool = False,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> Outputs:
        """Computes the log-probabilities, in nats, of a batch's responses, as numpy arrays.

        They are those of the policy, the frozen `reference`, or the bare `base`. With them come the values of the policy's
        head, if it has one, and the `entropy` if it is asked for: it is a second pass over the vocabulary. The logits are
        divided by `temperature`, above 0.
        """
        ...

    def scores(self, batch: Batch) -> Float32[np.ndarray, "query k"]:
        """Computes the trained head's score of every response, as numpy; for algorithms that train such a head."""
        ...

    def update(self, batches: Sequence[Batch], loss: Loss, *, lr: float, temperature: float = 1.0) -> dict[str, float]:
        """Takes one optimiser step on the mean loss over all rows of `batches`.

        Returns the means of their metrics, and `grad_norm`. The logits are divided by `temperature`, above 0, in all that
        the loss is given.
        """
        ...

    def freeze_reference(self) -> None:
        """Makes the policy as it is now the reference, and resets the optimiser's state to that at the start of a run."""
        ...

    def profile(self, folder: Path) -> AbstractContextManager[None]:
        """Returns a context in which all work is traced; when it ends, the framework's own profile is in the folder."""
        ...

    def adapter(self) -> dict[str, np.ndarray]:
        """Returns the adapter, and the head if there is one, under PEFT's names and in its layout."""
        ...

    def save(self, path: Path, step: int, meta: dict[str, Any], *, keep: int) -> None:
        """Commits all that training needs to go on, and `meta`; on return it is on disk. The newest `keep` commits stay."""
        ...

    def restore(self, path: Path) -> dict[str, Any] | None:
        """Loads the newest commit under `path` and returns its meta; None if there is none.

        Raises:
            Damaged: the commit is not as it was written.
            UserError: the commit does not fit this model and adapter.
        """
        ...

    def environment(self) -> dict[str, Any]:
        """Returns versions, devices and flags: what bit-identical results depend on."""
        ...

    def compiled(self) -> Compiled:
        """Returns how many programs were compiled, or read from a cache, since the process began, and the seconds that took.

        Both are 0 for a backend that compiles nothing.
        """
        ...
