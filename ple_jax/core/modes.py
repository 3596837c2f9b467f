"""What `--mode` names. Each mode takes (config, workdir, backend) and gives an exit code."""

import contextlib
import functools
import hashlib
import importlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ple_jax.core import card, loop, peft, principles, report, rewards, sinks, tasks
from ple_jax.core import chat as chatting
from ple_jax.core import plan as planning
from ple_jax.core import workdir as files
from ple_jax.core.config import BACKENDS, UserError
from ple_jax.core.interrupt import Stop
from ple_jax.core.plugins import load_module
from ple_jax.core.progress import Progress
from ple_jax.core.rollouts import Journal
from ple_jax.core.types import Response, Sampling
from ple_jax.models import hub


def load_algorithm(name: str) -> ModuleType:
    """The module of an algorithm: a name in ple_jax/algorithms, a Python file, or a dotted path.

    Raises:
        UserError: it does not import, or lacks one of the functions that the loop calls.
    """
    own = name.endswith(".py") or "." in name
    module = load_module(name if own else f"ple_jax.algorithms.{name}", "algorithm")
    needed = ("collect", "schedule", "label", "batch", "make_loss", "needs_reference")
    if missing := [function for function in needed if not hasattr(module, function)]:
        raise UserError(
            f"config.algorithm {name!r} lacks {', '.join(missing)}; start it with `from ple_jax.algorithms.ple import *`"
        )
    return module


def inputs(config: Any) -> dict[str, str]:
    """Digests of the files that a config names: the same path with other content is another run."""
    texts = {
        "train": repr(tasks.load(config.task.train)),
        "heldout": repr(tasks.load(config.task.heldout)),
        "principles": principles.load(config.principles),
    }
    code = {"algorithm": config.algorithm, "reward": config.reward.name.split(":")[0], "sft": config.sft.data or ""}
    texts |= {name: Path(file).read_text() for name, file in code.items() if Path(file).is_file()}
    digests = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}
    if config.model.adapter is not None:
        files = [Path(config.model.adapter) / name for name in (peft.CONFIG, peft.WEIGHTS)]
        digests["adapter"] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    return {**digests, "model": hub.identity(config.model.path, config.model.revision)}


def resolved(config: Any, backend: str) -> dict[str, Any]:
    """What config.json holds: the backend, every key with a part in what a run computes, and the digests of the inputs."""
    keys = config.to_dict()
    del keys["export"]
    del keys["model"]["revision"]  # the commit that it stands for is among the inputs
    return {"backend": backend, **keys, "inputs": inputs(config)}


@contextmanager
def open_run(config: Any, workdir: Path, backend: str) -> Iterator[loop.Run]:
    """Everything a run needs, cheap checks first; from here on the directory belongs to this config."""
    with Stop() as stop, Progress(config.iterations) as progress:
        train, heldout = tasks.load(config.task.train), tasks.load(config.task.heldout)
        tasks.check_disjoint(train, heldout)
        tasks.draw(train, config.queries_per_iteration, seed=config.seed, iteration=0)  # refuses more than there are
        text = principles.load(config.principles)
        reward = rewards.load(config.reward.name, config.reward.kwargs.to_dict())
        algorithm = load_algorithm(config.algorithm)
        loss = algorithm.make_loss(config)
        names = ("jsonl", *(name for name in config.sinks if name != "jsonl"))  # metrics.jsonl is part of the contract
        sinks.check(names)
        progress.phase("load", 1)
        module = importlib.import_module(BACKENDS[backend])
        loaded = module.load(config)
        built = module.build(config, loaded)
        loaded = loaded._replace(weights={})  # the backend has its own: the host's copy may go
        progress.advance(1)
        for note in module.notes(built):
            progress.log(note)
        stop.check()
        # not before everything above was found in order: a mistake mended should not need another directory
        files.write_json(workdir / "config.json", resolved(config, backend))
        outputs = sinks.make(names, workdir, config.to_dict())
        yield loop.Run(
            config, workdir, built, loaded.tokenizer, loaded.eos, loaded.name, loaded.config.max_positions,
            module.transposed(loaded), algorithm, loss, reward, text, train, heldout, outputs, progress, stop, loop.Clock(),
        )  # fmt: skip


