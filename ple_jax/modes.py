"""The functions that `--mode` names. Each takes (config, workdir, backend) and its own options, and returns an exit code."""

import contextlib
import functools
import importlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ple_jax import algorithms, rewards
from ple_jax import chat as chatting
from ple_jax.algorithms import Algorithm, OfflineAlgorithm
from ple_jax.core import backends
from ple_jax.core.errors import Damaged, UserError
from ple_jax.core.files import plain, read_json, write_json
from ple_jax.core.identity import run_keys
from ple_jax.core.version import project
from ple_jax.evaluation import compare as comparison
from ple_jax.evaluation import describe, differences, responses
from ple_jax.evaluation import harness as tax
from ple_jax.evaluation import probe as probing
from ple_jax.evaluation import replay as replaying
from ple_jax.export import write
from ple_jax.formulas import intervals
from ple_jax.models import peft
from ple_jax.planning import describe as planning
from ple_jax.planning import rates
from ple_jax.planning.fit import fitted
from ple_jax.reports import comparison_files, probe_page, run_page
from ple_jax.serving import commands
from ple_jax.training import loop, measures, offline, outcome, points
from ple_jax.training.opening import check_length, checkpoint_inputs, open_run, read_inputs, second_reward, training_reward
from ple_jax.training.run import Run
from ple_jax.training.sampling import sampling_of
from ple_jax.training.state import State
from ple_jax.training.workdir import SUMMARY, begun, check_config, going_on, lock, recorded
from ple_jax.training.workdir import summary as finished

_SHOWN = 8  # queries of which --mode=generate prints the responses


def train(config: Any, workdir: Path, backend: str, accept: Sequence[str] = (), profile: bool = False) -> int:
    """Trains by Algorithm 1 (or an offline algorithm's epochs) to the end of the run, or continues where it stopped.

    A finished run continues too if it is to be longer; its summary and report are then written again at the new end.
    """
    baselines = importlib.import_module("torch_ascend.baselines") if config.trainer == "trl" else None
    if baselines is not None:
        baselines.check(config)
    with lock(workdir):
        inputs = fitted(read_inputs(begun(config, workdir, backend), backend), backend)
        keys, length = run_keys(inputs.config, backend, inputs.digests), functools.partial(check_length, inputs)
        kept = going_on(workdir, keys, accept=accept, check_length=length)
        _check_profile(profile, online := isinstance(inputs.algorithm, Algorithm), baselines)
        if (done := finished(workdir)) and _whole(done, config, online):
            return _finished(workdir, done)
        with open_run(workdir, backend, inputs, kept, tracked=True) as run:
            for said in outcome.of_two_rewards(kept):
                run.session.progress.log(said)
            run = _prepared(run, profile)
            state = (baselines or (loop if online else offline)).train(run)
            summary = (measures if online else offline).summary(run, backend, state)
            if online and baselines is None:  # another trainer's rates are its own
                _keep_rates(run, backend, state, summary)
            taken = points.taken(run)
            write.write_adapter(run, taken, summary)
        head = _trains_scores(inputs.algorithm, inputs.config)
        if head:  # not before the run's own copy of the base is gone
            write.write_merged(config, workdir, backend, taken, summary, None, head=True)
        write_json(workdir / SUMMARY, summary, sealed=True)
        page = run_page.write(workdir)
    print("\n".join([f"{outcome.reached(summary)} in {summary['wall_seconds']:.0f} s", *outcome.doubts(summary, config)]))
    print(f"report: {page}\nadapter: {workdir / 'adapter'}, of {points.told(config, taken)}")
    if head:
        print(_use_reward(workdir / "reward_model"))
    return 0


def _finished(workdir: Path, summary: Mapping[str, Any]) -> int:
    if not (workdir / "report.html").exists():  # ended between the summary and the report
        run_page.write(workdir)
    early = f" (stopped early: {summary['stopped']})" if summary.get("stopped") else ""
    print(f"{workdir} is finished{early}: {outcome.reached(summary)}; see {workdir / 'report.html'}")
    return 0


def _prepared(run: Run[Any], profile: bool) -> Run[Any]:
    """Removes what tells of the end of a shorter run and writes environment.json; the session has the one before."""
    workdir, before = run.session.workdir, None
    for name in (SUMMARY, "report.html"):
        (workdir / name).unlink(missing_ok=True)
    with contextlib.suppress(Damaged):  # it is written anew
        before = read_json(workdir / "environment.json")
    write_json(workdir / "environment.json", _environment(run))
    return run._replace(session=run.session._replace(profile=profile, before=before or {}))


def _environment(run: Run[Any]) -> dict[str, Any]:
    return {**project(), "dtype": run.config.model.dtype, **run.backend.environment()}


