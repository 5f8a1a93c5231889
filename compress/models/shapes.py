"""Cut heads and FFN channels out of models, and save and load the smaller models.

A plain transformers config describes one shape for all blocks, and computes BERT's head size from width and heads. Its
entry ``compress`` describes other shapes: ``{"heads": [of every block], "ffn": [of every block]}``, and
``linear`` what :mod:`compress.models.linears` has replaced. Such a model is built by a subclass of its transformers
class (:func:`build_cut_class`), which serves ``from_pretrained`` in every format.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from compress.errors import UserError
from compress.models.families import Family, find_family, name_family, shares_one_key_head
from compress.models.layers import find_blocks
from compress.models.linears import use_linear_layers
from compress.models.matrices import Matrix, read_matrices

Part = tuple[nn.Module, int, Tensor]
"""A layer, the dimension of its weight ``[rows, inputs]`` that units are removed from, and the indices there of every
unit, ``[units, size]``."""


@dataclass(frozen=True)
class Block:
    """The layers of a block, named by the record of its family. Query heads that share a key and value head form a
    group, which is cut as a whole; if every query head has its own key and value head, a group is one head. Query heads
    that all share one key and value head are cut one by one."""

    module: nn.Module
    family: Family
    multi_query: bool
    """Whether the model's query heads all share one key and value head."""

    def get(self, name: str) -> Any:
        return self.module.get_submodule(name)

    @property
    def attention(self) -> nn.Module:
        return self.get(self.family.query.rpartition(".")[0])  # type: ignore[no-any-return]

    @property
    def query(self) -> nn.Linear:
        return self._separate(self.family.query)

    @property
    def key(self) -> nn.Linear:
        return self._separate(self.family.key)

    @property
    def value(self) -> nn.Linear:
        return self._separate(self.family.value)

    def _separate(self, name: str) -> nn.Linear:
        if self.family.layout != "separate":
            raise UserError(
                f"`{name}` computes queries, keys and values at once; a layer for each is expected. Choose a feature "
                "that every model has (feature=hidden)."
            )
        return self.get(name)  # type: ignore[no-any-return]

    @property
    def attention_out(self) -> Any:
        return self.get(self.family.attention_out)

    @property
    def ffn_out(self) -> Any:
        return self.get(self.family.ffn_out or "")

    @property
    def head_size(self) -> int:
        return int(getattr(self.attention, self.family.head_size))

    @property
    def heads(self) -> int:
        return see_matrix(self.attention_out).inputs // self.head_size

    @property
    def key_heads(self) -> int:
        """Number of key and value heads."""
        rows = see_matrix(self.get(self.family.key)).rows // self.head_size
        return rows if self.family.layout == "separate" else (rows - self.heads) // 2

    @property
    def groups(self) -> int:
        """Number of units that heads are cut in."""
        return self.heads if self.multi_query else self.key_heads

    @property
    def group_size(self) -> int:
        return self.heads // self.groups

    @property
    def ffn(self) -> int:
        """Number of FFN channels; 0 where there are experts."""
        return see_matrix(self.ffn_out).inputs if self.family.ffn_out else 0

    @property
    def experts(self) -> int:
        """Number of experts; 0 if there are none."""
        return int(self.get(self.family.experts).num_experts) if self.family.experts else 0

    @property
    def expert_outs(self) -> list[Matrix]:
        """The matrices that read the channels of each expert."""
        if self.family.experts is None:
            return []
        matrices = read_matrices("", self.get(self.family.experts))
        return [matrix for matrix in matrices if matrix.parameter == "down_proj"]

    @property
    def head_parts(self) -> list[Part]:
        """Everything that is cut with the heads, by group."""
        family, groups, shared = self.family, self.groups, self.multi_query
        queries = torch.arange(self.heads * self.head_size, device="cpu").view(groups, -1)
        keys = torch.arange(0 if shared else self.key_heads * self.head_size, device="cpu").view(groups, -1)
        if family.layout == "separate":
            rows = {family.query: queries} | ({} if shared else {family.key: keys, family.value: keys})
        elif family.layout == "stacked" or shared:
            rows = {
                family.query: torch.cat([queries, keys + queries.numel(), keys + queries.numel() + keys.numel()], 1)
            }
        else:
            every = torch.arange(see_matrix(self.get(family.query)).rows, device="cpu")
            rows = {family.query: every.view(groups, -1)}
        return [*((self.get(name), 0, index) for name, index in rows.items()), (self.attention_out, 1, queries)]

    @property
    def ffn_parts(self) -> list[Part]:
        """Everything that is cut with the FFN's channels."""
        channels = torch.arange(self.ffn, device="cpu")[:, None]
        parts: list[Part] = [(self.ffn_out, 1, channels)]
        for layer in map(self.get, self.family.ffn_in):
            both = see_matrix(layer).rows == 2 * self.ffn  # gate and up
            parts.append((layer, 0, torch.cat([channels, channels + self.ffn], 1) if both else channels))
        return parts


