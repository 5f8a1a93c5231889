"""Answers that differ from the baseline's are counted, named and quoted."""

import numpy as np

from compress.measuring.changes import LONGEST, MOST, list_changed_answers, quote_changed_texts
from compress.measuring.predictions import Predictions

NAMES = ("bad", "good")


def answer(*labels, truth, kind="multiclass", names=NAMES):
    outputs = np.eye(2)[list(labels)] if kind == "multiclass" else 2.0 * np.array(labels) - 1
    count = np.arange(1, len(truth) + 1)
    return Predictions(kind, outputs, np.array(truth), count, count, count > 0, names)


def test_answers_that_were_right_come_first():
    truth = [0, 0, 1, 1]
    changes = list_changed_answers(answer(1, 0, 1, 1, truth=truth), answer(0, 0, 0, 1, truth=truth))
    assert (changes.examples, changes.changed, changes.lost, changes.gained) == (4, 2, 1, 1)
    assert [(each.number, each.truth, each.before, each.after) for each in changes.shown] == [
        (3, "good", "good", "bad"),
        (1, "bad", "good", "bad"),
    ]


def test_several_labels_are_named_together():
    truth = [[1, 1], [0, 0]]
    before, after = ([[1, 1], [0, 0]], [[1, 0], [0, 1]])
    first, second = list_changed_answers(
        *(answer(*labels, truth=truth, kind="multilabel") for labels in (before, after))
    ).shown
    assert (first.truth, first.before, first.after) == ("bad, good", "bad, good", "bad")
    assert (second.truth, second.after) == ("none", "good")


def test_nothing_is_said_of_other_examples_or_of_answers_without_names():
    before = answer(1, 0, truth=[0, 0])
    assert list_changed_answers(before, answer(1, 0, truth=[0, 1])) is None
    assert list_changed_answers(before, answer(1, 1, truth=[0, 0], names=())) is None


def test_only_the_beginnings_of_texts_that_are_shown_are_quoted():
    many = [0] * (MOST + 5)
    before, after = answer(*many, truth=many), answer(*([1] * len(many)), truth=many)
    texts = ["x" * (LONGEST + number) for number in range(len(many))]
    quoted = quote_changed_texts(before, [after, before], texts)
    assert list(quoted) == list(range(1, MOST + 1))
    assert quoted[1] == texts[0] and len(quoted[2]) == LONGEST and quoted[2].endswith("…")
    assert quote_changed_texts(before, [after], []) == {}
