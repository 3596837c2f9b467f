"""What finished jobs say, packed to be kept: a file a job, which an interruption, or a machine that goes, does not lose.

DIR/NAME.tar.xz holds what a job has written when it had ended, and the mark that it is done: of a training its config,
environment, summary and metrics, of an answer the responses. No weights, no checkpoints, no rollouts.
"""

import shutil
import tarfile
from pathlib import Path

from ple_jax.core.errors import Damaged
from ple_jax.experiments.jobs import Job, mark

_SUFFIX = ".tar.xz"
_OF_RUN = ("config.json", "environment.json", "summary.json", "metrics.jsonl")


def save(job: Job, out: Path, keep: Path) -> None:
    """Packs a job that ended well; an earlier file of the same name is replaced."""
    keep.mkdir(parents=True, exist_ok=True)
    written = [job.workdir / name for name in _OF_RUN]
    if job.result.parent != job.workdir:  # a set of responses: three files of one iteration
        written += sorted(job.result.parent.glob(f"{job.result.name.partition('.')[0]}.*"))
    new = keep / f".{job.name}.new"
    with tarfile.open(new, "w:xz", preset=9) as archive:
        for path in (*written, mark(job, out)):
            if path.exists():
                archive.add(path, path.relative_to(out).as_posix(), filter=_plain)
    new.replace(keep / f"{job.name}{_SUFFIX}")


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner, rights and time, so that the same content is the same file."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member


def load(keep: Path, out: Path) -> int:
    """Unpacks the jobs that are not done in OUT; how many are kept.

    Raises:
        Damaged: a file cannot be read.
    """
    files = sorted(keep.glob(f"*{_SUFFIX}"))
    for file in files:
        if not (out / f"{file.name.removesuffix(_SUFFIX)}.done").exists():
            try:
                with tarfile.open(file, "r:xz") as archive:
                    archive.extractall(out, filter="data")
            except (tarfile.TarError, OSError, EOFError) as error:
                raise Damaged(f"{file} is damaged ({error}); delete it, and that job is done again") from error
    return len(files)


def forget(job: Job, out: Path) -> None:
    """Makes a job that is done one that was never begun."""
    mark(job, out).unlink(missing_ok=True)
    shutil.rmtree(job.workdir, ignore_errors=True)
