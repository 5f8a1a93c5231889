"""Run every stage on a tiny random model of every family, and write what works: `python tests/compatibility.py`.

A cell is one run of what a chain does with a stage: its check on the model's shapes, the work on a pruned model, its
promises, an artifact that is saved and reloads to the same logits. It works, or the check refuses it in a sentence.
What fails after the check is a fault, and the table is not written.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from architectures import CLASSIFIERS, DECODERS, build
from hydra.utils import get_class
from tqdm import tqdm

from compress.errors import UserError
from compress.technique import Training
from compress.testing import Case, check_promises

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"
EPOCH = Training(epochs=1, learning_rate=1e-2)
SHOT = Training()
STAGES: dict[str, tuple[str, dict[str, Any], Training]] = {
    "prune": ("prune.Prune", {"sparsity": 0.6}, SHOT),
    "prune (sparsegpt)": ("prune.Prune", {"sparsity": 0.6, "criterion": "sparsegpt", "samples": 8}, SHOT),
    "gptq": ("gptq.GPTQ", {"group_size": 16, "samples": 8}, SHOT),
    "gptq (format=gptq)": ("gptq.GPTQ", {"group_size": 16, "samples": 8, "format": "gptq"}, SHOT),
    "autoround": ("autoround.AutoRound", {"group_size": 16, "samples": 8, "iterations": 4}, SHOT),
    "rotate": ("rotate.Rotate", {}, SHOT),
    "awq": ("awq.AWQ", {"group_size": 16, "grid": 4, "samples": 8}, SHOT),
    "mixed": ("mixed.Mixed", {"group_size": 16, "samples": 8, "measured": 4, "average_bits": 5.5}, SHOT),
    "w8a8": ("w8a8.W8A8", {}, SHOT),
    "w8a8 (static)": ("w8a8.W8A8", {"dynamic": False, "samples": 8}, SHOT),
    "w8a8 (smoothing)": ("w8a8.W8A8", {"smoothing": 0.5, "samples": 8}, SHOT),
    "qat": ("qat.QAT", {"samples": 8}, EPOCH),
    "int8": ("int8.Int8", {}, SHOT),
    "nf4": ("nf4.NF4", {"blocksize": 32}, SHOT),
    "finetune": ("finetune.FineTune", {}, EPOCH),
    "finetune (lora)": ("finetune.FineTune", {"adapter": {"kind": "lora", "rank": 4}}, EPOCH),
    "distill (layers)": ("distill.Distill", {"student": {"layers": 2}}, EPOCH),
    "distill (width)": ("distill.Distill", {"student": {"hidden_size": 32}}, EPOCH),
    "structured": (
        "structured.Structured",
        {"target_heads": 2, "target_ffn_size": 16, "importance": "activation"},
        SHOT,
    ),
    "drop_layers": ("drop_layers.DropLayers", {"drop": [1]}, SHOT),
    "prune_vocab": ("prune_vocab.PruneVocab", {"min_count": 4}, SHOT),
    "onnx": ("onnx.Onnx", {}, SHOT),
    "openvino": ("openvino.OpenVINO", {}, SHOT),
    "gguf": ("gguf.GGUF", {"runtime": "torch", "vocabulary": False}, SHOT),
}
"""Class, settings and training of every column."""
OTHERS = ("deberta", "deberta-v2-conv", "xlnet", "t5-short", "gemma2", "cohere", "starcoder2", "bloom", "gptj")
"""Architectures of the tests that are no rows of the table."""
ROWS = [
    *((name, False) for name in CLASSIFIERS if name not in OTHERS),
    *((name, True) for name in DECODERS if name not in OTHERS),
]
"""Families as classifiers, and decoders as language models."""


def run_cell(stage: str, family: str, lm: bool) -> str:
    """Return an empty text if the stage works on the family, or the sentence of the check that refuses it.

    Raises:
        Exception: it fails later than its check.
    """
    name, settings, training = STAGES[stage]
    make = partial(build, family, lm)
    vars(make)["__name__"] = family
    case = Case(get_class(f"compress.techniques.{name}"), settings, training, models=(make,))  # type: ignore[arg-type]
    with torch.device("meta"):
        skeleton = make()
    with tempfile.TemporaryDirectory() as folder:
        try:
            case.build(skeleton, Path(folder)).check(skeleton, [])
        except UserError as error:
            return str(error)
    check_promises(case)
    return ""


def run_row(row: tuple[str, bool]) -> list[tuple[str, str, bool, str]]:
    """Return stage, family, whether it is a language model, and the refusal or nothing, of every cell of a row."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return [(stage, *row, report_cell(stage, *row)) for stage in STAGES]


