"""Test the statistics of the tables: simulate models whose true difference is known, and compare what the tables say.

    python benchmarks/significance.py [--families 100] [--trials 1000] [--examples 200 2000]

For each metric and number of examples it prints

- uniform: the p-value of Kolmogorov and Smirnov's test that the p-values of models without a difference are uniform.
  McNemar's p-value takes few values, each of which is uniform only up to its own size. Between a value and the next
  smaller one a random value is drawn, which is exactly uniform. Where few examples decide (200 examples), p-values of
  other metrics take few values too, and are larger than uniform ones;
- not small: the p-value of the one-sided test, that they are uniform or larger, which every p-value should be;
- false star: the share of families of 40 rows without a difference of which any gets a star, at most 5 % in truth;
- found: the share of families in which a loss of 2 points among 39 rows without a difference gets its star;
- covered: the share of the 95 % intervals that contain a true loss of 2 points (2 % of a perplexity);
- ms: the milliseconds of a comparison, its test and its interval.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, kstest

from compress.maths.statistics import holm
from compress.measuring.predictions import Comparison, Predictions, compare_predictions
from compress.tasks.kinds import KINDS

ROWS = 40
LOSS = 0.02
SHARED = 0.8
"""The share of the examples on which both models succeed or fail for the same reason."""
Pair = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Outputs of the baseline, outputs of the variant, and the labels."""


def draw_classes(generator: np.random.Generator, count: int, loss: float, shares: tuple[float, ...]) -> Pair:
    """Draw examples of classes of the given ``shares``; a model chooses the right one with probability 0.85."""
    labels = generator.choice(len(shares), count, p=shares)
    shared = generator.random(count) < SHARED
    common, wrong = generator.random(count), (labels + generator.integers(1, len(shares), count)) % len(shares)
    outputs = []
    for share in (0.85, 0.85 - loss):
        right = np.where(shared, common, generator.random(count)) < share
        outputs.append(np.eye(len(shares), dtype=np.float32)[np.where(right, labels, wrong)])
    return outputs[0], outputs[1], labels


def draw_numbers(generator: np.random.Generator, count: int, loss: float) -> Pair:
    """Draw answers that correlate by 0.86 with labels in steps of 0.2 from 0 to 5. The models share most errors."""
    quality = generator.standard_normal(count)
    labels = np.round(np.clip(2.5 + 1.5 * quality, 0, 5) * 5) / 5
    common = np.sqrt(SHARED) * generator.standard_normal(count)
    noises = (np.sqrt(correlation**-2 - 1) for correlation in (0.86, 0.86 - loss))
    outputs = [quality + noise * (common + np.sqrt(1 - SHARED) * generator.standard_normal(count)) for noise in noises]
    return outputs[0][:, None], outputs[1][:, None], labels


def draw_blocks(generator: np.random.Generator, count: int, loss: float) -> Pair:
    """Draw losses of blocks of 127 tokens, the last one shorter. Some blocks are far harder than most."""
    tokens = np.full(count, 127)
    tokens[-1] = 60
    common = 3 + 0.4 * generator.standard_normal(count) + 0.3 * generator.exponential(1, count)
    spread = 0.05 * np.exp(0.5 * generator.standard_normal(count))
    means = [common + np.log1p(extra) + spread * generator.standard_normal(count) for extra in (0.0, loss)]
    outputs = [np.stack([tokens * mean, np.zeros(count)], axis=1) for mean in means]
    return outputs[0], outputs[1], tokens


@dataclass(frozen=True)
class Case:
    """A metric, and a population of examples from which ``draw(generator, count, loss)`` takes a split."""

    kind: str
    metric: str
    draw: Callable[[np.random.Generator, int, float], Pair]

    def compare(self, pair: Pair) -> Comparison:
        baseline, variant = (self.predict(outputs, pair[2]) for outputs in pair[:2])
        comparison = compare_predictions(baseline, variant, self.metric)
        assert comparison is not None
        return comparison

    def predict(self, outputs: np.ndarray, labels: np.ndarray) -> Predictions:
        nothing = np.zeros(len(labels), int)
        return Predictions(self.kind, outputs, labels, nothing, nothing, nothing > 0)

    def true_change(self, generator: np.random.Generator, loss: float, count: int) -> float:
        """Return the change on ``count`` examples."""
        before, after, labels = self.draw(generator, count, loss)
        score = KINDS[self.kind].metrics[self.metric].compute
        return score(after, labels) - score(before, labels)