def see_matrix(layer: nn.Module) -> Matrix:
    """Return the layer's weight as ``[rows, inputs]``."""
    return read_matrices("", layer)[0]


def read_blocks(model: nn.Module) -> list[Block]:
    """Return the model's blocks in order.

    Raises:
        UserError: the model's family has no record, or a block lacks a layer of the record.
    """
    family = find_family(model)
    names = [family.query, family.key, family.value, family.attention_out, *family.ffn_in]
    names += [name for name in (family.ffn_out, family.experts, family.router) if name]
    prefix, stack = find_blocks(model)
    for index, block in enumerate(stack):
        inside = dict(block.named_modules())
        if missing := [name for name in names if name not in inside]:
            raise UserError(
                f"Block {index} of `{prefix}` has no layer `{missing[0]}`, which every block of `{name_family(model)}` "
                "is expected to have. Choose another model, or stages that need no names of layers (prune, gptq, "
                "drop_layers)."
            )
    multi_query = shares_one_key_head(getattr(model, "config", None))
    return [Block(block, family, multi_query) for block in stack]


def remove_units(
    model: nn.Module,
    groups: list[Tensor] | None = None,
    ffn: list[Tensor] | None = None,
    experts: list[Tensor] | None = None,
) -> None:
    """Remove the head groups, FFN channels and experts that a block's mask (True: kept) leaves out, from every block.

    The Parameters shrink and stay the same objects, so an existing optimizer can continue to train them.
    """
    for i, block in enumerate(read_blocks(model)):
        if groups is not None:
            cut_heads(block, groups[i])
        if ffn is not None:
            for part in block.ffn_parts:
                cut_part(part, ffn[i])
        if experts is not None:
            cut_experts(block, experts[i])


def cut_heads(block: Block, kept: Tensor) -> None:
    """Remove the head groups that are not ``kept`` ``[groups]``, and count the others for the attention module."""
    for part in block.head_parts:
        cut_part(part, kept)
    attention: Any = block.attention
    counts = dict.fromkeys(("num_attention_heads", "num_heads", "n_heads"), block.heads)
    counts |= dict.fromkeys(("num_key_value_heads", "num_kv_heads"), block.key_heads)
    counts |= dict.fromkeys(("all_head_size", "split_size"), block.heads * block.head_size)
    counts["num_key_value_groups"] = block.heads // block.key_heads
    for name, value in counts.items():
        if hasattr(attention, name):
            setattr(attention, name, value)
    if block.family.reads_config:
        attention.config = copy.copy(attention.config)
        attention.config.num_attention_heads = block.heads


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
    """Keep the first ``heads[i]`` query heads, ``ffn[i]`` FFN channels and ``experts[i]`` experts of every block
    ``i``."""
    blocks = read_blocks(model)

    def first(counts: list[int] | None, totals: list[int]) -> list[Tensor] | None:
        if counts is None:
            return None
        return [torch.arange(total, device="cpu") < count for count, total in zip(counts, totals)]

    remove_units(
        model,
        groups=first(
            heads and [count // block.group_size for count, block in zip(heads, blocks)],
            [block.groups for block in blocks],
        ),
        ffn=first(ffn, [block.ffn for block in blocks]),
        experts=first(experts, [block.experts for block in blocks]),
    )


def record_shapes(model: PreTrainedModel) -> None:
    """Write the model's shapes to its config: under the config's own keys if they suffice, otherwise in the entry
    ``compress``."""
    family, config, blocks = find_family(model), model.config, read_blocks(model)
    first, heads, ffn = blocks[0], [block.heads for block in blocks], [block.ffn for block in blocks]
    extra: dict[str, list[Any]] = {}
    if family.experts_count:
        setattr(config, family.experts_count, first.experts)
    elif len(set(ffn)) == 1:
        setattr(config, family.ffn_size, ffn[0])
    else:
        extra["ffn"] = ffn
    plain = {"num_attention_heads": heads[0], "num_key_value_heads": first.key_heads, "head_dim": first.head_size}
    if family.head_size_in_config and len(set(heads)) == 1 and is_valid_config(config, plain):
        config.update(plain)
    elif set(heads) != {config.num_attention_heads}:
        extra["heads"] = heads
    if replaced := getattr(config, "compress", {}).get("linear"):
        extra["linear"] = replaced
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
        use_linear_layers(self, shapes.pop("linear", ()))
        if shapes:
            shape_blocks(self, **shapes)
        self.__class__ = base  # only the config still shows the difference

    subclass: Any = type(base.__name__, (base,), {"__init__": build, "__module__": base.__module__})
    subclass.from_config = subclass._from_config  # the name in the Auto classes
    return subclass
