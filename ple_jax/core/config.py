"""Validation of a config before anything expensive: what every key may hold, in one table."""

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ple_jax.core.errors import SLIP, UserError, suggestion
from ple_jax.core.rules import (
    Rule,
    auto_or,
    choice,
    coefficient,
    day,
    flag,
    free,
    many,
    named,
    not_negative,
    optional,
    patterns,
    positive,
    real,
    scale,
    share,
    text,
    whole,
    written,
)
from ple_jax.core.secrets import shown

if TYPE_CHECKING:
    from ml_collections import ConfigDict

PACKAGE = Path(__file__).parent.parent
# dictionaries of the user's own, overridden whole
FREE = (
    "algorithm_kwargs", "reward.kwargs", "task.columns", "task.sets", "eval.second_kwargs", "generate.second_kwargs",
    "compare.judge_kwargs",
)  # fmt: skip

# keys that one backend alone reads, all of them "auto" by default
OWN = {"model.layers": "jax", "model.attention": "jax", "model.device": "torch", "model.ops": "torch"}


# keys that name what a finished run has read, and a replay does not
OF_FILES = (
    "task.train", "task.heldout", "task.sets", "principles", "model.path", "model.adapter", "warm_up.data", "reward.name",
    "eval.second_reward", "eval.second_kwargs", "harness.include",
)  # fmt: skip

# keys that are fitted to a device's memory where they are "auto", when a run begins
AUTO = ("sampling.width", "optimizer.micro_queries")


def flatten(tree: Mapping[str, Any], prefix: str = "", *, whole: Collection[str] = FREE) -> dict[str, Any]:
    """Flattens nested dictionaries into one with dotted keys, in their order.

    Empty dictionaries, and those that `whole` names, are kept as values.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        deeper = isinstance(value, Mapping) and value and name not in whole
        flat |= flatten(value, f"{name}.", whole=whole) if deeper else {name: value}
    return flat


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Returns the dotted keys whose values differ, or that only one side has, sorted.

    Tuples equal lists, since one side may come from JSON.
    """
    flat_a, flat_b = (flatten(json.loads(json.dumps(tree))) for tree in (a, b))
    missing = object()
    return sorted(k for k in flat_a | flat_b if flat_a.get(k, missing) != flat_b.get(k, missing))


def names(folder: str, suffix: str) -> list[str]:
    """Returns what can be named without a path: the files of a folder of the package, without suffix, sorted.

    Files whose name begins with an underscore are left out.
    """
    return sorted(p.stem for p in (PACKAGE / folder).glob(f"*{suffix}") if not p.stem.startswith("_"))


