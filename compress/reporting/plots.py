"""Draw the figures of a report: Pareto fronts, latencies, and changes by slice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.maths.statistics import pareto_indices
from compress.reporting.rows import group_rows
from compress.reporting.tables import label_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from compress.measuring.predictions import Regression
    from compress.reporting.rows import Row


LINE = 0.24  # inches that a row of a plot takes
GREY = "0.55"


@dataclass(frozen=True)
class Picture:
    """A plot as it stands in the page."""

    title: str
    uri: str


def draw_figures(rows: list[Row]) -> list[tuple[str, Figure]]:
    """Everything that is drawn by its title, of several models, tasks or metrics each for itself."""
    numbers = {id(one): number for number, one in enumerate(rows, 1)}
    found = []
    every = group_rows(rows)
    for (model, task, _), group in every.items():
        names = [f"{numbers[id(one)]} {label}" for one, label in zip(group, label_rows(group))]
        where = f"{model} on {task}: " if len(every) > 1 else ""
        if len(group) > 1:
            fronts = draw_pareto_fronts(group, names)
            found += [(f"{where}{common_metric(group)} against {what}", figure) for what, figure in fronts]
        found.append((f"{where}latency, and {common_metric(group)} in the bars", draw_latency_bars(group, names)))
        changes = find_regressions(group)
        if changes:
            chosen = [name for name, one in zip(names, group) if id(one) in changes]
            title = f"{where}change of each part of the test split, in points"
            found.append((title, draw_heat_map(chosen, list(changes.values()))))
    return found


def common_metric(rows: list[Row]) -> str:
    return str(rows[0]["metric"])


def draw_pareto_fronts(rows: list[Row], names: list[str]) -> list[tuple[str, Figure]]:
    """Quality against what it costs, with intervals: latency as a multiple of the baseline's, which was timed in turns,
    size, and memory."""
    axes = {
        "latency": ("latency / that of the baseline", [relative_latency(one) for one in rows]),
        "size": ("size, MB", [(one["size_mb"],) * 3 for one in rows]),
        "memory": ("memory to load and run, MB", [(one.get("model_memory_mb"),) * 3 for one in rows]),
    }
    return [
        (what, draw_front(rows, names, label, places))
        for what, (label, places) in axes.items()
        if all(place[0] is not None for place in places)
    ]


def relative_latency(one: Row) -> tuple[float, float, float]:
    """The latency as a multiple of the baseline's, and its interval."""
    if one["speedup"] is None:
        return 1.0, 1.0, 1.0
    return 1 / one["speedup"], 1 / one["speedup_high"], 1 / one["speedup_low"]


def draw_front(rows: list[Row], names: list[str], label: str, places: list[tuple[float, float, float]]) -> Figure:
    """The points, their names beside the plot, and the line of those that no other beats in both."""
    from compress.tasks.kinds import higher_is_better

    figure, axis = create_axes(len(rows))
    better = 1 if higher_is_better(common_metric(rows)) else -1
    best = pareto_indices([place[0] for place in places], [better * one["value"] for one in rows])
    axis.step([places[i][0] for i in best], [rows[i]["value"] for i in best], where="post", color="C0", linewidth=1)
    for i, (one, (x, low, high)) in enumerate(zip(rows, places)):
        color = "black" if one["method"] == "none" else "C0" if i in best else GREY
        axis.errorbar(x, one["value"], xerr=[[x - low], [high - x]], yerr=quality_error_bar(one), fmt="o", markersize=4,
                      color=color, ecolor=color, elinewidth=0.6, capsize=1.5)  # fmt: skip
    annotate_points(axis, [(place[0], one["value"]) for place, one in zip(places, rows)], names)
    axis.set_xlabel(label)
    axis.set_ylabel(common_metric(rows))
    return figure


def quality_error_bar(one: Row) -> list[list[float]] | None:
    """How far the interval of the change reaches from the value, down and up."""
    if one.get("change_low") is None:
        return None
    return [[max(0.0, one["change"] - one["change_low"])], [max(0.0, one["change_high"] - one["change"])]]


