"""What came of a run or a sweep: ``results.csv``, ``results.md``, the terminal's table, TensorBoard.

Importing this module is cheap: Hydra does so before every job.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

from compress import curves

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.table import Table

    from compress.artifact import Description
    from compress.measure import Measurement

log = logging.getLogger(__name__)

RESULT = "result.json"
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
    """What came of it by method: the baseline first, then what is compared with it, if anything is.

    ``baseline`` is the address of the baseline: rows of one address are measurements of one artifact.
    """

    primary: str
    descriptions: dict[str, Description]
    measurements: dict[str, Measurement]
    baseline: str = ""


class SweepReport(Callback):
    """Hydra's callback at the end of a sweep: one table of all its rows, and curves over the numbers that it varied;
    exit status 1 if a job failed."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            folder = Path(config.hydra.sweep.dir)
            rows = without_repeated_baselines(gather(folder))
            publish(folder, rows)
            if curves.write(folder, rows):
                print(f"  curves: {folder / 'curves'}")
        except Exception:  # which Hydra would turn into a warning, and the sweep into a success
            log.exception("The sweep's report could not be written.")
            sys.exit(1)
        if any(one["status"] == "failed" for one in rows):
            sys.exit(1)


def gather(folder: Path) -> list[Row]:
    """The rows of all jobs of a sweep in their order; a job that left no result, killed perhaps, has failed."""
    rows: list[Row] = []
    for job in sorted((hidden.parent for hidden in folder.glob("*/.hydra")), key=job_number):
        if (job / RESULT).is_file():
            rows += json.loads((job / RESULT).read_text())["rows"]
        else:
            rows.append(failed(Job(job.name, "", "", 0), f"it left no result: see {job}"))
    return rows


def job_number(folder: Path) -> tuple[int, str]:
    """Jobs in the order of the sweep: their folders are named ``0_...``, ``1_...``, ``10_...``."""
    number = folder.name.split("_")[0]
    return (int(number) if number.isdigit() else sys.maxsize, folder.name)


def finish(folder: Path, job: Job, outcome: Outcome) -> list[Row]:
    """Write a completed job's results."""
    rows = [row(job, method, outcome) for method in outcome.measurements]
    conclude(folder, rows)
    to_tensorboard(folder / "tensorboard", job, rows[-1], "SUCCESS")
    return rows


def fail(folder: Path, job: Job, reason: str) -> None:
    """Write that a job failed, and why."""
    rows = [failed(job, reason)]
    conclude(folder, rows)
    to_tensorboard(folder / "tensorboard", job, rows[-1], "FAILURE")


def failed(job: Job, reason: str) -> Row:
    return {**asdict(job), "overrides": " ".join(job.overrides), "status": "failed", "reason": reason}


def conclude(folder: Path, rows: list[Row]) -> None:
    """Write a job's rows, for the sweep's report to find and for people."""
    write_whole(folder / RESULT, json.dumps({"rows": rows}, indent=2))
    write(folder, rows)


def publish(folder: Path, rows: list[Row]) -> None:
    """Write the tables of ``rows`` and show them."""
    write(folder, rows)
    show(rows, folder)


def row(job: Job, method: str, outcome: Outcome) -> Row:
    """One line of ``results.csv``. Times are seconds or milliseconds as named, sizes are 10^6 bytes, quality is in
    fractions (perplexity apart); ``change`` is the primary metric less the baseline's."""
    description, measured = outcome.descriptions[method], outcome.measurements[method]
    baseline = next(iter(outcome.measurements.values()))
    quality, speedup, same = measured.quality, measured.speedup, measured.speedup_same_runtime
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
        "speedup_same_runtime": same.value if same else None,
        "speedup_same_runtime_low": same.low if same else None,
        "speedup_same_runtime_high": same.high if same else None,
        "latency_mean_ms": measured.latency.mean_ms,
        "latency_p95_ms": measured.latency.p95_ms,
        "throughput_per_s": measured.throughput_per_s,
        "parameters": measured.parameters,
        "nonzeros": measured.nonzeros,
        "latency_tokens": measured.latency_tokens,
        "throughput_tokens": measured.throughput_tokens,
        "compression_time_s": description.compression_time_s,
        "examples": measured.examples,
        "runtime": measured.runtime,
        "device": measured.device,
        "threads": measured.threads,
        "limits": "; ".join(description.limits),
        "baseline": outcome.baseline,
    }


def without_repeated_baselines(rows: list[Row]) -> list[Row]:
    """Every job measures its baseline; of each the first measurement is kept."""
    seen: set[str] = set()
    kept: list[Row] = []
    for one in rows:
        again = one.get("baseline") in seen
        if one["method"] == "none" and one.get("baseline"):
            if again:
                continue
            seen.add(one["baseline"])
            settings = one["overrides"].split()
            one = {**one, "overrides": " ".join(o for o in settings if not o.lstrip("+").startswith("technique."))}
        kept.append(one)
    return kept


