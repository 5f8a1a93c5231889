"""Models that PyTorch compiles when they first run. No artifact is stored for it."""

from __future__ import annotations

from typing import Any

import torch

STAGE = None
EXTRA = None
DEVICES = ("cpu", "cuda")


def adopt_model(model: Any) -> Any:
    """Return the model, to be compiled for batches of any shape."""
    return torch.compile(model, dynamic=True)
