"""Give every layer a sparsity from its measured sensitivity."""

from __future__ import annotations

import csv
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from compress.errors import UserError

Curve = tuple[list[float], list[float]]
COLUMNS = ("layer", "weights", "sparsity", "metric", "value", "drop")


@dataclass(frozen=True)
class Point:
    """A measurement with one layer pruned and all others whole: the metric's ``value``, and its ``drop`` from the
    unpruned model, positive where worse. ``weights`` is the size of the layer."""

    layer: str
    weights: int
    sparsity: float
    value: float
    drop: float


def allocate_sparsity(points: list[Point], sparsity: float) -> dict[str, float]:
    """Return a sparsity for every layer, with a mean over all weights of exactly ``sparsity``, at which each layer
    alone costs the same drop. A layer at its largest measured sparsity may cost less.

    A layer's drop is 0 at sparsity 0, linear between the measured sparsities, and never decreases. A tolerance prunes
    every layer as far as its drop stays within it; the tolerance is chosen to meet the mean. Where the mean jumps at a
    tolerance, because some drops stay level, those layers go the same share of their way.

    Raises:
        UserError: ``sparsity`` exceeds the largest measured one.

    Example:
        >>> points = [Point("a", 10, 0.8, 0.9, 0.1), Point("b", 10, 0.8, 0.7, 0.3)]
        >>> {layer: round(share, 2) for layer, share in allocate_sparsity(points, 0.5).items()}
        {'a': 0.75, 'b': 0.25}
    """
    weights = {point.layer: point.weights for point in points}
    curves = {layer: build_curve([point for point in points if point.layer == layer]) for layer in weights}

    def mean(allocation: dict[str, float]) -> float:
        return sum(weights[layer] * share for layer, share in allocation.items()) / sum(weights.values())

    # The sparsities just below and at every tolerance; between two such rungs every layer's share is linear.
    tolerances = sorted({drop for _, drops in curves.values() for drop in drops})
    rungs = [(tolerance, side) for tolerance in tolerances for side in (bisect_left, bisect_right)]

    def rung(at: tuple[float, Callable[..., int]]) -> dict[str, float]:
        return {layer: highest_sparsity(measured, *at) for layer, measured in curves.items()}

    most = mean(rung(rungs[-1]))
    if sparsity > most + 1e-9:
        raise UserError(
            f"A sparsity of {sparsity:g} is requested and the layers' sensitivity was measured up to {most:.4g}. Set a "
            "lower sparsity, or measure further with technique.sensitivity.sparsities."
        )
    above = min(bisect_left(rungs, sparsity, lo=1, key=lambda at: mean(rung(at))), len(rungs) - 1)
    low, high = rung(rungs[above - 1]), rung(rungs[above])
    gap = mean(high) - mean(low)  # 0 where rounding puts the largest measured sparsity just below the requested one
    way = (sparsity - mean(low)) / gap if gap else 1.0
    return {layer: low[layer] + way * (high[layer] - low[layer]) for layer in weights}


def build_curve(points: list[Point]) -> Curve:
    """Return the sparsities from 0 on and their drops, which never decrease; it ends before an infinite drop."""
    ordered = sorted(points, key=lambda point: point.sparsity)
    drops = [drop for drop in accumulate((point.drop for point in ordered), max, initial=0.0) if math.isfinite(drop)]
    return [0.0, *(point.sparsity for point in ordered)][: len(drops)], drops


def highest_sparsity(curve: Curve, tolerance: float, side: Callable[..., int]) -> float:
    """Return the sparsity up to which the drop is below ``tolerance`` (``side=bisect_left``) or not above it
    (``bisect_right``)."""
    sparsities, drops = curve
    i = side(drops, tolerance)
    if i in (0, len(drops)):
        return sparsities[max(i - 1, 0)]
    share = (tolerance - drops[i - 1]) / (drops[i] - drops[i - 1])
    return sparsities[i - 1] + share * (sparsities[i] - sparsities[i - 1])


def write_points(path: Path | str, points: list[Point], metric: str) -> None:
    """Write ``points`` as csv."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**vars(point), "metric": metric} for point in points)


def read_points(path: Path | str) -> list[Point]:
    """Return the points of a csv that :func:`write_points` wrote, exactly.

    Raises:
        UserError: the file has other columns.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not set(COLUMNS) <= rows[0].keys():
        raise UserError(f"{path} is no table of `sensitivity`; the columns {', '.join(COLUMNS)} are expected.")
    return [
        Point(row["layer"], int(row["weights"]), *(float(row[key]) for key in ("sparsity", "value", "drop")))
        for row in rows
    ]
