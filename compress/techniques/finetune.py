"""Fine-tuning on the task's own labels."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from compress.tasks.metrics import TaskMetrics
from compress.technique import Technique, Training


class FineTune(Technique, pl.LightningModule):
    """Train with AdamW, linear warm-up and decay, and no weight decay on biases and norms (Devlin et al., 2019,
    arXiv:1810.04805).

    ``model`` is a Hugging Face model, which returns its loss if the batch has labels. ``metrics`` takes
    ``(logits, labels)`` and is computed on every validation epoch.

    Example:
        >>> pl.Trainer(max_epochs=3).fit(FineTune(model, training=Training(learning_rate=3e-5)), loader)
    """

    needs = ("float", "packed")  # packed weights stay frozen; everything else is trained
    leaves = None
    resumes = True
    together = True

    def __init__(self, model: nn.Module, metrics: TaskMetrics | None = None, training: Training | None = None) -> None:
        super().__init__()
        self.model = model
        self.metrics = metrics
        self.training_settings = training or Training()

    def on_fit_start(self) -> None:
        self.model.train()  # from_pretrained leaves a model in eval mode, and Lightning keeps that mode

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        self.log("train/epoch_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        output = self.model(**batch)
        if output.loss is not None:  # a batch may hold nothing that a loss compares
            self.log("validation/loss", output.loss, batch_size=len(batch["input_ids"]))
        if self.metrics is not None:
            self.metrics.update(output.logits, batch["labels"])

    def on_validation_epoch_end(self) -> None:
        if self.metrics is not None:
            self.log_dict({f"validation/{name}": value for name, value in self.metrics.compute().items()})
            self.metrics.reset()

    def configure_optimizers(self) -> Any:
        settings = self.training_settings
        decayed = [p for p in self.parameters() if p.requires_grad and p.ndim > 1]
        plain = [p for p in self.parameters() if p.requires_grad and p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            fused=True,  # five times faster on two CPU cores if most weights are embeddings
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, int(settings.warmup * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