def draw_four(generator: np.random.Generator, count: int, loss: float) -> Pair:
    return draw_classes(generator, count, loss, (0.5, 0.3, 0.15, 0.05))


def draw_two(generator: np.random.Generator, count: int, loss: float) -> Pair:
    return draw_classes(generator, count, loss, (0.7, 0.3))


CASES = (
    Case("multiclass", "accuracy", draw_four),
    Case("multiclass", "f1_macro", draw_four),
    Case("multiclass", "matthews", draw_two),
    Case("regression", "spearman", draw_numbers),
    Case("lm", "perplexity", draw_blocks),
)


def test_nothing(case: Case, generator: np.random.Generator, examples: int) -> tuple[float, float]:
    """Return the p-value of two models without a difference, and one that is uniform if the test is exact."""
    pair = case.draw(generator, examples, 0.0)
    p_value = case.compare(pair).p_value
    assert p_value is not None
    if not KINDS[case.kind].metrics[case.metric].counts_examples:
        return p_value, p_value
    before, after = (case.predict(outputs, pair[2]).correct_examples for outputs in pair[:2])
    assert before is not None and after is not None
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    fewer = min(lost, won) - 1
    smaller = float(binomtest(fewer, lost + won).pvalue) if fewer >= 0 else 0.0
    return p_value, generator.uniform(smaller, p_value)


def plant_loss(case: Case, generator: np.random.Generator, examples: int) -> Pair:
    """Return models without a difference but for a loss of 2 points that is planted in the variant."""
    if case.kind != "multiclass":
        return case.draw(generator, examples, LOSS)
    before, _, labels = case.draw(generator, examples, 0.0)
    after = before.copy()
    right = np.flatnonzero(before.argmax(1) == labels)
    chosen = generator.choice(right, round(LOSS * examples), replace=False)
    after[chosen] = np.roll(after[chosen], 1, axis=1)
    return before, after, labels


@dataclass(frozen=True)
class Found:
    """What a simulation found of a metric; the shares are explained above."""

    uniform: float
    not_small: float
    false_star: float
    found: float
    covered: float
    ms: float


def simulate(case: Case, examples: int, families: int, trials: int, size: int = 2_000_000, seed: int = 0) -> Found:
    """Return what the tables say of models whose true difference is known, measured on ``size`` examples."""
    generator, begin = np.random.default_rng(seed), time.perf_counter()
    # 1) Families of rows without a difference, and with one planted loss
    tested = [[test_nothing(case, generator, examples) for _ in range(ROWS)] for _ in range(families)]
    rows = [[p_value for p_value, _ in family] for family in tested]
    planted = [case.compare(plant_loss(case, generator, examples)).p_value or 0.0 for _ in range(families)]
    # 2) Intervals of a true loss
    intervals = [case.compare(case.draw(generator, examples, LOSS)).change for _ in range(trials)]
    spent = time.perf_counter() - begin
    truth = case.true_change(generator, LOSS, size)
    # 3) Shares
    return Found(
        uniform=float(kstest([uniform for family in tested for _, uniform in family], "uniform").pvalue),
        not_small=float(kstest(np.concatenate(rows), "uniform", alternative="greater").pvalue),
        false_star=float(np.mean([min(holm(family)) < 0.05 for family in rows])),
        found=float(np.mean([holm([p, *family[1:]])[0] < 0.05 for p, family in zip(planted, rows)])),
        covered=float(np.mean([interval.low <= truth <= interval.high for interval in intervals])),
        ms=1000 * spent / (families * (ROWS + 1) + trials),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", type=int, default=100)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--examples", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--metrics", nargs="+", default=[case.metric for case in CASES])
    options = parser.parse_args()
    print("metric       examples   uniform  not small   false star     found   covered       ms")
    for examples in options.examples:
        for case in CASES:
            if case.metric in options.metrics:
                found = simulate(case, examples, options.families, options.trials)
                print(
                    f"{case.metric:<12} {examples:>8} {found.uniform:>9.3f} {found.not_small:>10.3f} "
                    f"{found.false_star:>12.1%} {found.found:>9.1%} {found.covered:>9.1%} {found.ms:>8.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
