"""What runs an artifact, one module each, with ``load(folder, kind)`` and the patterns ``WEIGHTS`` of its files.

What it gives is called as ``model(**batch)`` with tokens, answers with ``.logits``, has a ``config`` with its labels,
and ``to(device)`` and ``parameters()`` as a torch module has them.
"""

import importlib.util
from pathlib import Path

from compress.errors import UserError
from compress.install import format_install


def require_packages(extra: str, what: Path | str, packages: tuple[str, ...]) -> None:
    """Raise UserError where a package that ``what`` runs with is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{what} runs with {', '.join(missing)}, which is not installed: {format_install(extra)}")
