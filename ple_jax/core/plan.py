"""What a run would do, in words and numbers: the text of `--mode=plan`."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ple_jax.core import prompts
from ple_jax.core.rollouts import bucket
from ple_jax.core.types import Query, Slot, Tokenizer

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_WORDS = {False: "plain", True: "principled"}


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _visible(text: str) -> str:
    """The text line by line between quotes, escaped: spaces at the ends and line breaks show, markup does not act."""
    return "\n".join(f"    {line!r}" for line in text.splitlines(keepends=True))


def _quantized(kind: str) -> str:
    return "" if kind == "none" else f", kernels in {kind}"


def describe(
    config: "ConfigDict",
    *,
    tokenizer: Tokenizer,
    parameters: int,
    adapter_parameters: int,
    train: Sequence[Query],
    heldout: Sequence[Query],
    principles: str,
    slots: Sequence[Slot],
    schedule: Callable[[int], float],
) -> str:
    """Describes the run of a config: model, shapes, steps, tokens, thresholds, principles and prompts.

    Args:
      config: a validated config.
      tokenizer: the model's.
      parameters: number of parameters of the base model.
      adapter_parameters: number of parameters of the LoRA adapter, which are the ones trained.
      train: the query set that iterations draw from.
      heldout: the query set of the evaluations.
      principles: the text of the principle set.
      slots: the responses that the algorithm samples for each query.
      schedule: iteration -> tau, the algorithm's own.

    Returns:
      Text of several lines, without a line break at its end.
    """
    sampling, optimizer = config.sampling, config.optimizer
    new, chat = sampling.max_new_tokens, config.task.chat

    def tokens(queries: Sequence[Query], principled: bool) -> list[Sequence[int]]:
        return [prompts.render(q, principles if principled else None, tokenizer, chat=chat)[1] for q in queries]

    def buckets(lengths: Iterable[int]) -> str:
        return " or ".join(str(size) for size in sorted({bucket(n, sampling.bucket) for n in lengths}))

    def sampled(principled: bool) -> str:
        rows = config.queries_per_iteration * sum(slot.principled is principled for slot in slots)
        # the loop computes what all principled prompts share once, and pads only the rest
        shared = len(prompts.common_prefix(tokens(heldout[:64], True))) if principled and len(heldout) > 1 else 0
        rest = buckets(len(ids) - shared for ids in tokens(train, principled))
        prompt = f"{shared} shared + {rest}" if shared else rest
        return f"{rows} rows, {sampling.width} at once, each [{prompt} prompt tokens + {new} new]"

    steps = config.queries_per_iteration // optimizer.batch_queries * optimizer.epochs
    evaluations = 1 + math.ceil(config.iterations / config.eval.every)
    training_rows = config.iterations * config.queries_per_iteration * len(slots)
    # the first evaluation samples principled responses too
    evaluation_rows = (evaluations + 1) * len(heldout) * config.eval.samples
    passes = optimizer.batch_queries // optimizer.micro_queries
    mesh = config.mesh
    blocks = [
        "Model\n"
        + _table(
            [
                ("base", f"{config.model.path}, {config.model.dtype}{_quantized(config.model.quantize)}"),
                ("parameters", f"{parameters:,}"),
                (
                    "LoRA parameters",
                    f"{adapter_parameters:,} ({adapter_parameters / parameters:.2%} of the base), "
                    f"rank {config.lora.rank}, alpha {config.lora.alpha:g}, on {', '.join(config.lora.targets)}",
                ),
                ("mesh", f"data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor}"),
            ]
        ),
        f"Every iteration ({config.iterations} of {config.algorithm})\n"
        + _table(
            [
                ("queries", f"{config.queries_per_iteration} of the {len(train)} of {config.task.train}"),
                *((f"generate {_WORDS[kind]}", sampled(kind)) for kind in sorted({s.principled for s in slots})),
                ("reward", f"{config.reward.name}, transform {config.reward.transform}"),
                (
                    "update",
                    f"{steps} optimiser steps of {optimizer.batch_queries} queries, each "
                    f"{passes} x [{optimizer.micro_queries} queries x "
                    f"({buckets(map(len, tokens(train, False)))} prompt tokens + up to {len(slots)} x {new})]",
                ),
            ]
        ),
        "The whole run\n"
        + _table(
            [
                ("optimiser steps", f"{config.iterations * steps:,}{' after the warm-up' if config.sft.data else ''}"),
                ("evaluations", f"{evaluations} of {len(heldout)} x {config.eval.samples} ({config.task.heldout})"),
                (
                    "generated tokens",
                    f"at most {(training_rows + evaluation_rows) * new:,}"
                    f" ({training_rows * new:,} to train on, {evaluation_rows * new:,} to evaluate)",
                ),
                ("reward calls", f"{training_rows + evaluation_rows:,}"),
                ("tau", f"{', '.join(f'{schedule(i):.4g}' for i in range(config.iterations))}"),
            ]
        ),
        f"Principles ({config.principles})\n{_visible(principles)}",
    ]
    for principled, word in _WORDS.items():
        text, ids = prompts.render(train[0], principles if principled else None, tokenizer, chat=chat)
        blocks.append(f"First query, {word} prompt: {len(ids)} tokens\n{_visible(text)}")
    return "\n\n".join(blocks)
