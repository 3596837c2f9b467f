"""What a run leaves to others: the adapter in PEFT's layout, merged weights, a reward model."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ple_jax.core import card, peft
from ple_jax.core import workdir as files
from ple_jax.core.config import BACKENDS
from ple_jax.core.run import Run
from ple_jax.core.setup import has_head

HEAD = "score"  # what transformers calls a classifier's head


def write_adapter(run: Run, iteration: int, summary: Mapping[str, Any]) -> Path:
    """The adapter in PEFT's layout and its model card, in the work directory; `summary` is {} for an unfinished run.

    A head that was trained alone is written the same way, without a LoRA matrix: PEFT has no such thing, `write_merged`
    reads it.
    """
    folder = run.workdir / "adapter"
    head = HEAD if has_head(run.algorithm) else None
    write_peft(
        folder,
        run.backend.adapter(),
        lora=run.config.lora,
        base_model=run.base_model,
        transposed=run.transposed,
        head=head,
    )
    push = run.config.export.push
    readme = _card(run.workdir, "peft", run.base_model, iteration, summary, push, head=has_head(run.algorithm))
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return folder


def write_peft(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    lora: Any,
    base_model: str,
    transposed: bool,
    head: str | None = None,
) -> None:
    """An adapter in PEFT's layout, with the settings of `config.lora`."""
    peft.write(
        folder,
        tensors,
        rank=lora.rank,
        alpha=lora.alpha,
        targets=_target_names(lora.targets, tensors),
        base_model=base_model,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        fan_in_fan_out=transposed,
        dropout=lora.dropout,
        head=head,
    )


def _target_names(targets: Sequence[str], adapter: Mapping[str, Any]) -> list[str]:
    """Module names for PEFT: as given, those that all-linear adapted, or whole paths where a name would say too much."""
    paths = sorted(peft.modules(adapter))
    if any(".language_model." in path for path in paths):
        return paths  # a vision tower has modules of the same names
    return sorted({path.rsplit(".", 1)[1] for path in paths}) if "all-linear" in targets else list(targets)


def write_merged(config: Any, workdir: Path, backend: str, iteration: int, repo: str | None, *, head: bool) -> Path:
    """The base with the exported adapter merged, for transformers: `merged`, or with a head `reward_model`.

    Args:
        iteration: the adapter's.
        repo: hub id that the folder will have, if any.
    """
    from ple_jax.models import export as weights  # numpy alone, whatever the backend

    loaded = importlib.import_module(BACKENDS[backend]).load(config)
    summary = files.read_json(workdir / "summary.json") or {}
    return weights.merged(
        loaded,
        workdir / "adapter",
        workdir / ("reward_model" if head else "merged"),
        dtype=config.export.dtype,
        shard_gb=config.export.shard_gb,
        readme=_card(workdir, "transformers", loaded.name, iteration, summary, repo, head=head),
        about={"iteration": iteration, "dtype": config.export.dtype},
        head=HEAD if head else None,
    )


def _card(
    workdir: Path, library: str, base_model: str, iteration: int, summary: Mapping[str, Any], repo: str | None, *, head: bool
) -> str:
    return card.render(
        workdir,
        library=library,
        base_model=base_model,
        iteration=iteration,
        summary=summary,
        defaults=importlib.import_module("configs.default").get_config().to_dict(),
        repo=repo,
        head=head,
    )


def merged_repository(config: Any) -> str | None:
    """Where merged weights are pushed."""
    # not to the adapter's: transformers would find it beside the merged weights and apply it once more
    return f"{config.export.push}-merged" if config.export.push else None
