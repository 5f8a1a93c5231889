"""Write the words of a command line as Hydra reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def quote_value(value: Any) -> str:
    """Return a value as Hydra's command line reads it.

    >>> quote_value([1, None, True, "it's"])
    "[1,null,true,'it\\\\'s']"
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{quote_value(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(quote_value, value)) + "]"
    if isinstance(value, str | Path):
        return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"
    return repr(value)
