"""Apply stages to a model without training it."""

from __future__ import annotations

from collections.abc import Iterable

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

Batch = dict[str, torch.Tensor]


class Untrained(pl.LightningModule):
    """A LightningModule for a model that is not trained."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        return self.model(**batch, labels=batch["input_ids"]).loss

    def configure_optimizers(self) -> None:
        return None


def carry_out(model: PreTrainedModel, calibration: Iterable[Batch], *stages: pl.Callback) -> PreTrainedModel:
    """Apply the ``stages``, which calibrate on the batches, and return the model."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=0, callbacks=list(stages), enable_model_summary=False, **quiet)
    module = Untrained(model)
    trainer.fit(module, DataLoader(list(calibration), batch_size=None))
    return module.model.eval()
