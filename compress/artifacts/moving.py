"""Move an artifact to another runtime."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from compress.artifacts.artifact import Artifact, import_runtime
from compress.errors import UserError
from compress.install import format_command
from compress.runtimes import require_packages

EXPORTS = {"onnxruntime": "onnx", "openvino": "openvino"}
"""The stage whose ``export`` writes what a runtime other than PyTorch runs."""


def move_artifact(loaded: Artifact, runtime: str, example: dict[str, Tensor], folder: Path) -> Artifact:
    """The artifact as another runtime runs it, exported to ``folder`` where that is not PyTorch's own.

    Raises:
        UserError: it cannot run there, or what it runs with is not installed.
    """
    own, weights, method = loaded.description.runtime, loaded.description.weights, loaded.description.method
    if runtime == own:
        return loaded
    if own != "torch":
        raise UserError(
            f"hardware.runtime is {runtime} and the artifact of `{method}` was exported for {own}, which alone runs "
            "it: leave hardware.runtime out."
        )
    if runtime == "torch_compile":
        description = replace(loaded.description, runtime=runtime)
        return loaded._replace(model=torch.compile(loaded.model, dynamic=True), description=description)
    stage = EXPORTS[runtime]
    if weights != "float":
        raise UserError(
            f"hardware.runtime={runtime} is for weights that are floats and those of `{method}` are {weights}: let a "
            f"chain end on `{stage}` ({format_command('train')} technique=...+{stage}), or set hardware.runtime=torch."
        )
    require_packages(stage, f"hardware.runtime={runtime}", (stage, runtime))
    export_artifact(loaded, runtime, example, folder)
    return load_exported_artifact(loaded, runtime, folder)


def export_artifact(loaded: Artifact, runtime: str, example: dict[str, Tensor], folder: Path) -> None:
    """Write what another runtime than PyTorch runs of the artifact, whose model becomes one in float32; the
    ``example`` is a batch as it will be called with."""
    exporter = importlib.import_module(f"compress.exporting.{EXPORTS[runtime]}")
    exporter.export(loaded.model.cpu().float(), example, folder)


def load_exported_artifact(loaded: Artifact, runtime: str, folder: Path) -> Artifact:
    """The artifact as that runtime runs what :func:`export` wrote."""
    description = replace(loaded.description, runtime=runtime)
    return loaded._replace(model=import_runtime(description).load(folder, description.kind), description=description)
