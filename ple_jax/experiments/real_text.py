"""Compares methods on texts of people, at equal KL and at equal tokens: openings of IMDb's reviews, dialogues of HH.

    python -m ple_jax.experiments.real_text imdb --out runs/imdb [--train SOURCE --test SOURCE] [--keep DIR] [...]
    python -m ple_jax.experiments.real_text hh --out runs/hh [--train SOURCE --test SOURCE] [--keep DIR] [...]

Makes the data and the rewards, and goes on as `ple_jax.experiments.compare_methods`, whose help describes the stages, and
takes the same options. Give the same command again after a stop or a kill.

imdb: the reward is `bag_of_words`, trained on the labels of 584 reviews of IMDb's train split; the second reward is VADER's.
    `sft_references` imitates how the positive reviews of the train split go on, as far as the others may sample.
hh: two reward models are trained with Bradley-Terry's loss, each on one half of the train pairs (halves by prompt), whose
    answers are cut where sampled ones end, as it is these that are scored. One is the reward, as a z-score since the loss
    gives it no scale, the other the second reward. OUT/rewards.json has the share of the test pairs, cut alike, that each
    of them orders as people did, and so says what an answer's reward is worth; the comparison notes it. `sft_references`
    imitates the chosen answers. Only queries of at most --max-words words are used.

Of the train records --dev queries are set apart, by which learning rates and checkpoints are chosen. The test split is
answered once. None of the data goes into --keep: texts of the data are read from --train and --test again.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ple_jax import prompts
from ple_jax.core import identity
from ple_jax.core.compact import Compact
from ple_jax.core.errors import UserError
from ple_jax.core.files import read_json, write_json
from ple_jax.core.types import Query
from ple_jax.data import prepare
from ple_jax.data.queries import digest, load_queries, some
from ple_jax.experiments import compare_methods, store
from ple_jax.experiments.jobs import Job, parsed, positive, reported, say
from ple_jax.experiments.methods import budget
from ple_jax.rewards import bag_of_words

METHODS = "ple,sft_references,context_distillation,raft,dpo_iterative,ppo,grpo"
HALVES = ("half_a", "half_b")  # the reward that trains, and the other one
SAMPLED = {"imdb": 24, "hh": 32}  # tokens of an answer
_DRAWN = 0  # what is set apart is the same, whatever the seeds of the runs


class Made(NamedTuple):
    """What a task has prepared for the comparison: overrides, files of queries and references, and the second reward."""

    given: tuple[str, ...]  # overrides of every run
    test: Path
    references: Path
    second: str  # the second reward
    note: str  # what the rewards are worth


class Task(NamedTuple):
    config: str
    train: str
    test: str
    make: Callable[[argparse.Namespace], Made]


# ---------------------------------------------------------------- tasks


def imdb(options: argparse.Namespace) -> Made:
    train, test = _read(options, format="imdb", needs="completion", reads=("label",))
    queries = _divided(options, train, test)
    positive_ones = [query for query in queries["train"] if query.record["label"] in (1, "1", "pos")]
    if not positive_ones:
        raise UserError(f"--train={options.train} has no review with the label 1: sft_references has nothing to imitate")
    # how a review of hundreds of words goes on is nothing to measure 24 tokens by
    queries["test"] = Compact(query._replace(completion="") for query in queries["test"])
    files = _written(options.out, {**queries, "references": positive_ones})
    given = (*_data(options, files), "--config.reward.name=bag_of_words")
    words = read_json(bag_of_words.WEIGHTS) or {}
    note = (
        f"the training reward tells positive from negative reviews of the test split in {words['test_accuracy']:.3f} of"
        f" {words['test_texts']}, and in {words['test_accuracy_pieces']:.3f} of their {words['test_pieces']:,} pieces of"
        f" {words['piece_words']} words"
    )
    return Made(given, files["test"], files["references"], "vader", note)


def hh(options: argparse.Namespace) -> Made:
    train, test = _read(options, format="hh", needs="pair")
    halves = dict(zip(HALVES, prepare.divide(train, share=0.5, seed=_DRAWN), strict=True))
    pairs = _written(options.out, _cut({**halves, "pairs": test}, _config(options)), needs="pair")
    jobs = {name: _rewarding(options, name, pairs[name], pairs["pairs"]) for name in HALVES}
    ended = store.run(list(jobs.values()), options.out, options.keep, parallel=options.jobs)
    if failed := [name for name, outcome in ended.items() if outcome.code]:
        raise UserError(f"the reward model {failed[0]} was not trained; see {options.out / f'{failed[0]}.log'}")
    rewards = {name: _judged(job) for name, job in jobs.items()}
    write_json(options.out / "rewards.json", rewards)
    queries = _divided(options, _short(train, options.max_words), _short(test, options.max_words))
    files = _written(options.out, {**queries, "references": queries["train"]})
    first, second = ({"path": str(_rebuilt(job)), "name": name} for name, job in jobs.items())
    given = (
        *_data(options, files), "--config.task.subsets=()", f"--config.reward.kwargs={first}",
        "--config.reward.transform=zscore",
        *(f"--config.{mode}.second_reward=model" for mode in ("eval", "generate")),
        *(f"--config.{mode}.second_kwargs={second}" for mode in ("eval", "generate")),
    )  # fmt: skip
    note = "; ".join(f"{name} orders {_share(judged)} as people did" for name, judged in rewards.items())
    return Made(given, files["test"], files["references"], "model", f"{note}; {HALVES[0]} is trained on")


TASKS = {
    "imdb": Task("imdb", "stanfordnlp/imdb", "stanfordnlp/imdb", imdb),
    "hh": Task("hh", "Anthropic/hh-rlhf", "Anthropic/hh-rlhf", hh),
}

# ---------------------------------------------------------------- data


def _read(options: argparse.Namespace, **how: Any) -> tuple[Compact[Query], Compact[Query]]:
    """Reads the train and the test records; there are no duplicates, and no record is in both."""
    folder = options.out / "data" / "clean"
    subsets = ("harmless-base",) if options.task == "hh" and options.train == TASKS["hh"].train else ()
    prepare.prepare(
        options.train, folder, test=options.test, seed=_DRAWN, subsets=subsets, limit=options.limit, **how
    )  # fmt: skip
    again = {"needs": how["needs"], "reads": how.get("reads", ())}
    train, test = (load_queries(str(folder / f"{name}.jsonl"), **again).queries for name in ("train", "test"))
    return train, test


def _short(queries: Compact[Query], most: int) -> Compact[Query]:
    """Returns the queries whose prompt has at most `most` words."""
    return queries.take(i for i, query in enumerate(queries) if len(query.prompt.split()) <= most)


def _divided(options: argparse.Namespace, train: Compact[Query], test: Compact[Query]) -> dict[str, Compact[Query]]:
    """Divides the queries into train, dev and test queries."""
    if len(train) <= options.dev:
        raise UserError(f"{len(train)} train queries are left, and --dev={options.dev} are set apart: lower it")
    order = np.random.Generator(np.random.Philox(_DRAWN)).permutation(len(train)).tolist()
    apart = set(order[: options.dev])
    return {
        "train": train.take(i for i in range(len(train)) if i not in apart),
        "dev": train.take(sorted(apart)),
        "test": some(test, options.test_queries, _DRAWN),
    }


def _written(out: Path, sets: Mapping[str, Sequence[Query]], needs: str = "completion") -> dict[str, Path]:
    """Writes the files of these records, and returns their paths.

    A digest of the records is part of a file's name, and so of the jobs that read the file: results that were kept of other
    data are not taken for theirs.
    """
    files = {name: out / "data" / f"{name}-{digest(queries)[:8]}.jsonl" for name, queries in sets.items()}
    for name, queries in sets.items():
        if not queries:
            raise UserError(f"no record is left for {files[name]}: give more data")
        prepare.write(files[name], queries, needs=needs)
    return files


def _data(options: argparse.Namespace, files: dict[str, Path]) -> tuple[str, ...]:
    # the start model answers with PLE's numbers of queries, as it has no method
    numbers = budget("ple", responses=options.responses, steps=options.steps, micro=8)
    return (
        *(f"--config.{key}={value}" for key, value in numbers.items()),
        "--config.task.format=records", f"--config.task.train={files['train']}", f"--config.task.heldout={files['dev']}",
        "--config.task.max_heldout=0", "--config.iterations=5", _sampled(options),
    )  # fmt: skip


def _sampled(options: argparse.Namespace) -> str:
    return f"--config.sampling.max_new_tokens={SAMPLED[options.task]}"


def _config(options: argparse.Namespace) -> Any:
    """Returns the config of the runs, without what is made for them: the last word is the user's."""
    flags = (f"--config={options.config}", f"--backend={options.backend}", "--mode=plan")
    return parsed((*flags, _sampled(options), *options.given)).config


