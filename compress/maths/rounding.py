"""Round floats to integers on a grid: plain functions on tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from compress.errors import UserError

PART = 2**18
"""Weights of which the best grid is searched together on a processor: a megabyte."""


@dataclass(frozen=True)
class Scheme:
    """The storage of a layer's weights: integers of ``bits`` bits, with a scale for every ``group_size`` consecutive
    inputs of a row (-1: for the whole row), and a zero point unless they are ``symmetric`` around zero."""

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    group_size: Annotated[int, Field(ge=-1)] = -1
    symmetric: bool = True

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def group(self, inputs: int) -> int:
        """Return how many of a row's ``inputs`` share a scale."""
        return inputs if self.group_size == -1 else self.group_size

    def average_bits(self, inputs: int, dtype: torch.dtype) -> float:
        """Return the stored bits per weight of a layer of ``inputs``, with scales in ``dtype`` and zero points."""
        overhead = dtype.itemsize * 8 + (0 if self.symmetric else self.bits)
        return self.bits + overhead / self.group(inputs)

    def check(self, key: str, inputs: Mapping[str, int]) -> None:
        """Raise UserError if the groups do not divide the ``inputs`` of a matrix, by name; ``key`` is the setting of
        the stage."""
        for name, count in inputs.items():
            if self.group_size == 0 or count % self.group(count):
                common = math.gcd(*inputs.values())
                fits = [2**power for power in range(4, 10) if 2**power < self.group_size and common % 2**power == 0]
                advice = f"{key}.group_size={fits[-1]}, which divides those of every layer" if fits else ""
                raise UserError(
                    f"{key}.group_size is {self.group_size}, which does not divide the {count} inputs of `{name}`. Set "
                    f"{advice or 'a divisor of the inputs of every layer'}, or {key}.group_size=-1 for one scale a row."
                )


class Grid(NamedTuple):
    """The values that a quantized weight can take: ``(integer - zero) * scale``; both ``[rows, groups]``."""

    scale: Tensor
    zero: Tensor


class Integers(NamedTuple):
    """The stored weights of a layer, ``(integers - zero) * scale``; the integers ``[rows, inputs]`` are between
    ``scheme.lowest`` and ``scheme.highest``."""

    scheme: Scheme
    integers: Tensor
    grid: Grid

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weights ``[rows, inputs]`` in ``dtype``, computed in the dtype of the scale, as a checkpoint's
        reader does."""
        scale, zero = self.grid.scale[:, :, None], self.grid.zero[:, :, None]
        groups = self.integers.short().unflatten(1, (scale.shape[1], -1))  # a difference of bytes can exceed a byte
        return ((groups - zero).to(scale.dtype) * scale).to(dtype).flatten(1)

    def cpu(self) -> Integers:
        """Return the integers in the CPU's memory."""
        return Integers(self.scheme, self.integers.cpu(), Grid(*(part.cpu() for part in self.grid)))


def minmax_grid(weight: Tensor, scheme: Scheme, dtype: torch.dtype, shrink: float | Tensor = 1.0) -> Grid:
    """Return a grid for every group of ``weight`` ``[rows, inputs]``, from its smallest to its largest value and with
    zero on it. ``shrink`` scales that range, one share for all or ``[rows, groups]``. Scales are in ``dtype``, as
    stored."""
    groups = weight.float().unflatten(1, (-1, scheme.group(weight.shape[1])))
    return grid_of_range(groups.amin(2), groups.amax(2), scheme, dtype, shrink)


