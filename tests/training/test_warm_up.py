"""Step 0: batches that weigh alike, what a kill leaves, what is refused, and what the iterations inherit."""

import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from test_baselines import config
from test_resume import curve, outcome

from ple_jax import modes
from ple_jax.core.errors import UserError
from ple_jax.training import warm_up
from torch_ascend import backend as torch_backend

COUNT, SIZE = 13, 4  # records; of a batch


@pytest.fixture
def records(tmp_path) -> str:
    file = tmp_path / "sft.jsonl"
    lines = [{"prompt": f"{i} is", "completion": f" {'yes' * (1 + i % 3)}"} for i in range(COUNT)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def settings(records: str, **options) -> FrozenConfigDict:
    given = {"iterations": 1, "warm_up__data": records, "warm_up__epochs": 2, "warm_up__lr": 1e-2, **options}
    return FrozenConfigDict(config("ple", **given))


def test_every_record_once_an_epoch_in_batches_that_weigh_alike():
    groups = warm_up.groups(COUNT, settings("x", warm_up__epochs=3))
    assert [len(group) for group in groups] == [4, 3, 3, 3] * 3  # and not 4, 4, 4 and a single one
    epochs = [np.concatenate(groups[i : i + 4]).tolist() for i in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3
    others = warm_up.groups(COUNT, settings("x", warm_up__epochs=3, seed=1))
    assert np.concatenate(others).tolist() != np.concatenate(groups).tolist()


def test_a_step_divides_by_the_mean_length_of_all_records(records, tmp_path, monkeypatch):
    seen, update = [], torch_backend.TorchBackend.update

    def watched(self, batches, loss, **options):
        seen.append(np.concatenate([batch.data["normaliser"] for batch in batches if "normaliser" in batch.data]))
        return update(self, batches, loss, **options)

    monkeypatch.setattr(torch_backend.TorchBackend, "update", watched)
    assert modes.train(settings(records), tmp_path / "run", "torch") == 0
    lengths = [1 + 3 * (1 + i % 3) + 1 for i in range(COUNT)]  # a blank, the letters, EOS
    np.testing.assert_allclose(np.concatenate(seen[:8]), sum(lengths) / COUNT, rtol=1e-6)


@pytest.mark.parametrize("cut", [4, 6, 9])  # in the first epoch, in the second one, and in the first iteration after it
def test_a_warm_up_that_was_killed_goes_on(cut, records, tmp_path, monkeypatch):
    """From the last commit, two steps apart; to the byte what an undisturbed run gives."""
    c, update, calls = settings(records, ple__rank="dpo", lora__dropout=0.2), torch_backend.TorchBackend.update, []
    assert modes.train(c, tmp_path / "whole", "torch") == 0

    def failing(self, *args, **options):
        calls.append(1)
        if len(calls) == cut:
            raise KeyboardInterrupt
        return update(self, *args, **options)

    monkeypatch.setattr(torch_backend.TorchBackend, "update", failing)
    with pytest.raises(KeyboardInterrupt):
        modes.train(c, tmp_path / "cut", "torch")
    assert (tmp_path / "cut" / "checkpoints").exists() == (cut > 8)
    assert modes.train(c, tmp_path / "cut", "torch") == 0
    begun = cut - 1 if cut > 8 else (cut - 1) // 2 * 2  # steps that are not taken again
    assert len(calls) == cut + 8 + 2 - begun
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole") and curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert not (tmp_path / "cut" / "warm_up").exists()


def test_what_it_left_out_stays_listed(records, tmp_path):
    with open(records, "a") as file:
        file.write('{"prompt": "no answer"}\n')
    c, listed = settings(records, task__max_bad_share=0.1), tmp_path / "run" / "bad_records.jsonl"
    assert modes.train(c, tmp_path / "run", "torch") == 0
    before = listed.read_bytes()
    assert json.loads(before)["set"] == "warm_up"
    assert modes.evaluate(c, tmp_path / "run", "torch") == 0
    assert listed.read_bytes() == before


@pytest.mark.parametrize(("epochs", "says"), [(3, r"step \d of the warm-up .* gave loss"), (1, "the policy's log-prob")])
def test_a_warm_up_that_diverges_is_never_committed(epochs, says, tmp_path):
    """With one step there is no later one whose loss would tell."""
    file = tmp_path / "sft.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i} is", "completion": " yes"}) + "\n" for i in range(SIZE)))
    with pytest.raises(UserError, match=says) as refused:
        modes.train(settings(str(file), warm_up__epochs=epochs, warm_up__lr=1e30), tmp_path / "run", "torch")
    assert "--config.warm_up.lr" in str(refused.value) and "optimizer.lr" not in str(refused.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_iterations_inherit_the_adapter_alone(records, tmp_path, monkeypatch):
    """Where nothing is learned after the warm-up nothing moves: moments that were kept would go on."""
    c = settings(records, iterations=2, ple__blend_weight=0.0, ple__rank_weight=0.0, optimizer__weight_decay=0.0)
    assert modes.train(c, tmp_path / "run", "torch") == 0
    lines = curve(tmp_path / "run")
    # what a token was drawn with is the sampler's, and the reference the trainer's
    assert [line["heldout_kl"] for line in lines] == pytest.approx([0, 0, 0], abs=1e-9) and lines[1]["grad_norm"] == 0
    checkpoints = [Path(tmp_path / "run" / "checkpoints" / str(i)) for i in (1, 2)]
    assert all(path.exists() for path in checkpoints)
