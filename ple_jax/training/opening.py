"""Opens a run from its config: reads and checks what the config names, cheap things first, and builds the backend."""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FrozenConfigDict

from ple_jax import algorithms, rewards
from ple_jax.algorithms import Algorithm, OfflineAlgorithm
from ple_jax.core import backends, files, identity
from ple_jax.core.answers import Cache
from ple_jax.core.compact import compact
from ple_jax.core.config import flatten
from ple_jax.core.errors import UserError
from ple_jax.core.secrets import redacted
from ple_jax.core.types import Reward
from ple_jax.data.left_out import note, noted
from ple_jax.data.load import Data, load_data, load_warm_up
from ple_jax.data.mixture import draw_queries
from ple_jax.data.queries import digest, record_digest
from ple_jax.models import hub, layout, peft
from ple_jax.prompts import principles
from ple_jax.training import prompting, sinks
from ple_jax.training.interrupt import Stop
from ple_jax.training.progress import Progress
from ple_jax.training.run import Base, Clock, Run, Session
from ple_jax.training.workdir import begun


class Inputs(NamedTuple):
    """The inputs that a config names, read and checked. That is cheap, and done before any weights are read."""

    config: Any  # with the algorithm's own knobs filled in
    algorithm: Algorithm | OfflineAlgorithm
    data: Data
    principles: principles.Principles
    reward: Reward
    second: Reward | None  # that training never sees
    digests: dict[str, str]  # the same path with other content is another run
    bare: bool = False  # only a checkpoint is wanted: there are no records, and nothing is sampled by a server


def read_inputs(config: Any, backend: str) -> Inputs:
    """Reads the algorithm, the records, the principles and the rewards of a config; a reward may use the run's own devices.

    Raises:
        UserError: if one of them cannot be used, or they do not go together.
    """
    algorithm = algorithms.load(config.algorithm)
    config = algorithms.with_defaults(algorithm, config)
    text, second = principles.load(config.principles), None
    _check_needs(config, algorithm.needs(config), text)
    if isinstance(algorithm, Algorithm):
        reward, second = training_reward(config, backend), second_reward(config, backend, "eval")
        # held-out queries are answered, whatever is trained on
        needs, reads = algorithms.records(algorithm.collect(config)), (rewards.reads(reward), rewards.reads(second))
        found = load_data(config, needs=needs, heldout_needs="prompt", reads=reads[0], heldout_reads=reads[1])
        _check_reach(config, algorithm, reward)
        draw_queries(config, found.train, 0)  # refuses more than there are
        principles.choose(text, config.principles_per_query, seed=config.seed, query_id="")  # refuses more than there are
    else:
        _check_offline(config)
        found, reward = load_data(config, needs=algorithm.records), Reward("none")
    rules, scorers = text if isinstance(algorithm, Algorithm) else None, {"reward": reward, "second": second}
    digests = _digests(config, found, rules, scorers)
    return Inputs(config, algorithm, found, text, reward, second, digests)


def checkpoint_inputs(config: Any, kept: Mapping[str, Any]) -> Inputs:
    """Reads what a checkpoint needs: the algorithm, and the principles if they are still there.

    Records, rewards and servers are not asked, and may be gone.

    Args:
        kept: the contents of the run's config.json, which is trusted for the digests of what is not read.

    Raises:
        UserError: the algorithm cannot be used.
    """
    algorithm = algorithms.load(config.algorithm)
    config = algorithms.with_defaults(algorithm, config)
    nothing = Data(compact([]), compact([]), {})
    try:
        text = principles.load(config.principles)
    except UserError:
        text = principles.load(principles.NONE)
    digests = {**kept["inputs"], **_own_digests(config)}
    return Inputs(config, algorithm, nothing, text, Reward("none"), None, digests, bare=True)


def training_reward(config: Any, backend: str) -> Reward:
    """Loads the reward of config.reward, which may use the run's own devices."""
    return rewards.load(config.reward.name, config.reward.kwargs.to_dict(), backend=backend, mesh=config.mesh.to_dict())


