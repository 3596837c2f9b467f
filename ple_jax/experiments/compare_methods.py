"""Compares every method on one task, with one tuning and one evaluation, at equal KL and at equal tokens: the evidence of
docs/compare.md in one command.

    python -m ple_jax.experiments.compare_methods --out runs/compare [--jobs 2] [--methods main] [--seeds 0,1,2,3,4]
        [--budgets 4,12] [--lrs 3e-4,1e-3,3e-3,1e-2] [--tune-seeds 2] [--keep DIR] [--backend jax] [--config quickstart]
        [-- --config.KEY=VALUE ...]

Give the same command again after a stop or a kill: finished runs are not repeated. Every run is a
`python -m ple_jax.main` whose work directory is in OUT, with a log beside it. With --keep the results of a finished run
(metrics, summary, responses; no weights) are also kept in DIR, packed; a run that is kept there is not repeated in another
OUT either.

1. data: for the offline methods the start model answers queries of the train split, as many as use up the budget that the
   other methods sample while they train. The best and the worst answer to each query, by reward, become OUT/pairs.jsonl, the
   best answers OUT/sft.jsonl. Both are made once, with the first seed.
2. learning rates: every method runs at every rate of --lrs with the first --tune-seeds seeds. For each budget it gets the
   rate whose best evaluation within the budget, on config.task.heldout (the dev split), has the highest reward, as a mean
   over these seeds. It gets another rate by the reward at the end. Among equal rates the smallest is chosen. The choices are
   in OUT/lrs.json, and with --keep in DIR/lrs.json, where they stay. A rate at which a run diverged is out. Variants of PLE
   (ablations, sensitivity) are trained at PLE's, and answer the test with their best checkpoint within the largest budget
   and with their last one.
3. seeds and test: every method runs with all seeds, at these rates. As soon as a run is finished, its best checkpoint within
   each budget and its last one answer --test-data, which nothing above has read, --samples times each; so does the start
   model, with and without the principles in its prompt. --second-reward, which no method was trained on, scores the answers
   too. With --keep, a run that is taken from DIR without its answers is trained again, since its weights are not there.
4. comparison: `--mode=compare` of these answers, at every budget and at equal tokens, with the curves of all runs. Its
   tables are printed; its page is OUT/comparison/comparison.html. PLE's ablations and its sensitivity are questions of their
   own: they are compared with PLE alone, in OUT/comparison_ablations and OUT/comparison_sensitivity.

A method samples --responses in an iteration, however many of them for one query, and takes --steps optimiser steps on them.
No run stops before its last iteration, so that all have generated equally many in the end. SFT and offline DPO sample
nothing while they train: their iterations take as many queries as those of a method with two responses for each. Their data
are the same for all seeds, which differ in the adapter's start and in the order of training alone.

The exit code is 1 if a run failed; the other runs are compared nevertheless.
"""

import argparse
import json
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
from ple_jax.data import mixture
from ple_jax.evaluation import responses
from ple_jax.experiments import jobs as jobs_of
from ple_jax.experiments import store
from ple_jax.experiments.grid import best, number
from ple_jax.experiments.jobs import Job, Outcome, is_done, is_wanted, overrides, parsed, positive, reported, run, say
from ple_jax.experiments.methods import GROUPS, METHODS, PLE, budget, chosen

DATA_SAMPLES = 4  # answers per query of the offline methods' data
SENSITIVITY_SEEDS = 3  # of methods of that group, at most
DIVERGED = "lower --config.optimizer.lr"  # in what main says of a run whose learning rate was too high
STARTS = {"start": False, "start + principles": True}  # entry of the comparison -> whether the principles are read
RATES = "lrs.json"
END = "newest"  # the view of equal tokens, as config.checkpoint.use names it

# ---------------------------------------------------------------- commands


