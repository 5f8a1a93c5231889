"""Write jobs and sweeps for TensorBoard: final figures, HParams, and charts that overlay the variants."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

LONGEST = 100  # characters of a run's name, which is also a folder's


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
        for summary in hparams(collect_settings(result) if chosen is None else chosen, dict.fromkeys(figures, 0.0))[:2]:
            writer.file_writer.add_summary(summary)
        for name, value in figures.items():
            writer.add_scalar(name, value)
        end = SessionEndInfo(status=api_pb2.Status.Value(f"STATUS_{status}"))
        data = metadata.create_summary_metadata(HParamsPluginData(session_end_info=end))
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=data)]))


def collect_settings(result: Row) -> dict[str, Any]:
    """Return the settings by column, numbers as numbers, so that the tab can draw axes."""
    from compress.reporting.curves import parse_number, parse_overrides

    chosen = {key: result[key] for key in ("method", "model", "task", "metric") if result.get(key)}
    for key, value in parse_overrides(result).items():
        number = parse_number(value)
        chosen[key.removeprefix("technique.")] = value if number is None else number
    return {**chosen, "seed": result["seed"]}


def write_overlay(folder: Path, rows: list[Row], labels: list[str]) -> None:
    """Write ``tensorboard/`` of a sweep: a run for every row, charts that overlay the runs, and the report's figures.

    A run has a short name, the row's training curves, and the settings in which rows differ.

    tensorboard --logdir multirun/2026-01-31/12-00-00/tensorboard
    """
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    from compress.reporting.plots import draw_figures

    target = folder / "tensorboard"
    names: list[str] = []
    for row, label, chosen in zip(rows, labels, differing_settings(rows)):
        name = re.sub(r"[^\w+.= -]+", "-", label)[:LONGEST]
        names.append(f"{name} ({len(names)})" if name in names else name)
        shutil.rmtree(target / names[-1], ignore_errors=True)
        trained = [stage for stage in find_stage_folders(row, rows) if has_curves(stage)]
        for stage in trained:
            alone = len(trained) == 1
            shutil.copytree(stage, target / names[-1] / ("" if alone else stage.name), dirs_exist_ok=True)
        write_summaries(target / names[-1], row, chosen)
    with SummaryWriter(str(target)) as writer:
        writer.add_custom_scalars(LAYOUT)
        for title, figure in draw_figures(rows):
            content = io.BytesIO()
            figure.savefig(content, dpi=120, bbox_inches="tight")
            content.seek(0)
            writer.add_image(f"report/{title}", imread(content)[..., :3], dataformats="HWC")


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
