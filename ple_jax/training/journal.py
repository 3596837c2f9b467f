"""The journal of rollouts: what was sampled, written once, atomically, and read by resume, report and evaluation.

While an iteration is being sampled its finished chunks are appended to iter_0003.partial.jsonl; when it is complete and
labelled, iter_0003.jsonl takes its place.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ple_jax.core import files
from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import UserError
from ple_jax.core.identity import FORMAT
from ple_jax.core.types import Response, Rollout


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

    def finished_chunks(self) -> dict[int, list[Response]]:
        """The chunks that were finished before; one that was not is cut off the file."""
        if not self.partial.exists():
            return {}
        files.cut_torn_line(self.partial)
        lines = files.read_jsonl(self.partial)
        return {line["chunk"]: [_response(r) for r in line["responses"]] for line in lines}

    def keep(self, chunk: int, responses: Sequence[Response]) -> None:
        """One finished chunk; on return it is on disk."""
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        line = {"chunk": chunk, "responses": [_plain(r) for r in responses]}
        files.append_line(self.partial, json.dumps(line, ensure_ascii=False))

    def complete(self, rollouts: Sequence[Rollout]) -> None:
        """The whole iteration, in one step; the chunks are removed."""
        write(self.path, rollouts)
        self.partial.unlink(missing_ok=True)


def write(path: Path, rollouts: Sequence[Rollout]) -> None:
    """A file of rollouts; on return it is on disk, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_jsonl(path, map(_line, rollouts))


def read(path: Path) -> list[Rollout]:
    """The rollouts of a complete iteration.

    Raises:
        UserError: the file is not such a journal; names file and line.
    """
    rollouts = []
    remedy = "delete the file to sample it again"
    for number, raw in enumerate(files.read_jsonl(path, remedy=remedy), 1):
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
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number} is not a line of rollouts ({error!r}); {remedy}") from error
    return rollouts


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
        **({"parts": {name: files.plain(value) for name, value in response.parts.items()}} if response.parts else {}),
    }


def _response(raw: dict[str, Any]) -> Response:
    parts = {name: _number(value) for name, value in raw.get("parts", {}).items()}
    said = tuple(raw["tokens"]), raw["finished"], raw["kind"], raw["sample"], raw["text"]
    values = _number(raw["reward"]), _number(raw["score"]), _number(raw["weight"]), parts
    if "source" in raw:
        return Response(*said, *values, raw["principled"], raw["source"])
    # of format 1, where the names of kinds told who gave a response
    records = {"reference": "completion", "chosen": "completion", "rejected": "rejected"}
    return Response(*said, *values, raw["kind"] == "principled", records.get(raw["kind"], "policy"))


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)
