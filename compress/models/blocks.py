"""See a model as transformer blocks, whose layers the record of the model's family names."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.models.families import Family, find_family, name_family, shares_one_key_head
from compress.models.layers import find_blocks, find_stacks
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
    owner: nn.Module
    """The module that holds the stack of blocks."""

    def get(self, name: str) -> Any:
        return self.module.get_submodule(name)

    def count(self, part: str) -> int:
        """Return the number of units of ``part``: ``groups``, ``heads``, ``ffn`` or ``experts``."""
        return int(getattr(self, part))

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
    def biases(self) -> nn.Embedding | None:
        """The table with a column for every head, which the blocks of the stack share."""
        return self.family.head_biases and self.owner.get_submodule(self.family.head_biases)  # type: ignore[return-value]

    @property
    def ffn_in(self) -> list[nn.Module]:
        return [
            layer
            for name, layer in self.module.named_modules()
            if any(fnmatchcase(name, pattern) for pattern in self.family.ffn_in)
        ]

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
        """Number of channels of the FFN or of each expert; 0 if there are none."""
        if self.family.experts:
            return self.expert_outs[0].inputs
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
        for layer in self.ffn_in:
            both = see_matrix(layer).rows == 2 * self.ffn  # gate and up
            parts.append((layer, 0, torch.cat([channels, channels + self.ffn], 1) if both else channels))
        return parts

    def find_readers(self, part: str) -> list[tuple[Matrix, Tensor]]:
        """Return the matrices that read the units of ``part``, with the inputs of every unit, ``[units, size]``: one
        for heads or the FFN; one for every expert, which is a unit itself or has channels as units."""
        if part == "groups":
            return [(see_matrix(self.attention_out), self.head_parts[-1][2])]
        channels = torch.arange(self.ffn, device="cpu")
        if self.experts:
            return [(matrix, channels[None] if part == "experts" else channels[:, None]) for matrix in self.expert_outs]
        return [(see_matrix(self.ffn_out), channels[:, None])] if self.count(part) else []


def see_matrix(layer: nn.Module) -> Matrix:
    """Return the layer's weight as ``[rows, inputs]``."""
    return read_matrices("", layer)[0]


def read_blocks(model: nn.Module) -> list[Block]:
    """Return the model's blocks in order. A decoder's block beside an encoder is two: one of self attention and FFN,
    one of the attention to the encoder.

    Raises:
        UserError: the model's family has no record, or a block lacks a layer of the record.
    """
    family = find_family(model)
    stacks = find_stacks(model) if family.decoder else dict([find_blocks(model)])
    multi_query = shares_one_key_head(getattr(model, "config", None))
    blocks = []
    for prefix, stack in stacks.items():
        records = family.decoder if family.decoder and "decoder" in prefix.split(".") else (family,)
        owner = model.get_submodule(prefix.rpartition(".")[0])
        for index, module in enumerate(stack):
            for record in records:
                check_layers(record, module, f"Block {index} of `{prefix}`", name_family(model))
                blocks.append(Block(module, record, multi_query, owner))
    return blocks


def check_layers(family: Family, module: nn.Module, block: str, name: str) -> None:
    """Raise UserError if the ``module`` lacks a layer of a record, that of the ``family`` called ``name``."""
    names = [family.query, family.key, family.value, family.attention_out, *family.ffn_in]
    names += [one for one in (family.ffn_out, family.experts, family.router) if one]
    inside = [inner for inner, _ in module.named_modules()]
    if missing := [one for one in names if not any(fnmatchcase(inner, one) for inner in inside)]:
        raise UserError(
            f"{block} has no layer `{missing[0]}`, which every block of `{name}` is expected to have. Choose another "
            "model, or stages that need no names of layers (prune, gptq, drop_layers)."
        )


def select_blocks(blocks: list[Block], part: str) -> list[Block]:
    """Return the blocks that have units of ``part``."""
    return [block for block in blocks if block.count(part)]
