"""The numbers that judge a model on a task, by torchmetrics, from raw logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

if TYPE_CHECKING:
    from compress.tasks.task import Task


Batch = dict[str, Tensor]


def build_metrics(task: Task) -> MetricCollection:
    """The task's metrics by their names, as fractions (perplexity apart).

    ``update(logits, labels)`` takes logits as the model gives them, of shape ``[batch, labels]``, or ``[batch, length,
    vocabulary]`` for ``lm``, whose labels are shifted by the caller and -100 where nothing is to be predicted.

        scores = metrics(task)
        scores.update(logits, labels)
        scores.compute()["accuracy"]
    """
    from torchmetrics import classification as c
    from torchmetrics import regression as r
    from torchmetrics.text import Perplexity

    class TokenPerplexity(Perplexity):
        def update(self, preds, target):
            # From logits: torchmetrics goes by way of probabilities, and one that underflows makes the sum infinite.
            self.total_log_probs += torch.nn.functional.cross_entropy(
                preds.flatten(0, -2), target.flatten(), ignore_index=-100, reduction="sum"
            )
            self.count += (target != -100).sum()

    class TokenAccuracy(c.MulticlassAccuracy):
        def __init__(self):
            super().__init__(average="micro", ignore_index=-100, validate_args=False)

        def update(self, preds, target):
            super().update(preds.argmax(-1), target)

    class PresentAUROC(c.MultilabelAUROC):
        def compute(self):
            # Without both a text that has a label and one that has not, there is nothing to rank: torchmetrics would
            # count such a label as 0.
            target = torch.cat(list(self.target))
            ranked = (target.amax(0) == 1) & (target.amin(0) == 0)
            return super().compute()[ranked].mean()

    # Probabilities are made here, once, and not by each metric: torchmetrics takes logits that happen to lie between
    # 0 and 1 for probabilities.
    to_predictions = {
        "multiclass": lambda logits: logits.float().softmax(-1),
        "multilabel": lambda logits: logits.float().sigmoid(),
        "regression": lambda logits: logits.float().reshape(-1),
        "lm": lambda logits: logits.float(),
    }[task.kind]
    to_targets = {
        "multiclass": lambda labels: labels.long(),
        "multilabel": lambda labels: labels.long(),
        "regression": lambda labels: labels.float().reshape(-1),
        "lm": lambda labels: labels.long(),
    }[task.kind]

    class FromLogits(MetricCollection):
        def update(self, logits, labels):  # type: ignore[override]
            super().update(to_predictions(logits), to_targets(labels))

        def forward(self, logits, labels):
            return super().forward(to_predictions(logits), to_targets(labels))

    n = task.num_labels
    build = {
        "multiclass": {
            "accuracy": lambda: c.MulticlassAccuracy(n, average="micro"),
            "f1_macro": lambda: c.MulticlassF1Score(n, average="macro"),
            "f1_micro": lambda: c.MulticlassF1Score(n, average="micro"),
            "matthews": lambda: c.MulticlassMatthewsCorrCoef(n),
            "roc_auc": lambda: c.MulticlassAUROC(n, average="macro"),
        },
        "multilabel": {
            "subset_accuracy": lambda: c.MultilabelExactMatch(n),
            "f1_macro": lambda: c.MultilabelF1Score(n, average="macro"),
            "f1_micro": lambda: c.MultilabelF1Score(n, average="micro"),
            "roc_auc": lambda: PresentAUROC(n, average="none"),
        },
        "regression": {"pearson": r.PearsonCorrCoef, "spearman": r.SpearmanCorrCoef},
        "lm": {"perplexity": TokenPerplexity, "accuracy": TokenAccuracy},
    }[task.kind]
    return FromLogits({name: build[name]() for name in task.metrics})


def f1_score(predicted: np.ndarray, labels: np.ndarray, average: str) -> float:
    """Of 0/1 columns, a label each; macro leaves out labels that are neither predicted nor there."""
    hits, either = (predicted & labels).sum(0), predicted.sum(0) + labels.sum(0)
    if average == "micro":
        return 2 * hits.sum() / max(1, either.sum())
    return float((2 * hits[either > 0] / either[either > 0]).mean()) if (either > 0).any() else 0.0


def one_hot(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is predicted and what is there, as 0/1 columns."""
    classes = np.arange(logits.shape[1])
    return logits.argmax(1)[:, None] == classes, labels[:, None] == classes


