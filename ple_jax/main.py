"""The command line: `ple_jax --config CONFIG --workdir DIR`, or `python -m ple_jax.main ...`; `--help` explains the rest.

The command line and the config are checked before jax, torch or transformers are imported, so that a mistake costs less
than a second. An error that the user can mend (`UserError`) prints one line on stderr and ends with exit code 2.
"""

import contextlib
import importlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import app, flags
from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_flags import config_flags

from ple_jax.core import extras, launch, shipped, streams
from ple_jax.core.backends import BACKENDS
from ple_jax.core.config import OF_FILES, OWN, flatten, validate
from ple_jax.core.errors import UserError, of_the_machine, suggestion
from ple_jax.core.identity import ACCEPTED
from ple_jax.core.rules import written
from ple_jax.core.secrets import redacted
from ple_jax.core.version import VERSION
from ple_jax.models import hub, smollm2
from ple_jax.training.interrupt import MESSAGE, Interrupted, Stop, ask
from ple_jax.training.workdir import recorded

_LONGEST, _DEEPEST = 255, 4096 - 256  # bytes of the name of a file or folder, and of a path with room for what is in it
# functions of ple_jax.modes
MODES = ("train", "probe", "evaluate", "generate", "compare", "harness", "replay", "plan", "export", "chat")
FLAG_NAMES = (
    "config", "workdir", "backend", "mode", "accept", "topology", "runs", "against", "profile", "coordinator",
    "processes", "process", "help", "version",
)  # fmt: skip
# modes that need no --config: the config is then the run's own
OF_A_RUN = ("evaluate", "generate", "harness", "replay", "export", "chat")
# modes that a run may be accepted in though it changed
ON_A_RUN = ("train", "evaluate", "generate", "harness", "export", "chat")

USAGE = """\
usage: ple_jax --config CONFIG --workdir DIR [--config.KEY=VALUE ...] [--backend=jax|torch] [--mode=MODE]
       MODE is train (default), probe, evaluate, generate, compare, harness, replay, plan, export, chat or init;
       --help explains them
"""

