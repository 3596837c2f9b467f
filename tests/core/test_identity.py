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
        ("reward.kwargs", {"timeout": 3.0}, True, False),  # kept, for modes that take the config from the run
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


@pytest.mark.parametrize(
    ("name", "same", "other"),
    [
        ("remote", {"timeout": 3, "batch": 2, "headers": {"X": "KEY"}, "concurrency": 1}, {"labels": "answer"}),
        ("model", {"rows": 4, "device": "cpu"}, {"label": 1}),
        ("mine.py:reward", {"timeout": 3, "headers": {"Key": "x"}}, {"batch": 2}),  # what it means there nobody knows
        ("code", {"concurrency": 3}, {"timeout": 3}),  # in time, or not passed
        ("my.module:reward", {"retries": 1}, {"rows": [1]}),
        (
            "combine",
            {"parts": {"headers": {"name": "remote", "weight": 1.0, "kwargs": {"url": "x", "timeout": 3}}}},
            {"parts": {"headers": {"name": "remote", "weight": 2.0, "kwargs": {"url": "x"}}}},
        ),
        (
            "combine",
            {"parts": {"a": {"name": "f.py:f", "kwargs": {"timeout": 1}}}},
            {"parts": {"a": {"name": "f.py:f", "kwargs": {"rows": 1}}}},
        ),
    ],
)
@pytest.mark.parametrize("part", ["reward", "eval"])
def test_options_that_say_how_a_reward_is_computed_make_no_other_run(part, name, same, other):
    """By whose reward it is: an option of the same name may mean anything in a function of one's own."""
    keys = {"reward": ("name", "kwargs"), "eval": ("second_reward", "second_kwargs")}[part]

    def of(kwargs):
        return identity.comparable({part: dict(zip(keys, (name, kwargs), strict=True)), "seed": 1})

    parts = {"a": {"name": "f.py:f", "kwargs": {}}} if "a" in other.get("parts", {}) else {
        "headers": {"name": "remote", "weight": 1.0, "kwargs": {"url": "x"}}}  # fmt: skip
    plain = {"parts": parts} if name == "combine" else {}
    assert of(plain) == of(same) != of(other)


def test_headers_of_a_function_of_ones_own_are_not_written_down():
    options = {"headers": {"Key": "secret"}, "scale": 2, "client": {"headers": {"Key": "secret"}, "port": 3}}
    own = kept({"reward.name": "mine.py:reward", "reward.kwargs": options})
    assert own["reward.kwargs"] == {"scale": 2, "client": {"port": 3}}
    ours = kept({"reward.name": "remote", "reward.kwargs": {"url": "http://x", "headers": {"Key": "VARIABLE"}}})
    assert ours["reward.kwargs"] == {"url": "http://x", "headers": {"Key": "VARIABLE"}}
