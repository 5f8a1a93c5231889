"""Move an artifact to another runtime."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from compress.artifacts.artifact import Artifact
from compress.errors import UserError
from compress.install import format_command
from compress.runtimes.runtime import import_runtime, require_packages


def move_artifact(loaded: Artifact, runtime: str, example: dict[str, Tensor], folder: Path) -> Artifact:
    """Return the artifact for another runtime, exported to ``folder`` if the runtime is not PyTorch's.

    Raises:
        UserError: the artifact cannot run on the runtime, or the runtime is not installed.
    """
    own, weights, method = loaded.description.runtime, loaded.description.weights, loaded.description.method
    if runtime == own:
        return loaded
    if own != "torch":
        raise UserError(
            f"hardware.runtime is {runtime}; the artifact of `{method}` was exported for {own} and runs only there. "
            "Leave hardware.runtime out."
        )
    target = import_runtime(runtime)
    if target.STAGE is None:
        description = replace(loaded.description, runtime=runtime)
        return loaded._replace(model=target.adopt_model(loaded.model), description=description)
    stage = target.STAGE
    if weights != "float":
        raise UserError(
            f"hardware.runtime is {runtime}, which needs float weights; the weights of `{method}` are {weights}. End "
            f"the chain on `{stage}` ({format_command('train')} technique=...+{stage}), or set hardware.runtime=torch."
        )
    require_packages(target.EXTRA or stage, f"hardware.runtime={runtime}", target.PACKAGES)
    export_artifact(loaded, runtime, example, folder)
    return load_exported_artifact(loaded, runtime, folder)


def export_artifact(loaded: Artifact, runtime: str, example: dict[str, Tensor], folder: Path) -> None:
    """Export the artifact for a runtime other than PyTorch. Its model is converted to float32 in place.

    Args:
        example: a batch of the shape that the model will be called with.
    """
    _, exporter, *_ = name_export_modules(runtime)
    importlib.import_module(exporter).export(loaded.model.cpu().float(), example, folder)


def name_export_modules(runtime: str) -> tuple[str, str, str]:
    """Return the names of the modules that export for a runtime: this one, the exporter and the runtime."""
    return __name__, f"compress.exporting.{import_runtime(runtime).STAGE}", f"compress.runtimes.{runtime}"


def load_exported_artifact(loaded: Artifact, runtime: str, folder: Path) -> Artifact:
    """Return the artifact with the model that :func:`export_artifact` wrote."""
    description = replace(loaded.description, runtime=runtime)
    return loaded._replace(model=import_runtime(runtime).load(folder, description.kind), description=description)
