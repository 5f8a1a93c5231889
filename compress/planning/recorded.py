"""`resume=FOLDER`: the command line that a run or a sweep recorded in its folder, to continue it there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from compress.errors import UserError
from compress.install import CONF
from compress.planning.words import quote_value

SWEEP, RUN = "multirun.yaml", ".hydra/hydra.yaml"
"""The files in which Hydra records a sweep and a run."""
SET_ANEW = ("hydra.mode=", "hydra.run.dir=", "hydra.sweep.dir=")


def resume_words(words: list[str]) -> list[str]:
    """Return the words of a command line; ``resume=FOLDER`` is replaced by the words recorded in the folder.

    Raises:
        UserError: the folder is no run or sweep of this checkout, or ``resume`` is not the only word.
    """
    resumed = next((word for word in words if word.startswith("resume=")), None)
    if resumed is None:
        return words
    folder = Path(resumed.removeprefix("resume=")).expanduser()
    if others := [word for word in words if word != resumed]:
        raise UserError(f"`{others[0]}` is beside {resumed}; a run is resumed as it was started. Leave it out.")
    if (folder.parent / SWEEP).is_file():
        raise UserError(f"{resumed} is a part of the sweep in {folder.parent}. Set resume={folder.parent}.")
    file = next((folder / name for name in (SWEEP, RUN) if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{resumed} is no folder of a run or a sweep. Set resume=multirun/DATE/TIME.")
    recorded: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    job, runtime, overrides = (recorded["hydra"][key] for key in ("job", "runtime", "overrides"))
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
    if job["config_name"] != "train":
        flags += ["--config-name", job["config_name"]]
    if "command-line" in sources:
        flags += ["--config-dir", sources["command-line"]]
    kept = [word for word in overrides["hydra"] if not word.startswith(SET_ANEW)]
    return [
        *flags,
        *overrides["task"],
        *kept,
        f"hydra.{'sweep' if file.name == SWEEP else 'run'}.dir={quote_value(folder)}",
    ]
