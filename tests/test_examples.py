"""The examples do what they say: each is run as its first lines have it, small, and the notebook as a whole."""

import json
import os
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from patience import LAST_RESORT

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOK = ROOT / "examples" / "variant.ipynb"
SMALL = (
    "--config.model.path=tiny --config.iterations=1 --config.sampling.max_new_tokens=4 --config.lora.rank=2"
    " --config.optimizer.micro_queries=4 --config.sinks=()"
)
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def commands(file: Path) -> list[str]:
    """The commands in an example's docstring."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.startswith("    python examples/")]


def test_there_are_five_and_they_are_short():
    assert [file.stem for file in EXAMPLES] == ["custom_data", "own_reward", "own_variant", "serving", "verifiable_reward"]
    assert max(len(file.read_text(encoding="utf-8").splitlines()) for file in EXAMPLES) < 60
    assert all(commands(file) for file in EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("file", [file for file in EXAMPLES if file.stem != "serving"], ids=lambda file: file.stem)
def test_an_example_trains(file, tmp_path):
    for command in commands(file):
        _, script, *arguments = shlex.split(command)
        line = [sys.executable, str(ROOT / script), *arguments, *SMALL.split()]
        done = subprocess.run(line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        workdir = tmp_path / arguments[arguments.index("--workdir") + 1]
        summary = json.loads((workdir / "summary.json").read_text())
        assert summary["iterations"] == 1 and (workdir / "adapter" / "adapter_model.safetensors").exists()
        rollouts = [json.loads(row) for row in (workdir / "rollouts" / "iter_0000.jsonl").read_text().splitlines()]
        if file.stem == "custom_data":
            assert {row["query_id"].partition("/")[0] for row in rollouts} == {"tickets", "questions"}
            assert "heldout_reward/tickets" in (workdir / "metrics.jsonl").read_text()
        if file.stem == "own_variant":
            for row in rollouts:
                plain, principled = (len(response["tokens"]) for response in row["responses"])
                assert row["decision"] == "blended" or principled <= 1.2 * plain


class Server(BaseHTTPRequestHandler):
    """Speaks as much of OpenAI's protocol as the example asks for; a model says its name, and what it was asked."""

    def _answer(self, body: dict) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_GET(self):
        self._answer({"data": [{"id": "base"}, {"id": "short"}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = f" {request['model']} was asked {request['messages'][-1]['content']}"
        self._answer({"choices": [{"message": {"role": "assistant", "content": said}}]})

    def log_message(self, *_):
        pass


def test_a_server_is_asked_for_all_of_its_models():
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        line = [sys.executable, str(ROOT / "examples" / "serving.py"), f"http://127.0.0.1:{server.server_port}/", "Why?"]
        done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT)
        server.shutdown()
    assert done.stdout == "\nWhy?\n  base: base was asked Why?\n  short: short was asked Why?\n", done.stderr


def test_the_notebook_has_its_outputs():
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) >= 8 and all(cell.execution_count for cell in cells)
    assert any("image/png" in output.get("data", {}) for output in cells[-1].outputs)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION", "XLA_FLAGS"):  # as a reader has it
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(NOTEBOOK, 4)
    at = {"metadata": {"path": str(tmp_path)}}
    # the first start of a kernel compiles what was never imported, beside other tests; by default it has 60 s
    client = NotebookClient(notebook, timeout=None, startup_timeout=LAST_RESORT, kernel_name="python3", resources=at)
    client.execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "ranked True" in said and "nats per token gained" in said
    lines = (tmp_path / "runs" / "notebook_by_margin" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4