def train(config: Any, workdir: Path, backend: str) -> int:
    """Runs Algorithm 1 to its end, or goes on where it stood."""
    with files.lock(workdir):
        files.check(workdir, resolved(config, backend))
        if (done := files.read_json(workdir / "summary.json")) is not None:
            low, high = done["heldout_gain_ci95"]
            if not (workdir / "report.html").exists():  # ended between the summary and the report
                report.write(workdir)
            print(
                f"{workdir} is finished: held-out reward {done['heldout_reward_before']:.3f} ->"
                f" {done['heldout_reward_after']:.3f} (gain {low:.3f} to {high:.3f}); see {workdir / 'report.html'}"
            )
            return 0
        with open_run(config, workdir, backend) as run:
            files.write_json(workdir / "environment.json", run.backend.environment())
            state = loop.train(run)
            summary = loop.summary(run, backend, state)
            export_adapter(run, state["iteration"], summary)
            files.write_json(workdir / "summary.json", summary)
            page = report.write(workdir)
    low, high = summary["heldout_gain_ci95"]
    print(
        f"held-out reward {summary['heldout_reward_before']:.3f} -> {summary['heldout_reward_after']:.3f}"
        f" (95% interval of the gain {low:.3f} to {high:.3f}) in {summary['wall_seconds']:.0f} s"
    )
    print(f"report: {page}\nadapter: {workdir / 'adapter'}")
    return 0


def _restore(run: loop.Run) -> dict[str, Any]:
    state = run.backend.restore(run.workdir / "checkpoints")
    if state is None:
        raise UserError(f"{run.workdir / 'checkpoints'} holds no checkpoint yet; train first: --mode=train")
    return state


@contextmanager
def _on_run(config: Any, workdir: Path, backend: str) -> Iterator[tuple[loop.Run, dict[str, Any]]]:
    if not (workdir / "config.json").exists():
        raise UserError(f"--workdir={workdir} holds no run; train one first: --mode=train")
    with files.lock(workdir):
        files.check(workdir, resolved(config, backend))
        with open_run(config, workdir, backend) as run:
            yield run, _restore(run)


def evaluate(config: Any, workdir: Path, backend: str) -> int:
    """Scores the held-out queries with the newest checkpoint and prints the result; reuses what training evaluated."""
    with _on_run(config, workdir, backend) as (run, state):
        rollouts, _ = loop.evaluate(run, state["iteration"], loop.renderer(run))
    reward = loop.mean_rewards(rollouts)
    low, high = loop.measure.bootstrap_ci(reward, seed=config.seed)
    print(
        f"iteration {state['iteration']}: held-out reward {reward.mean():.4f} (95% interval {low:.4f} to {high:.4f})"
        f" over {len(rollouts)} queries x {config.eval.samples} samples"
    )
    return 0


def generate(config: Any, workdir: Path, backend: str) -> int:
    """Prints responses of the newest checkpoint to the held-out queries, plain and principled, and keeps them."""
    with _on_run(config, workdir, backend) as (run, state):
        path = workdir / "responses" / f"iter_{state['iteration']:04d}.jsonl"
        journal = Journal(path.parent, state["iteration"])
        if (rollouts := journal.read()) is None:
            slots = run.algorithm.collect(config)
            rollouts = loop.score(run, loop.sample(run, run.heldout, slots, journal, loop.GENERATE, loop.renderer(run)))
            journal.complete(rollouts)
    for rollout in rollouts:
        print(f"\n{rollout.query_id}  {rollout.prompt}")
        for r in rollout.responses:
            print(f"  {_label(r)}  {r.text!r}")
    print(f"\nkept in {path}")
    return 0


def _label(response: Response) -> str:
    return f"{response.kind:<11}{response.reward:+.3f}"


def _target_names(targets: Sequence[str], adapter: Mapping[str, Any]) -> list[str]:
    """Module names for PEFT: as given, those that all-linear adapted, or whole paths where a name would say too much."""
    paths = sorted(peft.modules(adapter))
    if any(".language_model." in path for path in paths):
        return paths  # a vision tower has modules of the same names
    return sorted({path.rsplit(".", 1)[1] for path in paths}) if "all-linear" in targets else list(targets)