def second_reward(config: Any, backend: str, section: str) -> Reward | None:
    """Loads the reward that training never sees, of config.eval or config.generate; returns None if none is named.

    Args:
        section: "eval" or "generate".

    Raises:
        UserError: as `rewards.load`, with the keys of that section.
    """
    options = config[section]
    if options.second_reward is None:
        return None
    try:
        return rewards.load(
            options.second_reward, options.second_kwargs.to_dict(), backend=backend, mesh=config.mesh.to_dict()
        )
    except UserError as error:
        raise UserError(str(error).replace("config.reward.", f"config.{section}.second_")) from error


def _check_needs(config: Any, needs: algorithms.Needs, rules: principles.Principles) -> None:
    """Raises a UserError for a setting that takes the meaning from what an algorithm's loss reads."""
    if config.lora.dropout and needs.old_logprobs:
        raise UserError(
            f"config.lora.dropout is {config.lora.dropout:g}, and algorithm {config.algorithm!r} compares a policy with"
            " itself, as it was when it sampled: dropout alone would move that ratio and have it clipped; set it to 0"
        )
    if needs.teacher and not rules.text:
        raise UserError(
            f"config.principles is {config.principles!r}, and the teacher of algorithm {config.algorithm!r} is the policy"
            " with principles in its prompt: without any the two are the same, and nothing is learned; name some"
        )


_OF_SAMPLING = {  # what is read only where responses are sampled -> its default
    "warm_up.data": None, "eval.second_reward": None, "eval.best": "reward", "eval.max_kl": (), "eval.patience": 0,
}  # fmt: skip


def _check_offline(config: Any) -> None:
    """Raises a UserError for a setting that an algorithm which samples nothing would not read."""
    flat = flatten(config.to_dict())
    if weighted := [name for name, of in config.task.sets.to_dict().items() if of.get("weight", 1.0) != 1.0]:
        raise UserError(
            f"config.task.sets[{weighted[0]!r}] has a weight, and algorithm {config.algorithm!r} takes every record of"
            " every set once an epoch: leave the weights out, and choose by max_train"
        )
    if config.sampling.server is not None:
        raise UserError(
            f"config.sampling.server is {config.sampling.server!r}, and algorithm {config.algorithm!r} samples nothing"
            " (nor does vLLM serve a head that is being trained): unset it"
        )
    if unread := [key for key, usual in _OF_SAMPLING.items() if flat[key] != usual]:
        raise UserError(
            f"config.{unread[0]} is {flat[unread[0]]!r}, and algorithm {config.algorithm!r}, which samples nothing, does not"
            f" read it: leave it at {_OF_SAMPLING[unread[0]]!r}"
        )


def _check_reach(config: Any, algorithm: Algorithm, reward: Reward) -> None:
    """Raises a UserError if no margin of this reward exceeds PLE's lowest threshold, and only ranked pairs have a loss."""
    blends = config.ple.blend_weight > 0 or config.ple.selection == "percentile"
    if blends or config.algorithm.removeprefix("ple_jax.algorithms.") != "ple" or config.reward.transform == "zscore":
        return
    if config.reward.length_penalty:  # scores have no bounds then
        return
    low, high = (0.0, 1.0) if config.reward.transform in ("sigmoid", "minmax") else reward.scale
    lowest = min(map(algorithm.schedule(config), range(config.iterations)))
    if lowest >= high - low:
        raise UserError(
            f"config.ple.tau_0 is {config.ple.tau_0:g}, the lowest threshold of the run {lowest:g}, and scores of"
            f" {reward.name!r} differ by at most {high - low:g}: every pair would be blended, and config.ple.blend_weight is"
            " 0: nothing is learned; set one of them"
        )


