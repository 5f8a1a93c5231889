"""Give a class of transformers another forward pass, whose output a kind of task takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def adapt_forward(base: Any, forward: Callable[..., Any], kind: str) -> Any:
    """Return a subclass of a class of transformers with another ``forward`` and the attribute ``task_kind``, for
    :meth:`compress.tasks.kinds.base.Kind.adapt_class`."""
    members = {
        "forward": functools.wraps(base.forward)(forward),
        "task_kind": kind,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
    }
    adapted: Any = type(base.__name__, (base,), members)
    adapted.from_config = adapted._from_config  # the name in the Auto classes
    return adapted
