"""Reward models on our decoder: logits against transformers for every family, on a mesh, and what is refused."""

import families
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from speed import quick

from ple_jax.backend import reward_model
from ple_jax.core.errors import UserError
from ple_jax.models import weights
from ple_jax.models.families import FAMILIES

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
PAD = 257
_CLASSES = {
    "GPT2LMHeadModel": "GPT2ForSequenceClassification",
    "Gemma3ForCausalLM": "Gemma3TextForSequenceClassification",
    "Gemma3ForConditionalGeneration": "Gemma3ForSequenceClassification",
}


def build(name: str, **changes):
    variant = families.VARIANTS[name]
    kind = _CLASSES.get(variant.model, variant.model.replace("ForCausalLM", "ForSequenceClassification"))
    return families.build(variant._replace(model=kind), **changes)


def rows() -> list[list[int]]:
    """Of different lengths; the padding token inside one, and at another's end, where transformers reads before it."""
    noise = np.random.default_rng(3)
    drawn = [noise.integers(0, 256, n).tolist() for n in (1, 5, 12, 23)]
    drawn[2][4] = PAD
    drawn[3][-2:] = [PAD, PAD]
    return drawn


def expected(model, ids: list[list[int]]) -> np.ndarray:
    """transformers on every row by itself, without padding."""
    with torch.no_grad():
        return np.stack([model(torch.tensor([row])).logits[0].numpy() for row in ids])


@pytest.mark.parametrize("name", quick(families.VARIANTS, "gpt2", "gemma3_text", "llama-tied"))
def test_logits_are_transformers(name, tmp_path):
    labels = {"num_labels": 3} if name != "gemma3" else {}
    model = build(name, **labels)
    families.save(model, tmp_path)
    found = reward_model.classifier(tmp_path, dtype="float32", rows=4, mesh=ONE)(rows())
    wanted = expected(model, rows())
    assert found.dtype == np.float32 and found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.ptp(wanted, axis=0).min() > 0.1  # the rows do differ


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier")
    families.save(build("llama", num_labels=1), path)
    return path


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "tensor": 1}, {"data": 1, "fsdp": 2, "tensor": 2}])
def test_a_mesh_changes_nothing(folder, mesh):
    alone = reward_model.classifier(folder, dtype="float32", rows=4, mesh=ONE)(rows())
    spread = reward_model.classifier(folder, dtype="float32", rows=3, mesh=mesh)(rows()[:3])  # 3 rows on 2 or 4 devices
    np.testing.assert_allclose(spread, alone[:3], atol=1e-5)


def test_fewer_rows_and_other_lengths_change_nothing(folder):
    classify = reward_model.classifier(folder, dtype="float32", rows=4, mesh=ONE)
    together = classify(rows())
    long = [*rows(), list(range(60))][1:]  # another bucket
    np.testing.assert_allclose(classify(long)[:3], together[1:], atol=1e-5)
    for i, row in enumerate(rows()):
        np.testing.assert_allclose(classify([row])[0], together[i], atol=1e-5)


def test_without_a_padding_token_the_last_token_counts(folder, tmp_path):
    model = build("llama", num_labels=1, pad_token_id=None)
    families.save(model, tmp_path)
    found = reward_model.classifier(tmp_path, dtype="float32", rows=4, mesh=ONE)(rows())
    np.testing.assert_allclose(found, expected(model, rows()), atol=1e-4)
    assert abs(found[3] - reward_model.classifier(folder, dtype="float32", rows=4, mesh=ONE)(rows())[3]) > 1e-3


def test_bfloat16_is_near(folder):
    exact = reward_model.classifier(folder, dtype="float32", rows=4, mesh=ONE)(rows())
    rounded = reward_model.classifier(folder, dtype="bfloat16", rows=4, mesh=ONE)(rows())
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.ptp(exact) + 0.05


@pytest.mark.parametrize(
    ("ids", "pad", "place"), [([5], 0, 0), ([5, 6, 0], 0, 1), ([5, 0, 6], 0, 2), ([0, 0], 0, 0), ([5, 6, 0], None, 2)]
)
def test_last_token(ids, pad, place):
    assert reward_model.last_token(ids, pad) == place


def test_a_language_model_has_no_head(tmp_path):
    families.save(families.build(families.VARIANTS["llama"]), tmp_path)
    with pytest.raises(UserError, match=r"lacks tensor score.weight.*configs/reward_hh.py"):
        reward_model.classifier(tmp_path, dtype="float32", rows=1, mesh=ONE)


@pytest.mark.parametrize("wrong", ["shape", "nan"])
def test_a_damaged_head(folder, tmp_path, wrong):
    tensors = load_file(folder / "model.safetensors")
    head = tensors[weights.SCORE]
    tensors[weights.SCORE] = np.concatenate([head, head]) if wrong == "shape" else np.full_like(head, np.nan)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"score\.weight (has shape \(2, 64\)|holds values that are not finite)"):
        reward_model.classifier(tmp_path, dtype="float32", rows=1, mesh=ONE)


@pytest.mark.parametrize(
    ("raw", "count"),
    [
        ({}, 2),
        ({"id2label": {"0": "reward"}}, 1),
        ({"num_labels": 5, "id2label": None}, 5),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, 3),
    ],
)
def test_labels(raw, count):
    assert weights.labels(raw) == count


@pytest.mark.parametrize("family", FAMILIES)
def test_the_padding_token_is_transformers(family):
    default = transformers.CONFIG_MAPPING[family]()
    assert weights.pad_token({"model_type": family}) == default.get_text_config().pad_token_id
    stated = {"pad_token_id": 7}
    raw = {"model_type": family, "text_config": stated} if family == "gemma3" else {"model_type": family, **stated}
    assert weights.pad_token(raw) == 7
