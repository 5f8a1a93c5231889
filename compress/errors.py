"""Errors that are not bugs, and sentences that explain them."""

from __future__ import annotations

import errno
from collections.abc import Iterator

UNRESOLVED = (
    "InterpolationKeyError",
    "InterpolationResolutionError",
    "InterpolationToMissingValueError",
    "MissingMandatoryValue",
)
"""OmegaConf's errors for a value that is missing. The maths raises the errors of this module and imports no configs."""


class UserError(Exception):
    """A user's mistake, in one sentence: what was found, what was expected, what to type."""


class PostconditionError(Exception):
    """A stage broke one of its promises, so its result is worthless."""


def iterate_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def explain_error(error: BaseException) -> str:
    """Return a sentence if memory ran out, a disk is full or not writable, or a setting refers to nothing; empty for
    any other error."""
    for cause in iterate_causes(error):
        if type(cause).__name__ in UNRESOLVED:
            key, reason = getattr(cause, "full_key", ""), str(cause).partition("\n")[0]
            return f"{key} has no value ({reason}). Set {key}=VALUE, or set what it refers to."
        number, where, why = (
            (cause.errno, cause.filename, cause.strerror) if isinstance(cause, OSError) else (None, None, "")
        )
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(cause):
            return (
                f"No space is left on the disk{f' of {where}' if where else ''}. Free some space, e.g. with `python -m "
                "compress.cache prune --dir CACHE --max-gb SIZE`, which keeps SIZE GB of the finished stages used last "
                "(the others will be made again when they are needed) and every stopped training; then repeat the "
                "command with the same folder."
            )
        short = isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError"  # PyTorch on a GPU
        if short or number == errno.ENOMEM or "can't allocate memory" in str(cause):  # PyTorch on a CPU
            return (
                "There is not enough memory. Set a smaller model or smaller batches (baseline.batch_size, "
                "task.batch_size, hardware.latency.batch_sizes), and repeat the command with the same folder, which "
                "keeps finished work."
            )
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            return f"{where} cannot be written or read ({why}). Set another folder, or change its permissions."
    return ""
