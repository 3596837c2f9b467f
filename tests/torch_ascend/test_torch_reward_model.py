"""Classifiers on torch: batches against transformers on single rows, without padding; and what is refused."""

import json
import shutil

import families
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from speed import quick
from test_together import Control

from ple_jax.core import together
from ple_jax.core.errors import UserError
from torch_ascend import reward_model

PAD = 257
_BERT = {
    "vocab_size": families.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
_LLAMA = families.VARIANTS["llama"].options
_GPT2 = families.VARIANTS["gpt2"].options
CASES = {
    "llama": ("LlamaForSequenceClassification", _LLAMA),
    "llama, no padding token": ("LlamaForSequenceClassification", _LLAMA | {"pad_token_id": None}),
    "llama, padding token -1": ("LlamaForSequenceClassification", _LLAMA | {"pad_token_id": -1}),
    "gpt2, no padding token": ("GPT2ForSequenceClassification", _GPT2 | {"pad_token_id": None}),
    "bert": ("BertForSequenceClassification", _BERT),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": families.VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    ),
    "roberta": ("RobertaForSequenceClassification", _BERT | {"pad_token_id": PAD, "max_position_embeddings": 300}),
    "xlnet": (
        "XLNetForSequenceClassification",
        {"vocab_size": families.VOCAB, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    ),
    "bart": (
        "BartForSequenceClassification",
        {
            "vocab_size": families.VOCAB, "d_model": 32, "max_position_embeddings": 64, "eos_token_id": 2,
            "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
            "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
        },
    ),  # fmt: skip
}


def build(name, labels=3):
    kind, options = CASES[name]
    return families.build(families.Variant(kind, options), num_labels=labels)


def rows(name="llama"):
    """Of different lengths; the padding token inside one, at another's end, and (with 0 and 1) as some rows' last."""
    noise = np.random.default_rng(3)
    drawn = [noise.integers(3, 256, n).tolist() for n in (1, 23, 5, 12, 7, 2)]
    drawn[3][4] = PAD
    drawn[1][-2:] = [PAD, PAD]
    drawn[2][-1], drawn[4][-1] = 0, 1
    if name == "bart":  # which reads at EOS; one row has two
        drawn = [[*row, 2] for row in drawn]
        drawn[1][5] = 2
    return drawn


def expected(model, ids):
    with torch.no_grad():
        return np.stack([model(torch.tensor([row])).logits[0].float().numpy() for row in ids])


@pytest.mark.parametrize("labels", quick([1, 3], 3))
@pytest.mark.parametrize("name", quick(CASES, "llama", "bert"))
def test_batches_give_what_single_rows_give(name, labels, tmp_path):
    model = build(name, labels)
    model.save_pretrained(tmp_path)
    classify = reward_model.classifier(tmp_path, dtype="float32", rows=6, device="cpu")
    found, wanted = classify(rows(name)), expected(model, rows(name))
    assert found.dtype == np.float32 and found.shape == (6, labels)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.ptp(wanted, axis=0).min() > 0.01  # the rows do differ
    np.testing.assert_allclose(classify(rows(name)[1:3]), wanted[1:3], atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier")
    build("llama", 1).save_pretrained(path)
    return path


def changed(folder, path, change):
    """A copy with other tensors."""
    shutil.copytree(folder, path, dirs_exist_ok=True)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_bfloat16(folder):
    exact = reward_model.classifier(folder, dtype="float32", rows=6)(rows())
    rounded = reward_model.classifier(folder, dtype="bfloat16", rows=6)(rows())
    assert rounded.dtype == np.float32
    np.testing.assert_array_equal(rounded, torch.tensor(rounded).bfloat16().float().numpy())  # it was computed so
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.ptp(exact) + 0.05


def test_where_the_processes_are_jaxs_one_alone_has_it(folder):
    """In each it would be on the same device, and compute the same rows."""
    control, alone = Control(), reward_model.classifier(folder, dtype="float32", rows=6)(rows())
    with together.led(control):
        found = reward_model.classifier(folder, dtype="float32", rows=6)(rows())
        assert control.messages.empty()
    np.testing.assert_array_equal(found, alone)


def test_a_missing_head_is_not_drawn_at_random(folder, tmp_path):
    changed(folder, tmp_path, lambda tensors: tensors.pop("score.weight"))
    with pytest.raises(UserError, match=r"lack score\.weight: they are not those of a LlamaForSequenceClassification"):
        reward_model.classifier(tmp_path, dtype="float32", rows=1)


def test_weights_that_the_model_has_no_place_for(folder, tmp_path):
    changed(folder, tmp_path, lambda tensors: tensors.update({"score.bias": torch.ones(1)}))
    with pytest.raises(UserError, match=r"have, beside those of the model, score\.bias"):
        reward_model.classifier(tmp_path, dtype="float32", rows=1)


def test_leftovers_that_change_nothing(folder, tmp_path):
    leftovers = {"lm_head.weight": torch.ones(2, 2), "model.pooler.dense.bias": torch.ones(2)}
    changed(folder, tmp_path, lambda tensors: tensors.update(leftovers))
    found = reward_model.classifier(tmp_path, dtype="float32", rows=6)(rows())
    np.testing.assert_array_equal(found, reward_model.classifier(folder, dtype="float32", rows=6)(rows()))


def test_a_head_of_another_shape(folder, tmp_path):
    changed(folder, tmp_path, lambda tensors: tensors.update({"score.weight": torch.ones(2, 64)}))
    with pytest.raises(UserError, match=r"have another shape of score\.weight: .*with its head"):
        reward_model.classifier(tmp_path, dtype="float32", rows=1)


def test_a_truncated_file(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        reward_model.classifier(tmp_path, dtype="float32", rows=1)


def test_pickles_are_not_read(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded.*safetensors"):
        reward_model.classifier(tmp_path, dtype="float32", rows=1)


def test_code_of_a_checkpoint_is_not_run(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["auto_map"] = {"AutoModelForSequenceClassification": "mine.Mine", "AutoConfig": "mine.MyConfig"}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"model_type": "mine"}))
    (tmp_path / "mine.py").write_text("raise SystemExit('code of a checkpoint was run')")
    with pytest.raises(UserError, match="cannot be loaded"):
        reward_model.classifier(tmp_path, dtype="float32", rows=1)


def test_every_family_that_goes_alone_is_one_of_transformers():
    assert set(reward_model.ALONE) <= set(transformers.CONFIG_MAPPING)
