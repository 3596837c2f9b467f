"""Reads the entries of --runs, which name folders of responses, work directories, and checkpoints of runs.

An entry is `path` or `label=path`. It may contain globs, and may end in `@` and a checkpoint as `config.checkpoint.use`
names it: `PLE=runs/ple_*@kl_4` stands for the answers of the best checkpoint within 4 nats, `@newest` for those of the last
one, and `@best` for those of the best one under the largest budget. `LABEL=path@points` stands for no answers, but for the
run's evaluations alone, which the frontier shows.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ple_jax.core.errors import Damaged, UserError
from ple_jax.core.files import read_json
from ple_jax.core.rules import Rule, flag, misshapen, optional, real, whole
from ple_jax.evaluation import responses
from ple_jax.training.points import Point

NEWEST, POINTS = "newest", "points"
_NUMBER = real(lambda v: True, "")
# how an evaluation stands in summary.json
_POINT: dict[str, Rule] = {
    **dict.fromkeys(Point._fields, optional(_NUMBER)), "iteration": whole(0), "step": whole(0), "within": flag,
}  # fmt: skip


def _points(value: Any) -> str:
    rows = list(value.values()) if isinstance(value, Mapping) else value
    needed = ("iteration", "step", "within")
    fine = isinstance(rows, list) and not any(misshapen(row, _POINT, needed=needed) for row in rows)
    return "" if fine else "evaluations"


SUMMARY: dict[str, Rule] = {"best": _points, "points": _points}


class Found(NamedTuple):
    """One set of responses that an entry names, or the evaluations of a run (where `view` is "points")."""

    label: str  # "" if none was given
    folder: Path  # of responses
    iteration: int | None  # of these; None: the newest
    view: str  # the checkpoint that answered, as config.checkpoint.use names it; "": one that stands in every view

    @property
    def workdir(self) -> Path:
        return self.folder.parent.parent


class Expanded(NamedTuple):
    """All that the entries name, and what was left out of it."""

    found: list[Found]
    left_out: list[str]  # in sentences


def expand(entries: Iterable[str]) -> Expanded:
    """Finds what the entries name, with globs expanded in order of name.

    Work directories without a checkpoint stand for every checkpoint with which all of them have answered. If none of them
    has answered with the checkpoint of a budget, they stand for their newest answers.

    Raises:
        UserError: nothing is there, a folder holds no responses or several sets of them, something is named twice, or no
            checkpoint is common to all runs.
    """
    found: list[Found] = []
    open_: list[Found] = []  # whose checkpoints are all that have answered
    for entry in entries:
        label, pattern, view = _parts(entry)
        if not (paths := _folders(pattern)):
            raise UserError(f"--runs: {entry!r} is no folder, nor a pattern that fits one (looked in {Path.cwd()})")
        for path in paths:
            one = _of_path(label, path, view)
            found.append(one)
            if not view and one.folder.parent.parent == path and _trained(one):
                open_.append(one)
    if not any(one.view != POINTS for one in found):
        raise UserError("--runs names no answers: --runs 'runs/ple,runs/sft' (work directories, or label=path)")
    everything = Expanded(*_common(found, open_))
    _check(everything.found)
    return everything


def _check(found: Sequence[Found]) -> None:
    named = Counter((one.folder.resolve(), one.iteration, one.view) for one in found)
    if twice := [folder for (folder, _, _), n in named.items() if n > 1]:
        raise UserError(f"--runs names {twice[0]} twice: the same responses would count as two seeds")
    views = {one.view for one in found} - {"", POINTS}
    if views and (unnamed := [one for one in found if not one.view and _trained(one)]):
        raise UserError(
            f"--runs: {unnamed[0].folder} does not say of which checkpoint it is, and others do: say it, as in"
            f" {unnamed[0].workdir}@{min(views)}"
        )


def _trained(one: Found) -> bool:
    """Says whether an entry is a run's own answers under the plain prompt, and not those of the model it started from."""
    return re.fullmatch(r"trained(_step_\d+)?", one.folder.name) is not None


def _common(found: Sequence[Found], open_: Sequence[Found]) -> tuple[list[Found], list[str]]:
    """Replaces each entry without a checkpoint, which are those in `open_`, by one for each checkpoint that they all share.

    Returns the entries, and a sentence for each checkpoint that is left out since some of them have not answered with it.

    Raises:
        UserError: they share no checkpoint.
    """
    files = {one: {view: file for view, file in _by_view(one.workdir).items() if file.exists()} for one in open_}
    seen = list(dict.fromkeys(view for of in files.values() for view in of if view != "best"))
    shared = [view for view in seen if all(view in of for of in files.values())]
    if not any(view.startswith("kl_") for view in seen):
        return [one._replace(folder=_responses(one.workdir)) if one in files else one for one in found], []
    if not shared:
        lacking = next(one for one, of in files.items() if seen[0] not in of)
        raise UserError(
            f"--runs: there is no checkpoint with which all runs have answered; {lacking.workdir} has not with {seen[0]!r}"
            " (its training may not be finished, or have no such budget): leave it out, or name others, as in DIR@newest"
        )
    left_out = [
        f"{view} is left out: {', '.join(str(one.workdir) for one, of in files.items() if view not in of)} has not answered"
        for view in seen
        if view not in shared
    ]
    each = [[_found(one.label, files[one][view], view) for view in shared] if one in files else [one] for one in found]
    return [one for some in each for one in some], left_out


