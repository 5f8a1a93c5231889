"""Write, flush and remove files so that a stopped process leaves none of them incomplete."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def expand_path(path: str | Path) -> Path:
    """Return a path with ``~`` as the home folder; as it is where there is none (``Path.expanduser`` would raise)."""
    return Path(os.path.expanduser(path))


def flush_folder(folder: Path) -> None:
    """Flush all files of a folder to the disk, so that a power cut loses none of them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def remove_path(path: Path) -> None:
    """Remove a folder or a file, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file completely or not at all, even if the power fails; text as UTF-8.

    A byte of a path that was no UTF-8 is written as an escape.
    """
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def apply_umask(folder: Path) -> None:
    """Give all files of a folder the permissions of a new file, which some libraries give to their owner alone."""
    sample = folder / ".umask"
    sample.touch()
    mode = sample.stat().st_mode & 0o666
    sample.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)
