"""The ways in which a run fails that are no bug."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

from hydra.errors import CompactHydraException, HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

GROUPS = ("model", "task", "technique", "hardware")
TRACED = "HYDRA_FULL_ERROR"
"""Set to 1, Hydra raises what it otherwise tells in words of its own."""


class UserError(Exception):
    """A user's mistake, told in one sentence: what was found, what was expected, what to type."""


class PostconditionError(Exception):
    """A stage did not do what it says, so its result is worth nothing."""


@contextmanager
def told_on_the_command_line() -> Iterator[None]:
    """Tell in a sentence what is wrong with a command line; with a traceback where the user asks Hydra for it."""
    for word in sys.argv[1:]:
        group, _, choice = word.partition("=")
        if group in GROUPS and choice in ("", "null"):
            sys.exit(f"`{word}` chooses no {group}: name one of those that `--help` lists, or leave the word out.")
    traced = os.environ.get(TRACED) == "1"
    os.environ[TRACED] = "1"
    try:
        yield
    except UserError as error:
        sys.exit(str(error))
    except CompactHydraException as error:
        if traced:
            raise
        sys.exit(advised(error))


def advised(error: HydraException) -> str:
    """What to type in place of a setting or a choice that there is none of."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        near = meant(choice, error.options, f"{group}=")
        return f"`{group}={choice}` is no choice{near}: choose one of {', '.join(error.options)}."
    cause, append = error.__cause__, str(error).partition("To append to your config use ")[2]
    if not append or not isinstance(cause, OmegaConfBaseException) or cause.parent_node is None:
        return str(error)
    where, _, key = str(cause.full_key).rpartition(".")
    if where == "technique":
        from compress.chain import not_in

        return not_in(cause.parent_node.name, key)
    known = [str(one) for one in cause.parent_node if not str(one).startswith("_") and one != "hydra"]
    near = meant(key, known, f"{where}." if where else "")
    there = f"{where or 'it'} has {', '.join(known) or 'no settings'}"
    adds = f"; `{append}` adds it" if known and not near else ""
    return f"`{cause.full_key}` is not in the config{near}: {there}{adds}."


def meant(word: str, known: Sequence[str], before: str) -> str:
    near = get_close_matches(word, known, 1)
    return f" (did you mean `{before}{near[0]}`?)" if near else ""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def told(error: BaseException) -> str:
    """One sentence where memory is short, or a disk is full or cannot be written; empty where it is something else."""
    for one in causes(error):
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
