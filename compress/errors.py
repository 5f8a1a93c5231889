"""The ways in which a run fails that are no bug."""

from __future__ import annotations

import errno
from collections.abc import Iterator


class UserError(Exception):
    """A user's mistake, told in one sentence: what was found, what was expected, what to type."""


class PostconditionError(Exception):
    """A stage did not do what it says, so its result is worth nothing."""


def iterate_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def explain_error(error: BaseException) -> str:
    """One sentence where memory is short, or a disk is full or cannot be written; empty where it is something else."""
    for one in iterate_causes(error):
        number, where, why = (one.errno, one.filename, one.strerror) if isinstance(one, OSError) else (None, None, "")
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(one):
            return (
                f"No space is left on the disk{f' of {where}' if where else ''}: free some (python -m compress.cache "
                "prune) and run the same command into the same folder, which goes on with what is finished."
            )
        short = isinstance(one, MemoryError) or type(one).__name__ == "OutOfMemoryError"  # PyTorch's of a GPU
        if short or number == errno.ENOMEM or "can't allocate memory" in str(one):  # PyTorch's of the CPU
            return (
                "There is not enough memory: choose a smaller model, or smaller batches (baseline.batch_size, "
                "task.batch_size, hardware.latency.batch_sizes), and run the same command into the same folder, which "
                "goes on with what is finished."
            )
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            return f"{where} cannot be written or read ({why}): choose another folder, or its permissions."
    return ""