def annotate_points(axis: Axes, points: list[tuple[float, float]], names: list[str]) -> None:
    """The names in a column to the right of the plot, none over another, each with a thin line to its point."""
    low, high = axis.get_ylim()
    wanted = [(y - low) / (high - low) for _, y in points]
    for (x, y), place, name in zip(points, spread_positions(wanted, 1 / max(len(names) - 1, 16)), names):
        axis.annotate(
            name,
            (x, y),
            (1.06, place),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.8", "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 1},
            annotation_clip=False,
        )


def spread_positions(places: list[float], gap: float) -> list[float]:
    """The places moved as little as it takes to lie a ``gap`` apart within 0 and 1."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved, floor = list(places), 0.0
    for i in order:
        moved[i] = floor = max(moved[i], floor)
        floor += gap
    ceiling = 1.0
    for i in reversed(order):
        moved[i] = ceiling = min(moved[i], ceiling)
        ceiling -= gap
    return moved


def draw_latency_bars(rows: list[Row], names: list[str]) -> Figure:
    """The latency of every row with its interval, and in the bar its quality."""
    figure, axis = create_axes(len(rows))
    times = [one["latency_ms"] for one in rows]
    errors = [
        [max(0.0, one["latency_ms"] - one["latency_low_ms"]) for one in rows],
        [max(0.0, one["latency_high_ms"] - one["latency_ms"]) for one in rows],
    ]
    colors = ["0.75" if one["method"] == "none" else "#a8c8e8" for one in rows]
    axis.barh(range(len(rows)), times, xerr=errors, color=colors, error_kw={"elinewidth": 0.8, "capsize": 2})
    plain = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5}  # over the line of an interval
    for number, one in enumerate(rows):
        axis.text(0.01 * max(times), number, f"{one['value']:.4f}", va="center", fontsize=8, bbox=plain)
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"latency, ms (median); in the bar: {common_metric(rows)}")
    return figure


def create_axes(rows: int) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, max(3.2, 0.8 + LINE * rows)))
    axis = figure.add_subplot()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def find_regressions(rows: list[Row]) -> dict[int, list[Regression]]:
    """The changes of every row whose predictions lie beside its baseline's, by the row's id."""
    from compress.measuring.predictions import Predictions, measure_regressions

    found = {}
    for one in rows:
        folder = Path(one.get("folder") or ".")
        baseline = folder / "predictions" / "0.npz"
        if one.get("predictions") and baseline.is_file() and one["method"] != "none":
            path = folder / one["predictions"]
            if path != baseline and path.is_file():
                found[id(one)] = measure_regressions(Predictions.load(baseline), Predictions.load(path), one["metric"])
    return {number: changes for number, changes in found.items() if changes}


def draw_heat_map(names: list[str], changes: list[list[Regression]]) -> Figure:
    """A line for every row, a column for every slice; a star where McNemar's test finds the change significant among
    all of the map (Holm)."""
    import numpy as np
    from matplotlib.figure import Figure

    from compress.maths.statistics import holm

    columns = list(dict.fromkeys(one.name for line in changes for one in line))
    sizes = {one.name: one.examples for line in changes for one in line}
    tested = [one for line in changes for one in line if one.p_value is not None]
    stars = {id(one) for one, p in zip(tested, holm([one.p_value or 0.0 for one in tested])) if p < 0.05}
    values = np.array(
        [[100 * next((o.change for o in line if o.name == c), np.nan) for c in columns] for line in changes]
    )
    figure = Figure(figsize=(1 + 0.62 * len(columns), 1 + LINE * len(names)))
    axis = figure.add_subplot()
    reach = max(1.0, float(np.nanmax(np.abs(values))))
    image = axis.imshow(values, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto")
    for row, line in enumerate(changes):
        for one in line:
            shown = f"{100 * one.change:+.1f}" + "*" * (id(one) in stars)
            dark = abs(100 * one.change) > 0.6 * reach
            axis.text(columns.index(one.name), row, shown, ha="center", va="center", fontsize=7,
                      color="white" if dark else "black")  # fmt: skip
    axis.set_xticks(range(len(columns)), [f"{name} ({sizes[name]})" for name in columns], fontsize=8, rotation=35,
                    ha="right", rotation_mode="anchor")  # fmt: skip
    axis.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
    return figure
