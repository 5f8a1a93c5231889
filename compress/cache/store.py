"""A content-addressed store of finished folders: the fine-tuned baseline and every prefix of a chain.

python -m compress.cache report                 # its entries and their sizes
python -m compress.cache prune --max-gb 20      # least recently used first; entries in use stay
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from compress.cache.digests import compute_checksum, compute_digest, digest_environment
from compress.cache.files import remove_path
from compress.errors import PostconditionError, UserError

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
RESUME = ("resume", "checkpoints", "tensorboard")
"""Folders that a stopped stage leaves for the process that resumes it."""
BEGAN = time.time()


class Cache:
    """Stores folders under the digest of what they were made from.

    An entry is written beside its place and moved there when it is complete. A manifest of its files is checked at
    every use. If several processes need an entry, one makes it and the others wait. After a killed process, the next
    resumes its training. An entry is in use, and is not pruned, until the cache is closed. Locks are the operating
    system's and end with their process.

        with Cache("multirun/.cache") as cache: folder = cache.get(key, make, "baseline")

    Args:
        folder: folder of the cache.
        since: seconds since 1970; older entries are made again.
    """

    def __init__(self, folder: Path | str, since: float = 0.0) -> None:
        self.folder = Path(folder) / "stages"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.since = since
        self.used: list[IO] = []

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *error: object) -> None:
        while self.used:
            self.used.pop().close()

    def get(self, key: Any, make: Callable[[Path], None], name: str) -> Path:
        """Return the folder of ``key``, made by ``make(folder)`` if it does not exist; ``name`` is for the log."""
        entry = self.folder / compute_digest([key, digest_environment()])
        with lock_entry(entry, name):
            self._mark_used(entry)
            if entry.is_dir() and entry.stat().st_mtime >= self.since:
                if not (damage := find_damage(entry)):
                    log.info(f"  {name}: from the cache")
                    return entry
                log.warning(f"  {name}: the cache entry {entry.name} is damaged ({damage}) and is made again")
            begin = time.perf_counter()
            partial = entry.with_suffix(".partial")
            partial.mkdir(exist_ok=True)
            for child in partial.iterdir():
                if child.name not in RESUME:
                    remove_path(child)
            try:
                make(partial)
            except (UserError, PostconditionError):
                remove_path(partial)  # it would fail again
                raise
            for used_up in RESUME[:2]:
                remove_path(partial / used_up)
            (partial / MANIFEST).write_text(json.dumps(make_manifest(partial)))
            old = entry.with_suffix(".old")
            remove_path(old)  # left by a process that was killed here
            if entry.is_dir():
                os.replace(entry, old)
            os.replace(partial, entry)
            remove_path(old)
            log.info(f"  {name}: {time.perf_counter() - begin:.1f} s")
        return entry

    def _mark_used(self, entry: Path) -> None:
        stream = entry.with_suffix(".used").open("a+")  # a shared lock on a network file system needs read access
        self.used.append(stream)
        fcntl.flock(stream, fcntl.LOCK_SH)
        os.utime(stream.name)


@contextmanager
def lock_entry(entry: Path, name: str) -> Iterator[None]:
    """Lock an entry; log under ``name`` if another process has to be waited for."""
    lock = FileLock(f"{entry}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info(f"  {name}: waiting for another process to make it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def make_manifest(folder: Path) -> dict[str, str]:
    """Return the checksum of every file in ``folder``, by its path."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MANIFEST)
    return {str(file.relative_to(folder)): compute_checksum(file) for file in files}


def find_damage(entry: Path) -> str:
    """Return what is wrong with an entry; empty if it is as it was written."""
    try:
        written = json.loads((entry / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} cannot be read"
    current = make_manifest(entry)
    for file in sorted({*written, *current}):
        if written.get(file) != current.get(file):
            return f"{file} {'has changed' if file in current else 'is missing'}"
    return ""


@dataclass(frozen=True)
class Entry:
    """A folder of the cache."""

    path: Path
    size_bytes: int
    used: float
    """Time of the last use, in seconds since 1970."""

    @property
    def name(self) -> str:
        try:
            content = json.loads((self.path / "compress.json").read_text())
        except (OSError, ValueError):
            return "unfinished" if self.path.suffix else self.path.name
        method = "+".join(done["name"] for done in content["history"])
        return f"{method} of {content['model']} on {content['task']}"


def list_entries(folder: Path) -> list[Entry]:
    """Return all entries of a cache, the least recently used first: stages, tokens, teachers' answers."""
    entries = []
    for path in folder.glob("*/*"):
        with suppress(FileNotFoundError):  # removed in the meantime
            if path.is_dir():
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                used = path.with_suffix(".used")
                entries.append(Entry(path, size, (used if used.is_file() else path).stat().st_mtime))
    return sorted(entries, key=lambda entry: entry.used)


def prune_cache(folder: Path, max_gb: float) -> list[Entry]:
    """Remove the least recently used entries that no process uses until the cache is below ``max_gb``."""
    entries = list_entries(folder)
    size, removed = sum(entry.size_bytes for entry in entries), []
    for entry in entries:
        if size <= max_gb * 1e9:
            break
        with lock_if_unused(entry.path) as free:
            if free:
                remove_path(entry.path)
                remove_path(entry.path.with_suffix(".used"))
                size -= entry.size_bytes
                removed.append(entry)
    return removed


@contextmanager
def lock_if_unused(path: Path) -> Iterator[bool]:
    """Yield True if no process makes or uses the entry, and lock it meanwhile."""
    path = path.with_suffix("")
    try:
        with FileLock(f"{path}.lock", timeout=0), path.with_suffix(".used").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
    except (Timeout, BlockingIOError):
        yield False
