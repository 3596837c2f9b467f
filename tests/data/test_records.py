"""Raw records: every kind of source, what one bad line does, and a hub of our own on this machine."""

import csv
import gzip
import hashlib
import http.server
import json
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from ple_jax.core.config import PACKAGE
from ple_jax.core.errors import UserError
from ple_jax.data import records

ROWS = [{"prompt": "one", "n": 1}, {"prompt": "zwei\u2028drei\x85 \U0001f600", "n": 2}, {"prompt": 'a "b", c\nd', "n": 3}]
COMMIT = "a" * 40


def lines(*rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)


def values(source, **options):
    return [record.value for record in records.read(str(source), **options)]


def kinds(source, **options):
    return [record.kind for record in records.read(str(source), **options)]


def save(path: Path, rows) -> Path:
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "csv":
        plain = path.with_name("plain")
        with plain.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        content = plain.read_bytes()
        plain.unlink()
    elif kind == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        content = sink.getvalue().to_pybytes()
    else:
        content = (json.dumps(rows) if kind == "json" else lines(*rows)).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """What `datasets` and the hub's client keep goes to a folder of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "cache" / "modules"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache" / "downloads")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files(tmp_path, suffix, gz):
    path = save(tmp_path / f"v1.0{suffix}{gz}", ROWS)
    found = list(records.read(str(path)))
    wanted = [{k: str(v) for k, v in row.items()} for row in ROWS] if suffix == ".csv" else ROWS
    assert [record.value for record in found] == wanted and not any(record.kind for record in found)
    first = 2 if suffix == ".csv" else 1  # the header is a line too
    assert [(r.where, r.name) for r in found] == [(f"{path}:{i}", f"v1.0:{i}") for i in range(first, first + 3)]


def test_built_in_sets():
    found = list(records.read("tiny_train"))
    assert found[0].where == f"{PACKAGE / 'data' / 'tiny_train.jsonl'}:1" and found[0].name == "tiny_train:1"
    assert found[0].value["prompt"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_one_bad_line_is_one_bad_record(tmp_path, suffix):
    rows = [b'{"a": 1}', b'{"a": 1', b"", b"[1]", b'{"a": "caf\xe9"}', rb'{"a": "\ud83c"}', rb'{"a": "\uD83C\udf00"}']
    rows += [b"[" * 100_000, b'{"a": NaN}', b"3\r", b'\xef\xbb\xbf{"a": 2}', rb'{"\uDF00": 1}', b'{"a": 3}']
    (tmp_path / f"q{suffix}").write_bytes(b"\n".join(rows))
    found = list(records.read(str(tmp_path / f"q{suffix}")))
    assert [r.kind for r in found] == ["", "json", "json", "utf-8", "json", "", "json", "", "json", "json", "json", ""]
    assert [r.name for r in found] == [f"q:{i}" for i in (1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)]
    assert found[5].value == {"a": "\U0001f300"} and found[-1].value == {"a": 3}
    assert f"q{suffix}:2 is not JSON (" in found[1].reason and found[1].text == '{"a": 1'
    assert f"q{suffix}:4 is a list, not an object" in found[2].reason
    assert f"q{suffix}:5 is not UTF-8" in found[3].reason and "caf\ufffd" in found[3].text
    assert "surrogates" in found[4].reason
    for record in found:
        json.dumps(record, ensure_ascii=False).encode()  # can be written down


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    (tmp_path / "q.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n')
    (tmp_path / "q.csv").write_bytes(b"\xef\xbb\xbfa,b\r\n1,2\r\n\r\n3,4\r\n")
    assert values(tmp_path / "q.jsonl") == [{"a": 1}, {"a": 2}]
    assert values(tmp_path / "q.csv") == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


def test_a_bad_element_of_an_array_is_one_bad_record(tmp_path):
    (tmp_path / "q.json").write_text(r' [{"a": 1}, 2, {"a": "\ud83c"}, {"a": 3}]')
    found = list(records.read(str(tmp_path / "q.json")))
    assert [r.kind for r in found] == ["", "json", "json", ""]
    assert "q.json:2 is a int" in found[1].reason and "q.json:3 is not JSON" in found[2].reason
    json.dumps(found, ensure_ascii=False).encode()


def test_a_bad_row_of_csv_is_one_bad_record(tmp_path):
    rows = [b"a,b", b'1,"x', b'y"', b"2", b'3,"x"y', b"4,\xe9", b'5,"' + b"z" * 200_000 + b'"', b'6,"open', b"7,8"]
    (tmp_path / "q.csv").write_bytes(b"\n".join(rows))
    found = list(records.read(str(tmp_path / "q.csv")))
    assert [(r.name, r.kind) for r in found] == [
        ("q:2", ""), ("q:4", "csv"), ("q:5", "csv"), ("q:6", "utf-8"), ("q:7", ""), ("q:8", "csv"),
    ]  # fmt: skip
    assert found[0].value == {"a": "1", "b": "x\ny"} and found[4].value["b"] == "z" * 200_000
    assert "has 1 fields, but the first line names 2 columns" in found[1].reason
    json.dumps(found, ensure_ascii=False).encode()


def test_a_bad_row_of_parquet_is_one_bad_record(tmp_path):
    ends = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    broken = pa.Array.from_buffers(pa.string(), 3, [None, ends, pa.py_buffer(b"a\xffb")])
    pq.write_table(pa.table({"a": broken}), tmp_path / "q.parquet")
    found = list(records.read(str(tmp_path / "q.parquet")))
    assert [(r.kind, r.value) for r in found] == [("", {"a": "a"}), ("utf-8", {}), ("", {"a": "b"})]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("q.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 50_000)[:-20], r"q\.jsonl\.gz is cut off or damaged"),
        ("q.jsonl.gz", b'{"a": 1}', r"q\.jsonl\.gz is cut off or damaged \(Not a gzipped file"),
        ("q.json", b'[{"a": 1}, {"a"', r"q\.json is not JSON \(.*give an array of records"),
        ("q.parquet", b"no parquet at all", r"q\.parquet is not Parquet, or damaged"),
        ("q.csv", b'"a"b,c\n1,2', r"q\.csv:1 is not CSV"),
        ("q.txt", b"text", r"q\.txt is none of \.jsonl, \.json, \.csv, \.parquet"),
    ],
)
def test_a_file_that_is_broken_as_a_whole(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        values(tmp_path / name)


@pytest.mark.parametrize("source", ["quickstart_trian", "no/such.jsonl", "no/such.json.gz", "a b/c", "/no/folder"])
def test_a_source_that_is_nowhere(source):
    with pytest.raises(UserError, match=rf"'{source}' is neither a file nor a folder .*quickstart_heldout"):
        values(source)


@pytest.fixture
def folder(tmp_path) -> Path:
    """As Anthropic's HH: sub-folders with a file for each split."""
    for sub in ("harmless-base", "helpful-base"):
        for split in ("train", "test"):
            (tmp_path / "hh" / sub).mkdir(parents=True, exist_ok=True)
            save(tmp_path / "hh" / sub / f"{split}.jsonl.gz", [{"chosen": f"{sub} {split} {i}"} for i in range(2)])
    return tmp_path / "hh"


