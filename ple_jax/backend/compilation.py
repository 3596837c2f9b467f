"""JAX's persistent compilation cache, made safe against concurrent use and kills; and a count of the compiled programs.

JAX writes an entry where others read, and never writes an entry that exists. If a process is killed while it writes, half an
entry stays: every later process reads it, warns, and compiles the program anyway. So JAX gets a folder of this process
alone, `used/PID-...`, whose entries are links to the shared ones. What JAX adds is published by a link, so it appears there
as a whole.

The shared folder is one for each version of jaxlib and kind of processor: machine code for one may be wrong on another.
"""

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import IO, NamedTuple

import jax
import jaxlib

from ple_jax.core import processor
from ple_jax.core.files import user_cache
from ple_jax.core.types import Compiled

_WORTH = 0.2  # seconds: a program that compiles faster than this is not kept
_UNUSED = 60 * 86400.0  # seconds since it was last read, after which an entry goes
_COMPILED, _WRITTEN = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_misses"


def folder() -> Path:
    """Returns the folder of compiled programs for this jaxlib and processor.

    It is in JAX_COMPILATION_CACHE_DIR, or else in the user's cache folder.
    """
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    root = Path(given) if given else user_cache() / "programs"
    return root / f"{jaxlib.__version__}-{processor.digest()}"


class _Open(NamedTuple):
    shared: Path
    own: Path
    lock: IO[str]  # held as long as the process lives: whose lock is free has ended, however it did
    process: int
    shared_too: set[str]  # names of entries that need no publishing


_open: _Open | None = None
_seen = Compiled(0, 0.0)
_writing = False  # JAX is about to write an entry: it says so before, and has compiled after


def keep(shared: Path | None = None) -> bool:
    """Makes JAX read compiled programs from a folder and add to it what it compiles; returns whether that succeeded.

    It does not if the folder cannot be written or does not support links: programs are then compiled as if there were no
    cache. Nor does it if JAX_COMPILATION_CACHE_DIR is an address, such as a bucket's, which JAX reads and writes by itself.

    Args:
        shared: the folder; `folder()`, if it is not given.
    """
    global _open
    if shared is None and "://" in os.environ.get("JAX_COMPILATION_CACHE_DIR", ""):
        return False
    try:
        shared = shared or folder()
        if _open is not None and _open.shared == shared:
            return True
        opened = _opened(shared)
    except OSError:
        return False  # what JAX has, if anything, it keeps
    close()
    _open = opened
    jax.config.update("jax_compilation_cache_dir", str(_open.own))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # files of their own, in a folder that goes
    _reset()
    return True


def _opened(shared: Path) -> _Open:
    used = shared / "used"
    used.mkdir(parents=True, exist_ok=True)
    for other in used.iterdir():
        sweep(other)
    own = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=used))
    lock = (own / "unlocked").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (own / "unlocked").rename(own / "lock")  # and not before: another process would take a free lock for a dead one's
    linked = set()
    for entry in shared.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process has just dropped it
            if time.time() - entry.stat().st_atime > _UNUSED:
                entry.unlink()
            else:
                os.link(entry, own / entry.name)
                linked.add(entry.name)
    return _Open(shared, own, lock, os.getpid(), linked)


def sweep(own: Path) -> None:
    """Removes the folder of a process if the process has ended without removing it."""
    with contextlib.suppress(OSError), (own / "lock").open("r+") as lock:  # NFS locks only what is open for writing
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(own)


def publish() -> None:
    """Links the programs that this process compiled into the shared folder, where others find them."""
    if _open is None:
        return
    for entry in _open.own.glob("*-cache"):
        if entry.name not in _open.shared_too:
            with contextlib.suppress(OSError):  # another process was first, or the disk is full: it is compiled again then
                os.link(entry, _open.shared / entry.name)
            _open.shared_too.add(entry.name)


def close() -> None:
    """Publishes what is in the folder of this process, and removes the folder."""
    global _open
    if _open is not None and _open.process == os.getpid():  # and not a child that was forked
        publish()
        shutil.rmtree(_open.own, ignore_errors=True)
        _open.lock.close()
    _open = None


def _reset() -> None:
    """Makes JAX close the cache that it has open: it opens one only once, and would not notice another folder."""
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()


def compiled() -> Compiled:
    """Returns how many programs this process has compiled or read from the cache so far, and the seconds that took."""
    return _seen


def _on_duration(event: str, seconds: float, **_: object) -> None:
    global _seen, _writing
    if event == _COMPILED:
        _seen = Compiled(_seen.programs + 1, _seen.seconds + seconds)
        if _writing:
            _writing = False
            publish()


def _on_event(event: str, **_: object) -> None:
    global _writing
    _writing = _writing or event == _WRITTEN


jax.monitoring.register_event_duration_secs_listener(_on_duration)
jax.monitoring.register_event_listener(_on_event)
atexit.register(close)
