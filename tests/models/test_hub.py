"""Models on a hub: a hub of our own on this machine, read through the real client; and the cache without a network."""

import hashlib
import http.server
import json
import shutil
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from huggingface_hub import constants
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file, save_file

from configs import default, tiny
from ple_jax import modes
from ple_jax.backend import backend
from ple_jax.core.config import RULES, is_hub_id
from ple_jax.core.errors import UserError
from ple_jax.main import parse
from ple_jax.models import hub, weights
from ple_jax.models.layout import expected_shapes
from ple_jax.models.tokenizer import byte_tokenizer

OLD, NEW = "a" * 40, "b" * 40


def write_model(folder: Path, seed: int = 0, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    raw = weights.TINY | changes
    rng = np.random.default_rng(seed)
    shapes = expected_shapes(weights.read(raw, "test"))
    save_file({n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    byte_tokenizer().save_pretrained(folder)
    return folder


class Hub(http.server.ThreadingHTTPServer):
    """Just enough of a hub for its client: revisions of one repository, and what it refuses."""

    def __init__(self, commits: dict[str, Path], refs: dict[str, str]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits, self.refs, self.requests = commits, refs, []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def refuse(self, code: int, error: str) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", error)
        self.send_header("X-Error-Message", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def reply(self, body: bytes, kind: str, **headers: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(path)
        if "/me/gated" in path:
            return self.refuse(403, "GatedRepo")
        if "/me/broken" in path:
            return self.refuse(500, "")
        if "/me/model" not in path:
            return self.refuse(401, "RepoNotFound")
        action, _, rest = path.split("/me/model", 1)[1].strip("/").partition("/")
        revision, _, rest = rest.partition("/")
        commit = self.server.refs.get(revision or "main", revision)
        if commit not in self.server.commits:
            return self.refuse(404, "RevisionNotFound")
        folder = self.server.commits[commit]
        if path.startswith("/api") and action == "tree":
            files = [f for f in folder.rglob("*") if f.is_file()]
            listed = [
                {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": "0" * 40}
                for f in files
            ]
            return self.reply(json.dumps(listed).encode(), "application/json")
        if path.startswith("/api"):
            return self.reply(json.dumps({"id": "me/model", "sha": commit}).encode(), "application/json")
        content = (folder / rest).read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.reply(content, "application/octet-stream", ETag=tag, X_Repo_Commit=commit)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> dict[str, Path]:
    """Two commits, with what must not be downloaded beside the model."""
    root = tmp_path_factory.mktemp("repository")
    commits = {OLD: write_model(root / "old"), NEW: write_model(root / "new", seed=1)}
    for folder in commits.values():
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
        (folder / "modeling_mine.py").write_text("raise SystemExit('code of a checkpoint was run')")
        (folder / "consolidated.safetensors").write_bytes(b"once more")
        (folder / "LICENSE").write_text("free")
        (folder / "original").mkdir()
        (folder / "original" / "model.safetensors").write_bytes(b"once more")
        (folder / "original" / "params.json").write_text("{}")
    return commits


@pytest.fixture
def online(repository, tmp_path, monkeypatch):
    """The client talks to our hub and keeps an empty cache."""
    server = Hub(repository, {"main": NEW, "v1": OLD})
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    files = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """No network, and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def put_in_cache(cache: Path, source: Path, *, commit: str = NEW, ref: str = "main", repo: str = "me/model") -> Path:
    """As the client lays a download out."""
    root = cache / f"models--{repo.replace('/', '--')}"
    folder = shutil.copytree(source, root / "snapshots" / commit, ignore=shutil.ignore_patterns("*.bin", "*.py", "original"))
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    return folder


def weight(folder: Path) -> np.ndarray:
    return load_file(folder / "model.safetensors")["model.norm.weight"]


# ---------------------------------------------------------------- with a network


def test_download(online, repository):
    loaded = weights.load("me/model")
    assert (loaded.name, loaded.revision, loaded.folder.name) == ("me/model", NEW, NEW)
    np.testing.assert_array_equal(loaded.weights["model.norm.weight"], weight(repository[NEW]))
    assert loaded.tokenizer.decode([104, 105]) == "hi"
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENSE"}
    files = {str(f.relative_to(loaded.folder)) for f in loaded.folder.rglob("*") if f.is_file()}
    assert expected <= files and not [f for f in files if f.endswith((".bin", ".py")) or "consolidated" in f or "/" in f]


def test_download_without_weights(online):
    folder = hub.fetch("me/model", weights=False)
    assert (folder / "tokenizer.json").is_file() and not list(folder.glob("*.safetensors"))
    # what a plan downloaded is no reason to believe that the weights are there
    assert "model.norm.weight" in weights.load("me/model").weights


@pytest.mark.parametrize(("revision", "commit"), [("v1", OLD), (OLD, OLD), ("main", NEW), (None, NEW)])
def test_revision(online, repository, revision, commit):
    assert hub.commit("me/model", revision) == commit
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))  # finding out downloads nothing
    loaded = weights.load("me/model", revision)
    assert loaded.revision == commit
    np.testing.assert_array_equal(loaded.weights["model.norm.weight"], weight(repository[commit]))


def test_revision_of_the_config(online):
    config = default.get_config()
    config.model.path, config.model.revision = "me/model", "v1"
    assert backend.load(config).revision == OLD


@pytest.mark.slow
def test_an_export_names_the_commit_of_its_base(online, tmp_path, monkeypatch, capsys):
    """By the run's own directory, after the branch has moved too."""
    c = tiny.get_config()
    c.sinks, c.iterations, c.model.path, c.model.revision = (), 1, "me/model", "v1"
    assert modes.train(FrozenConfigDict(c), tmp_path / "run", "jax") == 0
    online.refs["v1"] = NEW
    run = parse(["ple_jax", f"--workdir={tmp_path / 'run'}", "--mode=export"])
    assert modes.export(run.config, run.workdir, run.backend) == 0
    assert f"vllm serve me/model --revision {OLD} --enable-lora" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["revision"] == OLD
    # and other processes are told which one it is
    loaded = backend.load(c)
    assert weights.pinned(c, loaded._replace(revision=OLD)).model.revision == OLD and c.model.revision == "v1"


def test_a_cached_branch_stays_where_it_was(online):
    assert hub.fetch("me/model").name == NEW
    online.refs["main"] = OLD
    online.requests.clear()
    assert hub.fetch("me/model").name == hub.commit("me/model") == NEW and not online.requests
    assert hub.fetch("me/model", OLD).name == OLD


def test_an_incomplete_cache_is_completed(online):
    folder = hub.fetch("me/model")
    (folder / "model.safetensors").unlink()
    assert hub.fetch("me/model") == folder and (folder / "model.safetensors").is_file()
    # of another host, where somebody else had fetched the description alone
    (folder / "model.safetensors").unlink()
    assert hub.here(folder, ("me/model", None)) == folder and (folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("repo", "revision", "says"),
    [
        ("me/gated", None, r"'me/gated' is gated: ask for access at http://.*/me/gated, then log in with `hf auth login`"),
        ("me/nowhere", None, r"no model 'me/nowhere' on http.*, or it is private .*HF_TOKEN.*no folder of that name in /"),
        ("me/model", "v2", r"'me/model' has no revision 'v2'; set --config.model.revision to a branch, tag or commit"),
        ("me/model", "c" * 40, r"'me/model' has no revision 'c{40}'"),
        ("me/broken", None, r"'me/broken' is no folder .* cannot be reached \(.*500"),
        ("a--b/c", None, r"'a--b/c' cannot be a model on a hub"),
    ],
)
def test_what_the_hub_refuses(online, repo, revision, says):
    with pytest.raises(UserError, match=says):
        weights.load(repo, revision)


def test_a_repository_without_a_model(online, repository, tmp_path):
    folder = shutil.copytree(repository[NEW], tmp_path / "gguf")
    (folder / "model.safetensors").unlink()
    online.commits = online.commits | {NEW: folder}
    with pytest.raises(UserError, match="'me/model' lacks model.safetensors .*must have config.json, tokenizer.json and"):
        weights.load("me/model")


def test_no_connection_falls_back_to_the_cache(online, repository, monkeypatch):
    put_in_cache(Path(constants.HF_HUB_CACHE), repository[NEW])
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert weights.load("me/model").revision == NEW
    with pytest.raises(UserError, match=r"'me/other' is no folder .* cannot be reached \(.*hf download me/other --local"):
        weights.load("me/other")


# ---------------------------------------------------------------- without one


def test_offline_from_the_cache(offline, repository):
    folder = put_in_cache(offline, repository[NEW])
    loaded = weights.load("me/model")
    assert loaded.folder == folder and loaded.revision == hub.commit("me/model") == hub.identity("me/model") == NEW
    np.testing.assert_array_equal(loaded.weights["model.norm.weight"], weight(repository[NEW]))


def test_offline_revisions(offline, repository):
    put_in_cache(offline, repository[NEW])
    put_in_cache(offline, repository[OLD], commit=OLD, ref="v1")
    for revision, commit in (("v1", OLD), ("main", NEW), (OLD, OLD), (None, NEW)):
        assert weights.load("me/model", revision).revision == hub.commit("me/model", revision) == commit


@pytest.mark.parametrize("left", [(), ("config.json", "tokenizer.json", "tokenizer_config.json")])
def test_offline_and_not_in_the_cache(offline, repository, left):
    """Also where another tool has put only the tokenizer there."""
    if left:
        folder = put_in_cache(offline, repository[NEW])
        for file in folder.iterdir():
            if file.name not in left:
                file.unlink()
    says = "lacks model.safetensors" if left else (
        rf"'me/model' is no folder in .*, not \(or not wholly\) in the cache {offline}, and .* \(HF_HUB_OFFLINE is set\); "
        r".*`hf download me/model --revision v1 --local-dir DIR`, copy DIR here and set --config.model.path=DIR"
    )  # fmt: skip
    with pytest.raises(UserError, match=says):
        weights.load("me/model", None if left else "v1")


def test_offline_a_shard_is_missing(offline, repository):
    folder = put_in_cache(offline, repository[NEW])
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "model-2.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="lacks model-2.safetensors"):
        weights.load("me/model")


# ---------------------------------------------------------------- what a path means


@pytest.mark.parametrize("value", ["meta-llama/Llama-3.2-1B", "a/b", "HuggingFaceTB/SmolLM2-135M-Instruct", "org/name_v1.0"])
def test_hub_ids(value):
    assert is_hub_id(value) and RULES["model.path"](value) == ""


@pytest.mark.parametrize(
    "value", ["./a", "/a/b", "a/b/c", "models/x.gguf", "a/b.safetensors", "../a", "a/", "~/a", "a/..", "gpt2", "a b/c", ""]
)
def test_what_is_no_hub_id(value):
    assert not is_hub_id(value)
    assert "or a model on a hub, user/name" in RULES["model.path"](value)


@pytest.mark.parametrize(("value", "fine"), [
    (None, True), ("main", True), ("v1.0", True), ("refs/pr/3", True), (NEW, True), ("", False), ("../x", False),
    ("a b", False), ("/a", False), (3, False),
])  # fmt: skip
def test_revision_rule(value, fine):
    assert (RULES["model.revision"](value) == "") == fine


def test_a_folder_comes_before_the_hub(offline, tmp_path):
    write_model(tmp_path / "me" / "model")
    assert not hub.is_remote("me/model")
    loaded = weights.load("me/model")
    assert loaded.folder == Path("me/model") and loaded.revision is None
    with pytest.raises(UserError, match="model.revision 'v1' goes with a model on a hub, which 'me/model' is not"):
        weights.load("me/model", "v1")


def test_identity(tmp_path):
    one = write_model(tmp_path / "one")
    first = hub.identity(str(one))
    assert first == hub.identity(str(shutil.copytree(one, tmp_path / "copy")))  # neither place nor time
    assert hub.identity(str(write_model(tmp_path / "two", seed=1))) != first
    (one / "tokenizer.json").write_text("{}")
    assert hub.identity(str(one)) != first
    file = tmp_path / "a.gguf"
    file.write_bytes(bytes(100_000))
    zeros = hub.identity(str(file))
    file.write_bytes(bytes(99_999) + b"1")
    assert zeros != hub.identity(str(file)) and len(zeros) == 16
    assert hub.identity("tiny") == "tiny"


def test_what_is_no_file_is_not_read_for_the_identity(tmp_path):
    """A folder called config.json, links to nowhere and in circles: what needs the file says it."""
    model = write_model(tmp_path / "model")
    first = hub.identity(str(model))
    (model / "more.json").mkdir()
    (model / "gone.json").symlink_to(tmp_path / "nowhere")
    (model / "circle.json").symlink_to("circle.json")
    assert hub.identity(str(model)) == first
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        kept = (model / name).read_bytes()
        (model / name).unlink()
        (model / name).mkdir()
        hub.identity(str(model))
        with pytest.raises(UserError, match=str(model)):
            weights.load(str(model))
        (model / name).rmdir()
        (model / name).write_bytes(kept)