def test_a_folder_its_splits_and_subsets(folder):
    assert values(folder, split="test", subsets=("helpful-base",)) == [{"chosen": f"helpful-base test {i}"} for i in (0, 1)]
    both = list(records.read(str(folder), subsets=("helpful-base", "harmless-base")))
    assert [r.value["chosen"] for r in both] == [f"{s} train {i}" for s in ("helpful-base", "harmless-base") for i in (0, 1)]
    assert [r.name for r in both] == [f"{s}/train:{i}" for s in ("helpful-base", "harmless-base") for i in (1, 2)]
    assert sorted(r.value["chosen"] for r in records.read(str(folder))) == sorted(r.value["chosen"] for r in both)
    assert both[0].where == f"{folder}/helpful-base/train.jsonl.gz:1"


def test_a_bad_line_in_a_folder_is_one_bad_record(folder):
    (folder / "helpful-base" / "train.jsonl.gz").write_bytes(gzip.compress(b'{"chosen": "a"}\nbad\n{"other": 1}\n'))
    assert kinds(folder, subsets=("helpful-base",)) == ["", "json", ""]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"split": "validation"}, "has no split 'validation', only train, test; set --config.task.train_split"),
        ({"subsets": ("helpful",)}, "no subset 'helpful', only harmless-base, helpful-base; did you mean 'helpful-base'"),
    ],
)
def test_an_unknown_split_or_subset_of_a_folder(folder, options, says):
    with pytest.raises(UserError, match=says):
        values(folder, **options)


def test_configurations_of_a_folder(folder):
    description = "---\nconfigs:\n"
    for name in ("harmless", "helpful"):
        description += f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}-base/t*.gz\n"
    (folder / "README.md").write_text(f"{description}---\n")
    assert len(values(folder, subsets=("helpful",))) == 4  # what the card calls train
    assert len(values(folder, subsets=("helpful", "harmless"))) == 8
    with pytest.raises(UserError, match=r"has the subsets harmless, helpful; set --config.task.subsets=\"\('harmless',\)\""):
        values(folder)
    with pytest.raises(UserError, match="has no subset 'harmful', only harmless, helpful; did you mean"):
        values(folder, subsets=("harmful",))


