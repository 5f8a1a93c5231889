"""Count what a model costs, and what each of its attention heads and FFN channels adds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compress.models.blocks import Block, Part, read_blocks, see_matrix
from compress.models.layers import limit_gradients
from compress.models.products import separate_experts


@dataclass(frozen=True)
class Costs:
    """What a model costs in all, and by block what every head group and every FFN channel adds."""

    total: float
    groups: tuple[float, ...]
    ffn: tuple[float, ...]


def count_parameters(model: nn.Module) -> Costs:
    """Return the parameters of the model, each counted once, and those of its units."""

    def count(part: Part) -> float:
        layer, dim, index = part
        matrix = see_matrix(layer)
        biased = dim == 0 and matrix.bias is not None
        return float(index.shape[1] * (matrix.shape[1 - dim] + biased))

    blocks = read_blocks(model)
    return Costs(
        float(sum(parameter.numel() for parameter in model.parameters())),
        tuple(sum(map(count, block.head_parts)) for block in blocks),
        tuple(sum(map(count, block.ffn_parts)) if block.ffn else 0.0 for block in blocks),
    )


def count_unit_macs(model: Any, text: dict[str, Tensor]) -> Costs:
    """Return the multiply-accumulates of the model for one ``text``, and those of its units.

    A unit multiplies every token by its weights. A head also multiplies every query by every key, and every weight of
    attention by every value. A block that the model repeats counts every time.
    """
    blocks, length = read_blocks(model), text["input_ids"].shape[1]
    device = next(model.parameters()).device
    calls: Counter[nn.Module] = Counter()
    hooks = [block.attention_out.register_forward_hook(lambda layer, *_: calls.update([layer])) for block in blocks]
    total = count_macs(model, {name: tensor.to(device) for name, tensor in text.items()})
    for hook in hooks:
        hook.remove()

    def count(part: Part) -> float:
        layer, dim, index = part
        return float(length * index.shape[1] * see_matrix(layer).shape[1 - dim])

    def attend(block: Block) -> float:
        return 2.0 * length**2 * block.group_size * block.head_size

    return Costs(
        float(total or 0),
        tuple(calls[block.attention_out] * (sum(map(count, block.head_parts)) + attend(block)) for block in blocks),
        tuple(calls[block.attention_out] * sum(map(count, block.ffn_parts)) if block.ffn else 0.0 for block in blocks),
    )


@torch.inference_mode()
def count_macs(model: Any, text: dict[str, Tensor]) -> int | None:
    """Return the multiply-accumulates of matrices for one text; None if a runtime or packed layers hide them."""
    if not isinstance(model, nn.Module):
        return None
    if any(hasattr(weight, "quant_state") or hasattr(weight, "CB") for weight in model.parameters()):
        return None
    # The counter looks for the gradient of a weight that a module gets as its input (DeBERTa). It counts neither fused
    # attention nor products of several experts at once.
    counter = FlopCounterMode(display=False)
    with limit_gradients(model), separate_experts(model), sdpa_kernel(SDPBackend.MATH), counter:
        model(**text)
    return counter.get_total_flops() // 2
