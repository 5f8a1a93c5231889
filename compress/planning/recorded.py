"""The command lines that runs and sweeps record in their folders: to repeat one or to resume it (`resume=FOLDER`)."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import yaml

from compress.cache.files import expand_path
from compress.errors import UserError
from compress.install import CONF, format_command
from compress.planning.words import quote_value

SWEEP, RUN = "multirun.yaml", ".hydra/hydra.yaml"
"""The files in which Hydra records a sweep and a run."""
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Reads a record in milliseconds, which OmegaConf takes a tenth of a second for: a report reads one for every job."""
SET_AGAIN = ("hydra.mode=", "hydra.run.dir=", "hydra.sweep.dir=")


def format_repeat_command(job: Path) -> str:
    """Return the command that repeats a run or a job of a sweep, quoted for a shell; empty if none is recorded."""
    if not (job / RUN).is_file():
        return ""
    recorded = read_record(job / RUN)
    words = [*list_flags(recorded), *recorded["overrides"]["task"]]
    program = "evaluate" if recorded["job"]["config_name"] == "evaluate" else "train"
    return " ".join([format_command(program), *map(shlex.quote, words)])


def read_record(file: Path) -> dict[str, Any]:
    """Return what Hydra recorded of a run or a sweep, its interpolations unresolved.

    Raises:
        UserError: the file is not readable as Hydra's record.
    """
    try:
        hydra = yaml.load(file.read_text(encoding="utf-8"), LOADER)["hydra"]
        return {key: hydra[key] for key in ("job", "runtime", "overrides")}
    except (yaml.YAMLError, OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not as Hydra wrote it. Repeat the command of the run instead.") from None


def list_flags(recorded: dict[str, Any]) -> list[str]:
    """Return the flags that chose the configs of a recorded run."""
    sources = {source["provider"]: source["path"] for source in recorded["runtime"]["config_sources"]}
    name = recorded["job"]["config_name"]
    flags = [] if name in ("train", "evaluate") else [f"--config-name={name}"]
    return [*flags, f"--config-dir={sources['command-line']}"] if "command-line" in sources else flags


def resume_words(words: list[str]) -> list[str]:
    """Return the words of a command line; ``resume=FOLDER`` is replaced by the words recorded in the folder.

    Raises:
        UserError: the folder is no run or sweep of this checkout, or ``resume`` is not the only word.
    """
    resumed = next((word for word in words if word.startswith("resume=")), None)
    if resumed is None:
        return words
    folder = expand_path(resumed.removeprefix("resume="))
    if others := [word for word in words if word != resumed]:
        raise UserError(f"`{others[0]}` is beside {resumed}; a run is resumed as it was started. Leave it out.")
    if (folder.parent / SWEEP).is_file():
        raise UserError(f"{resumed} is a part of the sweep in {folder.parent}. Set resume={folder.parent}.")
    file = next((folder / name for name in (SWEEP, RUN) if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{resumed} is no folder of a run or a sweep. Set resume=multirun/DATE/TIME.")
    recorded = read_record(file)
    job, runtime, overrides = recorded["job"], recorded["runtime"], recorded["overrides"]
    if job["config_name"] == "evaluate":
        raise UserError(f"{resumed} is an evaluation, which is not resumed. Set resume to a run of training.")
    sources = {source["provider"]: source["path"] for source in runtime["config_sources"]}
    started, here = (runtime["cwd"], sources["main"]), (os.getcwd(), str(CONF))
    if started != here and all(map(os.path.isdir, started)):  # unless it was moved
        raise UserError(
            f"{resumed} was started in {started[0]} with the configs in {started[1]}; this is {here[0]} with those in "
            f"{here[1]}. Resume it from there."
        )
    flags = ["--multirun"] if file.name == SWEEP else []
    flags += list_flags(recorded)
    kept = [word for word in overrides["hydra"] if not word.startswith(SET_AGAIN)]
    return [
        *flags,
        *overrides["task"],
        *kept,
        f"hydra.{'sweep' if file.name == SWEEP else 'run'}.dir={quote_value(folder)}",
    ]
