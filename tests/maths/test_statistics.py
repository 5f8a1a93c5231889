"""Worked by hand, or against scipy on other ways to the same number."""

import numpy as np
import pytest
from scipy.stats import binom, ttest_1samp

from compress.maths.scores import class_accuracy as accuracy
from compress.maths.scores import perplexity
from compress.maths.statistics import (
    assign_terciles,
    holm,
    label_churn,
    mcnemar,
    mean_interval,
    paired_difference,
    permutation_p_value,
)


def answers(right):
    """Logits of two labels for examples of label 0, of which these are ``right``."""
    return np.where(np.array(right)[:, None], [[1.0, 0.0]], [[0.0, 1.0]]), np.zeros(len(right), int)


def test_mcnemar_counts_the_examples_on_which_one_alone_is_right():
    # 5 lost, 1 won: the chance of a split of six coins as uneven as 5:1 is 2 * (1 + 6) / 64.
    baseline = np.array([True] * 5 + [False] + [True] * 20)
    variant = np.array([False] * 5 + [True] + [True] * 20)
    assert mcnemar(baseline, variant) == pytest.approx(14 / 64)
    assert mcnemar(baseline, baseline) == 1.0
    assert mcnemar(np.ones(10, bool), np.zeros(10, bool)) == pytest.approx(2 * binom.pmf(0, 10, 0.5))


def test_the_interval_of_a_difference_is_that_of_the_pairs():
    right = np.arange(1000) % 10 > 0
    lost = right.copy()
    lost[1:21] = False  # of which 18 were right: -1.8 points
    baseline, labels = answers(right)
    found = paired_difference(accuracy, baseline, answers(lost)[0], labels)
    assert found.value == pytest.approx(-0.018)
    spread = 1.96 * np.sqrt(0.018 * 0.982 / 1000)  # of the pairs that differ
    assert found.low == pytest.approx(-0.018 - spread, abs=0.002)
    assert found.high == pytest.approx(-0.018 + spread, abs=0.002)
    same = paired_difference(accuracy, baseline, baseline, labels)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_swapped_answers_give_the_p_value_of_any_metric():
    baseline, labels = answers([True] * 8)
    assert permutation_p_value(accuracy, baseline, baseline, labels) == 1.0
    # All of 8 pairs differ in one direction: of the 256 ways to swap them two are as extreme.
    assert permutation_p_value(accuracy, baseline, answers([False] * 8)[0], labels) == pytest.approx(2 / 256)
    blocks, words = np.stack([np.full(12, 100.0), np.zeros(12)], 1), np.full(12, 50)
    worse = blocks + [[1.0, 0.0]]
    assert permutation_p_value(perplexity, blocks, worse, words) < 0.01


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and holm([]) == []


def test_churn_counts_every_change_of_label():
    assert label_churn(np.array([0, 1, 2, 1]), np.array([0, 2, 1, 1])) == 0.5
    assert label_churn(np.array([[1, 0], [0, 1]]), np.array([[1, 1], [0, 1]])) == 0.5


def test_seeds_make_a_t_interval():
    found = mean_interval([-0.24, 0.05, -0.62])
    expected = ttest_1samp([-0.24, 0.05, -0.62], 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert mean_interval([1.0]).high == np.inf


def test_terciles_hold_a_third_each():
    assert assign_terciles(np.array([3, 1, 2, 6, 5, 4])).tolist() == [1, 0, 0, 2, 2, 1]
    assert assign_terciles(np.array([1, 1, 1])).tolist() == [0, 0, 0]
