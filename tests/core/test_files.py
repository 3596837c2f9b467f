"""Files are written whole or not at all, and a damaged line is named."""

import gzip
import json
import os
from pathlib import Path

import pytest

from ple_jax.core import files
from ple_jax.core.errors import UserError

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
        files.cut_torn_line(path)
        assert path.read_bytes() == data[: data[:cut].rfind(b"\n") + 1]
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
