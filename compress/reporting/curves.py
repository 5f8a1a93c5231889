"""Draw the curves of a sweep over numbers: quality and size against every setting that varies."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cache.files import write_atomically
from compress.reporting.escaping import make_file_name, make_rows_printable, plain_figures, shorten_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from compress.reporting.rows import Row


MOST_TICKS = 12
BASELINE = {"color": "0.45", "linestyle": "--", "linewidth": 1}


@plain_figures()
def write_curves(folder: Path, rows: list[Row]) -> list[Path]:
    """Write ``curves/<setting>.png`` and the same figures for TensorBoard. Return the paths."""
    if not (figures := draw_curves(make_rows_printable(rows))):
        return []
    from torch.utils.tensorboard import SummaryWriter

    (folder / "curves").mkdir(exist_ok=True)
    paths: list[Path] = []
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for name, figure in figures.items():
            content = io.BytesIO()
            figure.savefig(content, format="png")
            paths.append(folder / "curves" / f"{make_file_name(name, [path.stem for path in paths])}.png")
            write_atomically(paths[-1], content.getvalue())
            writer.add_figure(f"curves/{name}", figure)
    return paths


def draw_curves(rows: list[Row]) -> dict[str, Figure]:
    """Return figures by name: one for every numeric setting of a stage with at least two values in the completed rows.

    Each combination of model, task and metric has its own figures.
    """
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["status"] == "completed":
            groups[row["model"], row["task"], row["metric"]].append(row)
    figures = {}
    for group_name, group in groups.items():
        settings = [numeric_settings(row) for row in group if row["method"] != "none"]
        for name in dict.fromkeys(name for values in settings for name in values):
            if len({values[name] for values in settings if name in values}) > 1:
                full = "-".join((*group_name, name)) if len(groups) > 1 else name
                figures[full] = draw_curve(group, name)
    return figures


def numeric_settings(row: Row) -> dict[str, float]:
    """Return the numeric settings of the stages: ``{"prune.sparsity": 0.5}``."""
    numbers = {}
    for key, value in parse_overrides(row).items():
        if key.startswith("technique.") and (number := parse_number(value)) is not None:
            numbers[key.removeprefix("technique.")] = number
    return numbers


def parse_overrides(row: Row) -> dict[str, str]:
    words = (word.lstrip("+").partition("=") for word in row["overrides"])
    return {key: value for key, _, value in words}


def parse_number(text: str) -> float | None:
    """Return ``text`` as a number, None if it is not a finite number."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def group_lines(rows: list[Row], name: str) -> tuple[list[str], dict[tuple[str, ...], list[Row]]]:
    """Group the rows that have the setting ``name`` into lines that differ only in this setting, and sort each by it.

    Returns:
        The names of the settings that differ between lines, and the lines by the values of these settings, in order.
    """
    having = [row for row in rows if row["method"] != "none" and name in numeric_settings(row)]
    facts = [
        {"method": row["method"], "seed": str(row["seed"]), **parse_overrides(row), f"technique.{name}": ""}
        for row in having
    ]
    keys = dict.fromkeys(key for fact in facts for key in fact)
    varying = [key for key in keys if len({fact.get(key, "") for fact in facts}) > 1]
    lines: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row, fact in zip(having, facts):
        lines[tuple(fact.get(key, "") for key in varying)].append(row)

    def order(values: tuple[str, ...]) -> list[Any]:
        numbers = [parse_number(value) for value in values]
        return [(number is None, number or 0.0, value) for number, value in zip(numbers, values)]

    for line in lines.values():
        line.sort(key=lambda row: numeric_settings(row)[name])
    return [key.removeprefix("technique.") for key in varying], {key: lines[key] for key in sorted(lines, key=order)}


def draw_curve(rows: list[Row], name: str) -> Figure:
    """Draw the primary metric of ``rows`` of the same model and task, and below it the size, against ``name``."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    # 1) Plot a line for each combination of the other settings
    varying, drawn = group_lines(rows, name)
    baselines = [row for row in rows if row["method"] == "none"]
    panel = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    top, bottom = panel.subplots(2, 1, sharex=True)
    for axis, key in ((top, "value"), (bottom, "size_mb")):
        for number, line in enumerate(drawn.values()):
            axis.plot(
                [numeric_settings(row)[name] for row in line],
                [row[key] for row in line],
                color=colormaps["viridis"](0.9 * number / max(len(drawn) - 1, 1)),
                marker="o",
                markersize=4,
            )
        for value in {row[key] for row in baselines}:
            axis.axhline(value, **BASELINE)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.ticklabel_format(axis="y", useOffset=False)
    top.set_ylabel(rows[0]["metric"])
    bottom.set_ylabel("size, MB")
    bottom.set_xlabel(name)
    place_ticks(bottom, sorted({numeric_settings(row)[name] for line in drawn.values() for row in line}))

    # 2) Add the legend and the title
    labels = [shorten_label(", ".join(value or "-" for value in values)) for values in drawn] if varying else []
    handles = [*top.lines[: len(labels)], *top.lines[len(drawn) :][:1]]
    labels += ["baseline"] if len(handles) > len(labels) else []
    if labels:
        panel.legend(
            handles,
            labels,
            loc="outside right center",
            title=",\n".join(map(shorten_label, varying)),
            ncols=math.ceil(len(labels) / 24),
            fontsize=8,
            title_fontsize=8,
            alignment="left",
            frameon=False,
        )
    methods = {row["method"] for line in drawn.values() for row in line}
    method = f": {methods.pop()}" if len(methods) == 1 else ""
    panel.suptitle(shorten_label(f"{rows[0]['model']} on {rows[0]['task']}{method}"), fontsize=11)
    return panel


def place_ticks(axis: Axes, values: list[float]) -> None:
    """Place ticks at the values if there is room, on a logarithmic axis for wide ranges."""
    low, high = values[0], values[-1]
    wide = low > 0 and high / low >= 50
    if wide:
        axis.set_xscale("log")
    places = [math.log(value) for value in values] if wide else values
    nearest = min(after - before for before, after in pairwise(places))
    if nearest * MOST_TICKS >= places[-1] - places[0]:
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.minorticks_off()
