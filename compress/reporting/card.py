"""Write the model card of an artifact: its steps, its figures, its limits and how to load it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from omegaconf import OmegaConf

from compress.artifacts.artifact import Description, Done
from compress.cache.files import write_atomically
from compress.measuring.measure import Measurement
from compress.reporting.escaping import escape_markdown, make_rows_printable
from compress.reporting.findings import format_markdown, recommend_rows
from compress.reporting.rows import Job, Outcome, build_row
from compress.runtimes.runtime import import_runtime
from compress.tasks.kinds import KINDS

HOLDS = {
    "any": "Its sums of 8-bit products are exact on every processor.",
    "vnni": "Its answers hold where there is VNNI (or Arm's dot products): sums of 8-bit products saturate elsewhere.",
}
"""Where an export answers as it was measured, by the processors that it was made for."""


def write_card(folder: Path, outcome: Outcome, method: str) -> None:
    """Write ``README.md`` into the artifact, in the form that the hub reads."""
    # 1) Choose the text on how to load it
    description, measured = outcome.descriptions[method], outcome.measurements[method]
    job = Job(method, description.model, description.task, seed=0)
    rows = make_rows_printable([build_row(job, name, outcome) for name in outcome.measurements])
    loading = import_runtime(description.runtime).describe_loading(folder, description.kind)
    config = folder / "config.json"
    stored = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    outputs = KINDS[description.kind].describe_outputs(stored)
    # 2) Write the card
    lines = [
        "---",
        format_front_matter(folder, description, measured),
        "---",
        "",
        f"# {escape_markdown(f'{description.model} on {description.task}: {method}')}",
        "",
        "| step | time, s | settings |",
        "|---|---|---|",
        *(
            f"| {escape_markdown(done.name)} | {done.seconds:.1f} | {escape_markdown(format_settings(done))} |"
            for done in description.history
        ),
        "",
        "## Measured",
        "",
        *format_markdown(rows, recommend_rows(rows)).splitlines()[2:],
        "",
        f"Quality is measured on the {measured.examples:,} examples of the {measured.split} split, which were not used "
        f"for calibration{' or model selection' if measured.split == 'test' else ''}.",
        "Latency is the median time of one text, timed in turns with the baseline.",
        *describe_cost(measured),
        "",
        *([HOLDS[description.processor], ""] if description.processor else ()),
        *(
            ["## Limits", "", *(f"- {escape_markdown(limit)}" for limit in description.limits), ""]
            if description.limits
            else ()
        ),
        f"## Load it {'with' if loading.needs_us else 'without'} `compress`",
        "",
        *(line for note in (*loading.notes, *outputs) for line in (note, "")),
        "```python",
        loading.code + "```",
        "",
    ]
    write_atomically(folder / "README.md", "\n".join(lines))


def format_front_matter(folder: Path, description: Description, measured: Measurement) -> str:
    """Return the metadata that the hub reads: library, task, and the metrics as a model-index.

    The base model and the data set are named only if they are on the hub.
    """
    pipeline = KINDS[description.kind].pipeline
    file = folder / "config.yaml"
    config: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False) if file.is_file() else {}
    path, task = (config.get("model") or {}).get("path"), config.get("task") or {}
    base = str(path) if path and not Path(path).exists() else None
    hub = None if task.get("path") else task.get("hub")
    data: dict[str, Any] = {
        "dataset_type": hub["id"] if hub else description.task,
        "dataset_name": description.task,
        "dataset_config": hub.get("config") if hub else None,
        "dataset_split": hub.get(measured.split) if hub else measured.split,
    }
    results = [
        EvalResult(task_type=pipeline, **data, metric_type=name, metric_name=name, metric_value=round(value, 6))
        for name, value in measured.quality.items()
        if not math.isnan(value)
    ]
    return ModelCardData(
        base_model=base,
        datasets=[hub["id"]] if hub else None,
        library_name=import_runtime(description.runtime).LIBRARY,
        pipeline_tag=pipeline,
        tags=["compress"],
        metrics=[result.metric_type for result in results],
        model_name=f"{description.model}-{description.task}-{description.method}",
        eval_results=results,
    ).to_yaml()


def describe_cost(measured: Measurement) -> Iterator[str]:
    """Yield sentences on the other costs that were measured."""
    yield (
        f"One text: {measured.latency.median_ms:.2f} ms (p95 {measured.latency.p95_ms:.2f}, p99 "
        f"{measured.latency.p99_ms:.2f}) on {measured.device}, {measured.threads} threads."
    )
    if generation := measured.generation:
        yield (
            f"After a prompt of {generation.prompt_tokens} tokens, the first new token took "
            f"{generation.first_token.median_ms:.2f} ms and each later token {generation.per_token.median_ms:.2f} ms."
        )
    if measured.memory:
        yield f"Loading and running it took {measured.memory.model_bytes / 1e6:.1f} MB of memory besides the libraries."


def format_settings(done: Done) -> str:
    settings = {key: value for key, value in done.settings.items() if key not in ("stage", "train")}
    if done.trained_parameters is not None:
        settings["trained_parameters"] = done.trained_parameters
    return ", ".join(f"{key}={value}" for key, value in settings.items())
