"""LoRA adapters (arXiv:2106.09685) on the host, in numpy: settings, initialisation, reading, merging and stacking.

An adapter is a dict `{module path: {"a": [in, rank], "b": [rank, out]}}` under Hugging Face's module paths, in fp32; DoRA
adds a magnitude "m": [out]. Both backends train, save and export this structure.
"""

import json
import re
import shlex
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ple_jax.core.errors import UserError, suggestion
from ple_jax.models import families, layout, peft
from ple_jax.models.config import ModelConfig

Adapter = dict[str, dict[str, Any]]  # leaves are numpy arrays on the host, a backend's own on its devices


@dataclass(frozen=True)
class Lora:
    """The settings of LoRA, in the terms of PEFT's LoraConfig: which modules are adapted, and how strongly."""

    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] = ("all-linear",)  # or ends of module paths: "q_proj", "attn.c_proj", "layers.0.mlp.up_proj"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # regular expression at a path's end -> its own rank
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False  # scale by alpha / sqrt(rank), arXiv:2312.03732
    dora: bool = False  # train a magnitude and a direction, arXiv:2402.09353
    # of the adapter's input, while training; the base, DoRA's too, sees its whole input. In JAX q, k, v (gate, up) share one
    # draw, in torch every module has its own
    dropout: float = 0.0

    @property
    def _peft(self) -> dict[str, Any]:
        patterns = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        return {"r": self.rank, "lora_alpha": self.alpha, "use_rslora": self.rslora, **patterns}

    def rank_of(self, path: str) -> int:
        return peft.module_rank(self._peft, path)

    def scale_of(self, path: str) -> float:
        """Returns the factor on A B for the module at `path`: alpha / rank, or alpha / sqrt(rank) with `rslora`."""
        return peft.scaling(self._peft, path)


# ---------------------------------------------------------------- where a run starts


def settings(config: ConfigDict) -> Lora:
    """Returns the settings in `config.lora`."""
    values = config.lora.to_dict()
    return Lora(**values | {name: dict(values[name]) for name in ("rank_pattern", "alpha_pattern")})


def start(config: ConfigDict, model_config: ModelConfig) -> Adapter:
    """Returns the adapter that training starts from: the one in the folder `config.model.adapter`, or a fresh one.

    DoRA's magnitudes in a fresh adapter are not final, since they depend on the base weights (see `init`).

    Raises:
        UserError: as `read` or `init` does.
    """
    if config.model.adapter is None:
        return init(model_config, settings(config), seed=config.seed)
    return read(Path(config.model.adapter), model_config, settings(config))


def resolve(config: ModelConfig, targets: Sequence[str]) -> list[str]:
    """Returns the paths of the modules that `targets` select, in the model's order.

    As in PEFT, a target is a module's path or the end of one; "all-linear" selects every linear module.

    Raises:
        UserError: if a target is no linear module of this model.
    """
    paths = [path for path, *_ in layout.module_shapes(config)]
    if "all-linear" in targets:
        return paths
    matches = {target: {path for path in paths if f".{path}".endswith(f".{target}")} for target in targets}
    if unknown := [target for target, found in matches.items() if not found]:
        short = sorted({path.rsplit(".", 1)[1] for path in paths})
        raise UserError(
            f"lora.targets names {unknown[0]!r}, which is no linear module of this {config.family} model:"
            f" {', '.join(short)}{suggestion(unknown[0], short)}, or all-linear"
        )
    wanted = set().union(*matches.values())
    return [path for path in paths if path in wanted]


def init(config: ModelConfig, lora: Lora, *, seed: int) -> Adapter:
    """Returns a fresh adapter, on the host.

    `a` is initialised as in PEFT (uniform with Kaiming's bound for a=sqrt(5)), and `b` is zero. The noise of a module
    depends only on the seed and the module's path, not on how layers are arranged. DoRA's magnitudes are ones; the
    backend's `magnitudes` computes them from the base.

    Raises:
        UserError: if a target or a pattern matches no linear module of this model.
    """
    targets = resolve(config, lora.targets)
    for pattern in (*lora.rank_pattern, *lora.alpha_pattern):
        if not any(peft.patterned({pattern: True}, path, False) for path in targets):
            raise UserError(
                f"lora.rank_pattern or lora.alpha_pattern has {pattern!r}, which is the end of no adapted module's path,"
                f" such as {targets[0]}"
            )
    adapter: Adapter = {}
    for path, _, inp, out in layout.module_shapes(config):
        if path in targets:
            noise = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(path.encode())])))
            bound, rank = inp**-0.5, lora.rank_of(path)
            a = noise.uniform(-bound, bound, (inp, rank)).astype(np.float32)
            adapter[path] = {"a": a, "b": np.zeros((rank, out), np.float32)}
            if lora.dora:
                adapter[path]["m"] = np.ones(out, np.float32)
    return adapter


