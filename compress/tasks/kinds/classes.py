"""Tasks of one text or a pair of texts: a class, several classes, or a number."""

from __future__ import annotations

from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.maths import scores
from compress.tasks.kinds.base import Kind, Metric
from compress.tasks.labels import (
    Columns,
    LabelledTask,
    Labels,
    encode_names,
    parse_numbers,
    read_name_lists,
    read_names,
    sort_label_names,
)

if TYPE_CHECKING:
    from torch import Tensor


class Multiclass(Kind):
    """A text has one of several labels."""

    name = "multiclass"
    metrics = MappingProxyType(
        {
            "accuracy": Metric(scores.accuracy, scores.choose_class, counts_examples=True),
            "f1_macro": Metric(scores.f1_macro, scores.choose_class),
            "f1_micro": Metric(scores.f1_micro, scores.choose_class),
            "matthews": Metric(scores.matthews, scores.choose_class),
            "roc_auc": Metric(scores.roc_auc, scores.softmax),
        }
    )
    problem_type = "single_label_classification"
    probabilities = "softmax"

    def read_labels(self, columns: Columns, names: tuple[str, ...] | None, bases: dict[str, int]) -> Labels:
        return read_names(columns, names, bases)

    def encode(self, task: LabelledTask, labels: list[Any], split: str) -> list[int]:
        return [index for (index,) in encode_names(task, ([name] for name in labels), split)]

    def predict_labels(self, outputs: np.ndarray) -> np.ndarray:
        return scores.choose_class(outputs)

    def slice_labels(self, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        return {name: labels == i for i, name in enumerate(names)}


class Multilabel(Kind):
    """A text has any number of labels."""

    name = "multilabel"
    metrics = MappingProxyType(
        {
            "subset_accuracy": Metric(scores.accuracy, scores.choose_labels, counts_examples=True),
            "f1_macro": Metric(scores.f1_macro, scores.choose_labels),
            "f1_micro": Metric(scores.f1_micro, scores.choose_labels),
            "roc_auc": Metric(scores.roc_auc),
        }
    )
    problem_type = "multi_label_classification"
    probabilities = "sigmoid"
    flag_columns = True

    def read_labels(self, columns: Columns, names: tuple[str, ...] | None, bases: dict[str, int]) -> Labels:
        return read_name_lists(columns, names, bases)

    def is_missing(self, label: Any) -> bool:
        return label is None  # an empty list is an answer: the text has no label at all

    def find_label_names(self, labels: list[Any]) -> tuple[str, ...]:
        return sort_label_names(chain.from_iterable(labels))

    def encode(self, task: LabelledTask, labels: list[Any], split: str) -> list[list[float]]:
        rows = map(set, encode_names(task, labels, split))
        return [[float(i in row) for i in range(task.num_labels)] for row in rows]

    def choose_labels(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return (logits > 0).float()

    def predict_labels(self, outputs: np.ndarray) -> np.ndarray:
        return scores.choose_labels(outputs)

    def slice_labels(self, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        return {name: labels[:, i] == 1 for i, name in enumerate(names)}


class Regression(Kind):
    """A text has a number."""

    name = "regression"
    metrics = MappingProxyType({"pearson": Metric(scores.pearson), "spearman": Metric(scores.spearman)})
    problem_type = "regression"
    num_labels = 1

    def encode(self, task: LabelledTask, labels: list[Any], split: str) -> list[float]:
        return parse_numbers(task, labels, split)
