"""From a config to a run: what it names is read and checked, cheap things first, and the backend is built."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ple_jax import rewards
from ple_jax.algorithms import head_of, is_offline, load_algorithm
from ple_jax.core import backends
from ple_jax.core.answers import Cache
from ple_jax.core.errors import UserError
from ple_jax.core.files import write_json
from ple_jax.core.types import Reward, Slot
from ple_jax.data.load import Data, load_data, load_warm_up
from ple_jax.data.queries import digest, draw
from ple_jax.models import hub, layout, peft
from ple_jax.prompts import principles
from ple_jax.training import prompting, sinks
from ple_jax.training.interrupt import Stop
from ple_jax.training.progress import Progress
from ple_jax.training.run import Clock, Run


class Inputs(NamedTuple):
    """What a config names, read and checked; cheap, and before any weights."""

    algorithm: ModuleType
    data: Data
    principles: principles.Principles
    reward: Reward
    digests: dict[str, str]  # the same path with other content is another run


def read_inputs(config: Any, backend: str) -> Inputs:
    """The algorithm, the records, the principles and the reward of a config, which may use the run's own devices."""
    algorithm = load_algorithm(config.algorithm)
    samples = not is_offline(algorithm)
    if config.sampling.server is not None and not samples:
        raise UserError(
            f"config.sampling.server is {config.sampling.server!r}, and algorithm {config.algorithm!r} samples nothing (nor"
            " does vLLM serve a head that is being trained): unset it"
        )
    if samples:  # held-out queries are answered, whatever is trained on
        found = load_data(config, needs=_needs(algorithm.collect(config)), heldout_needs="prompt")
    else:
        found = load_data(config, needs=algorithm.NEEDS)
    digests = {"train": digest(found.train), "heldout": digest(found.heldout)}
    texts = {"algorithm": Path(config.algorithm).read_text()} if Path(config.algorithm).is_file() else {}
    text, reward = principles.load(config.principles), Reward("none")
    if samples:
        reward = rewards.load(
            config.reward.name, config.reward.kwargs.to_dict(), backend=backend, mesh=config.mesh.to_dict()
        )
        texts["reward"] = json.dumps(_versions(reward))
        draw(found.train, config.queries_per_iteration, seed=config.seed, iteration=0)  # refuses more than there are
        principles.choose(text, config.principles_per_query, seed=config.seed, query_id="")  # refuses more than there are
        texts["principles"] = text.text
        if config.sft.data is not None:
            digests["sft"] = digest(load_warm_up(config).queries)
    digests |= {name: hashlib.sha256(content.encode()).hexdigest()[:16] for name, content in texts.items()}
    if config.model.adapter is not None:
        files = [Path(config.model.adapter) / name for name in (peft.CONFIG, peft.WEIGHTS)]
        digests["adapter"] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    digests["model"] = hub.identity(config.model.path, config.model.revision)
    return Inputs(algorithm, found, text, reward, digests)


def _needs(slots: Sequence[Slot]) -> str:
    """What a record must have for an algorithm that samples: its own answers, where they are among the responses."""
    sources = {slot.source for slot in slots}
    return "pair" if "rejected" in sources else "completion" if "completion" in sources else "prompt"


def _versions(reward: Reward) -> list[str]:
    return [version for part in reward.parts.values() for version in _versions(part)] or [reward.version]


def resolved(config: Any, backend: str, digests: Mapping[str, str]) -> dict[str, Any]:
    """What config.json holds: the backend, every key with a part in what a run computes, and the digests of the inputs."""
    keys = config.to_dict()
    for mode in ("export", "generate", "compare"):
        del keys[mode]
    del keys["model"]["revision"]  # the commit that it stands for is among the inputs
    # whether a server samples is a part of it, for its noise is another; where it is, is none
    keys["sampling"]["server"] = None if config.sampling.server is None else "vllm"
    keys["reward"]["kwargs"] = _without(keys["reward"]["kwargs"], _HOW)
    return {"backend": backend, **keys, "inputs": dict(digests)}


# of a reward's kwargs: how it is computed and not what, so that a run may go on after a server was too slow
_HOW = ("timeout", "retries", "backoff", "max_failures", "concurrency", "batch", "api_key_env", "headers", "rows", "device")


def _without(tree: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {k: _without(v, keys) if isinstance(v, Mapping) else v for k, v in tree.items() if k not in keys}


@contextlib.contextmanager
def open_run(config: Any, workdir: Path, backend: str, inputs: Inputs) -> Iterator[Run]:
    """Everything a run needs, cheap checks first; from here on the directory belongs to this config."""
    algorithm, found = inputs.algorithm, inputs.data
    with Stop() as stop, Progress(_iterations(config, inputs)) as progress, contextlib.ExitStack() as stack:
        loss = algorithm.make_loss(config)
        names = ("jsonl", *(name for name in config.sinks if name != "jsonl"))  # metrics.jsonl is part of the contract
        sinks.check(names)
        progress.phase("load", 1)
        module = backends.load(backend)
        loaded = module.load(config)
        built = module.build(config, loaded, head=head_of(algorithm))
        loaded = loaded._replace(weights={})  # the backend has its own: the host's copy may go
        progress.advance(1)
        for note in module.notes(built):
            progress.log(note)
        if config.sampling.server is not None:
            from ple_jax.serving import served  # not above: it writes adapters, and what does so needs this module

            built = served.connect(
                config, built, folder=workdir / "serving", base_model=loaded.name, vocab=loaded.config.vocab_size,
                transposed=module.transposed(loaded), log=progress.log,
            )  # fmt: skip
            stack.callback(built.close)
        stop.check()
        # not before everything above was found in order: a mistake mended should not need another directory
        write_json(workdir / "config.json", resolved(config, backend, inputs.digests))
        cache = stack.enter_context(Cache(workdir / "rewards.sqlite"))
        outputs = sinks.make(names, workdir, config.to_dict())
        multiplied = layout.active_weights(loaded.config) + loaded.config.vocab_size * loaded.config.hidden_size
        run = Run(
            config, workdir, built, loaded.tokenizer, loaded.eos, loaded.name, loaded.config.max_positions,
            module.transposed(loaded), multiplied, algorithm, loss, inputs.reward, cache,
            inputs.principles, found.train, found.heldout, found.bad, outputs, progress, stop, Clock(),
        )  # fmt: skip
        yield run if is_offline(algorithm) else prompting.fitted(run)


def _iterations(config: Any, inputs: Inputs) -> int:
    """What the display counts: iterations, or the evaluations of an algorithm that samples nothing."""
    if not is_offline(inputs.algorithm):
        return config.iterations
    settings = config.reward_model
    steps = -(-len(inputs.data.train) // config.optimizer.batch_queries) * settings.epochs
    return -(-steps // settings.eval_every)
