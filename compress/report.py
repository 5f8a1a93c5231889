"""What came of a run or a sweep, for people and for programs: ``results.csv``, ``results.md``, the terminal, TensorBoard.

Importing this module is cheap: Hydra does so before every job.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.table import Table

    from compress.artifact import Description
    from compress.measure import Measurement

RESULT = "result.json"
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What was asked for on the command line."""

    method: str
    model: str
    task: str
    seed: int
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of it by method: the baseline first, then what is compared with it, if anything is."""

    primary: str
    descriptions: dict[str, Description]
    measurements: dict[str, Measurement]


class SweepReport(Callback):
    """Hydra's callback at the end of a sweep: one table of all its rows; exit status 1 if a job failed."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        results = [json.loads(file.read_text()) for file in sorted(folder.glob(f"*/{RESULT}"), key=job_number)]
        rows = without_repeated_baselines([row for result in results for row in result["rows"]])
        publish(folder, rows)
        if any(row["status"] == "failed" for row in rows):
            sys.exit(1)


def job_number(file: Path) -> tuple[int, str]:
    """Jobs in the order of the sweep: their folders are named ``0_...``, ``1_...``, ``10_...``."""
    number = file.parent.name.split("_")[0]
    return (int(number) if number.isdigit() else sys.maxsize, file.parent.name)


def finish(folder: Path, job: Job, outcome: Outcome) -> list[Row]:
    """Write a completed job's results."""
    rows = [row(job, method, outcome) for method in outcome.measurements]
    conclude(folder, job, rows, "SUCCESS")
    return rows


def fail(folder: Path, job: Job, reason: str) -> None:
    """Write that a job failed, and why."""
    failed = {**asdict(job), "overrides": " ".join(job.overrides), "status": "failed", "reason": reason}
    conclude(folder, job, [failed], "FAILURE")


def publish(folder: Path, rows: list[Row]) -> None:
    """Write the tables of ``rows`` and show them."""
    write(folder, rows)
    show(rows, folder)


def conclude(folder: Path, job: Job, rows: list[Row], status: str) -> None:
    write(folder, rows)
    to_tensorboard(folder / "tensorboard", job, rows[-1], status)
    partial = folder / f"{RESULT}.partial"
    partial.write_text(json.dumps({"rows": rows}, indent=2))
    os.replace(partial, folder / RESULT)


def row(job: Job, method: str, outcome: Outcome) -> Row:
    """One line of ``results.csv``. Times are seconds or milliseconds as named, sizes are 10^6 bytes, quality is in
    fractions (perplexity apart); ``change`` is the primary metric less the baseline's."""
    description, measured = outcome.descriptions[method], outcome.measurements[method]
    baseline = next(iter(outcome.measurements.values()))
    quality, speedup = measured.quality, measured.speedup
    return {
        "method": method,
        "size_mb": measured.size_bytes / 1e6,
        "latency_ms": measured.latency.median_ms,
        "accuracy": quality.get("accuracy", quality.get("subset_accuracy")),
        "training_time_s": description.training_time_s,
        "model": job.model,
        "task": job.task,
        "seed": job.seed,
        "overrides": " ".join(job.overrides),
        "status": "completed",
        "reason": "",
        "metric": outcome.primary,
        "value": quality[outcome.primary],
        "change": quality[outcome.primary] - baseline.quality[outcome.primary],
        **quality,
        "compression_ratio": baseline.size_bytes / measured.size_bytes,
        "speedup": speedup.value if speedup else None,
        "speedup_low": speedup.low if speedup else None,
        "speedup_high": speedup.high if speedup else None,
        "latency_mean_ms": measured.latency.mean_ms,
        "latency_p95_ms": measured.latency.p95_ms,
        "throughput_per_s": measured.throughput_per_s,
        "parameters": measured.parameters,
        "nonzeros": measured.nonzeros,
        "compression_time_s": description.compression_time_s,
        "examples": measured.examples,
        "device": measured.device,
        "threads": measured.threads,
        "limits": "; ".join(description.limits),
    }


def without_repeated_baselines(rows: list[Row]) -> list[Row]:
    """Every job measures its baseline; keep the first of each model, task, seed and settings beside the techniques'."""
    kept: dict[tuple, Row] = {}
    for one in rows:
        settings = one["overrides"]
        if one["method"] == "none":
            settings = " ".join(o for o in settings.split() if not o.lstrip("+").startswith("technique."))
        kept.setdefault(
            (one["method"], one["model"], one["task"], one["seed"], settings), {**one, "overrides": settings}
        )
    return list(kept.values())


def write(folder: Path, rows: list[Row]) -> None:
    """Write ``results.csv`` and ``results.md``."""
    columns = list(dict.fromkeys(name for one in sorted(rows, key=lambda r: r["status"]) for name in one))
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    (folder / "results.md").write_text(markdown(rows))


