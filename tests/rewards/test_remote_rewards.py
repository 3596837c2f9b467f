"""Rewards behind an address, against servers in this process that are slow, broken, rude or wrong."""

import email.utils
import math
import random
import socket
import struct
import threading
import time

import numpy as np
import pytest
from patience import LAST_RESORT

from ple_jax import rewards
from ple_jax.core import answers, retry
from ple_jax.core.answers import Cache
from ple_jax.core.conversation import Conversation
from ple_jax.core.errors import UserError

pytest_plugins = ["servers"]

TEXTS = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff", "g", "hh"]
LENGTHS = [float(len(text)) for text in TEXTS]


def lengths(number, body, handler):
    """What a reward server says: the length of every response, which here follows an empty prompt."""
    return {"rewards": [float(len(text)) for text in body["query"]]}


def remote(server, **kwargs):
    return rewards.load("remote", {"url": server.url, "batch": 1, "backoff": 0.001, "timeout": 60, **kwargs})


def score(reward, texts=TEXTS, cache=None):
    return rewards.score(reward, [""] * len(texts), texts, cache=cache).values


# ---------------------------------------------------------------- the protocol


def test_requests_are_openrlhfs(serve):
    server = serve(lengths)
    talk = Conversation([{"role": "user", "content": "Hi"}])
    reward = remote(server, batch=2)
    found = rewards.score(reward, ["Once", "Once", talk], [" upon", " more", "Hello"]).values
    assert found.tolist() == [9, 9, 29]
    assert sorted(server.bodies, key=lambda body: len(body["query"])) == [
        {"query": ["\n\nHuman: Hi\n\nAssistant: Hello"], "prompts": ["\n\nHuman: Hi\n\nAssistant:"], "labels": [""]},
        {"query": ["Once upon", "Once more"], "prompts": ["Once", "Once"], "labels": ["", ""]},
    ]
    assert [path for path, _ in server.headers] == ["/get_reward"] * 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ('{"rewards": [1, 2.5], "scores": [9, 9], "extra_logs": {"x": [1, 2]}}', [1, 2.5]),
        ('{"rewards": [[1], [2.5]]}', [1, 2.5]),
        ('{"rewards": [0, -0.5]}', [0, -0.5]),
        ('{"rewards": [[1, 2.5]]}', [1, 2.5]),
        ('{"rewards": [NaN, 2.5]}', [math.nan, 2.5]),
        ('{"rewards": [null, -Infinity]}', [math.nan, -math.inf]),
    ],
)
def test_shapes_of_answers(serve, given, expected):
    server = serve(lambda *_: (200, given, {}))
    np.testing.assert_array_equal(score(remote(server, batch=2), ["a", "b"]), expected)
    assert len(server.bodies) == 1


def test_one_value_for_one_text(serve):
    server = serve(lambda *_: {"rewards": 0.5})
    assert score(remote(server), ["a"]).tolist() == [0.5]


def test_an_order_that_delays_do_not_change(serve):
    noise = random.Random(0)

    def late(number, body, handler):
        time.sleep(noise.random() * 0.02)
        return lengths(number, body, handler)

    server = serve(late)
    texts = ["x" * n for n in noise.sample(range(1, 100), 60)]
    assert score(remote(server, batch=3, concurrency=5), texts).tolist() == [len(t) for t in texts]
    assert 1 < server.most <= 5 and server.asked == sorted(texts)


def test_requests_are_under_way_at_once_but_no_more(serve):
    together = threading.Barrier(3, timeout=LAST_RESORT)

    def waits(number, body, handler):
        together.wait()  # for two others
        return lengths(number, body, handler)

    server = serve(waits)
    assert score(remote(server, concurrency=3), TEXTS[:6]).tolist() == LENGTHS[:6]
    assert server.most == 3


