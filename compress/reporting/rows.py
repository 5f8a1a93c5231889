"""What came of jobs, as rows: one for everything that was measured, written to ``result.json`` and gathered from it.

Importing this module is cheap: Hydra does so before every job.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.artifacts.artifact import Description
    from compress.exporting.agreement import Agreement
    from compress.measuring.measure import Measurement
    from compress.measuring.predictions import Predictions


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

    ``baseline`` is the address of the baseline: rows of one address are measurements of one artifact. ``data`` is the
    fingerprint of the task's splits, and ``agreements`` are of exports with what the stage before has left.
    """

    primary: str
    descriptions: dict[str, Description]
    measurements: dict[str, Measurement]
    baseline: str = ""
    predictions: dict[str, Predictions] = field(default_factory=dict)
    agreements: dict[str, Agreement] = field(default_factory=dict)
    data: str = ""


Row = dict[str, Any]


def collect_rows(folder: Path, job: Job, outcome: Outcome) -> list[Row]:
    """A row for everything that was measured, its predictions kept in ``folder``."""
    rows = []
    for number, method in enumerate(outcome.measurements):
        one = {**build_row(job, method, outcome), "folder": str(folder)}
        if method in outcome.predictions:
            one["predictions"] = f"predictions/{number}.npz"
            outcome.predictions[method].save(folder / one["predictions"])
        rows.append(one)
    return rows


def build_row(job: Job, method: str, outcome: Outcome) -> Row:
    """One line of ``results.csv``. Times are seconds or milliseconds as named, sizes and memory are 10^6 bytes, quality
    is in fractions (perplexity apart); ``change`` is the primary metric less the baseline's."""
    from compress.measuring.effects import describe_effects, is_only_sparser
    from compress.measuring.predictions import find_worst_slice

    description, measured = outcome.descriptions[method], outcome.measurements[method]
    baseline = next(iter(outcome.measurements.values()))
    compared = measured is not baseline
    quality, change = measured.quality, measured.comparison
    agreement = outcome.agreements.get(method)
    did = describe_effects(description, measured, baseline) if compared else {}
    zeros = "dense zeros: " if compared and is_only_sparser(description, measured, baseline) else ""
    writing, memory, work = measured.generation, measured.memory, measured.work
    teachers = [
        one.quality[outcome.primary] for name, one in outcome.measurements.items() if name.startswith("teacher")
    ]
    taught = compared and not method.startswith("teacher") and teachers
    answered, before = outcome.predictions.get(method), next(iter(outcome.predictions.values()), None)
    lost = find_worst_slice(before, answered, outcome.primary) if compared and before and answered else None
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
        "change_low": change.change.low if change else None,
        "change_high": change.change.high if change else None,
        "p_value": change.p_value if change else None,
        "churn": change.churn if change else None,
        "against_teacher": quality[outcome.primary] - teachers[0] if taught else None,
        "worst_slice": lost.name if lost else None,
        "worst_slice_change": lost.change if lost else None,
        "worst_slice_p_holm": lost.p_value if lost else None,
        **quality,
        "compression_ratio": baseline.size_bytes / measured.size_bytes,
        "label_agreement": agreement.label_agreement if agreement else None,
        "max_logit_difference": agreement.max_logit_difference if agreement else None,
        **interval_columns("speedup", measured.speedup),
        **interval_columns("speedup_same_runtime", measured.speedup_same_runtime),
        "effect": zeros + ", ".join(did.values()),
        **{f"effect_{name}": said for name, said in did.items()},
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
        "first_token_ms": writing.first_token.median_ms if writing else None,
        "per_token_ms": writing.per_token.median_ms if writing else None,
        "per_token_p95_ms": writing.per_token.p95_ms if writing else None,
        "prompt_tokens": writing.prompt_tokens if writing else None,
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


def interval_columns(name: str, one: Any) -> dict[str, float | None]:
    """An interval as three columns."""
    parts = {"": "value", "_low": "low", "_high": "high"}
    return {f"{name}{end}": getattr(one, part) if one else None for end, part in parts.items()}


def build_failed_row(job: Job, reason: str) -> Row:
    return {**asdict(job), "overrides": " ".join(job.overrides), "status": "failed", "reason": reason}


def correct_p_values(rows: list[Row]) -> list[Row]:
    """The rows with ``p_holm``, their p-values corrected for being tested together."""
    from compress.maths.statistics import holm

    tested = [i for i, one in enumerate(rows) if one.get("p_value") is not None]
    fair = dict(zip(tested, holm([rows[i]["p_value"] for i in tested])))
    return [{**one, "p_holm": fair[i]} if i in fair else one for i, one in enumerate(rows)]


def drop_repeated_baselines(rows: list[Row]) -> list[Row]:
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


def group_rows(rows: list[Row]) -> dict[tuple[str, ...], list[Row]]:
    """The completed rows that can be compared: of one model, task and metric."""
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for one in rows:
        if one["status"] == "completed":
            found[one["model"], one["task"], one["metric"]].append(one)
    return dict(found)


def is_smaller(one: Row) -> bool:
    return bool(one["compression_ratio"] > 1.005)


def is_faster(one: Row) -> bool:
    """Beyond chance."""
    return one["speedup_low"] is not None and one["speedup_low"] > 1


def is_near_baseline(one: Row) -> bool:
    return quality_drop(one) <= 1 + 1e-7


def quality_drop(one: Row) -> float:
    """What is lost of the baseline's quality: points, of a perplexity percent."""
    perplexity = one["metric"] == "perplexity"
    return float(100 * (one["change"] / (one["value"] - one["change"]) if perplexity else -one["change"]))


def is_significant(one: Row) -> bool:
    """Whether the quality differs from the baseline's by more than chance, of all rows that were tested together."""
    return (one.get("p_holm") if one.get("p_holm") is not None else 1.0) < 0.05
