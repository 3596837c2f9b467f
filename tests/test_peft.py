"""Adapters on disk against PEFT itself."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from ple_jax.core import peft
from ple_jax.core.config import UserError

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
        ({"use_rslora": True}, "use_rslora=True"),
        ({"use_dora": True}, "use_dora=True"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
    ],
)
def test_other_kinds_of_adapter_are_refused(tmp_path, change, message):
    write(tmp_path, random_adapter(tiny_llama()))
    file = tmp_path / peft.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
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