class Settings(NamedTuple):
    """The settings of a comparison, as read from the command line."""

    out: Path
    file: str  # of the config
    config: Any  # as the user gives it, before any method changes it
    given: tuple[str, ...]  # overrides of all commands
    backend: str
    methods: list[str]
    seeds: list[str]
    lrs: list[str]  # ascending
    tune_seeds: int  # so many of the seeds choose the rates
    budgets: list[str]  # nats per response
    points: int  # evaluations an iteration
    responses: int
    steps: int
    test_data: str
    samples: int
    second_reward: str
    references: str = ""  # what is imitated in place of what the start model answered
    keep: Path | None = None
    texts: Path | None = None  # what the data say is read here, and not kept
    note: str = ""  # what stands beside the tables

    @property
    def views(self) -> list[str]:
        """The checkpoints of a run that are compared, by their names in config.checkpoint.use."""
        return [*(f"kl_{float(budget):g}" for budget in self.budgets), END]


class Run(NamedTuple):
    """A method at one of its rates, with one seed, and the checkpoints of it that are compared."""

    method: str
    lr: str
    seed: str
    views: tuple[str, ...]


def command(
    s: Settings, name: str, result: str, keys: dict[str, str], *, mode: str, workdir: str = "", backend: str = ""
) -> Job:
    """Returns a job in OUT/workdir, or else in OUT/name, that writes `result` there last; `keys` override the user's."""
    folder, keys = s.out / (workdir or name), {**PLE, **_evaluated(s), **keys}  # the same question whatever a config becomes
    flags = (f"--config={s.file}", f"--mode={mode}", f"--backend={backend or s.backend}", f"--workdir={folder}")
    return Job(name, (*flags, *s.given, *(f"--config.{key}={value}" for key, value in keys.items())), folder, result)


def training(s: Settings, method: str, lr: str, seed: str) -> Job:
    """Returns the job that trains a method at one learning rate and seed."""
    name = f"{method}__lr-{lr}__seed-{seed}"
    return command(s, name, "summary.json", _keys(s, method, lr, seed), mode="train", backend=_backend(s, method))


def testing(s: Settings, method: str, lr: str, seed: str, view: str) -> Job:
    """Returns the job in which a checkpoint, `view`, of a finished training answers the test split."""
    trained = training(s, method, lr, seed)
    summary = read_json(trained.result) or {}
    point = {"iteration": summary["iterations"], "within": False} if view == END else summary["best"][view]
    result = responses.file_of(trained.workdir, point).relative_to(trained.workdir).as_posix()
    keys = _keys(s, method, lr, seed) | _test(s) | {"checkpoint.use": view}
    name, backend = f"{trained.name}__{view}", _backend(s, method)
    return command(s, name, result, keys, mode="generate", workdir=trained.name, backend=backend)


def _keys(s: Settings, method: str, lr: str, seed: str) -> dict[str, str]:
    m = METHODS[method]
    keys = {
        **m.keys,
        **budget(method, responses=s.responses, steps=s.steps, micro=s.config.optimizer.micro_queries),
        "optimizer.lr": lr,
        "seed": seed,
    }
    if m.data:
        keys["task.train"] = str(s.out / f"{m.data}.jsonl")
    if m.references and s.references:
        keys["task.train"] = s.references
    return keys | ({"trainer": "trl", "eval.points": "1"} if m.trl else {})  # TRL's steps are its own


def _evaluated(s: Settings) -> dict[str, str]:
    return {
        "eval.max_kl": f"({''.join(f'{budget},' for budget in s.budgets)})",
        "eval.stop": "False",
        "eval.patience": "0",
        "eval.points": str(s.points),
        "eval.second_reward": s.second_reward,
    }


def _backend(s: Settings, method: str) -> str:
    return "torch" if METHODS[method].trl else s.backend


def starting(s: Settings, *, principled: bool) -> Job:
    """Returns the job in which the start model answers the test split, with the principles in its prompt if `principled`."""
    name = "start_principled" if principled else "start"
    keys = {"generate.policy": "start", "generate.principled": str(principled), "seed": s.seeds[0], **_test(s)}
    return command(s, name, f"responses/{name}/iter_0000.scores.jsonl", keys, mode="generate")