def _digests(
    config: Any, data: Data, rules: principles.Principles | None, scorers: Mapping[str, Reward | None]
) -> dict[str, str]:
    """Computes digests that tell these inputs from others of the same names. `rules` is None where nothing is sampled."""
    digests = {"train": digest(data.train), "heldout": digest(data.heldout)}
    if read := record_digest(itertools.chain(data.train, data.heldout)):
        digests["record"] = read
    if rules is not None:
        for name, reward in scorers.items():
            if reward is not None:
                digests[name] = identity.digest([json.dumps([leaf.version for leaf in rewards.leaves(reward)]).encode()])
        digests["principles"] = rules.digest
        if config.warm_up.data is not None:
            digests["warm_up"] = digest(load_warm_up(config).queries)
    return {**digests, **_own_digests(config)}


def _own_digests(config: Any) -> dict[str, str]:
    """Computes the digests of what every use of a run reads: a variant's file, an adapter to start from, the base model."""
    digests = {}
    if Path(config.algorithm).is_file():
        digests["algorithm"] = identity.digest([Path(config.algorithm).read_text().encode()])
    if config.model.adapter is not None:
        parts = [Path(config.model.adapter) / name for name in (peft.CONFIG, peft.WEIGHTS)]
        digests["adapter"] = identity.digest(part.read_bytes() for part in parts)
    return {**digests, "model": hub.identity(config.model.path, config.model.revision)}


def check_length(inputs: Inputs, found: Mapping[str, Any], done: int) -> None:
    """Checks that a run may get another length than its config.json has: what was done so far must not depend on it.

    Args:
        inputs: what the config names, which has the new length.
        found: the contents of config.json.
        done: finished iterations, or steps of an algorithm that samples nothing.

    Raises:
        UserError: if the run is longer already, or its learning rates or thresholds depend on how long it is.
    """
    config = inputs.config
    if config.optimizer.schedule != "constant":
        raise UserError(
            f"config.optimizer.schedule is {config.optimizer.schedule!r}: its rates depend on how long the run is, which"
            " cannot be changed then; give another --workdir, or begin with the constant one"
        )
    if not isinstance(inputs.algorithm, Algorithm):
        if config.offline.epochs < (before := found["offline"]["epochs"]):
            raise UserError(f"config.offline.epochs is {config.offline.epochs}, and was {before}: give at least as many")
        return
    if config.iterations < done:
        raise UserError(f"config.iterations is {config.iterations}, and {done} are done: give at least as many")
    before = ConfigDict(config.to_dict())
    before.iterations = found["iterations"]
    old, new = (inputs.algorithm.schedule(FrozenConfigDict(c)) for c in (before, config))
    for i in range(min(before.iterations, config.iterations)):
        if repr(float(old(i))) != repr(float(new(i))):
            raise UserError(
                f"config.iterations was {before.iterations} and cannot become {config.iterations}: the threshold depends on"
                f" it (config.ple.schedule={config.ple.schedule!r}), of iteration {i} it was {old(i):g} and would be"
                f" {new(i):g}; give another --workdir, or begin with the exponential or the constant schedule"
            )


@contextlib.contextmanager
def open_run(
    workdir: Path, backend: str, inputs: Inputs, kept: Mapping[str, Any] | None = None, *, tracked: bool = False
) -> Iterator[Run[Any]]:
    """Yields a run with everything it needs, cheap checks first. From here on the directory belongs to this config.

    Args:
        kept: the contents for config.json (`workdir.going_on`); they need not be given for a new directory.
        tracked: whether metrics go to all of config.sinks, as they do in training; else metrics.jsonl is the only sink.
    """
    config, algorithm = begun(inputs.config, workdir, backend), inputs.algorithm
    with Stop() as stop, Progress(_iterations(inputs)) as progress, contextlib.ExitStack() as stack:
        loss = algorithm.make_loss(config)
        names = ("jsonl", *(name for name in (config.sinks if tracked else ()) if name != "jsonl"))
        sinks.check(names)
        progress.phase("load", 1)
        module = backends.load(backend)
        loaded = module.load(config)
        built = module.build(config, loaded, head=algorithm.needs(config).head)
        base, vocab = _base(loaded, module), loaded.config.vocab_size
        del loaded  # the backend has weights of its own: the host's copy may go
        progress.advance(1)
        where = f"{backend} on {built.environment()['device']}"
        for said in (*module.notes(built), *_told(inputs, config, base, where)):
            progress.log(said)
        if config.sampling.server is not None and not inputs.bare:
            built = _served(config, built, workdir, base, vocab, progress)
            stack.callback(built.close)
        stop.check()
        # not before everything above was found in order: a mistake mended should not need another directory
        kept = kept or identity.run_keys(config, backend, inputs.digests)
        files.write_json(workdir / "config.json", kept, sealed=True)
        cache = stack.enter_context(Cache(workdir / "rewards.sqlite"))
        outputs = stack.enter_context(sinks.opened(names, workdir, redacted(config.to_dict())))
        session = Session(workdir, outputs, config.checkpoint.keep, cache, progress, stop, Clock())
        prompts = prompting.Prompts(config, base.tokenizer, inputs.principles, base.eos, base.context)
        run: Run[Any] = Run(
            config, base, built, algorithm, loss, inputs.data, prompts, inputs.reward, session, inputs.second
        )
        yield fitted(run) if isinstance(algorithm, Algorithm) and not inputs.bare else run


