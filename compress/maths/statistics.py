"""Intervals, tests and the Pareto front: plain functions on numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


def pareto_indices(costs: list[float], worths: list[float]) -> list[int]:
    """Return the points that no other point beats at no more cost, in the order of their cost.

    A point whose worth is NaN is never among them.
    """
    front: list[int] = []
    defined = [i for i, worth in enumerate(worths) if not math.isnan(worth)]
    for i in sorted(defined, key=lambda i: (costs[i], -worths[i])):
        if not front or worths[i] > worths[front[-1]]:
            front.append(i)
    return front


Score = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Metric ``score(answers, labels, weights)`` with an example a row and a resample a column: compress.maths.scores."""

RESAMPLES = 1000
"""The number of resamples of which a standard error or a share is computed."""
MOST_RESAMPLES = 100_000
"""The number of swaps that are drawn if few of them are as extreme as the models."""
WORK = 3_000_000
"""The number of answers that are weighed in all resamples. It bounds the seconds for many examples."""
FEWEST_RESAMPLES = 100
"""The number of resamples however many examples there are."""
AT_ONCE = 100_000
"""The number of answers that are weighed at once, which fit into a cache."""
ENOUGH = 10
"""The number of swaps that are as extreme as the models, from which their share is the p-value."""
SMALLEST_P = 1e-6
"""The smallest p-value that is resolved: an upper bound of what is smaller."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def mcnemar(baseline: np.ndarray, variant: np.ndarray) -> float:
    """Return the exact p-value of McNemar's test (1947) that two models are right equally often.

    ``baseline`` and ``variant`` say for every example whether the model is right. Only examples with a single right
    model count; under the null hypothesis each model is the right one in half of them.
    """
    from scipy.stats import binomtest

    lost, won = int((baseline & ~variant).sum()), int((variant & ~baseline).sum())
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


@dataclass(frozen=True)
class Pairs:
    """Examples with two models' answers. Examples that are the same in all of them are one row, with their number."""

    baseline: np.ndarray
    variant: np.ndarray
    labels: np.ndarray
    counts: np.ndarray

    @classmethod
    def group(cls, baseline: np.ndarray, variant: np.ndarray, labels: np.ndarray) -> Pairs:
        table = np.hstack([part.reshape(len(labels), -1).astype(float) for part in (baseline, variant, labels)])
        _, first, counts = np.unique(table, axis=0, return_index=True, return_counts=True)
        return cls(baseline[first], variant[first], labels[first], counts)

    def change(self, score: Score, weights: np.ndarray) -> np.ndarray:
        """Return the variant's score minus the baseline's in every resample."""
        return score(self.variant, self.labels, weights) - score(self.baseline, self.labels, weights)

    def change_swapped(self, score: Score, swapped: np.ndarray) -> np.ndarray:
        """Return the change in every resample in which so many of each row's examples swap the models' answers."""
        answers, labels = np.concatenate([self.variant, self.baseline]), np.concatenate([self.labels, self.labels])
        kept = self.counts[:, None] - swapped
        mine, theirs = np.concatenate([kept, swapped]), np.concatenate([swapped, kept])
        return score(answers, labels, mine) - score(answers, labels, theirs)

    def list_blocks(self, most: int) -> list[int]:
        """Return the sizes of the blocks in which ``most`` resamples are drawn, or as many as :data:`WORK` allows."""
        resamples = min(most, max(FEWEST_RESAMPLES, WORK // self.baseline.size))
        size = max(1, RESAMPLES // math.ceil(RESAMPLES * self.baseline.size / AT_ONCE))  # of whole RESAMPLES
        return [min(size, resamples - begin) for begin in range(0, resamples, size)]


def paired_difference(score: Score, baseline: np.ndarray, variant: np.ndarray, labels: np.ndarray) -> Interval:
    """Return the score of the variant minus that of the baseline, with a bootstrap interval.

    Both are resampled on the same examples, so that examples that are hard for both cancel out. The interval is
    Student's, with the bootstrap's standard error: its coverage is nearer to 95 % than that of the bootstrap's
    percentiles, which are biased if a label is rare (``benchmarks/significance.py``). Its ends are NaN for a single
    example, and everything is NaN if the score is undefined.
    """
    from scipy.stats import t

    pairs, count = Pairs.group(baseline, variant, labels), len(labels)
    value = float(pairs.change(score, pairs.counts[:, None].astype(float))[0])
    if count < 2 or not math.isfinite(value):
        return Interval(value, math.nan, math.nan)
    if np.array_equal(pairs.baseline, pairs.variant):
        return Interval(value, value, value)
    generator = np.random.default_rng(0)
    changes = np.concatenate(
        [
            pairs.change(score, generator.multinomial(count, pairs.counts / count, size).T.astype(float))
            for size in pairs.list_blocks(RESAMPLES)
        ]
    )
    defined = changes[np.isfinite(changes)]  # a resample may lack a label
    half = float(t.ppf(0.975, count - 1) * defined.std()) if defined.size else math.nan
    return Interval(value, value - half, value + half)


def permutation_p_value(score: Score, baseline: np.ndarray, variant: np.ndarray, labels: np.ndarray) -> float:
    """Return the p-value of the paired permutation test, for any metric; NaN if the metric is undefined.

    Under the null hypothesis the two models' answers to an example can be swapped. Few ways to swap them are all
    counted. Of many, some are drawn until :data:`ENOUGH` change the score as much as the models do; if too few do to
    count their share, the p-value is the bound of :func:`bound_tail`.
    """
    pairs = Pairs.group(baseline, variant, labels)
    nothing = np.zeros((len(pairs.counts), 1))
    observed = abs(float(pairs.change_swapped(score, nothing)[0]))
    if not np.isfinite(observed):
        return math.nan
    free = pairs.counts * (pairs.baseline != pairs.variant).reshape(len(pairs.counts), -1).any(1)

    def is_extreme(changes: np.ndarray) -> np.ndarray:
        return ~(np.abs(changes) < observed * (1 - 1e-9))  # an undefined change counts

    # 1) Count all swaps if they are few
    ways = math.prod((free + 1).tolist())
    if ways * pairs.baseline.size <= AT_ONCE:
        swapped, chances = enumerate_swaps(free)
        return float(chances[is_extreme(pairs.change_swapped(score, swapped))].sum())
    # 2) Draw swaps until enough are as extreme, or until more of them would resolve no more than the bound does
    generator, blocks = np.random.default_rng(0), pairs.list_blocks(MOST_RESAMPLES)
    drawn, extreme, squares = 0, 0, 0.0
    for size in blocks:
        changes = pairs.change_swapped(score, draw_swaps(generator, free, size))
        drawn, extreme = drawn + size, extreme + int(is_extreme(changes).sum())
        squares += float(np.nansum(changes**2))
        if drawn < min(RESAMPLES, sum(blocks)):
            continue
        if extreme >= ENOUGH:
            return (extreme + 1) / (drawn + 1)
        if (bound := bound_tail(observed, math.sqrt(squares / drawn), drawn)) <= ENOUGH / sum(blocks):
            return bound
    return min((ENOUGH + 1) / (drawn + 1), bound)


def enumerate_swaps(free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all numbers of swapped examples of each row, ``[rows, ways]``, and the probability of each way."""
    from scipy.stats import binom

    swapped = np.array(list(itertools.product(*(range(n + 1) for n in free))), float).T
    return swapped, binom.pmf(swapped, free[:, None], 0.5).prod(0)


def draw_swaps(generator: np.random.Generator, free: np.ndarray, size: int) -> np.ndarray:
    """Return random numbers of swapped examples of each row, ``[rows, size]``."""
    swapped = np.minimum(generator.integers(0, 2, (len(free), size), dtype=np.int8), free[:, None]).astype(float)
    several = free > 1
    swapped[several] = generator.binomial(free[several, None], 0.5, (int(several.sum()), size))
    return swapped


def bound_tail(change: float, deviation: float, drawn: int) -> float:
    """Return a bound of the probability that swaps change a score by ``change`` or more in either direction.

    A sum of independent terms with random signs exceeds x of its standard deviations at most 3.178 times as often as a
    normal variable does (Bentkus and Dzindzalieta, Bernoulli 21, 2015). The scores are nearly such sums, and the
    ``deviation`` of the ``drawn`` changes is raised by two of its own standard errors.
    """
    from scipy.stats import norm

    deviations = change / (deviation * (1 + 2 / math.sqrt(2 * drawn))) if deviation else math.inf
    return float(2 * 3.178 * norm.sf(deviations))


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
