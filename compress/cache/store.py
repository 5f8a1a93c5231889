"""A content-addressed store of finished folders: the fine-tuned baseline and every prefix of a chain.

python -m compress.cache report                 # its entries and their sizes
python -m compress.cache prune --max-gb 20      # least recently used first; what is in use or can be resumed stays
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

from compress.cache.digests import compute_checksum, compute_digest, describe_environment, digest_environment
from compress.cache.files import apply_umask, remove_path, write_atomically
from compress.errors import PostconditionError, UserError

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
BEGUN = ".begun"
"""Suffix of a file whose time is when the first of the processes that resume each other began to make an entry."""
RESUME = ("resume", "checkpoints", "tensorboard")
"""What a stopped stage leaves for the process that resumes it."""
BEGAN = time.time()


class Cache:
    """Stores folders under the digest of what they were made from.

    An entry is written beside its place and moved there when it is complete. A manifest of its files is checked at
    every use. If several processes need an entry, one makes it and the others wait. After a killed process, the next
    resumes its training. An entry is in use, and is neither pruned nor replaced, until the cache is closed: an entry
    that is made again meanwhile gets a number behind its name. Locks are the operating system's and end with their
    process.

        with Cache("multirun/.cache") as cache: folder = cache.get(key, make, "baseline")

    Args:
        folder: folder of the cache.
        since: seconds since 1970; entries and stopped trainings from before are made again.
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
        first = self.folder / compute_digest([key, digest_environment()])
        with lock_entry(first, name):
            # 1) Find the entry
            entry = max(list_copies(first), key=copy_number, default=first)
            use = mark_used(entry)
            if entry.is_dir() and entry.stat().st_mtime >= self.since:
                if not (damage := find_damage(entry)):
                    self.used.append(use)
                    log.info(f"  {name}: from the cache")
                    return entry
                log.warning(f"  {name}: the cache entry {entry.name} is damaged ({damage}) and is made again")

            # 2) Make it
            begin = time.perf_counter()
            partial = self._begin_entry(first)
            try:
                make(partial)
            except (UserError, PostconditionError):
                remove_path(partial)  # it would fail again
                raise
            for used_up in RESUME[:2]:
                remove_path(partial / used_up)
            apply_umask(partial)  # safetensors writes weights for their owner alone
            manifest = {"files": make_manifest(partial), "made_on": describe_environment()}
            write_atomically(partial / MANIFEST, json.dumps(manifest, indent=2))

            # 3) Put it in its place, or beside an entry that another process reads
            if entry.is_dir() and not is_used_here_alone(use):
                use.close()
                entry = first.with_name(f"{first.name}-{copy_number(entry) + 1}")
                use = mark_used(entry)
            self.used.append(use)
            old = entry.with_suffix(".old")
            remove_path(old)  # left by a process that was killed here
            if entry.is_dir():
                os.replace(entry, old)
            os.replace(partial, entry)
            for rest in (old, first.with_suffix(BEGUN)):
                remove_path(rest)
            log.info(f"  {name}: {time.perf_counter() - begin:.1f} s")
        return entry

    def _begin_entry(self, first: Path) -> Path:
        """Return the folder to make an entry in, with what a stopped training left there since ``since``."""
        partial, begun = first.with_suffix(".partial"), first.with_suffix(BEGUN)
        if not partial.is_dir() or not begun.is_file() or begun.stat().st_mtime < self.since:
            remove_path(partial)
            begun.unlink(missing_ok=True)
            begun.touch()
        partial.mkdir(exist_ok=True)
        for child in partial.iterdir():
            if child.name not in RESUME:
                remove_path(child)
        return partial


def list_copies(first: Path) -> list[Path]:
    """Return the folders of an entry: its first, and those that were made again while another was in use."""
    return [path for path in (first, *first.parent.glob(f"{first.name}-*")) if path.is_dir() and not path.suffix]


def copy_number(entry: Path) -> int:
    """Return the number of an entry among those of its key."""
    return int(entry.name.partition("-")[2] or 0)


def mark_used(entry: Path) -> IO:
    """Note that an entry is used now; no process removes or replaces it until the returned file is closed."""
    stream = entry.with_suffix(".used").open("a+")  # a shared lock on a network file system needs read access
    fcntl.flock(stream, fcntl.LOCK_SH)
    os.utime(stream.name)
    return stream


def is_used_here_alone(use: IO) -> bool:
    """Return whether nobody else uses the entry of ``use``. The caller holds the entry's lock, so nobody begins to."""
    try:
        fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        fcntl.flock(use, fcntl.LOCK_SH)


def make_once(folder: Path, make: Callable[[Path], None]) -> IO:
    """Make a folder of the cache by ``make(folder)`` unless it exists. It is in use until the returned file is closed.

    use = make_once(folder, write_tokens); tokens = load_from_disk(folder)
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock_entry(folder, folder.name):
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            remove_path(partial)  # left by a process that was killed here
            partial.mkdir()
            make(partial)
            apply_umask(partial)
            os.replace(partial, folder)
        return mark_used(folder)


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
        written = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
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
    def is_stopped(self) -> bool:
        """Whether it holds the checkpoint of a stopped training."""
        return self.path.suffix == ".partial" and any(self.path.glob("resume/*.ckpt"))

    @property
    def name(self) -> str:
        if self.is_stopped:
            return "a stopped training"
        try:
            content = json.loads((self.path / "compress.json").read_text(encoding="utf-8"))
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


def prune_cache(folder: Path, max_gb: float, stopped: bool = False) -> list[Entry]:
    """Remove the least recently used entries that no process uses until the cache is below ``max_gb``.

    Args:
        stopped: whether to remove the checkpoints of stopped trainings too, in their turn.
    """
    entries = list_entries(folder)
    size, removed = sum(entry.size_bytes for entry in entries), []
    for entry in entries:
        if size <= max_gb * 1e9:
            break
        if entry.is_stopped and not stopped:
            continue
        with lock_if_unused(entry.path) as free:
            if free:
                for path in (entry.path, entry.path.with_suffix(".used")):
                    remove_path(path)
                size -= entry.size_bytes
                removed.append(entry)
    return removed


@contextmanager
def lock_if_unused(path: Path) -> Iterator[bool]:
    """Yield True if no process makes or uses the entry, and lock it meanwhile."""
    path = path.with_suffix("")
    first = path.with_name(path.name.partition("-")[0])
    try:
        with FileLock(f"{first}.lock", timeout=0), path.with_suffix(".used").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
    except (Timeout, BlockingIOError):
        yield False