def grid_of_range(low: Tensor, high: Tensor, scheme: Scheme, dtype: torch.dtype, shrink: float | Tensor = 1.0) -> Grid:
    """Return the grids from ``low`` to ``high``, which have any shape, scaled by ``shrink`` and with zero on them."""
    levels = 2**scheme.bits - 1
    if scheme.symmetric:
        scale = 2 * torch.maximum(-low, high) / levels
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / levels
    scale = (shrink * scale).to(dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # any scale represents a group of zeros
    if scheme.symmetric:
        return Grid(scale, torch.zeros_like(scale, dtype=torch.int8))
    zero = (scheme.lowest - shrink * low / scale.float()).round().clamp(scheme.lowest, scheme.highest)
    return Grid(scale, zero.to(torch.int8))


def round_to_nearest(weight: Tensor, grid: Grid, scheme: Scheme) -> Integers:
    """Return the integers of the grid that are nearest to ``weight`` ``[rows, inputs]``; an exact zero stays zero."""
    return Integers(scheme, round_to_integers(weight, grid, scheme).char(), grid)


def round_to_grid(weight: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """Return the nearest values of the grid to ``weight`` ``[rows, inputs]``, computed in the dtype of the scale, as a
    checkpoint's reader does. An exact zero stays zero."""
    scale, zero = grid.scale[:, :, None], grid.zero[:, :, None]
    integers = round_to_integers(weight, grid, scheme).unflatten(1, (scale.shape[1], -1))
    return ((integers - zero).to(scale.dtype) * scale).float().flatten(1)


def round_to_integers(weight: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """Return the integers of the nearest values of the grid to ``weight`` ``[rows, inputs]``, as floats."""
    scale, zero = grid.scale[:, :, None], grid.zero[:, :, None]
    groups = weight.float().unflatten(1, (scale.shape[1], -1))
    return (groups / scale.float() + zero).round().clamp(scheme.lowest, scheme.highest).flatten(1)


def fit_grid(weight: Tensor, scheme: Scheme, dtype: torch.dtype, importance: Tensor, steps: int = 20) -> Grid:
    """Return the grid of every group of ``weight`` ``[rows, inputs]`` with the least rounding error, of ``steps`` grids
    between half and all of the group's range. ``importance`` weighs the squared errors, ``[inputs]``, or is the second
    moment of the inputs, ``[inputs, inputs]``, of which the part within a group counts."""
    size, rows = scheme.group(weight.shape[1]), len(weight)
    groups = weight.T.unflatten(0, (-1, size))  # [groups, size, rows]: what belongs to a row's scale is in one column
    weighing = importance.float().unflatten(0, (-1, size))
    if importance.ndim == 2:
        weighing = weighing.unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, size, size]
    few_rows, few_groups = rows, len(groups)
    if weight.device.type == "cpu":  # A part that stays in the processor's cache is several times faster there.
        few_rows = max(64, PART // size)
        few_groups = max(1, PART // (size * min(few_rows, rows)))
    parts = [
        [
            fit_groups(part.float().contiguous(), scheme, dtype, weights, steps)
            for part, weights in zip(some.split(few_groups), weighing.split(few_groups))
        ]
        for some in groups.split(few_rows, dim=2)
    ]
    by_rows = [Grid(*(torch.cat(part).T for part in zip(*of_rows))) for of_rows in parts]
    return Grid(*(torch.cat(part) for part in zip(*by_rows)))


def fit_groups(groups: Tensor, scheme: Scheme, dtype: torch.dtype, importance: Tensor, steps: int) -> Grid:
    """Return the best grids, with parts ``[groups, rows]``, of ``groups`` ``[groups, size, rows]``; ``importance`` is
    ``[groups, size]`` or ``[groups, size, size]``."""
    low, high = groups.amin(1), groups.amax(1)
    errors = torch.empty_like(groups)

    def lost(grid: Grid) -> Tensor:
        scale, zero = grid.scale[:, None], grid.zero[:, None]
        torch.div(groups, scale.float(), out=errors)
        if not scheme.symmetric:
            errors.add_(zero)
        errors.round_().clamp_(scheme.lowest, scheme.highest)
        if not scheme.symmetric:
            errors.sub_(zero)
        # The product has the dtype of the scale, as for a checkpoint's reader.
        values = errors.mul_(scale) if dtype is torch.float32 else errors.to(dtype).mul_(scale)
        torch.sub(values, groups, out=errors)
        if importance.ndim == 3:
            return (importance @ errors).mul_(errors).sum(1)
        return (importance[:, None] @ errors.square_())[:, 0]

    best = grid_of_range(low, high, scheme, dtype)
    least = lost(best)
    for step in range(1, steps):
        grid = grid_of_range(low, high, scheme, dtype, shrink=1 - 0.5 * step / steps)
        loss = lost(grid)
        better = loss < least
        least = torch.where(better, loss, least)
        best = Grid(*(torch.where(better, new, old) for new, old in zip(grid, best)))
    return best


class Inputs(NamedTuple):
    """The quantization of a layer's inputs: one static ``grid`` with parts ``[1]``, or without it a grid for every
    token, up to the token's largest value."""

    scheme: Scheme
    grid: Grid | None = None

    def quantize(self, x: Tensor) -> Tensor:
        """Return ``x`` ``[..., inputs]`` rounded to the grid, by the operations of the library that loads the artifact,
        so that no rounding differs."""
        low, high = self.scheme.lowest, self.scheme.highest
        if self.grid is None:
            scale = 2 * x.abs().amax(-1, keepdim=True) / (high - low)
            return fake_quantize(x, scale.masked_fill(scale == 0, 1), 0, low, high)
        scale, zero = self.grid
        return fake_quantize(x, scale, zero.to(scale.dtype), low, high)

    def to(self, device: torch.device) -> Inputs:
        """Return the quantization with its grid on ``device``."""
        return self if self.grid is None else Inputs(self.scheme, Grid(*(part.to(device) for part in self.grid)))

    def attach(self, layer: nn.Module) -> None:
        """Make the layer compute with quantized inputs."""
        on = cache(self.to)  # A copy from the host at every call would make a GPU wait.
        layer.register_forward_pre_hook(lambda _, args: on(args[0].device).quantize(args[0]))


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor | int, low: int, high: int) -> Tensor:
    """Return ``(integer - zero) * scale`` for the integers from ``low`` to ``high`` nearest to ``x``.

    Gradients pass straight through the rounding: that of ``x`` is one inside the range and none outside (Jacob et al.,
    "Quantization and Training of Neural Networks", 2017, arXiv:1712.05877), that of ``scale`` is the rounding error
    inside and the end of the range outside (Esser et al., "Learned Step Size Quantization", 2019, arXiv:1902.08153).
    """
    integers = straight_through_round((x / scale + zero).clamp(low, high))
    return ((integers - zero) * scale).to(x.dtype)


def straight_through_round(x: Tensor) -> Tensor:
    """Return ``x`` rounded, with the gradient of ``x``."""
    return x + (x.round() - x).detach()


def count_values(x: Tensor) -> Tensor:
    """Return a histogram ``[65536]``: how often each number of bfloat16, in order, is nearest to a value of ``x``. It
    covers any range, and histograms of batches can be added."""
    bits = x.bfloat16().flatten().view(torch.int16).int()
    return torch.bincount((bits ^ ((bits >> 15) & 0x7FFF)) + (1 << 15), minlength=1 << 16)


def percentile_range(counts: Tensor, percentile: float) -> Tensor:
    """Return the lowest and the highest value, ``[2]``, of a histogram: ``percentile`` percent of the values are at
    most the highest, and as many at least the lowest. Zero is always between the two."""
    total = int(counts.sum())
    rank = round(total * percentile / 100)
    ranks = torch.tensor([total - rank + 1, rank], device=counts.device)
    positions = torch.searchsorted(counts.cumsum(0), ranks)
    ordered = positions.int() - (1 << 15)
    low, high = (ordered ^ ((ordered >> 15) & 0x7FFF)).short().view(torch.bfloat16).float()
    return torch.stack([low.clamp(max=0), high.clamp(min=0)])


def grid_between(low_high: Tensor, scheme: Scheme, dtype: torch.dtype) -> Grid:
    """Return the grid from the lowest to the highest value, given as ``low_high`` ``[2]``; its parts are ``[1]``."""
    scale, zero = minmax_grid(low_high[None], scheme, dtype)
    return Grid(scale[0].cpu(), zero[0].cpu())
