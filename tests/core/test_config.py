"""What a config may hold: the table covers every knob, and each kind of mistake is one line that says what to do."""

import math
import re

import pytest

from configs import default, quickstart, tiny
from ple_jax.core.config import RULES, differing, flatten, validate
from ple_jax.core.errors import UserError, suggestion


def edited(**changes):
    """The default config with dotted keys changed; a double underscore stands for the dot."""
    c = default.get_config()
    c.optimizer.micro_queries = c.optimizer.batch_queries = 16
    with c.ignore_type():
        c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return c


@pytest.mark.parametrize("module", [default, quickstart, tiny])
def test_shipped_configs_are_valid(module):
    validate(module.get_config())


def test_table_covers_every_knob():
    assert set(RULES) == set(flatten(default.get_config().to_dict()))


@pytest.mark.parametrize(
    "changes",
    [
        {"ple__tau_0": math.inf},
        {"ple__tau_0": 0},
        {"ple__alpha": 1.0},
        {"ple__rank_weight": 0.0},
        {"sampling__temperature": 0.0},
        {"sampling__top_p": 1},
        {"sinks": ()},
        {"lora__targets": ["q_proj"]},
        {"algorithm": "tests/variants/focal.py", "algorithm_kwargs": {"strength": 2.0, "names": ["a"]}},
        {"ple__rank_weight": 0.0, "ple__tau_0": math.inf},
        {"ple__tau_0": math.inf, "ple__blend_weight": 0.0, "ple__selection": "percentile"},
        {"algorithm": "ppo", "sampling__temperature": 0.0},
        {"algorithm": "dpo", "sampling__temperature": 0.0},  # the records' own pairs
        {"task__thinking": True, "task__chat": True},
        {"reward__name": "ple_jax.anything:at_all"},
        {"task__train": "Anthropic/hh-rlhf", "task__heldout": "user/data-v1.0", "task__subsets": ("harmless-base",)},
        {"task__columns": {"prompt": "question"}, "task__words": (3, 3), "principles": "helpful_harmless+concise"},
        {"algorithm": "ple_jax.algorithms.ple"},
        {"mesh__data": 4, "mesh__fsdp": 2},
        {"optimizer__batch_queries": 24, "optimizer__micro_queries": 8},
    ],
)
def test_valid(changes):
    validate(edited(**changes))


