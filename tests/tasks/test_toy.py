"""The generated data set follows its rules and never changes."""

import random
from collections import Counter

from compress.tasks import toy
from compress.tasks.toy import classify_score, generate_clause, generate_labels, generate_opinion, generate_splits


class Script(random.Random):
    """A random generator that returns the values of a script and repeats the last; choices take the first."""

    def __init__(self, *values):
        super().__init__(0)
        self.values = list(values)

    def random(self):
        return self.values.pop(0) if len(self.values) > 1 else self.values[0]

    def choice(self, sequence):
        return sequence[0]


def test_a_clause_is_worth_its_word_and_a_negation_leaves_its_mild_opposite():
    assert generate_clause(Script(0.9, 0.9)) == ("the film was superb", 2.0)
    assert generate_clause(Script(0.1, 0.9)) == ("the film was very superb", 2.0)
    assert generate_clause(Script(0.9, 0.1)) == ("the film was not superb", -1.0)


def test_but_lets_the_second_clause_decide():
    # plain superb, `but`, not superb, no other opinion
    assert generate_opinion(Script(0.9, 0.9, 0.1, 0.9, 0.1, 0.9)) == (
        "the film was superb but the film was not superb .",
        -1.0,
    )


def test_somebody_elses_opinion_does_not_count():
    text, score = generate_opinion(Script(0.9, 0.9, 0.9, 0.1, 0.9, 0.1, 0.1))
    assert (text, score) == ("my critic thinks the film was not superb , yet the film was superb .", 2.0)


def test_verdicts_are_ordered():
    assert [toy.LABELS[classify_score(score)] for score in (-2, -1, -0.5, 0.5, 1, 2)] == [
        "awful", "bad", "bad", "good", "good", "great"
    ]  # fmt: skip


def test_it_is_the_same_every_time_and_no_sentence_is_in_two_splits():
    tables = generate_splits()
    generate_labels.cache_clear()
    assert tables == generate_splits()
    assert {split: len(table["text"]) for split, table in tables.items()} == toy.SIZES
    texts = [text for table in tables.values() for text in table["text"]]
    assert len(set(texts)) == len(texts)


def test_every_verdict_is_common_and_the_vocabulary_is_worth_a_tokenizer():
    train = generate_splits()["train"]
    counts = Counter(train["label"])
    assert sorted(counts) == [0, 1, 2, 3]
    assert min(counts.values()) > 0.1 * len(train["label"])
    assert len({word for text in train["text"] for word in text.split()}) > 150