def _keep_rates(run: Run[Algorithm], backend: str, state: State, summary: Mapping[str, Any]) -> None:
    answers = len(run.data.heldout) * run.config.eval.samples
    rates.keep(run.config, backend, rates.measured(state.lines, run.backend.environment(), summary, answers=answers))


def _check_profile(profile: bool, online: bool, baselines: Any) -> None:
    if profile and (not online or baselines is not None):
        raise UserError("--profile traces an iteration of our own trainer of an algorithm that samples: leave it out here")


def _whole(summary: Mapping[str, Any], config: Any, online: bool) -> bool:
    """Says whether the run that wrote this summary is as long as the config wants it, or was stopped early.

    Summaries of earlier versions do not name their epochs; those count as long enough.
    """
    wanted = {"iterations": config.iterations} if online else {"epochs": config.offline.epochs}
    return bool(summary.get("stopped")) or all(summary.get(name, value) == value for name, value in wanted.items())


def _trains_scores(algorithm: Algorithm | OfflineAlgorithm, config: Any) -> bool:
    """Says whether the algorithm trains a reward model."""
    return algorithm.needs(config).head == "score"


@contextmanager
def on_run(
    config: Any, workdir: Path, backend: str, accept: Sequence[str] = (), *, trained: bool = True, bare: bool = False
) -> Iterator[tuple[Run[Any], State]]:
    """Opens a run at the checkpoint that config.checkpoint.use names, or at its start if not `trained`.

    The start of a run needs no checkpoint. A `bare` run has neither records nor rewards: these are not read.

    Yields:
        The run, and the state at that checkpoint.

    Raises:
        UserError: there is no run in the directory, it belongs to another config, or it has no such checkpoint.
    """
    if trained and not (workdir / "config.json").exists():
        raise UserError(f"--workdir={workdir} holds no run; train one first: --mode=train")
    with lock(workdir):
        config = begun(config, workdir, backend)
        if bare:
            before = recorded(workdir) or {}
            inputs = checkpoint_inputs(config, before)
        else:
            inputs = fitted(read_inputs(config, backend), backend)
        keys = run_keys(inputs.config, backend, inputs.digests)
        if bare:  # whatever sampled then, nothing is sampled by a server now
            keys["sampling"]["server"] = before["sampling"]["server"]
        kept = check_config(workdir, keys, accept=accept)
        with open_run(workdir, backend, inputs, kept) as run:
            yield run, points.taken(run) if trained else State(run.backend.environment())


def _check_samples(config: Any, mode: str) -> None:
    if not isinstance(algorithms.load(config.algorithm), Algorithm):
        raise UserError(f"--mode={mode} needs an algorithm that samples, and config.algorithm is {config.algorithm!r}")


def evaluate(config: Any, workdir: Path, backend: str, accept: Sequence[str] = ()) -> int:
    """Scores the held-out queries with the run's checkpoint and prints the result; it reuses what training evaluated."""
    with on_run(config, workdir, backend, accept) as (run, state):
        if not isinstance(run.algorithm, Algorithm):
            found = offline.evaluate(run, examples := offline.examples(run)[1], state.iteration)
            numbers = (f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float))
            print(f"step {state.iteration}: held-out {', '.join(numbers)}, over {len(examples)} examples")
            return 0
        rollouts = measures.evaluate(run, state.iteration, step=points.step_within(state))
    reward = measures.mean_rewards(rollouts)
    reward = reward[~np.isnan(reward)]
    # a mean cannot leave the reward's scale, though an interval that is symmetric may
    low, high = np.clip(intervals.bootstrap_ci(reward, seed=config.seed), *run.reward.scale)
    print(
        f"{points.place(state)}: held-out reward {reward.mean():.4f} (95% interval {low:.4f} to {high:.4f})"
        f" over {len(reward)} queries x {config.eval.samples} samples"
    )
    return 0


def generate(config: Any, workdir: Path, backend: str, accept: Sequence[str] = ()) -> int:
    """Samples several responses to a fixed set of queries, keeps them for --mode=compare, and prints the first of them.

    The model is the checkpoint that config.checkpoint.use names, or what the run starts from; see config.generate.
    """
    _check_samples(config, "generate")
    trained = config.generate.policy == "trained"
    second = second_reward(config, backend, "generate")
    scored = training_reward(config, backend), second, second_reward(config, backend, "eval")
    queries = responses.evaluation_set(config, reads=rewards.reads(*scored))
    if any(query.completion for query in queries.queries):
        describe.check_installed()
    with on_run(config, workdir, backend, accept, trained=trained) as (run, state):
        path = responses.write(
            run, queries, second, backend=backend, iteration=state.iteration, step=points.step_within(state)
        )
    found = responses.read(path.parent, int(path.stem[5:]))
    for rollout in found.rollouts[:_SHOWN]:
        print(f"\n{rollout.query_id}  {rollout.prompt}")
        for r in rollout.responses:
            print(f"  {r.reward:+.3f}  {r.text!r}")
    print()
    for name, value in describe.describe(found).items():
        print(f"{name:<22} {value:.4g}")
    print(f"\n{len(found.rollouts)} queries x {config.generate.samples} responses, kept in {path}")
    return 0


