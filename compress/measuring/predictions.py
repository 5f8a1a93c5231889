"""Store a model's predictions for every example of a split, and compare models on the same examples."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.maths.statistics import (
    SMALLEST_P,
    Interval,
    assign_terciles,
    holm,
    label_churn,
    mcnemar,
    paired_difference,
    permutation_p_value,
)
from compress.tasks.kinds import KINDS, higher_is_better

FILE = "predictions.npz"
NEGATION = re.compile(r"\b(?:no|not|never|none|nobody|nothing|neither|nor|without|cannot)\b|n['’]t\b", re.IGNORECASE)
FEWEST = 10
"""The minimum number of examples of a slice. In smaller slices a single example decides too much."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions for a split, a row for each example, in the order of the split.

    Attributes:
        outputs: logits. For a language model an example is a block: the sum of its tokens' losses in nats, the number
            of tokens predicted correctly, and the number of words that the predicted tokens are. For ``tokens``, the
            found tags and entities of a text
            (:func:`compress.maths.entities.mark_entities`). For ``span``, where an answer begins and ends in its
            context, -1 for none, its exact match and its F1. For a task of the harness, see
            :class:`compress.tasks.kinds.harness`.
        labels: true labels. For a language model, the number of tokens to predict. For ``tokens``, the true tags and
            entities. For ``span``, where the true answer begins and ends, and the kind of question.
        tokens: length of the example in the model's tokens.
        characters: length of the text (0 for a block).
        negated: whether the text has an English word of negation.
        names: names of the labels.
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
        arrays: dict[str, Any] = {item.name: np.array(getattr(self, item.name)) for item in fields(self)}
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Predictions:
        with np.load(path) as file:
            arrays = {item.name: file[item.name] for item in fields(cls)}
        return cls(**{**arrays, "kind": str(arrays["kind"]), "names": tuple(map(str, arrays["names"]))})

    @property
    def predicted_labels(self) -> np.ndarray | None:
        """Labels that the model chose; None if the task has no labels."""
        return KINDS[self.kind].predict_labels(self.outputs)

    @property
    def correct_examples(self) -> np.ndarray | None:
        """Mask of the examples for which the model chose exactly the true labels; None if the task has no labels."""
        return KINDS[self.kind].find_correct(self.outputs, self.labels)

    def score(self, metric: str) -> float:
        return KINDS[self.kind].metrics[metric].compute(self.outputs, self.labels)


@dataclass(frozen=True)
class Comparison:
    """A model compared with its baseline on the same examples.

    ``p_value`` is the probability of a ``change`` of the ``metric`` this large if both models were equally good. It is
    at least :data:`compress.maths.statistics.SMALLEST_P`, a bound of what is smaller, and None if there is no test: for
    a single example, and if the metric is undefined. ``churn`` is the share of the examples whose predicted label
    changed (None without labels).
    """

    metric: str
    change: Interval
    p_value: float | None
    churn: float | None


def are_paired(baseline: Predictions, variant: Predictions) -> bool:
    """Return whether both have the same examples. Language models with different vocabularies, for example, do not."""
    return baseline.kind == variant.kind and np.array_equal(baseline.labels, variant.labels)


def compare_predictions(baseline: Predictions, variant: Predictions, metric: str) -> Comparison | None:
    """Test the change of ``metric`` on the same examples. Return None if the examples differ.

    Accuracies get McNemar's exact test, other metrics a paired permutation test, and the change a paired bootstrap
    interval.
    """
    if not are_paired(baseline, variant):
        return None
    kind = KINDS[variant.kind]
    judge = kind.metrics[metric]
    answers = (judge.read(baseline.outputs), judge.read(variant.outputs))
    change = paired_difference(judge.score, *answers, variant.labels)
    counted = kind.counts_examples(metric, variant.labels)
    if counted and baseline.correct_examples is not None and variant.correct_examples is not None:
        p_value = mcnemar(baseline.correct_examples, variant.correct_examples)
    else:
        p_value = permutation_p_value(judge.score, *answers, variant.labels)
    changed = None
    if baseline.predicted_labels is not None and variant.predicted_labels is not None:
        changed = label_churn(baseline.predicted_labels, variant.predicted_labels)
    tested = len(variant.labels) > 1 and math.isfinite(change.value)
    return Comparison(metric, change, max(p_value, SMALLEST_P) if tested else None, changed)