def _base(loaded: Any, module: Any) -> Base:
    return Base(
        loaded.name, loaded.tokenizer, loaded.eos, loaded.config.max_positions, module.transposed(loaded),
        layout.active_weights(loaded.config) + loaded.config.vocab_size * loaded.config.hidden_size, loaded.revision,
    )  # fmt: skip


def _told(inputs: Inputs, config: Any, base: Base, where: str) -> Iterator[str]:
    """Yields what a user should know before the run starts, a line each. `where` names the backend and its device."""
    yield f"{base.name} in {config.model.dtype}, by {where}"
    yield from prompting.notes(config, base.tokenizer, base.eos)
    if not isinstance(inputs.algorithm, Algorithm) or inputs.bare:  # a reward model's prompts are written by its template
        return
    yield from prompting.of_records(config, inputs.data, base.tokenizer)
    text = inputs.principles
    if text.text and not text.rules:
        yield (
            f"warning: principles {text.name!r} have no numbered rules, so all of the text goes into every prompt; probe and"
            ' config.principles_per_query tell rules apart that begin on lines of their own with their numbers: "1. "'
        )


def _served(config: Any, backend: Any, workdir: Path, base: Base, vocab: int, progress: Progress) -> Any:
    """Wraps the backend so that a vLLM server samples for it."""
    from ple_jax.serving import served  # not above: most runs have none

    return served.connect(
        config, backend, folder=workdir / "serving", base_model=base.name, vocab=vocab, transposed=base.transposed,
        log=progress.log,
    )  # fmt: skip


def fitted(run: Run[Algorithm], *rewards: Reward) -> Run[Algorithm]:
    """Returns the run with only those queries that the model and the rewards take; lists the others in the work directory.

    Args:
        rewards: rewards, beside the run's own, that score responses to held-out queries.

    Raises:
        UserError: if the share of the others is above config.task.max_bad_share, or a prompt with its response is longer
            than the model takes.
    """
    sources = algorithms.given_sources(run.algorithm.collect(run.config))
    others = (*rewards, *(() if run.second is None else (run.second,)))
    data = prompting.fitted(
        run.data, run.prompts, run.session.progress, sources=sources, rewards=(run.reward,), heldout_rewards=others
    )
    workdir, bad = run.session.workdir, data.bad
    if run.config.warm_up.data is not None:  # whose records are read once in a run
        bad = {**bad, "warm_up": noted(workdir, "warm_up")}
    if listed := note(bad, workdir):
        run.session.progress.log(listed)
    prompting.check_run(data, run.prompts, model=run.base.name)
    return run._replace(data=data, prompts=run.prompts.sharing(data.heldout))


def _iterations(inputs: Inputs) -> int:
    """Returns how many iterations the display counts to; evaluations, for an algorithm that samples nothing."""
    config = inputs.config
    if isinstance(inputs.algorithm, Algorithm):
        return config.iterations
    steps = -(-len(inputs.data.train) // config.optimizer.batch_queries) * config.offline.epochs
    return -(-steps // config.offline.eval_every)
