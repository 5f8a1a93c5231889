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
from compress.models.batches import Batch, read_validation_batches, spread_evenly

AGREEMENT = "agreement.json"
EXAMPLES = 128  # of the validation split: the whole split would take two models minutes


@dataclass(frozen=True)
class Agreement:
    """The largest difference of the logits over ``examples`` without padding, the largest logit of the model, and the
    share of labels (tokens, for a language model) on which both agree; None for a regression."""

    examples: int
    max_logit_difference: float
    largest_logit: float
    label_agreement: float | None


def read_agreement(folder: Path) -> Agreement | None:
    """Return the agreement in a stage's report ``folder``, or None if the stage exported nothing."""
    file = folder / AGREEMENT
    return Agreement(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def measure_on_validation(trainer: pl.Trainer, model: Any, exported: Any) -> Agreement | None:
    """Return the agreement on texts spread over the validation split, or None if the Trainer has no such split."""
    if not trainer.enable_validation:
        return None
    batches = read_validation_batches(trainer)
    count = min(EXAMPLES, sum(len(batch["input_ids"]) for batch in batches))
    return measure_agreement(model, exported, spread_evenly(batches, count))


@torch.inference_mode()
def measure_agreement(model: Any, exported: Any, batches: Iterable[Batch]) -> Agreement:
    """Compare the logits of ``exported`` with those of ``model``."""
    examples, difference, largest = 0, 0.0, 0.0
    same: list[Tensor] = []
    for batch in batches:
        batch = select_inputs(batch, model)
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
