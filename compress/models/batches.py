"""Draw the batches that stages calibrate and measure on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from compress.errors import UserError
from compress.tasks.formats import read_lines
from compress.tasks.tokens import LengthBuckets

Batch = dict[str, Tensor]


def draw_calibration_batches(
    trainer: pl.Trainer, samples: int, batch_size: int, labels: bool = False
) -> Iterator[Batch]:
    """Yield batches of ``samples`` training examples on the Trainer's device: from the datamodule's ``calibration``,
    or without it the first batches of the training loader."""
    calibration = getattr(getattr(trainer, "datamodule", None), "calibration", None)
    if calibration is None:
        trainer.fit_loop.setup_data()  # does nothing if the data is set up
    loader = calibration(samples, batch_size) if calibration else trainer.train_dataloader
    device = trainer.strategy.root_device
    seen = 0
    for batch in loader:
        if seen >= samples:
            return
        seen += len(batch["input_ids"])
        yield {key: value.to(device) for key, value in batch.items() if labels or key != "labels"}


def read_validation_batches(trainer: pl.Trainer) -> list[Batch]:
    """Return the whole validation split from the Trainer's own loaders.

    Raises:
        UserError: the Trainer has no validation data.
    """
    if not trainer.enable_validation:
        raise UserError(
            "`sensitivity` measures on validation data and the Trainer has none. Pass `fit` a validation loader, and "
            "define `validation_step` in the module."
        )
    trainer.fit_loop.epoch_loop.val_loop.setup_data()  # does nothing if the data is set up
    loaders: Any = trainer.val_dataloaders
    return list(chain.from_iterable(loaders if isinstance(loaders, (list, tuple)) else [loaders]))


def spread_evenly(batches: list[Batch], samples: int) -> list[Batch]:
    """Return batches of exactly ``samples`` examples, picked at even distances because a loader may be sorted, for
    example by length."""
    sizes = [len(batch["input_ids"]) for batch in batches]
    count, parts = len(batches), math.ceil(samples / max(sizes))
    while sum(sizes[i] for i in middle_indices(count, parts)) < samples:
        parts += 1
    picked: list[Batch] = []
    for i in middle_indices(count, parts):
        picked.append({key: value[:samples] for key, value in batches[i].items()})
        samples -= len(picked[-1]["input_ids"])
    return [batch for batch in picked if len(batch["input_ids"])]


def middle_indices(count: int, parts: int) -> list[int]:
    """Return the middles of ``parts`` equal parts of ``range(count)``."""
    return [(2 * i + 1) * count // (2 * parts) for i in range(parts)]


def iterate_texts(file: Path, data: Any, device: torch.device, key: str) -> Iterator[Batch]:
    """Yield batches of the texts of a ``file``, one a line, without end and in a new order every time.

    Raises:
        UserError: the file, the setting ``key``, holds no text, or there is no datamodule ``data``.
    """
    texts = [line.strip() for line in read_lines(file)]
    ids = data.tokenizer(texts, truncation=True, max_length=data.max_length)["input_ids"] if data and texts else []
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids if row]
    if not rows:
        why = "holds no text, or the fit has no datamodule"
        raise UserError(f"{key} is {file}, which {why}. Set another file, or null.")
    buckets = LengthBuckets([len(row["input_ids"]) for row in rows], data.batch_size, data.seed)
    while True:
        for cut in buckets:
            yield data.tokenizer.pad([rows[i] for i in cut], return_tensors="pt").to(device)


def mask_tokens(inputs: Batch, tokenizer: Any, probability: float) -> Batch:
    """Return the inputs with some tokens replaced by the mask token, but never special tokens."""
    ids = inputs["input_ids"]
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids, device=ids.device))
    chosen = (torch.rand(ids.shape, device=ids.device) < probability) & ~special
    return {**inputs, "input_ids": ids.masked_fill(chosen, tokenizer.mask_token_id)}
