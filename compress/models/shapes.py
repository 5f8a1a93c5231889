"""Cut heads and FFN channels out of models, and save and load the smaller models.

A plain transformers config describes one shape for all blocks, and computes BERT's head size from width and heads. Its
entry ``compress`` describes other shapes: ``{"heads": [of every block], "ffn": [of every block]}``. Such a model is
built by a subclass of its transformers class (:func:`build_cut_class`), which serves ``from_pretrained`` in every
format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from compress.models.families import Family, find_family
from compress.models.layers import find_blocks


@dataclass(frozen=True)
class Block:
    """The layers of a block. Query heads that share a key and value head form a group, which is cut as a whole; if
    every query head has its own key and value head, a group is one head."""

    attention: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_out: nn.Linear
    ffn_in: tuple[nn.Linear, ...]
    ffn_out: nn.Linear
    head_size: int

    @property
    def heads(self) -> int:
        return self.query.out_features // self.head_size

    @property
    def groups(self) -> int:
        return self.key.out_features // self.head_size

    @property
    def group_size(self) -> int:
        return self.heads // self.groups

    @property
    def ffn(self) -> int:
        return self.ffn_out.in_features


def read_blocks(model: nn.Module) -> list[Block]:
    """Return the model's blocks in order."""
    family = find_family(model)
    return [read_block(block, family) for block in find_blocks(model)[1]]


def read_block(block: nn.Module, family: Family) -> Block:
    """Return the layers of a block of a model of this family."""

    def get(name: str) -> Any:
        return block.get_submodule(name)

    attention = get(family.query.rpartition(".")[0])
    return Block(
        attention=attention,
        query=get(family.query),
        key=get(family.key),
        value=get(family.value),
        attention_out=get(family.attention_out),
        ffn_in=tuple(map(get, family.ffn_in)),
        ffn_out=get(family.ffn_out),
        head_size=getattr(attention, family.head_size),
    )


def remove_units(model: nn.Module, groups: list[Tensor] | None = None, ffn: list[Tensor] | None = None) -> None:
    """Remove the head groups and FFN channels that a block's mask (True: kept) leaves out, from every block.

    The Parameters shrink and stay the same objects, so an existing optimizer can continue to train them.
    """
    for i, block in enumerate(read_blocks(model)):
        if groups is not None:
            size, group = block.head_size, block.head_size * block.group_size
            keep_units(block.query, 0, groups[i], group)
            keep_units(block.key, 0, groups[i], size)
            keep_units(block.value, 0, groups[i], size)
            keep_units(block.attention_out, 1, groups[i], group)
            for name, value in (
                ("num_attention_heads", block.heads),
                ("n_heads", block.heads),
                ("all_head_size", block.heads * size),
            ):
                if hasattr(block.attention, name):
                    setattr(block.attention, name, value)
        if ffn is not None:
            for linear in block.ffn_in:
                keep_units(linear, 0, ffn[i])
            keep_units(block.ffn_out, 1, ffn[i])


def keep_units(linear: nn.Linear, dim: int, kept: Tensor, size: int = 1) -> None:
    """Keep only the outputs (``dim`` 0) or inputs (1) of the ``kept`` units, of ``size`` features each."""
    index = kept.cpu().repeat_interleave(size).nonzero().flatten().to(linear.weight.device)
    linear.weight.data = linear.weight.data.index_select(dim, index)
    linear.weight.grad = None
    if dim == 1:
        linear.in_features = len(index)
        return
    linear.out_features = len(index)
    if linear.bias is not None:
        linear.bias.data = linear.bias.data.index_select(0, index)
        linear.bias.grad = None


def shape_blocks(model: nn.Module, heads: list[int] | None = None, ffn: list[int] | None = None) -> None:
    """Keep the first ``heads[i]`` query heads and ``ffn[i]`` FFN channels of every block ``i``."""

    def first(count: int, total: int) -> Tensor:
        return torch.arange(total, device="cpu") < count

    blocks = read_blocks(model)
    remove_units(
        model,
        groups=[first(count // block.group_size, block.groups) for count, block in zip(heads, blocks)]
        if heads
        else None,
        ffn=[first(count, block.ffn) for count, block in zip(ffn, blocks)] if ffn else None,
    )


def record_shapes(model: PreTrainedModel) -> None:
    """Write the model's shapes to its config: under the config's own keys if they suffice, otherwise in the entry
    ``compress``."""
    family, config, blocks = find_family(model), model.config, read_blocks(model)
    heads, ffn = [block.heads for block in blocks], [block.ffn for block in blocks]
    extra = {}
    if len(set(ffn)) == 1:
        setattr(config, family.ffn_size, ffn[0])
    else:
        extra["ffn"] = ffn
    plain = {"num_attention_heads": heads[0], "num_key_value_heads": blocks[0].groups, "head_dim": blocks[0].head_size}
    if family.head_size_in_config and len(set(heads)) == 1 and is_valid_config(config, plain):
        config.update(plain)
    elif set(heads) != {config.num_attention_heads}:
        extra["heads"] = heads
    if extra:
        config.compress = extra
    elif hasattr(config, "compress"):
        del config.compress


def is_valid_config(config: PretrainedConfig, values: dict[str, Any]) -> bool:
    """Return whether the config accepts these values: Llama's refuses heads that do not divide the width."""
    try:
        type(config).from_dict({**config.to_dict(), **values})
    except StrictDataclassError:
        return False
    return True


def build_cut_class(base: type[PreTrainedModel]) -> Any:
    """Return a subclass of ``base`` for a config with the entry ``compress``: it builds models in these shapes, on any
    device, that are afterwards plain models of ``base``."""

    def build(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        shape_blocks(self, **config.compress)
        self.__class__ = base  # only the config still shows the difference

    subclass: Any = type(base.__name__, (base,), {"__init__": build, "__module__": base.__module__})
    subclass.from_config = subclass._from_config  # the name in the Auto classes
    return subclass
