"""What the built-in rewards give, and under which version: stored values go by it, in every work directory there is.

A row whose value changed needs another VERSION in the reward's file, and here: never a new value alone.
"""

import json
import zlib

import numpy as np
import pytest

import ple_jax.backend.reward_model
from ple_jax import rewards
from ple_jax.core import plugins
from ple_jax.core.config import names
from ple_jax.models.tokenizer import byte_tokenizer

pytest_plugins = ["servers"]

PROMPT, TEXT = "Who was it?", "It was GREAT, just great great fun. Honestly, the BEST day! 42?!"
RECORD = {"completion": TEXT.lower(), "n": [1, 42], "day": "DAY", "tests": ["pass", "assert 0"]}
GREAT = {"name": "letters", "kwargs": {"letters": "gt"}}
TABLE = {  # reward: options, version, value of TEXT
    "bag_of_words": ({}, "1", 0.8146),
    "code": ({}, "3", 0.5),
    "combine": (
        {
            "parts": {"a": GREAT | {"weight": 3.0}, "b": {"name": "length", "veto_below": -0.9}},
            "length_penalty": 0.01,
            "veto_value": -2.0,
        },
        "2",
        -0.145,  # 3 * 8 / 64 - 8 / 20 - 0.01 * 12
    ),
    "exact": ({}, "2", 1.0),
    "json_schema": ({"schema": {}}, "2", 0.0),
    "judge": ({"model": "m"}, "1", 5.01),
    "length": ({"target": 20}, "2", -0.4),
    "letters": ({}, "1", 0.171875),
    "model": ({"label": "l1", "with_prompt": True, "max_tokens": 50}, "2", 0.57395),
    "numeric": ({"column": "n"}, "2", 1.0),
    "regex": ({"pattern": r"BEST (\w+)", "answer": "day"}, "2", 1.0),
    "remote": ({"batch": 2}, "2", 28.4),
    "rules": ({"require": ["great"], "forbid": ["42"], "max_repeats": 2, "sentence": True}, "1", 0.75),
    "toxicity": ({}, "1", 0.75),
    "vader": ({}, "1", 0.9795),
}


def answer(number, body, handler):
    """A number made of the request: another request would give another one."""
    drawn = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    if "query" in body:
        return {"rewards": [drawn % 1000 / 10] * len(body["query"])}
    return {"choices": [{"message": {"content": f'{{"score": {drawn % 1000 / 100}}}'}}]}


def classifier(folder, *, dtype, rows, mesh):
    """A classifier whose logits are made of the tokens."""
    return lambda texts: [[len(ids) / 50, zlib.crc32(bytes(str(ids), "ascii")) % 1000 / 500] for ids in texts]


@pytest.fixture
def options(serve, tmp_path, monkeypatch):
    """What of a reward's options is of this machine; what belongs to others' packages gives the same everywhere."""
    monkeypatch.setattr("profanity_check.predict_prob", lambda texts: np.full(len(texts), 0.25))
    monkeypatch.setattr(ple_jax.backend.reward_model, "classifier", classifier)
    raw = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "vocab_size": 258, "hidden_size": 8,
           "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 64,
           "rms_norm_eps": 1e-5, "id2label": {"0": "l0", "1": "l1"}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes(b"")
    byte_tokenizer().save_pretrained(tmp_path)
    url = serve(answer).url
    return {"judge": {"url": url, "lowest": 0}, "remote": {"url": url}, "model": {"path": str(tmp_path), "framework": "jax"}}


def test_the_table_has_every_reward():
    assert list(TABLE) == names("rewards", ".py")


@pytest.mark.parametrize("name", TABLE)
def test_values_change_with_the_version_alone(name, options):
    kwargs, version, value = TABLE[name]
    reward = rewards.load(name, {**kwargs, **options.get(name, {})})
    text = "x = 1" if name == "code" else TEXT
    found = rewards.score(reward, [PROMPT], [text], records=[RECORD]).values
    assert plugins.built_in("rewards", name).VERSION == version and reward.version.split()[0] == version
    assert found == pytest.approx([value], abs=1e-4), f"raise VERSION in ple_jax/rewards/{name}.py, and this table with it"
