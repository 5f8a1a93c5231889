"""The contract of a runtime: a module of this package that runs artifacts. Modules are found by name."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from compress.errors import UserError
from compress.install import format_install


class Loading(NamedTuple):
    """Text of an artifact's card on how to load it."""

    code: str
    """Lines of Python that run in the artifact's folder and compute ``logits``."""
    notes: tuple[str, ...] = ()
    """Sentences about the format."""
    needs_us: bool = False
    """True if the lines import `compress`."""


class Runtime(Protocol):
    """Contents of such a module.

    The module has the name of the library that runs its artifacts. It imports the library only in functions, so that
    the constants can be read without the library. ``torch_compile`` has no stored artifacts and therefore only
    ``STAGE``, ``EXTRA``, ``DEVICES`` and ``adopt_model``.
    """

    STAGE: str | None
    """Stage that exports to the runtime; None if PyTorch runs the model."""
    EXTRA: str | None
    """Extra that installs the runtime; None if the base install does."""
    DEVICES: tuple[str, ...]
    """Types of devices that the runtime supports."""
    PACKAGES: tuple[str, ...]
    """Packages beyond the base install."""
    LIBRARY: str
    """Name of the artifacts' library on the hub."""
    WEIGHTS: tuple[str, ...]
    """Patterns of the weight files; the first pattern with files in a folder is loaded."""

    def load(self, folder: Path, kind: str) -> Any:
        """Return the model of an artifact for this kind of task.

        ``model(**batch)`` takes tokens and returns ``.logits``. The model has a ``config`` with its labels, and
        ``to(device)`` and ``parameters()`` like a torch module.
        """

    def describe_loading(self, folder: Path, kind: str) -> Loading:
        """Return how to load the artifact, if possible without `compress`."""

    def adopt_model(self, model: Any) -> Any:
        """Return a PyTorch model prepared for the runtime; only if ``STAGE`` is None."""


def import_runtime(name: str) -> Runtime:
    """Return the runtime of this name."""
    return cast(Runtime, importlib.import_module(f"compress.runtimes.{name}"))


def iterate_runtimes() -> Iterator[str]:
    """Yield the names of all runtimes."""
    package = importlib.import_module("compress.runtimes")
    for module in pkgutil.iter_modules(package.__path__):
        if hasattr(import_runtime(module.name), "STAGE"):
            yield module.name


def check_runtime(name: str, key: str, stored: bool = False) -> None:
    """Raise UserError if no runtime has this name, the value of ``key``, or none that loads ``stored`` artifacts."""
    known = [each for each in iterate_runtimes() if not stored or hasattr(import_runtime(each), "load")]
    if name not in known:
        raise UserError(f"{key} is {name!r}; input should be {', '.join(map(repr, known[:-1]))} or {known[-1]!r}.")


@contextlib.contextmanager
def explain_unreadable(folder: Path, *files: str) -> Iterator[None]:
    """Raise UserError if one of the files is missing from ``folder``, or if what reads them fails."""
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise UserError(f"{folder} holds no {missing[0]}, which its runtime loads. Set artifact to a complete folder.")
    try:
        yield
    except Exception as error:  # each library has exceptions of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / files[0]} cannot be read ({reason}). Set artifact to another folder.") from error


def require_packages(extra: str, what: Path | str, packages: tuple[str, ...]) -> None:
    """Raise UserError if a package that ``what`` needs is not installed."""
    if missing := find_missing(packages):
        raise UserError(f"{what} needs {', '.join(missing)}, which is not installed. Type {format_install(extra)}")


def find_missing(packages: tuple[str, ...]) -> list[str]:
    """Return those of the packages that are not installed."""
    return [package for package in packages if find_spec(package) is None]
