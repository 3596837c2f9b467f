"""What a run would do, in words and numbers: the text of `--mode=plan`."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ple_jax.algorithms import Algorithm, OfflineAlgorithm, given_sources
from ple_jax.core.batches import bucket, response_width
from ple_jax.core.refill import read_as
from ple_jax.core.types import Batch, Query, Reward, Slot, Tokenizer
from ple_jax.data import mixture
from ple_jax.data.left_out import counts
from ple_jax.data.load import Data
from ple_jax.planning.rates import Rates, expected
from ple_jax.prompts import principles
from ple_jax.training.offline import check_room, encoded
from ple_jax.training.prompting import Prompts, check_run, usable
from ple_jax.training.steps import planned

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_TAUS = 100  # iterations whose threshold is shown
_WORDS = {False: "plain", True: "principled"}


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _visible(text: str) -> str:
    """Quotes and escapes the text line by line, so that spaces at the ends and line breaks show and markup does not act."""
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


def _records(config: "ConfigDict", found: Data, *, drawn: bool = True) -> str:
    task = config.task

    def count(which: str, queries: Sequence[Query]) -> str:
        bad, sizes = counts({which: found.bad[which]}), mixture.by_set(config, ((query.id, 1) for query in queries))
        source = ", ".join(f"{name} {len(some):,}" for name, some in sizes.items()) or task[which]
        first = f", the first at {found.bad[which][0].where}" if bad else ""
        return f"{len(queries):,} of {source}" + (f", left out: {bad}{first}" if bad else "")

    rows = [("train", count("train", found.train)), ("held out", count("heldout", found.heldout))]
    if not task.sets or not drawn:
        return f"Records{'' if task.sets else f' (format {task.format})'}\n" + _table(rows)
    each = ", ".join(f"{name} {count}" for name, count in mixture.counts(config).items())
    return "Records\n" + _table([*rows, ("an iteration", f"{config.queries_per_iteration} queries: {each}")])


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
    second: Reward | None = None,
    eos: tuple[int, ...] = (),
    model: str = "the model",
    context: float = math.inf,
    rates: Rates | None = None,
) -> str:
    """Describes the run of a config: model, records, shapes, steps, tokens, thresholds, principles and prompts.

    Args:
      parameters, adapter_parameters: of the base model, and of the LoRA adapter, which alone is trained.
      found: the records that iterations draw from and that evaluations use.
      reward, second: of all responses, and of those to held-out queries alone; a record that they do not take is left out.
      eos, model, context: the tokens that end a response, the base model's name, and the most tokens that it takes.
      rates: the speed of an earlier run like it on this machine, if there was one.

    Raises:
      UserError: the records are refused, as they would be when the run begins.
    """
    rendering = Prompts(config, tokenizer, rules, eos, context)
    of_heldout = [one for one in (reward, second) if one is not None]
    found = _fitted(found, rendering, given_sources(algorithm.collect(config)), reward, of_heldout, model)
    plain = [len(rendering.of(query, False)[1]) for query in found.train]
    blocks = [
        _model(config, parameters, adapter_parameters),
        _records(config, found),
        _iteration(config, found, reward, algorithm, rendering, plain),
        _whole_run(config, found, algorithm, plain, rates),
        f"Principles ({rules.version}{_chosen(config, rules)}{_unnumbered(rules)})\n{_visible(rules.text)}",
    ]
    return "\n\n".join([*blocks, *(_first_prompt(found, rendering, principled) for principled in _WORDS)])


def _fitted(
    found: Data, rendering: Prompts, sources: Sequence[str], reward: Reward, of_heldout: Sequence[Reward], model: str
) -> Data:
    """Returns the records that a run would use, after the checks with which it begins."""
    train, _ = usable(found.train, rendering, "config.task.train", sources=sources, rewards=[reward])
    heldout, _ = usable(found.heldout, rendering, "config.task.heldout", rewards=of_heldout)
    bad = {"train": [*found.bad["train"], *train.bad], "heldout": [*found.bad["heldout"], *heldout.bad]}
    found = Data(train.queries, heldout.queries, {**found.bad, **bad})
    check_run(found, rendering, model=model)
    return found


def _unnumbered(rules: principles.Principles) -> str:
    return ", without numbered rules" if rules.text and not rules.rules else ""


def _first_prompt(found: Data, rendering: Prompts, principled: bool) -> str:
    text, ids = rendering.of(found.train[0], principled)
    return f"First query, {_WORDS[principled]} prompt: {len(ids)} tokens\n{_visible(text)}"


def _chosen(config: "ConfigDict", rules: principles.Principles) -> str:
    k = config.principles_per_query
    return f", {k} of {len(rules.rules)} for every query" if k else ""


def _sampled(algorithm: Algorithm, config: "ConfigDict") -> list[Slot]:
    return [slot for slot in algorithm.collect(config) if slot.source == "policy"]


def _iteration(
    config: "ConfigDict", found: Data, reward: Reward, algorithm: Algorithm, rendering: Prompts, plain: Sequence[int]
) -> str:
    """Describes what every iteration samples, scores and trains on; `plain` has the tokens of every plain train prompt."""
    sampling, optimizer = config.sampling, config.optimizer
    collected, slots = algorithm.collect(config), _sampled(algorithm, config)

    def sizes(size: Callable[[int, int], int], lengths: Iterable[int]) -> str:
        return " or ".join(str(n) for n in sorted({size(n, sampling.bucket) for n in lengths}))

    def asked(principled: bool) -> str:
        rows = config.queries_per_iteration * sum(slot.principled is principled for slot in slots)
        # the loop computes what all principled prompts share once, and pads only the rest
        shared = len(rendering.sharing(found.heldout).prefix) if principled else 0
        lengths = (len(rendering.of(query, True)[1]) for query in found.train) if principled else plain
        rest = sizes(read_as, (n - shared for n in lengths))
        prompt = f"{shared} shared + {rest}" if shared else rest
        return f"{rows} rows, {sampling.width} at once, each [{prompt} prompt tokens + {sampling.max_new_tokens} new]"

    passes = optimizer.batch_queries // optimizer.micro_queries
    own = [len(rendering.given(query, source).tokens) for query in found.train for source in given_sources(collected)]
    longest = response_width(max([1, *own]), new=sampling.max_new_tokens, most=config.task.max_answer_tokens)
    width = f"{sizes(bucket, plain)} prompt tokens + up to {len(collected)} x {longest}"
    return f"Every iteration ({config.iterations} of {config.algorithm})\n" + _table(
        [
            ("queries", f"{config.queries_per_iteration} of the {len(found.train)} of {mixture.source(config, 'train')}"),
            *((f"generate {_WORDS[kind]}", asked(kind)) for kind in sorted({s.principled for s in slots})),
            ("reward", f"{reward.name} ({_scale(reward)}), transform {config.reward.transform}"),
            *((f"  its part {name}", f"{part.name} ({_scale(part)})") for name, part in reward.parts.items()),
            (
                "update",
                f"{planned(config, 1)} optimiser steps of {optimizer.batch_queries} queries, each "
                f"{passes} x [{optimizer.micro_queries} queries x ({width})]",
            ),
        ]
    )


def _whole_run(config: "ConfigDict", found: Data, algorithm: Algorithm, plain: Sequence[int], rates: Rates | None) -> str:
    """Describes all iterations together: steps, evaluations, tokens, reward calls and seconds."""
    heldout, new = found.heldout, config.sampling.max_new_tokens
    evaluations = 1 + math.ceil(config.iterations / config.eval.every) * config.eval.points
    training_rows = config.iterations * config.queries_per_iteration * len(_sampled(algorithm, config))
    # the first evaluation samples principled responses too
    evaluation_rows = (evaluations + 1) * len(heldout) * config.eval.samples
    tau, shown = algorithm.schedule(config), range(min(config.iterations, _TAUS))
    taus = [f"{tau(i):.4g}" for i in shown] + ["..."] * (config.iterations > _TAUS)
    warmed = " after the warm-up" if config.warm_up.data else ""
    rows = config.iterations * config.queries_per_iteration * config.optimizer.epochs
    trained = round(rows * (sum(plain) / len(plain) + len(algorithm.collect(config)) * new))
    sampled, scored = (training_rows + evaluation_rows) * new, training_rows + evaluation_rows
    most = {"sampled": training_rows * new, "trained": trained, "scored": training_rows, "evaluated": evaluation_rows}
    return "The whole run\n" + _table(
        [
            ("optimiser steps", f"{planned(config, config.iterations):,}{warmed}"),
            (
                "evaluations",
                f"{evaluations} of {len(heldout)} x {config.eval.samples} ({mixture.source(config, 'heldout')})",
            ),
            (
                "generated tokens",
                f"at most {sampled:,} ({training_rows * new:,} to train on, {evaluation_rows * new:,} to evaluate)",
            ),
            ("reward calls", f"{scored:,}"),
            ("expected time", expected(rates, **most)),
            *([] if math.isnan(tau(0)) else [("tau", ", ".join(taus))]),
        ]
    )


def describe_offline(
    config: "ConfigDict",
    *,
    tokenizer: Tokenizer,
    parameters: int,
    adapter_parameters: int,
    found: Data,
    algorithm: OfflineAlgorithm,
    model: str = "the model",
    context: float = math.inf,
) -> str:
    """Describes the run of an algorithm that samples nothing; arguments and errors are as in `describe`."""
    settings, optimizer = config.offline, config.optimizer
    check_room(algorithm, config, model=model, context=context)
    examples, bad = encoded("train", found.train, algorithm, tokenizer, config)
    heldout, _ = encoded("heldout", found.heldout, algorithm, tokenizer, config)
    steps = math.ceil(len(examples) / optimizer.batch_queries) * settings.epochs
    rows = [
        ("examples", f"{len(examples):,}" + (f", {len(bad):,} cannot be used" if bad else "")),
        ("optimiser steps", f"{steps:,} of {optimizer.batch_queries} examples, {settings.epochs} epochs"),
        ("evaluations", f"{math.ceil(steps / settings.eval_every) + 1} of {len(heldout):,} examples"),
        ("batches by tokens", _shapes(config, algorithm, examples)),
    ]
    return "\n\n".join(
        [
            _model(config, parameters, adapter_parameters),
            _records(config, found, drawn=False),
            f"The whole run ({config.algorithm})\n{_table(rows)}",
            f"First example\n{_example(algorithm.batch(examples[:1]), tokenizer)}",
        ]
    )


def _shapes(config: "ConfigDict", algorithm: OfflineAlgorithm, examples: Sequence[Any]) -> str:
    """Counts the batches of the first epoch by their shapes."""
    shapes: Counter[str] = Counter()
    for some in algorithm.batches(examples, config.optimizer.batch_queries, seed=config.seed, epoch=0):
        batch = algorithm.batch([examples[i] for i in some])
        shapes[f"{batch.prompt.shape[1]} + {batch.response.shape[1]} x {batch.response.shape[2]}"] += 1
    return ", ".join(f"{n} of [{name}]" for name, n in sorted(shapes.items()))


def _example(first: Batch, tokenizer: Tokenizer) -> str:
    """Decodes the parts of a batch's first row, as the model sees them."""
    rows = [("shared", first.prompt[0][first.prompt_mask[0]])]
    rows += [(f"end {j + 1}", first.response[0, j][first.response_mask[0, j]]) for j in range(first.response.shape[1])]
    return "\n".join(
        f"  {name}, {len(ids)} tokens\n{_visible(tokenizer.decode(ids.tolist(), skip_special_tokens=False))}"
        for name, ids in rows
    )
