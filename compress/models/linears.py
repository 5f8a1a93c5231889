"""Store GPT-2's transposed layers as plain Linear layers, for formats that know only these.

The entry ``compress`` of the config has ``linear: true`` then, and the model is built by the subclass of
:func:`compress.models.shapes.build_cut_class`.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


def use_linear_layers(model: nn.Module) -> None:
    """Replace every ``Conv1D`` of the model, on any device, by a ``Linear`` that computes the same.

    The Parameters stay the same objects, so an existing optimizer can continue to train them.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for name, layer in found.items():
        linear = nn.Linear(1, 1, device="meta")
        linear.in_features, linear.out_features = layer.nx, layer.nf
        linear.weight, linear.bias = layer.weight, layer.bias
        linear.weight.data = layer.weight.data.T.contiguous()
        linear.train(layer.training)
        model.set_submodule(name, linear)
    config: Any = getattr(model, "config", None)
    if found and config is not None:
        config.compress = {**getattr(config, "compress", {}), "linear": True}


def copy_with_linear_layers(skeleton: nn.Module) -> nn.Module:
    """Return a skeleton as :func:`use_linear_layers` would leave it: itself if nothing is to be replaced."""
    if not any(isinstance(module, Conv1D) for module in skeleton.modules()):
        return skeleton
    copied = copy.deepcopy(skeleton)
    use_linear_layers(copied)
    return copied
