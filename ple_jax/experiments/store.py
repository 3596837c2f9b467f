"""Keeps the results of finished jobs, one packed file for each, which survive interruptions and the loss of a machine.

DIR/NAME.tar.xz holds what a job has written, and the mark that it is done. For a training these are its config, environment,
summary and metrics; for answers, the responses without the log-probability of every token. There are no checkpoints, no
rollouts and no weights, except for the adapter and the head of a reward model, by which other runs were scored.

A job is taken from there if its mark is of what is asked for today. If a file of its name is of another question, the
command is refused before that job runs: its result would take the place of one that somebody may wait for. Where data must
not be copied, `texts` is the file that the queries come from: texts from it are not kept, but read there again.
"""

import contextlib
import lzma
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ple_jax.core import identity
from ple_jax.core.errors import Damaged, UserError, of_the_machine
from ple_jax.core.files import read_sealed, write_sealed
from ple_jax.core.types import Query
from ple_jax.data.queries import load_queries
from ple_jax.experiments import jobs
from ple_jax.experiments.jobs import Job, Outcome, is_done, is_wanted, mark, say
from ple_jax.training import journal

_WHOSE = "training"  # in every archive: the digest of the training's summary
_OF_RUN = ("config.json", "environment.json", "summary.json", "metrics.jsonl")
_OF_REWARD = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
_SCORES = ".scores.jsonl"
_AGAIN = "delete it, and that job is done again"
_LEFT = 3600.0  # seconds: no file takes as long to write


def run(
    some: Sequence[Job], out: Path, keep: Path | None = None, *, texts: Path | None = None, parallel: int = 1
) -> dict[str, Outcome]:
    """Takes the jobs that are kept, executes the others as `jobs.run` does, and keeps those that end well."""
    if keep is None:
        return jobs.run(some, out, parallel=parallel)
    take_all(some, out, keep, texts=texts)
    for job in some:  # of a command without --keep, or one that was killed before it got here
        if is_done(job, out) and not holds(job, out, keep):
            save(job, out, keep, texts=texts)
    return jobs.run(some, out, parallel=parallel, done=lambda job: save(job, out, keep, texts=texts))


def take_all(some: Sequence[Job], out: Path, keep: Path | None, *, texts: Path | None = None) -> None:
    """Takes those of the jobs that are kept, and prints how many they are."""
    if keep is not None and (taken := sum(take(job, out, keep, texts=texts) for job in some)):
        say(f"{taken} jobs are taken from {keep}")


def archive(job: Job, keep: Path) -> Path:
    return keep / f"{job.name}.tar.xz"


def save(job: Job, out: Path, keep: Path, *, texts: Path | None = None) -> None:
    """Packs the results of a job that ended well into `keep`; replaces an earlier file of its name.

    Raises:
        UserError: the earlier file is of another question.
    """
    keep.mkdir(parents=True, exist_ok=True)
    check([job], out, keep)
    written = [mark(job, out)]
    if job.workdir == out / job.name:
        reward = _OF_REWARD if (job.workdir / "reward_model").exists() else ()
        written += [job.workdir / name for name in (*_OF_RUN, *reward)]
    if job.result.parent != job.workdir:  # a set of responses: three files of one iteration
        written += sorted(job.result.parent.glob(f"{job.result.name.partition('.')[0]}.*"))
    new = keep / f".{job.name}.{os.getpid()}.new"
    for left in keep.glob(".*.new"):
        with contextlib.suppress(FileNotFoundError):  # another command has just finished it
            if time.time() - left.stat().st_mtime > _LEFT:  # by a process that was killed; a younger one is being written
                left.unlink()
    with tempfile.TemporaryDirectory() as folder, tarfile.open(new, "w:xz", preset=9) as packed:
        whose = Path(folder) / _WHOSE
        whose.write_text(_digest(job.workdir), encoding="utf-8")
        packed.add(whose, _WHOSE, filter=_plain)
        for path in written:
            if path.exists():
                packed.add(_lean(path, Path(folder), texts is None), path.relative_to(out).as_posix(), filter=_plain)
    new.replace(archive(job, keep))


def _digest(workdir: Path) -> str:
    """Returns the digest of a training's summary, or of nothing if there is no training.

    It differs from that of any other training, since the summary has the seconds that the training took.
    """
    summary = workdir / "summary.json"
    return identity.digest([summary.read_bytes() if summary.exists() else b""])


def _lean(path: Path, folder: Path, whole: bool) -> Path:
    """Writes a copy of a journal without the tokens' log-probabilities, which are most of it.

    Args:
        path: any file of a job.
        folder: where the copy is written.
        whole: whether to keep the texts of the data. If not, prompts and records are left out of journals, and references
            out of files of scores.

    Returns:
        The path of the copy, or `path` itself if nothing is left out of that file.
    """
    if not path.name.startswith("iter_") or path.suffixes not in ([".jsonl"], [".scores", ".jsonl"]):
        return path
    if path.name.endswith(_SCORES):
        if whole:
            return path
        write_sealed(folder / path.name, [line | {"reference": ""} for line in read_sealed(path, remedy=_AGAIN)], ascii=True)
        return folder / path.name
    lean = [
        rollout._replace(responses=tuple(response._replace(logprobs=()) for response in rollout.responses))
        for rollout in journal.read(path)
    ]
    if not whole:
        lean = [rollout._replace(prompt="", prompt_tokens=(), record={}) for rollout in lean]
    journal.write(folder / path.name, lean)
    return folder / path.name


