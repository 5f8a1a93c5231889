"""Describe the changes between two runs or sweeps, and test which are significant."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import UserError
from compress.maths.statistics import SMALLEST_P, holm
from compress.measuring.predictions import Comparison, Predictions, compare_predictions
from compress.reporting.rows import Row, drop_repeated_baselines
from compress.reporting.tables import format_change, format_p, format_value, label_rows

if TYPE_CHECKING:
    from collections.abc import Sequence


Key = tuple[str, ...]


def describe_changes(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """Return a line for every common experiment, and a line for every other experiment.

    A line has the quality, tested on the same examples and corrected over all experiments (Holm), the size, and the
    speed, compared by both intervals.

    Raises:
        UserError: the two have no experiment in common.
    """
    old, new = index_rows(before), index_rows(after)
    if len(old) == len(new) == 1:  # two single runs are compared whatever their names
        new = dict(zip(old, new.values()))
    common = [key for key in old if key in new]
    if not common:
        raise UserError(
            "The two have no experiment in common. Compare runs or sweeps of the same model, task, seed and technique, "
            "or two single runs."
        )
    names = dict(zip(common, label_rows([new[key] for key in common])))
    tested = {key: comparison for key in common if (comparison := compare_quality(old[key], new[key]))}
    p_values = {key: comparison.p_value for key, comparison in tested.items() if comparison.p_value is not None}
    fair = dict(zip(p_values, holm(list(p_values.values()))))
    lines = [
        f"{names[key]}: " + "; ".join((describe_quality(old[key], new[key], tested.get(key), fair.get(key)),
                                       describe_size(old[key], new[key]), describe_speed(old[key], new[key])))
        for key in common
    ]  # fmt: skip
    alone = [key for key in (*old, *new) if key not in common]
    return [*lines, *(f"only in {'the first' if key in old else 'the second'}: {' '.join(key)}" for key in alone)]


def index_rows(rows: Sequence[Row]) -> dict[Key, Row]:
    """Return the completed rows by their settings, without baselines unless there are no other rows."""
    done = [row for row in drop_repeated_baselines(list(rows)) if row["status"] == "completed"]
    chosen = [row for row in done if row["method"] != "none"] or done
    columns = ("model", "task", "metric", "method", "seed")
    return {(*(str(row[column]) for column in columns if str(row[column])), *row["overrides"]): row for row in chosen}


def compare_quality(old: Row, new: Row) -> Comparison | None:
    """Compare the predictions on the same examples. Return None if either has none or if the metrics differ."""
    before, after = (Path(row.get("folder", "")) / row.get("predictions", "lost") for row in (old, new))
    if not before.is_file() or not after.is_file() or old["metric"] != new["metric"]:
        return None
    return compare_predictions(Predictions.load(before), Predictions.load(after), new["metric"])


def describe_quality(old: Row, new: Row, comparison: Comparison | None, p_value: float | None) -> str:
    shift = f"{new['metric']} {format_value(old)} -> {format_value(new)}"
    if comparison is None:
        return f"{shift}, not tested: the examples differ or predictions are missing"
    if comparison.p_value is None or p_value is None:
        return f"{shift}, not tested: the metric is undefined or there is a single example"
    interval = comparison.change
    change, low, high = (format_change(new, value) for value in (interval.value, interval.low, interval.high))
    p = format_p(p_value, comparison.p_value <= SMALLEST_P)
    return f"{shift} ({change} [{low}, {high}], {'' if p_value < 0.05 else 'not '}significant, {p})"


def describe_size(old: Row, new: Row) -> str:
    same = abs(new["size_mb"] - old["size_mb"]) < 0.005 * old["size_mb"]
    return "same size" if same else f"{old['size_mb']:.2f} -> {new['size_mb']:.2f} MB"


def describe_speed(old: Row, new: Row) -> str:
    """Compare the speed-ups over their own baselines, which cancel out the machine. Without them, compare latencies."""
    timed = old["speedup"] is not None and new["speedup"] is not None
    name, unit = ("speedup", "x of the baseline's speed") if timed else ("latency", " ms")
    key, low, high = (
        (name, f"{name}_low", f"{name}_high") if timed else ("latency_ms", "latency_low_ms", "latency_high_ms")
    )
    if old[low] is None or (old[low] <= new[high] and new[low] <= old[high]):
        return "same speed within the intervals"
    return f"{old[key]:.2f} -> {new[key]:.2f}{unit}, beyond both intervals"
