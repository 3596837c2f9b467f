"""Adapters on disk against PEFT itself."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from speed import quick
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ple_jax.core.errors import UserError
from ple_jax.models import peft

RANK, ALPHA = 4, 6.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def random_adapter(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    adapter = {}
    for name, module in model.named_modules():
        if name.endswith(TARGETS):
            out, inp = module.weight.shape
            key = f"base_model.model.{name}"
            adapter[f"{key}.lora_A.weight"] = rng.normal(0, 0.3, (RANK, inp)).astype(np.float32)
            # a transposed view, as a backend that keeps [in, out] hands over
            adapter[f"{key}.lora_B.weight"] = rng.normal(0, 0.3, (RANK, out)).astype(np.float32).T
    return adapter


def write(directory, adapter) -> None:
    peft.write(directory, adapter, rank=RANK, alpha=ALPHA, targets=TARGETS, base_model="some/base")


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.arange(12).reshape(2, 6)).logits.numpy()


def test_peft_applies_what_we_wrote(tmp_path):
    adapter = random_adapter(tiny_llama())
    write(tmp_path / "adapter", adapter)
    merged = tiny_llama()
    before = logits(merged)
    with torch.no_grad():
        for name, module in merged.named_modules():
            if name.endswith(TARGETS):
                a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
                module.weight += torch.from_numpy(ALPHA / RANK * b @ a)
    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert np.abs(logits(merged) - before).max() > 0.1  # the adapter matters
    np.testing.assert_allclose(logits(ours), logits(merged), atol=2e-5)
    assert ours.peft_config["default"].base_model_name_or_path == "some/base"
    assert ours.active_peft_config.target_modules == set(TARGETS)


def test_config_is_what_peft_writes(tmp_path):
    write(tmp_path / "ours", random_adapter(tiny_llama()))
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), settings).save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / who / peft.CONFIG).read_text()) for who in ("ours", "theirs"))
    assert ours.pop("base_model_name_or_path") == "some/base"
    assert ours.pop("target_modules") == sorted(theirs.pop("target_modules")) == sorted(TARGETS)
    assert ours == {key: theirs[key] for key in ours}
    # what is left out keeps PEFT's default
    defaults = LoraConfig().to_dict()
    left_out = theirs.keys() - ours.keys() - {"base_model_name_or_path", "peft_version"}
    assert {key: theirs[key] for key in left_out} == {key: defaults[key] for key in left_out}
    names = []
    for who in ("ours", "theirs"):
        with safe_open(tmp_path / who / peft.WEIGHTS, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            names.append(sorted(file.keys()))
    assert names[0] == names[1]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_written_adapter_comes_back(tmp_path, dtype):
    adapter = {name: value.astype(dtype) for name, value in random_adapter(tiny_llama()).items()}
    write(tmp_path, adapter)
    read, config = peft.read(tmp_path)
    assert read.keys() == adapter.keys()
    for name, value in adapter.items():
        assert read[name].dtype == dtype
        np.testing.assert_array_equal(read[name], value, err_msg=name)
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)


def test_adapter_that_peft_saved(tmp_path):
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), settings)
    model.save_pretrained(tmp_path)
    read, config = peft.read(tmp_path)
    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    assert read.keys() == trained.keys() and len(read) == 8
    for name, parameter in trained.items():
        np.testing.assert_array_equal(read[name], parameter.detach().numpy(), err_msg=name)
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (8, 16, ["q_proj", "v_proj"])


def test_equal_adapters_have_equal_bytes(tmp_path):
    adapter = random_adapter(tiny_llama())
    write(tmp_path / "a", adapter)
    write(tmp_path / "b", {name: np.ascontiguousarray(adapter[name]) for name in reversed(adapter)})
    for name in (peft.WEIGHTS, peft.CONFIG):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_interrupted_write_leaves_the_old_adapter(tmp_path, monkeypatch):
    adapter = random_adapter(tiny_llama())
    write(tmp_path, adapter)

    def crash(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, {name: value + 1 for name, value in adapter.items()})
    monkeypatch.undo()
    for name, value in peft.read(tmp_path)[0].items():
        np.testing.assert_array_equal(value, adapter[name])
    write(tmp_path, adapter)
    assert sorted(file.name for file in tmp_path.iterdir()) == [peft.CONFIG, peft.WEIGHTS]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only 'LORA'"),
        ({"modules_to_save": ["lm_head"]}, "lm_head trained whole .*none is needed; such modules are not"),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, "embed_tokens and lm_head trained whole .*merge it into"),
        ({"modules_to_save": ["score"]}, "has score trained whole .*where none is needed; it is a reward model's"),
        ({"bias": "all"}, "bias='all', which is not supported"),
        ({"lora_bias": True}, "lora_bias=True, which is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4', which is not supported"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication="),
        ({"of_next_year": 1}, "of_next_year=1, which is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj are \[4, 32\] and \[32, 4\], and adapter_config.json says rank 2"),
        ({"use_dora": True}, "lacks tensor base_model.model.model.layers.0.* write the adapter again"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, change, message):
    write(tmp_path, random_adapter(tiny_llama()))
    file = tmp_path / peft.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        peft.read(tmp_path)


def test_tensors_that_are_not_of_linear_layers_are_refused(tmp_path):
    # the name that PEFT gives the adapter of an embedding
    embedding = {"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((RANK, 50), np.float32)}
    write(tmp_path, random_adapter(tiny_llama()) | embedding)
    with pytest.raises(UserError, match="lora_embedding_A, which is not a LoRA matrix of a linear layer"):
        peft.read(tmp_path)


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16)).eval()


PATTERNS = {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"1.self_attn.v_proj": 11}}
OPTIONS = {
    "patterns": (tiny_llama, TARGETS, PATTERNS),
    "rslora": (tiny_llama, TARGETS, {"use_rslora": True}),
    "dora": (tiny_llama, TARGETS, {"use_dora": True}),
    "everything": (tiny_llama, TARGETS, {**PATTERNS, "use_rslora": True, "use_dora": True, "lora_dropout": 0.1}),
    "conv1d": (tiny_gpt2, ("c_attn", "c_proj"), {"fan_in_fan_out": True}),
    "conv1d dora": (tiny_gpt2, ("c_attn", "c_fc"), {"fan_in_fan_out": True, "use_dora": True}),
}


def trained_by_peft(build, targets, options):
    """A PEFT model with random matrices and, for DoRA, magnitudes that are no longer the base's norms."""
    settings = LoraConfig(
        r=RANK, lora_alpha=5, target_modules=list(targets), task_type="CAUSAL_LM", init_lora_weights=False, **options
    )
    model = get_peft_model(build(), settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= 1 + 0.3 * torch.rand_like(parameter)
    return model


@pytest.mark.parametrize("name", quick(OPTIONS, "patterns", "conv1d dora"))
def test_options_go_there_and_back(tmp_path, name):
    build, targets, options = OPTIONS[name]
    """PEFT writes, we read; we write, PEFT reads: the same tensors bit for bit, the same logits."""
    theirs = trained_by_peft(build, targets, options)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter, config = peft.read(tmp_path / "theirs")
    renamed = {"dropout" if key == "lora_dropout" else key: value for key, value in options.items()}
    peft.write(tmp_path / "ours", adapter, rank=RANK, alpha=5, targets=targets, base_model="some/base", **renamed)
    ours = PeftModel.from_pretrained(build(), tmp_path / "ours")
    assert np.abs(logits(theirs) - logits(build())).max() > 0.01
    np.testing.assert_array_equal(logits(ours), logits(theirs))
    again, written = peft.read(tmp_path / "ours")
    assert again.keys() == adapter.keys() and {key: written[key] for key in options} == {key: config[key] for key in options}
    for name, value in adapter.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_a_row_of_zeros_is_merged_as_it_is_trained():
    """Its magnitude is 0, and a gain of 0 / 0 is none: both backends leave such a row as it is."""
    weight, a = np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[1.0, 2.0]])
    for b, row in (([[0.0], [0.0]], [0.0, 0.0]), ([[0.0], [0.5]], [1.0, 2.0])):
        module = peft.Module(a, np.array(b), np.array([5.0, 0.0]))
        np.testing.assert_allclose(peft.merge(weight, module, scale=2.0), [[3.0, 4.0], row])


