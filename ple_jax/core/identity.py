"""What identifies a run, and a method: the keys of a config that affect the result, and digests of what is read.

A run continues only under the config that it began with: its config.json holds what `run_keys` keeps of it. What may
differ is how a run is computed (`EXECUTION`), how long it is (`LENGTH`, if that changes nothing of what was computed so
far), and what a user vouches for (`ACCEPTED`). Runs are seeds of one method if `method_keys` returns the same for them.
"""

import hashlib
import importlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from ple_jax.core.errors import UserError
from ple_jax.core.secrets import redacted

FORMAT = 2  # of config.json, journals and checkpoints; that of no version before the first one that was published
# how a run is computed and not what: a run may go on, or be exported, with others
EXECUTION = (
    "model.layers", "model.attention", "model.remat", "model.device", "model.ops", "model.compile_cache",
    "sampling.server_key_env", "sampling.server_sleep", "mesh.data", "mesh.fsdp", "mesh.tensor", "checkpoint.keep",
    "checkpoint.use",
    "optimizer.micro_queries", "reward.max_bad_share", "task.max_bad_share", "sinks",
)  # fmt: skip
LENGTH = ("iterations", "offline.epochs")
# what --accept names, code of the user's that was mended while a run went on -> the keys that may then differ; "config" is
# for a config.json that is gone
ACCEPTED = {
    "reward": ("inputs.reward", "inputs.second", "inputs.record", "reward.kwargs", "eval.second_kwargs"),
    "algorithm": ("inputs.algorithm",),
    "config": (),
}
# what other modes do with a finished run
_MODES = ("export", "generate", "compare", "probe", "harness")
# options of a reward that say how it is computed and not what, so that a run may go on after a server was too slow: of a
# function of one's own, at any depth, and of the package's rewards
_HOW_OWN = ("timeout", "retries", "backoff", "max_failures", "concurrency", "api_key_env", "headers")
_HOW = (*_HOW_OWN, "batch", "rows", "device")
_HOW_CODE = ("concurrency",)  # in what time a test must pass is a part of the reward `code`
_SECRET = ("headers",)  # of a function of one's own: they may be keys; those of the package name variables that hold keys
_REWARDS = (("reward", "name", "kwargs"), ("eval", "second_reward", "second_kwargs"))  # part of a config, its keys
# keys that make no other method of a run
_NO_METHOD = (*EXECUTION, "format", "seed", "changed", "task.date", "inputs.second")
_NO_METHOD_GROUPS = tuple(f"{group}." for group in ("eval", *_MODES))


def run_keys(config: Any, backend: str, digests: Mapping[str, str]) -> dict[str, Any]:
    """Returns what config.json holds: the backend, every key that affects what a run computes, and the inputs' digests."""
    keys = config.to_dict()
    for mode in _MODES:
        del keys[mode]
    del keys["model"]["revision"]  # the commit that it stands for is among the inputs
    # whether a server samples is a part of it, for its noise is another; where it is, is none
    keys["sampling"]["server"] = None if config.sampling.server is None else "vllm"
    for part, name, kwargs in _REWARDS:
        own = keys[part]
        own[kwargs] = _without(own[name], own[kwargs], lambda of: _SECRET if _is_own(of) else ())
    return {"format": FORMAT, "backend": backend, **redacted(keys), "inputs": dict(digests)}


def other_format(what: str, kind: Any) -> UserError:
    """Returns the error for what is of another format than `FORMAT`."""
    return UserError(
        f"{what} of format {kind}, and this version reads format {FORMAT}: take the version that began the run, or give"
        " another --workdir"
    )


def known_keys() -> set[str]:
    """Returns the outermost keys that a config.json may have."""
    usual = importlib.import_module("ple_jax.configs.default").get_config().to_dict()
    return {*usual, "format", "backend", "inputs", "changed"}


def without_how(name: str | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a reward's options without those that only say how it is computed: timeouts, retries, how many at once ...

    Args:
        name: of the reward, as in config.reward.name: what an option means depends on whose reward it is.
    """
    return _without(name, kwargs, lambda of: _HOW_OWN if _is_own(of) else _HOW_CODE if of == "code" else _HOW)


def comparable(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the contents of a config.json without what only says how its rewards are computed."""
    found = dict(keys)
    for part, name, kwargs in _REWARDS:
        if isinstance(own := found.get(part), Mapping) and isinstance(own.get(kwargs), Mapping):
            found[part] = {**own, kwargs: without_how(own.get(name), own[kwargs])}
    return found


def _is_own(name: str | None) -> bool:
    return ":" in (name or "")  # package.module:function, file.py:function


def _without(name: str | None, kwargs: Mapping[str, Any], drop: Callable[[str | None], Collection[str]]) -> dict[str, Any]:
    """Returns a reward's options without those that `drop` names for it, in all parts of a combination too."""
    kept = {key: value for key, value in kwargs.items() if key not in drop(name)}
    if _is_own(name):
        return {key: _without(name, value, drop) if isinstance(value, Mapping) else value for key, value in kept.items()}
    if name == "combine" and isinstance(parts := kept.get("parts"), Mapping):
        kept["parts"] = {label: _part_without(part, drop) for label, part in parts.items()}
    return kept


def _part_without(part: Any, drop: Callable[[str | None], Collection[str]]) -> Any:
    if not isinstance(part, Mapping) or not isinstance(own := part.get("kwargs"), Mapping):
        return part
    return {**part, "kwargs": _without(part.get("name"), own, drop)}


def completed(kept: Mapping[str, Any], wanted: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Adds to a config.json those `wanted` keys that it is too old to have, at their defaults.

    A run that is older than a key was made as the key's default says. Without `wanted` all of today's keys are.
    """
    defaults = importlib.import_module("ple_jax.configs.default").get_config().to_dict()

    def filled(kept: Any, wanted: Any, default: Any) -> Any:
        if not all(isinstance(side, Mapping) for side in (kept, wanted, default)):
            return kept
        new = {key: default[key] for key in wanted if key not in kept and key in default}
        return new | {key: filled(value, wanted.get(key), default.get(key)) for key, value in kept.items()}

    return filled(kept, defaults if wanted is None else wanted, defaults)


def method_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a run's flat config that identifies its method, whatever the seed."""
    kept = {k: v for k, v in config.items() if k not in _NO_METHOD and not k.startswith(_NO_METHOD_GROUPS)}
    if isinstance(options := kept.get("reward.kwargs"), Mapping):
        kept["reward.kwargs"] = without_how(kept.get("reward.name"), options)
    chosen = [config, *({f"task.{key}": of[key] for key in of} for of in (config.get("task.sets") or {}).values())]
    if any(of.get("task.max_train") or of.get("task.max_heldout") for of in chosen):  # by seed
        kept = {k: v for k, v in kept.items() if k not in ("inputs.train", "inputs.heldout")}
    return kept


def digest(parts: Iterable[bytes]) -> str:
    """Returns 16 hex digits that stand for the parts, one after the other: the beginning of their SHA-256."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]
