"""Let mkdocstrings read our docstrings: one `Example:`, and code that Sphinx's roles name."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Rewrite every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r":(?:class|func|meth|mod|data|attr):`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
