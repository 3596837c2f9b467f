"""README, CONTRIBUTING and docs/: links lead somewhere, commands are understood, what is named exists, figures agree.

The checks are functions from a page to what is wrong with it, so that they can be tried on pages that are wrong.
"""

import dataclasses
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from configs import default
from ple_jax import main as entry
from ple_jax.core import endpoints
from ple_jax.core.config import flatten
from ple_jax.evaluation import model_judges

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
KEYS = set(flatten(default.get_config().to_dict()))
ASCEND = "ascend_hh_llama3_8b"  # what scripts/launch/ascend.sh runs where no other config is given
SUFFIXES = (".py", ".md", ".sh", ".svg", ".json", ".jsonl", ".html", ".sqlite", ".safetensors")

# what it needs, if that is said above it; language; the file that it shows; contents
_FENCED = re.compile(r'(?:^<!-- needs: (.*?) -->\n)?^```(\w*)(?: title="(.*?)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")  # it may be broken over two lines


def pages() -> list:
    return [pytest.param(page, id=page.name) for page in PAGES]


class Block(NamedTuple):
    """A code block of a page."""

    needs: str  # what it takes to run it, beside two CPU cores
    language: str
    title: str  # the file that it shows
    body: str


def parted(text: str) -> list[Block]:
    """The code blocks of a page, in their order."""
    return [Block(*found) for found in _FENCED.findall(text)]


def blocks(text: str, *languages: str) -> list[str]:
    """The contents of code blocks of these languages; "" is a block that names none."""
    return [block.body for block in parted(text) if block.language in languages]


def spans(text: str) -> list[str]:
    """What stands in backticks outside code blocks."""
    return [" ".join(found.split()) for found in _INLINE.findall(_FENCED.sub("", text))]


# ---------------------------------------------------------------- links


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: list[str] = []
    for title in re.findall(r"^#+ (.*)$", _FENCED.sub("", text), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower().replace("`", "")
        found.append(re.sub(r"[^\w -]", "", words).strip().replace(" ", "-"))
    # of equal ones the second is name-1
    return {f"{name}-{n}" if (n := found[:i].count(name)) else name for i, name in enumerate(found)}


def links(text: str) -> list[str]:
    """The targets of links and pictures, those to other sites left out."""
    prose = _INLINE.sub("", _FENCED.sub("", text))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if not re.match(r"[a-z]+:", target)]


def broken_links(page: Path, text: str) -> Iterator[str]:
    for target in links(text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if path and not file.exists():
            yield f"{target}: there is no {path}"
        elif not file.is_relative_to(ROOT):
            yield f"{target} leads out of the repository"
        elif anchor and anchor not in anchors(text if file == page else file.read_text(encoding="utf-8")):
            yield f"{target}: {file.name} has no heading #{anchor}"


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    assert list(broken_links(page, page.read_text(encoding="utf-8"))) == []


def test_every_page_is_linked_from_the_readme():
    linked = {target.partition("#")[0] for target in links((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert {f"docs/{page.name}" for page in DOCS.glob("*.md")} <= linked
    assert len(PAGES) >= 14 and sum(len(links(page.read_text(encoding="utf-8"))) for page in PAGES) > 80


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[a](missing.md)", "there is no missing.md"),
        ("![a](images/missing.svg)", "there is no images/missing.svg"),
        ("[a](method.md#no-such-heading)", "method.md has no heading #no-such-heading"),
        ("# One\n[a](#two)", "has no heading #two"),
        ("[a](../../elsewhere)", "there is no ../../elsewhere"),
        ("[a](../..)", "leads out of the repository"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(text, says):
    (found,) = broken_links(DOCS / "new.md", text)
    assert says in found


def test_anchors_are_those_of_github():
    text = "# A `B`, C: the (d)\n## Two\n### Two\n```\n# a comment\n```\n## [linked](x.md) e-f_g\n"
    assert anchors(text) == {"a-b-c-the-d", "two", "two-1", "linked-e-f_g"}
    assert links("[a](x.md) `[b](y.md)` ![c](z.svg) [d](https://e.f)\n```\n[g](h.md)\n```\n") == ["x.md", "z.svg"]


# ---------------------------------------------------------------- commands


class Command(NamedTuple):
    """One that runs this program: the words that `ple_jax` gets."""

    line: str  # as it is written, comment included
    arguments: tuple[str, ...]

    def flag(self, name: str) -> str | None:
        """The value of `--name VALUE` or `--name=VALUE`."""
        for i, word in enumerate(self.arguments):
            if word == f"--{name}":
                return self.arguments[i + 1]
            if word.startswith(f"--{name}="):
                return word.partition("=")[2]
        return None

    @property
    def mode(self) -> str:
        return self.flag("mode") or "train"

    @property
    def settings(self) -> set[str]:
        """What has a part in the run, and not only in what is made of it: config, backend, overrides."""
        modes = ("generate", "compare", "export", "checkpoint", "probe", "harness")
        made_of_it = tuple(f"--config.{name}." for name in modes)
        overrides = {word for word in self.arguments if word.startswith("--config.") and not word.startswith(made_of_it)}
        return overrides | {f"--config {self.flag('config')}", f"--backend {self.flag('backend') or 'jax'}"}


def lines_of(body: str) -> list[str]:
    """The command lines of a code block; one that goes on after a backslash is one."""
    return [line.strip() for line in re.sub(r"\\\n\s*", "", body).splitlines() if line.strip()]


def lines(text: str) -> Iterator[str]:
    """The command lines of all code blocks."""
    for body in blocks(text, "", "bash", "sh"):
        yield from lines_of(body)


def commands(text: str) -> Iterator[Command]:
    yield from filter(None, map(command_of, lines(text)))


def command_of(line: str) -> Command | None:
    """What a line asks of this program; None of a line that runs another one."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if "ple_jax.main" in words:
        return Command(line, tuple(words[words.index("ple_jax.main") + 1 :]))
    if words and words[0] in ("ple_jax", ".venv/bin/ple_jax"):
        return Command(line, tuple(words[1:]))
    if words and words[0] == "scripts/launch/ascend.sh":
        own = any(re.match("--config(=|$)", word) for word in words)
        return Command(line, ("--backend=torch", *([] if own else ["--config", ASCEND]), *words[1:]))
    return None


ALL = [(page, command) for page in PAGES for command in commands(page.read_text(encoding="utf-8"))]
RUNS = [(page, command) for page, command in ALL if command.arguments not in (("--help",), ("--version",))]


def made(page: Path) -> set[str]:
    """The config files that commands of a page write: `--mode=init`."""
    inits = [command for where, command in ALL if where == page and command.mode == "init"]
    return {f"{command.flag('workdir')}/{command.flag('config')}.py" for command in inits}


def a_folder(folder: Path, text: str) -> Path:
    """A folder for the commands of a page: what a checkout has, and the files that the page shows."""
    for name in ("configs", "examples", "scripts", "tests"):
        (folder / name).symlink_to(ROOT / name)
    for block in parted(text):
        if block.title:
            (folder / block.title).write_text(block.body, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("page", "command"), [pytest.param(*found, id=f"{found[0].stem}-{i}") for i, found in enumerate(RUNS)]
)
def test_commands_are_understood(monkeypatch, tmp_path, page, command):
    """By the program's own parser, config and overrides included."""
    monkeypatch.chdir(a_folder(tmp_path, page.read_text(encoding="utf-8")))
    for name in ("train", "heldout"):  # that a script of the tutorial writes
        (tmp_path / f"{name}.jsonl").touch()
    arguments = list(command.arguments)
    kept = default.get_config().to_dict() | {"format": 2, "backend": "jax", "inputs": {}}
    monkeypatch.setattr(entry, "recorded", lambda workdir: kept)  # of the run whose config is taken
    if (config := command.flag("config")) in made(page):
        arguments = [word.replace(config, "quickstart") for word in arguments]
    run = entry.parse(["ple_jax", *arguments])
    assert run.mode == command.mode
    assert run.backend == "torch" or page.name != "ascend.md"


def test_all_commands_were_found():
    assert len(RUNS) > 35
    assert {command.mode for _, command in RUNS} >= {"train", "plan", "generate", "compare", "export", "chat", "init"}
    assert sum(page.name == "ascend.md" for page, _ in RUNS) == 9


def wrong_programs(text: str) -> Iterator[str]:
    """Lines whose program is not there after `make` and activating, or after pip install."""
    for line in lines(text):
        words = line.split()
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if "ple_jax.main" in words and words[0] not in (".venv/bin/python", "torchrun"):
            yield f"{line}: take ple_jax, or .venv/bin/python -m ple_jax.main"
        elif re.match(r"(\./)?scripts/.*\.py$", words[0]) or (words[0].startswith("python") and "scripts/" in line):
            yield f"{line}: take .venv/bin/python, scripts are those of a checkout"
        elif words[0] == "pytest":
            yield f"{line}: take .venv/bin/python -m pytest"


@pytest.mark.parametrize("page", pages())
def test_commands_name_a_program_that_is_there(page):
    text = page.read_text(encoding="utf-8")
    assert list(wrong_programs(text)) == []
    if any(line.startswith(("ple_jax", "python ", "torchrun")) for line in lines(text)):
        assert "install.md#commands" in text or "source .venv/bin/activate" in text


@pytest.mark.parametrize(
    "line",
    [
        "python -m ple_jax.main --config tiny --workdir w",
        "JAX_PLATFORMS=cpu python3 -m ple_jax.main --help",
        "python scripts/sweep.py --out w",
        "scripts/sweep.py --out w",
        "pytest tests",
    ],
)
def test_a_program_that_is_not_there_is_found(line):
    assert list(wrong_programs(f"```\nple_jax --help\n{line}\n```\n")) != []


# ---------------------------------------------------------------- work directories


def shared_workdirs(found: Iterable[tuple[str, Command]]) -> Iterator[str]:
    """Work directories of which two commands make different runs.

    A second command on a directory is fine where it has the settings of the run: another --mode, another machine's part
    of it (by environment variables), or the same run on another page.

    Args:
        found: where a command stands, and the command.
    """
    first: dict[str, tuple[str, Command]] = {}
    lines: set[tuple[str, str]] = set()
    for where, command in found:
        workdir, line = command.flag("workdir"), command.line.partition(" #")[0].strip()
        if workdir is None or command.mode == "replay":  # whose overrides are what might have been
            continue
        if command.flag("config") is None:  # that of the run
            continue
        if (where, line) in lines:
            yield f"{where}: {line} stands there twice"
        lines.add((where, line))
        if workdir not in first:
            first[workdir] = where, command
            continue
        place, other = first[workdir]
        if command.settings != other.settings:
            yield f"{where}: {command.line}: {workdir} is that of {other.line} ({place}), which has other settings"


def test_no_two_examples_share_a_work_directory():
    assert list(shared_workdirs((page.name, command) for page, command in RUNS)) == []
    assert len({command.flag("workdir") for _, command in RUNS}) > 20


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        (["ple_jax --config tiny --workdir w", "ple_jax --config tiny --workdir w --config.seed=1"], True),
        (["ple_jax --config tiny --workdir w", "ple_jax --config hh --workdir=w"], True),
        (["ple_jax --config tiny --workdir w", "ple_jax --config tiny --workdir w --backend=torch"], True),
        (["ple_jax --config tiny --workdir w --config.seed=1", "ple_jax --config tiny --workdir w --mode=chat"], True),
        (["ple_jax --config tiny --workdir w", "scripts/launch/ascend.sh --workdir w"], True),
        (["ple_jax --config tiny --workdir w", "ple_jax --config tiny --workdir w --mode=export"], False),
        (["ple_jax --config tiny --workdir w", "ple_jax --config tiny --workdir w2 --config.seed=1"], False),
        (["ple_jax --config tiny --workdir w", "ple_jax --config tiny --workdir w   # again"], True),
        (["ple_jax --config=tiny --workdir w", "ple_jax --config tiny --workdir w --config.export.merged=1"], False),
        (["NODE_RANK=0 scripts/launch/ascend.sh --workdir w", "NODE_RANK=1 scripts/launch/ascend.sh --workdir w"], False),
    ],
)  # fmt: skip
def test_a_shared_work_directory_is_found(lines, wrong):
    text = "```\n" + "\n".join(lines) + "\n```\n"
    found = list(shared_workdirs(("page", command) for command in commands(text)))
    assert len(found) == wrong


# ---------------------------------------------------------------- names


def unknown_keys(text: str) -> Iterator[str]:
    """Config keys, in commands and in backticks, that configs/default.py does not have."""
    for found in re.findall(r"--config\.([a-z][\w.]*\*?)", text):
        if not known(found):
            yield f"--config.{found}"
    for span in spans(text):
        name = span.partition("=")[0]
        sections = "|".join(key.partition(".")[0] for key in KEYS if "." in key)
        key = re.fullmatch(rf"(?:config\.)?((?:{sections})\.[\w.]+\*?)", name)
        if key and not name.endswith(SUFFIXES) and not known(key[1]):
            yield span


def known(key: str) -> bool:
    """Whether it is a key, a section of keys, or `section.*`."""
    section = key.rstrip("*").rstrip(".")
    return section in KEYS or any(name.startswith(f"{section}.") for name in KEYS)


@pytest.mark.parametrize("page", pages())
def test_config_keys_are_known(page):
    assert list(unknown_keys(page.read_text(encoding="utf-8"))) == []


def test_config_keys_were_found():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert len(set(re.findall(r"--config\.([a-z][\w.]*)", text))) > 50


@pytest.mark.parametrize(
    "wrong", ["--config.ple.tau0=1", "`ple.tau0`", "`ple.tau0=0.1`", "--config.pel.*", "`config.sampling.widht`"]
)
def test_an_unknown_key_is_found(wrong):
    assert len(list(unknown_keys(f"`ple.tau_0`, `generate.*`, `ppo.py`, --config.reward.kwargs. {wrong}"))) == 1


def missing_files(text: str) -> Iterator[str]:
    """Files, folders and modules of this repository, in backticks and commands, that are not there."""
    written = " ".join([*spans(text), *lines(text)])
    for module in re.findall(r"-m (ple_jax\.[\w.]+)", written):
        if not (ROOT / f"{module.replace('.', '/')}.py").exists():
            yield f"{module.replace('.', '/')}.py"
    for word in re.split(r"[\s=']", written):
        path = word.rstrip(",.;:").partition("::")[0]
        ours = re.match(r"(configs|ple_jax|torch_ascend|tests|scripts|docs|\.ci)/", path)
        if ours and not list(ROOT.glob(path.rstrip("/"))):
            yield path


@pytest.mark.parametrize("page", pages())
def test_files_that_are_named_exist(page):
    assert list(missing_files(page.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "wrong",
    [
        "`configs/no_such.py`",
        "`scripts/no_such.sh --out w`",
        "`.venv/bin/python -m pytest -m npu tests/no_such.py`",
        "`ple_jax/no_such/`",
        "`python -m ple_jax.no_such --out w`",
        "\n```\nple_jax --config configs/no_such.py\n```\n",
    ],
)
def test_a_missing_file_is_found(wrong):
    assert len(list(missing_files(f"`configs/tiny.py`, `ple_jax/core/`, `runs/mine`, {wrong}"))) == 1


# ---------------------------------------------------------------- what is complete, and what agrees


def rows(page: Path, first: str) -> list[list[str]]:
    """The rows of the table whose first column is called `first`, a list of cells each."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |")) + 2
    end = next((i for i, line in enumerate(lines[start:], start) if not line.startswith("|")), len(lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]


def names(page: str, first: str) -> set[str]:
    """What stands in backticks in the first column of a table."""
    return {name for row in rows(DOCS / page, first) for name in re.findall(r"`([^`]+)`", row[0])}


def modules(folder: str) -> set[str]:
    return {file.stem for file in (ROOT / folder).glob("*.py") if not file.stem.startswith("_")}


def extras() -> Mapping[str, list[str]]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]["optional-dependencies"]


def test_tables_name_all_there_is():
    assert names("configs.md", "`--mode=`") == {*entry.MODES, "init"}
    assert names("configs.md", "name") == modules("configs")
    assert names("install.md", "extra") == set(extras()) - {"dev"}
    assert names("method.md", "algorithm") == modules("ple_jax/algorithms") - {"ple"}
    assert names("rewards.md", "name") - {"mine.py:score", "package.module:function"} == modules("ple_jax/rewards")
    sets = {file.stem for file in (ROOT / "ple_jax").rglob("principles/*.txt")}
    assert len(sets) == 9 and sets == names("principles.md", "set")


def test_options_of_judges_are_those_that_they_have():
    named = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[2])) for row in rows(DOCS / "compare.md", "`compare.judge`")}
    assert set(named) == {"reward", "endpoint", "model", "file.py:function"}
    requests = {field.name for field in dataclasses.fields(endpoints.Endpoint)}
    assert named["endpoint"] <= requests | set(inspect.signature(model_judges.endpoint).parameters)
    assert named["model"] - {"likelihood", "text"} <= set(inspect.signature(model_judges.local).parameters)


def test_options_of_trl_are_those_that_it_has():
    """Its settings by the names of the installed version."""
    trl = importlib.import_module("trl")
    known = {field.name for config in (trl.SFTConfig, trl.DPOConfig, trl.GRPOConfig, trl.RLOOConfig, trl.ModelConfig)
             for field in dataclasses.fields(config)}  # fmt: skip
    named = [re.findall(r"`(\w+)`", row[0]) for row in rows(DOCS / "coming-from.md", "TRL")]
    assert sum(map(len, named)) >= 40
    assert sorted({name for some in named for name in some} - known) == []


def test_readme_is_short():
    assert 60 < len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_figures_of_the_readme_are_those_of_the_pages():
    for page, first in (("quickstart.md", "seed"), ("results.md", "method")):
        of_page = rows(DOCS / page, first)
        of_readme = rows(ROOT / "README.md", first)
        assert len(of_readme) >= 2
        for row in of_readme:
            assert any(set(row) <= set(other) for other in of_page), row


@pytest.fixture
def draw_docs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("draw_docs")


def test_pictures_are_drawn_from_the_tables(draw_docs):
    drawn = {name: draw() for name, draw in draw_docs.PICTURES.items()}
    assert drawn == {file.name: file.read_text(encoding="utf-8") for file in (DOCS / "images").glob("*.svg")}
    assert drawn["methods.svg"].count("<circle") == 12 and drawn["quickstart.svg"].count("<circle") == 36
    # 0.5 is half way down the panel: y = top + height / 2
    panel = draw_docs.Panel(left=10, top=20, width=100, height=50, x=(0, 4), y=(0, 1))
    assert panel.at(1, 0.5) == (35.0, 45.0)


def test_a_table_is_printed_from_runs(draw_docs, tmp_path):
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "summary.json").write_text('{"seed": 3}')
    (tmp_path / "metrics.jsonl").write_text(
        '{"iteration": 0, "heldout_reward": 0.5, "heldout_kl_response": 0.0}\n{"iteration": 1, "loss": 1.0}\n'
        '{"iteration": 2, "heldout_reward": 0.75, "heldout_kl_response": 12.25}\n'
    )
    for iteration, rewards in ((0, (0.25, 0.75)), (2, (1.0, 0.5))):  # a principled response, if any, is not in the mean
        responses = [{"kind": "plain", "reward": reward} for reward in rewards] + [{"kind": "principled", "reward": 9.0}]
        (tmp_path / f"evaluations/iter_000{iteration}.jsonl").write_text(2 * (json.dumps({"responses": responses}) + "\n"))
    assert draw_docs.table_of_runs([tmp_path]).splitlines() == [
        "| iteration | seed 3: reward (95%) | seed 3: KL |",
        "|---|---|---|",
        "| 0 | 0.500 (0.500 to 0.500) | 0.0 |",  # both queries have the same mean: so has every resample
        "| 2 | 0.750 (0.750 to 0.750) | 12.2 |",
    ]
    shorter = tmp_path / "shorter"  # one that had spent its budget
    (shorter / "evaluations").mkdir(parents=True)
    (shorter / "summary.json").write_text('{"seed": 4}')
    (shorter / "metrics.jsonl").write_text((tmp_path / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    (shorter / "evaluations" / "iter_0000.jsonl").write_text((tmp_path / "evaluations" / "iter_0000.jsonl").read_text())
    assert draw_docs.table_of_runs([tmp_path, shorter]).splitlines()[-1] == "| 2 | 0.750 (0.750 to 0.750) | 12.2 | – | – |"


def test_the_table_of_kept_runs_is_of_the_runs_that_are_kept(draw_docs):
    table = draw_docs.table_of_kept(DOCS / "evidence" / "quickstart")
    assert table in (DOCS / "results.md").read_text(encoding="utf-8")
    read = draw_docs.read_table(DOCS / "results.md", "what is compared")
    rows = {(row["what is compared"], row["lr"]): row for row in read}
    with tarfile.open(DOCS / "evidence" / "quickstart" / "raft__lr-3e-3__seed-1.tar.xz") as packed:
        points = json.load(packed.extractfile("raft__lr-3e-3__seed-1/summary.json"))["points"]
    before, after = next((a, b) for a, b in pairwise(points) if b["kl"] > 16)
    share = (16 - before["kl"]) / (after["kl"] - before["kl"])
    value = before["reward"] + share * (after["reward"] - before["reward"])
    assert rows["raft", "3e-3"]["reward at 16 nats"].split(", ")[1] == f"{value:.2f}"


def test_the_variant_that_is_shown_is_the_one_that_is_tested():
    code = (ROOT / "tests" / "variants" / "focal.py").read_text(encoding="utf-8")
    assert code in blocks((DOCS / "variants.md").read_text(encoding="utf-8"), "python")


def test_the_functions_that_are_shown_give_what_is_said():
    (code,) = (block for block in blocks((DOCS / "variants.md").read_text(encoding="utf-8"), "python") if "tau =" in block)
    said = re.findall(r"^(?:\w+ = )?(.*?)\s+# (.*)$", code, re.MULTILINE)
    assert [words for _, words in said] == ["0.2 * 0.9**3", "[True, False]", "[0.5]: the principled response is less likely"]
    checks = [f"assert np.allclose({expression}, {words.partition(':')[0]})" for expression, words in said]
    script = "\n".join([code, *checks, "import sys", "assert not {'jax', 'torch'} & sys.modules.keys()", "print('done')"])
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