# ---------------------------------------------------------------- rewards of HH


def _cut(sets: Mapping[str, Sequence[Query]], config: Any) -> dict[str, Compact[Query]]:
    """Cuts both answers of all pairs where sampled ones end, and leaves out the pairs that are equal until there."""
    from ple_jax.models import weights

    tokenizer = weights.load(config.model.path, config.model.revision).tokenizer

    def short(text: str) -> str:
        tokens = tokenizer.encode(text, add_special_tokens=False)[: config.sampling.max_new_tokens]
        return prompts.decoded(tokens, tokenizer, chat=config.task.chat).strip()

    def shortened(pairs: Sequence[Query]) -> Iterator[Query]:
        for pair in pairs:
            chosen, rejected = short(pair.completion), short(pair.rejected)
            if chosen != rejected:
                yield pair._replace(completion=chosen, rejected=rejected)

    return {name: Compact(shortened(pairs)) for name, pairs in sets.items()}


def _rewarding(options: argparse.Namespace, name: str, pairs: Path, test: Path) -> Job:
    """Returns the job that trains a reward model, with an adapter of rank 1, which is small enough to be kept."""
    what = f"{pairs.name} {test.name} {options.reward_base} {options.reward_tokens}"
    name = f"{name}-{identity.digest([what.encode()])[:8]}"
    folder = options.out / name
    keys = {
        "task.format": "records", "task.subsets": "()", "task.train": pairs, "task.heldout": test, "seed": _DRAWN,
        "model.path": options.reward_base, "reward_model.max_tokens": options.reward_tokens,
        "lora.rank": 1, "lora.alpha": 2.0, "optimizer.micro_queries": 2, "offline.epochs": 1,
        "offline.eval_every": 50,  # and so often it is committed: a stop costs no more
    }  # fmt: skip
    own = [word for word in options.given if word.startswith("--config.model.dtype")]
    overrides = (*(f"--config.{key}={value}" for key, value in keys.items()), *own)
    given = ("--config=reward_hh", "--mode=train", f"--backend={options.backend}", f"--workdir={folder}", *overrides)
    return Job(name, given, folder, "summary.json")


