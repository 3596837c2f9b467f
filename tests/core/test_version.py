"""What a run says of the program that made it."""

import datetime
import subprocess
from pathlib import Path

import pytest

from ple_jax.core import version

ROOT = Path(__file__).parents[2]


def git(*arguments, cwd=ROOT):
    found = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True)
    return found.stdout.strip()


def test_the_version_the_commit_and_the_time():
    found = version.project()
    assert found["ple_jax"] == version.VERSION
    now = datetime.datetime.now(datetime.UTC)
    assert abs(now - datetime.datetime.fromisoformat(found["date"])) < datetime.timedelta(minutes=1)
    if (ROOT / ".git").exists():
        assert found["commit"].partition("+")[0] == git("rev-parse", "HEAD")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a package in it, as the version's file sees it."""
    file = tmp_path / "ple_jax" / "core" / "version.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    monkeypatch.setattr(version, "__file__", str(file))
    return file


def test_a_changed_file_is_said_and_no_checkout_has_no_commit(checkout):
    root = checkout.parents[2]
    assert version.project()["commit"] is None
    git("init", "-q", cwd=root)
    git("add", ".", cwd=root)
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one", cwd=root)
    head = git("rev-parse", "HEAD", cwd=root)
    assert version.project()["commit"] == head
    (root / "runs").mkdir()
    (root / "runs" / "untracked").write_text("")
    assert version.project()["commit"] == head  # what a run writes is no change
    checkout.write_text("x = 1\n")
    assert version.project()["commit"] == f"{head}+changes"


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    (checkout.parents[2] / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert version.project()["commit"] is None
