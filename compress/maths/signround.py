"""Learn how each weight is rounded, up or down, and how far each group's range is clipped (SignRound)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compress.maths.rounding import Grid, Integers, Scheme, fit_grid, grid_of_range, minmax_grid

LEAST_SHARE = 0.05
"""Least share of a group's range that stays after clipping."""


class Learnt(NamedTuple):
    """What decides a rounding: ``offsets`` ``[rows, groups, size]`` from -0.5 to 0.5, which are added in steps of the
    grid before rounding, and the ``shares`` ``[2, rows, groups]`` of the lowest and the highest value of each group."""

    offsets: Tensor
    shares: Tensor

    def copy(self) -> Learnt:
        return Learnt(self.offsets.clone(), self.shares.clone())


class Rounding:
    """The learnt rounding of a ``weight`` ``[rows, inputs]``; a weight that is exactly zero stays exactly zero.

    Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", 2023,
    arXiv:2309.05516. ``shares`` ``[rows, groups]`` of the groups' ranges are those to begin with; 1 without them.
    Scales have the dtype ``dtype``, as stored.
    """

    def __init__(self, weight: Tensor, scheme: Scheme, dtype: torch.dtype, shares: Tensor | None = None) -> None:
        self.scheme, self.dtype = scheme, dtype
        self.groups = weight.float().unflatten(1, (-1, scheme.group(weight.shape[1])))
        self.low, self.high = self.groups.amin(2), self.groups.amax(2)
        if not scheme.symmetric:
            self.low, self.high = self.low.clamp(max=0), self.high.clamp(min=0)
        self.zeros = self.groups == 0 if (self.groups == 0).any() else None
        begin = torch.ones_like(self.low) if shares is None else shares.float()
        self.learnt = Learnt(torch.zeros_like(self.groups), torch.stack([begin, begin]))

    def fit(self) -> Grid:
        """Return the grid of the clipped ranges; its parts are ``[rows, groups]``."""
        low, high = self.learnt.shares
        return grid_of_range(low * self.low, high * self.high, self.scheme, self.dtype)

    def place(self, grid: Grid) -> Tensor:
        """Return the places of the weights on the grid before rounding, ``[rows, groups, size]``."""
        places = (self.groups / grid.scale.float()[:, :, None]).add_(self.learnt.offsets)
        return places if self.scheme.symmetric else places.add_(grid.zero[:, :, None])

    def round(self) -> Integers:
        """Return the integers that the learnt rounding gives."""
        grid = self.fit()
        integers = self.place(grid).round_().clamp_(self.scheme.lowest, self.scheme.highest)
        return Integers(self.scheme, integers.char().flatten(1), grid)

    def step(self, gradient: Tensor, size: float, clip: bool = True) -> None:
        """Move what is learnt by ``size`` against the sign of its gradient; ``gradient`` ``[rows, inputs]`` is that of
        the rounded weights. With ``clip`` the ranges move too.

        The rounding itself passes gradients straight through, and a value outside the range has that of the range's
        end.
        """
        grid, scheme = self.fit(), self.scheme
        slope = gradient.float().view_as(self.groups)
        places = self.place(grid)
        inside = (places >= scheme.lowest) & (places <= scheme.highest)
        shares = self._find_slopes(grid, slope, places, inside) if clip else None
        moves = slope.sign().mul_(inside)
        if self.zeros is not None:
            moves.masked_fill_(self.zeros, 0)
        self.learnt.offsets.sub_(moves, alpha=size).clamp_(-0.5, 0.5)
        if shares is not None:
            self.learnt.shares.sub_(shares.sign(), alpha=size).clamp_(LEAST_SHARE, 1)

    def _find_slopes(self, grid: Grid, slope: Tensor, places: Tensor, inside: Tensor) -> Tensor:
        """Return the gradient of the shares ``[2, rows, groups]``.

        A weight inside is ``(q - z) s`` with ``q = w / s + v + z`` rounded, so its slope by ``s`` is ``q - z - w / s``;
        outside, ``q`` is an end of the grid.
        """
        scheme, levels = self.scheme, 2**self.scheme.bits - 1
        scale = grid.scale.float()[:, :, None]
        integers = places.round().clamp_(scheme.lowest, scheme.highest)
        low, high = self.learnt.shares * torch.stack([self.low, self.high])
        if scheme.symmetric:
            by_scale = (slope * (integers - inside * self.groups / scale)).sum(2) * 2 / levels
            by_low = torch.where(-low >= high, -by_scale, 0)
            by_high = torch.where(high > -low, by_scale, 0)
        else:
            steps = integers - grid.zero[:, :, None]
            by_scale = (slope * (steps - torch.where(inside, self.groups, low[:, :, None]) / scale)).sum(2) / levels
            by_low, by_high = (slope * ~inside).sum(2) - by_scale, by_scale
        return torch.stack([by_low * self.low, by_high * self.high])


def search_shares(weight: Tensor, scheme: Scheme, dtype: torch.dtype, importance: Tensor) -> Tensor:
    """Return the share of every group's range, ``[rows, groups]``, whose grid rounds ``weight`` ``[rows, inputs]`` with
    the least squared error, weighted by the ``importance`` ``[inputs]``."""
    fitted, whole = fit_grid(weight, scheme, torch.float32, importance), minmax_grid(weight, scheme, torch.float32)
    return fitted.scale / whole.scale