# linear heads [hidden, 1] beside the adapter, trained whole, {name: {"w": ...}}: a reward model's, and PPO's of values
SCORE, VALUE = "score", "value"
DECAYED = ("a", "b")  # the leaves that weight decay is of


def init_head(config: ModelConfig, name: str) -> Adapter:
    """Returns a fresh head [hidden, 1], on the host. It is zero: before the first step all responses score the same."""
    return {name: {"w": np.zeros((config.hidden_size, 1), np.float32)}}


def with_head(config: Any, adapter: Adapter, model: ModelConfig, name: str) -> Adapter:
    """Returns the adapter and a fresh head called `name`, which are trained together.

    A score head comes alone, without the adapter, if `config.reward_model.train` is "head".
    """
    alone = name == SCORE and config.reward_model.train == "head"
    return ({} if alone else adapter) | init_head(model, name)


def count(adapter: Adapter) -> int:
    """Counts the trained parameters."""
    return sum(leaf.size for module in adapter.values() for leaf in module.values())


def read(folder: Path, config: ModelConfig, lora: Lora) -> Adapter:
    """Reads a stored adapter, which this project or PEFT wrote, to continue from it. It is on the host and in fp32.

    Raises:
        UserError: if it is damaged, holds values that are not finite, belongs to another model, or was made with other
            settings than `lora`. In the last case the message lists the overrides to give.
    """
    tensors, stored = peft.read(folder)
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    if damaged := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise UserError(f"the adapter in {folder} holds values that are not finite, in tensor {damaged[0]}")
    adapter = from_peft(tensors)
    shapes = {path: (inp, out) for path, _, inp, out in layout.module_shapes(config)}
    for path, module in adapter.items():
        if path not in shapes:
            raise UserError(f"the adapter in {folder} adapts {path}, which this {config.family} model does not have")
        (inp, out), rank = shapes[path], module["a"].shape[1]
        for kind, wanted in {"a": (inp, rank), "b": (rank, out), "m": (out,)}.items():
            if kind in module and module[kind].shape != wanted:
                raise UserError(
                    f"the adapter in {folder} is another model's: {_PEFT[kind]} of {path} has shape"
                    f" {module[kind].shape[::-1]}, this model's has {wanted[::-1]}"
                )
    used = Lora(
        rank=stored["r"],
        alpha=stored["lora_alpha"],
        targets=lora.targets if set(resolve(config, lora.targets)) == set(adapter) else _targets(config, adapter),
        rank_pattern=stored.get("rank_pattern") or {},
        alpha_pattern=stored.get("alpha_pattern") or {},
        rslora=bool(stored.get("use_rslora")),
        dora=bool(stored.get("use_dora")),
    )
    if needed := [override for override in _overrides(used) if override not in _overrides(lora)]:
        raise UserError(f"the adapter in {folder} was made with other settings than config.lora; give {' '.join(needed)}")
    return adapter


