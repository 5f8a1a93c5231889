"""Write jobs and sweeps for TensorBoard: final figures, HParams, and charts that overlay the variants."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cache.events import hide_events, reveal_events
from compress.cache.files import write_atomically
from compress.reporting.escaping import make_file_name, make_printable, make_rows_printable, plain_figures
from compress.reporting.tables import label_rows

if TYPE_CHECKING:
    from compress.reporting.rows import Row


FIGURES = (
    "value",
    "change",
    "size_mb",
    "latency_ms",
    "speedup",
    "compression_ratio",
    "throughput_per_s",
    "model_memory_mb",
    "training_time_s",
    "compression_time_s",
)
"""Figures in the order of the HParams table's columns, which shows the first five by default."""
LAYOUT = {
    "final": {
        "quality": ["Multiline", ["final/value"]],
        "size": ["Multiline", ["final/size_mb", "final/compression_ratio"]],
        "speed": ["Multiline", ["final/latency_ms", "final/speedup"]],
    },
    "training": {
        "training loss": ["Multiline", ["^train/loss$"]],
        "validation loss": ["Multiline", ["^validation/loss$"]],
        "validation metrics": ["Multiline", ["^validation/(?!loss)"]],
    },
}
"""The charts of the Custom Scalars tab, each with a line for every run."""

RUNS = ".runs.json"
"""The file that lists the runs of an overlay, which are removed when it is written again."""


def write_summaries(folder: Path, result: Row, chosen: dict[str, Any] | None = None) -> None:
    """Write the final figures as scalars and as a row of the HParams tab, with the status of the job.

    The summaries are written one by one: ``add_hparams`` would start a separate run, and declaring the metrics with
    values would draw a false point.

    Args:
        chosen: settings of the HParams row, by default all settings of the ``result``.
    """
    from tensorboard.plugins.hparams import api_pb2, metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import Summary, hparams

    figures = {f"final/{name}": result[name] for name in FIGURES if result.get(name) is not None}
    status = "SUCCESS" if result["status"] == "completed" else "FAILURE"
    with SummaryWriter(str(folder)) as writer:
        settings = collect_settings(result) if chosen is None else chosen
        for summary in hparams(settings, dict.fromkeys(figures, 0.0))[:2]:
            writer.file_writer.add_summary(summary)
        for name, value in figures.items():
            writer.add_scalar(name, value)
        end = SessionEndInfo(status=api_pb2.Status.Value(f"STATUS_{status}"))
        data = metadata.create_summary_metadata(HParamsPluginData(session_end_info=end))
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=data)]))


def collect_settings(result: Row) -> dict[str, Any]:
    """Return the settings by column: numbers as numbers, so that the tab can draw axes, and others as texts."""
    from compress.reporting.curves import parse_number, parse_overrides

    chosen = {key: result[key] for key in ("method", "model", "task", "metric", "seed") if result.get(key) is not None}
    for key, value in parse_overrides(result).items():
        number = parse_number(value)
        chosen[key.removeprefix("technique.")] = value if number is None else number
    return {
        make_printable(key): value if isinstance(value, int | float) else make_printable(str(value))
        for key, value in chosen.items()
    }


@plain_figures()
def write_overlay(folder: Path, rows: list[Row]) -> None:
    """Write ``tensorboard/`` of a sweep: a run for every row, charts that overlay the runs, and the report's figures.

    A run has a short name, the row's training curves, and the settings in which rows differ. The jobs' own event files
    are hidden then, so that ``tensorboard --logdir multirun`` shows each job once.

    tensorboard --logdir multirun/2026-01-31/12-00-00/tensorboard
    """
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    from compress.reporting.plots import draw_figures

    rows = make_rows_printable(rows)
    target = folder / "tensorboard"
    target.mkdir(exist_ok=True)
    if (target / RUNS).is_file():
        for name in json.loads((target / RUNS).read_text(encoding="utf-8")):
            shutil.rmtree(target / name, ignore_errors=True)
    jobs = [Path(job) / "tensorboard" for job in dict.fromkeys(row["folder"] for row in rows)]
    for job in jobs:
        reveal_events(job)
    names: list[str] = []
    for row, label, chosen in zip(rows, label_rows(rows), differing_settings(rows)):
        names.append(make_file_name(label, names))
        trained = [stage for stage in find_stage_folders(row, rows) if has_curves(stage)]
        for stage in trained:
            alone = len(trained) == 1
            shutil.copytree(stage, target / names[-1] / ("" if alone else stage.name), dirs_exist_ok=True)
        write_summaries(target / names[-1], row, chosen)
    write_atomically(target / RUNS, json.dumps(names))
    for job in jobs:
        hide_events(job)
    with SummaryWriter(str(target)) as writer:
        writer.add_custom_scalars(LAYOUT)
        for title, figure in draw_figures(rows):
            content = io.BytesIO()
            figure.savefig(content, dpi=120, bbox_inches="tight")
            content.seek(0)
            writer.add_image(f"report/{make_printable(title)}", imread(content)[..., :3], dataformats="HWC")


def differing_settings(rows: list[Row]) -> list[dict[str, Any]]:
    """Return the method of every row and the settings that not all rows share.

    Baselines, which have no technique settings, and failed jobs, which may have none, do not count.
    """
    settings = [collect_settings(row) for row in rows]
    done = (row["method"] != "none" and row["status"] == "completed" for row in rows)
    compared = [chosen for chosen, known in zip(settings, done) if known] or settings
    keys = {key for chosen in compared for key in chosen}
    vary = {key for key in keys if len({str(chosen.get(key)) for chosen in compared}) > 1} | {"method"}
    return [{key: value for key, value in chosen.items() if key in vary} for chosen in settings]


def find_stage_folders(row: Row, rows: list[Row]) -> list[Path]:
    """Return the row's own folders of curves: the baseline's training for a baseline, else the later stages. The folder
    of a failed job may hold an earlier run's."""
    if row["status"] == "failed":
        return []
    job = Path(row["folder"]) / "tensorboard"
    if row["method"] == "none":
        return sorted(job.glob("0_*"))
    return [] if is_measured_in_other_job(row, rows) else sorted(job.glob("[1-9]*_*"))


def has_curves(stage: Path) -> bool:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return any(tag.startswith("train/") for tag in EventAccumulator(str(stage)).Reload().Tags()["scalars"])


def is_measured_in_other_job(row: Row, rows: list[Row]) -> bool:
    """Return whether the row is not the last of its job, whose figures belong to the last row."""
    return any(other["folder"] == row["folder"] for other in rows[rows.index(row) + 1 :])
