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
"""Set to 1, Hydra raises what it otherwise tells in words of its own."""


@contextmanager
def report_user_errors() -> Iterator[None]:
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
    except ValueError as error:  # Hydra's own of flags that exclude each other
        if traced or not str(error).startswith("Only one of --"):
            raise
        sys.exit(f"{error}.")
    except CompactHydraException as error:
        if traced:
            raise
        sys.exit(explain_hydra_error(error))


def explain_hydra_error(error: HydraException) -> str:
    """What to type in place of a setting or a choice that there is none of."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        near = suggest_match(choice, error.options, f"{group}=")
        return f"`{group}={choice}` is no choice{near}: choose one of {', '.join(error.options)}."
    cause, append = error.__cause__, str(error).partition("To append to your config use ")[2]
    if not append or not isinstance(cause, OmegaConfBaseException) or cause.parent_node is None:
        return str(error)
    where, _, key = str(cause.full_key).rpartition(".")
    if where == "technique":
        from compress.planning.chain import explain_missing_stage

        return explain_missing_stage(cause.parent_node.name, key)
    known = [str(one) for one in cause.parent_node if not str(one).startswith("_") and one != "hydra"]
    near = suggest_match(key, known, f"{where}." if where else "")
    there = f"{where or 'it'} has {', '.join(known) or 'no settings'}"
    adds = f"; `{append}` adds it" if known and not near else ""
    return f"`{cause.full_key}` is not in the config{near}: {there}{adds}."


def suggest_match(word: str, known: Sequence[str], before: str) -> str:
    near = get_close_matches(word, known, 1)
    return f" (did you mean `{before}{near[0]}`?)" if near else ""
