import numpy as np
import pytest

from compress.measuring.predictions import (
    NEGATION,
    Predictions,
    compare_predictions,
    find_worst_slice,
    measure_regressions,
    slice_examples,
)


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
