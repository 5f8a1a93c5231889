"""What changed from one run or sweep to another, and which of it is more than chance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import UserError
from compress.maths.statistics import holm
from compress.measuring.predictions import Comparison, Predictions, compare_predictions
from compress.reporting.rows import Row, drop_repeated_baselines
from compress.reporting.tables import format_change, label_rows

if TYPE_CHECKING:
    from collections.abc import Sequence


Key = tuple[str, ...]


def describe_changes(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """A line for every experiment that both have: its quality, tested on the same examples and corrected for how many
    experiments there are (Holm), its size, and its speed by the intervals of both.

    Raises:
        UserError: they have no experiment in common.
    """
    old, new = index_rows(before), index_rows(after)
    if len(old) == len(new) == 1:  # whatever they are called
        new = dict(zip(old, new.values()))
    common = [key for key in old if key in new]
    if not common:
        raise UserError(
            "The two have no experiment in common: compare runs or sweeps of the same model, task, seed and technique, "
            "or one run with another."
        )
    names = dict(zip(common, label_rows([new[key] for key in common])))
    tested = {key: found for key in common if (found := compare_quality(old[key], new[key]))}
    fair = dict(zip(tested, holm([one.p_value for one in tested.values()])))
    lines = [
        f"{names[key]}: " + "; ".join((describe_quality(old[key], new[key], tested.get(key), fair.get(key)),
                                       describe_size(old[key], new[key]), describe_speed(old[key], new[key])))
        for key in common
    ]  # fmt: skip
    alone = [key for key in (*old, *new) if key not in common]
    return [*lines, *(f"only in {'the first' if key in old else 'the second'}: {' '.join(key)}" for key in alone)]


def index_rows(rows: Sequence[Row]) -> dict[Key, Row]:
    """The completed rows that are compared with a baseline, by what was asked for; the baselines where there is no
    other row."""
    done = [one for one in drop_repeated_baselines(list(rows)) if one["status"] == "completed"]
    chosen = [one for one in done if one["method"] != "none"] or done
    columns = ("model", "task", "metric", "method", "seed", "overrides")
    return {tuple(str(one[column]) for column in columns if str(one[column])): one for one in chosen}


def compare_quality(old: Row, new: Row) -> Comparison | None:
    """The comparison on the same examples, where both kept what they answered."""
    before, after = (Path(one.get("folder", "")) / one.get("predictions", "lost") for one in (old, new))
    if not before.is_file() or not after.is_file() or old["metric"] != new["metric"]:
        return None
    return compare_predictions(Predictions.load(before), Predictions.load(after), new["metric"])


def describe_quality(old: Row, new: Row, found: Comparison | None, p_value: float | None) -> str:
    shift = f"{new['metric']} {old['value']:.4f} -> {new['value']:.4f}"
    if found is None or p_value is None:
        return f"{shift}, which cannot be tested: the examples differ, or predictions are lost"
    change, low, high = (format_change(new, x) for x in (found.change.value, found.change.low, found.change.high))
    return f"{shift} ({change} [{low}, {high}], {'' if p_value < 0.05 else 'not '}significant, p = {p_value:.2g})"


def describe_size(old: Row, new: Row) -> str:
    same = abs(new["size_mb"] - old["size_mb"]) < 0.005 * old["size_mb"]
    return "same size" if same else f"{old['size_mb']:.2f} -> {new['size_mb']:.2f} MB"


def describe_speed(old: Row, new: Row) -> str:
    """By the speed-ups over their own baselines, which allow for the machine; else by the latencies."""
    timed = old["speedup"] is not None and new["speedup"] is not None
    name, unit = ("speedup", "x of the baseline's speed") if timed else ("latency", " ms")
    key, low, high = (
        (name, f"{name}_low", f"{name}_high") if timed else ("latency_ms", "latency_low_ms", "latency_high_ms")
    )
    if old[low] is None or (old[low] <= new[high] and new[low] <= old[high]):
        return "same speed, as far as the intervals tell"
    return f"{old[key]:.2f} -> {new[key]:.2f}{unit}, beyond both intervals"
