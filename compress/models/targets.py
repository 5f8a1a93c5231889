"""Check targets of structured pruning against the sizes of blocks, and read masks of units."""

from __future__ import annotations

import json
from typing import Literal

import torch

from compress.cache.files import expand_path
from compress.errors import UserError
from compress.maths.units import Masks
from compress.models.blocks import Block
from compress.models.loading import join_lines

Rows = list[list[Literal[0, 1]]]


def check_parts(key: str, parts: list[str], each: list[Block], family: str, even_heads: bool) -> None:
    """Raise UserError if the blocks of a ``family`` lack one of the ``parts`` that the stage ``key`` should remove."""
    if "groups" in parts and not all(block.family.cuts_heads for block in each):
        raise UserError(
            f"{key} cannot remove heads of `{family}`: a norm spans the heads of a block. Set only "
            "target_ffn_size or ffn_mask."
        )
    if "groups" in parts and not even_heads and any(block.family.equal_heads for block in each):
        raise UserError(
            f"{key}.even_heads is false, and the blocks of `{family}` share biases with a place for every "
            f"head, so that all have the same number of heads. Set {key}.even_heads=true."
        )
    if "experts" in parts and not each[0].experts:
        raise UserError(
            f"{key}.target_experts is set, and the blocks of `{family}` have no experts. Set {key}.target_ffn_size."
        )


def check_target(key: str, target: int | None, now: list[int], even: bool, unit: int, multiple: str) -> None:
    """Raise UserError if blocks of ``now`` heads or channels cannot be reduced to the ``target`` in multiples of
    ``unit``. ``key`` is the setting of the target, ``multiple`` describes the unit."""
    if target is None:
        return
    total = target * len(now)
    if total > sum(now) or (even and target > min(now)):
        raise UserError(
            f"{key}={target} is more than the {min(now) if even else format_mean(now)} that a block has. Set a lower "
            "target."
        )
    if any(number % unit for number in ([target] if even else [total, *now])) or total < unit * len(now):
        raise UserError(
            f"{key}={target} cannot be reached from {format_mean(now)} a block in multiples of {unit}, the size of "
            f"{multiple}. Set {key} to a multiple of {unit}."
        )


def preview_sizes(now: list[int], target: int | None, even: bool, unit: int) -> list[int] | None:
    """Return possible sizes of the blocks afterwards. If the sizes may differ, two blocks get a ``unit`` more and less
    than the others, so that later stages cannot rely on equal sizes."""
    if target is None:
        return None
    if even:
        return [target] * len(now)
    each, more = divmod(target * len(now) // unit, len(now))
    sizes = [unit * (each + (i < more)) for i in range(len(now))]
    if sizes[0] < now[0] and sizes[-1] > unit:
        sizes[0], sizes[-1] = sizes[0] + unit, sizes[-1] - unit
    return sizes


def format_sizes(sizes: list[int]) -> str:
    """Return ``12, 12, 10``, or ``3 times 12`` for equal sizes."""
    return f"{len(sizes)} times {sizes[0]}" if len(set(sizes)) == 1 else ", ".join(map(str, sizes)) or "no"


def format_mean(sizes: list[int]) -> str:
    return f"{sum(sizes) / len(sizes):g}"


def parse_masks(given: Rows | str, key: str, sizes: list[int]) -> Masks:
    """Return the rows of a user's mask, or of the json or pt file that it names, one row for each of ``sizes``."""
    if isinstance(given, str):
        path = expand_path(given)
        if not path.is_file() or path.suffix not in (".json", ".pt"):
            raise UserError(f"{key}={given} is no json or pt file. Set {key} to a file with rows of 0 and 1.")
        try:
            given = (
                json.loads(path.read_text(encoding="utf-8"))
                if path.suffix == ".json"
                else torch.load(path, weights_only=True)
            )
        except Exception as error:  # a damaged file can raise anything
            raise UserError(f"{key}: {path} cannot be read ({join_lines(error)[:120]}).") from error
    try:
        rows = [torch.as_tensor(row, device="cpu") for row in given]
    except (TypeError, ValueError) as error:
        raise UserError(f"{key} is no list of rows. Set a row of 0 and 1 for every block.") from error
    lengths = [row.numel() for row in rows]
    if lengths != sizes:
        raise UserError(
            f"{key} has rows of {format_sizes(lengths)} values and the model blocks of {format_sizes(sizes)}. Set a "
            "row for every block, with a 1 or 0 for each of its heads or channels."
        )
    if any(((row != 0) & (row != 1)).any() or not row.any() for row in rows):
        raise UserError(f"{key} has a row of zeros, or values that are not 0 or 1. Keep at least one unit of a block.")
    return [row.bool() for row in rows]


def check_shared_heads(key: str, blocks: list[Block], masks: Masks) -> None:
    """Raise UserError if the ``masks`` of head groups, from the setting ``key``, differ between blocks that must keep
    the same heads, or the same number of heads."""
    first: dict[tuple[int, int], torch.Tensor] = {}
    for block, mask in zip(blocks, masks, strict=True):
        if not block.family.equal_heads:
            continue
        other = first.setdefault((id(block.owner), id(block.family)), mask)
        same = torch.equal(mask, other) if block.biases is not None else mask.sum() == other.sum()
        if not same:
            what = "the same heads" if block.biases is not None else "the same number of heads"
            raise UserError(
                f"{key} has different rows for blocks of a stack that share biases with a place for every head. Keep "
                f"{what} in each of them."
            )
