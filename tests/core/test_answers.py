"""Stored values: what is kept, by what it is found again, what a kill and a broken file do to it."""

import math
import shutil
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ple_jax import rewards
from ple_jax.core import answers
from ple_jax.core.answers import Cache, key
from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import UserError
from ple_jax.core.types import Reward


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rewards.sqlite"


class Lengths:
    """A reward that counts what it is asked."""

    def __init__(self, **more):
        self.asked = []
        self.reward = Reward("lengths", self.score, **{"batch": 2, **more})

    def score(self, prompts, responses):
        self.asked += responses
        return [float(len(r)) for r in responses]


@settings(max_examples=20)  # each waits for the disk
@given(st.dictionaries(st.text("abc", min_size=1), st.floats(allow_nan=False)))
def test_what_is_put_is_got(tmp_path_factory, stored):
    path = tmp_path_factory.mktemp("cache") / "rewards.sqlite"
    with Cache(path) as cache:
        cache.put(stored)
        cache.put({})
        assert cache.get([*stored, "nothing"]) == stored
    with Cache(path) as cache:
        assert cache.get(stored) == stored


def test_it_opens_at_its_first_use(path):
    with Cache(path) as cache:
        assert not path.exists()
        assert cache.get(["a"]) == {}
    cache.put({"a": 1.0})  # and again after it was closed
    with cache:
        assert cache.get(["a"]) == {"a": 1.0}
    path.unlink()


def test_the_key_is_everything():
    turns = [{"role": "user", "content": "Hi"}]
    tool = {"type": "function", "function": {"name": "add"}}
    other = {"role": "user", "content": "Hi", "name": "Ann"}
    prompts = [
        "p", "\n\nHuman: Hi\n\nAssistant:", Conversation(turns), Conversation([other]), Conversation(turns, [tool]),
    ]  # fmt: skip
    assert prompts[1] == prompts[2] == prompts[3] == prompts[4]
    keys = {key(name, version, p, r) for name in "ab" for version in "12" for p in prompts for r in ("", "x", "\ud800", "é")}
    assert len(keys) == 2 * 2 * 5 * 4
    # texts do not run into one another
    assert key("a", "1", "p", "qr") != key("a", "1", "pq", "r")
    # whatever order a turn's words come in
    again = Conversation([{"content": "Hi", "role": "user"}])
    assert key("a", "1", again, "x") == key("a", "1", Conversation(turns), "x")


def test_whatever_else_is_read_is_in_the_key():
    """Every field and every value of it makes another key, whatever their order; nothing more to read makes no other one."""
    reads = [None, {"answer": "4"}, {"answer": "5"}, {"answer": 4}, {"text": "4"}, {"answer": "4", "text": ""}]
    assert len({key("a", "1", "p", "x", r) for r in reads}) == len(reads)
    assert key("a", "1", "p", "x", {}) == key("a", "1", "p", "x")
    assert key("a", "1", "p", "x", {"a": 1, "b": [2]}) == key("a", "1", "p", "x", {"b": [2], "a": 1})


def test_only_what_is_missing_is_asked(path):
    lengths = Lengths()
    with Cache(path) as cache:
        first = rewards.score(lengths.reward, ["p"] * 3, ["a", "bb", "a"], cache=cache)
        assert first.values.tolist() == [1, 2, 1] and lengths.asked == ["a", "bb"]
    with Cache(path) as cache:
        second = rewards.score(lengths.reward, ["p", "p", "q", "p"], ["bb", "ccc", "a", "a"], cache=cache)
        assert second.values.tolist() == [2, 3, 1, 1] and lengths.asked == ["a", "bb", "ccc", "a"]
        # another version of the reward, or another reward, shares nothing
        for more in ({"version": "2"}, {}):
            other = Lengths(**more)
            reward = other.reward if more else Reward("others", other.score)
            assert rewards.score(reward, ["p"], ["a"], cache=cache).values.tolist() == [1] and other.asked == ["a"]


def test_a_stored_value_is_the_new_one_to_the_bit(path):
    numbers = [-0.0, 0.1 + 0.2, 1 / 3, 1e-320, -1.7976931348623157e308, 2.0**53 - 1]
    reward = Reward("numbers", lambda prompts, responses: numbers)
    with Cache(path) as cache:
        new = rewards.score(reward, ["p"] * 6, list("abcdef"), cache=cache).values
        stored = rewards.score(reward, ["p"] * 6, list("abcdef"), cache=cache).values
    assert new.tobytes() == stored.tobytes() and new.tolist() == numbers


def test_kwargs_never_share_values(path):
    with Cache(path) as cache:
        for kwargs, value in (({"letters": "a"}, 0.75), ({"letters": "b"}, 0.25), ({"letters": "a"}, 0.75)):
            reward = rewards.load("letters", kwargs)
            assert rewards.score(reward, ["p"], ["aaab"], cache=cache).values.tolist() == [value]