def _targets(config: ModelConfig, paths: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the shortest targets that select exactly these modules."""
    names = {path: module.name for path, module, *_ in layout.module_shapes(config) if path in paths}
    short = tuple(dict.fromkeys(name.rsplit(".", 1)[1] for name in names.values()))
    for targets in (("all-linear",), short, tuple(dict.fromkeys(names.values()))):
        if resolve(config, targets) == list(names):
            return targets
    return tuple(names)


def _overrides(lora: Lora) -> list[str]:
    """Returns the overrides, `--config.lora.KEY=VALUE` quoted for a shell, that set these settings on the command line."""
    values = {
        "rank": lora.rank,
        "alpha": float(lora.alpha),
        "targets": tuple(lora.targets),
        "rank_pattern": tuple(lora.rank_pattern.items()),
        "alpha_pattern": tuple((key, float(alpha)) for key, alpha in lora.alpha_pattern.items()),
        "rslora": lora.rslora,
        "dora": lora.dora,
    }
    # JSON, as its quotes are double: the shell's can be single ones
    return [f"--config.lora.{key}={shlex.quote(json.dumps(value))}" for key, value in values.items()]


# ---------------------------------------------------------------- on the host: weights under Hugging Face's names


def merge(config: ModelConfig, weights: Mapping[str, np.ndarray], adapter: Adapter, lora: Lora) -> dict[str, np.ndarray]:
    """Merges an adapter into the weights. The sum is computed in fp32, and each weight keeps its own dtype."""
    return _add(config, weights, adapter, lora, sign=1)


def unmerge(config: ModelConfig, weights: Mapping[str, np.ndarray], adapter: Adapter, lora: Lora) -> dict[str, np.ndarray]:
    """Subtracts an adapter from weights that it was merged into: the inverse of `merge`, up to rounding.

    Raises:
        ValueError: if it is a DoRA adapter, since merging one discards the norms of the base weights.
    """
    if any("m" in module for module in adapter.values()):
        raise ValueError("a merged DoRA adapter cannot be taken out again: keep the base weights")
    return _add(config, weights, adapter, lora, sign=-1)


def _add(
    config: ModelConfig, weights: Mapping[str, np.ndarray], adapter: Adapter, lora: Lora, *, sign: int
) -> dict[str, np.ndarray]:
    transposed = families.FAMILIES[config.family].transposed
    modules, result = peft.modules(to_peft(adapter)), dict(weights)
    for path, module in modules.items():
        weight = weights[f"{path}.weight"]
        merged = peft.merge(weight, module, scale=sign * lora.scale_of(path), fan_in_fan_out=transposed)
        result[f"{path}.weight"] = merged.astype(weight.dtype)
    return result


def stack(adapters: Sequence[tuple[Adapter, Lora]]) -> tuple[Adapter, Lora]:
    """Combines several adapters into one whose update is the sum of their updates, whatever their order. Ranks add up.

    Returns:
        The adapter, and settings under which every module has its own rank and a scale of one.

    Raises:
        ValueError: if one of them is a DoRA adapter, whose update cannot be added to another.
    """
    if any(lora.dora for _, lora in adapters):
        raise ValueError("DoRA adapters do not add up; merge them into the weights one after the other")
    stacked: Adapter = {}
    for path in dict.fromkeys(path for adapter, _ in adapters for path in adapter):
        own = [(adapter[path], np.float32(lora.scale_of(path))) for adapter, lora in adapters if path in adapter]
        stacked[path] = {
            "a": np.concatenate([np.asarray(module["a"]) for module, _ in own], 1),
            "b": np.concatenate([np.asarray(module["b"]) * scale for module, scale in own], 0),
        }
    ranks = {re.escape(path): module["b"].shape[0] for path, module in stacked.items()}
    return stacked, Lora(targets=tuple(stacked), rank_pattern=ranks, alpha_pattern=ranks)


# ---------------------------------------------------------------- PEFT's names


_PEFT = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector", "w": "weight"}


def to_peft(adapter: Adapter) -> dict[str, np.ndarray]:
    """Converts an adapter to PEFT's names and layout.

    The arrays are lora_A [rank, in], lora_B [out, rank], lora_magnitude_vector [out] and a score head's weight [1, hidden].
    A value head is left out, since it is not part of the policy.
    """
    return {
        f"base_model.model.{path}.{_PEFT[kind]}": np.ascontiguousarray(np.asarray(array).T)
        for path, module in adapter.items()
        if path != VALUE
        for kind, array in module.items()
    }


def from_peft(tensors: Mapping[str, np.ndarray]) -> Adapter:
    """Converts the LoRA tensors of a PEFT adapter to an `Adapter`: the inverse of `to_peft`, but without heads."""
    return {
        path: {kind: np.ascontiguousarray(array.T) for kind, array in zip("abm", module, strict=True) if array is not None}
        for path, module in peft.modules(tensors).items()
    }


def write_peft(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    lora: Any,
    base_model: str,
    transposed: bool,
    revision: str | None = None,
    head: str | None = None,
) -> None:
    """Writes an adapter in PEFT's layout, with the settings of `config.lora`.

    Args:
        tensors: the adapter under PEFT's names, as `to_peft` returns it.
        transposed: whether the base stores its weights as [in, out].
        revision: the base's commit on a hub.
        head: the name of a module that was trained in full, such as "score".
    """
    peft.write(
        folder,
        tensors,
        rank=lora.rank,
        alpha=lora.alpha,
        targets=_target_names(lora.targets, tensors),
        base_model=base_model,
        revision=revision,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        fan_in_fan_out=transposed,
        dropout=lora.dropout,
        head=head,
    )


def _target_names(targets: Sequence[str], adapter: Mapping[str, Any]) -> list[str]:
    """Returns PEFT's target modules: the targets as given, or for all-linear the names of the adapted modules.

    Paths are given in full where a vision tower has modules of the same names, which are not adapted.
    """
    paths = sorted(peft.modules(adapter))
    if any(".language_model." in path for path in paths):
        return paths  # a vision tower has modules of the same names
    return sorted({path.rsplit(".", 1)[1] for path in paths}) if "all-linear" in targets else list(targets)