def probe(config: Any, workdir: Path, backend: str) -> int:
    """Measures what the principles buy before any training, rule by rule, and what the threshold means for this reward."""
    _check_samples(config, "probe")
    with on_run(config, workdir, backend, trained=False) as (run, _):
        found = probing.probe(run)
    said = probing.said(found)
    write_json(workdir / probing.FILE, found)
    page = probe_page.write(plain(found), said, workdir)
    print(f"{found['queries']} held-out queries x {found['samples']} responses, {len(found['prompts'])} prompts")
    print("\n".join(said))
    print(f"page: {page}")
    return 0


def harness(config: Any, workdir: Path, backend: str, accept: Sequence[str] = ()) -> int:
    """Evaluates tasks of lm-evaluation-harness before and after training, which shows what alignment cost."""
    tax.check(config)
    _check_samples(config, "harness")
    figures = {}
    for which in sorted(config.harness.policies, reverse=True):  # trained first: there may be nothing trained
        with on_run(config, workdir, backend, accept, trained=which == "trained") as (run, state):
            step = points.step_within(state)
            point = {"iteration": state.iteration, "step": step, "within": step is not None}
            figures[which] = tax.evaluate(run, tax.file_of(workdir, point if which == "trained" else None))
    print("\n".join(tax.said(tax.rows(figures.get("start"), figures.get("trained")))))
    if (workdir / "report.html").exists():
        run_page.write(workdir)
    return 0


def replay(config: Any, workdir: Path, backend: str, against: Path | None = None) -> int:
    """Labels the responses that a run sampled as the config now says, and prints what would have been decided otherwise.

    With `against` it prints instead the first quantity in which the run differs from another one.
    """
    if against is not None:
        found = differences.of(workdir, against)
        print("\n".join(map(str, found)) or f"no difference: {workdir} and {against} did the same, bit by bit")
        return 0
    print("\n".join(replaying.said(replaying.replay(config, workdir, backend))))
    print(f"journals, flips and records: {workdir / replaying.FOLDER}")
    return 0


def compare(config: Any, workdir: Path, backend: str, runs: Sequence[str]) -> int:
    """Compares the responses of several runs: tables, tests, win rates, and one page."""
    with lock(workdir):
        for result in comparison.results(runs, workdir, config=config, backend=backend):
            page = comparison_files.write(result, workdir)
    print(f"page: {page}")
    return 0


def export(config: Any, workdir: Path, backend: str, accept: Sequence[str] = ()) -> int:
    """Writes the adapter of the run's checkpoint in PEFT's layout.

    It also writes merged weights, and pushes to a hub, if the config asks for that. A reward model is always written merged
    as well, as only then can it be used as a reward.
    """
    algorithm = algorithms.load(config.algorithm)
    head = _trains_scores(algorithm, algorithms.with_defaults(algorithm, config))
    merge = config.export.merged or head
    if merge:  # refused before anything is loaded or written
        importlib.import_module("ple_jax.export.merged").check_folder(workdir / ("reward_model" if head else "merged"))
    adapter, state, base_model = _export_adapter(config, workdir, backend, accept)
    print(f"adapter of {points.told(config, state)}: {adapter} (PEFT layout, base model {base_model})")
    folders = {adapter: config.export.push}
    if merge:
        repo = write.merged_repository(config)
        with lock(workdir):
            merged = write.write_merged(config, workdir, backend, state, finished(workdir), repo, head=head)
        print(f"merged weights: {merged} (safetensors, for transformers)")
        folders[merged] = repo
    for folder, repo in folders.items():
        if repo:
            address = importlib.import_module("ple_jax.export.merged").push(folder, repo, private=config.export.private)
            print(f"pushed {folder} to {address}")
    if head:
        print(_use_reward(merged))
        return 0
    print("\n".join(_served(config, workdir, adapter, merged if merge else None, base_model)))
    return 0