def test_keys_come_from_the_environment(serve, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", "secret-1\n")
    monkeypatch.setenv("MY_OTHER", "secret-2")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server = serve(lengths)
    reward = remote(server, api_key_env="MY_KEY", headers={"X-Api-Key": "MY_OTHER"})
    assert score(reward, ["a"]).tolist() == [1]
    (_, headers), = server.headers  # fmt: skip
    assert headers["Authorization"] == "Bearer secret-1" and headers["X-Api-Key"] == "secret-2"
    assert "secret" not in repr(reward)


def test_a_server_that_repeats_the_key(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-1")
    server = serve(lambda *_: (401, '{"error": "invalid key secret-1"}', {}))
    with pytest.raises(UserError) as error:
        score(remote(server, api_key_env="MY_KEY"), ["a"])
    assert "401" in str(error.value) and "invalid key ***" in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize("said", ["k3y/of+mine", "k3y%2Fof%2Bmine", "?token=k3y%2Fof%2Bmine&v=1", "x" * 295 + "k3y/of+mine"])
def test_a_server_that_repeats_a_key_of_the_query(serve, capsys, said):
    """Whole, the value alone, decoded, or where the message is cut: no part of it is shown."""
    server = serve(lambda *_: (401, f"{said} is unknown", {}))
    server.url += "?token=k3y%2Fof%2Bmine&v=1"
    with pytest.raises(UserError, match="status 401") as error:
        score(remote(server), ["a"])
    assert "k3y" not in str(error.value) + capsys.readouterr().err


def test_versions_and_names(serve):
    server, other = serve(lengths), serve(lengths)
    versions = {remote(s, **more).version for s in (server, other) for more in ({}, {"version": "1"})}
    assert len(versions) == 3  # a version of the user's own stands for the model, wherever it is
    assert remote(server).version == remote(server, timeout=9, retries=1, concurrency=9, batch=3).version
    assert remote(server, name="helpful").name == "helpful" and remote(server).name == "remote"
    assert remote(server, batch=3, concurrency=5).batch >= 15


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"url": "localhost:5000"}, "url = 'localhost:5000': give an address such as"),
        ({"url": "ftp://x/y"}, "url = 'ftp://x/y'"),
        ({"url": "http:///get"}, "url = 'http:///get'"),
        ({"url": "http://me:secret@host/x"}, "^((?!secret).)*url has a user name((?!secret).)*$"),
        ({"batch": 0}, "batch = 0: give at least 1"),
        ({"retries": -1}, "retries = -1: give at least 0"),
        ({"concurrency": 0}, "concurrency = 0: give at least 1"),
        ({"max_failures": 0}, "max_failures = 0"),
        ({"timeout": 0}, "timeout = 0"),
        ({"timeout": math.inf}, "timeout = inf"),
        ({"backoff": -1}, "backoff = -1"),
        ({"api_key_env": "NO_SUCH_KEY"}, "api_key_env: the environment variable 'NO_SUCH_KEY' is not set"),
        ({"headers": {"X-Key": "NO_SUCH_KEY"}}, "headers: the environment variable 'NO_SUCH_KEY' is not set"),
        ({"retrys": 1}, "unexpected keyword argument 'retrys'"),
    ],
)
def test_options_that_cannot_be(kwargs, says):
    with pytest.raises(UserError, match=says):
        rewards.load("remote", {"url": "http://localhost:5000/get_reward", **kwargs})


# ---------------------------------------------------------------- faults


def reset(number, body, handler):
    """Half an answer, then a reset."""
    handler.wfile.write(b'HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n{"rewards": [')
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def cut(number, body, handler):
    """Half an answer, then the end."""
    handler.wfile.write(b'HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n{"rewards": [1.0]}')


def hangs_up(number, body, handler):
    handler.connection.close()


