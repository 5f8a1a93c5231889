"""Say how `compress` was installed: where its configs are, and what a user types to run it or to add to it."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).parents[1]
IS_CHECKOUT = (_ROOT / "pyproject.toml").is_file() and (_ROOT / "train.py").is_file()
CONF = (_ROOT if IS_CHECKOUT else Path(__file__).parent) / "conf"
"""The folder of our own configs: beside the package in a checkout, inside it where a wheel was installed."""


def format_command(name: str) -> str:
    """Return what starts ``train`` or ``evaluate`` here: ``python train.py``, or ``compress train`` from a wheel."""
    return f"python {name}.py" if IS_CHECKOUT else f"compress {name}"


def format_install(extra: str) -> str:
    """Return the command that installs an extra.

    >>> format_install("gptq").startswith("pip install ")
    True
    """
    return f"pip install -e '.[{extra}]'" if IS_CHECKOUT else f"pip install 'compress-lm[{extra}]'"
