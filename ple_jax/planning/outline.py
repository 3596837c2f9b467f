"""The outline of a run, for a plan of devices that are not there: the model's shapes and the data's lengths, but no weights.

JAX's and torch's `topology.py` both start from it.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from ml_collections import ConfigDict

from ple_jax import prompts
from ple_jax.algorithms import Algorithm, Context, given_sources
from ple_jax.core.batches import bucket
from ple_jax.core.config import PACKAGE, PUBLISHED
from ple_jax.core.errors import Unusable, UserError
from ple_jax.core.refill import Shape, read_as
from ple_jax.core.types import Batch, Query, Response, Rollout, Slot, Tokenizer
from ple_jax.data.mixture import format_of
from ple_jax.models import families, hub, weights
from ple_jax.models import tokenizer as tokenizers
from ple_jax.models.config import ModelConfig

T = TypeVar("T")
FULL = 0.9  # of a device's memory; the rest is left to what is not counted
SHAPES = PACKAGE / "models" / "published"  # the config.json of well-known models, by name


class Source(NamedTuple):
    """The parts of a model that planning reads: its config and its tokenizer, never its weights."""

    config: ModelConfig
    raw: Mapping[str, Any]  # its config.json
    tokenizer: Tokenizer | None
    eos: tuple[int, ...]


def read_source(path: str, revision: str | None = None) -> Source:
    """Reads the config and the tokenizer of a model.

    Args:
        path: a folder in which a config.json is enough, the name of a published model, whose config.json comes with this
            package, or any model that can be trained.
        revision: the commit of a model from the hub.
    """
    named = SHAPES / f"{path}.json"
    folder = hub.fetch(path, revision, weights=False) if hub.is_remote(path) else Path(path)
    if path not in PUBLISHED and not folder.is_dir():
        loaded = weights.load(path)
        return Source(loaded.config, loaded.raw, loaded.tokenizer, loaded.eos)
    file = folder / "config.json" if folder.is_dir() else named
    raw = weights.read_json(file)
    config = families.read(raw, str(file))
    if (folder / "tokenizer.json").is_file():
        tokenizer = weights.tokenizer_of(folder, config.vocab_size)
        ends = tokenizers.eos_ids(tokenizer, raw)
        weights.check_ids(tokenizer, ends, config.vocab_size, str(folder))
        return Source(config, raw, tokenizer, ends)
    eos = raw.get("eos_token_id") or 0
    return Source(config, raw, None, tuple(eos) if isinstance(eos, list) else (eos,))


class Lengths(NamedTuple):
    """The lengths, in tokens, of the arrays that a run is made of."""

    prefix: int  # shared by all principled prompts
    sampled: int  # of a prompt to sample from, without the prefix
    trained: int  # of a prompt to train on
    new: int  # of a sampled response
    answer: int = 0  # of an answer of the records, where those are trained on
    positions: int = 0  # of the longest prompt, not padded, and its response


def lengths(
    config: ConfigDict,
    tokenizer: Tokenizer | None,
    train_set: Sequence[Query],
    heldout: Sequence[Query],
    principles: str,
    sources: Sequence[str] = (),
) -> Lengths:
    """Finds the longest prompts, as they are padded, and the longest answer of the data.

    Without a tokenizer they are the longest that the config allows, and there is no shared prefix.

    Args:
        sources: which of a record's own answers are trained on: "completion", "rejected".
    """
    smallest, new = config.sampling.bucket, config.sampling.max_new_tokens
    if tokenizer is None:
        longest, answer = config.task.max_prompt_tokens, config.task.max_answer_tokens if sources else 0
        return Lengths(0, read_as(longest, smallest), bucket(longest, smallest), new, answer, longest + new)
    form, limit = {"chat": config.task.chat, "thinking": config.task.thinking}, config.task.max_prompt_tokens

    def ids(queries: Iterable[Query], text: str | None) -> Iterator[list[int]]:
        return _usable(queries, lambda q: prompts.render(q, text, tokenizer, **form)[1])

    def size(query: Query) -> tuple[int, int]:  # of its plain and its principled prompt, cut as the run cuts them
        plain, guided = (len(prompts.render(query, text, tokenizer, **form)[1]) for text in (None, principles or None))
        if plain > limit and format_of(config.task, query.id) != "tldr":
            raise Unusable("over-long", "")
        return min(plain, limit), guided - max(0, plain - limit)

    def own(query: Query) -> int:
        said = ({"completion": query.completion, "rejected": query.rejected}[source] for source in sources)
        return max(len(prompts.given(query.prompt, text, tokenizer, stops=(), **form).tokens) + 1 for text in said)

    answer = min(max(_usable(train_set, own), default=0), config.task.max_answer_tokens) if sources else 0
    plain, guided = map(max, zip((1, 1), *_usable(itertools.chain(train_set, heldout), size), strict=True))
    some = list(ids(heldout[:64], principles or None))  # none, where the base has no chat template
    prefix = len(prompts.common_prefix(some)) if len(some) > 1 else 0
    sampled = read_as(max(plain, guided - prefix), smallest)
    return Lengths(prefix, sampled, bucket(plain, smallest), new, answer, max(plain, guided) + new)


def lengths_of(
    config: ConfigDict,
    source: Source,
    algorithm: Algorithm,
    train_set: Sequence[Query],
    heldout: Sequence[Query],
    principles: str,
) -> Lengths:
    """Finds the `lengths` of an algorithm's run, and checks that the model has positions for them.

    Raises:
        UserError: as `check_positions`.
    """
    own = given_sources(algorithm.collect(config))
    sizes = lengths(config, source.tokenizer, train_set, heldout, principles, own)
    return check_positions(config, sizes, source.config)


def _usable(queries: Iterable[Query], make: Callable[[Query], T]) -> Iterator[T]:
    """Yields what `make` returns for each of the queries, without those that the run will leave out."""
    for query in queries:
        with contextlib.suppress(Unusable):
            yield make(query)


def check_positions(config: ConfigDict, sizes: Lengths, model: ModelConfig) -> Lengths:
    """Returns the lengths with an answer that the model has positions for; records with a longer one are not trained on.

    Raises:
        UserError: if the longest row that is sampled needs more positions than the model has.
    """
    if sizes.positions > model.max_positions:
        raise UserError(
            f"{sizes.positions} positions are needed and {config.model.path} has {model.max_positions};"
            " lower --config.task.max_prompt_tokens or --config.sampling.max_new_tokens"
        )
    room = model.max_positions - sizes.trained  # below 1 only if the prompt's padding needs no positions
    return sizes._replace(answer=min(sizes.answer, room if room > 0 else model.max_positions))


def reward_models(config: ConfigDict) -> Iterator[Mapping[str, Any]]:
    """Yields the arguments of every reward that is a model: the reward, the second one, and parts of combinations."""

    def models(name: str | None, kwargs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        if name == "model":
            yield kwargs
        for part in kwargs.get("parts", {}).values() if name == "combine" else ():
            yield from models(part.get("name"), part.get("kwargs", {}))

    yield from models(config.reward.name, config.reward.kwargs.to_dict())
    yield from models(config.eval.second_reward, config.eval.second_kwargs.to_dict())


def reward_folder(kwargs: Mapping[str, Any]) -> Path:
    """Returns the folder with the description of a reward model, given its arguments."""
    path = kwargs["path"]
    return hub.fetch(path, kwargs.get("revision"), weights=False) if hub.is_remote(path) else Path(path)


def with_numbers(config: ConfigDict, numbers: Mapping[str, int]) -> ConfigDict:
    """Returns the config with these numbers, by dotted keys, in the place of its own values, which may be "auto"."""
    changed = ConfigDict(config.to_dict())
    with changed.ignore_type():
        changed.update_from_flattened_dict(numbers)
    return changed


def reading(platform: str) -> int:
    """Returns the number of rows whose arithmetic takes as long as reading the weights once, which is the least that a
    decoding step costs.

    For a CPU it comes from steps of 16 and of 64 rows on two cores, for accelerators from what they multiply in a second for
    every byte that they read.
    """
    return 16 if platform == "cpu" else 256


def decoded_rows(config: ConfigDict, algorithm: Algorithm, sizes: Lengths, *, lanes: int = 1, multiple: int = 1) -> Shape:
    """Computes the shape of the rows that a run decodes at once, for its longest prompts.

    Args:
        lanes, multiple: as in `refill.sample`.
    """
    asked = Counter(slot.principled for slot in algorithm.collect(config) if slot.source == "policy")
    most, part = max([*asked.values(), config.eval.samples]), config.sampling.width // lanes
    # of fewer responses to a prompt more prompts are read at once
    mean = max(1, min(config.eval.samples, sum(asked.values()) // max(1, len(asked))))
    room, prefix = sizes.sampled + sizes.new, (0,) * sizes.prefix
    return Shape(config.sampling.width, lanes, multiple, min(part, most), min(part, mean), room, sizes.new, prefix)


def judged(config: ConfigDict, algorithm: Algorithm, sizes: Lengths) -> tuple[int, Lengths]:
    """Returns the size of the largest forward pass without gradients: its number of queries, and the lengths of its arrays.

    The pass is a whole optimiser batch where a loss compares with anything. With a teacher the prompts are the teacher's,
    which have the principles in them.
    """
    needs = algorithm.needs(config)
    compares = needs.reference or needs.old_logprobs or needs.teacher
    rows = max(config.eval.diagnostic_queries, config.optimizer.batch_queries * compares)
    guided = bucket(sizes.prefix + sizes.sampled, config.sampling.bucket)
    return rows, sizes._replace(trained=guided) if needs.teacher else sizes


def example_batch(config: ConfigDict, algorithm: Algorithm, rows: int, sizes: Lengths, vocab: int) -> Batch:
    """Makes a batch of `rows` queries with the longest prompts by the algorithm's own functions; log-probabilities are 0."""
    slots = algorithm.collect(config)

    def response(place: int, slot: Slot) -> Response:
        value = float(place)
        tokens = (1,) if slot.source == "policy" else (1,) * max(1, sizes.answer)
        said = Response(tokens, False, slot.kind, slot.sample, reward=value, score=value)
        return said._replace(principled=slot.principled, source=slot.source)

    made = [
        Rollout(str(i), "", (vocab - 1,) * sizes.trained, tuple(response(j, slot) for j, slot in enumerate(slots)))
        for i in range(rows)
    ]
    context = Context(config, tau=algorithm.schedule(config)(0), mean_length=1.0, controller=algorithm.controller(config))
    batch, needs = algorithm.batch(algorithm.label(made, context), context), algorithm.needs(config)
    compared = {
        "reference_logprobs": needs.reference,
        "teacher_logprobs": needs.teacher,
        "old_logprobs": needs.old_logprobs,
        "old_values": needs.head == "value",
        "sampler_logprobs": needs.old_logprobs and config.sampling.importance_cap > 0,
    }
    zeros = np.zeros(batch.response.shape, np.float32)
    batch.data.update({name: zeros for name, needed in compared.items() if needed})
    return algorithm.prepare(batch, context)