def export_adapter(run: loop.Run, iteration: int, summary: Mapping[str, Any]) -> Path:
    """The adapter in PEFT's layout and its model card, in the work directory; `summary` is {} for an unfinished run."""
    lora, folder, tensors = run.config.lora, run.workdir / "adapter", run.backend.adapter()
    peft.write(
        folder,
        tensors,
        rank=lora.rank,
        alpha=lora.alpha,
        targets=_target_names(lora.targets, tensors),
        base_model=run.base_model,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        fan_in_fan_out=run.transposed,
        dropout=lora.dropout,
    )
    readme = card.render(
        run.workdir,
        library="peft",
        base_model=run.base_model,
        iteration=iteration,
        summary=summary,
        defaults=_defaults(),
        repo=run.config.export.push,
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return folder


def _defaults() -> dict[str, Any]:
    return importlib.import_module("configs.default").get_config().to_dict()


def export(config: Any, workdir: Path, backend: str) -> int:
    """Writes the newest checkpoint's adapter in PEFT's layout; merged weights and a push where the config asks for them."""
    if config.export.merged:  # refused before anything is loaded or written
        importlib.import_module("ple_jax.models.export").check_folder(workdir / "merged")
    adapter, iteration, base_model = _export_adapter(config, workdir, backend)
    print(f"adapter of iteration {iteration}: {adapter} (PEFT layout, base model {base_model})")
    name = workdir.resolve().name
    serve = card.serve_adapter(adapter, peft.read(adapter)[1], name=name)
    folders = {adapter: config.export.push}
    if config.export.merged:
        repo = _merged_repository(config)
        merged = _export_merged(config, workdir, backend, iteration, repo)
        print(f"merged weights: {merged} (safetensors, for transformers)")
        folders[merged] = repo
    for folder, repo in folders.items():
        if repo:
            address = importlib.import_module("ple_jax.models.export").push(folder, repo, private=config.export.private)
            print(f"pushed {folder} to {address}")
    commands = [serve] if serve else []
    if config.export.merged:
        commands.append(card.serve_merged(merged, name=name))
    print("vLLM cannot serve this adapter by itself: --config.export.merged=True" if not commands else "serve with vLLM:")
    for command in commands:
        print(f"  {command}")
    return 0


def _export_adapter(config: Any, workdir: Path, backend: str) -> tuple[Path, int, str]:
    # a function of its own: the base's weights are freed when it returns, before the merged model is written
    with _on_run(config, workdir, backend) as (run, state):
        summary = files.read_json(workdir / "summary.json") or {}
        return export_adapter(run, state["iteration"], summary), state["iteration"], run.base_model


def _export_merged(config: Any, workdir: Path, backend: str, iteration: int, repo: str | None) -> Path:
    from ple_jax.models import export as weights  # numpy alone, whatever the backend

    with files.lock(workdir):
        loaded = importlib.import_module(BACKENDS[backend]).load(config)
        readme = card.render(
            workdir,
            library="transformers",
            base_model=loaded.name,
            iteration=iteration,
            summary=files.read_json(workdir / "summary.json") or {},
            defaults=_defaults(),
            repo=repo,
        )
        return weights.merged(
            loaded,
            workdir / "adapter",
            workdir / "merged",
            dtype=config.export.dtype,
            shard_gb=config.export.shard_gb,
            readme=readme,
            about={"iteration": iteration, "dtype": config.export.dtype},
        )


def _merged_repository(config: Any) -> str | None:
    # not the adapter's: transformers would find it beside the merged weights and apply it once more
    return f"{config.export.push}-merged" if config.export.push else None


def chat(config: Any, workdir: Path, backend: str) -> int:
    """A conversation on the terminal with the newest checkpoint, its base, or both; reads lines from a pipe too."""
    # nothing is written after this: another process may have the directory, and Ctrl-C ends an answer, not the program
    with _on_run(config, workdir, backend) as (run, state):
        talk = chatting.Chat(
            run.backend.stream,
            run.tokenizer,
            sampling=Sampling(eos=run.eos, **{key: config.sampling[key] for key in Sampling._fields if key != "eos"}),
            principles=run.principles,
            context=run.context,
            seed=config.seed,
            write=functools.partial(print, end="", flush=True),
        )
    print(f"iteration {state['iteration']} of {run.base_model}; /help lists the commands\n{talk.status()}", end="")
    if talk.options.template and not config.task.chat:
        print("this run was trained on plain text to be continued: /template off")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # lines can be edited where Python has it
            importlib.import_module("readline")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no UTF-8 should not end the conversation
    talk.run(lambda: input("> " if sys.stdin.isatty() else ""))
    return 0


def plan(config: Any, workdir: Path, backend: str, topology: str | None = None) -> int:
    """Prints what `train` would do: sizes, shapes, steps, and the prompts as the model sees them.

    With a topology: what every phase needs of its devices, which need not be there.
    """
    train_set, heldout = tasks.load(config.task.train), tasks.load(config.task.heldout)
    tasks.check_disjoint(train_set, heldout)
    tasks.draw(train_set, config.queries_per_iteration, seed=config.seed, iteration=0)  # refuses more than there are
    text = principles.load(config.principles)
    rewards.load(config.reward.name, config.reward.kwargs.to_dict())
    algorithm = load_algorithm(config.algorithm)
    algorithm.make_loss(config)
    if topology:
        importlib.import_module("ple_jax.topology").report(
            config, topology, algorithm=algorithm, train_set=train_set, heldout=heldout, principles=text
        )
        return 0
    module = importlib.import_module(BACKENDS[backend])
    loaded = module.load(config)
    parameters, adapter_parameters = module.count(config, loaded)
    print(
        planning.describe(
            config,
            tokenizer=loaded.tokenizer,
            parameters=parameters,
            adapter_parameters=adapter_parameters,
            train=train_set,
            heldout=heldout,
            principles=text,
            slots=algorithm.collect(config),
            schedule=algorithm.schedule(config),
        )
    )
    return 0
