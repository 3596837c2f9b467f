"""A run for every point of a grid of overrides over one config; then the table of all, and the best.

    python scripts/sweep.py --config configs/quickstart.py --out runs/sweep --grid optimizer.lr=3e-4,1e-3,3e-3 \\
        --grid seed=0,1 [--jobs 2] [--backend jax] [--select heldout_reward_after] [-- --config.iterations=3 ...]

Every point is a `python -m ple_jax.main` of its own, whose work directory, OUT/POINT, is named by its overrides, and what it
prints is in OUT/POINT.log. All command lines are checked before the first one runs. The same command goes on where it
stood: finished points are not run again, killed ones continue. A point that fails is reported and stops no other; the exit
code is 1 then.

Written to OUT: sweep.csv, a line a point, and best.json, the overrides whose mean of --select over `seed` is the highest
(--lowest: the lowest) among those that finished with every seed; of equal ones the first. That number is of
config.task.heldout, a dev split: what is reported in the end should be measured on other data, once.
"""

import argparse
import contextlib
import csv
import fcntl
import hashlib
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from ple_jax import main as entry
from ple_jax.core.errors import UserError, suggestion
from ple_jax.core.files import read_json, write_json
from ple_jax.training.interrupt import MESSAGE
from ple_jax.training.workdir import lock

# ---------------------------------------------------------------- jobs: commands that are run once


class Job(NamedTuple):
    """One `python -m ple_jax.main` with its arguments, its work directory, and the file in it that it writes last."""

    name: str
    arguments: tuple[str, ...]
    workdir: Path
    last: str

    @property
    def result(self) -> Path:
        return self.workdir / self.last


class Outcome(NamedTuple):
    """How a job ended: exit code 0 and nothing, or another one (negative: of a signal) and the last line of its log."""

    code: int
    says: str = ""


