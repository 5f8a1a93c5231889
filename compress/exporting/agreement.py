"""Measure how closely an export's answers follow the model's own."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from compress.errors import PostconditionError
from compress.exporting.qdq import suspend_quantization
from compress.exporting.tracing import select_inputs
from compress.maths.losses import gather_positions
from compress.models.batches import Batch, read_validation_batches, spread_evenly
from compress.models.layers import detect_task_kind
from compress.tasks.kinds import KINDS

AGREEMENT = "agreement.json"
EXAMPLES = 128  # of the validation split: the whole split would take two models minutes
KEPT = 32  # examples on which an export shows that it has kept the integers of an earlier stage
ROUNDED = 2.0
"""Largest difference of an export that rounds inputs as the model does, as a multiple of what this rounding changes.
Sums in another order round some inputs to the next integer, but even independent roundings would differ by sqrt(2)."""
NEGLIGIBLE = 0.02
"""Difference, as a fraction of the logits, below which the rounding need not explain it."""


@dataclass(frozen=True)
class Agreement:
    """The largest difference of the logits over ``examples`` without padding, the largest logit of the model, and the
    share of labels (tokens, for a language model and for words; beginnings and ends, for answers in a text) on which
    both agree; None for answers that are no labels."""

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
    """Compare the logits of ``exported`` with those of ``model``.

    Raises:
        PostconditionError: logits are not finite where the model's are.
    """
    examples, difference, largest = 0, 0.0, 0.0
    same: list[Tensor] = []
    probabilities = KINDS[detect_task_kind(model)].probabilities
    for batch in batches:
        batch = select_inputs(batch, model)
        every = [each(**batch).logits.float() for each in (exported, model)]
        ours, theirs = (drop_padding(logits, batch) for logits in every)
        if theirs.isfinite().all() and not ours.isfinite().all():
            raise PostconditionError(
                "The exported graph answers nan or infinity where the model answers numbers. Use another export "
                "(technique=onnx, technique=openvino) or another version of its runtime."
            )
        examples += len(batch["input_ids"])
        difference = max(difference, (ours - theirs).abs().max().item())
        largest = max(largest, theirs.abs().max().item())
        if getattr(model.config, "problem_type", None) == "multi_label_classification":
            same.append(((ours > 0) == (theirs > 0)).flatten())
        elif probabilities == "positions":
            # The logits are of tokens: of a text's beginnings and ends, the likeliest tokens are compared.
            chosen = [gather_positions(logits, batch.get("attention_mask")).argmax(-1) for logits in every]
            same.append((chosen[0] == chosen[1]).flatten())
        elif probabilities and theirs.shape[-1] > 1:
            same.append(ours.argmax(-1) == theirs.argmax(-1))
    return Agreement(examples, difference, largest, torch.cat(same).float().mean().item() if same else None)


def compute_logits(model: Any, batch: Batch) -> Tensor:
    """Return the logits of the batch without those of padding."""
    return drop_padding(model(**batch).logits.float(), batch)


def drop_padding(logits: Tensor, batch: Batch) -> Tensor:
    """Return the logits without those of padding tokens."""
    return logits[batch["attention_mask"].bool()] if logits.ndim == 3 and "attention_mask" in batch else logits


@torch.inference_mode()
def require_kept(
    key: str,
    trainer: pl.Trainer,
    model: Any,
    exported: Any,
    integers: Collection[str],
    negligible: float = NEGLIGIBLE,
) -> None:
    """Raise PostconditionError if the export ``key``, which has kept all integers of an earlier stage, answers texts of
    the validation split otherwise than the model. ``integers`` are the layers whose inputs are rounded too;
    ``negligible`` is the difference that needs no explanation, as a fraction of the logits.

    Differences are root mean squares over the logits. Without a validation split nothing is compared.
    """
    if not trainer.enable_validation:
        return
    batches = read_validation_batches(trainer)
    count = min(KEPT, sum(len(batch["input_ids"]) for batch in batches))
    squares = torch.zeros(3, dtype=torch.float64)
    for batch in spread_evenly(batches, count):
        batch = select_inputs(batch, model)
        theirs = compute_logits(model, batch)
        with suspend_quantization(model, integers):
            floats = compute_logits(model, batch)
        parts = compute_logits(exported, batch) - theirs, floats - theirs, theirs
        squares += torch.stack([part.double().square().sum() for part in parts])
    difference, rounding, size = squares.sqrt().tolist()
    if difference > (limit := max(ROUNDED * rounding, negligible * size)):
        raise PostconditionError(
            f"`{key.rpartition('.')[2]}` should answer as the model whose integers it keeps, within {limit / size:.0%} "
            f"of the logits, but its answers differ by {difference / size:.0%}. Use another export or another version "
            f"of its runtime, or remove `{key.rpartition('.')[2]}` from the chain."
        )
