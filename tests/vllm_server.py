"""A server in the process of a test that speaks what `ple_jax.serving.served` uses of vLLM's HTTP API.

Routes, statuses and the words of errors are vLLM 0.32's, which was run beside it. Adapters are really read from the folders
it is told; those it has loaded sit in a registry, of which the engine holds one (--max-loras 1). Two things that a client
may trip over are as they are there: what is computed under an adapter's name and path is kept, whatever lies there later
(the prefix cache), and an adapter that the engine has evicted cannot be unloaded.
"""

import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from ple_jax.core.errors import UserError
from ple_jax.models import peft


class Loaded(NamedTuple):
    path: Path
    tensors: Mapping[str, np.ndarray]
    config: Mapping[str, Any]

    @property
    def digest(self) -> str:
        data = b"".join(name.encode() + self.tensors[name].tobytes() for name in sorted(self.tensors))
        return hashlib.sha256(data).hexdigest()


Sampler = Callable[[Loaded, dict[str, Any]], Iterator[int]]  # (adapter, request) -> tokens without an end


def noise(adapter: Loaded, body: dict[str, Any]) -> Iterator[int]:
    """Tokens that follow from the adapter's weights, the prompt and the seed, which has no say at temperature 0."""
    what = [adapter.digest, body["prompt"], body["seed"] if body["temperature"] else None]
    rng = np.random.default_rng(list(hashlib.sha256(json.dumps(what).encode()).digest()))
    return (256 if rng.random() < 0.1 else int(rng.integers(256)) for _ in itertools.count())


