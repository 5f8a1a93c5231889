"""Scales of channels that are divided by them in one place and multiplied in the next."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_SHARE = 1e-4
"""Least magnitude of a channel, as a share of the mean, that scales are computed from: those of channels that are
almost never active would exceed 16 bits."""


def max_per_source(source: Tensor, x: Tensor) -> Tensor:
    """Return the largest of ``x`` ``[inputs]`` over the inputs of the same ``source``, ``[channels]``."""
    return torch.zeros(int(source.max()) + 1, device=x.device).scatter_reduce(0, source, x, "amax")


def mean_per_source(source: Tensor, x: Tensor) -> Tensor:
    """Return the mean of ``x`` ``[inputs]`` over the inputs of the same ``source``, ``[channels]``."""
    total = torch.zeros(int(source.max()) + 1, device=x.device).index_add_(0, source, x)
    return total / source.bincount()


def smoothing_scale(activation: Tensor, weight: Tensor, strength: float) -> Tensor:
    """Return ``activation^strength / weight^(1 - strength)`` of every channel's largest activation and weight. A
    strength of 0.5 makes both equally large. A channel that is always zero, or has only zero weights, gets 1."""
    live = (activation > 0) & (weight > 0)
    activation, weight = raise_smallest(activation), raise_smallest(weight)
    return torch.where(live, activation**strength / weight ** (1 - strength), 1.0)


def raise_smallest(magnitudes: Tensor) -> Tensor:
    """Return magnitudes of channels of which none is less than :data:`LEAST_SHARE` of their mean."""
    return magnitudes.clamp(min=max(LEAST_SHARE * magnitudes.mean().item(), torch.finfo(torch.float32).tiny))
