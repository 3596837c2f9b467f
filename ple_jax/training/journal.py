"""The journal of rollouts: what was sampled, written once, atomically, and read by resume, report and evaluation.

While an iteration is being sampled what has ended is appended to iter_0003.partial.jsonl; when it is complete and
labelled, iter_0003.jsonl takes its place. All lines are sealed (`core.files`): what is read is what was written.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ple_jax.core import files
from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import Damaged, UserError
from ple_jax.core.identity import FORMAT
from ple_jax.core.types import Response, Rollout

FOLDERS = ("rollouts", "evaluations", "quarantine")  # of a work directory: where journals are


class Journal:
    """The rollouts of one iteration in `directory`."""

    def __init__(self, directory: Path, iteration: int):
        self.path = directory / f"iter_{iteration:04d}.jsonl"
        self.partial = directory / f"iter_{iteration:04d}.partial.jsonl"

    def read(self) -> list[Rollout] | None:
        """The complete iteration; None if it is not complete."""
        if not self.path.exists():
            return None
        self.partial.unlink(missing_ok=True)  # a kill between the last two steps of `complete` leaves it behind
        return read(self.path)

    def finished(self, asked: Sequence[str] = ()) -> dict[int, Response]:
        """The responses that ended before, by number; lines that are torn or damaged are taken out of the file.

        Args:
            asked: what each number answers, as `keep` was told; what answers something else is left out.
        """
        if not self.partial.exists():
            return {}
        wanted = dict(enumerate(asked))
        found = {line: _answers(line) for line in files.lines(self.partial, torn=True)}
        kept = {
            line: right
            for line, answers in found.items()
            if (right := [a for a in answers if not asked or a["asked"] == wanted.get(a["number"])])
        }
        if (whole := b"".join(line + b"\n" for line in kept)) != self.partial.read_bytes():
            files.write_bytes(self.partial, whole)
        return {answer["number"]: _response(answer) for answers in kept.values() for answer in answers}

    def keep(self, responses: Mapping[int, Response], asked: Sequence[str] = ()) -> None:
        """Some that have ended, by number; on return they are on disk, in one line.

        Args:
            asked: a digest of what each number answers.
        """
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        answers = [{"number": n, "asked": asked[n] if asked else "", **_plain(r)} for n, r in responses.items()]
        files.append_line(self.partial, files.seal(json.dumps({"answers": answers}, ensure_ascii=False)))

    def complete(self, rollouts: Sequence[Rollout]) -> None:
        """The whole iteration, in one step; what was kept until then is removed."""
        write(self.path, rollouts)
        self.partial.unlink(missing_ok=True)


def write(path: Path, rollouts: Sequence[Rollout]) -> None:
    """A file of rollouts; on return it is on disk, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_sealed(path, map(_line, rollouts))


def read(path: Path, *, remedy: str = "delete the file to sample it again") -> list[Rollout]:
    """The rollouts of a complete iteration.

    Raises:
        Damaged: the file is not as it was written; names file and line, and says the `remedy`.
    """
    rollouts = []
    for number, raw in enumerate(files.read_sealed(path, remedy=remedy), 1):
        try:
            responses = tuple(_response(r) for r in raw["responses"])
            rollouts.append(
                Rollout(
                    raw["query_id"],
                    raw["prompt"] if isinstance(raw["prompt"], str) else Conversation(raw["prompt"], raw.get("tools", ())),
                    tuple(raw["prompt_tokens"]),
                    responses,
                    _number(raw["tau"]),
                    _number(raw["margin"]),
                    raw["decision"],
                    raw.get("record", {}),
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{path}:{number} is not a line of rollouts ({error!r}); {remedy}") from error
    return rollouts


def left_out(path: Path, kept: Sequence[Rollout], *, remedy: str = "delete the file to sample it again") -> list[Rollout]:
    """What of an iteration is not in its journal, at `path`, as a reward of it was not finite; `kept` is what is.

    Raises:
        Damaged: as `read`.
    """
    beside, known = path.parents[1] / "quarantine" / path.name, {rollout.query_id for rollout in kept}
    found = read(beside, remedy=remedy) if beside.exists() else []
    return [rollout for rollout in found if rollout.query_id not in known]


def check(workdir: Path, iteration: int) -> None:
    """What finished iterations left is as it was written: nobody wants to hear at the end of a run that it is not.

    Args:
        iteration: the one that the run stands before; what is of it, or of later ones, is checked where it is read.

    Raises:
        Damaged: it is not.
        UserError: the evaluation before training is gone, without which a run has no summary.
    """
    start = workdir / "evaluations" / "iter_0000.jsonl"
    again = f"put a copy of it back, or remove it and {workdir / 'checkpoints'}: the run trains again, on what it sampled"
    if iteration and not start.exists():
        raise UserError(f"{start}, the evaluation before training, is gone; {again.replace('it and ', '')}")
    for path in sorted(path for folder in FOLDERS for path in (workdir / folder).glob("*_????.jsonl")):
        if int(path.stem[-4:]) < iteration:
            read(path, remedy=again if path == start else "put a copy of it back, or remove it: the run goes on without it")


def _answers(line: bytes) -> list[dict[str, Any]]:
    """What a line of a partial journal holds; nothing where it is damaged, or an earlier version's."""
    try:
        value, sealed = files.opened(line)
    except ValueError:
        return []
    return value.get("answers", []) if sealed else []


def _line(rollout: Rollout) -> dict[str, Any]:
    turns = rollout.prompt if isinstance(rollout.prompt, Conversation) else None
    return {
        "format": FORMAT,
        "query_id": rollout.query_id,
        "prompt": rollout.prompt if turns is None else list(turns.messages),
        **({"tools": list(turns.tools)} if turns is not None and turns.tools else {}),
        "prompt_tokens": list(rollout.prompt_tokens),
        "tau": files.plain(rollout.tau),
        "responses": [_plain(r) for r in rollout.responses],
        "margin": files.plain(rollout.margin),
        "decision": rollout.decision,
        **({"record": dict(rollout.record)} if rollout.record else {}),
    }


def _plain(response: Response) -> dict[str, Any]:
    return {
        "kind": response.kind,
        "principled": response.principled,
        "source": response.source,
        "sample": response.sample,
        "tokens": list(response.tokens),
        "text": response.text,
        "finished": response.finished,
        "reward": files.plain(response.reward),
        "score": files.plain(response.score),
        "weight": files.plain(response.weight),
        **({"parts": files.plain(response.parts)} if response.parts else {}),
        **({"logprobs": files.plain(response.logprobs)} if response.logprobs else {}),
        **({"noise": response.noise} if response.noise else {}),
    }


def _response(raw: dict[str, Any]) -> Response:
    parts = {name: _number(value) for name, value in raw.get("parts", {}).items()}
    said = tuple(raw["tokens"]), raw["finished"], raw["kind"], raw["sample"], raw["text"]
    values = _number(raw["reward"]), _number(raw["score"]), _number(raw["weight"]), parts
    if "source" in raw:
        logprobs = tuple(map(_number, raw.get("logprobs", ())))
        return Response(*said, *values, raw["principled"], raw["source"], logprobs, raw.get("noise", ""))
    # of format 1, where the names of kinds told who gave a response
    records = {"reference": "completion", "chosen": "completion", "rejected": "rejected"}
    return Response(*said, *values, raw["kind"] == "principled", records.get(raw["kind"], "policy"))


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)
