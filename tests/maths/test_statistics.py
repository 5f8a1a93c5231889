"""Worked by hand, or against scipy on other ways to the same number."""

import math

import numpy as np
import pytest
from scipy.stats import binom, ttest_1samp

from compress.maths.scores import accuracy, pearson, perplexity, roc_auc
from compress.maths.statistics import (
    assign_terciles,
    bound_tail,
    holm,
    label_churn,
    mcnemar,
    mean_interval,
    paired_difference,
    pareto_indices,
    permutation_p_value,
)


def answers(right):
    """Return predictions for examples of label 0, of which these are ``right``, and the labels."""
    return np.where(right, 0, 1), np.zeros(len(right), int)


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


def test_p_values_resolve_what_a_correction_for_many_rows_asks_for():
    # 40 of 1,043 answers were lost and none won: all swaps of 40 pairs but two are less extreme.
    right = np.arange(1043) > 0
    lost = right & (np.arange(1043) > 40)
    baseline, labels = answers(right)
    assert permutation_p_value(accuracy, baseline, answers(lost)[0], labels) == pytest.approx(2 / 2**40)
    # Of 300 unequal changes too few swaps are drawn to see one as extreme: a bound of what is smaller.
    generator = np.random.default_rng(0)
    losses = generator.normal(100, 10, 300)
    blocks, worse = (np.stack([kept, np.zeros(300)], 1) for kept in (losses, losses + generator.normal(0.4, 1, 300)))
    p_value = permutation_p_value(perplexity, blocks, worse, np.full(300, 50))
    assert ttest_1samp(worse[:, 0] - losses, 0).pvalue < p_value < 1e-6


@pytest.mark.parametrize("sevenths", [3, 5, 7])
def test_the_bound_of_a_tail_holds_for_uneven_sums_and_is_not_loose(sevenths):
    # Sums of random signs times 1 or 3, whose distribution is worked out in full.
    steps = np.array([3] * 5 + [1] * 20)
    chances = np.array([1.0])
    for step in steps:
        chances = np.convolve(chances, [0.5, *[0] * (2 * step - 1), 0.5])
    sums = np.arange(-steps.sum(), steps.sum() + 1)
    change = int(np.ceil(sevenths / 7 * 0.7 * steps.sum()))
    exact = chances[abs(sums) >= change].sum()
    assert exact <= bound_tail(change, np.sqrt((steps**2).sum()), 10_000) < 20 * exact


def test_an_undefined_score_has_no_interval_and_no_p_value():
    generator = np.random.default_rng(0)
    outputs, other, constant = generator.random(20), generator.random(20), np.full(20, 3.1)
    found = paired_difference(pearson, outputs, other, constant)
    assert np.isnan([found.value, found.low, found.high]).all()
    assert np.isnan(permutation_p_value(pearson, outputs, other, constant))
    assert np.isnan(permutation_p_value(roc_auc, np.eye(2)[[0, 1]], np.eye(2)[[1, 1]], np.array([1, 1])))
    one = paired_difference(accuracy, np.array([0]), np.array([1]), np.array([0]))
    assert one.value == -1 and np.isnan([one.low, one.high]).all()


def test_points_without_a_worth_are_not_on_the_front():
    assert pareto_indices([1.0, 2.0, 3.0], [math.nan, 0.5, 0.7]) == [1, 2]
