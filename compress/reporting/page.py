"""Write ``report.html``: a single file with all results of a run or a sweep, readable without a network."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cache.files import write_atomically
from compress.planning.recorded import format_repeat_command
from compress.reporting import jobs
from compress.reporting.curves import draw_curves
from compress.reporting.escaping import make_printable, make_rows_printable, plain_figures
from compress.reporting.findings import list_notes, read_conclusions
from compress.reporting.plots import Picture, draw_figures
from compress.reporting.rows import is_bound, is_perplexity, is_significant
from compress.reporting.tables import format_rate, format_title, label_rows, summarise_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from compress.reporting.rows import Row


SHARES = ("change", "churn", "against_teacher", "worst_slice_change")
"""Columns of fractions that are shown as percent or points."""


@dataclass(frozen=True)
class Column:
    """A column of the table.

    ``name`` is the heading, ``form`` the format of a cell and ``key`` the row's value to show and sort by. ``ends`` are
    the keys of its interval.
    """

    name: str
    form: str | Callable[[Any], str]
    key: str
    ends: tuple[str, str] | None = None

    def text(self, row: Row) -> str:
        if row.get(self.key) is None:
            return ""
        if self.key in ("value", "change") and math.isnan(row[self.key]):
            return "undefined"
        show = self.form.format if isinstance(self.form, str) else self.form
        shown = show(self.scale_value(row, self.key))
        if self.ends and row.get(self.ends[0]) is not None:
            low, high = (show(self.scale_value(row, end)) for end in self.ends)
            shown += f" [{low}, {high}]"
        less = "< " * (self.key == "p_holm" and is_bound(row))
        return less + shown + "*" * (self.key == "change" and is_significant(row))

    def scale_value(self, row: Row, key: str) -> Any:
        return row[key] * 100 if self.key in SHARES and not is_perplexity(row["metric"]) else row[key]


QUALITY_AND_COST = (
    Column("change [95%]", "{:+.2f}", "change", ("change_low", "change_high")),
    Column("p (Holm)", "{:.2g}", "p_holm"),
    Column("churn, %", "{:.1f}", "churn"),
    Column("to teacher", "{:+.2f}", "against_teacher"),
    Column("MB", "{:.2f}", "size_mb"),
    Column("smaller", "{:.2f}x", "compression_ratio"),
    Column("ms [95%]", "{:.2f}", "latency_ms", ("latency_low_ms", "latency_high_ms")),
    Column("faster [95%]", "{:.2f}", "speedup", ("speedup_low", "speedup_high")),
    Column("texts/s", format_rate, "throughput_per_s"),
    Column("memory, MB", "{:,.1f}", "model_memory_mb"),
    Column("compress s", "{:.1f}", "compression_time_s"),
)
DETAILS = (
    Column("mean ms", "{:.2f}", "latency_mean_ms"),
    Column("sd", "{:.2f}", "latency_sd_ms"),
    Column("p95", "{:.2f}", "latency_p95_ms"),
    Column("p99", "{:.2f}", "latency_p99_ms"),
    Column("CPU ms", "{:.2f}", "cpu_ms"),
    Column("GPU ms", "{:.2f}", "gpu_ms"),
    Column("tokenizer ms", "{:.3f}", "tokenizer_ms"),
    Column("first token ms", "{:.2f}", "first_token_ms"),
    Column("per token ms", "{:.2f}", "per_token_ms"),
    Column("process peak, MB", "{:,.0f}", "peak_memory_mb"),
    Column("GPU peak, MB", "{:,.0f}", "gpu_memory_mb"),
    Column("MACs, 10⁶", "{:,.1f}", "mmacs"),
    Column("J/text", "{:.3g}", "energy_j"),
    Column("export agrees", "{:.1%}", "label_agreement"),
    Column("logits differ by", "{:.2g}", "max_logit_difference"),
    Column("parameters", "{:,}", "parameters"),
    Column("non-zeros", "{:,}", "nonzeros"),
    Column("train s", "{:.1f}", "training_time_s"),
    Column("measure s", "{:.1f}", "measuring_time_s"),
    Column("worst slice", "{}", "worst_slice"),
    Column("slice change", "{:+.1f}", "worst_slice_change"),
)


@plain_figures()
def write_page(folder: Path, rows: list[Row]) -> Path:
    """Write ``report.html`` of ``rows`` into ``folder``, and return its path."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    rows = [{**row, "mmacs": row["macs"] / 1e6 if row.get("macs") else None} for row in make_rows_printable(rows)]
    labels = label_rows(rows)
    content = environment.get_template("page.html.j2").render(
        title=format_title(rows),
        recommendations=read_conclusions(folder, rows),
        tables=[format_table(rows, labels, QUALITY_AND_COST, value=True), format_table(rows, labels, DETAILS)],
        effects=[(number, label, row) for number, (label, row) in enumerate(zip(labels, rows), 1) if row.get("effect")],
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
        repeat=list_commands(rows),
        environments=list_environments(rows),
    )
    write_atomically(folder / "report.html", content)
    return folder / "report.html"


def format_table(
    rows: list[Row], labels: list[str], columns: tuple[Column, ...], value: bool = False
) -> dict[str, Any]:
    """Return the headings and the lines of a table, each cell as its text and its sort value.

    Columns without values are left out. The cells of a failed row are empty.
    """
    metrics = list(dict.fromkeys(row["metric"] for row in rows if row["status"] == "completed"))
    if value and metrics:
        columns = (Column(" / ".join(metrics), "{:.4f}", "value"), *columns)
    columns = tuple(column for column in columns if any(row.get(column.key) is not None for row in rows))
    lines = []
    for number, (row, label) in enumerate(zip(rows, labels), 1):
        failed = row["status"] == "failed"
        compared = row["method"] != "none"
        cells = [
            ("", "")
            if failed or (column.key in ("change", "compression_ratio", "compression_time_s") and not compared)
            else (column.text(row), row.get(column.key))
            for column in columns
        ]
        lines.append({"number": number, "label": label, "cells": cells, "failed": failed, "reason": row.get("reason")})
    return {"headings": [column.name for column in columns], "lines": lines}


def encode_figure(figure: Figure) -> str:
    """Return the figure as a data URI, with everything outside the axes."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", bbox_inches="tight", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def list_commands(rows: list[Row]) -> list[dict[str, str]]:
    """Return the command, the full config and the data fingerprint of each job that has a Hydra config."""
    commands = {}
    for row in rows:
        job = Path(row.get("folder") or ".")
        if row.get("folder") and row["folder"] not in commands and (job / jobs.CONFIG).is_file():
            commands[row["folder"]] = {
                "command": make_printable(format_repeat_command(job)),
                "config": (job / jobs.CONFIG).read_text(encoding="utf-8"),
                "data": row.get("data", ""),
            }
    return list(commands.values())


def list_environments(rows: list[Row]) -> list[dict[str, str]]:
    """Return the environments of the jobs, each once."""
    environments: list[dict[str, str]] = []
    for folder in dict.fromkeys(row["folder"] for row in rows if row.get("folder")):
        result = Path(folder) / jobs.RESULT
        environment = json.loads(result.read_text(encoding="utf-8")).get("environment") if result.is_file() else None
        if environment and environment not in environments:
            environments.append(environment)
    return environments
