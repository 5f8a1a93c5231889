"""Compute the addresses and checksums of stored results."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
from collections.abc import Iterable
from functools import cache as memoised
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress.cache.files import write_atomically

LIBRARIES = ("torch", "transformers", "tokenizers", "pytorch-lightning", "torchmetrics")
RECENT_S = 2.0
"""Age of a change below which a file may change again without a change of its times: clocks of disks are coarse."""


def compute_digest(content: Any) -> str:
    """Return the address of any JSON-like content."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


@memoised
def digest_environment() -> dict[str, str]:
    """Return the versions of the libraries that every result depends on."""
    return {name: version(name) for name in LIBRARIES}


def read_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those of the ``packages`` that are installed."""
    return {package: version(package) for package in packages if importlib.util.find_spec(package)}


def describe_environment() -> dict[str, str]:
    """Return what can change the last bits of a result and is recorded with it, but is no part of its address."""
    import platform

    import torch

    environment = {
        "python": platform.python_version(),
        **digest_environment(),
        **{name: version(name) for name in ("numpy", "datasets")},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }
    return {**environment, "gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else environment


def compute_checksum(file: Path, known: Path | None = None) -> str:
    """Return the digest of a file's content, which is read again only if the file's size, times or inode changed.

    Args:
        known: a folder that keeps the digests of files for other processes.
    """
    identity = identify_file(file)
    if identity in CHECKSUMS:
        return CHECKSUMS[identity]
    note = known and known / f"{compute_digest(identity)}.txt"
    if note and note.is_file():
        CHECKSUMS[identity] = note.read_text()
        return CHECKSUMS[identity]
    content = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            content.update(chunk)
    if time.time() - max(identity[2:4]) / 1e9 > RECENT_S and identify_file(file) == identity:
        CHECKSUMS[identity] = content.hexdigest()
        if note:
            note.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(note, content.hexdigest())
    return content.hexdigest()


Identity = tuple[str, int, int, int, int, int]
CHECKSUMS: dict[Identity, str] = {}
"""The digests that this process has computed or read."""


def identify_file(file: Path) -> Identity:
    """Return what changes with a file's content: its path, size, times of change in nanoseconds, inode and device."""
    status = file.stat()
    times = status.st_mtime_ns, status.st_ctime_ns
    return (str(file.resolve()), status.st_size, *times, status.st_ino, status.st_dev)


def fingerprint_files(path: Path, known: Path | None = None) -> str:
    """Return the digest of a file's content, or of all files in a folder and their names in it; see
    :func:`compute_checksum` for ``known``."""
    if not path.is_dir():
        return compute_digest([(path.name, compute_checksum(path, known))])
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return compute_digest([(str(file.relative_to(path)), compute_checksum(file, known)) for file in files])
