"""Checkpoints are whole or not there, wherever a kill comes; a file that is not as it was written is named."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from ple_jax.core import commits
from ple_jax.core.errors import Damaged


def save(path: Path, step: int, text: str = "", *, keep: int = 2) -> None:
    with commits.committing(path, step, keep=keep) as partial:
        folder = partial / str(step) / "inner"
        folder.mkdir(parents=True)
        (folder / "state").write_text(text or f"state {step}")
        (folder.parent / "meta").write_text(f"meta {step}")


def read(path: Path) -> str:
    return (commits.newest(path) / "inner" / "state").read_text()


def test_a_commit_has_a_list_of_its_files(tmp_path):
    assert commits.newest(tmp_path / "nothing") is None and commits.newest(tmp_path) is None
    for step in (0, 9, 10, 11):
        save(tmp_path, step)
        assert read(tmp_path) == f"state {step}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "11"]  # by number: 9 is the older one
    listed = json.loads((tmp_path / "11" / "digests.json").read_text())
    assert len(listed.pop("digest")) == 16
    assert listed == {
        "inner/state": hashlib.sha256(b"state 11").hexdigest(), "meta": hashlib.sha256(b"meta 11").hexdigest()
    }  # fmt: skip


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_anywhere_leaves_the_one_before_or_the_new_one(keep, tmp_path, monkeypatch):
    """Killed before every call that changes a folder, or waits for the disk; then the same again, undisturbed."""
    calls = {"left": 0}
    for owner, name in ((os, "rename"), (os, "fsync"), (os, "mkdir"), (os, "rmdir"), (os, "replace"), (os, "unlink")):
        monkeypatch.setattr(owner, name, killing(getattr(owner, name), calls))
    found = set()
    for n in range(1, 99):
        calls["left"] = 10**9
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        for before in (1, 2):
            save(tmp_path / "run", before, keep=keep)
        calls["left"] = n
        try:
            save(tmp_path / "run", 3, "new", keep=keep)
            break
        except KeyboardInterrupt:
            calls["left"] = 10**9
            found.add(read(tmp_path / "run"))
            save(tmp_path / "run", 3, "new", keep=keep)
        assert read(tmp_path / "run") == "new"
        kept = sorted(p.name for p in (tmp_path / "run").iterdir())
        assert kept == ["1", "2", "3"][-keep:]
    assert n > 10 and found == {"state 2", "new"}


def killing(function, calls):
    def call(*args, **kwargs):
        calls["left"] -= 1
        if calls["left"] == 0:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("name", ["inner/state", "meta", "digests.json"])
def test_a_damaged_file_is_named_with_what_to_remove(name, tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    file = tmp_path / "2" / name
    data = file.read_bytes()
    changed = [bytes([*data[:at], data[at] ^ 4, *data[at + 1 :]]) for at in range(0, len(data), 3)]
    for damaged in (b"", data[:-2], *changed):
        file.write_bytes(damaged)
        with pytest.raises(Damaged, match=r"2 is damaged \(.+\); remove that folder to go on from the one before it"):
            commits.newest(tmp_path)
    shutil.rmtree(tmp_path / "2")
    assert read(tmp_path) == "state 1"
    (tmp_path / "1" / "meta").unlink()
    with pytest.raises(Damaged, match=r"meta is gone\); remove that folder to train again from the start"):
        commits.newest(tmp_path)


def test_one_of_an_earlier_version_has_no_list(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "1" / "digests.json").unlink()
    assert read(tmp_path) == "state 1"
