"""Build the rows of results: a row for every measured artifact.

Imports of heavy libraries are local, because Hydra imports this module before every job.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cache.files import write_atomically

if TYPE_CHECKING:
    from compress.artifacts.artifact import Description
    from compress.exporting.agreement import Agreement
    from compress.measuring.measure import Measurement
    from compress.measuring.predictions import Predictions


@dataclass(frozen=True)
class Job:
    """The job that the command line requested."""

    method: str
    model: str
    task: str
    seed: int
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The results of a job by method: the baseline first, then the artifacts that are compared with it.

    ``baseline`` is the address of the baseline's artifact; rows with the same address measure the same artifact.
    ``data`` is the fingerprint of the task's splits. ``agreements`` compare each export with the model before it.
    ``texts`` are those of the measured split, of which examples with changed answers are quoted.
    """

    primary: str
    descriptions: dict[str, Description]
    measurements: dict[str, Measurement]
    baseline: str = ""
    predictions: dict[str, Predictions] = field(default_factory=dict)
    agreements: dict[str, Agreement] = field(default_factory=dict)
    data: str = ""
    texts: list[str] = field(default_factory=list)


Row = dict[str, Any]
TEXTS = "predictions/texts.json"
"""The file of the quoted texts in a job's folder, by their numbers in the split."""


def collect_rows(folder: Path, job: Job, outcome: Outcome, home: Path | None = None) -> list[Row]:
    """Return a row for every measurement, and save the predictions in ``folder``.

    Args:
        home: the folder that the predictions will be in, if it is another.
    """
    rows = []
    for number, method in enumerate(outcome.measurements):
        row = {**build_row(job, method, outcome), "folder": str(home or folder)}
        if method in outcome.predictions:
            row["predictions"] = f"predictions/{number}.npz"
            outcome.predictions[method].save(folder / row["predictions"])
        rows.append(row)
    quote_texts(folder / TEXTS, outcome)
    return rows


def quote_texts(file: Path, outcome: Outcome) -> None:
    """Write the texts of the examples whose changed answers the page shows; nothing if there are none."""
    from compress.measuring.changes import quote_changed_texts

    if outcome.texts and outcome.predictions:
        before, *variants = outcome.predictions.values()
        if quoted := quote_changed_texts(before, variants, outcome.texts):
            write_atomically(file, json.dumps(quoted, indent=2, ensure_ascii=False))


def build_row(job: Job, method: str, outcome: Outcome) -> Row:
    """Return a line of ``results.csv``.

    Times are seconds or milliseconds as named, sizes and memory 10^6 bytes, quality fractions (except perplexity).
    ``change`` is the primary metric minus the baseline's. An undefined metric is NaN, without an interval or p-value.
    """
    from compress.measuring.effects import describe_effects, is_only_sparser
    from compress.measuring.predictions import compare_tasks, find_worst_slice

    # 1) Compare with the baseline
    description, measured = outcome.descriptions[method], outcome.measurements[method]
    baseline = next(iter(outcome.measurements.values()))
    compared = measured is not baseline
    quality, comparison = measured.quality, measured.comparison
    agreement = outcome.agreements.get(method)
    effects = describe_effects(description, measured, baseline) if compared else {}
    zeros = "dense zeros: " if compared and is_only_sparser(description, measured, baseline) else ""
    generation, memory, work = measured.generation, measured.memory, measured.work
    teachers = [
        other.quality[outcome.primary] for name, other in outcome.measurements.items() if name.startswith("teacher")
    ]
    taught = compared and not method.startswith("teacher") and teachers
    before, after = next(iter(outcome.predictions.values()), None), outcome.predictions.get(method)
    worst = find_worst_slice(before, after, outcome.primary) if compared and before and after else None
    tasks = compare_tasks(before, after) if compared and before and after else {}
    # 2) Lay out the columns
    return {
        "method": method,
        "size_mb": measured.size_bytes / 1e6,
        "latency_ms": measured.latency.median_ms,
        "accuracy": quality.get("accuracy", quality.get("subset_accuracy")),
        "training_time_s": description.training_time_s,
        "model": job.model,
        "task": job.task,
        "seed": job.seed,
        "overrides": list(job.overrides),
        "status": "completed",
        "reason": "",
        "metric": outcome.primary,
        "value": quality[outcome.primary],
        "change": quality[outcome.primary] - baseline.quality[outcome.primary],
        "change_low": drop_undefined(comparison.change.low) if comparison else None,
        "change_high": drop_undefined(comparison.change.high) if comparison else None,
        "p_value": comparison.p_value if comparison else None,
        "churn": comparison.churn if comparison else None,
        "against_teacher": quality[outcome.primary] - teachers[0] if taught else None,
        "worst_slice": worst.name if worst else None,
        "worst_slice_change": worst.change if worst else None,
        "worst_slice_p_holm": worst.p_value if worst else None,
        **quality,
        **{
            f"{name}_{key}": value
            for name, each in tasks.items()
            for key, value in (*interval_columns("change", each.change).items(), ("p_holm", each.p_value))
        },
        "compression_ratio": baseline.size_bytes / measured.size_bytes,
        "label_agreement": agreement.label_agreement if agreement else None,
        "max_logit_difference": agreement.max_logit_difference if agreement else None,
        **interval_columns("speedup", measured.speedup),
        **interval_columns("speedup_same_runtime", measured.speedup_same_runtime),
        "effect": zeros + ", ".join(effects.values()),
        **{f"effect_{name}": effect for name, effect in effects.items()},
        "others_cpu": measured.others,
        "disturbed": measured.is_disturbed,
        "latency_low_ms": measured.latency.low_ms,
        "latency_high_ms": measured.latency.high_ms,
        "latency_mean_ms": measured.latency.mean_ms,
        "latency_sd_ms": measured.latency.sd_ms,
        "latency_p95_ms": measured.latency.p95_ms,
        "latency_p99_ms": measured.latency.p99_ms,
        **{f"batch_{size}_ms": spread.median_ms for size, spread in measured.batches.items()},
        "throughput_per_s": measured.throughput_per_s,
        "first_token_ms": generation.first_token.median_ms if generation else None,
        "per_token_ms": generation.per_token.median_ms if generation else None,
        "per_token_p95_ms": generation.per_token.p95_ms if generation else None,
        "prompt_tokens": generation.prompt_tokens if generation else None,
        "tokenizer_ms": measured.tokenizer_ms,
        "peak_memory_mb": memory.peak_bytes / 1e6 if memory else None,
        "model_memory_mb": memory.model_bytes / 1e6 if memory else None,
        "gpu_memory_mb": memory.gpu_bytes / 1e6 if memory and memory.gpu_bytes else None,
        "macs": measured.macs,
        "cpu_ms": work.cpu_ms if work else None,
        "gpu_ms": work.gpu_ms if work else None,
        "energy_j": work.energy_j if work else None,
        "parameters": measured.parameters,
        "nonzeros": measured.nonzeros,
        "latency_tokens": measured.latency_tokens,
        "throughput_tokens": measured.throughput_tokens,
        "compression_time_s": description.compression_time_s,
        **{f"{split}_loss": description.losses.get(split) for split in ("train", "validation")},
        "measuring_time_s": measured.measuring_time_s,
        "run_time_s": measured.measuring_time_s + sum(done.seconds for done in description.history),
        "examples": measured.examples,
        "split": measured.split,
        "runtime": measured.runtime,
        "device": measured.device,
        "threads": measured.threads,
        "limits": " | ".join(description.limits),
        "baseline": outcome.baseline,
        "data": outcome.data,
    }