def chosen(config: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those keys of a flat config.json whose values are not the defaults.

    Left out are keys that the defaults do not have, and those that the defaults leave to the machine or the day: a run has
    filled them in.

    Args:
        config: the contents of config.json, flattened.
        usual: the defaults, flattened likewise and with lists for tuples.
    """
    filled = {key for key, value in usual.items() if value == "auto"} | {"task.date"}
    return {key: value for key, value in config.items() if key in usual and key not in filled and value != usual[key]}


def find(folder: str, suffix: str, name: str) -> Path | None:
    """Returns the file that a name without a path stands for; None if it is not among `names`."""
    return PACKAGE / folder / f"{name}{suffix}" if name in names(folder, suffix) else None


def _source(value: Any) -> str:
    """Checks a data source: a name, a path, or user/name on a hub. A hub is only asked when the records are loaded."""
    if isinstance(value, str) and is_hub_id(value) and not value.endswith((".jsonl", ".json", ".csv", ".parquet", ".gz")):
        return ""
    local = named(names("data", ".jsonl"), file="file of records", folder=True)(value)
    return _or(local, "a data set on a hub, user/name") if local else ""


def _or(says: str, more: str) -> str:
    """Adds another possibility to what a rule says, before its suggestion."""
    first, *nearest = says.split("; did you mean", 1)
    return "; did you mean".join([f"{first}, or {more}", *nearest])


def _words(value: Any) -> str:
    fine = isinstance(value, tuple | list) and len(value) == 2 and all(type(v) is int for v in value)
    return "" if fine and 1 <= value[0] <= value[1] else '(fewest, most) words, such as "(2, 8)"'


def _folder(value: Any) -> str:
    return "" if isinstance(value, str) and os.path.isdir(value) else f"a folder (looked in {Path.cwd()})"


def _columns(value: Any) -> str:
    fine = isinstance(value, Mapping) and all(isinstance(v, str) and v for v in (*value, *value.values()))
    known = ("id", "prompt", "completion", "chosen", "rejected", "messages", "tools")
    if not fine:
        return "a dictionary, our name -> the data's: \"{'prompt': 'question'}\""
    # others are what a reward reads; one that is nearly ours is a slip
    unknown = [key for key in value if key not in known and (suggestion(key, known, least=SLIP) or not key.isidentifier())]
    if not unknown:
        return ""
    said = f"of {', '.join(known)}, or of names that a reward reads; {unknown[0]!r} is none"
    return f"{said}{suggestion(unknown[0], known)}"


def _sets(value: Any) -> str:
    """Checks the sets of config.task.sets. The keys of a set must follow the rules of the same keys of config.task."""
    if not isinstance(value, Mapping) or not all(isinstance(of, Mapping) for of in value.values()):
        return "a dictionary, name -> keys of the set: \"{'films': {'train': 'a.jsonl', 'heldout': 'b.jsonl'}}\""
    for name, of in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name):
            return f"of names of letters, digits, _ and -, and {name!r} is none"
        for key, own in of.items():
            rule = positive if key == "weight" else RULES.get(f"task.{key}") if key in _OF_A_SET else None
            if rule is None:
                known = ("weight", *_OF_A_SET)
                return f"of sets with {', '.join(known)}; {key!r} of {name!r} is none{suggestion(str(key), known)}"
            if says := written(own) or rule(own):
                return f"of sets whose {key} is {says}; that of {name!r} is {shown(own)}"
        if lacking := [key for key in ("train", "heldout") if key not in of]:
            return f"of sets with train and heldout; {name!r} has no {lacking[0]}"
    return ""


_OF_A_SET = (
    "train", "heldout", "train_split", "heldout_split", "subsets", "format", "columns", "words", "streaming", "max_train",
    "max_heldout",
)  # fmt: skip


def _principles(value: Any) -> str:
    """Checks names or paths of principles. Several are joined with +, unless the whole value is a file's name."""
    rule = named(names("prompts/principles", ".txt"), file="text file")
    if not isinstance(value, str) or os.path.isfile(value):
        return rule(value)
    return next((says for part in value.split("+") if (says := rule(part.strip()))), "")


def _optional_adapter(value: Any) -> str:
    files = ("adapter_config.json", "adapter_model.safetensors")
    fine = value is None or (isinstance(value, str) and all(os.path.isfile(Path(value) / file) for file in files))
    return "" if fine else f"unset or a folder with {' and '.join(files)} (looked in {Path.cwd()})"


def _targets(value: Any) -> str:
    """Checks the form of module names. Whether the model has them, which differs by family, is checked when it is loaded."""
    names = isinstance(value, tuple | list) and value and all(isinstance(v, str) and v for v in value)
    if not names or ("all-linear" in value and len(value) > 1):
        return "a tuple of module names, \"('q_proj','v_proj')\", or \"('all-linear',)\""
    return ""


def is_hub_id(value: str) -> bool:
    """Says whether a text looks like user/name on a hub; one that ends in .gguf or .safetensors is a file and does not."""
    named = re.fullmatch(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", value)
    return named is not None and not value.endswith((".gguf", ".safetensors"))


def _optional_repository(value: Any) -> str:
    fine = value is None or (isinstance(value, str) and is_hub_id(value))
    return "" if fine else "unset or a hub repository, user/name"


def _optional_servers(value: Any) -> str:
    if not isinstance(value, tuple | list):
        return _optional_server(value)
    if not value or None in value or len(set(value)) < len(value):
        return "unset, an address, or a tuple of different ones, \"('http://a:8000','http://b:8000')\""
    return next(filter(None, map(_optional_server, value)), "")


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


def _checkpoint(value: Any) -> str:
    fine = isinstance(value, str) and re.fullmatch(r"best|newest|kl_\d\S*", value)
    return "" if fine else "best, newest, or kl_ and one of config.eval.max_kl: kl_4"


def _model(value: Any) -> str:
    """Checks a model: a name, a path, or user/name on a hub. A hub is only asked when the model is loaded."""
    if isinstance(value, str) and (is_hub_id(value) or value in PUBLISHED):
        return ""
    local = named(["smollm2-135m", "tiny"], file=".gguf file or Hugging Face folder", folder=True)(value)
    shapes = f"a model on a hub, user/name; for --mode=plan --topology also the shapes of {', '.join(PUBLISHED)}"
    return f"{_or(local, shapes)}{suggestion(str(value), PUBLISHED)}" if local else ""


def _revision(value: Any) -> str:
    fine = value is None or (isinstance(value, str) and re.fullmatch(r"\w[\w./+@-]*", value) and ".." not in value)
    return "" if fine else "unset or a branch, tag or commit of a model on a hub"


# bounds that no sane value reaches: of what is held in memory at once for every query or weight, of what is counted in a
# run, and of what int32 has room for
FEW, MANY, LARGE = 2**14, 2**20, 2**31
_reward = named(names("rewards", ".py"), code=True)
# well-known models of which only the config.json is here: for planning
PUBLISHED = names("models/published", ".json")

RULES: dict[str, Rule] = {
    "seed": whole(0, 2**32),
    "algorithm": named(names("algorithms", ".py"), code=True),
    "algorithm_kwargs": free,
    "trainer": choice("own", "trl"),
    "iterations": whole(1, MANY),
    "queries_per_iteration": whole(1, MANY),
    "model.path": _model,
    "model.revision": _revision,
    "model.dtype": choice("auto", "float32", "bfloat16"),
    "model.quantize": choice("none", "int8", "nf4"),
    "model.layers": choice("auto", "scan", "unroll"),
    "model.attention": choice("auto", "xla", "cudnn", "splash"),
    "model.remat": choice("none", "dots", "full"),
    "model.compile_cache": flag,
    "model.device": choice("auto", "cpu", "cuda", "npu"),
    "model.ops": choice("auto", "reference", "npu"),
    "model.adapter": _optional_adapter,
    "lora.rank": whole(1, FEW),
    "lora.alpha": scale,
    "lora.targets": _targets,
    "lora.rank_pattern": patterns(whole(1, FEW)),
    "lora.alpha_pattern": patterns(scale),
    "lora.rslora": flag,
    "lora.dora": flag,
    "lora.dropout": real(lambda v: 0 <= v < 1, "of at least 0 and below 1"),
    "task.train": _source,
    "task.heldout": _source,
    "task.sets": _sets,
    "task.train_split": text,
    "task.heldout_split": text,
    "task.subsets": many(text, empty=True),
    "task.format": choice("records", "hh", "imdb", "tldr"),
    "task.columns": _columns,
    "task.words": _words,
    "task.streaming": flag,
    "task.max_train": whole(0, LARGE),
    "task.max_heldout": whole(0, LARGE),
    "task.max_bad_share": share,
    "task.chat": flag,
    "task.thinking": flag,
    "task.max_prompt_tokens": whole(1, MANY),
    "task.max_answer_tokens": whole(1, MANY),
    "task.date": optional(day),
    "principles": _principles,
    "principles_per_query": whole(0, LARGE),
    "reward.name": _reward,
    "reward.kwargs": free,
    "reward.max_bad_share": share,
    "reward.length_penalty": coefficient,
    "reward.transform": choice("none", "sigmoid", "zscore", "minmax", "shuffle"),
    "sampling.max_new_tokens": whole(1, MANY),
    "sampling.temperature": real(lambda v: v == 0 or 1e-6 <= v <= 1e6, "from 1e-6 to 1e6, or 0 (0 is greedy)"),
    "sampling.top_k": whole(0, LARGE),
    # of less float32 keeps 0, and no token would be left
    "sampling.top_p": real(lambda v: 1e-6 <= v <= 1, "from 1e-6 to 1 (1 is off)"),
    "sampling.min_p": real(lambda v: 0 <= v < 1, "of at least 0 and below 1 (0 is off)"),
    "sampling.width": auto_or(whole(1, FEW)),
    "sampling.bucket": whole(1, MANY),
    "sampling.importance_cap": real(lambda v: v == 0 or v >= 1, "of at least 1, or 0 (0 is off)"),
    "sampling.fold_adapter": flag,
    "sampling.server": _optional_servers,
    "sampling.server_key_env": _optional_variable,
    "sampling.server_sleep": flag,
    "ple.schedule": choice("exponential", "constant", "linear", "cosine"),
    # below 0 a worse response would be ranked above a better one
    "ple.tau_0": real(lambda v: v >= 0, "of at least 0 (inf blends every pair)", infinite=True),
    "ple.alpha": real(lambda v: 0 < v <= 1, "above 0 and at most 1 (1 keeps the threshold constant)"),
    "ple.selection": choice("threshold", "symmetric", "percentile"),
    "ple.rank": choice("hinge", "hinge_prob", "sigmoid", "dpo"),
    "ple.rank_margin": coefficient,
    "ple.rank_beta": scale,
    "ple.rank_weight": coefficient,
    "ple.rank_sft_weight": coefficient,
    "ple.blend": choice("softmax", "sigmoid", "uniform", "best"),
    "ple.blend_temperature": scale,
    "ple.blend_weight": coefficient,
    "ple.kl_weight": coefficient,
    "ple.candidates": whole(1, FEW),
    "ple.length_norm": choice("mean", "response"),
    "ple.percentile": many(real(lambda v: 0 < v <= 1, "above 0 and at most 1")),
    "ple.percentile_temperature": scale,
    "ple.percentile_weights": choice("as_intended", "as_released"),
    "ple.samples": whole(2, FEW),
    "raft.samples": whole(2, FEW),
    "dpo.samples": whole(0, FEW),
    "dpo.loss": choice("sigmoid", "ipo"),
    "dpo.beta": scale,
    "dpo.label_smoothing": real(lambda v: 0 <= v < 0.5, "of at least 0 and below 0.5"),
    "grpo.samples": whole(2, FEW),
    "grpo.loss": choice("grpo", "dr_grpo", "dapo"),
    "grpo.beta": coefficient,
    "grpo.clip_low": positive,
    "grpo.clip_high": positive,
    "rloo.samples": whole(2, FEW),
    "rloo.beta": coefficient,
    "rloo.clip": positive,
    "ppo.samples": whole(1, FEW),
    "ppo.clip": positive,
    "ppo.value_clip": positive,
    "ppo.value_weight": coefficient,
    "ppo.gamma": share,
    "ppo.lam": share,
    "ppo.kl": choice("fixed", "adaptive"),
    "ppo.kl_coefficient": coefficient,
    "ppo.kl_estimator": choice("k1", "k2", "k3"),
    "ppo.kl_target": positive,
    "ppo.kl_horizon": whole(1, LARGE),
    "ppo.whiten_rewards": flag,
    "ppo.whiten_advantages": flag,
    "ppo.missing_eos_penalty": coefficient,
    "self_distillation.clip": positive,
    "reward_model.train": choice("lora", "head"),
    "reward_model.max_tokens": whole(2, MANY),
    "offline.epochs": whole(1, MANY),
    "offline.eval_every": whole(1, MANY),
    "optimizer.lr": positive,
    "optimizer.warmup_steps": whole(0, LARGE),
    "optimizer.schedule": choice("constant", "linear", "cosine"),
    "optimizer.weight_decay": not_negative,
    "optimizer.clip_norm": positive,
    "optimizer.batch_queries": whole(1, MANY),
    "optimizer.micro_queries": auto_or(whole(1, MANY)),
    "optimizer.epochs": whole(1, MANY),
    "warm_up.data": optional(_source),
    "warm_up.epochs": whole(1, MANY),
    "warm_up.lr": positive,
    "eval.every": whole(1, MANY),
    "eval.points": whole(1, MANY),
    "eval.samples": whole(1, FEW),
    "eval.second_reward": optional(_reward),
    "eval.second_kwargs": free,
    "eval.best": choice("reward", "second", "none"),
    "eval.max_kl": many(positive, empty=True),
    "eval.stop": flag,
    "eval.patience": whole(0, MANY),
    "eval.diagnostic_queries": whole(1, MANY),
    "generate.policy": choice("trained", "start"),
    "generate.principled": flag,
    "generate.data": optional(_source),
    "generate.split": text,
    "generate.max_queries": whole(0, LARGE),
    "generate.samples": whole(1, FEW),
    "generate.second_reward": optional(_reward),
    "generate.second_kwargs": free,
    "compare.baseline": optional(text),
    "compare.judge": named(["reward", "endpoint", "model"], code=True),
    "compare.judge_kwargs": free,
    "compare.judge_queries": whole(0, LARGE),
    "compare.judge_samples": whole(0, LARGE),
    "compare.examples": whole(0, LARGE),
    "compare.note": optional(text),
    "harness.tasks": many(text, empty=True),
    "harness.include": optional(_folder),
    "harness.limit": whole(0, LARGE),
    "harness.fewshot": optional(whole(0, 1000)),
    "harness.policies": many(choice("start", "trained")),
    "probe.queries": whole(0, LARGE),
    "probe.samples": whole(2, LARGE),
    "probe.again": whole(0, LARGE),
    "mesh.data": whole(1, MANY),
    "mesh.fsdp": whole(1, MANY),
    "mesh.tensor": whole(1, MANY),
    "checkpoint.keep": whole(1, MANY),
    "checkpoint.use": _checkpoint,
    "export.merged": flag,
    "export.dtype": choice("keep", "float32", "bfloat16", "float16"),
    "export.shard_gb": scale,
    "export.push": _optional_repository,
    "export.private": flag,
    "sinks": many(choice("jsonl", "tensorboard", "wandb", "mlflow", "trackio"), empty=True),
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
      UserError: a value is wrong; one line with the key, its value, what is valid and what to do.
    """
    flat = flatten(config.to_dict())
    for key in flat:
        if key not in RULES:
            raise UserError(f"config.{key} is not a known key{suggestion(key, RULES)} (all are in configs/default.py)")
    for key, rule in RULES.items():
        if key not in flat:
            raise UserError(f"config.{key} is missing; start the config file from configs/default.py's get_config()")
        if says := written(flat[key]) or rule(flat[key]):
            raise UserError(f"config.{key} is {shown(flat[key])} but must be {says} (set it with --config.{key}=VALUE)")
    for key, divisors, why in _MULTIPLES:
        if flat[key] == "auto":
            continue
        if "auto" in (flat[d] for d in divisors):  # it will be a multiple of these
            divisors = ("mesh.data", "mesh.fsdp")
        value, divisor = flat[key], math.prod(flat[d] for d in divisors)
        if value % divisor:
            low = value - value % divisor
            fits = f"{low} or {low + divisor}" if low else f"{divisor}"
            product = " * ".join(f"config.{d}" for d in divisors) + f" = {divisor}"
            raise UserError(f"config.{key} is {value} but must be a multiple of {product}: {why}; use {fits}")
    for key in ("optimizer.lr", "warm_up.lr"):
        lr, decay = flat[key], flat["optimizer.weight_decay"]
        if lr * decay >= 1 and decay > 1:  # an lr that is too large by itself shows when it is used
            raise UserError(
                f"config.optimizer.weight_decay is {decay:g} and config.{key} {lr:g}: a step would take {lr * decay:g} times"
                " every weight from itself; usual are 0 to 0.1"
            )
    for check in (_not_served, _not_folded, _not_under_a_head, _learns_nothing, _never_warm, _keeps_no_best, _unread):
        if wrong := check(flat):
            raise UserError(wrong)


def _not_served(flat: Mapping[str, Any]) -> str:
    """Returns the error for a setting that a rollout server does not support; "" if there is none."""
    if flat["sampling.server"] is None:
        return ""
    heat, cap = flat["sampling.temperature"], flat["sampling.importance_cap"]
    if cap and heat not in (0, 1):
        return (
            f"config.sampling.importance_cap is {cap:g} and config.sampling.temperature {heat:g}: the log-probabilities of a"
            " server are of temperature 1, and every weight would be wrong; set config.sampling.temperature=1, or the cap 0"
        )
    unserved = ("lora.dora", "lora.rank_pattern", "lora.alpha_pattern")
    if wrong := [key for key in unserved if flat[key]]:
        return (
            f"config.{wrong[0]} is {flat[wrong[0]]!r}, and vLLM serves no DoRA adapter, and in many versions one rank and"
            " alpha for all modules: unset it or config.sampling.server"
        )
    return ""


def _not_under_a_head(flat: Mapping[str, Any]) -> str:
    """Returns the error for an adapter to start from that a head trained alone would not have; "" if there is none."""
    if flat["algorithm"].removeprefix("ple_jax.algorithms.") != "reward" or flat["model.adapter"] is None:
        return ""
    if flat["reward_model.train"] != "head":
        return ""
    return (
        "config.model.adapter is set and config.reward_model.train is 'head', which trains a head on the base alone: give"
        " merged weights as config.model.path, or set train to lora"
    )


def _not_folded(flat: Mapping[str, Any]) -> str:
    """Returns the error if the adapter is to be folded, but the weights are quantised or a server samples; "" if not."""
    for key, off in (("model.quantize", "none"), ("sampling.server", None)):
        if flat["sampling.fold_adapter"] and flat[key] != off:
            return (
                f"config.sampling.fold_adapter is True and config.{key} {flat[key]!r}: the adapter is folded into weights of"
                f" this process that are not quantised; leave it at False, or set --config.{key}={off}"
            )
    return ""


def _learns_nothing(flat: Mapping[str, Any]) -> str:
    """Returns the error if no step could learn anything from the rewards, whatever the data; "" if not.

    An error is also returned for settings of a pair that the selection 'percentile' does not read.
    """
    name = _name(flat)
    selection, weight = flat["ple.selection"], flat["ple.rank_weight"]
    if name == "ple" and weight == 0 and (flat["ple.blend_weight"] == 0 or selection == "percentile"):
        other = "config.ple.selection 'percentile', which blends none" if selection == "percentile" else _NO_BLEND
        return f"config.ple.rank_weight is {weight} and {other}: no pair has a loss, nothing is learned; give one a weight"
    if name == "ple" and selection != "percentile" and math.isinf(flat["ple.tau_0"]) and flat["ple.blend_weight"] == 0:
        return f"config.ple.tau_0 is inf, which blends every pair, and {_NO_BLEND}: nothing is learned; set one of them"
    if name == "ple" and selection == "percentile" and (unread := [k for k in _OF_A_PAIR if flat[k] != _OF_A_PAIR[k]]):
        return (
            f"config.{unread[0]} is {flat[unread[0]]}, and config.ple.selection 'percentile' has no principled response, and"
            f" chooses among the plain ones: leave it at {_OF_A_PAIR[unread[0]]}"
        )
    compares = name in ("raft", "dpo", "grpo", "rloo") or (name == "ple" and selection == "percentile")
    if compares and flat[key := f"{name}.samples"] > 1 and (greedy := _greedy(flat)):
        return (
            f"config.{greedy} is {flat[greedy]}: all config.{key} = {flat[key]} responses to a query are the same, and"
            f" algorithm {name!r} learns from their differences: set --config.sampling.temperature=1"
            " --config.sampling.top_k=0 --config.sampling.top_p=1"
        )
    return ""


def _never_warm(flat: Mapping[str, Any]) -> str:
    """Returns the error if the learning rate's warm-up is more than a thousand times as long as the run; "" if not."""
    warm = flat["optimizer.warmup_steps"]
    batches = flat["queries_per_iteration"] // flat["optimizer.batch_queries"]
    steps = flat["iterations"] * batches * flat["optimizer.epochs"]
    if _name(flat) == "reward" or warm <= 1000 * steps:  # a reward model's steps go by its records
        return ""
    return (
        f"config.optimizer.warmup_steps is {warm}, and the run has {steps} optimiser steps: the rate would end at"
        f" {steps / warm:.1e} of config.optimizer.lr, and nothing is learned"
    )


def _keeps_no_best(flat: Mapping[str, Any]) -> str:
    """Returns the error for a setting that needs a best evaluation which is not kept; "" if there is none."""
    for key in ("eval.max_kl", "eval.patience"):
        if flat["eval.best"] == "none" and flat[key]:
            return f"config.{key} is {flat[key]}, and config.eval.best 'none' keeps no best evaluation: set it to reward"
    if flat["eval.best"] == "second" and flat["eval.second_reward"] is None:
        return "config.eval.best is 'second', and config.eval.second_reward names none: name one, or set best to reward"
    known = ["best", "newest", *(f"kl_{budget:g}" for budget in flat["eval.max_kl"])]
    if (use := flat["checkpoint.use"]) not in known:
        return f"config.checkpoint.use is {use!r}, and config.eval.max_kl keeps no such: choose {', '.join(known)}"
    return ""


_NO_BLEND = "config.ple.blend_weight is 0"
_OF_A_PAIR = {"ple.kl_weight": 0.0, "ple.candidates": 1}  # what only a plain and a principled response have
_ONE_TOKEN = {"sampling.temperature": 1e-4, "sampling.top_p": 1e-5}  # up to here one token has all of the probability


def _name(flat: Mapping[str, Any]) -> str:
    """Returns the name of the algorithm; one of the package gets its short name, even if the config has its dotted path."""
    return flat["algorithm"].removeprefix("ple_jax.algorithms.")


def _greedy(flat: Mapping[str, Any]) -> str:
    """Returns the key that makes sampling greedy, leaving one token to choose from; "" if none does."""
    if found := [key for key, most in _ONE_TOKEN.items() if flat[key] <= most]:
        return found[0]
    return "sampling.top_k" if flat["sampling.top_k"] == 1 else ""


def _unread(flat: Mapping[str, Any]) -> str:
    """Returns the error for a setting that nothing would read; "" if there is none."""
    if flat["algorithm_kwargs"] and _name(flat) in names("algorithms", ".py"):
        return (
            f"config.algorithm_kwargs is {shown(flat['algorithm_kwargs'])}, and algorithm {flat['algorithm']!r} reads none:"
            " they are for a file of your own; its settings are keys of the config"
        )
    for key, needed, remedy in _NEED:
        if flat[key] and not flat[needed]:
            return f"config.{key} is {shown(flat[key])}, which is not read without config.{needed}: {remedy}"
    return ""


_NEED = (  # (key, the key without which nobody reads it, what to do)
    ("task.thinking", "task.chat", "set --config.task.chat=True; a chat template opens and closes the thoughts"),
    ("sampling.server_key_env", "sampling.server", "give the server's address, or unset it"),
    ("sampling.server_sleep", "sampling.server", "give the server's address, or leave it at False"),
    ("eval.second_kwargs", "eval.second_reward", "name the reward whose arguments they are"),
    ("generate.second_kwargs", "generate.second_reward", "name the reward whose arguments they are"),
)
