"""Entities are those of seqeval, which reads tags as CoNLL's own script does."""

import random
import warnings

import numpy as np
import pytest

from compress.maths import entities
from compress.maths.entities import count_orphans, list_entities, mark_entities, marks_entities, name_types
from compress.tasks.kinds import KINDS

seqeval = pytest.importorskip("seqeval.metrics", reason="seqeval is not installed: pip install -e '.[dev]'")
warnings.filterwarnings("ignore", module="seqeval")
BIO = ["O", *(f"{prefix}-{kind}" for prefix in "BI" for kind in ("person", "creative-work", "group"))]
IOBES = [*BIO, *(f"{prefix}-{kind}" for prefix in "ES" for kind in ("person", "creative-work", "group"))]
METRICS = KINDS["tokens"].metrics


def draw_sentences(names, count, seed):
    """Return random tags, which break every rule of their scheme, and all lengths of sentences."""
    rng = random.Random(seed)
    return [rng.choices(range(len(names)), [3] + [1] * (len(names) - 1), k=rng.randrange(1, 12)) for _ in range(count)]


def pad(sentences):
    width = max(map(len, sentences))
    return np.array([row + [-1] * (width - len(row)) for row in sentences])


def spell(sentences, names):
    return [[names[tag] for tag in row] for row in sentences]


@pytest.mark.parametrize("names", [BIO, IOBES], ids=["BIO", "IOBES"])
def test_entities_and_every_metric_are_those_of_seqeval(names):
    true, found = (draw_sentences(names, 200, seed) for seed in (0, 1))
    rng = random.Random(2)
    found = [
        [tag if rng.random() < 0.7 else rng.randrange(len(names)) for tag in row] if rng.random() < 0.8 else
        (other * 12)[: len(row)]
        for row, other in zip(true, found)
    ]  # fmt: skip
    marked = {which: mark_entities(pad(rows), names) for which, rows in {"found": found, "true": true}.items()}
    for row, listed in zip(spell(true, names), list_entities(marked["true"], names)):
        assert [tuple(entity) for entity in listed] == seqeval.sequence_labeling.get_entities(row)
    pair = spell(true, names), spell(found, names)
    scores = {name: metric.compute(marked["found"], marked["true"]) for name, metric in METRICS.items()}
    assert scores == pytest.approx(
        {
            "entity_f1": seqeval.f1_score(*pair),
            "entity_precision": seqeval.precision_score(*pair),
            "entity_recall": seqeval.recall_score(*pair),
            "entity_f1_macro": seqeval.f1_score(*pair, average="macro", zero_division=0),
            "accuracy": seqeval.accuracy_score(*pair),
        }
    )
    assert 0.2 < scores["entity_f1"] < 0.9


def test_weights_count_a_sentence_as_often_as_they_say():
    true, found = (mark_entities(pad(draw_sentences(BIO, 30, seed)), BIO) for seed in (3, 4))
    width = min(true.shape[1], found.shape[1])
    true, found = true[:, :width], found[:, :width]
    times = np.random.default_rng(0).integers(0, 4, (30, 5))
    for metric in METRICS.values():
        repeated = [metric.compute(found.repeat(column, axis=0), true.repeat(column, axis=0)) for column in times.T]
        assert metric.score(found, true, times.astype(float)) == pytest.approx(repeated)


def test_nothing_found_is_worth_nothing():
    true, none = mark_entities(np.array([[1, 2, 0]]), BIO), mark_entities(np.array([[-1, -1, -1]]), BIO)
    scores = {name: metric.compute(none, true) for name, metric in METRICS.items()}
    assert set(scores.values()) == {0.0}
    assert entities.entity_f1(none, none, np.ones((1, 1))) == 0.0


def test_parts_of_speech_are_no_entities():
    assert not marks_entities(["NOUN", "VERB", "O"]) and not marks_entities(["O"]) and marks_entities(["O", "I-x"])
    assert name_types(["ADJ", "NOUN"]) == []
    assert (mark_entities(np.array([[0, 1]]), ["ADJ", "NOUN"]) == [[[0, -1, 0], [1, -1, 0]]]).all()


def test_an_inside_without_a_beginning_is_counted():
    assert count_orphans(["I-a", "I-a", "O", "B-a", "I-b", "B-b", "I-b", "I-b"]) == 2