FAULTS = {
    "500": lambda *_: (500, "out of memory", {}),
    "503": lambda *_: (503, "", {}),
    "408": lambda *_: (408, "too slow", {}),
    "429": lambda *_: (429, "slow down", {}),
    "429 at once": lambda *_: (429, "slow down", {"Retry-After": "0"}),
    "odd wait": lambda *_: (503, "", {"Retry-After": "soon"}),
    "malformed": lambda *_: (200, '{"rewards": [1.0', {}),
    "no JSON": lambda *_: (200, "<html>Welcome</html>", {}),
    "empty": lambda *_: (200, "", {}),
    "too many": lambda *_: {"rewards": [1.0, 2.0]},
    "none": lambda *_: {"rewards": []},
    "other words": lambda *_: {"reward": [1.0]},
    "a list": lambda *_: [1.0],
    "text": lambda *_: {"rewards": ["good"]},
    "a number as text": lambda *_: {"rewards": ["1.0"]},
    "ragged": lambda *_: {"rewards": [{"a": 1}]},
    "reset": reset,
    "cut": cut,
    "hangs up": hangs_up,
    "nested": lambda *_: (200, '{"rewards": ' + "[" * 100_000, {}),
    "too large": lambda *_: (200, '{"rewards": [1' + "0" * 400 + "]}", {}),
    "true": lambda *_: (200, '{"rewards": [true]}', {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_pass(serve, fault):
    failing = set(TEXTS[::2])

    def sometimes(number, body, handler):
        (text,) = body["query"]
        if text in failing:
            failing.remove(text)
            return FAULTS[fault](number, body, handler)
        return lengths(number, body, handler)

    server = serve(sometimes)
    assert score(remote(server)).tolist() == LENGTHS
    assert server.asked == sorted(TEXTS + TEXTS[::2])


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("500", "status 500: out of memory"),
        ("429", "status 429: slow down"),
        ("malformed", "JSONDecodeError"),
        ("no JSON", "JSONDecodeError"),
        ("too many", "2 rewards for 1 texts"),
        ("other words", "no \"rewards\": {'reward': \\[1.0\\]}"),
        ("a list", r'no "rewards": \[1.0\]'),
        ("text", "no number: 'good'"),
        ("reset", "(Connection|ChunkedEncoding)Error"),
        ("cut", "ChunkedEncodingError"),
        ("hangs up", "ConnectionError"),
        ("nested", "RecursionError"),
        ("too large", "OverflowError"),
        ("true", "no number: 'True'"),
    ],
)
def test_faults_that_stay(serve, tmp_path, fault, says):
    """What came before is kept, and the same command sends only the rest."""
    broken = True

    def later(number, body, handler):
        (text,) = body["query"]
        return FAULTS[fault](number, body, handler) if broken and len(text) > 2 else lengths(number, body, handler)

    server = serve(later)
    with Cache(tmp_path / "rewards.sqlite") as cache:
        reward = remote(server, retries=1, max_failures=3, concurrency=2)
        with pytest.raises(answers.Incomplete, match=rf"http://127.*/get_reward: .*{says}.*same command again") as error:
            score(reward, TEXTS[:6], cache)
        np.testing.assert_array_equal(error.value.values, [1, 2, *[math.nan] * 4])
        failed = [text for text in server.asked if len(text) > 2]
        assert len(failed) <= 2 * 4  # three failed, each tried twice, and one may have been under way
        broken, before = False, len(server.bodies)
        assert score(reward, TEXTS[:6], cache).tolist() == LENGTHS[:6]
        assert sorted(body["query"][0] for body in server.bodies[before:]) == TEXTS[2:6]


def test_a_slow_server(serve):
    wait = threading.Event()

    def slow(number, body, handler):
        if number == 0:
            wait.wait(LAST_RESORT)
        return lengths(number, body, handler)

    server = serve(slow)
    assert score(remote(server, timeout=1), ["a"]).tolist() == [1]
    assert len(server.bodies) == 2
    wait.set()


def test_a_server_that_never_answers(serve):
    wait = threading.Event()
    server = serve(lambda *_: wait.wait(LAST_RESORT) and None)
    with pytest.raises(answers.Incomplete, match="Timeout"):
        score(remote(server, timeout=0.05, retries=1, max_failures=1), ["a"])
    wait.set()


def test_nobody_there(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        kwargs = {"url": f"http://127.0.0.1:{taken.getsockname()[1]}/get_reward", "backoff": 0.001, "retries": 1}
        with pytest.raises(answers.Incomplete, match="ConnectionError.*refused.*same command again"):
            score(rewards.load("remote", {**kwargs, "batch": 1}))


@pytest.mark.parametrize("status", [400, 401, 404, 422, 307])
def test_a_refusal_is_told_at_once(serve, status):
    headers = {"Location": "http://elsewhere/"} if status == 307 else {}
    server = serve(lambda *_: (status, '{"detail":\n "no such model"}', headers))
    says = "elsewhere" if status == 307 else r'\{"detail": "no such model"\}'
    with pytest.raises(answers.Incomplete, match=rf"status {status}: .*{says}.*; mend that"):
        score(remote(server, concurrency=1))
    assert len(server.bodies) == 1


def test_few_failures_are_no_value_and_the_rest_goes_on(serve, tmp_path):
    poison = {"ccc", "eeeee", "hh"}

    def some(number, body, handler):
        return (500, "", {}) if poison & set(body["query"]) else lengths(number, body, handler)

    server = serve(some)
    expected = [math.nan if text in poison else n for text, n in zip(TEXTS, LENGTHS, strict=True)]
    with Cache(tmp_path / "rewards.sqlite") as cache:
        reward = remote(server, retries=0, max_failures=2, concurrency=1)
        np.testing.assert_array_equal(score(reward, TEXTS, cache), expected)
        assert server.asked == sorted(TEXTS)
        # the failure at the end counts with the one that follows, though another call is between them
        with pytest.raises(answers.Incomplete, match="status 500"):
            score(reward, ["hh", "zz"], cache)


def test_failures_count_over_calls(serve):
    server = serve(lambda *_: (500, "", {}))
    reward = remote(server, retries=0, max_failures=3)
    for _ in range(2):  # and begin anew after they were told
        for text in ("a", "b"):
            assert math.isnan(score(reward, [text])[0])
        with pytest.raises(answers.Incomplete):
            score(reward, ["c"])


def test_values_of_requests_under_way_are_kept(serve):
    entered, failed = threading.Event(), threading.Event()

    def one_late(number, body, handler):
        if body["query"] == ["a"]:
            entered.set()
            failed.wait(LAST_RESORT)
            time.sleep(0.05)
            return {"rewards": [1.0]}
        entered.wait(LAST_RESORT)
        failed.set()
        return (404, "gone", {})

    server = serve(one_late)
    with pytest.raises(answers.Incomplete, match="404") as error:
        score(remote(server, concurrency=2, backoff=50), TEXTS)
    np.testing.assert_array_equal(error.value.values, [1, *[math.nan] * 7])


def test_of_what_is_cancelled_nothing_more_is_sent(serve, tmp_path):
    """Of the call under way what was sent has its answer, which is kept; the calls that would follow are not made."""
    asked, go_on = threading.Event(), threading.Event()

    def answer(number, body, handler):
        asked.set()
        go_on.wait(LAST_RESORT)
        return lengths(number, body, handler)

    server, failed = serve(answer), []
    reward = remote(server, batch=1, concurrency=1)

    def ask():
        with Cache(tmp_path / "rewards.sqlite") as cache, pytest.raises(answers.Incomplete, match="be asked any more"):
            score(reward, cache=cache)
        failed.append(True)

    thread = threading.Thread(target=ask)
    thread.start()
    assert asked.wait(LAST_RESORT)
    reward.cancel()
    go_on.set()
    thread.join(LAST_RESORT)
    assert failed and len(server.bodies) == 1
    with Cache(tmp_path / "rewards.sqlite") as cache:
        assert score(reward, cache=cache).tolist() == LENGTHS  # it may be asked again, and for what is not there
    assert len(server.bodies) == len(TEXTS)


def test_a_failure_does_not_wait_for_the_pauses_of_others(serve):
    server = serve(lambda number, body, handler: (404, "gone", {}) if body["query"] == ["a"] else (500, "", {}))
    started = time.monotonic()
    with pytest.raises(answers.Incomplete, match="404"):
        score(remote(server, backoff=120.0), TEXTS)
    assert time.monotonic() - started < 30  # the shortest of the pauses


def test_no_pause_follows_the_last_try(serve):
    server, started = serve(lambda *_: (500, "", {"Retry-After": "120"})), time.monotonic()
    assert math.isnan(score(remote(server, retries=0), ["a"])[0])
    assert time.monotonic() - started < 120


# ---------------------------------------------------------------- pauses


def test_pauses_double_and_vary():
    for attempt in range(10):
        some = {retry.pause(attempt, backoff=0.5, asked=None) for _ in range(200)}
        longest = min(0.5 * 2**attempt, 60)
        assert longest / 2 <= min(some) < longest * 0.6 and longest * 0.9 < max(some) <= longest


def test_a_server_may_ask_for_a_longer_pause():
    assert retry.pause(0, backoff=0.1, asked="7") == 7
    assert retry.pause(0, backoff=0.1, asked="0") <= 0.1
    assert 0.05 <= retry.pause(0, backoff=0.1, asked="soon") <= 0.1
    assert retry.pause(0, backoff=0.1, asked="86400") == 86400  # too long: `request` gives up instead
    in_300 = email.utils.formatdate(time.time() + 300, usegmt=True)
    assert 240 < retry.pause(0, backoff=0.1, asked=in_300) <= 300
    assert 0.05 <= retry.pause(0, backoff=0.1, asked="Wed, 21 Oct 2015 07:28:00 GMT") <= 0.1
    for odd in ("1.5", "-1", "", f"Wed, 21 Oct {'9' * 30} 07:28:00 GMT", f"Wed, 21 Oct 2015 07:28:00 -{'9' * 30}"):
        assert 0.05 <= retry.pause(0, backoff=0.1, asked=odd) <= 0.1


def test_retry_after_is_waited_for(serve):
    def once(number, body, handler):
        return (429, "", {"Retry-After": "1"}) if number == 0 else lengths(number, body, handler)

    server, started = serve(once), time.monotonic()
    assert score(remote(server, backoff=0.0), ["a"]).tolist() == [1]
    assert 1 <= time.monotonic() - started < 60  # the longest pause of our own