def markdown(rows: list[Row]) -> str:
    """The table as Markdown, and under it how to read it."""
    import io

    from rich import box
    from rich.console import Console

    drawn = table(rows)
    drawn.box, drawn.title, drawn.caption = box.MARKDOWN, None, None
    text = io.StringIO()
    Console(file=text, width=1000).print(drawn)
    lines = [f"# {title(rows)}", "", *(line.strip() for line in text.getvalue().strip().splitlines()), ""]
    lines += [f"- {note}" for note in notes(rows)]
    return "\n".join(lines) + "\n"


def show(rows: list[Row], folder: Path) -> None:
    """Draw the table in the terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print()
    console.print(table(rows, narrow=console.width < 110))
    for note in notes(rows):
        console.print(f"  {note}", style="dim")
    console.print(f"  results: {folder}", soft_wrap=True)


def title(rows: list[Row]) -> str:
    done = [one for one in rows if one["status"] == "completed"]
    models, tasks = (", ".join(dict.fromkeys(str(one[key]) for one in rows)) for key in ("model", "task"))
    if not done:
        return f"{models} on {tasks}"
    where = f"{done[0]['device']}, {done[0]['threads']} threads"
    return f"{models} on {tasks}: {done[0]['examples']:,} test examples, {where}"


def notes(rows: list[Row]) -> list[str]:
    """What the table alone does not say, each thing once."""
    found = [part for one in rows for part in one.get("limits", "").split("; ") if part]
    failed = [f"{one['method']} failed: {one['reason']}" for one in rows if one["status"] == "failed"]
    return [*dict.fromkeys(found), *failed]


def table(rows: list[Row], narrow: bool = False) -> Table:
    """The columns a person compares, the first of them where it must be ``narrow``; settings show where they differ
    between rows."""
    from rich.table import Table

    drawn = Table(title=title(rows), title_justify="left")
    varying = [key for key in ("model", "task", "seed", "overrides") if len({one[key] for one in rows}) > 1]
    metrics = ", ".join(dict.fromkeys(one["metric"] for one in rows if one["status"] == "completed")) or "quality"
    figures = [metrics, "change", "MB", "smaller", "ms", "faster [95%]", "texts/s", "train s", "compress s"]
    figures = figures[:6] if narrow else figures
    for name in ("method", *varying):
        drawn.add_column(name, overflow="fold")
    for name in figures:
        drawn.add_column(name.replace("[", r"\["), justify="right", no_wrap=True)
    for one in rows:
        cells = [one["method"], *(str(one[key]) for key in varying)]
        if one["status"] == "failed":
            drawn.add_row(*cells, "failed", style="red")
        else:
            drawn.add_row(*cells, *(cell.replace("[", r"\[") for cell in drawn_figures(one)[: len(figures)]))
    return drawn


def drawn_figures(one: Row) -> list[str]:
    """The figures of a completed row as text; a baseline is compared with nothing."""
    perplexity, baseline = one["metric"] == "perplexity", one["speedup"] is None
    change = f"{one['change']:+.3f}" if perplexity else f"{100 * one['change']:+.2f} pt"
    return [
        f"{one['value']:.3f}" if perplexity else f"{one['value']:.4f}",
        "" if baseline else change,
        f"{one['size_mb']:.2f}",
        "" if baseline else f"{one['compression_ratio']:.2f}x",
        f"{one['latency_ms']:.2f}",
        "" if baseline else f"{one['speedup']:.2f}x [{one['speedup_low']:.2f}, {one['speedup_high']:.2f}]",
        f"{one['throughput_per_s']:,.0f}",
        f"{one['training_time_s']:.1f}",
        "" if baseline else f"{one['compression_time_s']:.1f}",
    ]


def to_tensorboard(folder: Path, job: Job, result: Row, status: str) -> None:
    """The final figures as scalars and as a row of the HParams tab, marked as failed where the job failed.

    The summaries are written one by one: ``add_hparams`` would start a run of its own, and declaring the metrics with
    values would draw a false point.
    """
    from tensorboard.plugins.hparams import api_pb2, metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import Summary, hparams

    figures = {
        f"final/{name}": result[name]
        for name in ("value", "change", "size_mb", "latency_ms", "speedup", "training_time_s", "compression_time_s")
        if result.get(name) is not None
    }
    settings = {**asdict(job), "overrides": " ".join(job.overrides), "metric": result.get("metric", "")}
    with SummaryWriter(str(folder)) as writer:
        declared = hparams({key: value for key, value in settings.items() if value != ""}, dict.fromkeys(figures, 0.0))
        for summary in declared[:2]:
            writer.file_writer.add_summary(summary)
        for name, value in figures.items():
            writer.add_scalar(name, value)
        end = SessionEndInfo(status=api_pb2.Status.Value(f"STATUS_{status}"))
        data = metadata.create_summary_metadata(HParamsPluginData(session_end_info=end))
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=data)]))
