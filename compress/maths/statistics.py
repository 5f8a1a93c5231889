"""Intervals, tests and the Pareto front: plain functions on numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def pareto_indices(costs: list[float], worths: list[float]) -> list[int]:
    """Return the points that no other point beats at no more cost, in the order of their cost."""
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -worths[i])):
        if not front or worths[i] > worths[front[-1]]:
            front.append(i)
    return front


Score = Callable[[np.ndarray, np.ndarray], float]
"""Metric ``score(outputs, labels)`` of arrays with an example a row."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def paired_difference(score: Score, baseline: np.ndarray, variant: np.ndarray, labels: np.ndarray) -> Interval:
    """Return the score of the variant minus that of the baseline, with a bootstrap interval.

    Both are resampled on the same examples, so that examples that are hard for both cancel out.
    """
    from scipy.stats import bootstrap

    count = len(labels)

    def change(rows: np.ndarray) -> float:
        return score(variant[rows], labels[rows]) - score(baseline[rows], labels[rows])

    examples = np.arange(count)
    value = change(examples)
    if np.array_equal(baseline, variant) or count < 2:
        return Interval(value, value, value)
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may lack one of the labels
        drawn = bootstrap((examples,), change, **resampling_options(count), method="percentile").bootstrap_distribution
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def mcnemar(baseline: np.ndarray, variant: np.ndarray) -> float:
    """Return the exact p-value of McNemar's test (1947) that two models are right equally often.

    ``baseline`` and ``variant`` say for every example whether the model is right. Only examples with a single right
    model count; under the null hypothesis each model is the right one in half of them.
    """
    from scipy.stats import binomtest

    lost, won = int((baseline & ~variant).sum()), int((variant & ~baseline).sum())
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def permutation_p_value(score: Score, baseline: np.ndarray, variant: np.ndarray, labels: np.ndarray) -> float:
    """Return the p-value of the paired permutation test, for any metric: under the null hypothesis the two models'
    answers to an example can be swapped."""
    from scipy.stats import permutation_test

    if np.array_equal(baseline, variant):
        return 1.0
    answers, twice, count = np.concatenate([baseline, variant]), np.concatenate([labels, labels]), len(labels)

    def change(mine: np.ndarray, theirs: np.ndarray) -> float:
        return score(answers[theirs], twice[theirs]) - score(answers[mine], twice[mine])

    pair = (np.arange(count), count + np.arange(count))
    return float(permutation_test(pair, change, permutation_type="samples", **resampling_options(count)).pvalue)


def resampling_options(examples: int) -> dict[str, Any]:
    """Return scipy's options: fewer resamples for many examples, which are as precise, and some megabytes at once."""
    resamples = min(1000, max(200, 4_000_000 // examples))
    return {"n_resamples": resamples, "batch": max(1, 1_000_000 // examples), "vectorized": False, "random_state": 0}


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for their number (Holm, 1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def label_churn(baseline: np.ndarray, variant: np.ndarray) -> float:
    """Return the share of examples whose predicted label, or one of several, changed."""
    changed = baseline != variant
    return float(changed.reshape(len(changed), -1).any(1).mean())


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean with Student's t interval, which is infinite for a single value."""
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def assign_terciles(values: np.ndarray) -> np.ndarray:
    """Return 0, 1 or 2 for every example: the third of the examples, by ``values``, to which it belongs."""
    return np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values, side="left")
