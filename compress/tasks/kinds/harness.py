"""Tasks of EleutherAI's harness: it asks the questions and judges the answers."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from compress.maths.statistics import Score
from compress.tasks.kinds.base import Kind, Metric
from compress.tasks.labels import LabelledTask

AVERAGE = "average"
"""Metric over several tasks of the harness: the mean of the first metric of each, where higher is better."""
LOWER = ("perplexity", "bits_per_byte")
"""Endings of the metrics for which lower is better. The others are means, for which higher is better."""


class HarnessMetrics(Mapping[str, Metric]):
    """The metrics by names such as ``piqa_acc_norm``: a task or group of the harness, and its metric."""

    def __getitem__(self, name: str) -> Metric:
        if name == AVERAGE:
            return Metric(score_average)
        if "_" not in name:
            raise KeyError(name)
        return Metric(score_metric(name), higher_is_better=not name.endswith(LOWER), counts_examples=True)

    def __iter__(self) -> Iterator[str]:
        return iter((AVERAGE, "TASK_METRIC"))

    def __len__(self) -> int:
        return 2


class Harness(Kind):
    """A question of the harness is answered; an example is a question.

    The outputs are ``[examples, 1 + 2 * metrics]``: a number that names the answer, and two numbers for each metric of
    the example's task. The sums of these two over examples, divided, are the metric (or its logarithm). The labels are
    ``[examples, 1 + metrics]``: a number that names the question, and :func:`number_metric` of each metric.
    """

    name = "lm_eval"
    metrics = HarnessMetrics()
    auto_class = "AutoModelForCausalLM"
    pipeline = "text-generation"
    num_labels = 0
    generates = True
    in_harness = True

    def encode(self, task: LabelledTask, labels: list[Any], split: str) -> list[Any]:
        return labels  # none: the harness has the answers

    def counts_examples(self, metric: str, labels: np.ndarray) -> bool:
        return set(labels[:, 1]) == {number_metric(metric)}

    def predict_labels(self, outputs: np.ndarray) -> np.ndarray:
        return outputs[:, 0]

    def find_correct(self, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
        value, weight = outputs[:, 1], outputs[:, 2]
        return value == 1 if ((weight == 1) & ((value == 0) | (value == 1))).all() else None

    def slice_labels(self, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        return {name: labels[:, 1] == number_metric(name) for name in names}


def number_metric(name: str) -> int:
    """Return a number that stands for a metric in arrays: positive if higher is better, else negative."""
    return (-1 if name.endswith(LOWER) else 1) * max(1, zlib.crc32(name.encode()))


def score_metric(name: str) -> Score:
    """Return the function that computes a metric from the arrays of :class:`Harness`; NaN without an example of it."""
    number = number_metric(name)

    def score(answers: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
        ratios = divide_sums(answers, labels, weights, number)
        if name.endswith("bits_per_byte"):
            return -ratios / np.log(2)
        return np.exp(-ratios) if name.endswith("perplexity") else ratios

    return score


def score_average(answers: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean over tasks of each task's first metric, without those for which lower is better."""
    numbers = [number for number in np.unique(labels[:, 1]) if number > 0]
    return np.mean([divide_sums(answers, labels, weights, number) for number in numbers], axis=0)


def divide_sums(answers: np.ndarray, labels: np.ndarray, weights: np.ndarray, number: int) -> np.ndarray:
    """Return the sum of a metric's first numbers over that of its second numbers in every resample."""
    rows, columns = np.nonzero(labels[:, 1:] == number)
    counted = weights[rows]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (answers[rows, 1 + 2 * columns] @ counted) / (answers[rows, 2 + 2 * columns] @ counted)
