"""Define the columns of the page's table, which are the axes of its plot too."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.reporting.rows import is_bound, is_perplexity, is_significant, is_undefined
from compress.reporting.tables import format_rate

if TYPE_CHECKING:
    from compress.reporting.rows import Row


SHARES = ("change", "churn", "against_teacher", "worst_slice_change")
"""Columns of fractions that are shown as percent or points."""
COMPARED = ("change", "compression_ratio", "compression_time_s")
"""Columns that have no cell in a baseline's row, which would compare it with itself."""


@dataclass(frozen=True)
class Column:
    """A column of the table.

    ``name`` is the heading, ``form`` the format of a cell and ``key`` the row's value to show and sort by. ``ends`` are
    the keys of its interval. A column with an ``axis``, the title there, can be plotted; ``more`` is true where more is
    better.
    """

    name: str
    form: str | Callable[[Any], str]
    key: str
    ends: tuple[str, str] | None = None
    axis: str = ""
    more: bool = False

    def format_cell(self, row: Row) -> str:
        """Return the text of a completed row's cell, with its interval; empty without a value."""
        if row.get(self.key) is None or (self.key in COMPARED and row["method"] == "none"):
            return ""
        if self.key in ("value", "change") and math.isnan(row[self.key]):
            return "undefined"
        show = self.form.format if isinstance(self.form, str) else self.form
        shown = show(scale_value(row, self.key))
        if self.ends and row.get(self.ends[0]) is not None:
            low, high = (show(scale_value(row, end, self.key)) for end in self.ends)
            shown += f" [{low}, {high}]"
        less = "< " * (self.key == "p_holm" and is_bound(row))
        return less + shown + "*" * (self.key == "change" and is_significant(row))

    def read_point(self, row: Row) -> list[float] | None:
        """Return the place of a row on the axis, and the ends of its interval if it has one; None without a value.

        A baseline is as fast as itself.
        """
        if self.key == "speedup" and row["method"] == "none":
            return [1.0]
        if row.get(self.key) is None or math.isnan(row[self.key]):
            return None
        ends = self.ends if self.ends and row.get(self.ends[0]) is not None else ()
        return [scale_value(row, self.key), *(scale_value(row, end, self.key) for end in ends)]


QUALITY_AND_COST = (
    Column("change [95%]", "{:+.2f}", "change", ("change_low", "change_high"), "change of the metric, points", True),
    Column("p (Holm)", "{:.2g}", "p_holm"),
    Column("churn, %", "{:.1f}", "churn", axis="changed answers, %"),
    Column("to teacher", "{:+.2f}", "against_teacher"),
    Column("MB", "{:.2f}", "size_mb", axis="size, MB"),
    Column("smaller", "{:.2f}x", "compression_ratio", axis="times smaller than the baseline", more=True),
    Column("ms [95%]", "{:.2f}", "latency_ms", ("latency_low_ms", "latency_high_ms"), "latency, ms"),
    Column(
        "faster [95%]",
        "{:.2f}",
        "speedup",
        ("speedup_low", "speedup_high"),
        "times faster than the baseline",
        True,
    ),
    Column("texts/s", format_rate, "throughput_per_s", axis="texts per second", more=True),
    Column("memory, MB", "{:,.1f}", "model_memory_mb", axis="memory to load and run, MB"),
    Column("compress s", "{:.1f}", "compression_time_s", axis="time to compress, s"),
)
DETAILS = (
    Column(
        "in its runtime [95%]",
        "{:.2f}",
        "speedup_same_runtime",
        ("speedup_same_runtime_low", "speedup_same_runtime_high"),
        "times faster than the baseline in the same runtime",
        True,
    ),
    Column("mean ms", "{:.2f}", "latency_mean_ms"),
    Column("sd", "{:.2f}", "latency_sd_ms"),
    Column("p95", "{:.2f}", "latency_p95_ms", axis="latency, 95th percentile, ms"),
    Column("p99", "{:.2f}", "latency_p99_ms"),
    Column("CPU ms", "{:.2f}", "cpu_ms", axis="CPU time, ms"),
    Column("GPU ms", "{:.2f}", "gpu_ms", axis="GPU time, ms"),
    Column("tokenizer ms", "{:.3f}", "tokenizer_ms"),
    Column("first token ms", "{:.2f}", "first_token_ms", axis="first token, ms"),
    Column("per token ms", "{:.2f}", "per_token_ms", axis="per token, ms"),
    Column("process peak, MB", "{:,.0f}", "peak_memory_mb", axis="peak of the process, MB"),
    Column("GPU peak, MB", "{:,.0f}", "gpu_memory_mb", axis="peak on the GPU, MB"),
    Column("MACs, 10⁶", "{:,.1f}", "mmacs", axis="multiply-accumulates, 10⁶"),
    Column("J/text", "{:.3g}", "energy_j", axis="energy, J per text"),
    Column("export agrees", "{:.1%}", "label_agreement"),
    Column("logits differ by", "{:.2g}", "max_logit_difference"),
    Column("parameters", "{:,}", "parameters", axis="parameters"),
    Column("non-zeros", "{:,}", "nonzeros", axis="non-zero parameters"),
    Column("train s", "{:.1f}", "training_time_s", axis="time to train, s"),
    Column("measure s", "{:.1f}", "measuring_time_s"),
    Column("worst slice", "{}", "worst_slice"),
    Column("slice change", "{:+.1f}", "worst_slice_change"),
)


def scale_value(row: Row, key: str, of: str = "") -> Any:
    """Return a row's value as it is shown: shares of examples in percent or points.

    Args:
        of: the column that ``key`` is an end of.
    """
    return row[key] * 100 if (of or key) in SHARES and not is_perplexity(row["metric"]) else row[key]


def list_metrics(row: Row) -> list[str]:
    """Return the metrics of a completed row, the primary one first."""
    from compress.tasks.kinds import KINDS

    known = {name for kind in KINDS.values() for name in kind.metrics} | {
        key.removesuffix("_change_low")
        for key in row
        if key.endswith("_change_low")  # of tasks beside others
    }
    return list(dict.fromkeys([row["metric"], *(key for key in row if key in known and row[key] is not None)]))


def read_metric(row: Row, metric: str) -> list[float] | None:
    """Return a row's ``metric``, and if it is the primary one the interval of its change; None if it is undefined."""
    value = row.get(metric, row["value"] if metric == row["metric"] else None)
    if value is None or math.isnan(value):
        return None
    if metric != row["metric"] or is_undefined(row) or row.get("change_low") is None:
        return [value]
    before = row["value"] - row["change"]
    return [value, before + row["change_low"], before + row["change_high"]]
