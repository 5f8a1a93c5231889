"""Measure how closely an export's answers follow the model's own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from compress.exporting.tracing import select_inputs
from compress.models.calibration import Batch, read_validation_batches, spread_evenly

AGREEMENT = "agreement.json"
EXAMPLES = 128  # of the validation split, which would take minutes of two models as a whole


@dataclass(frozen=True)
class Agreement:
    """Over ``examples``, padding left out: by how much the logits differ at most, how large the model's own are, and
    the share of labels (tokens, for a language model) on which both agree; None where a number is predicted."""

    examples: int
    max_logit_difference: float
    largest_logit: float
    label_agreement: float | None


def read_agreement(folder: Path) -> Agreement | None:
    """What the report of a stage in ``folder`` says of its export; None where it exported nothing."""
    told = folder / AGREEMENT
    return Agreement(**json.loads(told.read_text())) if told.is_file() else None


def measure_on_validation(trainer: pl.Trainer, model: Any, exported: Any) -> Agreement | None:
    """Their agreement on texts from all over the validation split; None where the Trainer has none."""
    if not trainer.enable_validation:
        return None
    batches = read_validation_batches(trainer)
    count = min(EXAMPLES, sum(len(batch["input_ids"]) for batch in batches))
    return measure_agreement(model, exported, spread_evenly(batches, count))


@torch.inference_mode()
def measure_agreement(model: Any, exported: Any, batches: Iterable[Batch]) -> Agreement:
    """How far the logits of ``exported`` are from those of ``model``."""
    examples, difference, largest = 0, 0.0, 0.0
    same: list[Tensor] = []
    for batch in map(select_inputs, batches):
        ours, theirs = exported(**batch).logits.float(), model(**batch).logits.float()
        if theirs.ndim == 3 and "attention_mask" in batch:
            real = batch["attention_mask"].bool()
            ours, theirs = ours[real], theirs[real]
        examples += len(batch["input_ids"])
        difference = max(difference, (ours - theirs).abs().max().item())
        largest = max(largest, theirs.abs().max().item())
        if getattr(model.config, "problem_type", None) == "multi_label_classification":
            same.append(((ours > 0) == (theirs > 0)).flatten())
        elif theirs.shape[-1] > 1:
            same.append(ours.argmax(-1) == theirs.argmax(-1))
    return Agreement(examples, difference, largest, torch.cat(same).float().mean().item() if same else None)
