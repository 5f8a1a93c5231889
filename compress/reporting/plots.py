"""Draw the figures of a report: Pareto fronts, latencies, and changes by slice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.maths.statistics import pareto_indices
from compress.reporting.escaping import shorten_label
from compress.reporting.rows import group_rows, is_undefined
from compress.reporting.tables import format_value, label_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from compress.measuring.predictions import Regression
    from compress.reporting.rows import Row


LINE = 0.24  # inches for each row of a plot
GREY = "0.55"
MOST_ROWS = 48
"""Rows that a plot has room for. Of more, it shows the baseline and the rows on a front."""


@dataclass(frozen=True)
class Picture:
    """A plot of the page: its title and its image as a data URI."""

    title: str
    uri: str


def draw_figures(rows: list[Row]) -> list[tuple[str, Figure]]:
    """Return all figures with their titles, separate for each model, task and metric."""
    numbers = {id(row): number for number, row in enumerate(rows, 1)}
    figures = []
    groups = group_rows(rows)
    for (model, task, _), whole in groups.items():
        group = whole if len(whole) <= MOST_ROWS else choose_best_rows(whole)
        names = [shorten_label(f"{numbers[id(row)]} {label}") for row, label in zip(group, label_rows(group))]
        where = f"{model} on {task}: " if len(groups) > 1 else ""
        where += f"the best {len(group)} of {len(whole)} rows, " if len(group) < len(whole) else ""
        defined = [i for i, row in enumerate(group) if not is_undefined(row)]
        if len(defined) > 1:
            fronts = draw_pareto_fronts([group[i] for i in defined], [names[i] for i in defined])
            figures += [(f"{where}{common_metric(group)} against {what}", figure) for what, figure in fronts]
        figures.append((f"{where}latency, with {common_metric(group)} in the bars", draw_latency_bars(group, names)))
        changes = find_regressions(group)
        if changes:
            chosen = [name for name, row in zip(names, group) if id(row) in changes]
            title = f"{where}change by slice of the test split, in points"
            figures.append((title, draw_heat_map(chosen, list(changes.values()))))
    return figures


def choose_best_rows(rows: list[Row]) -> list[Row]:
    """Return the baselines and the rows that no other beats in quality and one of latency, size and memory."""
    from compress.tasks.kinds import higher_is_better

    defined = [row for row in rows if not is_undefined(row)]
    better = 1 if higher_is_better(common_metric(rows)) else -1
    chosen = {id(row) for row in rows if row["method"] == "none"}
    for _, places in list_costs(defined).values():
        if all(place[0] is not None for place in places):
            best = pareto_indices([place[0] for place in places], [better * row["value"] for row in defined])
            chosen |= {id(defined[i]) for i in best}
    return [row for row in rows if id(row) in chosen][:MOST_ROWS]


def common_metric(rows: list[Row]) -> str:
    return str(rows[0]["metric"])


def draw_pareto_fronts(rows: list[Row], names: list[str]) -> list[tuple[str, Figure]]:
    """Draw quality against latency, size and memory, with intervals."""
    return [
        (what, draw_front(rows, names, label, places))
        for what, (label, places) in list_costs(rows).items()
        if all(place[0] is not None for place in places)
    ]


def list_costs(rows: list[Row]) -> dict[str, tuple[str, list[tuple[Any, Any, Any]]]]:
    """Return the label of each cost, and the cost of every row with the ends of its interval.

    The latency is relative to the baseline's, which was timed in turns with it.
    """
    return {
        "latency": ("latency / latency of the baseline", [relative_latency(row) for row in rows]),
        "size": ("size, MB", [(row["size_mb"],) * 3 for row in rows]),
        "memory": ("memory to load and run, MB", [(row.get("model_memory_mb"),) * 3 for row in rows]),
    }


def relative_latency(row: Row) -> tuple[float, float, float]:
    """Return the latency as a multiple of the baseline's, and its interval."""
    if row["speedup"] is None:
        return 1.0, 1.0, 1.0
    return 1 / row["speedup"], 1 / row["speedup_high"], 1 / row["speedup_low"]


