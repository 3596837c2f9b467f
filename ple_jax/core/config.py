"""Validation of a config before anything expensive: what every key may hold, in one table."""

import importlib.util
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ple_jax.core.errors import UserError, suggestion

if TYPE_CHECKING:
    from ml_collections import ConfigDict

PACKAGE = Path(__file__).parent.parent
# dictionaries of the user's own, overridden whole
FREE = ("algorithm_kwargs", "reward.kwargs", "task.columns", "generate.second_kwargs", "compare.judge_kwargs")

# how a run is computed and not what: a run may go on, or be exported, with others
EXECUTION = (
    "model.layers", "model.attention", "model.remat", "model.device", "model.ops", "sampling.server_key_env",
    "sampling.server_sleep", "mesh.data", "mesh.fsdp", "mesh.tensor", "checkpoint.keep",
)  # fmt: skip

# keys that one backend alone reads, all of them "auto" by default
OWN = {"model.layers": "jax", "model.attention": "jax", "model.device": "torch", "model.ops": "torch"}

Rule = Callable[[Any], str]  # value -> what it must be instead, or "" when it is fine


def flatten(tree: Mapping[str, Any], prefix: str = "", *, whole: Collection[str] = FREE) -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys, in their order; empty ones, and those that `whole` names, are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        deeper = isinstance(value, Mapping) and value and name not in whole
        flat |= flatten(value, f"{name}.", whole=whole) if deeper else {name: value}
    return flat


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ, or that only one has, sorted. Tuples equal lists: one side may be from JSON."""
    flat_a, flat_b = (flatten(json.loads(json.dumps(tree))) for tree in (a, b))
    missing = object()
    return sorted(k for k in flat_a | flat_b if flat_a.get(k, missing) != flat_b.get(k, missing))


def names(folder: str, suffix: str) -> list[str]:
    """What can be named without a path: the files of a folder of the package, without suffix, sorted."""
    return sorted(p.stem for p in (PACKAGE / folder).glob(f"*{suffix}") if not p.stem.startswith("_"))


def find(folder: str, suffix: str, name: str) -> Path | None:
    """The file that a name without a path stands for; None where `names` does not have it."""
    return PACKAGE / folder / f"{name}{suffix}" if name in names(folder, suffix) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(low: int, high: float = math.inf) -> Rule:
    says = f"a whole number, at least {low}" + (f" and below {high}" if high < math.inf else "")
    return lambda v: "" if type(v) is int and low <= v < high else says


def _real(test: Callable[[float], bool], says: str, *, infinite: bool = False) -> Rule:
    # NaN fails here: it is not finite, and no comparison with it holds
    return lambda v: "" if _is_number(v) and test(v) and (infinite or math.isfinite(v)) else f"a number {says}"


def _choice(*options: str) -> Rule:
    return lambda v: "" if v in options else f"one of {', '.join(options)}{suggestion(str(v), options)}"


def _tuple(each: Rule, *, empty: bool = False) -> Rule:
    def rule(value: Any) -> str:
        if not isinstance(value, tuple | list) or not (value or empty):
            return "a tuple" if empty else "a tuple with at least one entry"
        wrong = next(((v, says) for v in value if (says := each(v))), None)
        return f"a tuple such as \"('a','b')\", where its entry {wrong[0]!r} must be {wrong[1]}" if wrong else ""

    return rule


def _optional(rule: Rule) -> Rule:
    """Unset, or what `rule` allows."""
    return lambda value: "" if value is None else rule(value)


def _flag(value: Any) -> str:
    return "" if isinstance(value, bool) else "True or False"


def _text(value: Any) -> str:
    return "" if isinstance(value, str) and value else "a name"


def _free(value: Any) -> str:
    says = "a dictionary of plain values without NaN, by argument name: \"{'k': 1}\""
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        return says
    try:
        json.dumps(value, allow_nan=False)
        return ""
    except (TypeError, ValueError):
        return says


def _is_path(value: str) -> bool:
    return "/" in value or bool(Path(value).suffix)


def _named(known: list[str], *, file: str = "", folder: bool = False, code: bool = False) -> Rule:
    """One of the `known` names, or a path.

    Args:
      known: names that need no path.
      file: what a path leads to, in words; without it paths are not allowed.
      folder: whether it may lead to a folder.
      code: whether `package.module`, `package.module:function`, `file.py` and `file.py:function` are allowed.
    """

    def rule(value: Any) -> str:
        if not isinstance(value, str):
            return f"one of {', '.join(known)}"
        if value in known or (file and value and (Path(value).is_file() or (folder and Path(value).is_dir()))):
            return ""
        module = value.split(":", 1)[0]
        if code and module.endswith(".py"):
            return "" if Path(module).is_file() else f"an existing Python file (looked in {Path.cwd()})"
        # only the first part is looked up: finding a submodule would import its package
        if code and ("." in module or ":" in value) and all(part.isidentifier() for part in module.split(".")):
            found = importlib.util.find_spec(module.split(".", 1)[0]) is not None
            return "" if found else f"a dotted path into an installed package; {module.split('.', 1)[0]!r} is not one"
        if file and _is_path(value):
            return f"an existing {file} (looked in {Path.cwd()}), or one of {', '.join(known)}"
        more = "a Python file, a dotted path" if code else f"the path of a {file}"
        return f"one of {', '.join(known)}, or {more}{suggestion(value, known)}"

    return rule


def _source(value: Any) -> str:
    """A hub is asked when the records are loaded."""
    if isinstance(value, str) and is_hub_id(value) and not value.endswith((".jsonl", ".json", ".csv", ".parquet", ".gz")):
        return ""
    local = _named(names("data", ".jsonl"), file="file of records", folder=True)(value)
    return f"{local}, or a data set on a hub, user/name" if local else ""


def _words(value: Any) -> str:
    fine = isinstance(value, tuple | list) and len(value) == 2 and all(type(v) is int for v in value)
    return "" if fine and 1 <= value[0] <= value[1] else "(fewest, most) words, such as \"(2, 8)\""


def _columns(value: Any) -> str:
    fine = isinstance(value, Mapping) and all(isinstance(v, str) and v for v in (*value, *value.values()))
    known = ("id", "prompt", "completion", "chosen", "rejected", "messages", "tools")
    if not fine:
        return "a dictionary, our name -> the data's: \"{'prompt': 'question'}\""
    unknown = [key for key in value if key not in known]
    return f"of the columns {', '.join(known)}; {unknown[0]!r} is none{suggestion(unknown[0], known)}" if unknown else ""


def _principles(value: Any) -> str:
    """Several are joined with +, unless that is a file's name."""
    rule = _named(names("prompts/principles", ".txt"), file="text file")
    if not isinstance(value, str) or Path(value).is_file():
        return rule(value)
    return next((says for part in value.split("+") if (says := rule(part.strip()))), "")


