"""What finished jobs say, packed to be kept: a file a job, which an interruption, or a machine that goes, does not lose.

DIR/NAME.tar.xz holds what a job has written, and the mark that it is done: of a training its config, environment, summary
and metrics, of answers the responses, but for the log-probability of every token. No checkpoints, no rollouts; no weights,
but for the adapter and the head of a reward model, by which others were scored.
A job is taken from there where its mark says what is asked today; of anything else that has its name nothing is read.
Where data are not to be copied, `texts` is the file that queries come from: what it says is not kept, but read there again.
"""

import lzma
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ple_jax.core import identity
from ple_jax.core.errors import Damaged
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


def run(
    some: Sequence[Job], out: Path, keep: Path | None = None, *, texts: Path | None = None, parallel: int = 1
) -> dict[str, Outcome]:
    """`jobs.run`, of what is not kept; what finishes is."""
    if keep is None:
        return jobs.run(some, out, parallel=parallel)
    take_all(some, out, keep, texts=texts)
    for job in some:  # of a command without --keep, or one that was killed before it got here
        if is_done(job, out) and not holds(job, out, keep):
            save(job, out, keep, texts=texts)
    return jobs.run(some, out, parallel=parallel, done=lambda job: save(job, out, keep, texts=texts))


def take_all(some: Sequence[Job], out: Path, keep: Path | None, *, texts: Path | None = None) -> None:
    """Takes what is kept of these jobs, and says how many that were."""
    if keep is not None and (taken := sum(take(job, out, keep, texts=texts) for job in some)):
        say(f"{taken} jobs are taken from {keep}")


def archive(job: Job, keep: Path) -> Path:
    return keep / f"{job.name}.tar.xz"


def save(job: Job, out: Path, keep: Path, *, texts: Path | None = None) -> None:
    """Packs a job that ended well; an earlier file of its name is replaced."""
    keep.mkdir(parents=True, exist_ok=True)
    written = [mark(job, out)]
    if job.workdir == out / job.name:
        reward = _OF_REWARD if (job.workdir / "reward_model").exists() else ()
        written += [job.workdir / name for name in (*_OF_RUN, *reward)]
    if job.result.parent != job.workdir:  # a set of responses: three files of one iteration
        written += sorted(job.result.parent.glob(f"{job.result.name.partition('.')[0]}.*"))
    new = keep / f".{job.name}.new"
    for left in keep.glob(".*.new"):  # by a process that was killed
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
    """Of a training, whose summary has the seconds that it took, as no other one; of no training that of nothing."""
    summary = workdir / "summary.json"
    return identity.digest([summary.read_bytes() if summary.exists() else b""])


def _lean(path: Path, folder: Path, whole: bool) -> Path:
    """A journal without the tokens' log-probabilities, which are most of it; any other file as it is.

    Args:
        whole: with what the data say.
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
    """What the data say, in all answers of a folder, by the queries' ids.

    Raises:
        Damaged: they answer a query that is not there.
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
    """Without owner, rights and time, so that the same content is the same file."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member


def holds(job: Job, out: Path, keep: Path) -> bool:
    """Whether a job that is done in OUT is kept as it is there."""
    if not archive(job, keep).exists():
        return False
    with tempfile.TemporaryDirectory() as folder:
        unpacked = _unpacked(job, keep, Path(folder))
        return _wanted(job, out, unpacked) and (unpacked / _WHOSE).read_text(encoding="utf-8") == _digest(job.workdir)


def take(job: Job, out: Path, keep: Path, *, texts: Path | None = None) -> bool:
    """Unpacks a job that is not done in OUT, in the place of what it may have begun there; whether it was taken.

    Answers are taken beside the very training that gave them alone.

    Raises:
        Damaged: its file cannot be read.
    """
    if is_done(job, out) or not archive(job, keep).exists():
        return False
    with tempfile.TemporaryDirectory(dir=out) as folder:
        unpacked = _unpacked(job, keep, Path(folder))
        own = job.workdir == out / job.name
        whose = unpacked / _WHOSE
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
    except (tarfile.TarError, lzma.LZMAError, OSError, EOFError) as error:
        raise Damaged(f"{file} is damaged ({error}); {_AGAIN}") from error
    return folder


def _wanted(job: Job, out: Path, unpacked: Path) -> bool:
    """Whether an archive is of what the job asks for, and of a version that says whose answers these are."""
    kept = mark(job, unpacked)
    return (unpacked / _WHOSE).is_file() and kept.is_file() and is_wanted(job, out, kept.read_text(encoding="utf-8"))


def forget(job: Job, out: Path, keep: Path | None) -> None:
    """Makes a training that is done one that was never begun, and its answers too, wherever they were kept."""
    for folder, suffix in ((out, ".done"), (keep, ".tar.xz")):
        if folder is not None:
            for file in (folder / f"{job.name}{suffix}", *folder.glob(f"{job.name}__*{suffix}")):
                file.unlink(missing_ok=True)
    shutil.rmtree(job.workdir, ignore_errors=True)