def test_a_folder_without_data(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty cannot be read as a data set .*give a folder of .jsonl"):
        values(tmp_path / "empty")


def test_other_files_of_a_folder_are_read_by_datasets(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.txt").write_text("one\ntwo\n")
    assert [(r.name, r.value) for r in records.read(str(tmp_path / "texts"))] == [
        ("train:1", {"text": "one"}), ("train:2", {"text": "two"}),
    ]  # fmt: skip


def test_saved_data_sets(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "both"))
    assert values(tmp_path / "one") == ROWS
    assert values(tmp_path / "both", split="test") == ROWS[1:2]
    assert values(tmp_path, subsets=("both",)) == ROWS
    with pytest.raises(UserError, match="has no split 'val', only train, test"):
        values(tmp_path / "both", split="val")


class Hub(http.server.BaseHTTPRequestHandler):
    """Just enough of a hub for the data set me/set, the folder `root`."""

    root: Path

    def log_message(self, *_):
        pass

    def reply(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code: int, error: str) -> None:
        self.reply(b"", code, X_Error_Code=error, X_Error_Message=error)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        if "me/gated" in path:
            return self.refuse(403, "GatedRepo")
        if "me/set" not in path:
            return self.refuse(401, "RepoNotFound")
        action, _, rest = path.split("me/set", 1)[1].strip("/").partition("/")
        place = self.root / rest.partition("/")[2]
        if not place.exists():
            return self.refuse(404, "EntryNotFound")
        if action == "tree":
            found = place.rglob("*") if "recursive=true" in url.query.lower() else place.iterdir()
            return self.reply(json.dumps([self.entry(p) for p in found]).encode())
        if path.startswith("/api"):
            files = [{"rfilename": str(p.relative_to(self.root))} for p in self.root.rglob("*") if p.is_file()]
            return self.reply(json.dumps({"id": "me/set", "sha": COMMIT, "tags": [], "siblings": files}).encode())
        content = place.read_bytes()
        return self.reply(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    def entry(self, path: Path):
        kind = {"type": "file", "size": path.stat().st_size} if path.is_file() else {"type": "directory"}
        return {**kind, "path": str(path.relative_to(self.root)), "oid": "0" * 40}


@pytest.fixture
def online(folder, tmp_path, monkeypatch):
    """The real clients talk to our hub; gives what ends the connection."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("OurHub", (Hub,), {"root": folder}))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"

    def network(on: bool):
        for module in (constants, datasets.config):
            monkeypatch.setattr(module, "HF_HUB_OFFLINE", not on)

    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_ENDPOINT" if module is datasets.config else "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
    monkeypatch.chdir(tmp_path)
    network(True)
    yield network
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_data_set_on_a_hub(online):
    found = list(records.read("me/set", split="test"))
    texts = sorted(record.value["chosen"] for record in found)
    assert texts == [f"{sub}-base test {i}" for sub in ("harmless", "helpful") for i in (0, 1)]
    assert [r.where for r in found] == [f"me/set/test:{i}" for i in (1, 2, 3, 4)] and found[0].name == "test:1"
    online(False)
    assert list(records.read("me/set", split="test")) == found


def test_sub_folders_of_a_hub_are_found_again_without_a_network(online, folder):
    (folder / "helpful-base" / "train.jsonl.gz").write_bytes(gzip.compress(b'{"chosen": "a"}\nbad\n{"chosen": "b"}\n'))
    found = list(records.read("me/set", subsets=("helpful-base",)))
    assert [(r.kind, r.value.get("chosen")) for r in found] == [("", "a"), ("json", None), ("", "b")]
    assert found[0].name == "helpful-base/train:1"
    online(False)
    assert list(records.read("me/set", subsets=("helpful-base",))) == found
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        values("me/set", subsets=("harmless-base",))


def test_a_stream_of_a_hub(online):
    found = records.read("me/set", split="test", subsets=("harmless-base",), streaming=True)
    assert next(found) == records.Record(
        "me/set/harmless-base/test:1", "harmless-base/test:1", {"chosen": "harmless-base test 0"}
    )
    found.close()


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ("me/set", {"split": "val"}, "me/set has no split 'val', only train, test"),
        ("me/set", {"subsets": ("helpful",)}, "has no subset 'helpful', only harmless-base, helpful-base; did you mean"),
        ("me/gated", {}, "'me/gated' is gated: ask for access at http://.*/datasets/me/gated, then log in with `hf auth"),
        ("me/none", {}, "'me/none' could not be read .*doesn't exist.*`hf download me/none --repo-type dataset"),
    ],
)
def test_what_a_hub_refuses(online, source, options, says):
    with pytest.raises(UserError, match=says):
        values(source, **options)


@pytest.mark.parametrize("options", [{}, {"subsets": ("a",)}, {"streaming": True}])
def test_no_network(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        values("no/such", **options)
    assert "HF_HUB_OFFLINE is set" in str(error.value) and "\n" not in str(error.value)
    assert "`hf download no/such --repo-type dataset --local-dir DIR`, copy DIR here" in str(error.value)
    assert "--config.task.train=DIR or --config.task.heldout=DIR" in str(error.value)


def test_no_code_of_a_data_set_is_run(tmp_path):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text("raise SystemExit('code of a data set was run')")
    with pytest.raises(UserError, match="evil cannot be read as a data set"):
        values(tmp_path / "evil")
