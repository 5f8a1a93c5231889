"""Round a weight column by column, and spread each error over the columns still to come (GPTQ)."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.maths.hessian import inverse_factor
from compress.maths.rounding import Grid, Integers, Scheme, fit_grid, minmax_grid, round_to_grid, round_to_nearest


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    damping: float = 0.01,
    act_order: bool = False,
    lazy: int = 128,
    scale: torch.dtype | None = None,
) -> Integers:
    """Quantize ``weight`` ``[rows, inputs]`` so that its outputs on inputs of second moment ``hessian``
    ``[inputs, inputs]`` change least; exact zeros stay.

    A group's scale is fitted when its first column is rounded; with ``act_order``, which visits groups early, it is
    fitted to the original weights. ``lazy`` columns are compensated before the rest: that changes the cost, not the
    result.
    """
    dtype, columns = scale or weight.dtype, weight.shape[1]
    size = scheme.group(columns)
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    factor = inverse_factor(hessian[order][:, order], damping)
    importance = hessian.diagonal()
    grid = fit_grid(weight, scheme, dtype, importance) if act_order else minmax_grid(weight, scheme, dtype)
    left = weight.float().T[order].contiguous()  # [inputs, rows]: a column of the weight is contiguous
    keep = left != 0
    quantized = torch.zeros_like(left)
    for start in range(0, columns, lazy):
        stop = min(start + lazy, columns)
        errors = torch.zeros(stop - start, left.shape[1], device=weight.device)
        for j in range(start, stop):
            group = int(order[j]) // size
            if not act_order and j % size == 0:
                # Columns beyond this lazy block still lack its errors; there are none where size divides lazy.
                members = left[j : j + size].clone()
                ahead = slice(max(stop, j), min(j + size, columns))
                members[ahead.start - j :] -= factor[start:j, ahead].T @ errors[: j - start]
                fitted = fit_grid((members * keep[j : j + size]).T, scheme, dtype, importance[j : j + size])
                grid.scale[:, group], grid.zero[:, group] = fitted.scale[:, 0], fitted.zero[:, 0]
            of_group = Grid(grid.scale[:, group, None], grid.zero[:, group, None])
            quantized[j] = round_to_grid(left[j, :, None], of_group, scheme)[:, 0] * keep[j]
            errors[j - start] = (left[j] - quantized[j]) / factor[j, j]
            left[j:stop].addr_(factor[j, j:stop], errors[j - start], alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    weight = quantized[order.argsort()].T.contiguous()
    return round_to_nearest(weight, grid, scheme)