def _served(config: Any, workdir: Path, adapter: Path, merged: Path | None, base_model: str) -> Iterator[str]:
    """Yields the lines that say how to serve what was exported; `merged` is None if only the adapter was."""
    name = workdir.resolve().name
    serve = commands.serve_adapter(adapter, peft.read(adapter)[1], name=name)
    lines = [serve] if serve else []
    if merged is not None:
        lines.append(commands.serve_merged(merged, name=name))
    yield "serve with vLLM:" if lines else "vLLM cannot serve this adapter by itself: --config.export.merged=True"
    yield from (f"  {line}" for line in lines)
    if merged is not None:
        yield f"or with transformers, on a CPU too:\n  {commands.serve_by_transformers(merged)}"
    if serve and importlib.import_module("ple_jax.models.weights").gguf_file(config.model.path):
        yield (
            f"{base_model} in the first line is the published one; this was trained on the dequantised weights of a GGUF"
            f" file, which differ a little: {'the second line serves these' if merged else 'merge to serve these'}"
        )


def _export_adapter(config: Any, workdir: Path, backend: str, accept: Sequence[str]) -> tuple[Path, State, str]:
    # a function of its own: the base's weights are freed when it returns, before the merged model is written
    with on_run(config, workdir, backend, accept, bare=True) as (run, state):
        return write.write_adapter(run, state, finished(workdir)), state, run.base.name


def _use_reward(folder: Path) -> str:
    return f"use it: --config.reward.name=model --config.reward.kwargs=\"{{'path': '{folder}'}}\""


def chat(config: Any, workdir: Path, backend: str, accept: Sequence[str] = ()) -> int:
    """Holds a conversation on the terminal with the run's checkpoint, its base, or both.

    Lines may also come from a pipe.
    """
    _check_samples(config, "chat")
    # nothing is written after this: another process may have the directory, and Ctrl-C ends an answer, not the program
    with on_run(config, workdir, backend, accept, bare=True) as (run, state):
        talk = chatting.Chat(
            run.backend.stream,
            run.base.tokenizer,
            sampling=sampling_of(config, run.base.eos),
            principles=run.prompts.principles.text,
            context=run.base.context,
            seed=config.seed,
            date=run.config.task.date,
            template=config.task.chat,
            thinking=config.task.thinking,
            write=functools.partial(print, end="", flush=True),
        )
    print(f"{run.base.name} at {points.told(config, state)}; /help lists the commands\n{talk.status()}", end="")
    if not config.task.chat:
        turns = "; /template on takes lines as turns of a chat" if run.base.tokenizer.chat_template is not None else ""
        print(f"this run was trained on plain text, so what you type is continued{turns}")
    if not run.prompts.principles.text and config.principles != "none":
        print(f"its principles, {config.principles!r}, are not there any more: /principles on adds nothing")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # lines can be edited where Python has it
            importlib.import_module("readline")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no UTF-8 should not end the conversation
    talk.run(lambda: input("> " if sys.stdin.isatty() else ""))
    return 0


def plan(config: Any, workdir: Path, backend: str, topology: str | None = None) -> int:
    """Prints what `train` would do: sizes, shapes, steps, and the prompts as the model sees them.

    With a topology it reports instead what every phase needs of those devices, which need not be there.
    """
    accelerators = topology and not topology.startswith("cpu:")  # whatever is here
    if accelerators and config.model.dtype == "auto":
        config = ConfigDict(config.to_dict() | {"model": config.model.to_dict() | {"dtype": "bfloat16"}})
    inputs = fitted(read_inputs(begun(config, workdir, backend), backend), backend, topology)
    config, algorithm, found = inputs.config, inputs.algorithm, inputs.data
    algorithm.make_loss(config)
    if topology:
        if not isinstance(algorithm, Algorithm):
            raise UserError(f"--topology goes with an algorithm that samples, and config.algorithm is {config.algorithm!r}")
        backends.load_topology(backend).report(
            config, topology, algorithm=algorithm, train_set=found.train, heldout=found.heldout,
            principles=inputs.principles.text,
        )  # fmt: skip
        return 0
    module = backends.load(backend)
    loaded = module.load(config, planned=True)
    parameters, adapter_parameters = module.count(config, loaded)
    common: dict[str, Any] = {
        "tokenizer": loaded.tokenizer, "parameters": parameters, "adapter_parameters": adapter_parameters, "found": found,
        "model": loaded.name, "context": loaded.config.max_positions,
    }  # fmt: skip
    if not isinstance(algorithm, Algorithm):
        print(planning.describe_offline(config, algorithm=algorithm, **common))
        return 0
    asked = {"rules": inputs.principles, "reward": inputs.reward, "second": inputs.second, "eos": loaded.eos}
    print(planning.describe(config, algorithm=algorithm, **common, **asked, rates=rates.read(config, backend)))
    return 0
