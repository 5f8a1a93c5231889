"""What a difference is worth: plain functions on numbers, each with the uncertainty of few examples or few repeats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    pass


def pareto_indices(costs: list[float], worths: list[float]) -> list[int]:
    """Of all points those that no other matches at less cost and no less worth, in the order of their cost."""
    found: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -worths[i])):
        if not found or worths[i] > worths[found[-1]]:
            found.append(i)
    return found


Score = Callable[[np.ndarray, np.ndarray], float]
"""A metric: ``score(outputs, labels)``, an example a row."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def paired_difference(score: Score, baseline: np.ndarray, variant: np.ndarray, labels: np.ndarray) -> Interval:
    """``score`` of the variant less that of the baseline, over the same examples: both are drawn together, so that what
    is hard for both cancels out.

        difference(accuracy, logits, pruned_logits, labels)
    """
    from scipy.stats import bootstrap

    count = len(labels)

    def change(rows: np.ndarray) -> float:
        return score(variant[rows], labels[rows]) - score(baseline[rows], labels[rows])

    every = np.arange(count)
    value = change(every)
    if np.array_equal(baseline, variant) or count < 2:
        return Interval(value, value, value)
    with np.errstate(invalid="ignore", divide="ignore"):  # a metric of a draw without one of the labels
        drawn = bootstrap((every,), change, **resampling_options(count), method="percentile").bootstrap_distribution
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def mcnemar(baseline: np.ndarray, variant: np.ndarray) -> float:
    """The exact p-value of McNemar's test (1947) that two models are right equally often, from whether each is right
    on every example: of those on which one alone is right, either is so half of the time."""
    from scipy.stats import binomtest

    lost, won = int((baseline & ~variant).sum()), int((variant & ~baseline).sum())
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def permutation_p_value(score: Score, baseline: np.ndarray, variant: np.ndarray, labels: np.ndarray) -> float:
    """The p-value of the paired permutation test, for any metric: were the two alike, it would not matter whose answer
    is whose."""
    from scipy.stats import permutation_test

    if np.array_equal(baseline, variant):
        return 1.0
    answers, twice, count = np.concatenate([baseline, variant]), np.concatenate([labels, labels]), len(labels)

    def change(mine: np.ndarray, theirs: np.ndarray) -> float:
        return score(answers[theirs], twice[theirs]) - score(answers[mine], twice[mine])

    pair = (np.arange(count), count + np.arange(count))
    return float(permutation_test(pair, change, permutation_type="samples", **resampling_options(count)).pvalue)


def resampling_options(examples: int) -> dict[str, Any]:
    """Of many examples fewer resamples tell as much about what matters, and take as long; some megabytes at once."""
    often = min(1000, max(200, 4_000_000 // examples))
    return {"n_resamples": often, "batch": max(1, 1_000_000 // examples), "vectorized": False, "random_state": 0}


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for how many there are (Holm, 1979): one below 0.05 is then significant among all."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def label_churn(baseline: np.ndarray, variant: np.ndarray) -> float:
    """The share of examples whose predicted label (or one of several) changed, for better or worse."""
    changed = baseline != variant
    return float(changed.reshape(len(changed), -1).any(1).mean())


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean, of seeds for example, with Student's t interval; of one value nothing is known but that."""
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def assign_terciles(values: np.ndarray) -> np.ndarray:
    """0, 1 or 2: the third of the examples, by ``values``, that each belongs to; equal values stay together."""
    return np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values, side="left")