def compare_tasks(baseline: Predictions, variant: Predictions) -> dict[str, Comparison]:
    """Return the comparison of each task that was asked beside others, by its first metric, with p-values corrected
    over the tasks (Holm). It is empty for a single task, and if the examples differ."""
    if not (KINDS[variant.kind].in_harness and len(variant.names) > 1 and are_paired(baseline, variant)):
        return {}
    masks = KINDS[variant.kind].slice_labels(variant.labels, variant.names)
    compared = {
        name: compare_predictions(select_examples(baseline, mask), select_examples(variant, mask), name)
        for name, mask in masks.items()
    }
    found = {name: comparison for name, comparison in compared.items() if comparison}
    corrected = holm([1.0 if each.p_value is None else each.p_value for each in found.values()])
    return {
        name: replace(each, p_value=None if each.p_value is None else p)
        for (name, each), p in zip(found.items(), corrected)
    }


def select_examples(predictions: Predictions, mask: np.ndarray) -> Predictions:
    """Return the predictions for some examples."""
    arrays = ("outputs", "labels", "tokens", "characters", "negated")
    return replace(predictions, **{name: getattr(predictions, name)[mask] for name in arrays})


def slice_examples(predictions: Predictions) -> dict[str, np.ndarray]:
    """Return the slices of the split as masks by name.

    The slices are each label (type of entity, or kind of question), the thirds of the texts by length, and texts with
    and without a word of negation.
    """
    kind = KINDS[predictions.kind]
    by_label = kind.slice_labels(predictions.labels, predictions.names)
    slices = {f"{kind.slice_prefix} {name}": mask for name, mask in by_label.items()}
    if predictions.characters.any():
        third = assign_terciles(predictions.characters)
        slices |= {name: third == i for i, name in enumerate(("short texts", "middling texts", "long texts"))}
        slices |= {"with negation": predictions.negated, "without negation": ~predictions.negated}
    return {name: mask for name, mask in slices.items() if mask.sum() >= FEWEST}


@dataclass(frozen=True)
class Regression:
    """The change of a model's quality on a slice of the split.

    ``change`` is the share of correct examples minus the baseline's, or the difference of the metric if the task has no
    labels. ``p_value`` is of McNemar's test (None without labels).
    """

    name: str
    examples: int
    change: float
    p_value: float | None


def measure_regressions(baseline: Predictions, variant: Predictions, metric: str) -> list[Regression]:
    """Return the change on every slice of :func:`slice_examples`; an empty list if the examples differ."""
    if not are_paired(baseline, variant):
        return []
    regressions = []
    for name, mask in slice_examples(variant).items():
        p_value = None
        if baseline.correct_examples is not None and variant.correct_examples is not None:
            before, after = baseline.correct_examples[mask], variant.correct_examples[mask]
            change, p_value = float(after.mean() - before.mean()), mcnemar(before, after)
        else:
            score = KINDS[variant.kind].metrics[metric].compute
            change = score(variant.outputs[mask], variant.labels[mask])
            change -= score(baseline.outputs[mask], variant.labels[mask])
        regressions.append(Regression(name, int(mask.sum()), change, p_value))
    return regressions


def list_losing_slices(baseline: Predictions, variant: Predictions, metric: str) -> list[Regression]:
    """Return the slices that lost quality, the worst first, with p-values corrected over all slices (Holm)."""
    regressions = measure_regressions(baseline, variant, metric)
    corrected = holm([1.0 if regression.p_value is None else regression.p_value for regression in regressions])
    shares = baseline.correct_examples is not None  # a change of the share of correct examples, whatever the metric
    better = 1 if shares or higher_is_better(metric) else -1
    losing = [
        replace(regression, p_value=None if regression.p_value is None else p_value)
        for regression, p_value in zip(regressions, corrected)
        if better * regression.change < 0  # not where undefined
    ]
    return sorted(losing, key=lambda regression: better * regression.change)


def find_worst_slice(baseline: Predictions, variant: Predictions, metric: str) -> Regression | None:
    """Return the first of :func:`list_losing_slices`; None if no slice lost."""
    return next(iter(list_losing_slices(baseline, variant, metric)), None)
