"""Cut heads and FFN channels out of models, and save and load the smaller models.

A plain transformers config describes one shape for all blocks, and computes BERT's head size from width and heads. Its
entry ``compress`` describes other shapes: ``{"heads": [of every block], "ffn": [of every block]}``, ``width`` the
dimensions of the hidden states, and ``linear`` what :mod:`compress.models.linears` has replaced. Such a model is built
by a subclass of its transformers class (:func:`build_cut_class`), which serves ``from_pretrained`` in every format.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from compress.models.blocks import Block, Part, read_blocks, see_matrix, select_blocks
from compress.models.families import find_family
from compress.models.linears import use_linear_layers
from compress.models.matrices import read_matrices
from compress.models.width import cut_width


def remove_units(
    model: nn.Module,
    groups: list[Tensor] | None = None,
    ffn: list[Tensor] | None = None,
    experts: list[Tensor] | None = None,
) -> None:
    """Remove the head groups, FFN channels and experts that a mask (True: kept) leaves out. Each list has a mask for
    every block that has such units. That of experts' channels is ``[channels]``, or ``[experts, channels]`` with the
    same number for each expert.

    The Parameters shrink and stay the same objects, so an existing optimizer can continue to train them.
    """
    blocks = read_blocks(model)
    for part, masks in {"groups": groups, "ffn": ffn, "experts": experts}.items():
        if masks is None:
            continue
        owners = select_blocks(blocks, part)
        if part == "groups":
            cut_head_biases(owners, masks)
        for block, kept in zip(owners, masks, strict=True):
            CUTS[part](block, kept)


def cut_heads(block: Block, kept: Tensor) -> None:
    """Remove the head groups that are not ``kept`` ``[groups]``, and count the others for the attention module."""
    for part in block.head_parts:
        cut_part(part, kept)
    attention: Any = block.attention
    counts = dict.fromkeys(("num_attention_heads", "num_heads", "n_heads"), block.heads)
    counts |= dict.fromkeys(("num_key_value_heads", "num_kv_heads"), block.key_heads)
    counts |= dict.fromkeys(("all_head_size", "split_size", "inner_dim"), block.heads * block.head_size)
    counts["num_key_value_groups"] = block.heads // block.key_heads
    for name, value in counts.items():
        if hasattr(attention, name):
            setattr(attention, name, value)
    if block.family.reads_config:
        attention.config = copy.copy(attention.config)
        attention.config.num_attention_heads = block.heads


def cut_head_biases(blocks: list[Block], masks: list[Tensor]) -> None:
    """Remove the columns of the heads that are not kept from every table of biases that ``blocks`` share.

    Raises:
        ValueError: these blocks do not keep the same heads.
    """
    tables: dict[nn.Embedding, Tensor] = {}
    for block, kept in zip(blocks, masks, strict=True):
        if block.biases is not None and not torch.equal(tables.setdefault(block.biases, kept), kept):
            raise ValueError("blocks that share the biases of their heads have to keep the same heads")
    for table, kept in tables.items():
        select(table, "weight", 1, kept)
        table.embedding_dim = int(kept.sum())


def cut_ffn(block: Block, kept: Tensor) -> None:
    """Remove the channels that are not ``kept`` ``[channels]`` from the FFN or every expert; ``[experts, channels]``
    keeps other channels of every expert."""
    if not block.experts:
        for part in block.ffn_parts:
            cut_part(part, kept)
        return
    experts: Any = block.get(block.family.experts or "")
    shapes: dict[str, list[Tensor]] = {}
    rows = kept.cpu().expand(block.experts, -1)
    for matrix in read_matrices("", experts):
        left = rows[matrix.expert]
        if matrix.parameter != "down_proj":
            left = left.repeat(matrix.rows // len(left))  # gate and up
        dim = int(matrix.parameter == "down_proj")
        weight = matrix.weight.index_select(dim, left.nonzero().flatten().to(matrix.stored.device))
        shapes.setdefault(matrix.parameter, []).append(weight.T if matrix.transposed else weight)
    for name, weights in shapes.items():
        parameter = getattr(experts, name)
        parameter.data, parameter.grad = torch.stack(weights), None
    for name in ("intermediate_dim", "intermediate_size"):
        if hasattr(experts, name):
            setattr(experts, name, block.ffn)


def cut_experts(block: Block, kept: Tensor) -> None:
    """Remove the experts that are not ``kept`` ``[experts]``, and their rows of the router."""
    count = block.experts
    for module in (block.get(block.family.experts or ""), block.get(block.family.router or "")):
        for name, parameter in module.named_parameters(recurse=False):
            if len(parameter) == count:
                select(module, name, 0, kept)
    for module in block.module.modules():
        if getattr(module, "num_experts", None) == count:
            vars(module)["num_experts"] = int(kept.sum())


CUTS = {"groups": cut_heads, "ffn": cut_ffn, "experts": cut_experts}
"""Functions that remove the units of a block that a mask leaves out."""


def cut_part(part: Part, kept: Tensor) -> None:
    """Remove the units of a layer that are not ``kept`` ``[units]``."""
    layer, dim, index = part
    matrix: Any = see_matrix(layer)
    left = torch.ones(matrix.shape[dim], dtype=torch.bool, device="cpu")
    left[index[~kept.cpu()].flatten()] = False
    select(layer, "weight", 1 - dim if matrix.transposed else dim, left)
    if dim == 0 and matrix.bias is not None:
        select(layer, "bias", 0, left)
    for name in ("out_features", "nf") if dim == 0 else ("in_features", "nx"):
        if hasattr(layer, name):
            setattr(layer, name, int(left.sum()))


def select(module: nn.Module, name: str, dim: int, kept: Tensor) -> None:
    """Keep only the ``kept`` places of a dimension of a Parameter."""
    parameter = getattr(module, name)
    parameter.data = parameter.data.index_select(dim, kept.cpu().nonzero().flatten().to(parameter.device))
    parameter.grad = None


def shape_blocks(
    model: nn.Module, heads: list[int] | None = None, ffn: list[int] | None = None, experts: list[int] | None = None
) -> None:
    """Keep the first ``heads[i]`` query heads, ``ffn[i]`` FFN channels and ``experts[i]`` experts of the ``i``-th block
    that has such units."""
    blocks = read_blocks(model)

    def first(part: str, counts: list[int] | None) -> list[Tensor] | None:
        if counts is None:
            return None
        owners = select_blocks(blocks, part)
        if part == "groups":
            counts = [count // block.group_size for count, block in zip(counts, owners, strict=True)]
        totals = [block.count(part) for block in owners]
        return [torch.arange(total, device="cpu") < count for count, total in zip(counts, totals, strict=True)]

    remove_units(model, first("groups", heads), first("ffn", ffn), first("experts", experts))


def record_shapes(model: PreTrainedModel) -> None:
    """Write the model's shapes to its config: under the config's own keys if they suffice, otherwise in the entry
    ``compress``."""
    family, config, blocks = find_family(model), model.config, read_blocks(model)
    first, heads = blocks[0], [block.heads for block in blocks]
    extra: dict[str, Any] = {}
    if family.experts_count:
        setattr(config, family.experts_count, first.experts)
    channels = [(block.family.ffn_size, block.ffn) for block in select_blocks(blocks, "ffn")]
    if len(set(channels)) == len(dict(channels)):
        config.update(dict(channels))
    else:
        extra["ffn"] = [size for _, size in channels]
    plain = {family.heads_count: heads[0], "head_dim": first.head_size}
    if hasattr(config, "num_key_value_heads"):
        plain["num_key_value_heads"] = first.key_heads
    if family.head_size_in_config and len(set(heads)) == 1 and is_valid_config(config, plain):
        config.update(plain)
    elif any(block.heads != getattr(config, block.family.heads_count) for block in blocks):
        extra["heads"] = heads
    extra |= {key: value for key, value in getattr(config, "compress", {}).items() if key in ("width", "linear")}
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
        shapes = dict(config.compress)
        width, replaced = shapes.pop("width", None), shapes.pop("linear", ())
        if shapes:
            shape_blocks(self, **shapes)
        if width is not None:
            self.tie_weights()  # as the trace needs them
            cut_width(self, width)
        use_linear_layers(self, replaced)
        self.__class__ = base  # only the config still shows the difference

    subclass: Any = type(base.__name__, (base,), {"__init__": build, "__module__": base.__module__})
    subclass.from_config = subclass._from_config  # the name in the Auto classes
    return subclass
