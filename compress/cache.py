"""A content-addressed store of finished folders: the fine-tuned baseline and every prefix of a chain."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from functools import cache as memoised
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "tokenizers", "pytorch-lightning", "torchmetrics")


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


def fingerprint(folder: Path) -> str:
    """The content of a file, or of a folder of files."""
    content = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.rglob("*")) or [folder]:
        if file.is_file():
            content.update(file.name.encode())
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    content.update(chunk)
    return content.hexdigest()


class Cache:
    """Folders by the digest of what they were made from.

    An entry is written beside its place and moved there when it is whole; of several processes that want it one makes
    it and the others wait.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder) / "stages"
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: Any, make: Callable[[Path], None], name: str) -> Path:
        """The folder of ``key``, made by ``make(folder)`` where there is none yet; says so under ``name``."""
        entry = self.folder / digest([key, environment()])
        with FileLock(f"{entry}.lock"):
            if entry.is_dir():
                log.info(f"  {name}: from the cache")
            else:
                partial = entry.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                begin = time.perf_counter()
                make(partial)
                os.replace(partial, entry)
                log.info(f"  {name}: {time.perf_counter() - begin:.1f} s")
        return entry
