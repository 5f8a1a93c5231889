"""Write, flush and remove files so that a stopped process leaves none of them half done."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def flush_folder(folder: Path) -> None:
    """Have all files of a folder on the disk, so that a power cut takes none of them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def remove_path(path: Path) -> None:
    """A folder or a file, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, after a power cut as well."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