def _test(s: Settings) -> dict[str, str]:
    return {
        "generate.data": s.test_data,
        "generate.max_queries": "0",
        "generate.samples": str(s.samples),
        "generate.second_reward": s.second_reward,
    }


# ---------------------------------------------------------------- stages


def make_data(s: Settings) -> None:
    """Writes pairs.jsonl and sft.jsonl, from answers of the start model to the train split.

    Raises:
        UserError: if sampling failed, or there are fewer records than an iteration takes.
    """
    keys = {
        "generate.policy": "start",
        "generate.data": s.config.task.train,
        "generate.split": s.config.task.train_split,
        "generate.samples": str(DATA_SAMPLES),
        "generate.max_queries": str(s.config.iterations * s.responses // DATA_SAMPLES),
        "seed": s.seeds[0],
    }
    job = command(s, "data", "responses/start/iter_0000.scores.jsonl", keys, mode="generate")
    # these answer the train queries, and texts are put back from the test split's
    if (ended := store.run([job], s.out, None if s.texts else s.keep)["data"]).code:
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
    """Makes the records of the offline methods from sampled responses, whose texts stay as they were sampled.

    A query gives no pair if no response is better than another, and nothing if the best is empty or a reward is missing.

    Returns:
        Records with the best and the worst response to a query, and records with the best one alone.
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


def choose(s: Settings, ended: Mapping[str, Outcome]) -> dict[tuple[str, str], str]:
    """Chooses the learning rate of every (method, view) by the dev split, and writes lrs.json.

    A method is left out if one of its runs was killed, crashed or ran out of memory, since the result of that run is
    unknown. Variants of PLE get PLE's rates. What was chosen before is in --keep, and stays.
    """
    rates: dict[tuple[str, str], str] = {}
    table: dict[str, Any] = {}
    known = _chosen_before(s)
    for method in tuned(s):
        grid = [{"lr": lr, "seed": seed} for lr in s.lrs for seed in _tuning(s)]
        jobs = [training(s, method, **point) for point in grid]
        outcomes = [ended[job.name] for job in jobs]
        summaries = [(read_json(job.result) or {}) if not o.code else {} for job, o in zip(jobs, outcomes, strict=True)]
        values = {view: [_reached(summary, view) for summary in summaries] for view in s.views}
        found = {view: best(grid, of_view) for view, of_view in values.items()}  # of equal ones the smallest
        whole = all(found.values()) and all(not outcome.code or DIVERGED in outcome.says for outcome in outcomes)
        if not whole:
            which = "a run" if all(found.values()) else "every rate"
            say(f"{method}: left out, since {which} failed; give the same command again")
        for view, top in found.items():
            lr = top[0]["lr"] if whole and top else None
            of_rate = {rate: [v for p, v in zip(grid, values[view], strict=True) if p["lr"] == rate] for rate in s.lrs}
            entry = known.get(method, {}).get(view) if lr else None
            entry = table.setdefault(method, {})[view] = entry or {"lr": lr, "reward": of_rate}
            if (lr := entry["lr"]) is not None:
                rates[method, view] = lr
                edge = ", at the edge of the grid" if len(s.lrs) > 1 and lr in (s.lrs[0], s.lrs[-1]) else ""
                reached = entry["reward"][lr]
                say(f"{method}, {view}: learning rate {lr}, reward {math.fsum(reached) / len(reached):.4f}{edge}")
    write_json(s.out / RATES, {**_chosen_by(s), "methods": table})
    _keep_chosen(s, table)
    of_ple = {view: lr for (method, view), lr in rates.items() if method == "ple"}
    some = [view for view in s.views[-2:] if view in of_ple]  # variants answer the test at the largest budget and in the end
    return rates | {(m, view): of_ple[view] for m in s.methods if METHODS[m].of_ple for view in some}


def _chosen_by(s: Settings) -> dict[str, Any]:
    where = jobs_of.anywhere(mixture.source(s.config, "heldout"), s.out)
    asked = json.loads(jobs_of.asked(_of_all(s), s.out))
    return {"selected_on": where, **_grid(s), "asked": asked}


def _grid(s: Settings) -> dict[str, Any]:
    return {"seeds": _tuning(s), "lrs": s.lrs, "responses": s.responses, "steps": s.steps}


def _of_all(s: Settings) -> Job:
    """Returns a command that has what all trainings of a comparison are asked for, and nothing of a method."""
    return command(s, "all", "summary.json", {"seed": s.seeds[0]}, mode="train")


def _chosen_before(s: Settings) -> dict[str, Any]:
    """Reads the rates of earlier commands with this --keep, of the same question and grid, by method and view.

    A run that is trained again, as its weights were not kept, is another one on another processor. It would move the choice,
    and the runs that have answered at the rates before would have done so for nothing.
    """
    kept = read_json(s.keep / RATES) if s.keep is not None else None
    return kept["methods"] if kept and _same_grid(s, kept) else {}


def _keep_chosen(s: Settings, table: Mapping[str, Any]) -> None:
    """Adds to --keep what was chosen now. Rates of another question or grid that are there stay alone."""
    if s.keep is None or ((kept := read_json(s.keep / RATES)) and not _same_grid(s, kept)):
        return
    chosen_now = {method: {view: entry for view, entry in of.items() if entry["lr"]} for method, of in table.items()}
    before = _chosen_before(s)
    methods = {method: {**chosen_now.get(method, {}), **before.get(method, {})} for method in {**before, **chosen_now}}
    s.keep.mkdir(parents=True, exist_ok=True)
    write_json(s.keep / RATES, {**_chosen_by(s), "methods": {method: of for method, of in methods.items() if of}})


def _same_grid(s: Settings, kept: Mapping[str, Any]) -> bool:
    same = all(kept.get(key) == value for key, value in _grid(s).items())
    return same and is_wanted(_of_all(s), s.out, json.dumps(kept.get("asked")))


def tuned(s: Settings) -> list[str]:
    """Returns the methods that have a learning rate of their own; variants of PLE have PLE's."""
    return [method for method in s.methods if not METHODS[method].of_ple]


def seeds_of(s: Settings, method: str) -> list[str]:
    return s.seeds[:SENSITIVITY_SEEDS] if METHODS[method].group == "sensitivity" else s.seeds


def _tuning(s: Settings) -> list[str]:
    return s.seeds[: s.tune_seeds]


def _reached(summary: Mapping[str, Any], view: str) -> float:
    """Returns the reward on the dev split by which `view` chooses a rate, or nan if the run has none."""
    if view == END:
        return number(summary.get("heldout_reward_after"))
    return number(summary.get("best", {}).get(view, {}).get("reward"))


def check(s: Settings) -> None:
    """Checks the settings of all stages in advance, so that a mistake in a late stage does not show only after hours.

    Raises:
        UserError: if there is a mistake.
    """
    layout = s.config.task.format
    check_out(s.out, s.keep)
    if needs_data(s) and layout != "records":
        raise UserError(f"config.task.format is {layout!r}, and the data of the offline methods are written as records")
    own = [m for m in s.methods if METHODS[m].data or METHODS[m].references and s.references]
    if own and s.config.task.sets:
        raise UserError(
            f"config.task.sets is a mixture, and {', '.join(own)} would train on one file: leave them out of --methods, or"
            " give one data set as config.task.train"
        )
    for seed in s.seeds:
        parsed(command(s, "", "", {"seed": seed}, mode="plan").arguments)
    if s.keep is not None:
        store.check([*(starting(s, principled=which) for which in STARTS.values()), *_untold(s)], s.out, s.keep)
    responses.evaluation_set(parsed(starting(s, principled=False).arguments).config)


def check_out(out: Path, keep: Path | None) -> None:
    """Raises a UserError if OUT is a folder in which no comparison can be made."""
    if "," in str(out):
        raise UserError(f"--out={out} has a comma, which parts the runs that are compared: give another folder")
    if keep is not None and out == Path("."):  # a mark is to be the same wherever OUT is, and its path does not tell it
        raise UserError(f"--out=. does not go with --keep={keep}: give the command outside, with the folder's path")


def _untold(s: Settings) -> list[Job]:
    """Returns the trainings that choose the rates and read no data that are made first."""
    some = [method for method in tuned(s) if not METHODS[method].data]
    return [training(s, method, lr, seed) for method in some for lr in s.lrs for seed in _tuning(s)]


def needs_data(s: Settings) -> bool:
    return any(METHODS[method].data for method in s.methods)


def chosen_runs(s: Settings, rates: Mapping[tuple[str, str], str]) -> list[Run]:
    """Returns the runs at every rate that was chosen for any view, seed by seed."""
    views: dict[tuple[str, str], list[str]] = {}
    for (method, view), lr in rates.items():
        views.setdefault((method, lr), []).append(view)
    pairs = [(seed, *pair) for seed in s.seeds for pair in views.items()]
    return [Run(method, lr, seed, tuple(of)) for seed, (method, lr), of in pairs if seed in seeds_of(s, method)]


def restored(s: Settings, runs: Sequence[Run]) -> list[Job]:
    """Resets those of the trainings that are finished, and whose checkpoint must still answer the test and is gone.

    A checkpoint is gone if the training was taken from the store, which keeps runs without their weights. A training that is
    reset is as if it had never begun.
    """
    lost = []
    for one in runs:
        job = training(s, *one[:3])
        if is_done(job, s.out) and not (job.workdir / "checkpoints").exists():
            asked: dict[Path, list[Job]] = {}  # file -> who writes it: two budgets may have the same best
            for test in (testing(s, *one[:3], view) for view in one.views):
                asked.setdefault(test.result, []).append(test)
            _take(s, [test for some in asked.values() for test in some])
            if not all(any(is_done(test, s.out) for test in some) for some in asked.values()):
                store.forget(job, s.out, s.keep)
                lost.append(job)
    return lost


def trained_and_tested(s: Settings, runs: Sequence[Run], *, jobs: int) -> tuple[dict[str, Outcome], dict[str, Path]]:
    """Trains the runs, and lets the checkpoints of each answer the test split before the next ones begin.

    What an interruption leaves is then whole, even where the weights are lost with the machine.

    Returns:
        How every job ended, by its name; and the file of answers by entry of the comparison.
    """
    ended: dict[str, Outcome] = {}
    entries: dict[str, Path] = {}
    for first in range(0, len(runs), jobs):
        some = runs[first : first + jobs]
        trainings = [training(s, *one[:3]) for one in some]
        say(f"\n{first + len(some)} of {len(runs)}: {', '.join(job.name for job in trainings)}")
        _take(s, trainings)
        for job in restored(s, some):
            say(f"{job.name} is trained again, as its weights were not kept and the test needs them")
        ended |= executed(s, trainings, parallel=jobs)
        asked: dict[Path, Job] = {}
        for one, job in zip(some, trainings, strict=True):
            for view in one.views if ended[job.name].code == 0 else ():
                test = testing(s, *one[:3], view)
                if test.result not in asked or is_done(test, s.out):  # two budgets may have the same best
                    asked[test.result] = test
                entries[f"{one.method}={job.workdir}@{view}"] = test.result
        ended |= executed(s, list(asked.values()), parallel=jobs)
    return ended, {entry: file for entry, file in entries.items() if file.exists()}


def questions(methods: Sequence[str]) -> dict[str, list[str]]:
    """Divides the methods into those that are compared with each other, by the name of the comparison.

    Variants of PLE are compared with PLE, apart from the other methods: with 35 of them in one table no p-value that is
    adjusted for their number would say anything, and nobody would read it.
    """
    others = [m for m in methods if not METHODS[m].of_ple]
    groups = dict.fromkeys(METHODS[m].group for m in methods if METHODS[m].of_ple)
    found = {f"comparison_{group}": ["ple", *(m for m in methods if METHODS[m].group == group)] for group in groups}
    return found if found and len(others) == 1 else {"comparison": others, **found}


def compared(s: Settings, name: str, entries: Sequence[str]) -> tuple[Job, Outcome]:
    """Makes the page of a comparison, and prints its tables; returns the job and how it ended.

    The page is always made anew, since folders of the same names may hold other answers.
    """
    log = s.out / f"{name}.log"
    for file in (log, log.with_suffix(".done")):
        file.unlink(missing_ok=True)
    job = command(s, name, "comparison.html", {"compare.note": s.note} if s.note else {}, mode="compare")
    job = job._replace(arguments=(*job.arguments, f"--runs={','.join(entries)}"))
    outcome = run([job], s.out)[job.name]
    if outcome.code == 0:
        say(log.read_text(encoding="utf-8", errors="replace"))
    return job, outcome


def compare(s: Settings, *, jobs: int) -> int:
    """Executes all stages; returns 0, or 1 if a method is left out or a run of any stage failed.

    Raises:
        UserError: if something is wrong with the command line or the data.
    """
    grid = [training(s, m, lr, seed) for seed in _tuning(s) for m in tuned(s) for lr in s.lrs]
    say(f"{len(grid)} runs choose the learning rates of {len(tuned(s))} methods; {len(s.methods)} are compared, in {s.out}")
    check(s)
    began = time.monotonic()
    if needs_data(s):
        with stage("data"):
            make_data(s)
    with stage("learning rates"):
        ended = executed(s, grid, parallel=jobs)
        rates = choose(s, ended)
    with stage("seeds and test"):
        starts = {label: starting(s, principled=principled) for label, principled in STARTS.items()}
        ended |= executed(s, list(starts.values()), parallel=jobs)
        found, entries = trained_and_tested(s, chosen_runs(s, rates), jobs=jobs)
        ended |= found
    with stage("comparison"):
        answered = [f"{label}={job.result.parent}" for label, job in starts.items() if not ended[job.name].code]
        curves = [f"{job.name.partition('__')[0]}={job.workdir}@points" for job in grid if ended[job.name].code == 0]
        pages = []
        for name, methods in questions(s.methods).items():
            own = [entry for entry in (*entries, *curves) if entry.partition("=")[0] in methods]
            page, ended[name] = compared(s, name, [*own, *answered])
            pages.append(str(page.result))
    left = [method for method in s.methods if (method, END) not in rates]
    failures = left + [name for name, outcome in ended.items() if outcome.code]
    say(f"\nfailed: {', '.join(failures)}" if failures else "\nnothing failed")
    say(f"{(time.monotonic() - began) / 60:.1f} minutes; {'page' if len(pages) == 1 else 'pages'}: {', '.join(pages)}")
    return int(bool(failures))


def executed(s: Settings, jobs: Sequence[Job], *, parallel: int = 1) -> dict[str, Outcome]:
    """Takes the jobs that are kept and executes the others; returns how they ended.

    Raises:
        UserError: trainings in OUT computed in different dtypes.
    """
    _take(s, jobs)
    _check_dtypes(s.out)  # of what ran just now, before its answers
    return store.run(jobs, s.out, s.keep, texts=s.texts, parallel=parallel)


def _check_dtypes(out: Path) -> None:
    """Raises a UserError if trainings in OUT computed in different dtypes, as `auto` does on different processors."""
    of: dict[str, str] = {}
    for file in sorted(out.glob("*__lr-*/config.json")):
        of.setdefault((read_json(file) or {})["model"]["dtype"], file.parent.name)
    if len(of) > 1:
        (one, first), (other, second) = list(of.items())[:2]
        raise UserError(
            f"{first} computed in {one} and {second} in {other}, which cannot be compared; give `--"
            f" --config.model.dtype={one}`, or float32, and delete what is of another one in {out} and in --keep"
        )


def _take(s: Settings, jobs: Sequence[Job]) -> None:
    store.take_all(jobs, s.out, s.keep, texts=s.texts)


@contextmanager
def stage(name: str) -> Iterator[None]:
    say(f"\n== {name}")
    began = time.monotonic()
    yield
    say(f"== {name}: {time.monotonic() - began:.0f} s")


# ---------------------------------------------------------------- the command line


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    options = vars(parser.parse_args(argv))
    with reported(options["out"]):
        return compare(settings(**options), jobs=options["jobs"])


def arguments(parser: argparse.ArgumentParser, *, task: bool = True) -> None:
    """Adds the options that `settings` takes, and --jobs, to a parser.

    Args:
        task: whether to add the options that define the task: its config, test split, references and second reward.
    """
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="DIR")
    add("--methods", default="main", help="all, or groups and names with commas: " + ", ".join((*GROUPS, *METHODS)))
    add("--seeds", default="0,1,2,3,4", type=_list, help="(default: %(default)s)")
    add("--budgets", default="4,12", type=_list, help="nats per response from the start (default: %(default)s)")
    add("--lrs", default="3e-4,1e-3,3e-3,1e-2", type=_list, help="the same for every method (default: %(default)s)")
    add("--tune-seeds", type=positive, default=2, metavar="N", help="seeds that choose the rates (default: %(default)s)")
    add("--points", type=positive, default=1, metavar="N", help="evaluations an iteration (default: %(default)s)")
    add("--keep", type=Path, metavar="DIR", help="where what finished runs say is kept, packed")
    add(
        "--jobs",
        type=positive,
        default=1,
        metavar="N",
        help="runs at a time (default: 1); they share memory and part the cores",
    )
    add("--backend", default="jax", help="of all but TRL's methods (default: %(default)s)")
    add("--responses", type=positive, default=96, metavar="N", help="sampled in an iteration (default: %(default)s)")
    add("--steps", type=positive, default=6, metavar="N", help="optimiser steps of an iteration (default: %(default)s)")
    add("--samples", type=positive, default=4, metavar="N", help="answers to each query of the test (default: %(default)s)")
    add("given", nargs="*", metavar="--config.KEY=VALUE", help="after `--`: overrides of every run")
    if task:
        add("--config", default="quickstart", metavar="CONFIG", help="the task (default: %(default)s)")
        add("--test-data", default="quickstart_test", metavar="DATA", help="as config.task.heldout is named")
        add("--references", default="", metavar="DATA", help="what sft_references imitates (default: config.task.train)")
        add("--second-reward", default="bag_of_words", metavar="NAME", help="as config.reward.name (default: %(default)s)")


def settings(*, config: str, given: Sequence[str], methods: str, **options: Any) -> Settings:
    """Returns the settings in the options that `arguments` adds.

    Raises:
        UserError: if there is no such method or override, or a number is none.
    """
    own = {key: value for key, value in options.items() if key in Settings._fields}
    found = overrides(given)
    parsed_config = parsed((f"--config={config}", f"--backend={options['backend']}", "--mode=plan", *found)).config
    own |= {name: _ascending(name, options[name]) for name in ("lrs", "budgets")}
    return Settings(file=config, config=parsed_config, given=found, methods=chosen(methods), **own)


def _list(text: str) -> list[str]:
    found = [part.strip() for part in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} must be values with commas, all different")
    return found


def _ascending(name: str, numbers: Sequence[str]) -> list[str]:
    try:
        return sorted(numbers, key=float)
    except ValueError as error:
        raise UserError(f"--{name}={','.join(numbers)}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
