"""Reads the runs of a comparison, gives them labels, checks them against one another, and groups them into methods."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from ple_jax.core import identity
from ple_jax.core.config import flatten
from ple_jax.core.errors import Damaged, UserError
from ple_jax.core.files import read_json, read_jsonl
from ple_jax.core.rules import Rule, misshapen, optional, real, whole
from ple_jax.evaluation import entries, responses
from ple_jax.training import costs
from ple_jax.training.workdir import recorded

MEASURED = ("reward", "reward_second", "kl")  # measures with a value of every response
SAME = (
    "data_digest", "samples", "max_new_tokens", "sampling", "reward", "reward_version", "second_reward",
    "second_reward_version",
)  # fmt: skip
_REMEDY = "give the training's command again, which writes it, or leave the run out"
# the keys that a model before any training depends on
_START = ("backend", "model.", "task.chat", "task.thinking", "inputs.model", "inputs.adapter")
_NUMBER = real(lambda v: True, "")
_COUNT = real(lambda v: v >= 0, "of at least 0")


def _by_phase(value: Any) -> str:
    """Checks the seconds of every phase in summary.json; returns "" for numbers of at least 0, else what they must be."""
    fine = isinstance(value, Mapping) and not any(map(_COUNT, value.values()))
    return "" if fine else "an object of numbers"


# what is read here of a summary.json and of a line of metrics.jsonl, which other programs may have written
_SUMMARY: dict[str, Rule] = {
    "iterations": whole(0), "seconds": _by_phase,
    **dict.fromkeys((*costs.COUNTERS, "wall_seconds", "evaluation_tokens", "peak_memory_bytes"), _COUNT), **entries.SUMMARY,
}  # fmt: skip
_LINE: dict[str, Rule] = {
    "iteration": whole(0), "heldout_reward": optional(_NUMBER), "total_seconds": _COUNT,
    **{f"total_{name}": _COUNT for name in costs.COUNTERS},
}  # fmt: skip


class Entry(NamedTuple):
    """One seed of a method: its responses, and what their work directory says of the training."""

    label: str  # "" until there is one
    folder: Path  # of the responses
    generated: responses.Generated
    config: dict[str, Any]  # flat
    summary: dict[str, Any]  # {} where training is not finished
    lines: list[dict[str, Any]]  # of metrics.jsonl
    point: dict[str, Any] | None  # the evaluation of what gave the responses, as `training.points.Point`, where it is known

    @property
    def workdir(self) -> Path:
        return self.folder.parent.parent

    @property
    def seed(self) -> int:
        return self.generated.settings["seed"]

    @property
    def trained(self) -> bool:
        return self.generated.settings["policy"] == "trained"

    @property
    def earlier(self) -> bool:
        """Whether a checkpoint before the end of its run answered."""
        return self.point is not None and self.point["step"] != self.summary["points"][-1]["step"]


class Method(NamedTuple):
    """A method: its runs, which have one label and are ordered by seed, and what was measured of every response."""

    label: str
    runs: list[Entry]
    values: dict[str, Float64[np.ndarray, "seed query sample"]]  # by MEASURED; nan where there is none

    @property
    def trained(self) -> bool:
        return self.runs[0].trained

    def by_query(self, measure: str) -> Float64[np.ndarray, "seed query"]:
        return mean(self.values[measure])


def read(found: entries.Found) -> Entry:
    """Reads the responses of an entry, and the files of their work directory."""
    generated, (summary, lines) = responses.read(found.folder, found.iteration), progress(found.workdir)
    trained = generated.settings["policy"] == "trained"
    entry = Entry(found.label, found.folder, generated, config(found.workdir), summary, lines if trained else [], None)
    return entry._replace(point=_point(entry)) if trained else entry


def config(workdir: Path) -> dict[str, Any]:
    """Reads config.json as a flat dictionary, with today's keys; {} if there is none."""
    kept = recorded(workdir)
    return {} if kept is None else flatten(identity.completed(kept))