# (changes, what the message must say besides the key and the value)
INVALID = [
    ({"seed": -1}, "at least 0"),
    ({"seed": True}, "whole number"),
    ({"iterations": 0}, "at least 1"),
    ({"iterations": 2.0}, "whole number"),
    ({"ple__tau_0": -0.1}, "of at least 0"),
    ({"ple__tau_0": math.nan}, "of at least 0"),
    ({"ple__tau_0": "0.2"}, "a number"),
    ({"ple__alpha": 0.0}, "above 0 and at most 1"),
    ({"ple__alpha": 1.01}, "above 0 and at most 1"),
    ({"ple__alpha": math.nan}, "above 0 and at most 1"),
    ({"ple__rank": "hinges"}, "did you mean 'hinge'?"),
    ({"ple__percentile": ()}, "at least one entry"),
    ({"ple__percentile": (0.1, 0.0)}, "its entry 0.0 must be a number above 0"),
    ({"ple__percentile": 0.1}, "a tuple"),
    ({"ple__percentile": (0.1, math.nan)}, "its entry nan"),
    ({"ple__samples": 1}, "at least 2"),
    ({"ple__blend_temperature": 0.0}, "from 1e-6 to 1e6"),
    ({"ple__rank_weight": math.inf}, "from 0 to 1e6"),
    ({"sampling__temperature": -1.0}, "0 is greedy"),
    ({"sampling__temperature": math.inf}, "0 is greedy"),
    ({"sampling__top_p": 0.0}, "1 is off"),
    ({"sampling__top_p": 1.5}, "1 is off"),
    ({"sampling__min_p": 1.0}, "below 1"),
    ({"sampling__min_p": -0.1}, "below 1"),
    ({"sampling__top_k": -1}, "at least 0"),
    ({"lora__rank": 0}, "at least 1"),
    ({"lora__targets": ("q_proj", 1)}, "a tuple of module names"),
    ({"lora__targets": ()}, "a tuple of module names"),
    ({"lora__targets": ("all-linear", "q_proj")}, "('all-linear',)"),
    ({"lora__rank_pattern": (("q_proj", 0),)}, "'q_proj' must have a whole number, at least 1"),
    ({"lora__rank_pattern": (("q_proj(", 4),)}, "'q_proj(' is no regular expression"),
    ({"lora__rank_pattern": ((4, "q_proj"),)}, "4 is no regular expression"),
    ({"lora__rank_pattern": ("q_proj", 4)}, "(regular expression, value) pairs"),
    ({"lora__alpha_pattern": (("q_proj", -1.0),)}, "'q_proj' must have a number from 1e-6 to 1e6"),
    ({"lora__alpha": 1e30}, "from 1e-6 to 1e6"),
    ({"optimizer__weight_decay": 1e30}, "times every weight from itself"),
    ({"lora__dropout": 1.0}, "below 1"),
    ({"lora__rslora": 1}, "True or False"),
    ({"model__quantize": "int4"}, "none, int8, nf4"),
    ({"model__adapter": "nowhere"}, "a folder with adapter_config.json and adapter_model.safetensors"),
    ({"model__attention": "flash"}, "auto, xla, cudnn, splash"),
    ({"optimizer__lr": 0.0}, "above 0"),
    ({"optimizer__lr": math.inf}, "above 0"),
    ({"optimizer__lr": math.nan}, "above 0"),
    ({"optimizer__warmup_steps": -1}, "at least 0"),
    ({"eval__samples": 0}, "at least 1"),
    ({"eval__samples": 10**20}, "below 16384"),
    ({"grpo__samples": 10**9}, "below 16384"),
    ({"lora__rank": 10**20}, "below 16384"),
    ({"iterations": 10**12}, "below 1048576"),
    ({"optimizer__lr": 1e300}, "at most 1e9"),
    ({"lora__alpha": 1e300}, "to 1e6"),
    ({"export__shard_gb": 1e308}, "to 1e6"),
    ({"task__train_split": "a\0"}, "without NUL"),
    ({"compare__baseline": "\ud800"}, "lone surrogates"),
    ({"task__train": "a" * 300 + "/b"}, "an existing file of records"),
    ({"principles": "a" * 300 + ".txt"}, "an existing text file"),
    ({"algorithm": "a" * 300 + ".py"}, "an existing Python file"),
    ({"mesh__tensor": 0}, "at least 1"),
    ({"task__chat": "yes"}, "True or False"),
    ({"model__dtype": "float16"}, "float32, bfloat16"),
    ({"model__path": "smollm2-135"}, "did you mean 'smollm2-135m'?"),
    ({"principles": "REDME.md"}, "; did you mean 'README.md'?"),
    ({"reward__name": "examples/own_rewards.py:f"}, "; did you mean 'examples/own_reward.py'?"),
    ({"task__train": "READM.md"}, "or a data set on a hub, user/name; did you mean 'README.md'?"),
    ({"task__columns": {"promt": "question"}}, "'promt' is none; did you mean 'prompt'?"),
    ({"task__columns": {"choices": "options", "chosn": "better", "solution": "solved"}}, "'chosn' is none; did"),
    ({"task__columns": {"word limit": "limit"}}, "or of names that a reward reads; 'word limit' is none"),
    ({"model__path": "lama-3-8b"}, "qwen3-8b; did you mean 'llama-3-8b'?"),
    ({"model__path": "nowhere/model.gguf"}, "an existing .gguf file"),
    ({"task__train": "quickstart_trian"}, "did you mean 'quickstart_train'?"),
    ({"task__heldout": "data/nowhere.jsonl"}, "an existing file of records"),
    ({"principles": "positive_reviews"}, "did you mean 'positive_review'?"),
    ({"principles": "nowhere.txt"}, "an existing text file"),
    ({"reward__name": "vadar"}, "did you mean 'vader'?"),
    ({"reward__name": "no_such_package.rewards:score"}, "'no_such_package' is not one"),
    ({"reward__name": 3}, "letters, model, numeric, regex, remote, rules, toxicity, vader"),
    ({"task__format": "hhh"}, "did you mean 'hh'?"),
    ({"task__words": (0, 3)}, "(fewest, most) words"),
    ({"task__words": (4, 3)}, "(fewest, most) words"),
    ({"task__columns": {"promt": "question"}}, "did you mean 'prompt'?"),
    ({"task__columns": {"prompt": 3}}, "our name -> the data's"),
    ({"task__subsets": "harmless-base"}, "a tuple"),
    ({"task__max_bad_share": 1.5}, "from 0 to 1"),
    ({"task__train": "/nowhere/at/all"}, "an existing file of records"),
    ({"principles": "helpful_harmless+concis"}, "did you mean 'concise'?"),
    ({"principles_per_query": -1}, "at least 0"),
    ({"reward__max_bad_share": math.nan}, "from 0 to 1"),
    ({"reward_model__train": "full"}, "lora, head"),
    ({"offline__epochs": 0}, "at least 1"),
    ({"algorithm": "pel"}, "did you mean 'ple'?"),
    ({"algorithm": "nowhere.py"}, "an existing Python file"),
    ({"warm_up__data": "nowhere.jsonl"}, "an existing file of records"),
    ({"sinks": ("jsonl", "tensorbord")}, "did you mean 'tensorboard'?"),
    ({"reward__kwargs": {"k": math.nan}}, "without NaN"),
    ({"reward__kwargs": {"k": {1, 2}}}, "plain values"),
    ({"algorithm_kwargs": 3}, "a dictionary"),
]