def _parts(entry: str) -> tuple[str, str, str]:
    """Splits an entry into label, pattern and checkpoint. A path may itself contain = and @."""
    if _folders(entry):
        return "", entry, ""
    rest, _, view = entry.rpartition("@")
    if not rest or not re.fullmatch(r"best|newest|points|kl_\d[\d.e+-]*", view.strip()):
        rest, view = entry, ""
    label = ""
    if not _folders(rest) and "=" in rest:  # not before: folders of a sweep have such names too
        label, _, rest = rest.partition("=")
    return label.strip(), rest.strip(), view.strip()


def _folders(pattern: str) -> list[Path]:
    if not pattern:  # which would be the current folder
        return []
    paths = [Path(pattern)] if os.path.exists(pattern) else [Path(path) for path in sorted(glob.glob(pattern))]
    return [path for path in paths if path.is_dir()]


def _of_path(label: str, path: Path, view: str) -> Found:
    """Returns the set of responses that a path stands for.

    Without a checkpoint it is the newest one, unless `_common` chooses among several later.
    """
    if any(path.glob("iter_*.scores.jsonl")):
        if view:
            raise UserError(f"--runs: {path} is a folder of responses, and @{view} goes with a work directory")
        return Found(label, path, None, "")
    if view == POINTS:
        if not label:
            raise UserError(f"--runs: {path}@points needs the label of its method: LABEL={path}@points")
        return Found(label, path / "responses" / "trained", None, POINTS)
    answers = _by_view(path)
    if not view:  # which of them is decided when all are known
        some = any(file.exists() for file in answers.values())
        return Found(label, path / "responses" / "trained" if some else _responses(path), None, "")
    file = answers.get(view)
    if file is None or not file.exists():
        there = [name for name, file in answers.items() if file.exists()]
        known = f"it has answers of {', '.join(there)}" if there else "it has none of a trained checkpoint"
        raise UserError(
            f"{path} holds no answers of its checkpoint {view!r} ({known}); write them: --workdir {path} --mode=generate"
            f" --config.checkpoint.use={view}"
        )
    return _found(label, file, view)


def _by_view(workdir: Path) -> dict[str, Path]:
    """Maps each checkpoint of a finished run to the file that its answers are in, or would be in.

    The result is empty if the run is not finished.
    """
    summary = read_json(workdir / "summary.json") or {}
    if wrong := misshapen(summary, SUMMARY):
        raise Damaged(f"{workdir / 'summary.json'} is damaged ({wrong}); give the training's command again, which writes it")
    if "iterations" not in summary:
        return {}
    best = {name: responses.file_of(workdir, point) for name, point in summary.get("best", {}).items()}
    last = responses.file_of(workdir, {"iteration": summary["iterations"], "within": False})
    budgets = {name: file for name, file in best.items() if name.startswith("kl_")}
    return {**budgets, NEWEST: last, **({"best": list(best.values())[-1]} if best else {})}


def _found(label: str, file: Path, view: str) -> Found:
    return Found(label, file.parent, int(file.name[5:9]), view)


def _responses(path: Path) -> Path:
    """Finds the folder of responses of the trained policy in a work directory, or else the only such folder there."""
    found = sorted(scores.parent for scores in path.glob("responses/*/iter_*.scores.jsonl"))
    names = list(dict.fromkeys(folder.name for folder in found))
    if "trained" in names:
        return path / "responses" / "trained"
    if not names:
        raise UserError(f"{path} holds no responses; write them first: --workdir {path} --mode=generate")
    if len(names) > 1:
        raise UserError(f"{path}/responses holds {', '.join(names)}; name one of them in --runs: {found[0]}")
    return found[0]


def views(found: Sequence[Found]) -> list[str]:
    """Returns the checkpoints that are compared: budgets in ascending order, then the others, the newest last.

    The list is [""] if the entries name no checkpoint.
    """
    return sorted({one.view for one in found} - {"", POINTS}, key=_order) or [""]


def _order(view: str) -> tuple[float, bool]:
    return (budget(view) if view.startswith("kl_") else float("inf"), view == NEWEST)


def budget(view: str) -> float:
    """Returns the budget of a view in nats per response; nan for a view without one."""
    return float(view.removeprefix("kl_")) if view.startswith("kl_") else float("nan")
