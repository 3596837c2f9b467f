"""Runs every point of a grid of overrides over one config; then writes the table of all points, and the best one.

    python -m ple_jax.experiments.sweep --config quickstart --out runs/sweep --grid optimizer.lr=3e-4,1e-3,3e-3 \\
        --grid seed=0,1 [--jobs 2] [--backend jax] [--select heldout_reward_after] [-- --config.iterations=3 ...]

Every point is a `python -m ple_jax.main` of its own. Its work directory, OUT/POINT, is named by its overrides, and what it
prints is in OUT/POINT.log. All command lines are checked before the first one runs. The same command, given again, continues
where it stopped: finished points are not run again, killed ones go on. A point that fails is reported and stops no other;
the exit code is 1 then.

Two files are written to OUT: sweep.csv, with one line for each point, and best.json, with the overrides whose mean of
--select over `seed` is the highest (--lowest: the lowest) among those that finished with every seed; of equal ones the
first. That number is measured on config.task.heldout, a dev split: what is reported in the end should be measured on other
data, once.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ple_jax.core.errors import suggestion
from ple_jax.core.files import read_json, write_csv, write_json
from ple_jax.experiments.grid import best, flags, grid, name_of, number
from ple_jax.experiments.jobs import Job, Outcome, overrides, positive, reported, run, say


def sweep(
    config: str, out: Path, axes: Sequence[str], *, given: Sequence[str], backend: str, jobs: int, select: str, lowest: bool
) -> int:
    """Executes the whole sweep; returns 0, or 1 if a point failed or has no number to select by.

    Raises:
        UserError: if the grid or a command line is wrong.
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
    rows = [
        {"point": job.name, **point, "exit_code": ended[job.name].code, **scalars(summary)}
        for job, point, summary in zip(todo, points, summaries, strict=True)
    ]
    # rows need not have the same columns; these stand in the order in which they come up
    write_csv(out / "sweep.csv", list(dict.fromkeys(key for row in rows for key in row)), rows)
    values = [number(summary.get(select)) for summary in summaries]
    show(todo, ended, summaries, values, select=select)
    return keep_best(out / "best.json", points, values, select=select, lowest=lowest)


def show(
    jobs: Sequence[Job],
    ended: Mapping[str, Outcome],
    summaries: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    *,
    select: str,
) -> None:
    """Prints the value of every point, or why it has none."""
    width = max(len(job.name) for job in jobs)
    say(f"\n{'':<{width}}  {select}")
    for job, value in zip(jobs, values, strict=True):
        says = ended[job.name].says or f"not in {job.result}"
        say(f"{job.name:<{width}}  {says if math.isnan(value) else format(value, '.4f')}")
    known = [key for summary in summaries for key, value in summary.items() if not math.isnan(number(value))]
    if known and select not in known:
        say(f"--select={select} is no number of a summary{suggestion(select, known)}")


def keep_best(path: Path, points: Sequence[Mapping[str, str]], values: Sequence[float], *, select: str, lowest: bool) -> int:
    """Writes best.json and prints the best point; returns 0, or 1 if a point has no value.

    If there is no best point, an earlier best.json is deleted.
    """
    if (chosen := best(points, values, lowest=lowest)) is None:
        path.unlink(missing_ok=True)
        say("no point has that number for all of its seeds: there is no best one")
        return 1
    point, of_seeds = chosen
    mean = math.fsum(of_seeds) / len(of_seeds)
    write_json(path, {"select": select, "mean": mean, "values": of_seeds, "overrides": point, "flags": flags(point)})
    say(f"best: {' '.join(flags(point)) or 'the config as it is'}, {mean:.4f} over {len(of_seeds)} runs; see {path}")
    return int(any(map(math.isnan, values)))


def scalars(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if not isinstance(value, dict | list)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", required=True, metavar="CONFIG")
    add("--out", required=True, type=Path, metavar="DIR")
    add("--grid", action="append", default=[], metavar="KEY=VALUE,...", help="once for every axis")
    add("--jobs", type=positive, default=1, metavar="N", help="runs at a time (default: 1); they share cores and memory")
    add("--backend", default="jax")
    add("--select", default="heldout_reward_after", metavar="KEY", help="of summary.json (default: heldout_reward_after)")
    add("--lowest", action="store_true", help="the lowest --select is the best")
    add("given", nargs="*", metavar="--config.KEY=VALUE", help="after `--`: overrides of every point")
    options = vars(parser.parse_args(argv))
    out = options.pop("out")
    with reported(out):
        return sweep(options.pop("config"), out, options.pop("grid"), **options)


if __name__ == "__main__":
    sys.exit(main())