def test_what_is_not_finite_is_asked_again(path):
    answers = iter([[1.0, math.nan], [math.inf, 2.0], [3.0]])
    reward = Reward("odd", lambda prompts, responses: next(answers))
    with Cache(path) as cache:
        np.testing.assert_equal(rewards.score(reward, ["p", "p"], ["a", "b"], cache=cache).values, [1, math.nan])
        np.testing.assert_equal(rewards.score(reward, ["p"] * 3, ["a", "b", "c"], cache=cache).values, [1, math.inf, 2])
        np.testing.assert_equal(rewards.score(reward, ["p"] * 3, ["a", "b", "c"], cache=cache).values, [1, 3, 2])


@pytest.mark.parametrize("error", [ZeroDivisionError("later"), UserError("later")])
def test_what_came_before_a_failure_is_kept(path, error):
    class Fails(Lengths):
        def score(self, prompts, responses):
            if "ddd" in responses:
                raise error
            return super().score(prompts, responses)

    broken, mended = Fails(), Lengths()
    texts = ["a", "bb", "ccc", "ddd", "e"]
    with Cache(path) as cache:
        with pytest.raises(UserError, match="later"):
            rewards.score(broken.reward, ["p"] * 5, texts, cache=cache)
        assert rewards.score(mended.reward, ["p"] * 5, texts, cache=cache).values.tolist() == [1, 2, 3, 3, 1]
    assert broken.asked == ["a", "bb"] and mended.asked == ["ccc", "ddd", "e"]


def test_what_an_incomplete_call_scored_is_kept(path):
    def stops(prompts, responses):
        raise answers.Incomplete("the server went away", np.array([1.0, math.nan, 3.0]))

    lengths = Lengths()
    with Cache(path) as cache:
        with pytest.raises(answers.Incomplete, match="^the server went away$"):
            rewards.score(Reward("lengths", stops), ["p"] * 3, ["a", "bb", "ccc"], cache=cache)
        assert rewards.score(lengths.reward, ["p"] * 3, ["a", "bb", "ccc"], cache=cache).values.tolist() == [1, 2, 3]
    assert lengths.asked == ["bb"]
    with pytest.raises(answers.Incomplete, match="went away"):
        rewards.score(Reward("lengths", stops), ["p"] * 3, ["a", "bb", "ccc"])
    with pytest.raises(UserError, match="'lengths' gave .* of shape .* for 1 responses"):  # of another call
        rewards.score(Reward("lengths", stops), ["p"], ["a"])


def test_kill_9_loses_the_call_in_hand_alone(path):
    program = f"""
import os, signal
from ple_jax import rewards
from ple_jax.core.answers import Cache
from ple_jax.core.types import Reward

def lengths(prompts, responses):
    if "eeeee" in responses:
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(r)) for r in responses]

with Cache({str(path)!r}) as cache:
    rewards.score(Reward("lengths", lengths, batch=2), ["p"] * 6, ["a", "bb", "ccc", "dddd", "eeeee", "f"], cache=cache)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    lengths = Lengths()
    with Cache(path) as cache:
        found = rewards.score(lengths.reward, ["p"] * 6, ["a", "bb", "ccc", "dddd", "eeeee", "f"], cache=cache)
    assert found.values.tolist() == [1, 2, 3, 4, 5, 1] and lengths.asked == ["eeeee", "f"]


def damage_header(path):
    path.write_bytes(b"not a database" * 300)


def damage_end(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [damage_header, damage_end])
def test_a_damaged_file_says_what_to_do(path, damage):
    with Cache(path) as cache:
        cache.put({f"{i:064}": float(i) for i in range(2000)})
    damage(path)
    with Cache(path) as cache, pytest.raises(UserError, match=r"rewards.sqlite is damaged .*delete it"):
        cache.get([f"{i:064}" for i in range(2000)])
    with Cache(path) as cache, pytest.raises(UserError, match=r"rewards.sqlite is damaged .*delete it"):
        cache.put({f"{i:064}": float(i) for i in range(2000)})


def test_a_folder_that_was_removed_in_the_meantime_is_named(tmp_path):
    """SQLite itself says "attempt to write a readonly database"."""
    folder = tmp_path / "run"
    folder.mkdir()
    with Cache(folder / "it") as cache:
        cache.put({"a": 1.0})
        shutil.rmtree(folder)
        with pytest.raises(UserError, match=r"run/it is gone: something removed it, or its folder"):
            cache.put({"b": 1.0})


def test_what_a_deletion_does_not_mend(tmp_path, path):
    with Cache(tmp_path / "nowhere" / "it") as cache, pytest.raises(UserError, match="unable to open.*mend that"):
        cache.get(["a"])
    with Cache(path) as cache:
        cache.put({"a": 1.0})
        other = sqlite3.connect(path)
        other.execute("BEGIN EXCLUSIVE")  # another writer
        cache._open().execute("PRAGMA busy_timeout = 1")
        with pytest.raises(UserError, match="rewards.sqlite: database is locked; mend that"):
            cache.put({"b": 1.0})
        other.rollback()
        other.close()
        cache.put({"b": 2.0})
        assert cache.get(["a", "b"]) == {"a": 1.0, "b": 2.0}
