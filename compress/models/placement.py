"""Place a transformer block on another device than its model while it is calibrated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

BLOCK_DEVICE: ContextVar[torch.device | None] = ContextVar("BLOCK_DEVICE", default=None)
"""The device on which calibration runs blocks; None: where the model is."""


@contextmanager
def run_blocks_on(device: torch.device | None) -> Iterator[None]:
    """Let calibration move one block at a time to ``device`` and back, so that the model need not fit there. (None
    leaves blocks where the model is.)"""
    token = BLOCK_DEVICE.set(device)
    try:
        yield
    finally:
        BLOCK_DEVICE.reset(token)


@contextmanager
def place_block(block: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Move a block to ``device``, and back afterwards. Its parameters stay the same objects."""
    home = next(block.parameters()).device
    if device is None or device == home:
        yield
        return
    block.to(device)
    try:
        yield
    finally:
        block.to(home)


def move_tensors(value: Any, device: torch.device | None, moved: dict[int, Tensor]) -> Any:
    """Return nested tuples, lists and dicts with their tensors on ``device``. Tensors ``moved`` before, by id, are not
    moved again."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        if id(value) not in moved:
            moved[id(value)] = value.to(device)
        return moved[id(value)]
    if isinstance(value, dict):
        return {key: move_tensors(part, device, moved) for key, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [move_tensors(part, device, moved) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
