"""What a model answered to every example of the test split, kept beside it so that models are compared in pairs."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.maths.statistics import (
    Interval,
    assign_terciles,
    holm,
    label_churn,
    mcnemar,
    paired_difference,
    permutation_p_value,
)
from compress.tasks.kinds import KINDS

FILE = "predictions.npz"
NEGATION = re.compile(r"\b(?:no|not|never|none|nobody|nothing|neither|nor|without|cannot)\b|n['’]t\b", re.IGNORECASE)
FEWEST = 10
"""Examples of a slice: of fewer, one more or less that is right says too much."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """An example a row, in the order of the test split.

    ``outputs`` are the logits and ``labels`` what was to be said. For a language model an example is a block:
    ``outputs`` are the sum of its tokens' losses in nats and how many were predicted right, ``labels`` how many there
    were to predict. ``tokens`` is the length that the model read, ``characters`` that of the text (0 of a block), and
    ``negated`` whether it has an English word of negation. ``names`` are the labels'.
    """

    kind: str
    outputs: np.ndarray
    labels: np.ndarray
    tokens: np.ndarray
    characters: np.ndarray
    negated: np.ndarray
    names: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {one.name: np.array(getattr(self, one.name)) for one in fields(self)}
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Predictions:
        with np.load(path) as found:
            arrays = {one.name: found[one.name] for one in fields(cls)}
        return cls(**{**arrays, "kind": str(arrays["kind"]), "names": tuple(map(str, arrays["names"]))})

    @property
    def predicted_labels(self) -> np.ndarray | None:
        """The labels that the model chose, where there are labels to choose from."""
        return KINDS[self.kind].predict_labels(self.outputs)

    @property
    def correct_examples(self) -> np.ndarray | None:
        """Whether the model chose all of an example's labels and no other."""
        return KINDS[self.kind].find_correct(self.outputs, self.labels)

    def score(self, metric: str) -> float:
        return KINDS[self.kind].metrics[metric].score(self.outputs, self.labels)


@dataclass(frozen=True)
class Comparison:
    """A model against its baseline on the same examples: the change of the ``metric``, how likely one as large would be
    were the two alike, and the share of the examples whose label changed (None where there are none)."""

    metric: str
    change: Interval
    p_value: float
    churn: float | None


def are_paired(baseline: Predictions, variant: Predictions) -> bool:
    """Whether both are of the same examples: not where a language model has a vocabulary of its own, for example."""
    return baseline.kind == variant.kind and np.array_equal(baseline.labels, variant.labels)


def compare_predictions(baseline: Predictions, variant: Predictions, metric: str) -> Comparison | None:
    """McNemar's exact test of accuracies, a paired permutation test of other metrics, and a paired bootstrap interval
    of the change; None where the examples differ."""
    if not are_paired(baseline, variant):
        return None
    judge = KINDS[variant.kind].metrics[metric]
    outputs = (baseline.outputs, variant.outputs)
    if judge.counts_examples and baseline.correct_examples is not None and variant.correct_examples is not None:
        p_value = mcnemar(baseline.correct_examples, variant.correct_examples)
    else:
        p_value = permutation_p_value(judge.score, *outputs, variant.labels)
    changed = None
    if baseline.predicted_labels is not None and variant.predicted_labels is not None:
        changed = label_churn(baseline.predicted_labels, variant.predicted_labels)
    return Comparison(metric, paired_difference(judge.score, *outputs, variant.labels), p_value, changed)


def slice_examples(one: Predictions) -> dict[str, np.ndarray]:
    """The parts of the test split that are looked at apart, as masks by name: each label, the thirds of the texts by
    length, and texts with and without a word of negation."""
    by_label = KINDS[one.kind].slice_labels(one.labels, one.names)
    found = {f"label {name}": mask for name, mask in by_label.items()}
    if one.characters.any():
        third = assign_terciles(one.characters)
        found |= {name: third == i for i, name in enumerate(("short texts", "middling texts", "long texts"))}
        found |= {"with negation": one.negated, "without negation": ~one.negated}
    return {name: mask for name, mask in found.items() if mask.sum() >= FEWEST}


@dataclass(frozen=True)
class Regression:
    """How a model answers a slice of the test split: the share of its examples that it gets right less the baseline's
    (of a metric that is no share, the metric), and the p-value of McNemar's test where there are labels."""

    name: str
    examples: int
    change: float
    p_value: float | None


def measure_regressions(baseline: Predictions, variant: Predictions, metric: str) -> list[Regression]:
    """Every slice, in the order of :func:`slices`; none where the examples differ."""
    if not are_paired(baseline, variant):
        return []
    found = []
    for name, mask in slice_examples(variant).items():
        p_value = None
        if baseline.correct_examples is not None and variant.correct_examples is not None:
            before, after = baseline.correct_examples[mask], variant.correct_examples[mask]
            change, p_value = float(after.mean() - before.mean()), mcnemar(before, after)
        else:
            score = KINDS[variant.kind].metrics[metric].score
            change = score(variant.outputs[mask], variant.labels[mask])
            change -= score(baseline.outputs[mask], variant.labels[mask])
        found.append(Regression(name, int(mask.sum()), change, p_value))
    return found


def find_worst_slice(baseline: Predictions, variant: Predictions, metric: str) -> Regression | None:
    """The slice that lost most, its p-value corrected for how many slices there are (Holm); None where none lost."""
    every = measure_regressions(baseline, variant, metric)
    fair = dict(zip(map(id, every), holm([1.0 if one.p_value is None else one.p_value for one in every])))
    lost = min(every, key=lambda one: one.change, default=None)
    if lost is None or lost.change >= 0:
        return None
    return lost if lost.p_value is None else replace(lost, p_value=fair[id(lost)])
