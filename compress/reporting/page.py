"""Write ``report.html``: a single file with all results of a run or a sweep, to explore without a network."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cache.files import write_atomically
from compress.reporting import jobs
from compress.reporting.budgets import find_budget_lines
from compress.reporting.columns import DETAILS, QUALITY_AND_COST, Column, list_metrics, read_metric
from compress.reporting.curves import draw_curves
from compress.reporting.details import describe_row
from compress.reporting.escaping import make_printable, make_rows_printable, plain_figures
from compress.reporting.findings import list_notes, read_conclusions
from compress.reporting.plots import Picture, draw_figures
from compress.reporting.rows import is_perplexity
from compress.reporting.tables import format_title, label_rows, summarise_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from compress.reporting.rows import Row


WEB = Path(__file__).parent / "web"
"""The page's template, style and scripts."""
SCRIPTS = ("elements.js", "details.js", "table.js", "labels.js", "plot.js", "explore.js")


@plain_figures()
def write_page(folder: Path, rows: list[Row]) -> Path:
    """Write ``report.html`` of ``rows`` into ``folder``, and return its path."""
    from jinja2 import Environment, FileSystemLoader
    from plotly.offline import get_plotlyjs

    environment = Environment(loader=FileSystemLoader(WEB), autoescape=True, trim_blocks=True)
    rows = [{**row, "mmacs": row["macs"] / 1e6 if row.get("macs") else None} for row in make_rows_printable(rows)]
    content = environment.get_template("page.html.j2").render(
        title=format_title(rows),
        recommendations=read_conclusions(folder, rows),
        sweep=make_plain(collect_sweep(folder, rows)),
        seeds=summarise_seeds(rows),
        is_perplexity=is_perplexity,
        pictures=[
            Picture(title, encode_figure(figure))
            for title, figure in (
                *draw_figures(rows),
                *((f"against {name}", figure) for name, figure in draw_curves(rows).items()),
            )
        ],
        notes=list_notes(rows),
        environments=list_environments(rows),
        style=(WEB / "page.css").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        script="\n".join((WEB / name).read_text(encoding="utf-8") for name in SCRIPTS),
    )
    write_atomically(folder / "report.html", content)
    return folder / "report.html"


def collect_sweep(folder: Path, rows: list[Row]) -> dict[str, Any]:
    """Return what the page's scripts show: columns, axes, budget lines, and the rows with their details."""
    from compress.tasks.kinds import higher_is_better

    # 1) List the columns and axes that have values
    done = [row for row in rows if row["status"] == "completed"]
    primary = list(dict.fromkeys(row["metric"] for row in done))
    metrics = list(dict.fromkeys(metric for row in done for metric in list_metrics(row)))
    value = Column(" / ".join(primary), "{:.4f}", "value")
    main, others = (
        [column for column in columns if any(column.format_cell(row) for row in done)]
        for columns in ((value, *QUALITY_AND_COST), DETAILS)
    )
    axes = [
        *({"key": name, "title": name, "more": higher_is_better(name), "metric": True} for name in metrics),
        *(
            {"key": column.key, "title": column.axis, "more": column.more, "metric": False}
            for column in (*main, *others)
            if column.axis
        ),
    ]
    # 2) Describe every row
    last = {row["folder"]: id(row) for row in rows if row.get("folder")}
    described = []
    for number, (row, label) in enumerate(zip(rows, label_rows(rows)), 1):
        finished = row["status"] == "completed"
        points = {column.key: column.read_point(row) for column in (*main, *others) if column.axis and finished}
        points |= {name: read_metric(row, name) for name in metrics if finished}
        described.append(
            {
                "number": number,
                "label": label,
                "baseline": row["method"] == "none",
                "stages": row["method"].split("+"),
                **{key: str(row.get(key) or "") for key in ("model", "task", "seed", "status", "runtime", "metric")},
                "cells": [column.format_cell(row) if finished else "" for column in (*main, *others)],
                "values": [row.get(column.key) if finished else None for column in (*main, *others)],
                "points": {key: point for key, point in points.items() if point},
                "details": describe_row(row, last.get(row.get("folder")) == id(row)),
            }
        )
    return {
        "columns": [{"key": c.key, "name": c.name, "main": c in main} for c in (*main, *others)],
        "axes": axes,
        "primary": primary,
        "budgets": [asdict(line) for line in find_budget_lines(folder, rows)],
        "rows": described,
    }


def make_plain(value: Any) -> Any:
    """Return nested values as JSON can hold them: printable texts, and no number that is not finite."""
    if isinstance(value, dict):
        return {key: make_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [make_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, str):
        return "\n".join(map(make_printable, value.split("\n")))
    return value


def encode_figure(figure: Figure) -> str:
    """Return the figure as a data URI, with everything outside the axes."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", bbox_inches="tight", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def list_environments(rows: list[Row]) -> list[dict[str, str]]:
    """Return the environments of the jobs, each once."""
    environments: list[dict[str, str]] = []
    for folder in dict.fromkeys(row["folder"] for row in rows if row.get("folder")):
        result = Path(folder) / jobs.RESULT
        environment = json.loads(result.read_text(encoding="utf-8")).get("environment") if result.is_file() else None
        if environment and environment not in environments:
            environments.append(environment)
    return environments