def _optional_adapter(value: Any) -> str:
    files = ("adapter_config.json", "adapter_model.safetensors")
    fine = value is None or (isinstance(value, str) and all((Path(value) / file).is_file() for file in files))
    return "" if fine else f"unset or a folder with {' and '.join(files)} (looked in {Path.cwd()})"


def _targets(value: Any) -> str:
    """Names are checked against the model's modules, which differ between families, when it is loaded."""
    names = isinstance(value, tuple | list) and value and all(isinstance(v, str) and v for v in value)
    if not names or ("all-linear" in value and len(value) > 1):
        return "a tuple of module names, \"('q_proj','v_proj')\", or \"('all-linear',)\""
    return ""


def _patterns(each: Rule) -> Rule:
    says = "a tuple of (regular expression, value) pairs: \"(('mlp.down_proj', 16),)\""  # ConfigDict has no keys with dots

    def rule(value: Any) -> str:
        if not isinstance(value, tuple | list) or not all(isinstance(v, tuple | list) and len(v) == 2 for v in value):
            return says
        for key, number in value:
            try:
                re.compile(key)
            except (TypeError, re.error) as error:
                return f"{says}; {key!r} is no regular expression ({error})"
            if wrong := each(number):
                return f"{says}, where {key!r} must have {wrong}"
        return ""

    return rule


