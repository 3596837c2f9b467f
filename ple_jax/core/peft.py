"""LoRA adapters on disk, in the layout of Hugging Face PEFT: its users and both backends read the same files."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ple_jax.core.config import UserError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# options of PEFT that change what the two matrices mean
_UNSUPPORTED = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")


def write(
    directory: Path,
    adapter: Mapping[str, np.ndarray],
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    base_model: str,
) -> None:
    """Writes an adapter that `peft.PeftModel.from_pretrained` loads; equal adapters give equal bytes.

    Each file appears whole or not at all.

    Args:
        directory: made if it does not exist; an adapter in it is replaced.
        adapter: PEFT's names, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" [rank, in] and
            "...lora_B.weight" [out, rank].
        rank: r of LoRA.
        alpha: the update is (alpha / rank) * B A.
        targets: names of the adapted linear modules, "q_proj" ...
        base_model: Hub name or path of the model the adapter belongs to.
    """
    from safetensors.numpy import save

    config: dict[str, Any] = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    directory.mkdir(parents=True, exist_ok=True)
    # A transposed view has to be copied: safetensors takes the bytes as they lie. One metadata key: more would be
    # written in random order and give equal adapters different bytes.
    tensors = {name: np.ascontiguousarray(value) for name, value in adapter.items()}
    _replace(directory / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    _replace(directory / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def read(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads an adapter that `write` or PEFT saved.

    Returns:
        The tensors under PEFT's names, as stored, and adapter_config.json.

    Raises:
        UserError: a file is missing or damaged, it is no LoRA adapter, or it uses an option whose matrices mean
            something else than (lora_alpha / r) * B A.
    """
    import ml_dtypes  # noqa: F401  safetensors reads bfloat16 into it
    from safetensors import SafetensorError, safe_open

    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} does not exist; an adapter folder holds {WEIGHTS} and {CONFIG}")
    try:
        config = json.loads((directory / CONFIG).read_text())
        with safe_open(directory / WEIGHTS, framework="numpy") as file:  # safetensors.numpy.load knows no bfloat16
            adapter = {name: file.get_tensor(name) for name in file.keys()}
    except (ValueError, SafetensorError) as error:
        raise UserError(f"the adapter in {directory} is damaged ({error}); write it again") from error
    if (kind := config.get("peft_type")) != "LORA":
        raise UserError(f"the adapter in {directory} has peft_type {kind!r}; only 'LORA' is supported")
    if used := [option for option in _UNSUPPORTED if config.get(option)]:
        raise UserError(f"the adapter in {directory} sets {used[0]}={config[used[0]]!r}, which is not supported")
    return adapter, config


def _replace(path: Path, data: bytes) -> None:
    """Writes beside `path`, then renames: a reader sees the old file or the new one, even after a crash."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
