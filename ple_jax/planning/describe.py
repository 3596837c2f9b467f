"""What a run would do, in words and numbers: the text of `--mode=plan`."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ple_jax import prompts
from ple_jax.algorithms import Algorithm, OfflineAlgorithm
from ple_jax.core.batches import bucket
from ple_jax.core.types import Query, Reward, Tokenizer
from ple_jax.data.left_out import counts, fit
from ple_jax.data.load import Data
from ple_jax.prompts import principles

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


def _model(config: "ConfigDict", parameters: int, adapter_parameters: int) -> str:
    mesh = config.mesh
    return "Model\n" + _table(
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
    )


def _records(config: "ConfigDict", found: Data) -> str:
    task = config.task

    def count(which: str, queries: Sequence[Query]) -> str:
        bad = counts({which: found.bad[which]})
        return f"{len(queries):,} of {task[which]}" + (f", left out: {bad}" if bad else "")

    rows = [("train", count("train", found.train)), ("held out", count("heldout", found.heldout))]
    return f"Records (format {task.format})\n" + _table(rows)


def _scale(reward: Reward) -> str:
    low, high = reward.scale
    return "any number" if math.isinf(low) and math.isinf(high) else f"{low:g} to {high:g}"


def describe(
    config: "ConfigDict",
    *,
    tokenizer: Tokenizer,
    parameters: int,
    adapter_parameters: int,
    found: Data,
    rules: principles.Principles,
    reward: Reward,
    algorithm: Algorithm,
) -> str:
    """Describes the run of a config: model, records, shapes, steps, tokens, thresholds, principles and prompts.

    Args:
      config: a validated config.
      tokenizer: the model's.
      parameters: number of parameters of the base model.
      adapter_parameters: number of parameters of the LoRA adapter, which are the ones trained.
      found: what iterations draw from, and what evaluations are of.
      rules: the principles.
      reward: what is optimised.
      algorithm: one that samples.

    Returns:
      Text of several lines, without a line break at its end.
    """
    sampling, optimizer = config.sampling, config.optimizer
    new, train, heldout = sampling.max_new_tokens, found.train, found.heldout
    collected, schedule = algorithm.collect(config), algorithm.schedule(config)
    slots = [slot for slot in collected if slot.source == "policy"]
    taus = [schedule(i) for i in range(config.iterations)]

    def prompt(query: Query, principled: bool) -> tuple[str, list[int]]:
        k, text = config.principles_per_query, None
        if principled:
            text = principles.choose(rules, k, seed=config.seed, query_id=query.id)
        return prompts.render(query, text, tokenizer, chat=config.task.chat, thinking=config.task.thinking)

    def tokens(queries: Sequence[Query], principled: bool) -> list[Sequence[int]]:
        return [prompt(query, principled)[1] for query in queries]

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
    chosen = f", {config.principles_per_query} of {len(rules.rules)} for every query" if config.principles_per_query else ""
    blocks = [
        _model(config, parameters, adapter_parameters),
        _records(config, found),
        f"Every iteration ({config.iterations} of {config.algorithm})\n"
        + _table(
            [
                ("queries", f"{config.queries_per_iteration} of the {len(train)} of {config.task.train}"),
                *((f"generate {_WORDS[kind]}", sampled(kind)) for kind in sorted({s.principled for s in slots})),
                ("reward", f"{reward.name} ({_scale(reward)}), transform {config.reward.transform}"),
                *((f"  its part {name}", f"{part.name} ({_scale(part)})") for name, part in reward.parts.items()),
                (
                    "update",
                    f"{steps} optimiser steps of {optimizer.batch_queries} queries, each "
                    f"{passes} x [{optimizer.micro_queries} queries x "
                    f"({buckets(map(len, tokens(train, False)))} prompt tokens + up to {len(collected)} x {new})]",
                ),
            ]
        ),
        "The whole run\n"
        + _table(
            [
                ("optimiser steps", f"{config.iterations * steps:,}{' after the warm-up' if config.warm_up.data else ''}"),
                ("evaluations", f"{evaluations} of {len(heldout)} x {config.eval.samples} ({config.task.heldout})"),
                (
                    "generated tokens",
                    f"at most {(training_rows + evaluation_rows) * new:,}"
                    f" ({training_rows * new:,} to train on, {evaluation_rows * new:,} to evaluate)",
                ),
                ("reward calls", f"{training_rows + evaluation_rows:,}"),
                *([("tau", ", ".join(f"{tau:.4g}" for tau in taus))] if not any(map(math.isnan, taus)) else []),
            ]
        ),
        f"Principles ({rules.version}{chosen})\n{_visible(rules.text)}",
    ]
    for principled, word in _WORDS.items():
        text, ids = prompt(train[0], principled)
        blocks.append(f"First query, {word} prompt: {len(ids)} tokens\n{_visible(text)}")
    return "\n\n".join(blocks)


def describe_offline(
    config: "ConfigDict",
    *,
    tokenizer: Tokenizer,
    parameters: int,
    adapter_parameters: int,
    found: Data,
    algorithm: OfflineAlgorithm,
) -> str:
    """Describes the run of an algorithm that samples nothing; arguments as `describe`."""
    settings, optimizer = config.offline, config.optimizer
    examples, bad = fit(found.train, lambda query: algorithm.encode(query, tokenizer, config), kind="unfit")
    steps = math.ceil(len(examples) / optimizer.batch_queries) * settings.epochs
    batches = algorithm.batches(examples, optimizer.batch_queries, seed=config.seed, epoch=0)
    shapes: dict[str, int] = {}
    for some in batches:
        batch = algorithm.batch([examples[i] for i in some])
        name = f"{batch.prompt.shape[1]} + {batch.response.shape[1]} x {batch.response.shape[2]}"
        shapes[name] = shapes.get(name, 0) + 1
    first = algorithm.batch(examples[:1])
    rows = [("shared", first.prompt[0][first.prompt_mask[0]])]
    rows += [(f"end {j + 1}", first.response[0, j][first.response_mask[0, j]]) for j in range(first.response.shape[1])]
    shown = "\n".join(
        f"  {name}, {len(ids)} tokens\n{_visible(tokenizer.decode(ids.tolist(), skip_special_tokens=False))}"
        for name, ids in rows
    )
    return "\n\n".join(
        [
            _model(config, parameters, adapter_parameters),
            _records(config, found),
            f"The whole run ({config.algorithm})\n"
            + _table(
                [
                    ("examples", f"{len(examples):,}" + (f", {len(bad):,} cannot be used" if bad else "")),
                    ("optimiser steps", f"{steps:,} of {optimizer.batch_queries} examples, {settings.epochs} epochs"),
                    ("evaluations", f"{math.ceil(steps / settings.eval_every) + 1} of {len(found.heldout):,} examples"),
                    ("batches by tokens", ", ".join(f"{n} of [{name}]" for name, n in sorted(shapes.items()))),
                ]
            ),
            f"First example\n{shown}",
        ]
    )
