"""Every method on one task, at one budget, with one tuning, one evaluation: the evidence of docs/compare.md in one command.

    python -m ple_jax.experiments.compare_quickstart --out runs/compare [--jobs 2] [--methods all] [--seeds 0,1,2]
        [--lrs 3e-4,1e-3,3e-3,1e-2] [--backend jax] [--config quickstart] [-- --config.KEY=VALUE ...]

Give the same command again after a stop or a kill: finished runs are not repeated. Everything is a
`python -m ple_jax.main` whose work directory is in OUT, with a log beside it.

1. data: for the offline methods the start model answers queries of the train split, as many as use up the budget that the
   others sample while they train. Best and worst answer to each, by reward, are OUT/pairs.jsonl, the best OUT/sft.jsonl:
   made once, with the first seed.
2. learning rates: every method at every rate of --lrs with the first seed. It gets the one whose held-out reward
   (config.task.heldout, the dev split) is the highest in the end, of equal ones the smallest: OUT/lrs.json. A rate at which
   a run diverged is out.
3. seeds: the others, at that rate.
4. test: these models, and the start model with and without the principles in its prompt, answer --test-data, which nothing
   above has read, --samples times each. --second-reward, which no method was trained on, scores the answers too.
5. comparison: `--mode=compare` of all. Its tables are printed; its page is OUT/comparison/comparison.html.

A method samples --responses an iteration, however many of them for a query, and takes --steps optimiser steps on them.
SFT and offline DPO sample nothing while they train: their iterations take as many queries as those with two responses each.

The exit code is 1 if a run failed; what speaks for the others is compared nevertheless.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import UserError
from ple_jax.core.files import read_json, write_json, write_jsonl
from ple_jax.evaluation import responses
from ple_jax.experiments.grid import best, number
from ple_jax.experiments.jobs import Job, Outcome, overrides, parsed, positive, reported, run, say
from ple_jax.experiments.methods import METHODS, budget, chosen

DATA_SAMPLES = 4  # answers per query of the offline methods' data
SELECT = "heldout_reward_after"

# ---------------------------------------------------------------- commands


class Settings(NamedTuple):
    """The command line, read."""

    out: Path
    file: str  # of the config
    config: Any  # as the user gives it, before any method changes it
    given: tuple[str, ...]  # overrides of all commands
    backend: str
    methods: list[str]
    seeds: list[str]
    lrs: list[str]  # ascending
    responses: int
    steps: int
    test_data: str
    samples: int
    second_reward: str


def command(
    s: Settings, name: str, result: str, keys: dict[str, str], *, mode: str, workdir: str = "", backend: str = ""
) -> Job:
    """A job in OUT/workdir, or else in OUT/name, whose last file is `result` there; `keys` override what the user gave."""
    folder = s.out / (workdir or name)
    flags = (f"--config={s.file}", f"--mode={mode}", f"--backend={backend or s.backend}", f"--workdir={folder}")
    return Job(name, (*flags, *s.given, *(f"--config.{key}={value}" for key, value in keys.items())), folder, result)


def training(s: Settings, method: str, lr: str, seed: str, *, test: bool = False) -> Job:
    """A method's run at one learning rate and seed; with `test` its answers to the test split."""
    m, backend = METHODS[method], "torch" if METHODS[method].trl else s.backend
    name = f"{method}__lr-{lr}__seed-{seed}"
    shape = budget(method, responses=s.responses, steps=s.steps, micro=s.config.optimizer.micro_queries)
    keys = {**m.keys, **shape, "optimizer.lr": lr, "seed": seed}
    if m.data:
        keys["task.train"] = str(s.out / f"{m.data}.jsonl")
    if m.trl:
        keys["trainer"] = "trl"
    if not test:
        return command(s, name, "summary.json", keys, mode="train", backend=backend)
    result = _responses("trained", s.config.iterations)
    return command(s, f"{name}__test", result, keys | _test(s), mode="generate", workdir=name, backend=backend)


def starting(s: Settings, *, principled: bool) -> Job:
    """The start model's answers to the test split."""
    name = "start_principled" if principled else "start"
    keys = {"generate.policy": "start", "generate.principled": str(principled), "seed": s.seeds[0], **_test(s)}
    return command(s, name, _responses(name, 0), keys, mode="generate")


def _test(s: Settings) -> dict[str, str]:
    return {
        "generate.data": s.test_data,
        "generate.max_queries": "0",
        "generate.samples": str(s.samples),
        "generate.second_reward": s.second_reward,
        "checkpoint.use": "newest",  # all methods at the end of one budget
    }


def _responses(policy: str, iteration: int) -> str:
    return f"responses/{policy}/iter_{iteration:04d}.scores.jsonl"


# ---------------------------------------------------------------- stages


