"""Give every layer a sparsity from its measured sensitivity."""

from __future__ import annotations

import csv
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import UserError

if TYPE_CHECKING:
    pass


Curve = tuple[list[float], list[float]]
COLUMNS = ("layer", "weights", "sparsity", "metric", "value", "drop")


@dataclass(frozen=True)
class Point:
    """The metric's ``value`` with one layer of so many ``weights`` at one sparsity and all others whole; ``drop`` is
    the difference from the unpruned model, positive where worse."""

    layer: str
    weights: int
    sparsity: float
    value: float
    drop: float


def allocate_sparsity(points: list[Point], sparsity: float) -> dict[str, float]:
    """A sparsity for every layer, their mean over all weights exactly ``sparsity``, so that each layer alone costs the
    same drop, or less where it is pruned as far as was measured.

    A layer's drop is taken to be 0 at sparsity 0, to run straight between the sparsities measured and never to fall
    again. Under a tolerance every layer is pruned as far as its drop stays within; the tolerance is the one at which
    the mean is met. Where it jumps there, because some drops stay level, those layers go the same share of their way.

    Raises:
        UserError: more than the largest sparsity measured is asked for.

        allocate(read("report/1_sensitivity/sensitivity.csv"), 0.6)["bert.encoder.layer.0.output.dense"]
    """
    weights = {point.layer: point.weights for point in points}
    curves = {layer: build_curve([point for point in points if point.layer == layer]) for layer in weights}

    def mean(allocation: dict[str, float]) -> float:
        return sum(weights[layer] * share for layer, share in allocation.items()) / sum(weights.values())

    # All that one tolerance allows, short of it and with it: between two such rungs every layer's share runs straight.
    tolerances = sorted({drop for _, drops in curves.values() for drop in drops})
    rungs = [(tolerance, side) for tolerance in tolerances for side in (bisect_left, bisect_right)]

    def rung(at: tuple[float, Callable[..., int]]) -> dict[str, float]:
        return {layer: highest_sparsity(measured, *at) for layer, measured in curves.items()}

    most = mean(rung(rungs[-1]))
    if sparsity > most + 1e-9:
        raise UserError(
            f"A sparsity of {sparsity:g} is asked for and the layers' sensitivity was measured up to {most:.4g}: ask "
            "for less, or measure further (technique.sensitivity.sparsities)."
        )
    above = min(bisect_left(rungs, sparsity, lo=1, key=lambda at: mean(rung(at))), len(rungs) - 1)
    low, high = rung(rungs[above - 1]), rung(rungs[above])
    gap = mean(high) - mean(low)  # none where rounding puts the largest sparsity measured just below the one asked for
    way = (sparsity - mean(low)) / gap if gap else 1.0
    return {layer: low[layer] + way * (high[layer] - low[layer]) for layer in weights}


def build_curve(points: list[Point]) -> Curve:
    """Sparsities from 0 on and the drops there, which never fall; it ends where the drop is endless."""
    ordered = sorted(points, key=lambda point: point.sparsity)
    drops = [drop for drop in accumulate((point.drop for point in ordered), max, initial=0.0) if math.isfinite(drop)]
    return [0.0, *(point.sparsity for point in ordered)][: len(drops)], drops


def highest_sparsity(curve: Curve, tolerance: float, side: Callable[..., int]) -> float:
    """The sparsity up to which the drop stays below ``tolerance`` (``side=bisect_left``) or at most at it
    (``bisect_right``)."""
    sparsities, drops = curve
    i = side(drops, tolerance)
    if i in (0, len(drops)):
        return sparsities[max(i - 1, 0)]
    share = (tolerance - drops[i - 1]) / (drops[i] - drops[i - 1])
    return sparsities[i - 1] + share * (sparsities[i] - sparsities[i - 1])


def write_points(path: Path | str, points: list[Point], metric: str) -> None:
    """Write ``points`` as csv."""
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**vars(point), "metric": metric} for point in points)


def read_points(path: Path | str) -> list[Point]:
    """The points of a csv that ``write`` wrote, exactly.

    Raises:
        UserError: it has other columns.
    """
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not set(COLUMNS) <= rows[0].keys():
        raise UserError(f"{path} is no table of `sensitivity`, which has the columns {', '.join(COLUMNS)}.")
    return [
        Point(row["layer"], int(row["weights"]), *(float(row[key]) for key in ("sparsity", "value", "drop")))
        for row in rows
    ]