def report_cell(stage: str, family: str, lm: bool) -> str:
    """Return the result of :func:`run_cell`, or the fault."""
    try:
        return run_cell(stage, family, lm)
    except Exception as error:
        return f"FAULT {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def format_page(cells: list[tuple[str, str, bool, str]]) -> str:
    """Return the page: a table for classifiers and one for language models, with a note for every refusal."""
    notes: dict[str, int] = {}
    lines = ["# Compatibility", "", INTRODUCTION]
    for lm, title in ((False, "Classifiers"), (True, "Language models")):
        part = {(stage, family): refusal for stage, family, is_lm, refusal in cells if is_lm == lm}
        families = list(dict.fromkeys(family for _, family in part))
        lines += ["", f"## {title}", "", f"| family | {' | '.join(STAGES)} |", f"|---|{'---|' * len(STAGES)}"]
        for family in families:
            marks = []
            for stage in STAGES:
                refusal = part[stage, family]
                marks.append("✓" if not refusal else f"[{notes.setdefault(generalise(refusal), len(notes) + 1)}]")
            lines.append(f"| {family} | {' | '.join(marks)} |")
    lines += ["", "## Why not", "", *(f"{number}. {sentence}" for sentence, number in notes.items()), "", SWEEPS]
    return "\n".join(lines)


INTRODUCTION = """\
What every stage does with every family of models, from runs on tiny random models: the stage's check, its work on a
pruned model, its promises, saving, and an artifact that reloads to the same logits. ✓ works; a number is the sentence
below with which the check refuses the stage, before anything is loaded or trained. The table is written by
`python tests/compatibility.py`, and a test runs cells of every row and column again. All of it ran on CPUs; on a CUDA
GPU nothing has run yet, which `pytest -m gpu` does where there is one."""


SWEEPS = """\
## Ten techniques in one sweep

The same by the command line, from training to the table: a ModernBERT and a DeBERTa-v3 as classifiers, a Qwen3 as a
language model, at random weights and tiny sizes. A sweep takes under a minute of one core. Of the thirty rows one is
refused, before anything of its chain runs: `nf4` of this ModernBERT, whose 96 channels are no multiple of the 64
weights that share a scale (technique.nf4.blocksize=32).

```bash
python train.py -m experiment=ten_techniques task=toy model=modernbert model.config.intermediate_size=96 \\
    model.config.local_attention=16
python train.py -m experiment=ten_techniques task=toy model=deberta_v3 model.config.intermediate_size=128 \\
    model.config.position_buckets=16
python train.py -m experiment=ten_techniques task=toy_lm model=qwen3 model.config.intermediate_size=128 \\
    model.config.num_key_value_heads=2 model.config.head_dim=32
```

## Other architectures

`python benchmarks/calibrate_every_architecture.py` builds a tiny model of each of the 302 classes that transformers
5.17 has for classification and for language modelling, and compares the calibration of its matrices with plain runs of
every text alone. All matrices of 159 are calibrated once, on the right inputs; 21 are refused in a sentence: too few of
their weights are matrices, or a text alone never multiplies by some (the decoders of BART and Pegasus without their
encoders). None is wrong. The other 122 are not tried: they read more than text, answer otherwise where a text is
padded, or name their sizes in a way that the script does not know.
"""


def generalise(sentence: str) -> str:
    """Return a refusal without the names and numbers of one model."""
    return " ".join(sentence.split())


def main() -> None:
    warnings.simplefilter("ignore")
    wanted = sys.argv[1:]
    rows = [row for row in ROWS if not wanted or row[0] in wanted]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        cells = [cell for row in tqdm(pool.imap(run_row, rows), total=len(rows), unit="family") for cell in row]
    for stage, family, lm, refusal in cells:
        if refusal.startswith("FAULT") or wanted:
            print(f"{family}{' (lm)' if lm else ''}, {stage}: {refusal or 'works'}")
    if wanted or any(refusal.startswith("FAULT") for *_, refusal in cells):
        return
    PAGE.write_text(format_page(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