def run(jobs: Sequence[Job], out: Path, *, parallel: int = 1) -> dict[str, Outcome]:
    """Runs what is not done yet, at most `parallel` at a time; by name how each ended, in the order of the jobs.

    What a job prints is appended to OUT/NAME.log. OUT/NAME.done holds what it was asked for when it ended well: the same
    is not run again, and of anything else `ple_jax.main` itself says whether the work directory is its own.

    Raises:
        UserError: a command line that is wrong, before anything runs.
        KeyboardInterrupt: as it came, when all that ran have stopped.
    """
    asked = {job.name: _asked(job) for job in jobs}
    todo = [job for job in jobs if not _is_done(out, job, asked[job.name])]
    if len(todo) < len(jobs):
        say(f"{len(jobs) - len(todo)} of {len(jobs)} are done already")
    outcomes = {job.name: Outcome(0) for job in jobs}
    running: list[subprocess.Popen[bytes]] = []
    stopping = threading.Event()

    def one(job: Job) -> float:
        _wait_until_free(job.workdir, stopping)
        started = time.monotonic()
        with (out / f"{job.name}.log").open("ab") as log:
            process = subprocess.Popen(command(job), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            running.append(process)
            if stopping.is_set():  # between two lines of this function
                process.terminate()
            code = process.wait()
        if code == 0:
            (out / f"{job.name}.done").write_text(asked[job.name], encoding="utf-8")
        else:
            outcomes[job.name] = Outcome(code, _last_line(out / f"{job.name}.log"))
        return time.monotonic() - started

    with ThreadPoolExecutor(parallel) as pool:
        try:
            futures = {pool.submit(one, job): job.name for job in todo}
            for number, future in enumerate(as_completed(futures), 1):
                name, seconds = futures[future], future.result()
                code, says = outcomes[name]
                ended = f"exit code {code}, {says} (all of it is in {out / f'{name}.log'})" if code else "done"
                say(f"[{number}/{len(todo)}] {name}: {ended} after {seconds:.0f} s")
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()  # does nothing to one that has ended
            raise
    return outcomes


def command(job: Job) -> list[str]:
    return [sys.executable, "-m", "ple_jax.main", *job.arguments]


def say(line: str) -> None:
    """A line for whoever watches, also through a pipe."""
    print(line, flush=True)


def parsed(arguments: Sequence[str]) -> entry.CommandLine:
    """What arguments of `ple_jax.main` ask for; a mistake in them is main's own error."""
    if str(entry.ROOT) not in sys.path:
        sys.path.append(str(entry.ROOT))  # a config file says `from configs import default`
    return entry.parse(["ple_jax.main", *arguments])


def _asked(job: Job) -> str:
    """All that a command line asks for, with the whole config, as text."""
    found = parsed(job.arguments)
    return json.dumps({**found._asdict(), "config": found.config.to_dict()}, indent=1, default=str)


def _is_done(out: Path, job: Job, asked: str) -> bool:
    mark = out / f"{job.name}.done"
    return job.result.exists() and mark.exists() and mark.read_text(encoding="utf-8") == asked


def _wait_until_free(workdir: Path, stopping: threading.Event) -> None:
    """A process may have outlived the script that started it, and still be at work."""
    with contextlib.suppress(FileNotFoundError), (workdir / ".lock").open() as lock:
        while not stopping.is_set():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                stopping.wait(1.0)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


@contextlib.contextmanager
def reported(out: Path) -> Iterator[None]:
    """One process in OUT; what the user can mend, and a stop by Ctrl-C or SIGTERM, as one line and an exit code."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out={out} is a file; give a folder, which is created if need be")
        with lock(out):
            yield
    except UserError as error:
        says = str(error)
        if says.startswith(f"--workdir={out} "):  # of the lock, in words of `ple_jax.main`
            says = says.replace("--workdir", "--out")
        print(f"error: {' '.join(says.split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(MESSAGE, file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def overrides(rest: Sequence[str]) -> tuple[str, ...]:
    """What stands after `--`: overrides of the config and nothing else.

    Raises:
        UserError: another flag, which a script gives by itself.
    """
    for argument in rest:
        if not re.match(r"--(no)?config\.", argument):
            raise UserError(f"{argument!r} after `--`: overrides of the config stand there, --config.KEY=VALUE")
    return tuple(rest)


# ---------------------------------------------------------------- the grid


def grid(axes: Sequence[str]) -> list[dict[str, str]]:
    """The points of a grid, the last axis fastest: ["optimizer.lr=1e-3,3e-3", "seed=0,1"] has four.

    Raises:
        UserError: no axis, one without a key or without values, a key or a value given twice.
    """
    if not axes:
        raise UserError("--grid KEY=VALUE,VALUE is missing, e.g. --grid optimizer.lr=3e-4,1e-3")
    values: dict[str, list[str]] = {}
    for axis in axes:
        key, _, text = axis.partition("=")
        found = _split(text)
        if not key or not all(found) or len(set(found)) < len(found) or key in values:
            raise UserError(
                f"--grid {axis!r} must read like optimizer.lr=3e-4,1e-3: a key of its own, and values that differ"
            )
        values[key] = found
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def _split(text: str) -> list[str]:
    """At commas that stand in no bracket: "('a','b'),('c',)" is two values."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def name_of(point: Mapping[str, str]) -> str:
    """A folder's name that `--runs` can hold: the overrides, and where signs were lost or it is long, a digest of them."""
    text = "__".join(f"{key}-{value}" for key, value in point.items())
    name = re.sub(r"[^\w.+-]+", "_", text)[:120]
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def best(
    points: Sequence[Mapping[str, str]], values: Sequence[float], *, lowest: bool = False
) -> tuple[dict[str, str], list[float]] | None:
    """The point, without its seed, whose mean over seeds is the highest, and its values; of equal ones the first.

    Args:
        values: of every point; nan where there is none. A point without a value for all of its seeds is out.
    """
    seeds: dict[str, tuple[dict[str, str], list[float]]] = {}
    for point, value in zip(points, values, strict=True):
        rest = {k: v for k, v in point.items() if k != "seed"}
        seeds.setdefault(json.dumps(rest), (rest, []))[1].append(value)
    whole = [found for found in seeds.values() if not any(map(math.isnan, found[1]))]
    sign = 1 if lowest else -1
    return min(whole, key=lambda found: sign * math.fsum(found[1]) / len(found[1]), default=None)


def flags(point: Mapping[str, str]) -> tuple[str, ...]:
    """Overrides as arguments."""
    return tuple(f"--config.{key}={value}" for key, value in point.items())


def number(value: Any) -> float:
    """What a summary has as a number; nan where it is none."""
    return float(value) if isinstance(value, int | float) else math.nan


def scalars(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if not isinstance(value, dict | list)}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows that need not have the same columns; these stand in the order in which they come up."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def sweep(
    config: str, out: Path, axes: Sequence[str], *, given: Sequence[str], backend: str, jobs: int, select: str, lowest: bool
) -> int:
    """The whole sweep; 0, or 1 where a point failed or has no number to select by.

    Raises:
        UserError: a grid or a command line that is wrong.
    """
    points = grid(axes)
    common = (f"--config={config}", f"--backend={backend}", *overrides(given))
    todo = [
        Job(name, (*common, *flags(point), f"--workdir={out / name}"), out / name, "summary.json")
        for point in points
        for name in [name_of(point)]
    ]
    ended = run(todo, out, parallel=jobs)
    summaries = [(read_json(job.result) or {}) if ended[job.name].code == 0 else {} for job in todo]
    values = [number(summary.get(select)) for summary in summaries]
    write_csv(
        out / "sweep.csv",
        [
            {"point": job.name, **point, "exit_code": ended[job.name].code, **scalars(summary)}
            for job, point, summary in zip(todo, points, summaries, strict=True)
        ],
    )
    width = max(len(job.name) for job in todo)
    say(f"\n{'':<{width}}  {select}")
    for job, value in zip(todo, values, strict=True):
        says = ended[job.name].says or f"not in {job.result}"
        say(f"{job.name:<{width}}  {says if math.isnan(value) else format(value, '.4f')}")
    known = [key for summary in summaries for key, value in summary.items() if not math.isnan(number(value))]
    if known and select not in known:
        say(f"--select={select} is no number of a summary{suggestion(select, known)}")
    found = out / "best.json"
    if (chosen := best(points, values, lowest=lowest)) is None:
        found.unlink(missing_ok=True)
        say("no point has that number for all of its seeds: there is no best one")
        return 1
    point, of_seeds = chosen
    mean = math.fsum(of_seeds) / len(of_seeds)
    write_json(found, {"select": select, "mean": mean, "values": of_seeds, "overrides": point, "flags": flags(point)})
    say(f"best: {' '.join(flags(point)) or 'the config as it is'}, {mean:.4f} over {len(of_seeds)} runs; see {found}")
    return int(any(map(math.isnan, values)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE")
    add("--out", required=True, type=Path, metavar="DIR")
    add("--grid", action="append", default=[], metavar="KEY=VALUE,...", help="once for every axis")
    add("--jobs", type=positive, default=1, metavar="N", help="runs at a time (default: 1); they share cores and memory")
    add("--backend", default="jax")
    add("--select", default="heldout_reward_after", metavar="KEY", help="of summary.json (default: heldout_reward_after)")
    add("--lowest", action="store_true", help="the lowest --select is the best")
    add("given", nargs="*", metavar="--config.KEY=VALUE", help="after `--`: overrides of every point")
    options = vars(parser.parse_args())
    out = options.pop("out")
    with reported(out):
        return sweep(options.pop("config"), out, options.pop("grid"), **options)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
