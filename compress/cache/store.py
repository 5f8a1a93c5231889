"""A content-addressed store of finished folders: the fine-tuned baseline and every prefix of a chain.

python -m compress.cache report                 # what it holds, and how much of it
python -m compress.cache prune --max-gb 20      # least recently used first; what is in use stays
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
"""What a stage that was stopped leaves for the process that goes on with it."""
BEGAN = time.time()


class Cache:
    """Folders by the digest of what they were made from.

    An entry is written beside its place and moved there when it is whole, with a manifest of its files by which it is
    checked whenever it is wanted. Of several processes that want it one makes it and the others wait. From what a
    killed one left, the next takes over what is needed to go on with its training. An entry is in use, and not pruned,
    until the cache is closed; locks are the operating system's and end with the process that holds them.

        with Cache("multirun/.cache") as cache: folder = cache.get(key, make, "baseline")

    Args:
        folder: where it lies.
        since: take no entry that is older, in seconds since 1970.
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
        """The folder of ``key``, made by ``make(folder)`` where there is none yet; says so under ``name``."""
        entry = self.folder / compute_digest([key, digest_environment()])
        with lock_entry(entry, name):
            self._mark_used(entry)
            if entry.is_dir() and entry.stat().st_mtime >= self.since:
                if not (damage := find_damage(entry)):
                    log.info(f"  {name}: from the cache")
                    return entry
                log.warning(f"  {name}: the cache's entry {entry.name} is damaged ({damage}): it is made again")
            begin = time.perf_counter()
            partial = entry.with_suffix(".partial")
            partial.mkdir(exist_ok=True)
            for child in partial.iterdir():
                if child.name not in RESUME:
                    remove_path(child)
            try:
                make(partial)
            except (UserError, PostconditionError):
                remove_path(partial)  # it would end there again
                raise
            for used_up in RESUME[:2]:
                remove_path(partial / used_up)
            (partial / MANIFEST).write_text(json.dumps(make_manifest(partial)))
            old = entry.with_suffix(".old")
            remove_path(old)  # of a process that was killed here
            if entry.is_dir():
                os.replace(entry, old)
            os.replace(partial, entry)
            remove_path(old)
            log.info(f"  {name}: {time.perf_counter() - begin:.1f} s")
        return entry

    def _mark_used(self, entry: Path) -> None:
        stream = entry.with_suffix(".used").open("a+")  # a shared lock on a network's disk asks for reading
        self.used.append(stream)
        fcntl.flock(stream, fcntl.LOCK_SH)
        os.utime(stream.name)


@contextmanager
def lock_entry(entry: Path, name: str) -> Iterator[None]:
    """Alone with an entry; says under ``name`` that another process has to be waited for."""
    lock = FileLock(f"{entry}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info(f"  {name}: waiting for another process that makes it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def make_manifest(folder: Path) -> dict[str, str]:
    """The checksum of every file in ``folder``, by its path."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MANIFEST)
    return {str(file.relative_to(folder)): compute_checksum(file) for file in files}


def find_damage(entry: Path) -> str:
    """What is wrong with an entry; empty where it is as it was written."""
    try:
        written = json.loads((entry / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} cannot be read"
    found = make_manifest(entry)
    for file in sorted({*written, *found}):
        if written.get(file) != found.get(file):
            return f"{file} is {'not what was written' if file in found else 'missing'}"
    return ""


@dataclass(frozen=True)
class Entry:
    """What the cache holds under one address."""

    path: Path
    size_bytes: int
    used: float
    """When it was last wanted, in seconds since 1970."""

    @property
    def name(self) -> str:
        try:
            content = json.loads((self.path / "compress.json").read_text())
        except (OSError, ValueError):
            return "unfinished" if self.path.suffix else self.path.name
        method = "+".join(done["name"] for done in content["history"])
        return f"{method} of {content['model']} on {content['task']}"


def list_entries(folder: Path) -> list[Entry]:
    """Everything in the cache at ``folder``, the least recently used first: stages, tokens, teachers' answers."""
    found = []
    for path in folder.glob("*/*"):
        with suppress(FileNotFoundError):  # removed meanwhile
            if path.is_dir():
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                used = path.with_suffix(".used")
                found.append(Entry(path, size, (used if used.is_file() else path).stat().st_mtime))
    return sorted(found, key=lambda entry: entry.used)


def prune_cache(folder: Path, max_gb: float) -> list[Entry]:
    """Remove the least recently used entries that nobody uses until the cache takes less than ``max_gb``."""
    every = list_entries(folder)
    size, removed = sum(entry.size_bytes for entry in every), []
    for entry in every:
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
    """Whether nobody makes or uses an entry, which stays so meanwhile."""
    path = path.with_suffix("")
    try:
        with FileLock(f"{path}.lock", timeout=0), path.with_suffix(".used").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
    except (Timeout, BlockingIOError):
        yield False