@pytest.mark.parametrize("changes, says", INVALID, ids=[str(changes) for changes, _ in INVALID])
def test_invalid_value(changes, says):
    with pytest.raises(UserError) as error:
        validate(edited(**changes))
    (key, value), message = next(iter(changes.items())), str(error.value)
    assert message.startswith(f"config.{key.replace('__', '.')} is {value!r}"[:200])
    assert says in message and "\n" not in message


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"queries_per_iteration": 50}, "_iteration is 50 .* = 16: .*smaller optimiser batch.*; use 48 or 64"),
        ({"queries_per_iteration": 8}, "queries_per_iteration is 8 .* = 16: .*; use 16"),
        ({"optimizer__micro_queries": 5}, r"batch_queries is 16 .*\.micro_queries = 5: .*; use 15 or 20"),
        ({"mesh__data": 3}, r"micro_queries is 16 .* config\.mesh\.data \* config\.mesh\.fsdp = 3: .*; use 15 or 18"),
        ({"mesh__fsdp": 8, "sampling__width": 12}, "sampling.width is 12 .* = 8: .*; use 8 or 16"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        validate(edited(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ple__rank_weight": 0.0, "ple__blend_weight": 0.0}, "rank_weight is 0.0 and config.ple.blend_weight is 0:"),
        ({"ple__rank_weight": 0.0, "ple__selection": "percentile"}, "rank_weight is 0.0 and .*'percentile'.* nothing is"),
        ({"ple__tau_0": math.inf, "ple__blend_weight": 0.0}, "tau_0 is inf, .* and config.ple.blend_weight is 0"),
        ({"algorithm": "grpo", "sampling__temperature": 0.0}, "temperature is 0.0: all config.grpo.samples = 4 responses"),
        ({"algorithm": "rloo", "sampling__top_k": 1}, "top_k is 1: all config.rloo.samples = 4 responses .* are the same"),
        ({"algorithm": "raft", "sampling__temperature": 0.0}, "all config.raft.samples = 4"),
        ({"algorithm": "dpo", "dpo__samples": 2, "sampling__temperature": 0.0}, "all config.dpo.samples = 2"),
        ({"ple__selection": "percentile", "sampling__temperature": 0.0}, "all config.ple.samples = 8"),
        ({"algorithm": "grpo", "sampling__top_p": 1e-6}, "top_p is 1e-06: all config.grpo.samples = 4 .*top_p=1"),
        ({"algorithm": "raft", "sampling__temperature": 1e-6}, "temperature is 1e-06: all config.raft.samples = 4"),
        ({"optimizer__warmup_steps": 10**6}, "is 1000000, and the run has 15 .* end at 1.5e-05 of .*nothing is learned"),
        ({"algorithm_kwargs": {"strength": 2.0}}, r"is \{'strength': 2.0\}, and algorithm 'ple' reads none"),
        ({"algorithm": "ple_jax.algorithms.sft", "algorithm_kwargs": {"k": 1}}, "'ple_jax.algorithms.sft' reads none"),
        ({"task__thinking": True}, "thinking is True, which is not read without config.task.chat"),
        ({"sampling__server_key_env": "KEY"}, "'KEY', which is not read without config.sampling.server"),
        ({"sampling__server_sleep": True}, "True, which is not read without config.sampling.server"),
        (
            {"sampling__server": "http://x", "sampling__importance_cap": 2.0, "sampling__temperature": 0.7},
            "server are of temperature 1, and every weight would be wrong; set config.sampling.temperature=1, or the cap 0",
        ),
        ({"sampling__fold_adapter": True, "model__quantize": "nf4"}, "quantize 'nf4': the adapter is folded into .*=none"),
        ({"sampling__fold_adapter": True, "sampling__server": "http://h:1"}, "folded into weights of this process .*=None"),
        ({"generate__second_kwargs": {"k": 1}}, "is not read without config.generate.second_reward"),
    ],
)
def test_what_would_teach_nothing_or_be_read_by_nobody(changes, message):
    with pytest.raises(UserError, match=message):
        validate(edited(**changes))


@pytest.mark.parametrize("key", ["optimizer.lr", "optimizer.clip_norm", "sampling.top_p", "warm_up.lr", "grpo.clip_low"])
def test_what_float32_makes_zero_of_is_refused(key):
    """1e-50 is above 0, and no step would change anything; of top_p no token would be left."""
    with pytest.raises(UserError, match=f"config.{key} is 1e-50 but must be a number "):
        validate(edited(**{key.replace(".", "__"): 1e-50}))


def test_what_float32_makes_infinite_is_refused():
    with pytest.raises(UserError, match=r"temperature is 1e\+39 but must be a number from 1e-6 to 1e6, or 0"):
        validate(edited(sampling__temperature=1e39))


def test_unknown_and_missing_keys_of_a_config_file():
    c = default.get_config()
    c.ple.tau0 = 0.1
    with pytest.raises(UserError, match=re.escape("config.ple.tau0 is not a known key; did you mean 'ple.tau_0'?")):
        validate(c)
    c = default.get_config()
    del c.eval.samples
    with pytest.raises(UserError, match=r"config\.eval\.samples is missing; .*default\.py"):
        validate(c)


def test_paths_of_files_that_exist(tmp_path):
    for name in ("queries.jsonl", "rules.txt", "variant.py"):
        (tmp_path / name).write_text("")
    queries, rules, variant = (str(tmp_path / name) for name in ("queries.jsonl", "rules.txt", "variant.py"))
    changes = {"task__train": queries, "warm_up__data": queries, "principles": rules, "algorithm": variant}
    validate(edited(**changes, model__path=str(tmp_path), reward__name=f"{variant}:score"))


@pytest.mark.parametrize(
    "word, expected",
    [("tau0", "ple.tau_0"), ("ple.tau0", "ple.tau_0"), ("optimiser.lr", "optimizer.lr"), ("zzzzzz", None)],
)
def test_suggestion(word, expected):
    assert suggestion(word, RULES) == (f"; did you mean {expected!r}?" if expected else "")


def test_flatten_keeps_free_dictionaries_whole():
    tree = {"a": 1, "reward": {"kwargs": {"k": 2}, "name": "x"}, "b": {"c": {"d": 3}}}
    assert flatten(tree) == {"a": 1, "reward.kwargs": {"k": 2}, "reward.name": "x", "b.c.d": 3}
    assert flatten(tree, whole=()) == {"a": 1, "reward.kwargs.k": 2, "reward.name": "x", "b.c.d": 3}


def test_flatten_joins_keys_with_dots_in_their_order_and_keeps_empty_groups():
    nested = {"b": {"x": 1, "deep": {"y": (1, 2)}}, "kwargs": {}, "a": None}
    assert list(flatten(nested).items()) == [("b.x", 1), ("b.deep.y", (1, 2)), ("kwargs", {}), ("a", None)]


def test_differing():
    a = {"x": 1, "s": {"t": (1, 2), "u": math.inf}, "reward": {"kwargs": {}}}
    assert differing(a, {"x": 1, "s": {"t": [1, 2], "u": math.inf}, "reward": {"kwargs": {}}}) == []
    b = {"x": 2, "s": {"t": [1, 3], "v": None}, "reward": {"kwargs": {"k": 1}}}
    assert differing(a, b) == ["reward.kwargs", "s.t", "s.u", "s.v", "x"]
