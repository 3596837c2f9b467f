"""Reads and writes LoRA adapters in the layout of Hugging Face PEFT, so that PEFT and both backends share their files."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ple_jax.core.errors import UserError
from ple_jax.core.files import write_bytes, write_text
from ple_jax.core.rules import Rule, flag, many, mapping, optional, real, text, whole
from ple_jax.core.secrets import shown
from ple_jax.models.values import check

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_KINDS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}
# Options of PEFT that may hold anything: either understood here, or without a say in what the matrices mean. Any other
# one that is set is refused, those that future versions add included.
_OPTIONS = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
        "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config",
        "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
        "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
    }
)  # fmt: skip


def _by_pattern(each: Rule) -> Rule:
    """Returns a rule for an object whose keys are regular expressions and whose values `each` allows."""

    def rule(value: Any) -> str:
        if says := mapping(value):
            return says
        for key, number in value.items():
            try:
                re.compile(_module(key))
            except (re.error, OverflowError, RecursionError) as error:
                return f"an object of regular expressions, which {key!r} is not ({error})"
            if says := each(number):
                return f"an object in which {key!r} is {says}"
        return ""

    return rule


def _module(pattern: str) -> str:
    """Returns the regular expression for the module paths that a key of rank_pattern or alpha_pattern stands for."""
    return rf"(.*\.)?({pattern})$"


_RANK, _ALPHA = whole(1, 2**16), real(lambda v: 0 < v <= 1e9, "above 0")
# what some of the options hold where they are there; PEFT writes the others in many ways
_VALUES = {
    "r": _RANK, "lora_alpha": _ALPHA, "rank_pattern": optional(_by_pattern(_RANK)),
    "alpha_pattern": optional(_by_pattern(_ALPHA)), "use_rslora": optional(flag), "use_dora": optional(flag),
    "fan_in_fan_out": optional(flag), "modules_to_save": optional(many(text, empty=True)),
}  # fmt: skip
# initialisations after which the base is no longer the one on the hub
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Module(NamedTuple):
    """The adapter of one linear module, in PEFT's layout."""

    a: Float[np.ndarray, "rank inp"]
    b: Float[np.ndarray, "out rank"]
    magnitude: Float[np.ndarray, " out"] | None  # DoRA's


