"""Writes what a run leaves to others: the adapter in PEFT's layout, merged weights, or a reward model."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ple_jax.core import backends
from ple_jax.core.files import write_text
from ple_jax.export import card
from ple_jax.models.adapters import write_peft
from ple_jax.training import points
from ple_jax.training.run import Run
from ple_jax.training.state import State

HEAD = "score"  # what transformers calls a classifier's head


def write_adapter(run: Run[Any], state: State, summary: Mapping[str, Any]) -> Path:
    """Writes the adapter in PEFT's layout and its model card to WORKDIR/adapter, and returns that folder.

    A head that was trained alone is written the same way, without a LoRA matrix. PEFT has no such thing; `write_merged`
    reads it.

    Args:
        summary: what summary.json holds; {} for an unfinished run.
    """
    workdir, base = run.session.workdir, run.base
    folder, head = workdir / "adapter", run.algorithm.needs(run.config).head == "score"
    write_peft(
        folder,
        run.backend.adapter(),
        lora=run.config.lora,
        base_model=base.name,
        transposed=base.transposed,
        revision=base.revision,
        head=HEAD if head else None,
    )
    push = run.config.export.push
    readme = _card(workdir, "peft", (base.name, base.revision), state, summary, push, head=head)
    write_text(folder / "README.md", readme)
    return folder


def write_merged(
    config: Any, workdir: Path, backend: str, state: State, summary: Mapping[str, Any], repo: str | None, *, head: bool
) -> Path:
    """Writes the base with the exported adapter merged, for transformers, and returns the folder.

    That is WORKDIR/merged, or with a head WORKDIR/reward_model.

    Args:
        state: the state of the run that the adapter is of.
        summary: the contents of the run's summary.json; empty if it is not finished.
        repo: hub id that the folder will have, if any.

    Raises:
        UserError: as `merged.merged`.
    """
    from ple_jax.export import merged as weights  # numpy alone, whatever the backend

    loaded = backends.load(backend).load(config)
    return weights.merged(
        loaded,
        workdir / "adapter",
        workdir / ("reward_model" if head else "merged"),
        dtype=config.export.dtype,
        shard_gb=config.export.shard_gb,
        readme=_card(workdir, "transformers", (loaded.name, loaded.revision), state, summary, repo, head=head),
        about={"iteration": state.iteration, "dtype": config.export.dtype},
        head=HEAD if head else None,
    )


def _card(
    workdir: Path, library: str, base: tuple[str, str | None], state: State, summary: Mapping[str, Any], repo: str | None,
    *, head: bool,
) -> str:  # fmt: skip
    point = points.newest_of(state)
    return card.render(
        workdir,
        library=library,
        base_model=base[0],
        revision=base[1],
        iteration=state.iteration,
        summary=summary,
        point=None if point is None else point._asdict(),
        defaults=importlib.import_module("ple_jax.configs.default").get_config().to_dict(),
        repo=repo,
        head=head,
    )


def merged_repository(config: Any) -> str | None:
    """Returns the hub id that merged weights are pushed to; None if nothing is pushed."""
    # not to the adapter's: transformers would find it beside the merged weights and apply it once more
    return f"{config.export.push}-merged" if config.export.push else None
