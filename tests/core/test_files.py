"""Files are written whole or not at all, and a damaged line is named."""

import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest

from ple_jax.core import files
from ple_jax.core.errors import Damaged, UserError

LINES = [{"text": "a\u2028b\u0085c"}, {"text": "é", "n": 1.5}, [1, None]]  # str.splitlines would cut the first one twice


def write_and_fail(path: Path) -> None:
    with files.whole(path) as file:
        file.write("half")
        raise KeyboardInterrupt


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, before):
    path = tmp_path / "a.txt"
    if before is not None:
        files.write_text(path, before)
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(path)
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["a.txt"])
    assert before is None or path.read_text() == before


def test_a_file_and_its_name_are_on_disk_before_it_counts(tmp_path, monkeypatch):
    synced, seen = os.fsync, []

    def fsync(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        seen.append((name, (tmp_path / "a.txt").exists()))
        synced(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_bytes(tmp_path / "a.txt", b"whole")
    assert seen == [("a.txt.tmp", False), (tmp_path.name, True)]


def test_writers_write_what_they_are_given(tmp_path):
    path = tmp_path / "a"
    files.write_text(path, "é\n\ud800", errors="replace")
    assert path.read_bytes() == "é\n?".encode()
    files.write_json(path, {"a": (1, float("nan")), "b": float("-inf"), 3: "é"})
    assert path.read_bytes() == '{\n  "a": [\n    1,\n    null\n  ],\n  "b": "-inf",\n  "3": "é"\n}\n'.encode()
    assert files.read_json(path) == {"a": [1, None], "b": "-inf", "3": "é"}
    files.write_jsonl(path, LINES)
    assert path.read_bytes() == '{"text": "a\u2028b\u0085c"}\n{"text": "é", "n": 1.5}\n[1, null]\n'.encode()
    files.write_jsonl(path, LINES[:1], ascii=True)
    files.append_line(path, "2")
    assert path.read_bytes() == b'{"text": "a\\u2028b\\u0085c"}\n2\n'


def test_lines_are_cut_at_newlines_alone_and_a_torn_one_can_be_dropped(tmp_path):
    path = tmp_path / "a.jsonl"
    files.write_jsonl(path, LINES)
    data = path.read_bytes()
    for torn in (False, True):
        assert files.read_jsonl(path, torn=torn) == LINES
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        assert files.read_jsonl(path, torn=True) == LINES[: data[:cut].count(b"\n")]
    path.write_bytes(data[:-1])  # whole, but for its end
    assert files.read_jsonl(path) == LINES
    path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(data))
    assert files.read_jsonl(path.with_suffix(".jsonl.gz")) == LINES


@pytest.mark.parametrize("line", [b'{"a": ', b"", b'"\xff"'])
def test_a_damaged_line_is_named_and_what_to_do_said(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(1).encode() + b"\n" + line + b"\n2\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2 is damaged \(.+\); delete it$"):
        files.read_jsonl(path, remedy="delete it")


SEALED = [{"text": "a\u2028b, \"digest\": \"c", "n": 0.1 + 0.2}, {"tools": [{"digest": "1", "line": 3}]}, {"é": None}]


def test_a_seal_is_the_digest_of_all_that_stands_before_it():
    head = '{"a": 1'
    said = hashlib.sha256(head.encode()).hexdigest()[:16]
    assert files.seal('{"a": 1}') == f'{head}, "digest": "{said}"}}'
    assert files.opened(files.seal('{"a": 1}').encode()) == ({"a": 1}, True)
    assert files.opened(b'{"a": 1}') == ({"a": 1}, False)


def flipped(data: bytes):
    """The data with one bit changed, for every bit."""
    for at in range(len(data)):
        for bit in range(8):
            yield data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def test_every_bit_of_sealed_lines_counts(tmp_path):
    path = tmp_path / "a.jsonl"
    files.write_sealed(path, SEALED)
    assert files.read_sealed(path, remedy="") == SEALED
    data = path.read_bytes()
    assert [json.loads(line)["line"] for line in data.decode().split("\n")[:-1]] == [1, 2, 3]
    *others, last = data.splitlines(keepends=True)
    gone = [b"".join(others), b"".join([*others[:1], last]), b"".join([*others, last, last]), b"".join([last, *others])]
    for damaged in (*flipped(data), *(data[:cut] for cut in range(len(data))), *gone):
        path.write_bytes(damaged)
        with pytest.raises(Damaged, match=r"a\.jsonl.* is damaged \(.+\); delete it$"):
            files.read_sealed(path, remedy="delete it")


def test_a_changed_bit_of_a_sealed_object_is_never_another_value(tmp_path):
    path, value = tmp_path / "a.json", {"a": [1, 0.5], "b": {"c": "é"}}
    files.write_json(path, value, sealed=True)
    assert files.read_json(path) == value
    data = path.read_bytes()
    assert json.loads(data) == value | {"digest": hashlib.sha256(data.rpartition(b',\n  "digest"')[0]).hexdigest()[:16]}
    for damaged in flipped(data):
        path.write_bytes(damaged)
        try:
            found = files.read_json(path)
        except Damaged:
            continue
        assert found.items() > value.items()  # the name of the seal is another: so is the value's, and the rest is whole


def test_lines_of_an_earlier_version_are_read_as_they_are(tmp_path):
    files.write_jsonl(tmp_path / "a.jsonl", SEALED)
    assert files.read_sealed(tmp_path / "a.jsonl", remedy="") == SEALED
