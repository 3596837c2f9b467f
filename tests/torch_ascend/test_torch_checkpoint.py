"""Checkpoints of the torch backend: exact, whole or not there, few, and refused with names where they do not fit."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_torch_train import backend, head, negative_likelihood
from test_train import random_batch

from ple_jax.core.errors import Damaged, UserError
from ple_jax.models import adapters
from ple_jax.models.adapters import Lora
from torch_ascend import checkpoint, lora

BATCHES = [random_batch(seed=s) for s in range(3)]


def fresh(**options):
    """Another start than `backend`'s, so that what is not restored shows."""
    return backend(adapters.init(tiny.CONFIG, tiny.LORA, seed=9), **options)


def tensors(seed: float) -> dict[str, torch.Tensor]:
    return {"adapter/x": torch.full((2, 3), seed), "step": torch.tensor(seed)}


def test_it_brings_back_everything(tmp_path):
    """Two more steps after a restore give the same bits as two more steps without one."""
    ours = backend()
    ours.update([BATCHES[0]], negative_likelihood, lr=0.01)
    ours.freeze_reference()
    ours.update([BATCHES[0]], negative_likelihood, lr=0.01)
    meta = {"iteration": 1, "metrics": {"loss": 0.1 + 0.2, "none": None}, "environment": ours.environment()}
    ours.save(tmp_path, 1, meta, keep=2)
    again = fresh()
    assert again.restore(tmp_path) == meta
    said = [[b.update([batch], negative_likelihood, lr=0.01) for batch in BATCHES[1:]] for b in (ours, again)]
    assert said[0] == said[1]
    for name, leaf in lora.leaves(ours.policy).items():
        assert torch.equal(lora.leaves(again.policy)[name], leaf), name
    np.testing.assert_array_equal(
        again.logprobs(BATCHES[0], reference=True).logprobs, ours.logprobs(BATCHES[0], reference=True).logprobs
    )
    assert np.abs(ours.logprobs(BATCHES[0]).logprobs - ours.logprobs(BATCHES[0], reference=True).logprobs).max() > 1e-3


def test_a_head_is_brought_back(tmp_path):
    ours = backend(tiny.random_adapter(tiny.CONFIG) | head())
    ours.save(tmp_path, 0, {}, keep=1)
    again = backend(adapters.init(tiny.CONFIG, tiny.LORA, seed=9) | adapters.init_head(tiny.CONFIG, "score"))
    assert again.restore(tmp_path) == {}
    np.testing.assert_array_equal(again.scores(BATCHES[0]), ours.scores(BATCHES[0]))


