"""Fold scales of a layer's inputs into the module before it: activations change and the model's outputs do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def find_sources(before: Any, layer: nn.Linear, head_size: int) -> Tensor:
    """Return the index of the output of ``before`` that feeds each input of ``layer``, ``[inputs]``. Query heads that
    share a key and value head read the same values."""
    channels = torch.arange(before.weight.shape[0], device=layer.weight.device)
    if len(channels) == layer.in_features:
        return channels
    repeats = layer.in_features // len(channels)
    return channels.view(-1, head_size).repeat_interleave(repeats, 0).flatten()


@torch.no_grad()
def fold_scale(before: nn.Module, layers: list[nn.Linear], scale: Tensor, source: Tensor) -> None:
    """Divide the outputs of ``before`` by ``scale``, and multiply the weights of the layers to compensate."""
    for parameter in before.parameters():
        parameter.copy_(parameter.float() / scale.view(-1, *[1] * (parameter.ndim - 1)))
    for layer in layers:
        layer.weight.copy_(layer.weight.float() * scale[source])
