"""Requests to servers that send too much, too slowly, or ask for too long a pause; connections that stay open."""

import threading
import time
from collections.abc import Iterator

import pytest

from ple_jax.core import retry

pytest_plugins = ["servers"]

HASTY = retry.Patience(timeout=30.0, retries=3, backoff=0.001)


def ask(server, patience: retry.Patience = HASTY) -> bytes:
    return retry.request(
        "POST", server.url, {}, read=bytes, headers={}, patience=patience, stop=threading.Event()
    )  # fmt: skip


def sent(handler, parts: Iterator[bytes], headers: dict[str, str]) -> None:
    """An answer in parts, until whoever asked has gone."""
    handler.send_response(200)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    try:
        for part in parts:
            handler.wfile.write(part)
            handler.wfile.flush()
    except OSError:
        handler.close_connection = True


def test_an_answer_without_end_is_refused_at_once(serve, monkeypatch):
    monkeypatch.setattr(retry, "LARGEST", 2**20)
    given = []

    def endless():
        while len(given) < 1000:
            given.append(1)
            yield b"x" * 2**16

    server = serve(lambda number, body, handler: sent(handler, endless(), {}))
    with pytest.raises(retry.Refused, match="its answer is longer than 1 MiB"):
        ask(server)
    assert len(server.bodies) == 1 and len(given) < 1000  # it was not read to its end, and not asked for again


@pytest.mark.parametrize("where", ["body", "headers"])
def test_a_server_that_drips_has_a_limit_all_the_same(serve, where):
    """Every byte comes in time; the answer does not."""

    def drops():
        for _ in range(200):
            time.sleep(0.05)
            yield b" " if where == "body" else b"X-Drip: 1\r\n"

    def answer(number, body, handler):
        if where == "body":
            return sent(handler, drops(), {"Content-Length": "200"})
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
        try:
            for drop in drops():
                handler.wfile.write(drop)
        except OSError:
            handler.close_connection = True
        return None

    server, started = serve(answer), time.monotonic()
    with pytest.raises(retry.Failed, match="TimeoutError: no whole answer within 0.5 s"):
        ask(server, HASTY._replace(timeout=0.5, retries=1))
    assert time.monotonic() - started < 8 and len(server.bodies) == 2


@pytest.mark.parametrize("asked", ["100000", "Fri, 01 Jan 2100 00:00:00 GMT"])
def test_a_pause_that_is_too_long_is_told_of_instead(serve, asked):
    server = serve(lambda number, body, handler: (429, "busy", {"Retry-After": asked}))
    with pytest.raises(retry.Failed, match=r"status 429: busy \(and asks for a pause of \d+ s\)"):
        ask(server)
    assert len(server.bodies) == 1


def test_a_long_pause_is_announced(serve, capsys):
    class Stop(threading.Event):
        def wait(self, timeout=None):
            waited.append(timeout)
            return False

    waited: list[float] = []
    busy = (503, "later than secret-1 and secret-2", {"Retry-After": "300"})
    server = serve(lambda number, body, handler: busy if number == 0 else {"yes": 1})
    url, headers = f"{server.url}?key=secret-2", {"Authorization": "Bearer secret-1"}
    found = retry.request("POST", url, {}, read=bytes, headers=headers, patience=HASTY, stop=Stop())
    assert found == b'{"yes": 1}' and waited == [300.0]
    assert "it answered with status 503: later than *** and ***; the next try is in 300 s" in capsys.readouterr().err


def test_one_connection_serves_many_requests(serve, monkeypatch):
    server, opened = serve(lambda number, body, handler: {"number": number}), []
    monkeypatch.setattr(server.RequestHandlerClass, "protocol_version", "HTTP/1.1")
    accept = server.get_request
    monkeypatch.setattr(server, "get_request", lambda: opened.append(1) or accept())
    for number in range(5):
        assert ask(server) == b'{"number": %d}' % number
    assert len(opened) == 1


def test_a_connection_that_the_server_closed_is_opened_again(serve):
    """The servers of the tests speak HTTP/1.0, which closes after every answer."""
    server = serve(lambda number, body, handler: {"number": number})
    assert [ask(server, HASTY._replace(retries=0)) for _ in range(3)] == [b'{"number": %d}' % i for i in range(3)]