@pytest.mark.parametrize("name", quick(OPTIONS, "patterns", "conv1d dora"))
def test_merge_equals_pefts_own(tmp_path, name):
    build, targets, options = OPTIONS[name]
    theirs = trained_by_peft(build, targets, options)
    theirs.save_pretrained(tmp_path)
    adapter, config = peft.read(tmp_path)
    base = {name: p.detach().numpy() for name, p in build().named_parameters()}
    merged = theirs.merge_and_unload()
    found = peft.modules(adapter)
    assert len(found) == sum(name.removesuffix(".weight").endswith(tuple(targets)) for name in base if "bias" not in name)
    for path, module in found.items():
        ours = peft.merge(
            base[f"{path}.weight"], module, scale=peft.scaling(config, path), fan_in_fan_out=config["fan_in_fan_out"]
        )
        expected = merged.get_submodule(path).weight.detach().numpy()
        assert ours.dtype == np.float32 and np.abs(expected - base[f"{path}.weight"]).max() > 0.01
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6, err_msg=path)


def test_scaling_and_rank_of_a_module():
    config = {"r": 8, "lora_alpha": 16, **PATTERNS, "use_rslora": False}
    assert peft.scaling(config, "model.layers.0.self_attn.k_proj") == 2
    assert peft.scaling(config, "model.layers.0.self_attn.q_proj") == 8
    assert peft.scaling(config, "model.layers.1.self_attn.v_proj") == 11 / 8
    assert peft.scaling(config | {"use_rslora": True}, "model.layers.1.mlp.up_proj") == 16 / 6**0.5
    assert peft.module_rank(config, "model.layers.11.mlp.up_proj") == 8  # a name counts whole: 11 is not 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("r", "8"), ("r", 0), ("r", None), ("lora_alpha", "x"), ("lora_alpha", -1), ("rank_pattern", []), ("use_dora", "no"),
     ("modules_to_save", "score"), ("alpha_pattern", {"q_proj": "x"}), ("alpha_pattern", {"q_proj": None}),
     ("rank_pattern", {"q_proj": 0}), ("rank_pattern", {"q_proj": [8]}), ("rank_pattern", {"(": 8}),
     ("alpha_pattern", {"*": 8})],
)  # fmt: skip
def test_a_config_with_values_that_cannot_be(tmp_path, key, value):
    write(tmp_path, random_adapter(tiny_llama()))
    file = tmp_path / peft.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"the adapter in {tmp_path} is damaged \\({key} is "):
        peft.read(tmp_path)
    for text in ("[]", "[" * 200_000):
        file.write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            peft.read(tmp_path)


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_a_config_without_what_an_adapter_needs(tmp_path, key):
    write(tmp_path, random_adapter(tiny_llama()))
    file = tmp_path / peft.CONFIG
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != key}))
    with pytest.raises(UserError, match=f"has no {key} in its adapter_config.json"):
        peft.read(tmp_path)


def test_damaged_or_missing_files(tmp_path):
    with pytest.raises(UserError, match="adapter_config.json does not exist"):
        peft.read(tmp_path)
    write(tmp_path, random_adapter(tiny_llama()))
    weights = tmp_path / peft.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged"):
        peft.read(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors does not exist"):
        peft.read(tmp_path)
