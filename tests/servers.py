"""A web server in the process of a test, which answers as the test says."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Server(ThreadingHTTPServer):
    """Answers with what `answer(number, query)` gives: JSON, (status, text, headers), or nothing if it answered itself."""

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.bodies, self.headers = answer, [], []
        self.lock, self.under_way, self.most = threading.Lock(), 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}/get_reward"

    def handle_error(self, request, client_address):
        """A client that gave up is no error of the server's."""

    @property
    def asked(self):
        return sorted(text for body in self.bodies for text in body["query"])


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.bodies)
            self.server.bodies.append(body)
            self.server.headers.append((self.path, dict(self.headers)))
            self.server.under_way += 1
            self.server.most = max(self.server.most, self.server.under_way)
        try:
            answer = self.server.answer(number, body, self)
        finally:
            with self.server.lock:
                self.server.under_way -= 1
        if answer is not None:
            status, text, headers = answer if isinstance(answer, tuple) else (200, json.dumps(answer), {})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Starts servers; they end with the test."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(answer):
        server = Server(answer)
        servers.append((server, thread := threading.Thread(target=server.serve_forever, args=(0.01,))))
        thread.start()
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()