HELP = f"""\
Align a language model with PLE (Progressively Label Enhancement, ICML 2025, arXiv:2408.02599).

{USAGE}
Each iteration samples two responses per query, one from the plain prompt and one with the principles in the prompt,
scores both, ranks the pair if the principled one wins by more than a threshold, blends the two otherwise, trains a LoRA
adapter on them, and lowers the threshold.

Flags
  --config CONFIG        one of the package, by name (quickstart, tiny ...), or a Python file whose get_config() returns
                         the config; FILE:ARGUMENT hands it an argument
  --config.KEY=VALUE     overrides one key; every key, with its default and its meaning, is in configs/default.py, which
                         --mode=init --config default --workdir DIR copies
  --workdir DIR          where everything goes: config.json, metrics.jsonl, rollouts/, checkpoints/, adapter/,
                         report.html, summary.json (not needed for --mode=plan)
  --backend jax|torch    what computes (default: jax); torch runs on Ascend NPUs, CUDA and CPUs, and under torchrun on
                         several of them
  --mode MODE            what to do (default: train)
  --accept A,B           go on with a run though this was changed since it began: reward (its file or options, mended),
                         algorithm (its file, mended), config (config.json is gone, and this is the command that began
                         it); config.json keeps what was changed, and after which iteration
  --topology KIND:CHIPS  with --mode=plan: what each phase of the run needs of these devices, which need not be there:
                         v5e:2x4, v5p:4x4x4 ... (compiled; libtpu does it for TPUs), h100:64 (an estimate), with
                         --backend=torch 910b:8, h100:8 (run on tensors without memory); cpu:8 is of this machine's kind
  --runs A,B,...         with --mode=compare: work directories, LABEL=DIR, or patterns ('runs/ple_*'); runs of one label
                         are seeds of one method. DIR@kl_4, DIR@newest: the answers of that checkpoint;
                         LABEL=DIR@points: no answers, the run's curve
  --against DIR          with --mode=replay: find the first quantity in which the runs of --workdir and DIR differ
  --profile              with --mode=train: trace one iteration, the second of this process, with the framework's
                         own profiler: DIR/profile, for TensorBoard (pip install xprof) or Perfetto
  --coordinator HOST:PORT, --processes N, --process I
                         several processes of --backend=jax, one a host or one a device: where process 0 is with a free
                         port, how many there are, and which one this is; or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
                         and JAX_PROCESS_ID. SLURM, Open MPI, Cloud TPU and GKE's TPUs need none of them. Of several on
                         a host each needs devices of its own: JAX_LOCAL_DEVICE_IDS=0,1. --processes=1: this one alone
  --version              the version of this package

Modes
  train      run all iterations; a killed run continues where it stood when the same command is given again
  evaluate   score the held-out queries with the best checkpoint of DIR (see config.checkpoint.use)
  generate   keep several responses to a fixed set of queries (--config.generate.*), with rewards, log-probabilities and
             measures: of the best checkpoint of DIR, or of what it starts from
  compare    compare the responses of --runs: tables, tests, win rates, one page in DIR (or runs/comparison); needs no
             --config
  harness    what alignment cost: tasks of lm-evaluation-harness, or of your own, before and after training
             (--config.harness.tasks ...), in DIR/harness, the report and comparisons
  replay     label what the run of DIR sampled as --config.KEY=VALUE now says (reward, threshold, transform, selection),
             from its journals alone: which pairs would have been ranked, and the journals as records of data sets, in
             DIR/replay
  probe      before any training: what the principles buy on held-out queries, together, one by one and left out, and
             what a threshold would do with this reward (--config.probe.*): DIR/probe.html, probe.json
  plan       print what train would do (parameters, shapes, steps, prompts as the model sees them), and train nothing
  export     write the best adapter of DIR in PEFT's layout with a model card; --config.export.merged=True: the merged
             model too; --config.export.push=USER/NAME: to a hub
  chat       talk to the best adapter of DIR, its base, or both; principles on or off
  init       copy CONFIG into DIR, as a file of your own to change

Without --config, evaluate, generate, harness, replay, export and chat take the config from the run in DIR.
`python -m ple_jax.main` is the same command as `ple_jax`.

Examples
  ple_jax --config tiny --workdir runs/tiny
  ple_jax --config quickstart --mode=plan
  ple_jax --config quickstart --mode=probe --workdir runs/probe
  ple_jax --config quickstart --mode=plan --topology=v5e:2x4 --config.mesh.fsdp=8 \\
      --config.model.path=llama-3-8b --config.model.dtype=bfloat16 --config.model.remat=full
  ple_jax --config quickstart --workdir runs/low --config.ple.tau_0=0.1 --config.seed=1
  ple_jax --mode=init --config quickstart --workdir mine
  ple_jax --config mine/quickstart.py --workdir runs/mine
  ple_jax --workdir runs/mine --mode=generate
  ple_jax --workdir runs/mine --mode=chat
  ple_jax --mode=replay --workdir runs/mine --config.ple.tau_0=0.1
  ple_jax --mode=replay --workdir runs/mine --against runs/other
  ple_jax --mode=compare --runs "runs/mine,PPO=runs/ppo_0,PPO=runs/ppo_1" --workdir runs/comparison
  ple_jax --config quickstart --workdir runs/variant --config.algorithm=my_variant.py \\
      --config.algorithm_kwargs="{{'strength': 2.0}}"
  ple_jax --config quickstart --workdir runs/two --config.lora.targets="('q_proj','v_proj')"

Exit codes: 0 done, 2 something to mend (one line on stderr says what).
"""

ENVIRONMENT = {
    # this project sends nothing anywhere, and switches off what the libraries it may load would send
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    # it would say in every run that PyTorch was not found, which is how it should be
    "TRANSFORMERS_VERBOSITY": "error",
    # tokenizers warns when a process that used its threads forks
    "TOKENIZERS_PARALLELISM": "false",
}


