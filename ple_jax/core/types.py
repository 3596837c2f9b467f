"""The words the whole project speaks: queries, responses, rollouts, batches, and the contracts (Loss, Reward, Backend)."""

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

    `prompt` is what the policy sees: plain text, or a `conversation.Conversation` where it has turns. `completion` is a
    reference answer where there is one, of a preference pair the chosen one, and `rejected` the other.
    """

    id: str
    prompt: str
    completion: str = ""
    rejected: str = ""
    record: Mapping[str, Any] = {}  # what the rewards read of it, by name (`Reward.reads`); plain values


class Slot(NamedTuple):
    """One response an algorithm asks for: the kind's name, whether the principles are in the prompt, its number."""

    kind: str
    principled: bool = False
    sample: int = 0
    source: str = "policy"  # or of the record: completion, rejected; those are not sampled


class Response(NamedTuple):
    """Sampled token ids, never re-tokenised. EOS is the last of them only if it was sampled (`finished`)."""

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
        """Whether the policy gave it to the plain prompt: what a KL estimate may be made from."""
        return self.source == "policy" and not self.principled


class Rollout(NamedTuple):
    """A query with its responses and what was decided about them. One line of rollouts/iter_NNNN.jsonl."""

    query_id: str
    prompt: str
    prompt_tokens: tuple[int, ...]  # of the plain prompt: the one that training conditions on
    responses: tuple[Response, ...]
    tau: float = float("nan")
    margin: float = float("nan")
    decision: str = ""  # "ranked", "blended"; other algorithms use words of their own
    record: Mapping[str, Any] = {}  # of the query


class Sampling(NamedTuple):
    """How to sample. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    max_new_tokens: int
    eos: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Batch(NamedTuple):
    """One row a query, K responses each (PLE 2, DPO 2, SFT 1, GRPO n). It says what to train on; the backend decides how."""

    prompt: Int32[np.ndarray, "query prompt_len"]  # left-padded
    prompt_mask: Bool[np.ndarray, "query prompt_len"]
    response: Int32[np.ndarray, "query k response_len"]  # right-padded
    response_mask: Bool[np.ndarray, "query k response_len"]
    data: dict[str, np.ndarray]  # [query] or [query, k, ...]; "valid" is 0 on rows that only fill the shape


class Packed(NamedTuple):
    """Rows of queries [prompt | response 1 | ... | response K] one after another, without padding between them.

    Made by `core.packing.pack`, of a Batch, on the host. Devices have equal parts of the rows and of the queries, and a
    place is one among all tokens of the device's rows; where no token is meant it is outside, and never twice the same.
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
    """What a model says of a batch: the backend's arrays inside a loss, numpy outside; fp32."""

    logprobs: Array  # "query k response_len", of the response tokens alone; 0 where masked, and of who only fills the shape
    entropy: Array | None = None  # the same shape
    values: Array | None = None  # the same shape, where an algorithm asks for a value head
    scores: Array | None = None  # "query k": a reward model's head at the last token of every response


class Compiled(NamedTuple):
    """What a backend has compiled since its process began."""

    programs: int
    seconds: float


Loss = Callable[[Outputs, Batch], tuple[Array, dict[str, Array]]]  # value per query, metrics per query
Sink = Callable[[dict[str, float], int], None]  # (metrics, step)
Tell = Callable[[dict[int, Response]], None]  # of responses that have ended, by the number of their request


@dataclass(frozen=True)
class Reward:
    """What the method optimises: (prompts, responses) -> one float each, with a name and a scale.

    A prompt is the plain one, whatever the response was sampled from; where it has turns it is a
    `conversation.Conversation`, which reads as their transcript. What it `reads` of the record comes by name, a value for
    each response: (prompts, responses, completion=[...]).
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
    """What the project needs of a tokenizer (transformers' PreTrainedTokenizerFast has it)."""

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
    """Knows how to sample and how to step; holds the weights. One per framework."""

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
            prefix: what many of the prompts begin with, which is computed once.
            known: responses by the number of their prompt, which are not sampled again.
            tell: told of responses as they end, in whatever order, and now and then with none; what it raises ends all.
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
        """The tokens of one response as they are sampled, EOS included; of the base without the adapter, if `base`."""
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
        """Log-probabilities of a batch, as numpy; of the policy, the frozen reference, or the bare base.

        With the values of the policy's head, where there is one, and the entropy where it is asked for: it is a second pass
        over the vocabulary. The logits are divided by `temperature`, above 0.
        """
        ...

    def scores(self, batch: Batch) -> Float32[np.ndarray, "query k"]:
        """What the head says of every response, as numpy; for algorithms that train one."""
        ...

    def update(self, batches: Sequence[Batch], loss: Loss, *, lr: float, temperature: float = 1.0) -> dict[str, float]:
        """One optimizer step on the mean over all rows of `batches`; their metrics' means, and `grad_norm`.

        The logits are divided by `temperature`, above 0, in all that the loss is told.
        """
        ...

    def freeze_reference(self) -> None:
        """The policy as it is now becomes the reference, and the optimiser's state is as at the start of a run."""
        ...

    def profile(self, folder: Path) -> AbstractContextManager[None]:
        """A context whose work is traced: the framework's own profile is in the folder when it ends."""
        ...

    def adapter(self) -> dict[str, np.ndarray]:
        """The adapter, and the head where there is one, under PEFT's names and in its layout."""
        ...

    def save(self, path: Path, step: int, meta: dict[str, Any], *, keep: int) -> None:
        """Commits everything that training needs to go on, and `meta`; on return it is on disk."""
        ...

    def restore(self, path: Path) -> dict[str, Any] | None:
        """Loads the newest commit under `path` and returns its meta; None if there is none."""
        ...

    def environment(self) -> dict[str, Any]:
        """Versions, devices and flags: what bit-identical results depend on."""
        ...

    def compiled(self) -> Compiled:
        """Programs compiled, or read from a cache, since the process began, and seconds that took; 0 where nothing is."""
        ...
