"""Collect what a row of the page unfolds to, as far as the folder of its job keeps it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.planning.recorded import format_repeat_command
from compress.reporting import jobs
from compress.reporting.folder import ARTIFACT
from compress.reporting.rows import TEXTS

if TYPE_CHECKING:
    from compress.measuring.predictions import Predictions
    from compress.reporting.rows import Row


CURVES = ("train/loss", "validation/loss")
MOST_POINTS = 60
"""Points of a curve that a small plot shows."""
MOST_SLICES = 6


def describe_row(row: Row, last: bool) -> dict[str, Any]:
    """Return the parts that a row unfolds to by name; a part that is not kept is empty.

    Args:
        last: whether the row is the last of its job, whose chain the job's artifact and curves are of.
    """
    job = Path(row.get("folder") or ".")
    done = row["status"] == "completed"
    pair = load_predictions(job, row) if done and row.get("folder") else None
    own = done and bool(row.get("folder")) and (last or row["method"] == "none")
    return {
        "reason": row.get("reason") or "",
        "effect": row.get("effect") or "",
        "limits": [part for part in (row.get("limits") or "").split(" | ") if part],
        "stages": list_stages(job, row["method"] == "none") if own else [],
        "slices": list_worst_slices(*pair, row["metric"]) if pair else [],
        "answers": describe_changed_answers(job, *pair) if pair else None,
        "settings": list(row["overrides"]),
        "command": format_repeat_command(job) if row.get("folder") else "",
        "config": read_text(job / jobs.CONFIG) if row.get("folder") else "",
        "data": row.get("data") or "",
        "folder": job.name if row.get("folder") else "",
    }


def read_text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def list_stages(job: Path, baseline: bool) -> list[dict[str, Any]]:
    """Return the steps of a job's artifact, each with its settings, its losses and the curves of its training.

    Args:
        baseline: whether the row is the baseline's, which is the first step of every artifact.
    """
    file = job / ARTIFACT / "compress.json"
    if not file.is_file():
        return []
    history = json.loads(file.read_text(encoding="utf-8"))["history"]
    return [
        {
            "name": done["name"],
            "seconds": done["seconds"],
            "trained": done["trained"],
            "shrinks": done["shrinks"],
            "losses": done["losses"],
            "settings": flatten_settings(done["settings"]),
            "curves": read_curves(job / "tensorboard", number) if done["trained"] else {},
        }
        for number, done in enumerate(history[:1] if baseline else history)
    ]


def flatten_settings(settings: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Return the settings that are set as pairs of a dotted name and a text."""
    pairs = []
    for key, value in settings.items():
        if isinstance(value, dict):
            pairs += flatten_settings(value, f"{prefix}{key}.")
        elif value is not None and f"{prefix}{key}" != "stage":
            pairs.append([f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)])
    return pairs


def read_curves(folder: Path, number: int) -> dict[str, list[list[float]]]:
    """Return the losses of a step's training as ``[step, value]``, read from the event files of TensorBoard."""
    files = sorted(file for stage in folder.glob(f"{number}_*") for file in stage.glob("events*"))
    if not files:
        return {}
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    curves: dict[str, list[list[float]]] = {}
    for file in files:  # by its path, because the job's own files may be hidden from TensorBoard
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag in CURVES and value.tensor.float_val:
                    curves.setdefault(value.tag, []).append([event.step, value.tensor.float_val[0]])
    return {tag: thin_points(points) for tag, points in curves.items() if len(points) > 1}


def thin_points(points: list[list[float]]) -> list[list[float]]:
    """Return at most :data:`MOST_POINTS` of the points, evenly spread, with the first and the last."""
    steps = max(1, min(len(points), MOST_POINTS) - 1)
    return [points[round(i * (len(points) - 1) / steps)] for i in range(steps + 1)]


def list_worst_slices(before: Predictions, after: Predictions, metric: str) -> list[dict[str, Any]]:
    """Return the slices that lost most, of those with a p-value."""
    from compress.measuring.predictions import list_losing_slices

    tested = [each for each in list_losing_slices(before, after, metric) if each.p_value is not None]
    return [asdict(each) for each in tested[:MOST_SLICES]]


def load_predictions(job: Path, row: Row) -> tuple[Predictions, Predictions] | None:
    """Return the predictions of the baseline and of the row; None for a baseline, and if they are not kept."""
    from compress.measuring.predictions import Predictions

    before, after = job / "predictions" / "0.npz", job / (row.get("predictions") or "lost")
    if before == after or not (before.is_file() and after.is_file()):
        return None
    return Predictions.load(before), Predictions.load(after)


def describe_changed_answers(job: Path, before: Predictions, after: Predictions) -> dict[str, Any] | None:
    """Return how many answers differ from the baseline's, and the first of them with their texts where these are kept;
    None without labels with names."""
    from compress.measuring.changes import list_changed_answers

    changed = list_changed_answers(before, after)
    if changed is None:
        return None
    texts = json.loads(read_text(job / TEXTS) or "{}")
    shown = [{**asdict(answer), "text": texts.get(str(answer.number), "")} for answer in changed.shown]
    return {**asdict(changed), "shown": shown}
