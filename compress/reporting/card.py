"""Write the model card of an artifact: its steps, its figures, its limits and how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from omegaconf import OmegaConf

from compress.artifacts.artifact import Description
from compress.measuring.measure import Measurement
from compress.reporting.findings import format_markdown, recommend_rows
from compress.reporting.rows import Job, Outcome, build_row
from compress.runtimes.torch import FORMATS
from compress.tasks.kinds import KINDS

LOAD = """\
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
logits = model(**tokenizer("A text.", return_tensors="pt")).logits
"""
LOAD_UNEVEN = """\
import compress

model, tokenizer, _ = compress.load("{folder}")
logits = model(**tokenizer("A text.", return_tensors="pt")).logits
"""
LOAD_ONNX = """\
import onnxruntime
from transformers import AutoTokenizer

session = onnxruntime.InferenceSession("{folder}/model.onnx")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
(logits,) = session.run(["logits"], dict(tokenizer("A text.", return_tensors="np")))
"""
LOAD_ONNX_LM = """\
import onnxruntime
from transformers import AutoTokenizer

onnxruntime.set_default_logger_severity(3)  # it warns about every optional input
session = onnxruntime.InferenceSession("{folder}/model.onnx")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
tokens = dict(tokenizer("A text.", return_tensors="np"))
(logits,) = session.run(["logits"], tokens)  # `compress.load` generates text with a cache of keys and values:
# model, tokenizer, _ = compress.load("{folder}")
# tokenizer.decode(model.generate(**tokenizer("A text.", return_tensors="pt"), max_new_tokens=20)[0])
"""
LOAD_OPENVINO = """\
import json

import openvino
from transformers import AutoTokenizer

settings = json.load(open("{folder}/compile.json"))
model = openvino.compile_model("{folder}/openvino_model.xml", "CPU", settings)
tokenizer = AutoTokenizer.from_pretrained("{folder}")
logits = model(dict(tokenizer("A text.", return_tensors="np")))["logits"]
"""


def write_card(folder: Path, outcome: Outcome, method: str) -> None:
    """Write ``README.md`` into the artifact, in the form that the hub reads."""
    # 1) Choose the text on how to load it
    description, measured = outcome.descriptions[method], outcome.measurements[method]
    kind = KINDS[description.kind]
    job = Job(method, description.model, description.task, seed=0)
    rows = [build_row(job, name, outcome) for name in outcome.measurements]
    config = json.loads((folder / "config.json").read_text())
    uneven = "compress" in config
    ours = "\nA plain transformers config cannot describe its blocks: config.json has their shapes under `compress`.\n"
    form = config.get("quantization_config", {}).get("quant_method")
    packed = f"\nIts weights are in the {form} format: `pip install {' '.join(FORMATS.get(form, ()))}`.\n"
    onnx = LOAD_ONNX_LM if kind.generates else LOAD_ONNX
    loads = {"onnxruntime": onnx, "openvino": LOAD_OPENVINO}.get(description.runtime, LOAD_UNEVEN if uneven else LOAD)
    # 2) Write the card
    lines = [
        "---",
        format_front_matter(folder, description, measured),
        "---",
        "",
        f"# {description.model} on {description.task}: {method}",
        "",
        "| step | time, s | settings |",
        "|---|---|---|",
        *(f"| {done.name} | {done.seconds:.1f} | {format_settings(done.settings)} |" for done in description.history),
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
        *(["## Limits", "", *(f"- {limit}" for limit in description.limits), ""] if description.limits else ()),
        "## Load it with `compress`" if uneven else "## Load it without `compress`",
        ours if uneven else "",
        packed if form in FORMATS else "",
        "```python",
        loads.format(auto=kind.auto_class, folder=".") + "```",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines))


def format_front_matter(folder: Path, description: Description, measured: Measurement) -> str:
    """Return the metadata that the hub reads: library, task, and the metrics as a model-index.

    The base model and the data set are named only if they are on the hub.
    """
    pipeline = KINDS[description.kind].pipeline
    library = "transformers" if description.runtime == "torch" else description.weights
    config = OmegaConf.load(folder / "config.yaml") if (folder / "config.yaml").is_file() else OmegaConf.create()
    path = OmegaConf.select(config, "model.path")
    base = str(path) if path and not Path(path).exists() else None
    hub = None if OmegaConf.select(config, "task.path") else OmegaConf.select(config, "task.hub")
    data: dict[str, Any] = {
        "dataset_type": hub.id if hub else description.task,
        "dataset_name": description.task,
        "dataset_config": hub.get("config") if hub else None,
        "dataset_split": hub.get(measured.split) if hub else measured.split,
    }
    results = [
        EvalResult(task_type=pipeline, **data, metric_type=name, metric_name=name, metric_value=round(value, 6))
        for name, value in measured.quality.items()
    ]
    return ModelCardData(
        base_model=base,
        datasets=[hub.id] if hub else None,
        library_name=library,
        pipeline_tag=pipeline,
        tags=["compress"],
        metrics=list(measured.quality),
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


def format_settings(values: dict) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items() if key not in ("stage", "train"))