def _put_back(folder: Path, texts: Path) -> None:
    """Restores the prompts and references in all answers of a folder, by the queries' ids, from the data in `texts`.

    Raises:
        Damaged: if they answer a query that is not in `texts`.
    """
    known = {query.id: query for query in load_queries(str(texts)).queries}
    for scores in folder.rglob(f"iter_*{_SCORES}"):
        path = scores.with_name(scores.name.replace(_SCORES, ".jsonl"))
        rollouts, lines = journal.read(path, remedy=_AGAIN), read_sealed(scores, remedy=_AGAIN)
        if gone := [rollout.query_id for rollout in rollouts if rollout.query_id not in known]:
            raise Damaged(f"{texts} has no {gone[0]}, which kept answers are of: give the data that they were made from")
        whose: list[Query] = [known[rollout.query_id] for rollout in rollouts]
        journal.write(path, [r._replace(prompt=query.prompt) for r, query in zip(rollouts, whose, strict=True)])
        told = [line | {"reference": str(query.completion)} for line, query in zip(lines, whose, strict=True)]
        write_sealed(scores, told, ascii=True)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Removes owner, permissions and time of a member, so that equal content gives equal archives."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member


def holds(job: Job, out: Path, keep: Path) -> bool:
    """Says whether a job that is done in OUT is kept, with the result that it has there."""
    if not archive(job, keep).exists():
        return False
    with tempfile.TemporaryDirectory() as folder:
        unpacked = _unpacked(job, keep, Path(folder))
        return _wanted(job, out, unpacked) and (unpacked / _WHOSE).read_text(encoding="utf-8") == _digest(job.workdir)


def take(job: Job, out: Path, keep: Path, *, texts: Path | None = None) -> bool:
    """Unpacks a job that is not done in OUT, in place of anything that it began there; says whether it was taken.

    Answers are taken only if the very training that gave them is in OUT.

    Raises:
        Damaged: if its file cannot be read, or answers a query that is not in `texts`.
        UserError: if its file is of another question, or the machine cannot unpack it.
    """
    if is_done(job, out) or not archive(job, keep).exists():
        return False
    with tempfile.TemporaryDirectory(dir=out) as folder:
        unpacked = _unpacked(job, keep, Path(folder))
        own = job.workdir == out / job.name
        whose = unpacked / _WHOSE
        _check_question(job, out, unpacked, keep)
        if not _wanted(job, out, unpacked) or not (own or whose.read_text(encoding="utf-8") == _digest(job.workdir)):
            return False
        whose.unlink()
        if texts is not None:
            _put_back(unpacked, texts)
        if own:
            shutil.rmtree(job.workdir, ignore_errors=True)
        # the mark comes last
        for path in sorted((p for p in unpacked.rglob("*") if p.is_file()), key=lambda path: path.parent == unpacked):
            place = out / path.relative_to(unpacked)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
    return True


def _unpacked(job: Job, keep: Path, folder: Path) -> Path:
    file = archive(job, keep)
    try:
        with tarfile.open(file, "r:xz") as packed:
            packed.extractall(folder, filter="data")
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise Damaged(f"{file} is damaged ({error}); {_AGAIN}") from error
    except OSError as error:  # of the machine: nothing is wrong with the file, which may be all that is left of a training
        says = of_the_machine(error) or f"{error}; mend that, and give the same command again"
        raise UserError(f"{file} cannot be unpacked: {says}") from error
    return folder


def _wanted(job: Job, out: Path, unpacked: Path) -> bool:
    """Says whether an archive is of what the job asks for, and records which training its answers are from."""
    kept = mark(job, unpacked)
    return (unpacked / _WHOSE).is_file() and kept.is_file() and is_wanted(job, out, kept.read_text(encoding="utf-8"))


def check(some: Sequence[Job], out: Path, keep: Path) -> None:
    """Raises a UserError if `keep` has a file of one of the jobs that is of another question."""
    for job in some:
        if archive(job, keep).exists():
            with tempfile.TemporaryDirectory() as folder:
                _check_question(job, out, _unpacked(job, keep, Path(folder)), keep)


def _check_question(job: Job, out: Path, unpacked: Path, keep: Path) -> None:
    """Raises a UserError if an archive is not of what the job asks for."""
    kept = mark(job, unpacked)
    if kept.is_file() and (keys := jobs.differences(job, out, kept.read_text(encoding="utf-8"))):
        raise UserError(
            f"{archive(job, keep)} is of another command, differing in {', '.join(keys)}; give another --keep, or move it"
            " away"
        )


def forget(job: Job, out: Path, keep: Path | None) -> None:
    """Deletes a finished training and its answers, in OUT and in `keep`, as if they had never begun."""
    for folder, suffix in ((out, ".done"), (keep, ".tar.xz")):
        if folder is not None:
            for file in (folder / f"{job.name}{suffix}", *folder.glob(f"{job.name}__*{suffix}")):
                file.unlink(missing_ok=True)
    shutil.rmtree(job.workdir, ignore_errors=True)