def interval_columns(name: str, interval: Any) -> dict[str, float | None]:
    """Return an interval as three columns."""
    parts = {"": "value", "_low": "low", "_high": "high"}
    return {f"{name}{end}": getattr(interval, part) if interval else None for end, part in parts.items()}


def drop_undefined(value: float) -> float | None:
    return None if math.isnan(value) else value


def build_failed_row(job: Job, reason: str) -> Row:
    return {**asdict(job), "overrides": list(job.overrides), "status": "failed", "reason": reason}


def correct_p_values(rows: list[Row]) -> list[Row]:
    """Return the rows with ``p_holm``, their p-values corrected over all rows (Holm)."""
    from compress.maths.statistics import holm

    tested = [i for i, row in enumerate(rows) if row.get("p_value") is not None]
    corrected = dict(zip(tested, holm([rows[i]["p_value"] for i in tested])))
    return [{**row, "p_holm": corrected[i]} if i in corrected else row for i, row in enumerate(rows)]


def drop_repeated_baselines(rows: list[Row]) -> list[Row]:
    """Keep the first measurement of each baseline, because every job measures its baseline."""
    seen: set[str] = set()
    kept: list[Row] = []
    for row in rows:
        repeated = row.get("baseline") in seen
        if row["method"] == "none" and row.get("baseline"):
            if repeated:
                continue
            seen.add(row["baseline"])
            settings = [word for word in row["overrides"] if not word.lstrip("+").startswith("technique.")]
            row = {**row, "overrides": settings}
        kept.append(row)
    return kept


def group_rows(rows: list[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Group the completed rows that can be compared, by model, task and metric."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["status"] == "completed":
            groups[row["model"], row["task"], row["metric"]].append(row)
    return dict(groups)


def is_undefined(row: Row) -> bool:
    """Return whether the metric is undefined on the split, such as a correlation of constants."""
    return math.isnan(row["value"])


def is_smaller(row: Row) -> bool:
    return bool(row["compression_ratio"] > 1.005)


def is_faster(row: Row) -> bool:
    """Return whether the row is significantly faster than its baseline."""
    return row["speedup_low"] is not None and row["speedup_low"] > 1


def is_near_baseline(row: Row) -> bool:
    return quality_drop(row) <= 1 + 1e-7


def quality_drop(row: Row) -> float:
    """Return the loss of quality against the baseline: points, or percent of a perplexity."""
    perplexity = is_perplexity(row["metric"])
    return float(100 * (row["change"] / (row["value"] - row["change"]) if perplexity else -row["change"]))


def is_perplexity(metric: str) -> bool:
    """Return whether a metric is a perplexity, or its logarithm, whose changes are no shares of examples."""
    return metric.endswith(("perplexity", "bits_per_byte"))


def is_significant(row: Row) -> bool:
    """Return whether the quality differs significantly from the baseline's, corrected over all rows."""
    return (row.get("p_holm") if row.get("p_holm") is not None else 1.0) < 0.05


def is_bound(row: Row) -> bool:
    """Return whether the row's p-value is an upper bound, because smaller ones are not resolved."""
    from compress.maths.statistics import SMALLEST_P

    return row.get("p_value") is not None and row["p_value"] <= SMALLEST_P
