"""Jobs: what runs, waits, stops or is done already, with programs that stand in for a run."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from locks import as_on_nfs
from patience import LAST_RESORT

from ple_jax.core.errors import UserError
from ple_jax.experiments import jobs

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
from pathlib import Path
folder, code = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir(exist_ok=True)
with (folder / "calls").open("a") as file:
    file.write("x")
print("first\\nlast words\\n")
if not code:
    (folder / "summary.json").write_text("{}")
sys.exit(code)
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """(name, exit code, program) -> a job; what it was asked for is in job.arguments."""
    monkeypatch.setattr(jobs, "asked", lambda job, out: jobs.anywhere(json.dumps(job.arguments), out))
    monkeypatch.setattr(jobs, "command", lambda job: [sys.executable, "-S", "-c", *job.arguments])

    def make(name: str, code: int = 0, program: str = PROGRAM) -> jobs.Job:
        return jobs.Job(name, (program, str(tmp_path / name), str(code)), tmp_path / name, "summary.json")

    return make


def calls(*some: jobs.Job) -> list[int]:
    return [len((job.workdir / "calls").read_text()) for job in some]


def test_what_is_done_is_not_run_again(make, tmp_path, capsys):
    good, bad = make("good"), make("bad", 3)
    ended = jobs.run([bad, good], tmp_path)
    assert list(ended.items()) == [("bad", (3, "last words")), ("good", (0, ""))]
    shown = capsys.readouterr().out
    assert "[1/2] bad: exit code 3, last words (all of it is in" in shown and "[2/2] good: done after" in shown
    assert (tmp_path / "good.log").read_text() == "first\nlast words\n\n"

    assert jobs.run([bad, good], tmp_path) == ended
    assert calls(good, bad) == [1, 2]
    assert "1 of 2 are done already" in capsys.readouterr().out
    # of another command nothing is known
    other = good._replace(arguments=(*good.arguments, "more"))
    assert jobs.run([other], tmp_path)["good"].code == 0 and calls(good) == [2]
    other.result.unlink()
    assert jobs.run([other], tmp_path)["good"].code == 0 and calls(good) == [3]


def test_a_mistake_is_said_before_anything_runs(make, tmp_path, monkeypatch):
    def asked(job, out):
        if job.name == "second":
            raise UserError("no such key")

    monkeypatch.setattr(jobs, "asked", asked)
    with pytest.raises(UserError, match="no such key"):
        jobs.run([make("first"), make("second")], tmp_path)
    assert not (tmp_path / "first").exists()


# is alone, or fails
ALONE = """
import fcntl, sys
from pathlib import Path
with (Path(sys.argv[1]).parent / "one_at_a_time").open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    sum(range(3_000_000))
"""
# ends when another one has begun: whoever opens a pipe to write waits until another opens it to read
TOGETHER = f"""
import signal, sys
from pathlib import Path
signal.alarm({LAST_RESORT})
pipe = Path(sys.argv[1]).parent / "pipe"
if sys.argv[1].endswith("0"):
    pipe.write_text("here")
else:
    assert pipe.read_text() == "here"
"""


def test_so_many_at_a_time(make, tmp_path):
    ended = jobs.run([make(f"alone_{i}", program=ALONE) for i in range(3)], tmp_path)
    assert [outcome.code for outcome in ended.values()] == [0] * 3
    os.mkfifo(tmp_path / "pipe")
    ended = jobs.run([make(f"both_{i}", program=TOGETHER) for i in range(2)], tmp_path, parallel=2)
    assert [outcome.code for outcome in ended.values()] == [0] * 2


def test_a_process_that_outlived_its_script_is_waited_for(make, tmp_path, monkeypatch):
    job, waited = make("job"), []
    job.workdir.mkdir()
    holder = (job.workdir / ".lock").open("w")
    fcntl.flock(holder, fcntl.LOCK_EX)
    monkeypatch.setattr(fcntl, "flock", as_on_nfs)

    class Event(threading.Event):
        def wait(self, timeout=None):
            if timeout == 1.0:  # and not one of a future or a thread
                waited.append((job.workdir / "calls").exists())
                holder.close()
                return False
            return super().wait(timeout)

    monkeypatch.setattr(jobs.threading, "Event", Event)
    assert jobs.run([job], tmp_path)["job"].code == 0
    assert waited == [False] and calls(job) == [1]


# two jobs, each of which asks for a stop when it runs for the first time, and ends well the second time
STOPPED = """
import signal, sys
from pathlib import Path
from ple_jax.experiments import jobs

signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in whatever a shell starts in the background
out = Path({out!r})
child = '''
import os, signal, sys
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
if (folder / "stopped").exists():
    (folder / "summary.json").write_text("")
    sys.exit(0)
def stop(number, frame):
    (folder / "stopped").write_text("")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
os.kill(os.getppid(), {number})
signal.pause()
'''
jobs.asked = lambda job, out: f'"{{job.name}}"'
jobs.command = lambda job: [sys.executable, "-S", "-c", child, str(job.workdir)]
with jobs.reported(out):
    ended = jobs.run([jobs.Job(name, (), out / name, "summary.json") for name in ("one", "two")], out)
    sys.exit(sum(outcome.code for outcome in ended.values()))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_what_runs_and_starts_nothing_more(tmp_path, number):
    source = STOPPED.format(out=str(tmp_path), number=int(number))

    def again():
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", source]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LAST_RESORT)

    found = again()
    assert found.returncode == 130 and found.stderr.count("\n") == 1 and "give the same command again" in found.stderr
    assert (tmp_path / "one" / "stopped").exists() and not (tmp_path / "two").exists()
    found = again()  # goes on with the first, and the second asks for a stop in turn
    assert found.returncode == 130 and (tmp_path / "one.done").exists() and (tmp_path / "two" / "stopped").exists()
    found = again()
    assert found.returncode == 0 and "1 of 2 are done already" in found.stdout


def test_a_full_disk_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended, jobs.reported(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.log")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: the disk cannot be written") and said.count("\n") == 1


def test_overrides_and_nothing_else():
    assert jobs.overrides(["--config.seed=1", "--noconfig.task.chat"]) == ("--config.seed=1", "--noconfig.task.chat")
    with pytest.raises(UserError, match="'--mode=plan' after `--`"):
        jobs.overrides(["--config.seed=1", "--mode=plan"])


def test_a_mark_of_before_a_key_or_a_flag_existed_is_as_good(tmp_path):
    """With today's defaults, in whatever folder; of any other value it is not."""
    job = jobs.Job("a", ("--config=tiny", f"--workdir={tmp_path}/a", f"--config.task.train={tmp_path}/sft.jsonl"),
                   tmp_path / "a", "summary.json")  # fmt: skip
    (tmp_path / "sft.jsonl").write_text("{}")
    today = json.loads(jobs.asked(job, tmp_path))
    assert today["config"]["task"]["train"] == "OUT/sft.jsonl" and today["workdir"] == "OUT/a"
    old = json.loads(json.dumps(today))
    del old["profile"], old["config"]["eval"]["stop"]
    old["config"]["task"]["train"], old["workdir"] = f"{tmp_path}/sft.jsonl", f"{tmp_path}/a"
    assert jobs.is_wanted(job, tmp_path, json.dumps(old))
    for key, value in (("stop", False), ("points", 3)):
        other = json.loads(json.dumps(old))
        other["config"]["eval"][key] = value
        assert not jobs.is_wanted(job, tmp_path, json.dumps(other))
    assert not jobs.is_wanted(job, tmp_path, "not JSON") and not jobs.is_wanted(job, tmp_path, "3")


def test_jobs_that_run_at_a_time_part_the_cores(make, tmp_path):
    program = "import json, os, sys, time; from pathlib import Path; folder = Path(sys.argv[1]); folder.mkdir(); "
    program += "time.sleep(0.5); "
    program += "(folder / 'summary.json').write_text(json.dumps(sorted(os.sched_getaffinity(0))))"
    some = [make("a", program=program), make("b", program=program)]
    assert all(not outcome.code for outcome in jobs.run(some, tmp_path, parallel=2).values())
    mine, found = os.sched_getaffinity(0), [set(json.loads(job.result.read_text())) for job in some]
    if len(mine) < 2:
        assert found == [mine, mine]
    else:
        assert found[0] | found[1] == mine and not found[0] & found[1]
    alone = make("c", program=program)
    jobs.run([alone], tmp_path)
    assert set(json.loads(alone.result.read_text())) == mine == os.sched_getaffinity(0)
