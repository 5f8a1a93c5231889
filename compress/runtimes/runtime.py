"""The contract of a runtime: a module of this package that runs artifacts, found by its name alone."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from compress.errors import UserError
from compress.install import format_install


class Loading(NamedTuple):
    """How an artifact is loaded, for its card."""

    code: str
    """Lines of Python that run in the artifact's folder and end with ``logits``."""
    notes: tuple[str, ...] = ()
    """Sentences about the format."""
    needs_us: bool = False
    """Whether the lines import `compress`."""


class Runtime(Protocol):
    """Contents of such a module. It has the name of the library that runs its artifacts, and imports that library in
    functions alone, so that the rest can be read without it. ``torch_compile``, for which no artifact is stored, needs
    ``STAGE``, ``DEVICES`` and ``adopt_model`` alone."""

    STAGE: str | None
    """Stage that exports to the runtime, and extra that installs it; None where PyTorch runs the model."""
    DEVICES: tuple[str, ...]
    """Types of the devices that the runtime measures on."""
    PACKAGES: tuple[str, ...]
    """Packages beyond the base install."""
    LIBRARY: str
    """Name of the artifacts' library on the hub."""
    WEIGHTS: tuple[str, ...]
    """Patterns of the files of weights, of which the first that a folder has is loaded."""

    def load(self, folder: Path, kind: str) -> Any:
        """Return the model of an artifact for this kind of task. It is called as ``model(**batch)`` with tokens,
        answers with ``.logits``, has a ``config`` with its labels, and ``to(device)`` and ``parameters()`` like a torch
        module."""

    def describe_loading(self, folder: Path, kind: str) -> Loading:
        """Return how to load the artifact, in a script without `compress` if possible."""

    def adopt_model(self, model: Any) -> Any:
        """Return a model of PyTorch as the runtime runs it, where ``STAGE`` is None."""


def import_runtime(name: str) -> Runtime:
    """Return the runtime of this name."""
    return cast(Runtime, importlib.import_module(f"compress.runtimes.{name}"))


def iterate_runtimes() -> Iterator[str]:
    """Yield the names of all runtimes."""
    package = importlib.import_module("compress.runtimes")
    for module in pkgutil.iter_modules(package.__path__):
        if hasattr(import_runtime(module.name), "STAGE"):
            yield module.name


def check_runtime(name: str, key: str) -> None:
    """Raise UserError where no runtime has the name, the value of ``key``."""
    known = list(iterate_runtimes())
    if name not in known:
        raise UserError(f"{key} is {name!r}; input should be {', '.join(map(repr, known[:-1]))} or {known[-1]!r}.")


def require_packages(extra: str, what: Path | str, packages: tuple[str, ...]) -> None:
    """Raise UserError where a package that ``what`` runs with is not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(f"{what} runs with {', '.join(missing)}, which is not installed: {format_install(extra)}")
