"""Turn a mistake on the command line into advice."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from compress.errors import UserError, explain_error

TRACED = "HYDRA_FULL_ERROR"
"""Environment variable: if 1, Hydra raises its errors; otherwise it prints a summary."""


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Exit with one sentence for a mistake on the command line; ``HYDRA_FULL_ERROR=1`` shows Hydra's traceback."""
    traced = os.environ.get(TRACED) == "1"
    os.environ[TRACED] = "1"
    try:
        yield
    except UserError as error:
        sys.exit(str(error))
    except Exception as error:
        if traced or not is_of_configs(error):
            raise
        sys.exit(explain_hydra_error(error))


def is_of_configs(error: Exception) -> bool:
    """Return whether Hydra refused what was typed; what our own code raised is a bug."""
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    concerned = [name for name in frames if name.partition(".")[0] in ("hydra", "omegaconf", "compress")]
    in_a_job = any(name.startswith("compress.running") for name in concerned)
    return isinstance(error, HydraException) or (not in_a_job and not concerned[-1].startswith("compress"))


def explain_hydra_error(error: Exception) -> str:
    """Return what to type in place of a setting or a choice that does not exist."""
    text = " ".join(str(error).split()).partition(" See https://hydra.cc")[0] or f"Hydra stops on {error!r}"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        near = suggest_match(choice, error.options, f"{group}=")
        return f"`{group}={choice}` is not a choice{near}; expected one of {', '.join(error.options)}."
    if isinstance(error, MissingConfigException) and (name := re.match("Cannot find primary config '(.*)'\\.", text)):
        return f"--config-name is {name[1]!r}, which no config folder has. Set --config-name=train, or --config-dir."
    if several := re.match("(?:Ambiguous value for argument|Sweep parameters) '(.+?)'(?: 1\\.| requires)", text):
        return f"`{several[1]}` has several values, and a run takes one. To sweep over it, add --multirun."
    if twice := re.match("Multiple values for (.+?)\\. To override a value use 'override .+?: (.+?)'", text):
        return f"{twice[1]} is chosen twice; one choice is expected. Type {twice[1]}={twice[2]}, without the `+`."
    cause, append = error.__cause__, text.partition("To append to your config use ")[2]
    if not append or not isinstance(cause, OmegaConfBaseException) or cause.parent_node is None:
        reason = str(cause or "").partition("\n")[0]
        return explain_error(error) or f"{text.rstrip('.')}{f' ({reason})' if reason and reason not in text else ''}."
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
