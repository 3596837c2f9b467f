"""What a plan for devices that are not there reads of a run: the shapes of the model, the lengths of the data, no weight.

Both `topology.py` start from it, JAX's and torch's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ple_jax import prompts
from ple_jax.algorithms import Algorithm, Context
from ple_jax.core.batches import bucket
from ple_jax.core.config import PACKAGE, PUBLISHED
from ple_jax.core.errors import UserError
from ple_jax.core.types import Batch, Query, Response, Rollout, Slot, Tokenizer
from ple_jax.models import families, hub, weights
from ple_jax.models import tokenizer as tokenizers
from ple_jax.models.config import ModelConfig

SHAPES = PACKAGE / "models" / "published"  # the config.json of well-known models, by name


class Source(NamedTuple):
    """What planning reads of a model: never a weight."""

    config: ModelConfig
    raw: Mapping[str, Any]  # its config.json
    tokenizer: Tokenizer | None
    eos: tuple[int, ...]


def read_source(path: str, revision: str | None = None) -> Source:
    """A folder in which a config.json is enough, a published model's shapes by name, or anything that can be trained."""
    named = SHAPES / f"{path}.json"
    folder = hub.fetch(path, revision, weights=False) if hub.is_remote(path) else Path(path)
    if path not in PUBLISHED and not folder.is_dir():
        loaded = weights.load(path)
        return Source(loaded.config, loaded.raw, loaded.tokenizer, loaded.eos)
    file = folder / "config.json" if folder.is_dir() else named
    raw = weights.read_json(file)
    config = families.read(raw, str(file))
    if (folder / "tokenizer.json").is_file():
        tokenizer = tokenizers.from_folder(folder)
        ends = tokenizers.eos_ids(tokenizer, raw)
        weights.check_ids(tokenizer, ends, config.vocab_size, str(folder))
        return Source(config, raw, tokenizer, ends)
    eos = raw.get("eos_token_id") or 0
    return Source(config, raw, None, tuple(eos) if isinstance(eos, list) else (eos,))


class Lengths(NamedTuple):
    """Tokens of the arrays that a run is made of."""

    prefix: int  # shared by all principled prompts
    sampled: int  # of a prompt to sample from, without the prefix
    trained: int  # of a prompt to train on
    new: int


def lengths(
    config: ConfigDict, tokenizer: Tokenizer | None, train_set: Sequence[Query], heldout: Sequence[Query], principles: str
) -> Lengths:
    """The longest of the data; without a tokenizer the longest that the config allows, and no shared prefix."""
    smallest, new = config.sampling.bucket, config.sampling.max_new_tokens
    if tokenizer is None:
        longest = bucket(config.task.max_prompt_tokens, smallest)
        return Lengths(0, longest, longest, new)

    def ids(queries: Sequence[Query], text: str | None) -> list[list[int]]:
        form = {"chat": config.task.chat, "thinking": config.task.thinking}
        return [prompts.render(q, text, tokenizer, **form)[1] for q in queries]

    plain = max(map(len, ids([*train_set, *heldout], None)))
    prefix = len(prompts.common_prefix(ids(heldout[:64], principles))) if len(heldout) > 1 else 0
    rest = max(map(len, ids([*train_set, *heldout], principles))) - prefix
    return Lengths(prefix, bucket(max(plain, rest), smallest), bucket(plain, smallest), new)


def check_positions(config: ConfigDict, sizes: Lengths, model: ModelConfig) -> None:
    """Raises a UserError if the longest row needs more positions than the model has."""
    if (longest := sizes.prefix + sizes.sampled + sizes.new) > model.max_positions:
        raise UserError(
            f"{longest} positions are needed and {config.model.path} has {model.max_positions};"
            " lower --config.task.max_prompt_tokens or --config.sampling.max_new_tokens"
        )


def judged(config: ConfigDict, algorithm: Algorithm, sizes: Lengths) -> tuple[int, Lengths]:
    """Queries of the largest forward pass without gradients, and sizes whose trained prompts are those of that pass.

    It is of a whole optimiser batch where a loss compares with anything; a teacher's prompts have the principles in them.
    """
    needs = algorithm.needs(config)
    compares = needs.reference or needs.old_logprobs or needs.teacher
    rows = max(config.eval.diagnostic_queries, config.optimizer.batch_queries * compares)
    guided = bucket(sizes.prefix + sizes.sampled, config.sampling.bucket)
    return rows, sizes._replace(trained=guided) if needs.teacher else sizes


def example_batch(config: ConfigDict, algorithm: Algorithm, rows: int, sizes: Lengths, vocab: int) -> Batch:
    """A batch of the algorithm's own making, of `rows` queries with the longest prompts."""
    slots = algorithm.collect(config)

    def response(place: int, slot: Slot) -> Response:
        value = float(place)
        said = Response((1,), False, slot.kind, slot.sample, reward=value, score=value)
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
    }
    zeros = np.zeros(batch.response.shape, np.float32)
    batch.data.update({name: zeros for name, needed in compared.items() if needed})
    return algorithm.prepare(batch, context)
