"""Fine-tuning on the task's own labels."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pydantic import validate_call
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from compress.errors import UserError
from compress.models.adapters import Adaptation, Trained, check_adapter
from compress.tasks.metrics import TaskMetrics
from compress.technique import Adapter, Technique, Training

log = logging.getLogger(__name__)


class FineTune(Technique, pl.LightningModule):
    """Train with AdamW, linear warm-up and decay, and no weight decay on biases and norms (Devlin et al., 2019,
    arXiv:1810.04805).

    ``model`` is a Hugging Face model, which returns its loss if the batch has labels. ``metrics`` takes
    ``(logits, labels)`` and is computed on every validation epoch. With an ``adapter`` few parameters are trained in
    place of all; it is merged into the weights when the fit ends, and pruned weights stay zero.

    Raises:
        UserError: the adapter does not fit the model, or trained nothing.

    Example:
        >>> pl.Trainer(max_epochs=3).fit(FineTune(model, training=Training(learning_rate=3e-5)), loader)
    """

    needs = ("float", "packed")  # packed weights stay frozen; everything else is trained
    leaves = None
    resumes = True
    together = True

    @validate_call(config={"arbitrary_types_allowed": True})
    def __init__(
        self,
        model: nn.Module,
        metrics: TaskMetrics | None = None,
        training: Training | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.metrics = metrics
        self.training_settings = training or Training()
        self.adapter = adapter
        self.adaptation: Adaptation | None = None
        """The adapter while it is in the model."""
        self.trained: Trained | None = None

    def check(self, skeleton: Any, before: list[Any]) -> None:
        packed = next((stage.key for stage in before if stage.leaves == "packed"), None)
        if packed and self.adapter and self.adapter.kind != "perp":
            name, first = self.key.rpartition(".")[2], packed.rpartition(".")[2]
            raise UserError(
                f"{self.key}.adapter is {self.adapter.kind}, which is merged into floats, and `{first}` before it "
                f"leaves integers. Set {self.key}.adapter={{kind: perp}}, or move `{name}` before `{first}`."
            )
        check_adapter(self.adapter, skeleton, f"{self.key}.adapter", self.training_settings.epochs)

    def configure_model(self) -> None:
        """Add the adapter when the fit starts, before the optimizer is created."""
        if self.adapter is not None and self.adaptation is None:
            self.add_adapter()
            log.info(f"  {self.key.removeprefix('technique.')}: {self.trained}")

    def add_adapter(self) -> None:
        """Add the adapter to the model."""
        assert self.adapter is not None
        self.adaptation = Adaptation(self.model, self.adapter, f"{self.key}.adapter")
        self.trained = self.adaptation.trained

    def on_fit_start(self) -> None:
        self.model.train()  # from_pretrained leaves a model in eval mode, and Lightning keeps that mode

    def on_fit_end(self) -> None:
        if self.adaptation is not None:
            self.adaptation.merge()
            self.adaptation = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.adaptation is not None:  # what is not trained is in the model that the training starts from
            frozen = {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: state[name] for name in state if name not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.adaptation is not None:
            checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}

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

    def report(self, folder: Path) -> None:
        """Write ``adapter.csv`` if an adapter was trained: its kind, and how many parameters it trained."""
        if self.trained is None or self.adapter is None:
            return
        with (folder / "adapter.csv").open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["kind", "trained_parameters", "parameters", "share"])
            rows.writerow([self.adapter.kind, self.trained.count, self.trained.parameters, f"{self.trained.share:.6f}"])
