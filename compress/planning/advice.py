"""Turn a mistake on the command line into advice."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

from hydra.errors import CompactHydraException, HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from compress.errors import UserError

GROUPS = ("model", "task", "technique", "hardware")
TRACED = "HYDRA_FULL_ERROR"
"""Environment variable: if 1, Hydra raises its errors; otherwise it prints a summary."""


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Exit with one sentence for a mistake on the command line; ``HYDRA_FULL_ERROR=1`` shows Hydra's traceback."""
    for word in sys.argv[1:]:
        group, _, choice = word.partition("=")
        if group in GROUPS and choice in ("", "null"):
            sys.exit(f"`{word}` chooses no {group}. Set {group}= to a choice that `--help` lists, or remove the word.")
    traced = os.environ.get(TRACED) == "1"
    os.environ[TRACED] = "1"
    try:
        yield
    except UserError as error:
        sys.exit(str(error))
    except ValueError as error:  # Hydra's error for flags that exclude each other
        if traced or not str(error).startswith("Only one of --"):
            raise
        sys.exit(f"{error}.")
    except CompactHydraException as error:
        if traced:
            raise
        sys.exit(explain_hydra_error(error))


def explain_hydra_error(error: HydraException) -> str:
    """Return what to type in place of a setting or a choice that does not exist."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        near = suggest_match(choice, error.options, f"{group}=")
        return f"`{group}={choice}` is not a choice{near}; expected one of {', '.join(error.options)}."
    cause, append = error.__cause__, str(error).partition("To append to your config use ")[2]
    if not append or not isinstance(cause, OmegaConfBaseException) or cause.parent_node is None:
        return str(error)
    where, _, key = str(cause.full_key).rpartition(".")
    if where == "technique":
        from compress.planning.chain import explain_missing_stage

        return explain_missing_stage(cause.parent_node.name, key)
    known = [str(name) for name in cause.parent_node if not str(name).startswith("_") and name != "hydra"]
    near = suggest_match(key, known, f"{where}." if where else "")
    there = f"{where or 'it'} has {', '.join(known) or 'no settings'}"
    adds = f". Type `{append}` to add it" if known and not near else ""
    return f"`{cause.full_key}` is not in the config{near}; {there}{adds}."


def suggest_match(word: str, known: Sequence[str], before: str) -> str:
    """Return a hint at the known word nearest to ``word``; empty if none is near."""
    near = get_close_matches(word, known, 1)
    return f" (did you mean `{before}{near[0]}`?)" if near else ""
