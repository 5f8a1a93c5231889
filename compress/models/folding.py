"""Scale what enters a layer where it comes from: the model computes what it did, from activations of other sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def find_sources(before: Any, layer: nn.Linear, head_size: int) -> Tensor:
    """Return which output of ``before`` each input of ``layer`` is made of, ``[inputs]``: query heads that share a key
    and value head read the same values."""
    channels = torch.arange(before.weight.shape[0], device=layer.weight.device)
    if len(channels) == layer.in_features:
        return channels
    repeats = layer.in_features // len(channels)
    return channels.view(-1, head_size).repeat_interleave(repeats, 0).flatten()


@torch.no_grad()
def fold_scale(before: nn.Module, layers: list[nn.Linear], scale: Tensor, source: Tensor) -> None:
    """Have ``before`` give out ``1 / scale`` of each of its outputs, and the weights of the layers make up for it."""
    for parameter in before.parameters():
        parameter.copy_(parameter.float() / scale.view(-1, *[1] * (parameter.ndim - 1)))
    for layer in layers:
        layer.weight.copy_(layer.weight.float() * scale[source])
