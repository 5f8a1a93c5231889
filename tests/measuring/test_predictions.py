from dataclasses import replace

import numpy as np
import pytest

from compress.maths.statistics import SMALLEST_P
from compress.measuring.predictions import (
    NEGATION,
    Predictions,
    compare_predictions,
    find_worst_slice,
    measure_regressions,
    slice_examples,
)
from compress.tasks.kinds import KINDS


def predictions(right, negated=None, lengths=None, seed=0):
    """Return predictions for examples of two labels, correct where ``right`` is True."""
    count = len(right)
    labels = np.arange(count) % 2
    logits = np.eye(2)[np.where(right, labels, 1 - labels)]
    negated = np.zeros(count, bool) if negated is None else negated
    lengths = np.arange(1, count + 1) if lengths is None else lengths
    return Predictions("multiclass", logits, labels, lengths, lengths, negated, ("bad", "good"))


EVERY = np.ones(100, bool)


def test_saved_predictions_load_unchanged(tmp_path):
    saved = predictions(EVERY)
    saved.save(tmp_path / "deep" / "predictions.npz")
    loaded = Predictions.load(tmp_path / "deep" / "predictions.npz")
    assert loaded.kind == "multiclass" and loaded.names == ("bad", "good")
    assert np.array_equal(loaded.outputs, saved.outputs) and loaded.score("accuracy") == 1.0


def test_a_regression_is_found_in_its_slice():
    negated = np.arange(100) < 30
    right = ~(np.arange(100) < 15)
    found = {
        change.name: change
        for change in measure_regressions(predictions(EVERY, negated), predictions(right, negated), "accuracy")
    }
    assert list(found) == ["label bad", "label good", "short texts", "middling texts", "long texts", "with negation",
                           "without negation"]  # fmt: skip
    assert found["with negation"].change == -0.5 and found["with negation"].p_value == pytest.approx(2 / 2**15)
    assert found["without negation"].change == 0.0 and found["without negation"].p_value == 1.0
    assert found["short texts"].change == pytest.approx(-15 / 34) and found["label bad"].change == pytest.approx(
        -8 / 50
    )


def test_the_worst_slice_is_named_and_its_p_value_is_corrected_for_the_others():
    negated = np.arange(100) < 30
    lost = predictions(~(np.arange(100) < 15), negated)
    found = find_worst_slice(predictions(EVERY, negated), lost, "accuracy")
    assert (found.name, found.change) == ("with negation", -0.5)
    assert found.p_value == pytest.approx(7 * 2 / 2**15)  # the smallest p-value of seven slices
    assert find_worst_slice(lost, predictions(EVERY, negated), "accuracy") is None


def test_slices_of_few_examples_are_left_out():
    assert "with negation" not in slice_examples(predictions(EVERY, negated=np.arange(100) < 9))


def test_a_comparison_has_the_change_and_its_significance():
    right = ~(np.arange(100) < 6)
    found = compare_predictions(predictions(EVERY), predictions(right), "accuracy")
    assert found.change.value == pytest.approx(-0.06) and found.change.low < -0.06 < found.change.high < 0
    assert found.p_value == pytest.approx(2 / 64) and found.churn == 0.06
    f1 = compare_predictions(predictions(EVERY), predictions(right), "f1_macro")
    assert f1.p_value < 0.06 and f1.change.high < 0


def test_other_examples_are_not_compared():
    assert compare_predictions(predictions(EVERY), predictions(EVERY[:50]), "accuracy") is None
    assert measure_regressions(predictions(EVERY), predictions(EVERY[:50]), "accuracy") == []


@pytest.mark.parametrize(
    ("text", "found"),
    [("It isn't good", True), ("Never again.", True), ("a notable knot", False), ("isn’t", True)],
)
def test_words_of_negation(text, found):
    assert bool(NEGATION.search(text)) == found


def test_a_p_value_is_never_below_what_is_resolved():
    assert compare_predictions(predictions(EVERY), predictions(~EVERY), "accuracy").p_value == SMALLEST_P
    assert compare_predictions(predictions(EVERY), predictions(~EVERY), "matthews").p_value == SMALLEST_P


@pytest.mark.parametrize("metric", list(KINDS["multiclass"].metrics))
def test_the_value_and_its_interval_are_of_one_metric_although_a_class_is_absent(metric):
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3  # the fourth class is absent
    before, after = (
        replace(predictions(EVERY), outputs=generator.standard_normal((60, 4)) + np.eye(4)[labels], labels=labels)
        for _ in range(2)
    )
    change = compare_predictions(before, after, metric).change
    assert change.value == pytest.approx(after.score(metric) - before.score(metric), abs=1e-12)
    assert change.low < change.value < change.high


def blocks(losses):
    """Return predictions of a language model for blocks of 50 tokens, of texts from short to long."""
    count = len(losses)
    outputs = np.stack([losses, np.zeros(count)], axis=1)
    lengths, tokens = np.arange(1, count + 1), np.full(count, 50)
    return Predictions("lm", outputs, tokens, tokens, lengths, lengths > count)


@pytest.mark.parametrize(
    ("before", "after", "metric"),
    [
        (predictions(EVERY[:1]), predictions(~EVERY[:1]), "f1_macro"),
        (blocks([100.0]), blocks([120.0]), "perplexity"),
        (replace(predictions(EVERY), labels=np.ones(100, int)), replace(predictions(~EVERY), labels=np.ones(100, int)),
         "roc_auc"),
    ],
)  # fmt: skip
def test_one_example_or_an_undefined_metric_is_not_tested(before, after, metric):
    found = compare_predictions(before, after, metric)
    assert found.p_value is None and np.isnan([found.change.low, found.change.high]).all()
    assert np.isnan(found.change.value) == (metric == "roc_auc")


def test_the_slice_that_lost_most_has_the_highest_perplexity():
    before, change = blocks(np.full(90, 100.0)), np.repeat([-9.0, 2.0, 5.0], 30)
    worst = find_worst_slice(before, blocks(100 + change), "perplexity")
    assert worst.name == "long texts" and worst.change == pytest.approx(np.exp(2.1) - np.exp(2))
    assert find_worst_slice(before, blocks(100 - abs(change)), "perplexity") is None


def test_a_slice_without_a_defined_metric_is_not_the_worst():
    generator, labels = np.random.default_rng(0), np.arange(90.0)
    labels[:30] = 3.0  # the short texts
    outputs = labels[:, None] + generator.standard_normal((90, 1))
    lengths = np.arange(1, 91)
    before = Predictions("regression", outputs, labels, lengths, lengths, lengths > 90)
    worst = find_worst_slice(before, replace(before, outputs=outputs + generator.standard_normal((90, 1))), "pearson")
    assert worst.name in ("middling texts", "long texts", "without negation") and worst.change < 0