def _judged(job: Job) -> dict[str, Any]:
    summary = read_json(job.result) or {}
    return {key: summary[key] for key in ("train_examples", "heldout_examples", "heldout_accuracy", "heldout_accuracy_ci95")}


def _share(judged: Mapping[str, Any]) -> str:
    low, high = judged["heldout_accuracy_ci95"]
    return f"{judged['heldout_accuracy']:.3f} ({low:.3f} to {high:.3f}) of {judged['heldout_examples']} test pairs"


def _rebuilt(job: Job) -> Path:
    """Returns the folder of a trained reward model; it is merged again if only its adapter was kept."""
    folder = job.workdir / "reward_model"
    if not (folder / "config.json").exists():
        from ple_jax.export import merged, write
        from ple_jax.models import weights

        asked = parsed(job.arguments)
        # numpy alone: a device that this process held would not be there for its jobs
        base, how = weights.load(asked.config.model.path, asked.config.model.revision), asked.config.export
        merged.merged(
            base, job.workdir / "adapter", folder, dtype=how.dtype, shard_gb=how.shard_gb, readme="",
            about={"iteration": (read_json(job.result) or {})["steps"], "dtype": how.dtype},  # as when it was trained, byte
            head=write.HEAD,  # by byte: the files are the reward's version
        )  # fmt: skip
    return folder


# ---------------------------------------------------------------- the command line


def _check(options: argparse.Namespace) -> None:
    """Raises a UserError for a mistake in what is read after the data and the rewards, which may take hours, are made."""
    compare_methods.check_out(options.out, options.keep)
    found = compare_methods.settings(**{**vars(options), "test_data": "", "second_reward": ""})
    for method in found.methods:
        budget(method, responses=options.responses, steps=options.steps, micro=found.config.optimizer.micro_queries)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, task in TASKS.items():
        one = tasks.add_parser(name, help=f"the config {task.config}, the data {task.train}")
        compare_methods.arguments(one, task=False)
        one.set_defaults(config=task.config, methods=METHODS, seeds="0,1,2", budgets="4,16", lrs="1e-3,3e-3")
        add = one.add_argument
        add("--train", default=task.train, metavar="SOURCE", help="of the published layout (default: %(default)s)")
        add("--test", default=task.test, metavar="SOURCE", help="likewise, its split `test` (default: %(default)s)")
        add("--limit", type=int, default=0, metavar="N", help="use so many records of each, drawn (default: all)")
        add("--dev", type=positive, default=64, metavar="N", help="queries set apart (default: %(default)s)")
        add("--test-queries", type=positive, default=128, metavar="N", help="at most (default: %(default)s)")
        if name == "hh":
            add("--max-words", type=positive, default=40, metavar="N", help="of a query (default: %(default)s)")
            add("--reward-base", default="smollm2-135m", metavar="MODEL", help="of the reward models (default: %(default)s)")
            add("--reward-tokens", type=positive, default=256, metavar="N", help="of a pair (default: %(default)s)")
    options = parser.parse_args(argv)
    with reported(options.out):
        _check(options)
        made = TASKS[options.task].make(options)
        say(made.note)
        # references are cut where sampled answers end: what no test sees would be most of what is imitated
        longest = _config(options).sampling.max_new_tokens
        given = (*made.given, f"--config.task.max_answer_tokens={longest}", *options.given)
        own = vars(options) | {"test_data": str(made.test), "references": str(made.references), "second_reward": made.second}
        found = compare_methods.settings(**{**own, "given": given})
        return compare_methods.compare(found._replace(texts=made.test, note=made.note), jobs=options.jobs)


if __name__ == "__main__":
    sys.exit(main())