class CommandLine(NamedTuple):
    """What the command line asks for, after all checks."""

    config: ConfigDict  # frozen
    workdir: Path
    backend: str
    mode: str
    topology: str | None = None  # of --mode=plan: devices to plan for
    runs: tuple[str, ...] = ()  # of --mode=compare
    accept: tuple[str, ...] = ()  # what was changed since a run began, of `identity.ACCEPTED`
    file: Path | None = None  # of --mode=init: the config that is copied
    profile: bool = False  # of --mode=train: trace an iteration
    against: Path | None = None  # of --mode=replay: another work directory
    launched: tuple[str | None, int | None, int | None] = (None, None, None)  # --coordinator, --processes, --process


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns expected errors into one line on stderr and an exit code.

    Errors that the user can mend, a full disk and too little memory give the exit code 2. A stop that was asked for gives
    128 plus the number of the signal.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {redacted(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        print(MESSAGE, file=sys.stderr)
        sys.exit(128 + (stopped.number if isinstance(stopped, Interrupted) else signal.SIGINT))
    except Exception as error:
        if not (says := of_the_machine(error)):
            raise
        print(f"error: {says}; what was finished is kept", file=sys.stderr)
        sys.exit(2)


def _load(config: str) -> tuple[Path, ConfigDict]:
    """Returns the file and the locked config of `--config`: a name or a path, also as `CONFIG:ARGUMENT` for get_config().

    Raises:
        UserError: there is no such file, or it does not load.
    """
    name, colon, argument = config.partition(":")
    file = shipped.find(name)
    shipped.importable()
    try:
        found = config_flags.ConfigFileFlagParser("config").parse(f"{file}{colon}{argument}")
        if found is None:
            raise TypeError("get_config() returns nothing; end it with `return c`")
        found.to_dict()
    except (Exception, SystemExit) as error:  # the file is the user's code: anything may come out of it
        # ml_collections puts a traceback before the message
        reason = str(error).strip().splitlines()[-1:] or [""]
        where = f"config file {str(file)!r}{_line(file, error)}"
        raise UserError(f"{where} does not load: {type(error).__name__}: {reason[0]}") from error
    return file, found


def _line(file: Path, error: BaseException) -> str:
    """Names the last line of a file that an error came through, or that an error of syntax is in; "" if there is none."""
    cause: BaseException | None = error
    while cause is not None:
        lines = [frame.lineno for frame in traceback.extract_tb(cause.__traceback__) if Path(frame.filename) == file]
        if isinstance(cause, SyntaxError) and cause.filename == str(file):
            lines.append(cause.lineno)
        if lines:
            return f", line {lines[-1]},"
        cause = cause.__cause__ or cause.__context__
    return ""


def _recorded(workdir: Path, config: ConfigDict) -> ConfigDict:
    """Returns the config with which the run of a work directory began: its config.json over the defaults in `config`.

    Raises:
        UserError: the directory holds no run.
    """
    if not (kept := recorded(workdir)):
        raise UserError(f"--workdir={workdir} holds no run (no config.json there); train one first: --mode=train")
    usual, own = flatten(config.to_dict()), flatten(kept)
    own = {key: value for key, value in own.items() if key in usual and not key.startswith("sampling.server")}

    def of_json(key: str, value: object) -> object:
        return float(value) if isinstance(usual[key], float) and isinstance(value, str) else _tuples(value)  # "inf"

    with config.ignore_type():
        config.update_from_flattened_dict({key: of_json(key, value) for key, value in own.items()})
    model = str(kept.get("inputs", {}).get("model"))
    if hub.is_remote(config.model.path) and hub.is_commit(model):
        config.model.revision = model  # which its config does not name: the branch may have moved
    return config


def _without_unread(config: ConfigDict, began: dict[str, object], mode: str) -> ConfigDict:
    """Returns the config with defaults for the keys that name what the mode does not read, which may be gone since.

    A replay reads only what was changed; export and chat read the model alone.

    Args:
        began: the flat config of the run, if the mode takes the config from there.
    """
    now, usual = flatten(config.to_dict()), flatten(_load("default")[1].to_dict())
    unread = [key for key in OF_FILES if mode == "replay" and key in began and now[key] == began[key]]
    if mode in ("export", "chat"):
        unread = [key for key in OF_FILES if not key.startswith("model.")]
    if "eval.second_reward" in unread:
        unread.append("eval.best")  # which may be by it
    checked = ConfigDict(config.to_dict())
    with checked.ignore_type():
        checked.update_from_flattened_dict({key: usual[key] for key in unread})
    return checked


def _tuples(value: object) -> object:
    """Returns the value with all its lists converted to tuples, as configs have them."""
    if isinstance(value, dict):
        return {key: _tuples(v) for key, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _began_on(values: flags.FlagValues) -> str:
    """Returns the backend that the command line asks for, or else the backend of the run."""
    known = (recorded(_workdir(values)) or {}).get("backend")
    return known if known in BACKENDS and not values["backend"].present else values.backend


def _override(config: ConfigDict, argv: Sequence[str]) -> ConfigDict:
    """Applies the `--config.KEY=VALUE` arguments of `argv` to the config; `argv[0]` is the program.

    Raises:
        UserError: a key is unknown, a value does not fit, or there is any other argument.
    """
    keys = list(flatten(config.to_dict()))
    for argument in argv[1:]:
        match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if match is None or any(key == match[1] or key.startswith(f"{match[1]}.") for key in keys):
            continue
        parent = match[1].rsplit(".", 1)[0]
        if parent in keys:
            raise UserError(f"unknown key in {argument!r}: override {parent} whole, --config.{parent}=\"{{'k': 1}}\"")
        raise UserError(f"unknown key in {argument!r}{suggestion(match[1], keys)} (all are in configs/default.py)")
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=list(argv))
        leftover = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        begins, dot, _ = error.flagname.partition(".")
        nearest = suggestion(f"{begins}{dot}", ["config."]) if dot else suggestion(error.flagname, FLAG_NAMES)
        raise UserError(f"unknown flag --{error.flagname}{nearest}") from error
    except (flags.Error, ArithmeticError, RecursionError, TypeError, ValueError) as error:  # of values that no key takes
        raise UserError(f"{_in_words(str(error))} (configs/default.py shows what each key holds)") from error
    if leftover:
        raise UserError(f"leftover argument {leftover[0]!r}; every setting is --flag=value or --config.key=value")
    return values.config


def _in_words(says: str) -> str:
    """Rewrites what absl and Python say of a value that cannot be read."""
    for pattern, words in (
        (r"(.*): Failed to parse .* as a Conf.*", r"\1: give a dictionary with names and texts in quotes, {'limit': 20}"),
        (r"(.*): invalid literal for int\(\) .*", r"\1: give a whole number"),
        (r"(.*): could not convert string to float.*", r"\1: give a number"),
        (r"(.*): \('Non-boolean argument to boolean flag', .*", r"\1: give True or False"),
    ):
        if match := re.fullmatch(pattern, says, re.DOTALL):
            return match.expand(words)
    return says


def parse(argv: Sequence[str]) -> CommandLine:
    """Reads and checks the whole command line, config included, without importing a backend.

    Args:
      argv: the program's name and its arguments.

    Raises:
      UserError: anything is wrong; the message is one line.
      SystemExit: with 0 for --help and --version, with 2 if there are no arguments at all.
    """
    _answer(argv)
    values, rest = _flags(argv)
    backend, mode = values.backend, values.mode
    _check_flags(values)
    file, config = _load(values.config or "default")
    if of_a_run := mode in OF_A_RUN and not values.config and not values.against:
        config, backend = _recorded(_workdir(values), config), _began_on(values)
    if mode == "init":
        if rest[1:]:
            raise UserError(f"{rest[1]!r} does not go with --mode=init: change the copy that it makes")
        return CommandLine(FrozenConfigDict(config), _workdir(values), backend, mode, file=file)
    if values.against and rest[1:]:
        raise UserError(f"--against={values.against} compares two runs as they are: leave {rest[1]!r} out")
    began = flatten(config.to_dict()) if of_a_run else {}
    config, workdir = _override(config, rest), _workdir(values)
    validate(_without_unread(config, began, mode))
    _check_backend(config, backend)
    _check_installed(config, backend, mode)
    found = {"topology": values.topology, "runs": tuple(values.runs or ()), "accept": tuple(values.accept or ())}
    found |= {"profile": values.profile, "against": Path(values.against) if values.against else None}
    found |= {"launched": (values.coordinator, values.processes, values.process)}
    return CommandLine(_frozen(config), workdir, backend, mode, **found)


def _frozen(config: ConfigDict) -> FrozenConfigDict:
    try:
        return FrozenConfigDict(config)
    except (AssertionError, ValueError) as error:  # of dictionaries within lists, and of empty lists within sets
        brief = (str(error).strip().splitlines() or ["an empty list within a list"])[-1]
        raise UserError(
            f"the config holds what none can ({brief}): give a value that is so nested as a file, or as the text of its"
            " JSON, where the key takes one, as the schema of reward json_schema does"
        ) from error


def _answer(argv: Sequence[str]) -> None:
    """Prints the help, the version or, without arguments, the usage, and ends the program; otherwise does nothing."""
    if len(argv) == 1:
        print(USAGE, end="", file=sys.stderr)
        sys.exit(2)
    if any(re.fullmatch(r"-h|--?help(short|full)?", argument) for argument in argv[1:]):
        print(HELP, end="")
        sys.exit(0)
    if "--version" in argv[1:]:
        print(f"ple_jax {VERSION}")
        sys.exit(0)


def _flags(argv: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
    """Returns the values of our own flags, and the rest of the command line after the program's name.

    Raises:
        UserError: a flag has a value that it does not take.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # flags may follow the value of an override: --config.seed 1 --workdir w
    flags.DEFINE_string("config", None, "", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_enum("backend", "jax", list(BACKENDS), "", flag_values=values)
    flags.DEFINE_enum("mode", "train", [*MODES, "init"], "", flag_values=values)
    flags.DEFINE_string("topology", None, "", flag_values=values)
    flags.DEFINE_list("runs", None, "", flag_values=values)
    flags.DEFINE_list("accept", None, "", flag_values=values)
    flags.DEFINE_string("against", None, "", flag_values=values)
    flags.DEFINE_bool("profile", False, "", flag_values=values)
    flags.DEFINE_string("coordinator", None, "", flag_values=values)
    flags.DEFINE_integer("processes", None, "", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process", None, "", lower_bound=0, flag_values=values)
    try:
        return values, values(argv, known_only=True)
    except flags.Error as error:
        near = suggestion(match[1], [*MODES, "init"]) if (match := re.search(r"--mode=(\w+)", str(error))) else ""
        raise UserError(f"{error} (see --help){near}") from error


def _check_flags(values: flags.FlagValues) -> None:
    """Raises a UserError if our flags do not go together, or if one is missing or holds text that cannot be written down."""
    for name in ("config", "workdir", "topology", "runs", "against"):
        if says := written(getattr(values, name)):
            raise UserError(f"--{name}={getattr(values, name)!r} must be {says}")
    compares = values.mode == "compare"
    if bool(values.runs) != compares:
        raise UserError("--runs=A,B and --mode=compare go together: the work directories that are compared")
    if not values.config and values.mode not in ("compare", *OF_A_RUN):
        raise UserError("--config=CONFIG is missing, e.g. --config quickstart, or a file (see --help)")
    for name in values.accept or ():
        if name not in ACCEPTED or values.mode not in ON_A_RUN:
            raise UserError(
                f"--accept={name}: give {', '.join(ACCEPTED)}, with --mode {', '.join(ON_A_RUN)}{suggestion(name, ACCEPTED)}"
            )
    if values.against and (values.mode != "replay" or values.config):
        other = f"--config={values.config}" if values.mode == "replay" else f"--mode={values.mode}"
        raise UserError(f"--against={values.against} goes with --mode=replay and --workdir alone, not with {other}")
    if values.profile and values.mode != "train":
        raise UserError(f"--profile goes with --mode=train, and --mode is {values.mode}")
    if backend_own := [name for name in ("coordinator", "processes", "process") if getattr(values, name) is not None]:
        if values.backend != "jax":
            raise UserError(f"--{backend_own[0]} goes with --backend=jax; start --backend={values.backend} with torchrun")
    if values.topology and values.mode != "plan":
        raise UserError(f"--topology={values.topology} goes with --mode=plan, where nothing is trained")


def _workdir(values: flags.FlagValues) -> Path:
    if not values.workdir and values.mode not in ("plan", "compare"):
        use = "goes on from the run there" if values.mode in OF_A_RUN else "keeps its files there"
        raise UserError(f"--workdir=DIR is missing; --mode={values.mode} {use} (--workdir runs/mine)")
    # a plan without a directory is of no run: whatever lies here is none of it
    workdir = Path(values.workdir or ("runs/comparison" if values.mode == "compare" else os.devnull))
    if longest := [part for part in workdir.parts if len(os.fsencode(part)) > _LONGEST]:
        raise UserError(f"--workdir has a part of {len(os.fsencode(longest[0]))} bytes; a name has at most {_LONGEST}")
    if (length := len(os.fsencode(workdir.absolute()))) > _DEEPEST:
        raise UserError(f"--workdir is a path of {length} bytes; give one of at most {_DEEPEST}")
    if values.workdir and os.path.exists(workdir) and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; give a folder, which is created if need be")
    return workdir


def _check_backend(config: ConfigDict, backend: str) -> None:
    """Raises a UserError if the config asks for something that the chosen backend does not have."""
    flat = flatten(config.to_dict())
    for key, owner in OWN.items():
        if flat[key] != "auto" and owner != backend:
            raise UserError(
                f"config.{key} is {flat[key]!r}, which --backend={backend} does not read: take --backend={owner} or"
                " leave it at auto"
            )
    if config.trainer == "trl" and backend != "torch":
        raise UserError("config.trainer is 'trl', which trains in PyTorch: give --backend=torch, or leave it at own")


def _check_installed(config: ConfigDict, backend: str, mode: str) -> None:
    """Raises a UserError if a package or model that the run needs is missing.

    It runs before anything slow is imported or read.
    """
    if mode == "compare":
        extras.need("eval", "--mode=compare", "scipy")
    elif mode != "replay":  # which computes nothing
        extras.need(backend, f"--backend={backend}")
        if config.model.path == smollm2.NAME:
            smollm2.file()
    if config.trainer == "trl" and mode == "train":
        extras.need("trl", "config.trainer='trl'")


def main(run: CommandLine) -> int:
    """Carries out what the command line asks for, and returns the exit code."""
    if run.file is not None:
        return _init(run.file, run.workdir) if _first() else 0
    modes = importlib.import_module("ple_jax.modes")
    names = ("topology", "runs", "against", "accept", "profile")
    options = {name: value for name in names if (value := getattr(run, name))}
    with _processes(run) as leads, _to_the_end():
        return getattr(modes, run.mode)(run.config, run.workdir, run.backend, **options) if leads else 0


@contextlib.contextmanager
def _to_the_end() -> Iterator[None]:
    """Raises a UserError if the code inside ends the program: sys.exit(0) in a user's code must not pass for success."""
    try:
        yield
    except SystemExit as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        where = f"{last.filename}:{last.lineno}"
        raise UserError(f"{where} ended the program with sys.exit({error.code!r}); take that out") from error


def _init(file: Path, workdir: Path) -> int:
    copied = shipped.copy(file, workdir)
    module = Path(sys.argv[0]).name == "main.py"  # of `python -m ple_jax.main`
    program = "python -m ple_jax.main" if module else "ple_jax"
    print(f"wrote {copied}; every key, with its default and its meaning, is in {shipped.CONFIGS / 'default.py'}")
    print(f"{program} --config {copied} --workdir {Path('runs') / f'{workdir.resolve().name}_{file.stem}'}")
    return 0


def _processes(run: CommandLine) -> contextlib.AbstractContextManager[bool]:
    """Returns a context whose value says whether this process leads.

    Of several processes the first leads, and the others wait for what it has them do.

    Raises:
        UserError: the processes cannot be started as asked, or the mode is chat, which is one process.
    """
    if run.mode in ("plan", "compare", "replay"):
        several = run.backend == "jax" and launch.given(*run.launched) is not None
        if several:
            return contextlib.nullcontext(launch.number(run.launched[2]) == 0)
        return contextlib.nullcontext(_first())
    if run.backend == "torch":
        return importlib.import_module("torch_ascend.sharding").processes(run.config)
    if (asked := launch.given(*run.launched)) is None:  # jax is not imported yet
        return contextlib.nullcontext(True)
    if run.mode == "chat":
        raise UserError("--mode=chat is one process: start it alone, with --processes=1")
    return importlib.import_module("ple_jax.backend.processes").processes(asked, run.workdir, stop=ask)


def _first() -> bool:
    """Says whether this process is the first that torchrun has started, or the only one."""
    torchrun = "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    return not torchrun or os.environ.get("RANK", "0") == "0"


def cli() -> None:
    os.environ.update(ENVIRONMENT)
    # what a config names by its module is found where the command is given, as it is with `python -m`
    sys.path.append(str(Path.cwd()))
    # app.run insists on absl's own flags, of which this program offers none
    flags.FLAGS.mark_as_parsed()
    # warnings only: absl's default of INFO lets Orbax report every step of a checkpoint
    flags.FLAGS.verbosity = -1  # type: ignore[assignment]  # to absl a flag is of any type
    sys.stdout, sys.stderr = streams.lasting(sys.stdout), streams.lasting(sys.stderr)
    with one_line_errors(), Stop(at_once=True):
        app.run(one_line_errors()(main), flags_parser=one_line_errors()(parse))


if __name__ == "__main__":
    cli()
