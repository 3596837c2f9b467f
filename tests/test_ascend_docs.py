"""The paper's set-up on Ascend: its config and the commands in it, the launch script with all that it calls replaced.

The commands and links of docs/ascend.md are checked with those of the other pages, in test_docs.py.
"""

import inspect
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from configs import ascend_hh_llama3_8b
from ple_jax.core.config import validate
from ple_jax.main import parse

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "launch" / "ascend.sh"
DOCS = ROOT / "docs" / "ascend.md"
OWN = "configs/ascend_hh_llama3_8b.py"


def test_what_is_known_of_the_papers_set_up():
    config = ascend_hh_llama3_8b.get_config()
    validate(config)
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (8, 16.0, ("all-linear",))
    assert (config.ple.tau_0, config.ple.alpha, config.ple.schedule) == (0.2, 0.9, "exponential")
    assert config.model.path.endswith("Llama-3-8B") and config.mesh.data * config.mesh.fsdp == 8
    assert config.task.format == "hh" and len(config.task.subsets) == 4 and config.iterations == 8


# ---------------------------------------------------------------- commands that are written down


def commands(text: str) -> list[str]:
    """Those that start a run, from indented lines, one line each."""
    starts = re.compile(r"([A-Z_]+=\S+ )*(ple_jax|python -m ple_jax|torchrun|scripts/launch/ascend\.sh)")
    return [line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines() if starts.match(line.strip())]


def arguments(command: str) -> list[str]:
    """What `ple_jax.main` gets of a command."""
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] != "scripts/launch/ascend.sh":
        return words[words.index("ple_jax.main") + 1 :] if "ple_jax.main" in words else words[1:]
    of_a_run = r"(--?mode=)?(evaluate|generate|harness|replay|export|chat)"
    own = not any(re.match("--?config(=|$)", word) or re.fullmatch(of_a_run, word) for word in words)
    return [*(["--config", OWN] if own else []), "--backend=torch", "--config.model.device=npu", *words[1:]]


IN_CONFIG = commands(inspect.getdoc(ascend_hh_llama3_8b).replace("Command: ", ""))


@pytest.mark.parametrize("command", IN_CONFIG)
def test_commands_are_understood(monkeypatch, command):
    monkeypatch.chdir(ROOT)
    run = parse(["ple_jax", *arguments(command)])
    assert run.backend == "torch"


def test_all_commands_were_found():
    assert len(IN_CONFIG) == 2


@pytest.mark.parametrize(
    "message",
    [
        "needs the package torch-npu",
        "needs CANN, whose libraries are not found",
        "needs a torch-npu that fits torch",
        "is not here: torch-npu and CANN are, but no device",
        "torch has no operators",
        "processes were started",
        "not enough memory",
    ],
)
def test_troubleshooting_quotes_messages_that_there_are(message):
    sources = [file.read_text() for package in ("torch_ascend", "ple_jax") for file in (ROOT / package).rglob("*.py")]
    assert message in DOCS.read_text() and any(message in source for source in sources)


# ---------------------------------------------------------------- the script


@pytest.fixture
def launch(tmp_path):
    """Runs the script where torchrun and npu-smi are stand-ins; what torchrun gets, a word a line."""
    tools = tmp_path / "tools"
    tools.mkdir()

    def tool(name: str, body: str) -> None:
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)

    tool("torchrun", 'printf "%s\\n" "$@"; echo "CANN $CANN_WAS_SOURCED"')
    tool("npu-smi", "exit 0")

    def run(*arguments: str, cann: str | None = "/opt/cann", **environment: str) -> subprocess.CompletedProcess:
        clean = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tmp_path), **environment}
        if cann is not None:
            clean["ASCEND_HOME_PATH"] = cann
        return subprocess.run([SCRIPT, *arguments], env=clean, cwd=tmp_path, capture_output=True, text=True)

    run.tool = tool
    return run


def words(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[:-1]


def test_eight_processes_of_the_papers_config(launch):
    assert words(launch("--workdir", "runs/a b", "--config.mesh.data=8")) == [
        "--standalone", "--nproc-per-node", "8", "-m", "ple_jax.main", "--config", str(ROOT / OWN), "--backend=torch",
        "--config.model.device=npu", "--workdir", "runs/a b", "--config.mesh.data=8",
    ]  # fmt: skip


@pytest.mark.parametrize("own", [["--config", "mine.py"], ["--config=mine.py"]])
def test_a_config_of_ones_own(launch, own):
    assert words(launch(*own, "--workdir=w", NPROC_PER_NODE="2")) == [
        "--standalone", "--nproc-per-node", "2", "-m", "ple_jax.main", "--backend=torch", "--config.model.device=npu", *own,
        "--workdir=w",
    ]  # fmt: skip


@pytest.mark.parametrize("mode", [["--mode=generate"], ["--mode", "export"]])
def test_modes_on_a_run_take_its_own_config(launch, mode):
    said = launch("--workdir", "runs/mine", *mode).stdout.split("\n")
    assert "--config" not in said and said[said.index("ple_jax.main") + 1] == "--backend=torch"


@pytest.mark.parametrize("asked", [["--mode=replay", "--against=runs/b"], ["--mode", "init", "--config", "hh"]])
def test_what_takes_no_settings_gets_none(launch, asked):
    said = words(launch("--workdir=runs/a", *asked))
    assert "--backend=torch" in said and "--config.model.device=npu" not in said


def test_several_machines(launch):
    found = words(launch("--workdir=w", NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1"))
    expected = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1", "--master-port", "29500"]
    assert found[:8] == expected
    missing = launch("--workdir=w", NNODES="2", MASTER_ADDR="10.0.0.1")
    assert missing.returncode == 2 and missing.stderr == "error: NNODES=2 needs NODE_RANK (0 to 1) and MASTER_ADDR\n"


def test_cann_is_sourced_where_the_shell_has_none(launch, tmp_path):
    # it may read variables that are not set
    script = 'export CANN_WAS_SOURCED="yes$NEVER_SET"\n'
    for place in ("Ascend/cann", "Ascend/ascend-toolkit", "elsewhere"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "Ascend/ascend-toolkit/set_env.sh").write_text(script)
    assert launch("--workdir=w", cann=None).stdout.endswith("CANN yes\n")
    assert launch("--workdir=w").stdout.endswith("CANN \n")
    (tmp_path / "elsewhere/env.sh").write_text(script.replace("yes", "mine"))
    assert launch("--workdir=w", cann=None, CANN_SET_ENV=f"{tmp_path}/elsewhere/env.sh").stdout.endswith("CANN mine\n")


@pytest.mark.skipif(Path("/usr/local/Ascend").exists(), reason="CANN is here")
def test_no_cann(launch):
    done = launch("--workdir=w", cann=None)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        "error: CANN's set_env.sh is not found; source it first, or set CANN_SET_ENV=/path/to/set_env.sh\n"
    )


def test_devices_that_do_not_answer(launch):
    launch.tool("npu-smi", "exit 1")
    done = launch("--workdir=w")
    assert done.returncode == 2 and done.stderr.startswith("error: npu-smi info fails") and not done.stdout


def test_the_script_is_executable_and_sets_nothing_of_the_codes():
    from torch_ascend import ENVIRONMENT

    assert os.access(SCRIPT, os.X_OK)
    assert not [name for name in ENVIRONMENT if name in SCRIPT.read_text()]
