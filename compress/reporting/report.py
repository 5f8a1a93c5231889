"""Write the results of a run or a sweep: ``results.csv``, ``.parquet`` and ``.md``, and the terminal's table.

Imports of heavy libraries are local, because Hydra imports this module before every job.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import platform
import shlex
from pathlib import Path
from typing import Any

from compress.cache.digests import describe_environment
from compress.cache.files import write_atomically
from compress.quiet import escape_unencodable_output
from compress.reporting.escaping import make_printable, make_rows_printable
from compress.reporting.findings import format_markdown, list_notes, read_conclusions
from compress.reporting.folder import TABLES, RunFolder
from compress.reporting.jobs import FAILED, RESULT
from compress.reporting.rows import Job, Outcome, Row, build_failed_row, collect_rows, correct_p_values
from compress.reporting.tables import build_table
from compress.reporting.tensorboard import write_summaries
from compress.runtimes.processor import EXACT, adds_exactly, read_instructions, read_processor

log = logging.getLogger(__name__)
FIRST = (
    "method",
    "size_mb",
    "latency_ms",
    "accuracy",
    "training_time_s",
    "model",
    "task",
    "seed",
    "overrides",
    "status",
)
LIBRARIES = (
    "torch",
    "transformers",
    "pytorch-lightning",
    "torchmetrics",
    "tokenizers",
    "compressed-tensors",
    "bitsandbytes",
    "onnxruntime",
    "openvino",
    "nncf",
    "gguf",
    "llama-cpp-python",
)


def report_success(folder: Path, job: Job, outcome: Outcome, home: Path | None = None) -> list[Row]:
    """Write a completed job's results into ``folder``, from where they will be moved to ``home``."""
    rows = collect_rows(folder, job, outcome, home)
    write_result(folder, rows)
    write_summaries(folder / "tensorboard", rows[-1])
    return rows


def report_failure(folder: Path, job: Job, reason: str) -> None:
    """Write the reason why a job failed."""
    rows = [build_failed_row(job, reason)]
    write_result(folder, rows)
    write_summaries(folder / "tensorboard", rows[-1])


def record_failure(run: RunFolder, job: Job, reason: str) -> None:
    """Write why a run failed: in place of its results, or beside the results of an earlier run that finished."""
    if run.settle():  # it was stopped when its results were complete
        return
    run.discard()
    if run.state.finished is None and not run.holds_foreign():
        report_failure(run.begin(), job, reason)
        run.commit()
    else:
        rows = [build_failed_row(job, f"{reason} (The result of an earlier run is kept in {run.path}.)")]
        write_atomically(run.path / FAILED, json.dumps({"rows": rows}, indent=2))


def write_result(folder: Path, rows: list[Row]) -> None:
    """Write a job's rows as ``result.json`` for the sweep's report and as tables for people."""
    write_atomically(folder / RESULT, json.dumps({"rows": rows, "environment": describe_machine()}, indent=2))
    write_tables(folder, rows)


def describe_machine() -> dict[str, str]:
    """Return the system, the processor and the versions of Python and of the libraries."""
    from importlib.metadata import PackageNotFoundError, version

    cpu = read_processor().get("model name", platform.processor())
    machine = {
        "system": platform.platform(),
        "cpu": f"{cpu}, {os.cpu_count()} logical cores",
        "8-bit products": ", ".join(sorted(EXACT & read_instructions())) or "exact" if adds_exactly() else "saturate",
        "python": platform.python_version(),
    }
    recorded = describe_environment()
    machine |= {key: recorded[key] for key in ("cpu_capability", "gpu") if key in recorded}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            machine[name] = version(name)
    return machine


def publish_report(folder: Path, rows: list[Row]) -> list[Row]:
    """Write and show the tables and the report of ``rows``. Return the rows with corrected p-values."""
    rows = write_report(folder, rows)
    show_table(rows, folder)
    return rows


def write_report(folder: Path, rows: list[Row]) -> list[Row]:
    """Write the tables and the report of ``rows``. Return the rows with corrected p-values."""
    from compress.reporting.page import write_page

    rows = correct_p_values(rows)
    write_tables(folder, rows)
    write_page(folder, rows)
    return rows


def write_tables(folder: Path, rows: list[Row]) -> None:
    """Write ``results.csv``, ``results.parquet`` and ``results.md``, each as a whole."""
    import pandas

    table, parquet, markdown = (folder / name for name in TABLES)
    write_atomically(markdown, format_markdown(rows, read_conclusions(folder, rows)))
    rows = [{**row, "overrides": shlex.join(row["overrides"])} for row in rows]
    columns = list(dict.fromkeys((*FIRST, *(name for row in rows for name in row))))
    write_atomically(table, format_csv(columns, rows))
    encodable = [{key: escape_surrogates(value) for key, value in row.items()} for row in rows]
    frame = pandas.DataFrame(encodable, columns=columns)
    if any(isinstance(row["seed"], str) for row in rows):  # of a job that refused it; a column has one type
        frame["seed"] = frame["seed"].astype(str)
    write_atomically(parquet, frame.to_parquet())


def format_csv(columns: list[str], rows: list[Row]) -> str:
    """Return the rows as CSV with Unix line ends, after a line of the column names."""
    lines = []
    for row in (dict(zip(columns, columns)), *rows):
        line = io.StringIO()
        csv.DictWriter(line, columns).writerow(row)  # with its own line end, or it would not quote a carriage return
        lines.append(line.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)


def escape_surrogates(value: Any) -> Any:
    """Return a text with escapes for the bytes of a path that is no UTF-8, and any other value as it is."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def show_table(rows: list[Row], folder: Path) -> None:
    """Draw the table in the terminal."""
    from rich.console import Console

    escape_unencodable_output()
    rows = make_rows_printable(rows)
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 140
    console.print()
    console.print(build_table(rows, console.width))
    for line in read_conclusions(folder, rows):
        console.print(f"  {line}")
    for note in list_notes(rows):
        console.print(f"  {note}", style="dim")
    console.print(f"  results: {make_printable(str(folder))}", soft_wrap=True)