def make_data(s: Settings) -> None:
    """Writes pairs.jsonl and sft.jsonl, from answers of the start model to the train split.

    Raises:
        UserError: sampling failed, or there are fewer records than an iteration takes.
    """
    keys = {
        "generate.policy": "start",
        "generate.data": s.config.task.train,
        "generate.split": s.config.task.train_split,
        "generate.samples": str(DATA_SAMPLES),
        "generate.max_queries": str(s.config.iterations * s.responses // DATA_SAMPLES),
        "seed": s.seeds[0],
    }
    job = command(s, "data", _responses("start", 0), keys, mode="generate")
    if (ended := run([job], s.out)["data"]).code:
        raise UserError(f"the data of the offline methods could not be sampled ({ended.says}); see {s.out / 'data.log'}")
    made = dict(zip(("pairs", "sft"), records(responses.read(job.result.parent, 0)), strict=True))
    for name, rows in made.items():
        needed = max((s.responses // METHODS[m].samples for m in s.methods if METHODS[m].data == name), default=0)
        if len(rows) < needed:
            raise UserError(
                f"{len(rows)} records are left for {name}.jsonl, and an iteration takes {needed}: lower --responses, or take"
                " a reward with fewer ties"
            )
        write_jsonl(s.out / f"{name}.jsonl", rows)
    say(f"{len(made['pairs'])} pairs, {len(made['sft'])} answers to imitate")


def records(found: responses.Generated) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pairs of the best and the worst response to a query, and its best one; the texts as they were sampled.

    No pair where no response is better than another, nothing where the best is empty or a reward is missing.
    """
    pairs, best_only = [], []
    for rollout in found.rollouts:
        responses = rollout.responses
        if any(math.isnan(r.reward) for r in responses):
            continue
        top, bottom = (pick(responses, key=lambda r: r.reward) for pick in (max, min))
        prompt = list(rollout.prompt.messages) if isinstance(rollout.prompt, Conversation) else rollout.prompt
        common = {"id": rollout.query_id, "prompt": prompt}
        if top.text.strip():
            best_only.append({**common, "completion": top.text})
            if bottom.text.strip() not in ("", top.text.strip()) and top.reward > bottom.reward:
                pairs.append({**common, "chosen": top.text, "rejected": bottom.text})
    return pairs, best_only


def choose(s: Settings, ended: Mapping[str, Outcome]) -> dict[str, str]:
    """The learning rate of every method by the dev split; writes lrs.json.

    Exit code 2 is main's own, as of a run that diverged. A method of which a run was killed or crashed is left out: what it
    would have been is not known.
    """
    rates: dict[str, str] = {}
    table: dict[str, Any] = {}
    for method in s.methods:
        jobs = [training(s, method, lr, s.seeds[0]) for lr in s.lrs]
        codes = [ended[job.name].code for job in jobs]
        summaries = [read_json(job.result) if code == 0 else None for job, code in zip(jobs, codes, strict=True)]
        values = [number((summary or {}).get(SELECT)) for summary in summaries]
        found = best([{"lr": lr} for lr in s.lrs], values)  # the first, so the smallest, of equal ones
        table[method] = {"lr": None, SELECT: dict(zip(s.lrs, values, strict=True))}
        if found is None or not set(codes) <= {0, 2}:
            say(f"{method}: left out, since {'a run' if found else 'every run'} failed; give the same command again")
            continue
        rates[method] = table[method]["lr"] = lr = found[0]["lr"]
        edge = ", at the edge of the grid" if len(s.lrs) > 1 and lr in (s.lrs[0], s.lrs[-1]) else ""
        say(f"{method}: learning rate {lr}, {SELECT} {found[1][0]:.4f}{edge}")
    write_json(s.out / "lrs.json", {"selected_on": s.config.task.heldout, "seed": s.seeds[0], "methods": table})
    return rates


def check(s: Settings) -> None:
    """A mistake in what comes last should not show after hours.

    Raises:
        UserError: there is one.
    """
    layout = s.config.task.format
    if needs_data(s) and layout != "records":
        raise UserError(f"config.task.format is {layout!r}, and the data of the offline methods are written as records")
    for seed in s.seeds:
        parsed(command(s, "", "", {"seed": seed}, mode="plan").arguments)
    responses.evaluation_set(parsed(starting(s, principled=False).arguments).config)


def needs_data(s: Settings) -> bool:
    return any(METHODS[method].data for method in s.methods)


def tested(s: Settings, rates: Mapping[str, str], ended: Mapping[str, Outcome]) -> dict[Job, str]:
    """The jobs that answer the test split, of all that finished training and of the start model; with their labels."""
    models: dict[Job, str] = {}
    for method, lr in rates.items():
        names = {seed: training(s, method, lr, seed).name for seed in s.seeds}
        finished = [seed for seed, name in names.items() if ended[name].code == 0]
        models |= {training(s, method, lr, seed, test=True): method for seed in finished}
    return models | {starting(s, principled=False): "start", starting(s, principled=True): "start + principles"}


def compared(s: Settings, entries: Sequence[str]) -> tuple[Job, Outcome]:
    """The page and its tables, which are printed. Always made anew: folders of the same names may hold other answers."""
    log = s.out / "comparison.log"
    for file in (log, log.with_suffix(".done")):
        file.unlink(missing_ok=True)
    job = command(s, "comparison", "comparison.html", {}, mode="compare")
    job = job._replace(arguments=(*job.arguments, f"--runs={','.join(entries)}"))
    outcome = run([job], s.out)[job.name]
    if outcome.code == 0:
        say(log.read_text(encoding="utf-8", errors="replace"))
    return job, outcome


def compare(s: Settings, *, jobs: int) -> int:
    """All stages; 0, or 1 where a method is left out, or a run of a later stage failed.

    Raises:
        UserError: something wrong with the command line or the data.
    """
    tuned = [training(s, method, lr, s.seeds[0]) for method in s.methods for lr in s.lrs]
    others, tests = len(s.methods) * (len(s.seeds) - 1), len(s.methods) * len(s.seeds) + 2
    say(f"{len(tuned)} + {others} runs to train and {tests} models to test, of {len(s.methods)} methods; in {s.out}")
    check(s)
    began = time.monotonic()
    if needs_data(s):
        with stage("data"):
            make_data(s)
    with stage("learning rates"):
        tried = run(tuned, s.out, parallel=jobs)
        rates = choose(s, tried)
    with stage("seeds"):
        ended = run([training(s, m, lr, seed) for m, lr in rates.items() for seed in s.seeds[1:]], s.out, parallel=jobs)
    with stage("test"):
        models = tested(s, rates, tried | ended)
        ended |= run(list(models), s.out, parallel=jobs)
    with stage("comparison"):
        entries = [f"{label}={job.result.parent}" for job, label in models.items() if ended[job.name].code == 0]
        page, ended["comparison"] = compared(s, entries)
    failed = [m for m in s.methods if m not in rates] + [name for name, outcome in ended.items() if outcome.code]
    say(f"\nfailed: {', '.join(failed)}" if failed else "\nnothing failed")
    say(f"{(time.monotonic() - began) / 60:.1f} minutes; page: {page.result}")
    return int(bool(failed))


@contextmanager
def stage(name: str) -> Iterator[None]:
    say(f"\n== {name}")
    began = time.monotonic()
    yield
    say(f"== {name}: {time.monotonic() - began:.0f} s")


# ---------------------------------------------------------------- the command line


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="DIR")
    add("--config", default="quickstart", metavar="CONFIG", help="the task (default: quickstart)")
    add("--methods", default="all", help="all, main (without ablations), or names with commas: " + ", ".join(METHODS))
    add("--seeds", default="0,1,2", type=_list)
    add("--lrs", default="3e-4,1e-3,3e-3,1e-2", type=_list, help="the same for every method")
    add("--jobs", type=positive, default=1, metavar="N", help="runs at a time (default: 1); they share cores and memory")
    add("--backend", default="jax", help="of all but TRL's methods (default: jax)")
    add("--responses", type=positive, default=96, help="sampled in an iteration (default: 96)")
    add("--steps", type=positive, default=6, help="optimiser steps of an iteration (default: 6)")
    add("--test-data", default="quickstart_test", metavar="DATA", help="as config.task.heldout is named")
    add("--samples", type=positive, default=4, help="answers to each query of the test (default: 4)")
    add("--second-reward", default="bag_of_words", metavar="NAME", help="as config.reward.name (default: bag_of_words)")
    add("given", nargs="*", metavar="--config.KEY=VALUE", help="after `--`: overrides of every run")
    options = vars(parser.parse_args(argv))
    out, jobs, file = (options.pop(name) for name in ("out", "jobs", "config"))
    with reported(out):
        given = overrides(options.pop("given"))
        config = parsed((f"--config={file}", f"--backend={options['backend']}", "--mode=plan", *given)).config
        methods, lrs = chosen(options.pop("methods")), _ascending(options.pop("lrs"))
        return compare(
            Settings(out=out, file=file, config=config, given=given, methods=methods, lrs=lrs, **options), jobs=jobs
        )


def _list(text: str) -> list[str]:
    found = [part.strip() for part in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} must be values with commas, all different")
    return found


def _ascending(lrs: Sequence[str]) -> list[str]:
    try:
        return sorted(lrs, key=float)
    except ValueError as error:
        raise UserError(f"--lrs={','.join(lrs)}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
