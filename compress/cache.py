"""A content-addressed store of finished folders: the fine-tuned baseline and every prefix of a chain.

python -m compress.cache report                 # what it holds, and how much of it
python -m compress.cache prune --max-gb 20      # least recently used first; what is in use stays
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache as memoised
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from compress.errors import PostconditionError, UserError

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "tokenizers", "pytorch-lightning", "torchmetrics")
MANIFEST = "manifest.json"
RESUME = ("resume", "checkpoints", "tensorboard")
"""What a stage that was stopped leaves for the process that goes on with it."""
BEGAN = time.time()


def digest(content: Any) -> str:
    """The address of any JSON-like content."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


@memoised
def environment() -> dict[str, str]:
    """What else decides a result: this package's own source and the libraries that train and save."""
    source = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    return {"compress": source.hexdigest(), **{name: version(name) for name in LIBRARIES}}


def checksum(file: Path) -> str:
    """The digest of a file's content."""
    content = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            content.update(chunk)
    return content.hexdigest()


def fingerprint(folder: Path) -> str:
    """The content of a file, or of a folder of files."""
    files = [file for file in sorted(folder.rglob("*")) or [folder] if file.is_file()]
    return digest([(file.name, checksum(file)) for file in files])


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
        entry = self.folder / digest([key, environment()])
        with locked(entry, name):
            self._use(entry)
            if entry.is_dir() and entry.stat().st_mtime >= self.since:
                if not (damage := damaged(entry)):
                    log.info(f"  {name}: from the cache")
                    return entry
                log.warning(f"  {name}: the cache's entry {entry.name} is damaged ({damage}): it is made again")
            begin = time.perf_counter()
            partial = entry.with_suffix(".partial")
            partial.mkdir(exist_ok=True)
            for child in partial.iterdir():
                if child.name not in RESUME:
                    remove(child)
            try:
                make(partial)
            except (UserError, PostconditionError):
                remove(partial)  # it would end there again
                raise
            for used_up in RESUME[:2]:
                remove(partial / used_up)
            (partial / MANIFEST).write_text(json.dumps(manifest(partial)))
            old = entry.with_suffix(".old")
            remove(old)  # of a process that was killed here
            if entry.is_dir():
                os.replace(entry, old)
            os.replace(partial, entry)
            remove(old)
            log.info(f"  {name}: {time.perf_counter() - begin:.1f} s")
        return entry

    def _use(self, entry: Path) -> None:
        stream = entry.with_suffix(".used").open("a+")  # a shared lock on a network's disk asks for reading
        self.used.append(stream)
        fcntl.flock(stream, fcntl.LOCK_SH)
        os.utime(stream.name)


@contextmanager
def locked(entry: Path, name: str) -> Iterator[None]:
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


def manifest(folder: Path) -> dict[str, str]:
    """The checksum of every file in ``folder``, by its path."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MANIFEST)
    return {str(file.relative_to(folder)): checksum(file) for file in files}


def damaged(entry: Path) -> str:
    """What is wrong with an entry; empty where it is as it was written."""
    try:
        written = json.loads((entry / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} cannot be read"
    found = manifest(entry)
    for file in sorted({*written, *found}):
        if written.get(file) != found.get(file):
            return f"{file} is {'not what was written' if file in found else 'missing'}"
    return ""


def flush(folder: Path) -> None:
    """Have all files of a folder on the disk, so that a power cut takes none of them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def remove(path: Path) -> None:
    """A folder or a file, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def entries(folder: Path) -> list[Entry]:
    """Everything in the cache at ``folder``, the least recently used first: stages, tokens, teachers' answers."""
    found = []
    for path in folder.glob("*/*"):
        with suppress(FileNotFoundError):  # removed meanwhile
            if path.is_dir():
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                used = path.with_suffix(".used")
                found.append(Entry(path, size, (used if used.is_file() else path).stat().st_mtime))
    return sorted(found, key=lambda entry: entry.used)


def prune(folder: Path, max_gb: float) -> list[Entry]:
    """Remove the least recently used entries that nobody uses until the cache takes less than ``max_gb``."""
    every = entries(folder)
    size, removed = sum(entry.size_bytes for entry in every), []
    for entry in every:
        if size <= max_gb * 1e9:
            break
        with unused(entry.path) as free:
            if free:
                remove(entry.path)
                remove(entry.path.with_suffix(".used"))
                size -= entry.size_bytes
                removed.append(entry)
    return removed


@contextmanager
def unused(path: Path) -> Iterator[bool]:
    """Whether nobody makes or uses an entry, which stays so meanwhile."""
    path = path.with_suffix("")
    try:
        with FileLock(f"{path}.lock", timeout=0), path.with_suffix(".used").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
    except (Timeout, BlockingIOError):
        yield False


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m compress.cache", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=("report", "prune"))
    parser.add_argument("--dir", type=Path, default=Path("multirun/.cache"), help="default: %(default)s")
    parser.add_argument("--max-gb", type=float, default=0.0, help="what prune leaves, default: nothing")
    given = parser.parse_args(words)
    if not given.dir.is_dir():
        parser.error(f"there is no folder {given.dir}: name that of a cache (--dir).")
    if given.command == "prune":
        removed = prune(given.dir, given.max_gb)
        print(f"removed {len(removed)} entries, {sum(entry.size_bytes for entry in removed) / 1e9:.3f} GB")
    every = entries(given.dir)
    for entry in every if given.command == "report" else ():
        with unused(entry.path) as free:
            state = "" if free else "  in use"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        print(f"{entry.size_bytes / 1e9:9.3f} GB  {used}  {entry.path.parent.name:8}  {entry.name}{state}")
    print(f"{sum(entry.size_bytes for entry in every) / 1e9:9.3f} GB in {len(every)} entries of {given.dir}")


if __name__ == "__main__":
    main()