def progress(workdir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Reads summary.json, {} if training is not finished, and the lines of metrics.jsonl.

    Raises:
        Damaged: one of the two files is damaged.
    """
    lines: list[dict[str, Any]] = []
    if (workdir / "metrics.jsonl").exists():
        lines = read_jsonl(workdir / "metrics.jsonl", torn=True)  # a run may be writing it
        if wrong := next((says for line in lines if (says := misshapen(line, _LINE))), ""):
            raise Damaged(f"{workdir / 'metrics.jsonl'} is damaged ({wrong}); {_REMEDY}")
    summary = read_json(workdir / "summary.json") or {}
    if summary and (wrong := misshapen(summary, _SUMMARY, needed=("iterations",))):
        raise Damaged(f"{workdir / 'summary.json'} is damaged ({wrong}); {_REMEDY}")
    return summary, lines


def _point(entry: Entry) -> dict[str, Any] | None:
    """Finds the evaluation of exactly the policy that gave the responses; None if summary.json has none."""
    step = entry.folder.name.partition("_step_")[2]
    for point in entry.summary.get("points", []):
        same = point["step"] == int(step) if step else not point["within"]
        if same and point["iteration"] == entry.generated.settings["iteration"]:
            return point
    return None


def labelled(runs: Sequence[Entry]) -> list[Entry]:
    """Gives every run a label: the one that was given, or one that tells the methods apart.

    That is the algorithm ("start" before training), with " (trl)" if TRL trained it, and " + principles" if they were in the
    prompt. Where runs of one such name differ in their configs (apart from seeds and from how they were computed), the label
    also has the keys, and their values, in which a run differs from the most frequent value among these configs (the first
    one, if several are as frequent).
    """
    named: dict[str, list[Entry]] = {}
    for run in runs:
        named.setdefault(_name(run), []).append(run)
    labels = {}
    for name, members in named.items():
        derived = [run for run in members if not run.label]
        configs = {json.dumps(config, sort_keys=True): config for config in map(method_keys, derived)}
        usual = {}
        for key in sorted({key for config in configs.values() for key in config}):
            values = [json.dumps(config.get(key)) for config in configs.values()]
            usual[key] = max(values, key=values.count)  # the first of the most frequent
        for run in derived:
            config = method_keys(run)
            own = [f"{key}={_value(config.get(key))}" for key in usual if json.dumps(config.get(key)) != usual[key]]
            labels[run.folder] = " ".join([name, *own])
    return [run._replace(label=run.label or labels[run.folder]) for run in runs]


def _name(run: Entry) -> str:
    settings = run.generated.settings
    name = Path(settings["algorithm"]).stem if settings["algorithm"].endswith(".py") else settings["algorithm"]
    name = name + (" (trl)" if settings["trainer"] == "trl" else "") if run.trained else "start"
    return name + (" + principles" if settings["principled"] else "")


def method_keys(run: Entry) -> dict[str, Any]:
    """Returns the keys of a run's config that make it the method that it is.

    For a model before training these are the keys that the start model depends on, and the principles in its prompt.
    """
    config = identity.method_keys(run.config)
    if run.trained:
        return config
    own = {k: v for k, v in config.items() if k.startswith(_START)}
    if not (said := run.generated.settings)["principled"]:
        return own
    # the directory may since have been trained in with another set; if not, it says what settings of earlier versions do not
    known = config if config.get("principles") == said["principles"] else {}
    rules = {key: said.get(key, known.get(of_run)) for key, of_run in responses.RULES.items()}
    return {**own, "principles": said["principles"], **rules}


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def check(runs: Sequence[Entry]) -> None:
    """Raises a UserError that names two runs if they answer other queries, or were sampled or scored in another way."""
    first = runs[0]
    for key in SAME:
        # a second reward may be missing: that is warned of; and files of an earlier version do not say its version
        known = [run for run in runs if not key.startswith("second") or run.generated.settings.get(key) is not None]
        for run in known[1:]:
            one, other = known[0].generated.settings[key], run.generated.settings[key]
            if one != other:
                raise UserError(
                    f"{known[0].folder} and {run.folder} cannot be compared: {key} is {_value(one)} and {_value(other)};"
                    " give --mode=generate the same for both"
                )
    for run in runs[1:]:
        if _queries(run) != _queries(first):
            raise UserError(
                f"{first.folder} and {run.folder} cannot be compared: they answer other queries, or in another order"
            )


def _queries(run: Entry) -> list[tuple[str, int]]:
    return [(rollout.query_id, len(rollout.responses)) for rollout in run.generated.rollouts]


def group(runs: Sequence[Entry]) -> list[Method]:
    """Groups the runs of each label into one method, ordered by seed.

    Raises:
        UserError: two runs of a label have the same seed, or only one of them was trained.
    """
    found: dict[str, list[Entry]] = {}
    for run in runs:
        for other in found.setdefault(run.label, []):
            if other.seed == run.seed or other.trained != run.trained:
                same = f"both have seed {run.seed}" if other.trained == run.trained else "only one of them was trained"
                raise UserError(
                    f"{other.folder} and {run.folder} are both labelled {run.label!r}, and {same}; tell them apart:"
                    f" --runs LABEL={other.folder},OTHER={run.folder}"
                )
        found[run.label].append(run)
    methods = []
    for label, members in found.items():
        members = sorted(members, key=lambda run: run.seed)
        methods.append(Method(label, members, {key: np.stack([_values(run, key) for run in members]) for key in MEASURED}))
    return methods


def _values(run: Entry, measure: str) -> Float64[np.ndarray, "query sample"]:
    """Returns a measure of every response; nan where a response has none, or none that is finite."""
    if measure == "reward":
        rows: list[Any] = [[r.reward for r in rollout.responses] for rollout in run.generated.rollouts]
    else:
        key, samples = measure.removeprefix("reward_"), len(run.generated.rollouts[0].responses)
        rows = [line.get(key, [None] * samples) for line in run.generated.scores]
    values = np.array(rows, np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def mean(values: np.ndarray) -> np.ndarray:
    """Computes the mean over the last axis of the values that are not nan; nan where all are."""
    known = ~np.isnan(values)
    sums = np.where(known, values, 0.0).sum(-1)
    return np.where(known.any(-1), sums / np.maximum(known.sum(-1), 1), np.nan)
