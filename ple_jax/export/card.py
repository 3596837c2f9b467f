"""Renders the model card of an export: README.md with the hub's front matter, from templates/ and from what ran."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ple_jax import algorithms
from ple_jax.algorithms import Algorithm
from ple_jax.core.config import chosen, flatten
from ple_jax.core.files import read_json, read_jsonl
from ple_jax.core.secrets import portable, redacted
from ple_jax.core.version import VERSION
from ple_jax.models.hub import is_remote
from ple_jax.serving.commands import rank_limit

_METRICS = (  # metrics.jsonl, an evaluation's point -> words
    ("heldout_reward", "reward", "held-out reward (mean)"),
    ("heldout_second", "second", "a reward that training never sees (mean)"),
    ("heldout_kl_response", "kl", "KL to the start (nats per response)"),
    ("heldout_kl", "kl_token", "KL to the start (nats per token)"),
    ("heldout_distinct_2", "distinct_2", "Distinct-2"),
    ("heldout_entropy", "", "entropy (nats per token)"),
)
_PACKAGES = ("python", "jax", "flax", "optax", "torch", "torch-npu", "transformers", "peft", "trl")


def render(
    workdir: Path,
    *,
    library: str,
    base_model: str,
    iteration: int,
    summary: Mapping[str, Any],
    defaults: Mapping[str, Any],
    point: Mapping[str, Any] | None = None,
    repo: str | None = None,
    revision: str | None = None,
    head: bool = False,
) -> str:
    """Renders README.md for the export of one checkpoint, from config.json, environment.json and metrics.jsonl.

    Args:
        workdir: a run's work directory.
        library: what loads the export: "peft" (the adapter) or "transformers" (merged weights).
        base_model: the base model's hub id or path; of a path the card shows the last part alone.
        iteration: the checkpoint's iteration.
        summary: what summary.json says, or {}; left out where it speaks of another iteration.
        defaults: the default config, nested: the card shows what differs from it.
        point: the evaluation of what is exported, as `training.points.Point`, where there is one.
        repo, revision: hub id that the export will have, if any; the base's commit on its hub.
        head: whether it is a reward model.
    """
    from huggingface_hub import ModelCard

    tree, on_hub = redacted(read_json(workdir / "config.json") or {}), is_remote(base_model)
    name, trl = _name(tree["algorithm"]), tree["trainer"] == "trl"
    tags = ["reward-model" if head else name, "lora", *(["trl"] if trl else [])]
    header = _header(base_model if on_hub else None, library, tags, head)
    body = _body(
        "reward_model.md" if head else "policy.md", **_said(workdir, tree, defaults), library=library, on_hub=on_hub,
        base=base_model if on_hub else Path(base_model).name, revision=revision, metrics=_metrics(workdir, iteration, point),
        method=("TRL's " if trl else "") + _spelled(name), name=repo or "path/to/this/folder", iteration=iteration,
        step=point["step"] if point is not None and point["within"] else None,
        summary=summary if summary.get("steps" if head else "iterations") == iteration else {},
    )  # fmt: skip
    return str(ModelCard(f"---\n{header}\n---\n\n{body}"))


def _header(base: str | None, library: str, tags: list[str], head: bool) -> str:
    from huggingface_hub import ModelCardData

    task = "text-classification" if head else "text-generation"
    return ModelCardData(base_model=base, library_name=library, pipeline_tag=task, tags=tags).to_yaml()


def _name(algorithm: str) -> str:
    """Returns an algorithm's short name: of a user's file or module the last part."""
    return Path(algorithm).stem if algorithm.endswith(".py") else algorithm.rpartition(".")[2]


def _said(workdir: Path, tree: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Collects what the card says in any case, whatever is exported."""
    from ple_jax.models.weights import gguf_file  # here: it imports transformers, for which no other mode should wait

    config, plain = flatten(tree), flatten(json.loads(json.dumps(dict(defaults))))
    algorithm, sets = algorithms.load(config["algorithm"]), ", ".join(tree["task"].get("sets", {}))
    unserved = (config[f"lora.{key}"] for key in ("dora", "rank_pattern", "alpha_pattern"))
    return {
        "config": config,
        "queries": {which: sets or config[f"task.{which}"] for which in ("train", "heldout")},
        "about": _sentence(algorithm.about),
        "guided": isinstance(algorithm, Algorithm) and _guided(algorithm, tree),
        "settings": {k: v for k, v in chosen(config, plain).items() if not k.startswith("export.")},
        "versions": _versions(workdir),
        "rank": rank_limit(config["lora.rank"], *unserved),
        "gguf": gguf_file(config["model.path"]),
    }


def _body(template: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ple_jax.export"), trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    # a JSON string is one of Python too, whatever is in it
    environment.filters |= {"cell": _cell, "prose": _prose, "quoted": json.dumps, "filename": lambda path: path.name}
    environment.filters |= {"shell": shlex.quote, "number": "{:.4g}".format}
    return re.sub(r"\n{3,}", "\n\n", environment.get_template(template).render(values)).strip() + "\n"


def _guided(algorithm: Algorithm, tree: Mapping[str, Any]) -> bool:
    """Says whether principles have a part in training, for responses or for a teacher."""
    from ml_collections import ConfigDict

    config = ConfigDict(tree)
    return any(slot.principled for slot in algorithm.collect(config)) or algorithm.needs(config).teacher


def _spelled(algorithm: str) -> str:
    """Spells the algorithm's name for a title: PLE, self distillation."""
    return algorithm.upper() if algorithm.isalpha() and len(algorithm) <= 4 else algorithm.replace("_", " ")


def _sentence(docstring: str) -> str:
    """Formats a docstring's first line as Markdown, with its papers as links; code is left as it is."""
    parts = [part if i % 2 else _escaped(part) for i, part in enumerate(docstring.strip().split("\n")[0].split("`"))]
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", "`".join(parts))


def _metrics(workdir: Path, iteration: int, point: Mapping[str, Any] | None) -> list[tuple[str, float, float]]:
    """Returns what is known before training and at the evaluation that is exported, or the newest one up to `iteration`.

    Each row has the metric in words, and its two values.
    """
    path = workdir / "metrics.jsonl"
    lines = read_jsonl(path, torn=True) if path.exists() else []  # of a run that goes on, or was killed
    rows = []
    for key, name, words in _METRICS:
        known = [line[key] for line in lines if line.get(key) is not None and line["iteration"] <= iteration]
        if point is not None and (name or point["within"]):  # an evaluation within an iteration has no line
            known = known[:1] + [value for value in [point.get(name)] if value is not None]
        if len(known) > 1:
            rows.append((words, known[0], known[-1]))
    return rows


def _versions(workdir: Path) -> dict[str, str]:
    found = read_json(workdir / "environment.json") or {}
    return {"ple_jax": VERSION} | {name: found[name] for name in _PACKAGES if name in found}


def _prose(text: str) -> str:
    """Escapes a text of the user's for a line of Markdown, so that nothing in it is markup."""
    return _escaped(" ".join(text.split()))


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>#|~&!$])", r"\\\1", text)


def _cell(value: Any) -> str:
    """Formats a value for a table, without absolute paths of this machine and without anything that ends the cell."""
    value = value.name if isinstance(value, Path) else portable(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "`" + text.replace("|", "\\|").replace("`", "'").replace("\n", " ") + "`"