def is_hub_id(value: str) -> bool:
    """Whether it reads like user/name; a file's suffix is none."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", value) is not None and not value.endswith((".gguf", ".safetensors"))


def _optional_repository(value: Any) -> str:
    fine = value is None or (isinstance(value, str) and is_hub_id(value))
    return "" if fine else "unset or a hub repository, user/name"


def _optional_server(value: Any) -> str:
    says = "unset or the address of a server, http://host:port"
    if value is None:
        return ""
    try:
        parts = urlsplit(value)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and parts.port != 0
    except (ValueError, TypeError, AttributeError):  # no text, or a port that is no number
        return says
    if parts.username is not None:  # it would be shown and written down
        return f"{says}, without a user name: name an environment variable with the key as sampling.server_key_env"
    return "" if fine else says


def _optional_variable(value: Any) -> str:
    fine = value is None or (isinstance(value, str) and value.isidentifier())
    return "" if fine else "unset or the name of an environment variable"


def _model(value: Any) -> str:
    """A hub is asked when the model is loaded."""
    if isinstance(value, str) and is_hub_id(value):
        return ""
    local = _named(["smollm2-135m", "tiny", *PUBLISHED], file=".gguf file or Hugging Face folder", folder=True)(value)
    return f"{local}, or a model on a hub, user/name" if local else ""


def _revision(value: Any) -> str:
    fine = value is None or (isinstance(value, str) and re.fullmatch(r"\w[\w./+@-]*", value) and ".." not in value)
    return "" if fine else "unset or a branch, tag or commit of a model on a hub"


_reward = _named(names("rewards", ".py"), code=True)
# well-known models of which only the config.json is here: for planning
PUBLISHED = names("models/published", ".json")
_positive = _real(lambda v: v > 0, "above 0")
_not_negative = _real(lambda v: v >= 0, "of at least 0")
_share = _real(lambda v: 0 <= v <= 1, "from 0 to 1")

RULES: dict[str, Rule] = {
    "seed": _whole(0, 2**32),
    "algorithm": _named(names("algorithms", ".py"), code=True),
    "algorithm_kwargs": _free,
    "trainer": _choice("own", "trl"),
    "iterations": _whole(1),
    "queries_per_iteration": _whole(1),
    "model.path": _model,
    "model.revision": _revision,
    "model.dtype": _choice("float32", "bfloat16"),
    "model.quantize": _choice("none", "int8", "nf4"),
    "model.layers": _choice("auto", "scan", "unroll"),
    "model.attention": _choice("auto", "xla", "cudnn", "splash"),
    "model.remat": _choice("none", "dots", "full"),
    "model.device": _choice("auto", "cpu", "cuda", "npu"),
    "model.ops": _choice("auto", "reference", "npu"),
    "model.adapter": _optional_adapter,
    "lora.rank": _whole(1),
    "lora.alpha": _positive,
    "lora.targets": _targets,
    "lora.rank_pattern": _patterns(_whole(1)),
    "lora.alpha_pattern": _patterns(_positive),
    "lora.rslora": _flag,
    "lora.dora": _flag,
    "lora.dropout": _real(lambda v: 0 <= v < 1, "of at least 0 and below 1"),
    "task.train": _source,
    "task.heldout": _source,
    "task.train_split": _text,
    "task.heldout_split": _text,
    "task.subsets": _tuple(_text, empty=True),
    "task.format": _choice("records", "hh", "imdb", "tldr"),
    "task.columns": _columns,
    "task.words": _words,
    "task.streaming": _flag,
    "task.max_train": _whole(0),
    "task.max_heldout": _whole(0),
    "task.max_bad_share": _share,
    "task.chat": _flag,
    "task.thinking": _flag,
    "task.max_prompt_tokens": _whole(1),
    "principles": _principles,
    "principles_per_query": _whole(0),
    "reward.name": _reward,
    "reward.kwargs": _free,
    "reward.max_bad_share": _share,
    "reward.transform": _choice("none", "sigmoid", "zscore", "minmax"),
    "sampling.max_new_tokens": _whole(1),
    "sampling.temperature": _real(lambda v: v == 0 or v >= 1e-6, "of at least 1e-6, or 0 (0 is greedy)"),
    "sampling.top_k": _whole(0),
    "sampling.top_p": _real(lambda v: 0 < v <= 1, "above 0 and at most 1 (1 is off)"),
    "sampling.min_p": _real(lambda v: 0 <= v < 1, "of at least 0 and below 1 (0 is off)"),
    "sampling.width": _whole(1),
    "sampling.bucket": _whole(1),
    "sampling.server": _optional_server,
    "sampling.server_key_env": _optional_variable,
    "sampling.server_sleep": _flag,
    "ple.schedule": _choice("exponential", "constant", "linear", "cosine"),
    # below 0 a worse response would be ranked above a better one
    "ple.tau_0": _real(lambda v: v >= 0, "of at least 0 (inf blends every pair)", infinite=True),
    "ple.alpha": _real(lambda v: 0 < v <= 1, "above 0 and at most 1 (1 keeps the threshold constant)"),
    "ple.selection": _choice("threshold", "symmetric", "percentile"),
    "ple.rank": _choice("hinge", "hinge_prob", "sigmoid", "dpo"),
    "ple.rank_margin": _not_negative,
    "ple.rank_beta": _positive,
    "ple.rank_weight": _not_negative,
    "ple.rank_sft_weight": _not_negative,
    "ple.blend": _choice("softmax", "sigmoid", "uniform", "best"),
    "ple.blend_temperature": _positive,
    "ple.blend_weight": _not_negative,
    "ple.length_norm": _choice("batch", "response"),
    "ple.percentile": _tuple(_real(lambda v: 0 < v <= 1, "above 0 and at most 1")),
    "ple.percentile_temperature": _positive,
    "ple.percentile_weights": _choice("as_intended", "as_released"),
    "ple.samples": _whole(2),
    "raft.samples": _whole(2),
    "dpo.samples": _whole(0),
    "dpo.loss": _choice("sigmoid", "ipo"),
    "dpo.beta": _positive,
    "dpo.label_smoothing": _real(lambda v: 0 <= v < 0.5, "of at least 0 and below 0.5"),
    "grpo.samples": _whole(2),
    "grpo.loss": _choice("grpo", "dr_grpo", "dapo"),
    "grpo.beta": _not_negative,
    "grpo.clip_low": _positive,
    "grpo.clip_high": _positive,
    "rloo.samples": _whole(2),
    "rloo.beta": _not_negative,
    "rloo.clip": _positive,
    "ppo.samples": _whole(1),
    "ppo.clip": _positive,
    "ppo.value_clip": _positive,
    "ppo.value_weight": _not_negative,
    "ppo.gamma": _share,
    "ppo.lam": _share,
    "ppo.kl": _choice("fixed", "adaptive"),
    "ppo.kl_coefficient": _not_negative,
    "ppo.kl_estimator": _choice("k1", "k2", "k3"),
    "ppo.kl_target": _positive,
    "ppo.kl_horizon": _whole(1),
    "ppo.whiten_rewards": _flag,
    "ppo.whiten_advantages": _flag,
    "ppo.missing_eos_penalty": _not_negative,
    "self_distillation.clip": _positive,
    "reward_model.train": _choice("lora", "head"),
    "reward_model.epochs": _whole(1),
    "reward_model.max_tokens": _whole(2),
    "reward_model.eval_every": _whole(1),
    "optimizer.lr": _positive,
    "optimizer.warmup_steps": _whole(0),
    "optimizer.weight_decay": _not_negative,
    "optimizer.clip_norm": _positive,
    "optimizer.batch_queries": _whole(1),
    "optimizer.micro_queries": _whole(1),
    "optimizer.epochs": _whole(1),
    "sft.data": _optional(_source),
    "sft.epochs": _whole(1),
    "sft.lr": _positive,
    "eval.every": _whole(1),
    "eval.samples": _whole(1),
    "eval.diagnostic_queries": _whole(1),
    "generate.policy": _choice("trained", "start"),
    "generate.principled": _flag,
    "generate.data": _optional(_source),
    "generate.split": _text,
    "generate.max_queries": _whole(0),
    "generate.samples": _whole(1),
    "generate.second_reward": _optional(_reward),
    "generate.second_kwargs": _free,
    "compare.baseline": _optional(_text),
    "compare.judge": _named(["reward", "endpoint", "model"], code=True),
    "compare.judge_kwargs": _free,
    "compare.judge_queries": _whole(0),
    "compare.judge_samples": _whole(0),
    "compare.examples": _whole(0),
    "mesh.data": _whole(1),
    "mesh.fsdp": _whole(1),
    "mesh.tensor": _whole(1),
    "checkpoint.keep": _whole(1),
    "export.merged": _flag,
    "export.dtype": _choice("keep", "float32", "bfloat16", "float16"),
    "export.shard_gb": _positive,
    "export.push": _optional_repository,
    "export.private": _flag,
    "sinks": _tuple(_choice("jsonl", "tensorboard", "wandb", "mlflow", "trackio"), empty=True),
}

_MULTIPLES = (  # (key, the keys whose product divides it, why)
    (
        "queries_per_iteration",
        ("optimizer.batch_queries",),
        "a remainder would be a smaller optimiser batch, whose queries would weigh more",
    ),
    ("optimizer.batch_queries", ("optimizer.micro_queries",), "gradients accumulate over passes of one size"),
    ("optimizer.micro_queries", ("mesh.data", "mesh.fsdp"), "the queries of a pass are split over these devices"),
    ("sampling.width", ("mesh.data", "mesh.fsdp"), "the rows decoded at once are split over these devices"),
)


def validate(config: "ConfigDict") -> None:
    """Checks every key, then the keys that must fit one another; reads no file and imports nothing heavy.

    Args:
      config: a whole config, as `configs/default.py` lays it out.

    Raises:
      UserError: one line with the key, its value, what is valid and what to do.
    """
    flat = flatten(config.to_dict())
    for key in flat:
        if key not in RULES:
            raise UserError(f"config.{key} is not a known key{suggestion(key, RULES)} (all are in configs/default.py)")
    for key, rule in RULES.items():
        if key not in flat:
            raise UserError(f"config.{key} is missing; start the config file from configs/default.py's get_config()")
        if says := rule(flat[key]):
            raise UserError(f"config.{key} is {flat[key]!r} but must be {says} (set it with --config.{key}=VALUE)")
    for key, divisors, why in _MULTIPLES:
        value, divisor = flat[key], math.prod(flat[d] for d in divisors)
        if value % divisor:
            low = value - value % divisor
            fits = f"{low} or {low + divisor}" if low else f"{divisor}"
            product = " * ".join(f"config.{d}" for d in divisors) + f" = {divisor}"
            raise UserError(f"config.{key} is {value} but must be a multiple of {product}: {why}; use {fits}")
    unserved = ("lora.dora", "lora.rank_pattern", "lora.alpha_pattern")
    if flat["sampling.server"] is not None and (wrong := [key for key in unserved if flat[key]]):
        raise UserError(
            f"config.{wrong[0]} is {flat[wrong[0]]!r}, and vLLM serves no DoRA adapter, and in many versions one rank and"
            " alpha for all modules: unset it or config.sampling.server"
        )