def test_what_is_kept_does_not_change_with_what_goes_on(tmp_path):
    ours = backend()
    ours.save(tmp_path, 0, {}, keep=1)
    before = load_file(tmp_path / "0" / "state.safetensors")
    ours.update([BATCHES[0]], negative_likelihood, lr=0.01)
    after = load_file(tmp_path / "0" / "state.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())
    # what a run needs to go on: 21 modules of two matrices, as adapter and reference and in Adam's two means
    assert len(before) == 3 * 7 * 2 * 4 and {name.split("/")[0] for name in before} == {
        "adapter", "reference", "exp_avg", "exp_avg_sq"
    }  # fmt: skip


def test_the_newest_is_restored_and_the_newest_are_kept(tmp_path):
    for step in (8, 9, 10, 11):  # as numbers, not as words
        checkpoint.save(tmp_path, step, tensors(step), {"step": step}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "11"]
    found, meta = checkpoint.restore(tmp_path)
    assert meta == {"step": 11} and torch.equal(found["adapter/x"], torch.full((2, 3), 11.0))
    checkpoint.save(tmp_path, 11, tensors(0.5), {"step": "again"}, keep=2)
    assert checkpoint.restore(tmp_path)[1] == {"step": "again"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "11"]


def test_without_a_checkpoint(tmp_path):
    assert backend().restore(tmp_path / "nothing") is None
    (tmp_path / "empty").mkdir()
    assert backend().restore(tmp_path / "empty") is None


@pytest.mark.parametrize("left", ["nothing", "tensors", "everything"])
def test_one_that_was_being_written_is_none(left, tmp_path):
    """What a kill leaves behind, whenever it came: the one before it counts, and the next commit of that step is whole."""
    checkpoint.save(tmp_path, 1, tensors(1), {"step": 1}, keep=2)
    checkpoint.save(tmp_path, 2, tensors(2), {"step": 2}, keep=2)
    (tmp_path / "2.partial").mkdir()
    torn = (tmp_path / "2").rename(tmp_path / "2.partial" / "2")
    if left != "everything":
        (torn / "meta.json").unlink()
    if left == "nothing":
        (torn / "state.safetensors").write_bytes(b"")
    (torn / "rest").write_text("of another time")
    assert checkpoint.restore(tmp_path)[1] == {"step": 1}
    checkpoint.save(tmp_path, 2, tensors(3), {"step": 3}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
    assert sorted(p.name for p in (tmp_path / "2").iterdir()) == ["digests.json", "meta.json", "state.safetensors"]
    assert checkpoint.restore(tmp_path)[1] == {"step": 3}


def test_its_name_appears_when_all_of_it_is_on_disk(tmp_path, monkeypatch):
    """Files, then the folder that lists them, and only then the name; last the name itself."""
    synced, seen = os.fsync, []

    def fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        seen.append((path.name, (tmp_path / "4").exists()))
        synced(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.save(tmp_path, 4, tensors(4), {}, keep=1)
    assert seen == [
        ("digests.json.tmp", False), ("4", False), ("meta.json", False), ("state.safetensors", False), ("4", False),
        (tmp_path.name, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "state.safetensors").write_bytes((folder / "state.safetensors").read_bytes()[:-9]),
        lambda folder: (folder / "state.safetensors").write_bytes(b""),
        lambda folder: (folder / "state.safetensors").unlink(),
        lambda folder: (folder / "meta.json").write_text('{"iteration": 1'),
        lambda folder: (folder / "meta.json").unlink(),
        lambda folder: (folder / "meta.json").write_text('{"step": 3}'),
        lambda folder: (folder / "digests.json").write_text("{}"),
    ],
    ids=["cut off", "empty", "no tensors", "half a meta", "no meta", "another meta", "another list"],
)
def test_a_damaged_one_is_named(damage, tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tensors(step), {"step": step}, keep=2)
    damage(tmp_path / "2")
    with pytest.raises(UserError, match=r"checkpoint .*/2 is damaged \(.+\); remove that folder to go on from the one bef"):
        checkpoint.restore(tmp_path)
    shutil.rmtree(tmp_path / "2")
    assert checkpoint.restore(tmp_path)[1] == {"step": 1}


def test_one_that_the_machine_cannot_read_is_not_damaged(tmp_path, monkeypatch):
    def refused(_):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    checkpoint.save(tmp_path, 1, tensors(1), {}, keep=1)
    monkeypatch.setattr(checkpoint, "load_file", refused)
    with pytest.raises(UserError, match=r"checkpoint .*/1 cannot be read \(.*No such device\): mend that") as error:
        checkpoint.restore(tmp_path)
    assert not isinstance(error.value, Damaged) and "remove" not in str(error.value)


def test_there_is_none_before_the_only_one(tmp_path):
    checkpoint.save(tmp_path, 1, tensors(1), {}, keep=1)
    (tmp_path / "1" / "digests.json").unlink()  # as an earlier version wrote it
    (tmp_path / "1" / "meta.json").write_text("{")
    with pytest.raises(Damaged, match=r"/1 is damaged \(.+\); remove that folder to train again from the start"):
        checkpoint.restore(tmp_path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (Lora(rank=8, targets=("q_proj", "o_proj")), r"o_proj/a is \(32, 4\) torch\.float32, this config needs \(32, 8\)"),
        (Lora(rank=4), r"adapter/model\.layers\.0\.mlp\.down_proj/a is nothing, this config needs \(48, 4\)"),
        (Lora(rank=4, targets=("q_proj",)), r"o_proj/a is \(32, 4\) torch\.float32, this config needs nothing"),
    ],
)
def test_one_of_another_config_is_refused(settings, says, tmp_path):
    some = Lora(rank=4, targets=("q_proj", "o_proj"))
    backend(adapters.init(tiny.CONFIG, some, seed=0), some).save(tmp_path, 0, {}, keep=1)
    other = backend(adapters.init(tiny.CONFIG, settings, seed=0), settings)
    before = {name: x.clone() for name, x in other.tensors().items()}
    with pytest.raises(UserError, match=f"{says}.*empty --workdir"):
        other.restore(tmp_path)
    assert all(torch.equal(x, before[name]) for name, x in other.tensors().items())


def test_meta_is_plain_json(tmp_path):
    ours = backend()
    ours.update([BATCHES[0]], negative_likelihood, lr=0.0)
    ours.save(tmp_path, 3, {"iteration": 3}, keep=1)
    assert json.loads((tmp_path / "3" / "meta.json").read_text()) == {"iteration": 3, "optimizer_steps": 1}
