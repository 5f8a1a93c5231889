"""What TensorBoard shows of jobs and sweeps: final figures, HParams, and charts that overlay the variants."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.report import Row

FIGURES = (
    "value",
    "change",
    "size_mb",
    "compression_ratio",
    "latency_ms",
    "speedup",
    "throughput_per_s",
    "model_memory_mb",
    "training_time_s",
    "compression_time_s",
)
"""In the order of the HParams table's columns."""
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
"""Custom Scalars: a chart for each, with a line for every run."""

LONGEST = 100  # characters of a run's name, which is a folder's as well


def write(folder: Path, result: Row, status: str) -> None:
    """The final figures as scalars and as a row of the HParams tab, marked as failed where the job failed.

    The summaries are written one by one: ``add_hparams`` would start a run of its own, and declaring the metrics with
    values would draw a false point.
    """
    from tensorboard.plugins.hparams import api_pb2, metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import Summary, hparams

    figures = {f"final/{name}": result[name] for name in FIGURES if result.get(name) is not None}
    with SummaryWriter(str(folder)) as writer:
        for summary in hparams(settings(result), dict.fromkeys(figures, 0.0))[:2]:
            writer.file_writer.add_summary(summary)
        for name, value in figures.items():
            writer.add_scalar(name, value)
        end = SessionEndInfo(status=api_pb2.Status.Value(f"STATUS_{status}"))
        data = metadata.create_summary_metadata(HParamsPluginData(session_end_info=end))
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=data)]))


def settings(result: Row) -> dict[str, Any]:
    """What was chosen, each setting a column; a number as one, so that the tab can draw an axis of it."""
    from compress.curves import as_number, overrides

    chosen = {key: result[key] for key in ("method", "model", "task", "metric") if result.get(key)}
    for key, value in overrides(result).items():
        number = as_number(value)
        chosen[key.removeprefix("technique.")] = value if number is None else number
    return {**chosen, "seed": result["seed"]}


def overlay(folder: Path, rows: list[Row], labels: list[str]) -> None:
    """``tensorboard/`` of a sweep: its jobs' runs under short names, and the charts that overlay them.

    tensorboard --logdir multirun/2026-01-31/12-00-00/tensorboard
    """
    from torch.utils.tensorboard import SummaryWriter

    names: list[str] = []
    for one, label in zip(rows, labels):
        name = re.sub(r"[^\w+.= -]+", "-", label)[:LONGEST]
        names.append(f"{name} ({len(names)})" if name in names else name)
        into = folder / "tensorboard" / names[-1]
        shutil.rmtree(into, ignore_errors=True)
        job = Path(one["folder"]) / "tensorboard"
        if job.is_dir() and not is_baseline_of_another(one, rows):
            shutil.copytree(job, into)
        else:
            write(into, one, "SUCCESS" if one["status"] == "completed" else "FAILURE")
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        writer.add_custom_scalars(LAYOUT)


def is_baseline_of_another(one: Row, rows: list[Row]) -> bool:
    """Whether the row was measured in the job of another row, whose figures are the job's."""
    return any(other["folder"] == one["folder"] for other in rows[rows.index(one) + 1 :])
