"""Hide event files from TensorBoard, which looks into every folder, so that ``--logdir multirun`` shows a job once."""

from __future__ import annotations

from pathlib import Path

MARK, HIDDEN = "tfevents", "hidden"
"""What TensorBoard knows an event file by, and what its name has in this place to keep the file from TensorBoard."""


def hide_events(folder: Path) -> None:
    """Rename the event files below ``folder``, so that TensorBoard leaves them out."""
    for path in list(folder.rglob(f"*{MARK}*")):
        path.rename(path.with_name(path.name.replace(MARK, HIDDEN)))


def reveal_events(folder: Path) -> None:
    """Give hidden event files below ``folder`` the names by which TensorBoard finds them."""
    for path in list(folder.rglob(f"events*{HIDDEN}*")):
        path.rename(path.with_name(path.name.replace(HIDDEN, MARK)))
