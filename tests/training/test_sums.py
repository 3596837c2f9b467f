"""A task that is right or wrong, learnt from the record's answers: configs/sums.py, with a real model."""

import json
from pathlib import Path
from typing import Any

import pytest
from ml_collections import FrozenConfigDict

from ple_jax import modes
from ple_jax.configs import sums
from ple_jax.data.queries import load_queries

CHANGES: dict[str, dict[str, Any]] = {
    "ple": {"iterations": 5},
    "grpo": {
        "algorithm": "grpo", "iterations": 4,
    },
}  # fmt: skip


def test_no_sum_is_in_both_sets_and_every_answer_is_right() -> None:
    config = sums.get_config()
    sets = [load_queries(config.task[which], reads=("completion",)).queries for which in ("train", "heldout")]
    assert list(map(len, sets)) == [57, 24] and len({query.prompt for some in sets for query in some}) == 81
    for query in (query for some in sets for query in some):
        a, b = map(int, query.prompt.splitlines()[-1].removesuffix(" =").split(" + "))
        assert query.completion == f" {a + b}" and query.prompt.startswith("2 + 2 = 4\n8 + 5 = 13\n")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", CHANGES)
def test_sums_are_learnt(algorithm: str, tmp_path: Path) -> None:
    c = sums.get_config()
    c.sinks, c.model.dtype = (), "float32"
    c.update_from_flattened_dict(CHANGES[algorithm])
    modes.train(FrozenConfigDict(c), tmp_path / "w", "jax")
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    before, after = summary["heldout_reward_before"], summary["best"]["any"]["reward"]
    assert before < 0.6  # 24 sums x 4 answers
    assert after > before + 0.15, "of sums that were not trained on"
    assert summary["best"]["any"]["gain_ci95"][0] > 0
