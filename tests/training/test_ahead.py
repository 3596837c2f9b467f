"""A reward server is asked while responses are still being sampled, once for each, and its faults are told as ever."""

import contextlib
import threading
import time

import pytest
from ml_collections import FrozenConfigDict

from configs import tiny
from ple_jax import modes
from ple_jax.core.answers import Cache
from ple_jax.core.errors import UserError
from ple_jax.core.types import Reward
from ple_jax.training import ahead
from ple_jax.training.journal import Journal

pytest_plugins = ["servers"]


def config(server, **more):
    c = tiny.get_config()
    c.sinks, c.iterations, c.sampling.width, c.task.date = (), 1, 2, "2026-01-31"
    c.reward.name, c.reward.kwargs = "remote", {"url": server.url, "batch": 2, "retries": 0, "timeout": 60}
    for name, value in more.items():
        setattr(c.reward, name, value)
    return FrozenConfigDict(c)


def outcome(path):
    found = [*(path / "rollouts").iterdir(), *(path / "evaluations").iterdir()]
    return {file.name: file.read_bytes() for file in found}


def test_it_is_asked_while_others_are_sampled(serve, tmp_path, monkeypatch):
    seen: list[str] = []
    keep = Journal.keep

    def kept(self, *given):
        seen.append("kept")
        # of those before there is time to be asked for
        if len(seen) > 1:
            time.sleep(0.2)
        return keep(self, *given)

    def score(number, body, handler):
        seen.append("asked")
        return {"rewards": [float(len(text)) for text in body["query"]]}

    server = serve(score)
    monkeypatch.setattr(Journal, "keep", kept)
    assert modes.train(config(server), tmp_path / "run", "torch") == 0
    assert "asked" in seen[: len(seen) - 1 - seen[::-1].index("kept")]
    assert seen.index("asked") < 4  # and at once
    assert len(server.asked) == len(set(server.asked))  # none of them twice
    monkeypatch.setattr(ahead, "scoring", lambda *_: contextlib.nullcontext(ahead.nobody))
    assert modes.train(config(server), tmp_path / "after", "torch") == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "after")


def test_a_server_that_fails_is_told_of_as_ever(serve, tmp_path):
    """What it gave before is kept, and the same command goes on from there."""
    broken = threading.Event()
    broken.set()

    def score(number, body, handler):
        return (400, "no", {}) if broken.is_set() and number else {"rewards": [1.0] * len(body["query"])}

    server = serve(score)
    with pytest.raises(UserError, match="400.*give the same command again"):
        modes.train(config(server), tmp_path / "run", "torch")
    assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]
    broken.clear()
    assert modes.train(config(server), tmp_path / "run", "torch") == 0


def test_what_is_no_server_is_not_asked(tmp_path):
    def never(prompts, responses):
        raise AssertionError

    with Cache(tmp_path / "r.sqlite") as cache:
        session = type("Session", (), {"cache": cache})()
        with ahead.scoring(Reward("local", never), session) as ask:
            ask([("p", "r", {})])


def test_an_error_does_not_wait(tmp_path):
    """Of a process that is stopped nobody waits for a server; it is a thread that ends with the process."""
    asked, go_on, cancelled = threading.Event(), threading.Event(), []

    def slow(prompts, responses):
        asked.set()
        go_on.wait(60)
        return [0.0] * len(prompts)

    with Cache(tmp_path / "r.sqlite") as cache:
        session, reward = type("Session", (), {"cache": cache})(), Reward("slow", slow, cancel=lambda: cancelled.append(1))
        with pytest.raises(KeyboardInterrupt), ahead.scoring(reward, session) as ask:
            ask([("p", "r", {})])
            assert asked.wait(60)
            raise KeyboardInterrupt
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "ahead"]
        assert thread.daemon and cancelled == [1]
        go_on.set()
        thread.join(60)
        assert not thread.is_alive()