class Vllm(ThreadingHTTPServer):
    """Answers as vLLM does, or as `fault` and `alter` say."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, sample: Sampler = noise, **options: Any):
        """
        Args:
            options: base, max_model_len, loading (VLLM_ALLOW_RUNTIME_LORA_UPDATING), max_lora_rank (0: no --enable-lora),
                dev (VLLM_SERVER_DEV_MODE), key (--api-key), version.
        """
        super().__init__(("127.0.0.1", 0), Handler)
        self.options = {
            "base": "tiny", "max_model_len": 2048, "loading": True, "max_lora_rank": 16, "dev": True, "key": None,
            "version": "0.23.0",
        } | options  # fmt: skip
        self.sample, self.url = sample, f"http://127.0.0.1:{self.server_port}"
        self.fault: Callable[[str, Any], Any] = lambda path, body: None  # an answer instead of the right one
        self.alter: Callable[[dict[str, Any], dict[str, Any]], None] = lambda choice, body: None
        self.registry: dict[str, Loaded] = {}
        self.engine: list[str] = []  # the adapters that it holds
        self.kept: dict[tuple[str, Path], Loaded] = {}  # the prefix cache's
        self.asleep = False
        self.log: list[tuple[str, dict[str, Any] | None]] = []  # (path, body) of every request
        self.used: list[str] = []  # the digest of the adapter behind every completion
        self.lock, self.under_way, self.most = threading.Lock(), 0, 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no error of the server's."""

    def paths(self, *among: str) -> list[str]:
        return [path for path, _ in self.log if not among or path in among]

    def bodies(self, path: str = "/v1/completions") -> list[dict[str, Any]]:
        return [body for asked, body in self.log if asked == path and body is not None]

    # -------------------------------------------------------------- routes

    def answer(self, method: str, path: str, query: str, body: dict[str, Any] | None, key: str | None) -> tuple[int, str]:
        options = self.options
        if path.startswith("/v1") and options["key"] and key != f"Bearer {options['key']}":
            return 401, json.dumps({"error": "Unauthorized"})
        match method, path:
            case "GET", "/version":
                return 200, json.dumps({"version": options["version"]})
            case "GET", "/v1/models":
                base = {"id": options["base"], "root": options["base"], "parent": None}
                cards = [base | {"max_model_len": options["max_model_len"]}]
                for name, adapter in self.registry.items():
                    cards.append({"id": name, "root": str(adapter.path), "parent": options["base"], "max_model_len": None})
                return 200, json.dumps({"object": "list", "data": cards})
            case "POST", "/v1/completions":
                return self.complete(body)
            case "POST", "/v1/load_lora_adapter" if options["loading"]:
                return self.load(body["lora_name"], Path(body["lora_path"]))
            case "POST", "/v1/unload_lora_adapter" if options["loading"]:
                return self.unload(body["lora_name"])
            case "POST", "/sleep" if options["dev"]:
                assert query == "level=1"  # 2 would lose the weights
                self.asleep = True
                return 200, json.dumps({"status": "sleeping", "level": 1})
            case "POST", "/wake_up" if options["dev"]:
                self.asleep = False
                return 200, json.dumps({"status": "awake", "tags": None})
        return 404, '{"detail":"Not Found"}'

    def load(self, name: str, path: Path) -> tuple[int, str]:
        if self.asleep:
            return _error(500, "CUDA error: an illegal memory access was encountered")
        if name in self.registry:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if not self.options["max_lora_rank"]:
            return _worker_failed("LoRA is not enabled. Use --enable-lora to enable LoRA.")
        if not path.is_absolute() or not path.is_dir():
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}")
        try:
            tensors, config = peft.read(path)
        except UserError as error:
            return _worker_failed(str(error))
        if config["r"] > (limit := self.options["max_lora_rank"]):
            return _worker_failed(f"LoRA rank {config['r']} is greater than max_lora_rank {limit}.")
        with self.lock:
            self.registry[name] = Loaded(path, tensors, config)
            self.engine = [name]
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name: str) -> tuple[int, str]:
        if name not in self.registry:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        if name not in self.engine:
            return _error(500, f"Failed to remove lora adapter '{name}' from the engine.")
        with self.lock:
            del self.registry[name]
            self.engine.remove(name)
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def complete(self, body: dict[str, Any]) -> tuple[int, str]:
        if self.asleep:
            return _error(500, "EngineCore encountered an issue.")
        name, prompt, limit = body["model"], body["prompt"], body["max_tokens"]
        if name not in self.registry:
            return _error(404, f"The model `{name}` does not exist.")
        if len(prompt) + limit > self.options["max_model_len"]:
            return _error(400, f"This model's maximum context length is {self.options['max_model_len']} tokens.")
        with self.lock:
            adapter = self.registry[name]
            if not (adapter.path / peft.WEIGHTS).exists():  # it is read again whenever the engine has dropped it
                return _error(500, f"Loading lora {name} failed: No adapter found for {adapter.path}")
            adapter = self.kept.setdefault((name, adapter.path), adapter)
            self.used.append(adapter.digest)
        stop = set(body["stop_token_ids"]) | (set() if body["ignore_eos"] else {257})
        tokens: list[int] = []
        for token in itertools.islice(self.sample(adapter, body), limit):
            tokens.append(token)
            if token in stop:
                break
        stopped = tokens[-1] if tokens[-1] in stop else None
        choice = {
            "index": 0, "text": "", "logprobs": None, "finish_reason": "length" if stopped is None else "stop",
            "stop_reason": stopped,
        }  # fmt: skip
        if body.get("return_token_ids"):
            choice |= {"token_ids": tokens, "prompt_token_ids": prompt}
        if body.get("logprobs") is not None:
            choice["logprobs"] = {"token_logprobs": [-(token % 7) / 4 for token in tokens], "tokens": [""] * len(tokens)}
        self.alter(choice, body)
        return 200, json.dumps({"object": "text_completion", "model": name, "choices": [choice]})


class Handler(BaseHTTPRequestHandler):
    server: Vllm

    def answer(self) -> None:
        server, parts = self.server, urlsplit(self.path)
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(data) if data else None
        with server.lock:
            server.log.append((parts.path, body))
            server.under_way += 1
            server.most = max(server.most, server.under_way)
        try:
            found = server.fault(parts.path, body)
            if found is None:
                found = server.answer(self.command, parts.path, parts.query, body, self.headers.get("Authorization"))
        finally:
            with server.lock:
                server.under_way -= 1
        if found == "hang up":
            self.connection.close()
            return
        status, text = found
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST = answer

    def log_message(self, *args: Any) -> None:
        pass


def _error(status: int, message: str) -> tuple[int, str]:
    return status, json.dumps({"error": {"message": message, "type": "Error", "param": None, "code": status}})


def _worker_failed(why: str) -> tuple[int, str]:
    return _error(500, f"Call to add_lora method failed: Worker failed with error '{why}', please check the stack trace")
