"""Compute a task's metrics from a model's logits, batch after batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from compress.tasks.kinds import KINDS
from compress.tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset

Batch = dict[str, Tensor]


class TaskMetrics(Metric):
    """Compute the task's metrics by name over all examples since the last reset; all but perplexity are fractions.

    Every batch's answers are kept, as :meth:`compress.tasks.kinds.Kind.keep_answers` returns them, on all processes
    that train together. ``update(logits, labels)`` takes the model's logits and labels of a batch. ``rows`` are the
    rows before tokenising of the split that is scored, for the kinds of task that need them.

        scores = TaskMetrics(task)
        scores.update(model(**batch).logits, batch["labels"])
        scores.compute()["accuracy"]
    """

    full_state_update = False
    outputs: list[Tensor]
    labels: list[Tensor]

    def __init__(self, task: Task, rows: Dataset | None = None) -> None:
        super().__init__()
        self.kind, self.names, self.rows = KINDS[task.kind], task.metrics, rows
        self.add_state("outputs", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        outputs, labels = self.kind.keep_answers(logits.detach(), labels)
        self.outputs.append(outputs)
        self.labels.append(labels)

    def compute(self) -> dict[str, Tensor]:
        outputs, labels = (dim_zero_cat(kept).cpu().numpy() for kept in (self.outputs, self.labels))
        answers = self.kind.collect_answers(outputs, labels, self.rows)
        values = {name: self.kind.metrics[name].compute(answers.outputs, answers.labels) for name in self.names}
        return {name: torch.tensor(value, dtype=torch.float32, device=self.device) for name, value in values.items()}


@torch.inference_mode()
def evaluate_metric(model: nn.Module, batches: list[Batch], metrics: TaskMetrics | None, metric: str) -> float:
    """Return the value of ``metric`` over the batches; without ``metrics``, the mean loss of an example."""
    loss, examples = 0.0, 0
    for batch in batches:
        output = model(**batch)
        if metrics is not None:
            metrics.update(output.logits, batch["labels"])
        else:
            loss += output.loss.item() * len(batch["input_ids"])
            examples += len(batch["input_ids"])
    if metrics is None:
        return loss / examples
    value = metrics.compute()[metric].item()
    metrics.reset()
    return value
