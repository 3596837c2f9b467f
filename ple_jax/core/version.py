"""The version of the package, stated once (pyproject.toml reads it here), and the entries of environment.json about it."""

import datetime
import subprocess
from pathlib import Path

VERSION = "0.2.0"


def project() -> dict[str, str | None]:
    """Returns what environment.json says of this package: its version, the commit of its checkout, and the time.

    The commit has "+changes" at its end if a tracked file differs. It is None if there is no checkout, or no git.
    """
    now = datetime.datetime.now(datetime.UTC)
    return {"ple_jax": VERSION, "commit": _commit(Path(__file__).parents[2]), "date": now.isoformat(timespec="seconds")}


def _commit(root: Path) -> str | None:
    if not (root / ".git").exists():  # a package stands in no folder of its own, and git would look above it
        return None
    try:
        of = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"],
            capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return of.stdout.strip() or None