def draw_front(rows: list[Row], names: list[str], label: str, places: list[tuple[float, float, float]]) -> Figure:
    """Draw the points, their names beside the plot, and the Pareto front."""
    from compress.tasks.kinds import higher_is_better

    figure, axis = create_axes(len(rows))
    better = 1 if higher_is_better(common_metric(rows)) else -1
    best = pareto_indices([place[0] for place in places], [better * row["value"] for row in rows])
    axis.step([places[i][0] for i in best], [rows[i]["value"] for i in best], where="post", color="C0", linewidth=1)
    for i, (row, (x, low, high)) in enumerate(zip(rows, places)):
        color = "black" if row["method"] == "none" else "C0" if i in best else GREY
        axis.errorbar(x, row["value"], xerr=[[x - low], [high - x]], yerr=quality_error_bar(row), fmt="o", markersize=4,
                      color=color, ecolor=color, elinewidth=0.6, capsize=1.5)  # fmt: skip
    annotate_points(axis, [(place[0], row["value"]) for place, row in zip(places, rows)], names)
    axis.set_xlabel(label)
    axis.set_ylabel(common_metric(rows))
    return figure


def quality_error_bar(row: Row) -> list[list[float]] | None:
    """Return the distances from the value to the ends of the interval of the change, down and up."""
    if row.get("change_low") is None:
        return None
    return [[max(0.0, row["change"] - row["change_low"])], [max(0.0, row["change_high"] - row["change"])]]


def annotate_points(axis: Axes, points: list[tuple[float, float]], names: list[str]) -> None:
    """Write the names in a column to the right of the plot without overlap, each with a thin line to its point."""
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
    """Move the places to be at least ``gap`` apart between 0 and 1."""
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
    """Draw the latency of every row with its interval, and write the quality in the bar."""
    figure, axis = create_axes(len(rows))
    times = [row["latency_ms"] for row in rows]
    errors = [
        [max(0.0, row["latency_ms"] - row["latency_low_ms"]) for row in rows],
        [max(0.0, row["latency_high_ms"] - row["latency_ms"]) for row in rows],
    ]
    colors = ["0.75" if row["method"] == "none" else "#a8c8e8" for row in rows]
    axis.barh(range(len(rows)), times, xerr=errors, color=colors, error_kw={"elinewidth": 0.8, "capsize": 2})
    plain = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5}  # readable over error bars
    for number, row in enumerate(rows):
        axis.text(0.01 * max(times), number, format_value(row), va="center", fontsize=8, bbox=plain)
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
    """Return the changes by slice of every row with stored predictions of its own and of its baseline, by row id."""
    from compress.measuring.predictions import Predictions, measure_regressions

    regressions = {}
    for row in rows:
        folder = Path(row.get("folder") or ".")
        baseline = folder / "predictions" / "0.npz"
        if row.get("predictions") and baseline.is_file() and row["method"] != "none":
            path = folder / row["predictions"]
            if path != baseline and path.is_file():
                before, after = Predictions.load(baseline), Predictions.load(path)
                regressions[id(row)] = measure_regressions(before, after, row["metric"])
    return {number: changes for number, changes in regressions.items() if changes}


def draw_heat_map(names: list[str], changes: list[list[Regression]]) -> Figure:
    """Draw a line for every row and a column for every slice.

    A star marks a change that is significant by McNemar's test, corrected over the whole map (Holm).
    """
    import numpy as np
    from matplotlib.figure import Figure

    from compress.maths.statistics import holm

    columns = list(dict.fromkeys(change.name for line in changes for change in line))
    sizes = {change.name: change.examples for line in changes for change in line}
    tested = {id(change): change.p_value for line in changes for change in line if change.p_value is not None}
    stars = {number for number, p in zip(tested, holm(list(tested.values()))) if p < 0.05}
    values = np.array(
        [
            [100 * next((item.change for item in line if item.name == name), np.nan) for name in columns]
            for line in changes
        ]
    )
    figure = Figure(figsize=(1 + 0.62 * len(columns), 1 + LINE * len(names)))
    axis = figure.add_subplot()
    reach = max(1.0, float(np.nan_to_num(np.abs(values)).max()))
    image = axis.imshow(values, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto")
    for row, line in enumerate(changes):
        for change in line:
            shown = "" if np.isnan(change.change) else f"{100 * change.change:+.1f}" + "*" * (id(change) in stars)
            dark = abs(100 * change.change) > 0.6 * reach
            axis.text(columns.index(change.name), row, shown, ha="center", va="center", fontsize=7,
                      color="white" if dark else "black")  # fmt: skip
    headings = [f"{shorten_label(name)} ({sizes[name]})" for name in columns]
    axis.set_xticks(range(len(columns)), headings, fontsize=8, rotation=35, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
    return figure
