"""Round a weight column by column, and spread each error over the columns still to come (GPTQ)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.maths.hessian import Factor, Sweep, factorize
from compress.maths.rounding import Grid, Integers, Scheme, fit_grid


@torch.no_grad()
def gptq(
    weights: Sequence[Tensor],
    hessian: Tensor,
    schemes: Sequence[Scheme],
    damping: float = 0.01,
    act_order: bool = False,
    scale: torch.dtype | None = None,
) -> list[Integers]:
    """Quantize each of ``weights`` ``[rows, inputs]``, layers with one input, by its scheme, so that their outputs on
    inputs of second moment ``hessian`` ``[inputs, inputs]`` change least; exact zeros stay.

    Return the integers of every layer. Scales have the dtype ``scale``, by default that of the weights. A group's scale
    is fitted when its first column is rounded; with ``act_order``, which visits groups early, it is fitted to the
    original weights. In the fit, an error weighs as much as it costs after later columns have compensated it. The
    Hessian is factorized once, and layers of one scheme are rounded together.

    Raises:
        UserError: no damping makes the Hessian positive definite.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else None
    factor = factorize(hessian if order is None else hessian[order][:, order], damping)
    by_layer: dict[int, Integers] = {}
    for scheme in dict.fromkeys(schemes):
        members = [i for i, other in enumerate(schemes) if other == scheme]
        joined = torch.cat([weights[i] for i in members])
        together = round_columns(joined, factor, scheme, order, scale or joined.dtype)
        rows = [len(weights[i]) for i in members]
        parts = zip(*(part.split(rows) for part in (together.integers, *together.grid)))
        by_layer |= {i: Integers(scheme, integers, Grid(*grid)) for i, (integers, *grid) in zip(members, parts)}
    return [by_layer[i] for i in range(len(weights))]


def round_columns(weight: Tensor, factor: Factor, scheme: Scheme, order: Tensor | None, dtype: torch.dtype) -> Integers:
    """Return the integers of ``weight`` ``[rows, inputs]``, whose columns are rounded in ``order``, that of ``factor``.

    Without an order, groups are fitted on the way to the weights that compensate the errors so far.
    """
    rows, columns = weight.shape
    size = scheme.group(columns)
    original = weight.float().T.contiguous()  # [inputs, rows]: a column is contiguous
    group_of = [j // size for j in range(columns)]
    # 1) Fit all grids where columns are visited out of order, and prepare empty ones otherwise
    if order is None:
        empty = torch.empty(rows, columns // size, dtype=dtype, device=weight.device)
        grid = Grid(empty, empty.to(torch.int8))
    else:
        grid = fit_grid(original.T, scheme, dtype, factor.diagonal[order.argsort()])
        original = original[order]
        group_of = (order // size).tolist()  # on the host once, not at every column
    scales, zeros = (part.float().T.contiguous() for part in grid)
    kept = original != 0
    integers = torch.empty_like(original, dtype=torch.int8)
    pruned = not kept.all()

    # 2) Round column by column
    def prepare(start: int, stop: int, continuation: Tensor) -> None:
        if order is None:
            group = start // size
            fitted = fit_grid((continuation * kept[start:stop]).T, scheme, dtype, factor.diagonal[start:stop])
            for part, new in zip((*grid, scales.T, zeros.T), (*fitted, *fitted)):
                part[:, group] = new[:, 0]

    def choose(j: int, column: Tensor) -> Tensor:
        scale, zero = scales[group_of[j]], zeros[group_of[j]]
        chosen = column / scale
        if not scheme.symmetric:
            chosen.add_(zero)
        chosen.round_().clamp_(scheme.lowest, scheme.highest)
        if pruned:
            chosen = torch.where(kept[j], chosen, zero)
        integers[j] = chosen
        if not scheme.symmetric:
            chosen.sub_(zero)
        return chosen.mul_(scale) if dtype is torch.float32 else (chosen.to(dtype) * scale.to(dtype)).float()

    Sweep(original, factor, columns if order is not None else size, prepare, choose).run()
    # 3) Restore the order
    if order is not None:
        integers = integers[order.argsort()]
    return Integers(scheme, integers.T.contiguous(), grid)