def write(folder: Path, rows: list[Row]) -> None:
    """Write ``results.csv`` and ``results.md``."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys((*FIRST, *(name for one in rows for name in one)))))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "results.csv", text.getvalue())
    write_whole(folder / "results.md", markdown(rows))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def markdown(rows: list[Row]) -> str:
    """The table as Markdown, and under it how to read it."""
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
        console.width = 140
    console.print()
    wide = table(rows)
    console.print(wide if console.measure(wide).maximum <= console.width else table(rows, narrow=True))
    for note in notes(rows):
        console.print(f"  {note}", style="dim")
    console.print(f"  results: {folder}", soft_wrap=True)


def title(rows: list[Row]) -> str:
    """What all rows have in common: models, tasks, and on what they were measured."""
    done = [one for one in rows if one["status"] == "completed"]

    def all_of(key: str, form: str) -> list[str]:
        return [form.format(value) for value in dict.fromkeys(one[key] for one in done)]

    models, tasks = (", ".join(dict.fromkeys(str(one[key]) for one in rows if one[key])) for key in ("model", "task"))
    facts = [*all_of("examples", "{:,} test examples"), *all_of("device", "{}"), *all_of("threads", "{} threads")]
    return f"{models} on {tasks}" + (f": {', '.join(facts)}" if len(facts) == 3 else "")


def notes(rows: list[Row]) -> list[str]:
    """What the table alone does not say, each thing once."""
    timed = [
        f"ms: one text, {one['latency_tokens']:.0f} tokens on average; "
        f"texts/s: batches of texts of {one['throughput_tokens']} tokens; faster: in turns with the baseline in one job"
        for one in rows
        if one["status"] == "completed"
    ]
    timed += [
        "in its runtime: faster than the baseline exported to the same runtime in float32"
        for one in rows
        if one.get("speedup_same_runtime")
    ]
    found = [part for one in rows for part in one.get("limits", "").split("; ") if part]
    lost = [f"{one['method']} failed: {one['reason']}" for one in rows if one["status"] == "failed"]
    return [*dict.fromkeys(timed), *dict.fromkeys(found), *lost]


def table(rows: list[Row], narrow: bool = False) -> Table:
    """The columns a person compares, the first of them where it must be ``narrow``; settings show where they differ
    between rows."""
    from rich.table import Table

    drawn = Table(title=title(rows), title_justify="left")
    rows = [{**one, "settings": told} for one, told in zip(rows, apart(rows))]
    varying = [key for key in ("model", "task", "seed", "settings") if len({one[key] for one in rows}) > 1]
    metrics = ", ".join(dict.fromkeys(one["metric"] for one in rows if one["status"] == "completed")) or "quality"
    figures = [metrics, "change", "MB", "smaller", "ms", "faster [95%]", "texts/s", "train s", "compress s"]
    if any(one.get("speedup_same_runtime") for one in rows):
        figures.append("in its runtime [95%]")
    figures = figures[:6] if narrow else figures
    for name in ("method", *varying):
        longest = max(len(word) for one in rows for word in (name, *str(one[name]).split()))
        drawn.add_column(name, overflow="fold", min_width=min(longest, 24))
    for name in figures:
        drawn.add_column(name.replace("[", r"\["), justify="right", no_wrap=True)
    for one in rows:
        cells = [one["method"], *(str(one[key]) for key in varying)]
        if one["status"] == "failed":
            drawn.add_row(*cells, "failed", style="red")
        else:
            drawn.add_row(*cells, *(cell.replace("[", r"\[") for cell in drawn_figures(one)[: len(figures)]))
    return drawn


def apart(rows: list[Row]) -> list[str]:
    """Of each row's overrides those that not all rows share; a baseline knows no settings of techniques."""
    compared = [set(one["overrides"].split()) for one in rows if one["method"] != "none"]
    shared = set.intersection(*compared) if compared else set()
    told = [[o.lstrip("+") for o in one["overrides"].split() if o not in shared] for one in rows]
    stages = {".".join(o.partition("=")[0].split(".")[:2]) for overrides in told for o in overrides}
    only = f"{stages.pop()}." if len(stages) == 1 else "technique."  # of one stage its name says nothing
    return [" ".join(override.removeprefix(only) for override in overrides) for overrides in told]


def drawn_figures(one: Row) -> list[str]:
    """The figures of a completed row as text; a baseline is compared with nothing."""
    perplexity, baseline = one["metric"] == "perplexity", one["speedup"] is None
    same = one.get("speedup_same_runtime")
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
        f"{same:.2f}x [{one['speedup_same_runtime_low']:.2f}, {one['speedup_same_runtime_high']:.2f}]" if same else "",
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