# one piece: a row of settings, each explained
def write(
    directory: Path,
    adapter: Mapping[str, np.ndarray],
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    base_model: str,
    revision: str | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    fan_in_fan_out: bool = False,
    dropout: float = 0.0,
    head: str | None = None,
) -> None:
    """Writes an adapter that `peft.PeftModel.from_pretrained` loads; equal adapters give equal bytes.

    Each file appears whole or not at all.

    Args:
        directory: created if it does not exist; an adapter in it is replaced.
        adapter: tensors by PEFT's names: "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" [rank, in],
            "...lora_B.weight" [out, rank] and for DoRA "...lora_magnitude_vector" [out].
        rank: r of LoRA.
        alpha: the update is (alpha / rank) * B A.
        targets: names of the adapted linear modules, "q_proj" ...
        base_model: Hub name or path of the model that the adapter belongs to.
        revision: its commit on the hub, which PEFT loads it at.
        rank_pattern: other ranks, by the end of a module's path or a regular expression for it; the first match counts.
        alpha_pattern: other alphas, by the same kinds of keys.
        use_rslora: the update is (alpha / sqrt(rank)) * B A. arXiv:2312.03732.
        use_dora: the rows of base plus update are scaled to the magnitudes. arXiv:2402.09353.
        fan_in_fan_out: the base stores these weights as [in, out] (GPT-2's Conv1D).
        dropout: the dropout rate on the adapter's input in training; it does not change what the adapter computes.
        head: name of a module that was trained in full, such as "score" of a sequence classifier, whose tensor is
            "base_model.model.score.weight".
    """
    from safetensors.numpy import save

    config: dict[str, Any] = {
        "alpha_pattern": dict(alpha_pattern or {}),
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": [head] if head else None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": dict(rank_pattern or {}),
        "revision": revision,
        "target_modules": sorted(targets),
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
        "use_dora": use_dora,
        "use_rslora": use_rslora,
    }
    directory.mkdir(parents=True, exist_ok=True)
    # A transposed view has to be copied: safetensors takes the bytes as they lie. One metadata key: more would be
    # written in random order and give equal adapters different bytes.
    tensors = {name: np.ascontiguousarray(value) for name, value in adapter.items()}
    write_bytes(directory / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_text(directory / CONFIG, json.dumps(config, indent=2) + "\n")


def read(directory: Path, *, head: str | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads an adapter that `write` or PEFT saved.

    Args:
        head: name of the module trained in full that the adapter must have; if it is None, there must be no such module.

    Returns:
        The tensors under PEFT's names, as stored, and the content of adapter_config.json. `modules` groups the tensors by
        module; `module_rank` and `scaling` interpret the config for one module.

    Raises:
        UserError: if a file is missing or damaged, it is no LoRA adapter, it uses an option that is not supported, or its
            tensors do not match its config.
    """
    import ml_dtypes  # noqa: F401  safetensors reads bfloat16 into it
    from safetensors import SafetensorError, safe_open

    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} does not exist; an adapter folder holds {WEIGHTS} and {CONFIG}")
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        with safe_open(directory / WEIGHTS, framework="numpy") as file:  # safetensors.numpy.load knows no bfloat16
            adapter = {name: file.get_tensor(name) for name in file.keys()}
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} holds no JSON object")
        check(config, _VALUES)
    except (OSError, RecursionError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"the adapter in {directory} is damaged ({error}); write it again") from error
    _check_options(config, directory, head)
    _check(adapter, config, directory / WEIGHTS)
    return adapter, config


def _check_options(config: Mapping[str, Any], directory: Path, head: str | None) -> None:
    """Raises a UserError if an option is set that is not supported here, or if the head is not the one that is wanted."""
    if (kind := config.get("peft_type")) != "LORA":
        raise UserError(f"the adapter in {directory} has peft_type {kind!r}; only 'LORA' is supported")
    if lacking := [key for key in ("r", "lora_alpha") if key not in config]:
        raise UserError(f"the adapter in {directory} has no {lacking[0]} in its {CONFIG}: PEFT writes it; write it again")
    used = [option for option, value in config.items() if value and option not in _OPTIONS]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if str(config.get("init_lora_weights")).startswith(_CHANGES_BASE):
        used.append("init_lora_weights")
    if (whole := list(config.get("modules_to_save") or ())) != ([head] if head else []):
        if "score" in whole or not whole:
            what = f"it is {'a reward model' if whole else 'no reward model'}'s"
        else:  # the embedding, the output matrix, norms: as trainers do that add tokens
            what = "such modules are not supported: train an adapter without them, or merge it into its base"
        raise UserError(
            f"the adapter in {directory} has {' and '.join(whole) or 'no module'} trained whole (modules_to_save), where"
            f" {head or 'none'} is needed; {what}"
        )
    if used:
        raise UserError(f"the adapter in {directory} sets {used[0]}={shown(config[used[0]], 80)}, which is not supported")


def _check(adapter: Mapping[str, np.ndarray], config: Mapping[str, Any], file: Path) -> None:
    """Raises a UserError unless every module has its matrices, of the config's rank for it, and there is no other tensor."""
    heads = {f"{_PREFIX}{name}.weight" for name in config.get("modules_to_save") or ()}
    if absent := sorted(heads - adapter.keys()):
        raise UserError(f"{file} lacks tensor {absent[0]}; write the adapter again")
    known = (name for name in adapter if name in heads or (name.startswith(_PREFIX) and name.endswith(tuple(_KINDS))))
    if odd := sorted(adapter.keys() - set(known)):
        raise UserError(f"{file} holds tensor {odd[0]}, which is not a LoRA matrix of a linear layer: not supported")
    wanted = [kind for kind, field in _KINDS.items() if field != "magnitude" or config.get("use_dora")]
    for path in _paths(adapter):
        if missing := [kind for kind in wanted if f"{_PREFIX}{path}.{kind}" not in adapter]:
            raise UserError(f"{file} lacks tensor {_PREFIX}{path}.{missing[0]}; write the adapter again")
        expected = module_rank(config, path)
        a, b = (adapter[f"{_PREFIX}{path}.lora_{side}.weight"] for side in "AB")
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != expected or b.shape[1] != expected:
            raise UserError(
                f"{file}: the matrices of {path} are {list(a.shape)} and {list(b.shape)}, and {CONFIG} says rank {expected}"
            )


def _paths(adapter: Mapping[str, np.ndarray]) -> list[str]:
    return list(dict.fromkeys(name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for name in adapter if ".lora_" in name))


def head_weight(adapter: Mapping[str, np.ndarray], head: str) -> np.ndarray:
    """Returns the weight [label, hidden] of the head, a module that was trained in full."""
    return adapter[f"{_PREFIX}{head}.weight"]


def modules(adapter: Mapping[str, np.ndarray]) -> dict[str, Module]:
    """Groups the tensors of an adapter by module path, such as "model.layers.0.self_attn.q_proj"; heads are left out."""
    return {
        path: Module(
            adapter[f"{_PREFIX}{path}.lora_A.weight"],
            adapter[f"{_PREFIX}{path}.lora_B.weight"],
            adapter.get(f"{_PREFIX}{path}.lora_magnitude_vector"),
        )
        for path in _paths(adapter)
    }


def module_rank(config: Mapping[str, Any], path: str) -> int:
    """Returns the rank that an adapter_config.json gives to the module at `path`."""
    return patterned(config.get("rank_pattern"), path, config["r"])


def scaling(config: Mapping[str, Any], path: str) -> float:
    """Returns the factor on B A that an adapter_config.json gives to the module at `path`."""
    alpha = patterned(config.get("alpha_pattern"), path, config["lora_alpha"])
    rank = module_rank(config, path)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def patterned(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Returns the value that a rank_pattern or alpha_pattern gives to the module at `path`, or else `default`.

    A key is the module's path, the end of it, or a regular expression for it; the first match counts.
    """
    return next((value for key, value in (pattern or {}).items() if re.match(_module(key), path)), default)


def merge(
    weight: Float[np.ndarray, "out inp"], module: Module, *, scale: float, fan_in_fan_out: bool = False
) -> Float[np.ndarray, "out inp"]:
    """Merges an adapter into one base weight, in float32. With `fan_in_fan_out` the weight and the result are [in, out].

    The result is W + s B A, and for DoRA (arXiv:2402.09353, eq. 5) m (W + s B A) / ||W + s B A||, where each output's row
    has a norm of its own. A row with m = 0, of a base that has only zeros there, is not scaled, as in training.
    """
    a, b = module.a.astype(np.float32), module.b.astype(np.float32)
    whole = (weight.T if fan_in_fan_out else weight).astype(np.float32) + np.float32(scale) * (b @ a)
    if module.magnitude is not None:
        magnitude, norm = module.magnitude.astype(np.float32), np.linalg.norm(whole, axis=1)
        whole *= np.where(magnitude == 0, 1, magnitude / np.where(magnitude == 0, 1, norm))[:, None]
    return whole.T if fan_in_fan_out else whole
