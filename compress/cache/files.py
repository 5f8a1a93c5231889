"""Write, flush and remove files so that a stopped process leaves none of them incomplete."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def flush_folder(folder: Path) -> None:
    """Flush all files of a folder to the disk, so that a power cut loses none of them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def remove_path(path: Path) -> None:
    """Remove a folder or a file, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a file completely or not at all, even if the power fails."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