def positive_columns(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return logits > 0, labels > 0


def matthews(logits: np.ndarray, labels: np.ndarray) -> float:
    """Gorodkin's correlation of several classes (2004)."""
    predicted, there = (columns.astype(float) for columns in one_hot(logits, labels))
    p, t = predicted - predicted.mean(0), there - there.mean(0)
    scale = np.sqrt((p * p).sum() * (t * t).sum())
    return float((p * t).sum() / scale) if scale else 0.0


def roc_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean over the 0/1 columns of ``labels`` that have both (Mann and Whitney, 1947)."""
    from scipy.stats import rankdata

    both = labels.any(0) & ~labels.all(0)
    if not both.any():
        return float("nan")
    ranks, there = rankdata(scores[:, both], axis=0), labels[:, both]
    yes = there.sum(0)
    return float((((ranks * there).sum(0) - yes * (yes + 1) / 2) / (yes * (len(labels) - yes))).mean())


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def pearson(outputs: np.ndarray, labels: np.ndarray) -> float:
    return float(np.corrcoef(outputs.ravel(), labels.ravel())[0, 1])


def spearman(outputs: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import rankdata

    return pearson(rankdata(outputs.ravel()), rankdata(labels.ravel()))


SCORES: dict[str, dict[str, Callable[[np.ndarray, np.ndarray], float]]] = {
    "multiclass": {
        "accuracy": lambda logits, labels: float((logits.argmax(1) == labels).mean()),
        "f1_macro": lambda logits, labels: f1_score(*one_hot(logits, labels), "macro"),
        "f1_micro": lambda logits, labels: f1_score(*one_hot(logits, labels), "micro"),
        "matthews": matthews,
        "roc_auc": lambda logits, labels: roc_auc(softmax(logits), one_hot(logits, labels)[1]),
    },
    "multilabel": {
        "subset_accuracy": lambda logits, labels: float(((logits > 0) == (labels > 0)).all(1).mean()),
        "f1_macro": lambda logits, labels: f1_score(*positive_columns(logits, labels), "macro"),
        "f1_micro": lambda logits, labels: f1_score(*positive_columns(logits, labels), "micro"),
        "roc_auc": lambda logits, labels: roc_auc(logits, labels > 0),
    },
    "regression": {"pearson": pearson, "spearman": spearman},
    "lm": {
        "perplexity": lambda outputs, labels: float(np.exp(outputs[:, 0].sum() / labels.sum())),
        "accuracy": lambda outputs, labels: float(outputs[:, 1].sum() / labels.sum()),
    },
}
"""The same metrics of plain arrays, fast enough to be computed over thousands of resamples: ``score(outputs, labels)``
as :class:`compress.measuring.predictions.Predictions` has them."""


def align_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits beside the labels that they predict: a language model's position t (of ``[B, T, V]``) predicts token
    t+1, a classifier's logits stay as they are."""
    if logits.ndim == 3:
        return logits[:, :-1].contiguous(), labels[:, 1:].contiguous()
    return logits, labels


@torch.inference_mode()
def evaluate_metric(model: nn.Module, batches: list[Batch], metrics: MetricCollection | None, metric: str) -> float:
    """The metric of that name over the batches, or without ``metrics`` the mean loss of an example."""
    loss, examples = 0.0, 0
    for batch in batches:
        output = model(**batch)
        if metrics is not None:
            metrics.update(*align_labels(output.logits, batch["labels"]))
        else:
            loss += output.loss.item() * len(batch["input_ids"])
            examples += len(batch["input_ids"])
    if metrics is None:
        return loss / examples
    value = metrics.compute()[metric].item()
    metrics.reset()
    return value
