"""Integers in place of floats: the grid of values that they stand for. Plain functions on tensors."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from compress.errors import UserError


@dataclass(frozen=True)
class Scheme:
    """How the weights of a layer are stored: as integers of ``bits`` bits, with a scale for every ``group_size``
    consecutive inputs of a row (-1: for the whole row), and where they are not ``symmetric`` around zero with a zero
    point."""

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
        """How many of a row's ``inputs`` share a scale."""
        return inputs if self.group_size == -1 else self.group_size

    def average_bits(self, inputs: int, dtype: torch.dtype) -> float:
        """Stored bits per weight of a layer of so many ``inputs``, scales in ``dtype`` and zero points counted."""
        beside = dtype.itemsize * 8 + (0 if self.symmetric else self.bits)
        return self.bits + beside / self.group(inputs)

    def check(self, key: str, name: str, linear: nn.Linear) -> None:
        """Raise UserError where the groups do not divide the layer; ``key`` is where the stage is configured."""
        if self.group_size == 0 or linear.in_features % self.group(linear.in_features):
            raise UserError(
                f"{key}.group_size={self.group_size} does not divide the {linear.in_features} inputs of `{name}`: set "
                f"a divisor of every layer's inputs, or {key}.group_size=-1 for one scale a row."
            )


class Grid(NamedTuple):
    """The values that a quantized weight can take: ``(integer - zero) * scale``; both ``[rows, groups]``."""

    scale: Tensor
    zero: Tensor


def minmax_grid(weight: Tensor, scheme: Scheme, dtype: torch.dtype, shrink: float | Tensor = 1.0) -> Grid:
    """The grid of every group of ``weight`` ``[rows, inputs]``, that reaches from its smallest to its largest value,
    zero among them, or to a share ``shrink`` of both, one for all or ``[rows, groups]``; the scale as it is stored, in
    ``dtype``."""
    groups = weight.float().unflatten(1, (-1, scheme.group(weight.shape[1])))
    levels = 2**scheme.bits - 1
    if scheme.symmetric:
        scale = 2 * groups.abs().amax(2) / levels
    else:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scale = (high - low) / levels
    scale = (shrink * scale).to(dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a group of zeros: any scale holds it
    if scheme.symmetric:
        return Grid(scale, torch.zeros_like(scale, dtype=torch.int8))
    zero = (scheme.lowest - shrink * low / scale.float()).round().clamp(scheme.lowest, scheme.highest)
    return Grid(scale, zero.to(torch.int8))


def to_grid(weight: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """The nearest values of the grid to ``weight`` ``[rows, inputs]``, as a checkpoint's reader computes them: in the
    dtype of the scale. A value that is exactly zero stays so."""
    scale, zero = grid.scale[:, :, None], grid.zero[:, :, None]
    groups = weight.float().unflatten(1, (scale.shape[1], -1))
    integers = (groups / scale.float() + zero).round().clamp(scheme.lowest, scheme.highest)
    return ((integers - zero).to(scale.dtype) * scale).float().flatten(1)


def fitted_grid(weight: Tensor, scheme: Scheme, dtype: torch.dtype, importance: Tensor, steps: int = 20) -> Grid:
    """The grid of every group of ``weight`` ``[rows, inputs]`` on which rounding loses least, of those that reach to
    between half and all of its range; ``importance`` ``[inputs]`` weighs the squared errors."""
    # A few rows at a time stay in the processor's cache: twenty times faster on a large layer.
    parts = [fit_rows(rows, scheme, dtype, importance, steps) for rows in weight.split(128)]
    return Grid(*(torch.cat(part) for part in zip(*parts)))


def fit_rows(weight: Tensor, scheme: Scheme, dtype: torch.dtype, importance: Tensor, steps: int) -> Grid:
    best = minmax_grid(weight, scheme, dtype)
    groups = best.scale.shape[1]

    def lost(grid: Grid) -> Tensor:
        errors = (weight.float() - to_grid(weight, grid, scheme)).square() * importance
        return errors.unflatten(1, (groups, -1)).sum(2)

    least = lost(best)
    for step in range(1, steps):
        grid = minmax_grid(weight, scheme, dtype, shrink=1 - 0.5 * step / steps)
        loss = lost(grid)
        better = loss < least
        least = torch.where(better, loss, least)
        best = Grid(*(torch.where(better, new, old) for new, old in zip(grid, best)))
    return best
