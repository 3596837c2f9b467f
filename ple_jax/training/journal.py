"""The journal of rollouts: what was sampled, written once, atomically, and read by resume, report and evaluation.

While an iteration is being sampled, responses that have ended are appended to iter_0003.partial.jsonl. When it is complete
and labelled, iter_0003.jsonl takes the place of that file. All lines are sealed (`core.files`), so that any damage is found
when they are read.
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
    """The journal of one iteration in `directory`: the file of its rollouts, and the partial file that comes before it."""

    def __init__(self, directory: Path, iteration: int):
        self.path = directory / f"iter_{iteration:04d}.jsonl"
        self.partial = directory / f"iter_{iteration:04d}.partial.jsonl"

    def read(self) -> list[Rollout] | None:
        """Reads the rollouts of the iteration; returns None if it is not complete.

        Raises:
            Damaged: as the function `read`.
        """
        if not self.path.exists():
            return None
        self.partial.unlink(missing_ok=True)  # a kill between the last two steps of `complete` leaves it behind
        return read(self.path)

    def finished(self, asked: Sequence[str] = ()) -> dict[int, Response]:
        """Reads the responses that were kept before, by request number, and removes torn or damaged lines from the file.

        Args:
            asked: a digest of each numbered request, as given to `keep`. Responses to other requests are left out; without
                any digests all are returned.
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
        """Appends responses that have ended, by request number, to the partial file in one line. On return they are on disk.

        Args:
            asked: a digest of each numbered request, which `finished` compares.
        """
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        answers = [{"number": n, "asked": asked[n] if asked else "", **_plain(r)} for n, r in responses.items()]
        files.append_line(self.partial, files.seal(json.dumps({"answers": answers}, ensure_ascii=False)))

    def complete(self, rollouts: Sequence[Rollout]) -> None:
        """Writes the whole iteration in one atomic step, and removes what was kept until then."""
        write(self.path, rollouts)
        self.partial.unlink(missing_ok=True)


def write(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Writes a file of rollouts. On return the whole file is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_sealed(path, map(_line, rollouts))


def read(path: Path, *, remedy: str = "delete the file to sample it again") -> list[Rollout]:
    """Reads the rollouts of a complete iteration.

    Raises:
        Damaged: if the file is not as it was written. The message names file and line, and says the `remedy`.
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
    """Returns the rollouts that an iteration's journal at `path` lacks because a reward was not finite; reads them from
    quarantine.

    Args:
        kept: the rollouts that the journal has.

    Raises:
        Damaged: as `read`.
    """
    beside, known = path.parents[1] / "quarantine" / path.name, {rollout.query_id for rollout in kept}
    found = read(beside, remedy=remedy) if beside.exists() else []
    return [rollout for rollout in found if rollout.query_id not in known]


def check(workdir: Path, iteration: int) -> None:
    """Checks that the files of finished iterations are as they were written, so that no damage shows only at the end of a
    run.

    Args:
        iteration: the one that the run stands before. Files of it and of later ones are checked when they are read.

    Raises:
        Damaged: if a file is not as it was written.
        UserError: if the evaluation before training is gone, without which a run has no summary.
    """
    start = workdir / "evaluations" / "iter_0000.jsonl"
    again = f"put a copy of it back, or remove it and {workdir / 'checkpoints'}: the run trains again, on what it sampled"
    if iteration and not start.exists():
        raise UserError(f"{start}, the evaluation before training, is gone; {again.replace('it and ', '')}")
    for path in sorted(path for folder in FOLDERS for path in (workdir / folder).rglob("*_????.jsonl")):
        if int(path.stem[-4:]) < iteration:
            read(path, remedy=again if path == start else "put a copy of it back, or remove it: the run goes on without it")


def _answers(line: bytes) -> list[dict[str, Any]]:
    """Returns the responses in a line of a partial journal; none if the line is damaged, or of an earlier version."""
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
    logprobs = tuple(map(_number, raw.get("logprobs", ())))
    return Response(*said, *values, raw["principled"], raw["source"], logprobs, raw.get("noise", ""))


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)
