"""Every command of the pages is run, as a reader would give it: one after the other, in a folder with what the pages show.

Each is the command of the page with overrides behind it that make it small. What cannot be run here says so above its block:
`<!-- needs: ... -->`.
"""

import io
import json
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from test_docs import PAGES, ROOT, RUNS, Command, a_folder, command_of, lines_of, parted

from ple_jax import main as entry
from ple_jax.core.files import read_json

# that make a run of a page small; a command has them behind its own
SMALL = {
    "model.path": "tiny", "model.dtype": "float32", "lora.rank": 2, "iterations": 1, "queries_per_iteration": 4,
    "task.max_heldout": 4, "sampling.max_new_tokens": 4, "sampling.width": 8, "optimizer.batch_queries": 4,
    "optimizer.micro_queries": 4, "eval.diagnostic_queries": 2, "probe.queries": 2, "probe.samples": 2,
    "generate.max_queries": 4, "generate.samples": 2, "sinks": "()",
}  # fmt: skip
# what is installed by it runs in continuous integration, which begins with make, and in tests/packaging
SETUP = ("make", "pip", "source")
CURVE = '--config.eval.max_kl="(4,16)" --config.eval.stop=False'
PPO = "--config.algorithm=ppo --config.optimizer.lr=3e-3"
ANSWERS = "--mode=generate --config.generate.data=quickstart_test --config.generate.second_reward=bag_of_words"
# runs that a page speaks of without giving their commands ("and so on for every run")
IMPLIED = {
    "runs/quickstart": ["ple_jax --config quickstart"],
    "runs/mine": ["ple_jax --config quickstart"],
    "runs/other": ["ple_jax --config quickstart --config.seed=1"],
    "runs/ple_1": ["ple_jax --config quickstart --config.seed=1", f"ple_jax --config quickstart --config.seed=1 {ANSWERS}"],
    "runs/ppo_0": [f"ple_jax --config quickstart {PPO} --config.seed=0 {more}" for more in ("", ANSWERS)],
    "runs/ppo_1": [f"ple_jax --config quickstart {PPO} --config.seed=1 {more}" for more in ("", ANSWERS)],
    "runs/ppo_curve_0": [
        f"ple_jax --config quickstart --config.algorithm=ppo {CURVE} {more}"
        for more in ("", f"{ANSWERS} --config.checkpoint.use=kl_4", f"{ANSWERS} --config.checkpoint.use=kl_16")
    ],
    "runs/tried_ppo": [f"ple_jax --config quickstart --config.algorithm=ppo --config.optimizer.lr=1e-3 {CURVE}"],
}  # fmt: skip


def give(command: Command) -> None:
    """Gives a command in the folder that is the current one; what it needs of runs that it names comes first, once."""
    own = command.flag("workdir") if command.mode == "train" else None
    named = re.findall(r"runs/\w+\*?", " ".join(command.arguments))
    for workdir in [name for name in IMPLIED if name != own and any(fnmatch(name, word) for word in named)]:
        for implied in [command_of(f"{line} --workdir {workdir}") for line in IMPLIED.pop(workdir)]:
            if implied.mode != "train" or not Path(workdir, "config.json").exists():  # the page may have trained it
                assert run(implied) == 0, implied.line
    assert run(command) == 0, command.line


def run(command: Command) -> int:
    tiny = command.flag("config") == "tiny"
    own = {key: value for key, value in SMALL.items() if not (tiny and key in ("model.path", "task.max_heldout"))}
    small = [f"--config.{key}={value}" for key, value in own.items()]
    planned = command.flag("topology")  # of a model that is not read
    taken = command.flag("config") is None or command.mode == "init"  # the config is that of a run, or is copied
    arguments = [*command.arguments, *(() if planned or taken or command.mode == "compare" else small)]
    if command.mode == "export":  # a reader exports what was trained
        arguments = list(command.arguments)
    if command.mode == "generate" and taken:  # a run's config says nothing of what is generated
        arguments += [argument for argument in small if argument.startswith("--config.generate.")]
    try:
        return entry.main(entry.parse(["ple_jax", *arguments]))
    except SystemExit as ended:  # of --help and --version
        return ended.code


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "IMPLIED", dict(IMPLIED))


def ids(page: Path) -> str:
    return page.stem


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(where == page for where, _ in RUNS)], ids=ids)
def test_commands_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    text = page.read_text(encoding="utf-8")
    monkeypatch.chdir(a_folder(tmp_path, text))
    monkeypatch.syspath_prepend(str(tmp_path))
    done = 0
    for block in parted(text):
        if block.needs or block.language not in ("", "bash", "sh"):
            continue
        for line in lines_of(block.body):
            words = shlex.split(line, comments=True)
            monkeypatch.setattr("sys.stdin", io.StringIO("/both\nWhat is a whale?\n/quit\n"))  # for chat
            if (command := command_of(line)) is not None:
                give(command)
                done += 1
            elif words[0] == "python":
                subprocess.run([sys.executable, *words[1:]], check=True)
            else:
                assert words[0] in SETUP or words[0].startswith("--config."), f"{page.name}: mark it, or run it: {line}"
    shown = [command for where, command in RUNS if where == page]
    assert done or all(needed(text, command.line) for command in shown)
    known = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for file in tmp_path.glob("runs/*/metrics.jsonl"):
        names = {name for line in file.read_text().splitlines() for name in json.loads(line)}
        assert [name for name in sorted(names) if name != "iteration" and f"`{name.partition('/')[0]}" not in known] == []
    files = (ROOT / "docs" / "work-directory.md").read_text(encoding="utf-8")
    for file in tmp_path.glob("runs/*/"):
        summary, journals = read_json(file / "summary.json") or {}, sorted(file.glob("rollouts/iter_????.jsonl"))
        lines = [json.loads(line) for line in (journals[0].read_text().splitlines() if journals else ())]
        keys = {*summary, *(key for line in lines for key in (*line, *(k for r in line["responses"] for k in r)))}
        assert [key for key in sorted(keys) if f"`{key}`" not in files] == []


def needed(text: str, line: str) -> str:
    """What is said to be needed for a line."""
    return next(block.needs for block in parted(text) if line in lines_of(block.body))


def test_what_cannot_be_run_is_marked():
    """Most of the commands can."""
    marked = [command.line for page, command in RUNS if needed(page.read_text(encoding="utf-8"), command.line)]
    assert len(marked) < len(RUNS) / 2
    hardware = [line for line in marked if re.search(r"npu|torchrun|topology|coordinator|launch|server", line)]
    network = [line for line in marked if re.search(r"reward_hh|--config hh|harness", line)]
    assert sorted({*hardware, *network}) == sorted(marked)
