"""Choose the sizes of a model's parts that cost the least loss within a budget."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np


def choose_levels(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> list[int]:
    """Return a level for every part, ``losses[part][level]`` and ``costs[part][level]``, with the least sum of losses
    among all whose costs sum to ``budget`` or less.

    This is a knapsack problem with a choice in every part, solved as an integer program by HiGHS (Huangfu and Hall,
    2018), as Bercovich et al. choose blocks ("Puzzle", 2024, arXiv:2411.19146).

    Raises:
        ValueError: even the cheapest levels cost more than ``budget``.

    Example:
        >>> choose_levels([[9.0, 1.0, 0.0], [5.0, 4.0, 0.0]], [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], budget=2.0)
        [1, 1]
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix, vstack

    if sum(map(min, costs)) > budget:
        raise ValueError(f"the cheapest levels cost {sum(map(min, costs)):g}, more than {budget:g}")
    sizes = [len(levels) for levels in losses]
    part = np.repeat(np.arange(len(sizes)), sizes)
    loss, cost = (np.concatenate([np.asarray(row, float) for row in rows]) for rows in (losses, costs))
    # The solver's tolerances are absolute, so both sides are scaled to about 1.
    least = np.finfo(float).tiny
    loss, scale = loss / max(abs(loss).max(), least), max(abs(cost).max(), least)
    one_each = csr_matrix((np.ones_like(loss), (part, np.arange(len(loss)))))
    rows = vstack([one_each, csr_matrix(cost / scale)])
    ones = np.ones(len(sizes))
    found = milp(
        loss,
        integrality=np.ones_like(loss),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(rows, [*ones, -np.inf], [*ones, budget / scale]),
        options={"mip_rel_gap": 1e-4, "node_limit": 20_000},  # not seconds: the choice depends on no machine
    )
    if found.x is None:
        raise ValueError(f"no levels were found within {budget:g}: {found.message}")
    return [int(chosen.argmax()) for chosen in np.split(found.x, np.cumsum(sizes)[:-1])]


def interpolate(table: Mapping[int, float], size: int) -> float:
    """Return the value at ``size`` between the sizes of a ``table`` that are next to it, on a straight line; at either
    end, the value there.

    Example:
        >>> interpolate({1: 0.5, 3: 1.0}, 2)
        0.75
    """
    sizes = sorted(table)
    above = min(bisect_left(sizes, size), len(sizes) - 1)
    high, low = sizes[above], sizes[max(above - 1, 0)]
    if size >= high or high == low:
        return table[high]
    if size <= low:
        return table[low]
    return table[low] + (table[high] - table[low]) * (size - low) / (high - low)


def spread_levels(most: int, count: int, multiple_of: int = 1) -> list[int]:
    """Return up to ``count`` sizes from ``multiple_of`` to ``most``, evenly spread; all but ``most`` are multiples of
    ``multiple_of``.

    Example:
        >>> spread_levels(12, 4)
        [1, 5, 8, 12]
    """
    bundles = most // multiple_of
    chosen = {multiple_of * round(at) for at in np.linspace(1, max(bundles, 1), max(min(count, bundles), 1))}
    return sorted({*chosen, most})
