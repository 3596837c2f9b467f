"""The commands that serve a run's result with vLLM."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ple_jax.models.hub import is_remote

# else what a request leaves open (temperature, top_p) comes from the model's generation_config.json, not as in training
_PLAIN = "--generation-config vllm"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what `vllm serve --max-lora-rank` takes


def rank_limit(rank: int, *options: Any) -> int | None:
    """Returns the smallest --max-lora-rank that vLLM takes and that holds `rank`; None if there is none.

    Args:
        options: the settings of DoRA and of the patterns of ranks and alphas. If any of them is set the result is None, too:
            vLLM refuses DoRA, and computes one scale from `r` and `lora_alpha` for all modules, whatever the patterns say.
    """
    return None if any(options) else next((limit for limit in RANKS if limit >= rank), None)


def serve_adapter(folder: Path, adapter_config: Mapping[str, Any], *, name: str) -> str | None:
    """Returns the command that serves an adapter folder with vLLM; None if vLLM cannot serve this adapter or base so."""
    base = adapter_config["base_model_name_or_path"]
    options = (adapter_config.get(option) for option in ("use_dora", "rank_pattern", "alpha_pattern"))
    rank = rank_limit(adapter_config["r"], *options)
    if rank is None or not (is_remote(base) or Path(base).is_dir()):
        return None
    modules = shlex.quote(f"{name}={folder}")
    commit = f" --revision {revision}" if (revision := adapter_config.get("revision")) else ""
    lora = f"--enable-lora --max-lora-rank {rank} {_PLAIN} --lora-modules {modules}"
    return f"vllm serve {shlex.quote(base)}{commit} {lora}"


def serve_by_transformers(folder: Path) -> str:
    """Returns the command that serves a folder of merged weights with transformers; its name there is the folder."""
    return f"transformers serve {shlex.quote(str(folder))}  # pip install 'transformers[serving]' torch"


def serve_merged(folder: Path, *, name: str) -> str:
    """Returns the command that serves a folder of merged weights with vLLM."""
    return f"vllm serve {shlex.quote(str(folder))} --served-model-name {shlex.quote(name)} {_PLAIN}"
