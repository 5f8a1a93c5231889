"""Scale what enters a layer where it comes from: the model computes what it did, from activations of other sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compress.models.shapes import LLAMA


class Fold(NamedTuple):
    """Layers of a block that read what ``before``, a norm or a layer, gives out, and nothing else reads; and the module
    ``within`` which they work together, if it is not each for itself."""

    before: str
    layers: tuple[str, ...]
    within: str | None = None


FOLDS = (
    Fold("input_layernorm", (LLAMA.query, LLAMA.key, LLAMA.value), "self_attn"),
    Fold(LLAMA.value, (LLAMA.attention_out,)),
    Fold("post_attention_layernorm", LLAMA.ffn_in, "mlp"),
    Fold("mlp.up_proj", (LLAMA.ffn_out,)),
)
"""Those of a block of Llama, Mistral or Qwen2."""


def find_sources(block: Any, before: Any, layer: nn.Linear) -> Tensor:
    """Which output of ``before`` each input of ``layer`` is made of, ``[inputs]``: query heads that share a key and
    value head read the same values."""
    channels = torch.arange(before.weight.shape[0], device=layer.weight.device)
    if len(channels) == layer.in_features:
        return channels
    heads = channels.view(-1, block.self_attn.head_dim)
    return heads.repeat_interleave(layer.in_features // len(channels), 0).flatten()


@torch.no_grad()
def fold_scale(before: nn.Module, layers: list[nn.Linear], scale: Tensor, source: Tensor) -> None:
    """Have ``before`` give out ``1 / scale`` of each of its outputs, and the weights of the layers make up for it."""
    for parameter in before.parameters():
        parameter.copy_(parameter.float() / scale.view(-1, *[1] * (parameter.ndim - 1)))
    for layer in layers:
        layer.weight.copy_(layer.weight.float() * scale[source])
