"""What identifies a run: against hashlib, and keys named one by one."""

import hashlib

import pytest
from ml_collections import FrozenConfigDict

from configs import default
from ple_jax.core import identity
from ple_jax.core.config import flatten


@pytest.mark.parametrize("parts", [[], [b""], [b"ab", b"c"], [b"abc"]])
def test_a_digest_is_of_all_parts_in_order(parts):
    assert identity.digest(iter(parts)) == hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def kept(changes):
    config = default.get_config()
    config.update_from_flattened_dict(changes)
    return flatten(identity.run_keys(FrozenConfigDict(config), "jax", {"train": "a", "heldout": "b", "model": "m"}))


@pytest.mark.parametrize(
    ("key", "value", "of_run", "of_method"),
    [
        ("lora.rank", 3, True, True),
        ("seed", 3, True, False),
        ("eval.samples", 3, True, False),
        ("sinks", ("csv",), True, False),
        ("mesh.data", 2, True, False),  # kept, but a run may go on with another
        ("generate.samples", 9, False, False),
        ("compare.judge", "model", False, False),
        ("export.merged", True, False, False),
        ("model.revision", "main", False, False),
        ("sampling.server", "http://localhost:1", True, True),
        ("reward.kwargs", {"timeout": 3.0}, False, False),
        ("reward.kwargs", {"scale": 3.0}, True, True),
    ],
)
def test_which_keys_make_another_run_and_another_method(key, value, of_run, of_method):
    plain, other = kept({}), kept({key: value})
    assert (plain != other) is of_run
    assert (identity.method_keys(plain) != identity.method_keys(other)) is of_method


def test_where_a_server_stands_is_no_part_of_a_run():
    assert kept({"sampling.server": "http://localhost:1"}) == kept({"sampling.server": "http://localhost:2"})


@pytest.mark.parametrize("limit", ["task.max_train", "task.max_heldout"])
def test_records_that_a_seed_chooses_make_no_other_method(limit):
    whole, drawn = identity.method_keys(kept({})), identity.method_keys(kept({limit: 5}))
    assert {"inputs.train", "inputs.heldout"} <= whole.keys() and not {"inputs.train", "inputs.heldout"} & drawn.keys()
    assert "inputs.model" in drawn


def test_what_is_of_this_format_stays_as_it_is():
    assert identity.upgraded({"format": 2, "sft": 1}) == {"format": 2, "sft": 1}
