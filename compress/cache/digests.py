"""Compute the addresses and checksums of stored results."""

from __future__ import annotations

import hashlib
import json
from functools import cache as memoised
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "tokenizers", "pytorch-lightning", "torchmetrics")


def compute_digest(content: Any) -> str:
    """Return the address of any JSON-like content."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


@memoised
def digest_environment() -> dict[str, str]:
    """Return what every result depends on: this package's source and the versions of its libraries."""
    source = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        source.update(path.read_bytes())
    return {"compress": source.hexdigest(), **{name: version(name) for name in LIBRARIES}}


def compute_checksum(file: Path) -> str:
    """Return the digest of a file's content."""
    content = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            content.update(chunk)
    return content.hexdigest()


def fingerprint_files(folder: Path) -> str:
    """Return the digest of a file's content, or of all files in a folder."""
    files = [file for file in sorted(folder.rglob("*")) or [folder] if file.is_file()]
    return compute_digest([(file.name, compute_checksum(file)) for file in files])
