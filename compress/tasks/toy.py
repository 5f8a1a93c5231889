"""Generate a data set of opinions whose verdict must be composed from their words.

A word is strong (``superb``) or mild (``nice``); intensifiers strengthen or weaken it, and a negation leaves its mild
opposite. Of two clauses joined by ``but`` the second decides, by ``and`` the stronger; the opinions of others do not
count. Words alone decide three verdicts in five; a small transformer learns the rules in about a minute.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

LABELS = ("awful", "bad", "good", "great")
SIZES = {"train": 16_000, "validation": 500, "test": 2_000}
PAIRS = {"train": 8_000, "validation": 400, "test": 1_000}

THINGS = """film book play song novel concert album show series documentary hotel room bed breakfast restaurant soup
salad pizza curry coffee tea bread cake service waiter cook garden beach museum tour guide train bus flight seat ticket
phone camera screen battery keyboard laptop lamp chair table sofa jacket shirt shoe watch toy game puzzle ending plot
cast dialogue music view pool menu price lecture""".split()
PEOPLE = """critic neighbour brother sister friend colleague teacher uncle aunt mother father guest hairdresser doctor
boss cousin""".split()
VERBS = "thinks says claims believes insists writes reckons swears".split()
POLARITY = {
    2.0: "superb brilliant wonderful excellent perfect amazing fantastic outstanding magnificent delightful".split(),
    1.0: "nice pleasant decent fine likeable charming enjoyable tasty comfortable useful pretty friendly".split(),
    -1.0: "dull poor weak bland boring clumsy noisy slow stale shabby plain awkward".split(),
    -2.0: "terrible horrible dreadful disgusting atrocious appalling hideous abysmal ghastly vile".split(),
}
INTENSITY = {2.0: "very truly really extremely".split(), 0.5: "slightly somewhat rather fairly".split()}
NEGATIONS = "not hardly never scarcely".split()
OPENINGS = ("", "", "", "honestly , ", "in the end ", "last week ", "to my mind ")


def generate_splits() -> dict[str, dict[str, list[Any]]]:
    """Return the columns ``text`` and ``label`` of every split: always the same, and no sentence in two splits."""
    labels = generate_labels()
    tables: dict[str, dict[str, list[Any]]] = {}
    texts = list(labels)
    for split, size in SIZES.items():
        taken, texts = texts[:size], texts[size:]
        tables[split] = {"text": taken, "label": [labels[text] for text in taken]}
    return tables


@cache  # the jobs of a sweep in one process read the same sentences
def generate_labels() -> dict[str, int]:
    """Return the labels of different sentences, in the order of the splits."""
    rng = random.Random(0)
    labels: dict[str, int] = {}
    while len(labels) < sum(SIZES.values()):
        text, score = generate_opinion(rng)
        labels[text] = classify_score(score)
    return labels


def generate_pairs() -> dict[str, dict[str, list[Any]]]:
    """Return the columns ``text``, ``text_pair`` and ``label`` of every split: two clauses, and from 0 to 1 how near
    their scores are. No clause is in two splits."""
    rng = random.Random(0)
    clauses = dict(generate_clause(rng) for _ in range(2 * sum(PAIRS.values())))
    share, texts = len(clauses) / sum(PAIRS.values()), list(clauses)
    pairs: dict[str, dict[str, list[Any]]] = {}
    for split, size in PAIRS.items():
        taken, texts = texts[: int(size * share)], texts[int(size * share) :]
        first, second = ([rng.choice(taken) for _ in range(size)] for _ in range(2))
        near = [1 - abs(clauses[one] - clauses[other]) / 4 for one, other in zip(first, second)]
        pairs[split] = {"text": first, "text_pair": second, "label": near}
    return pairs


def classify_score(score: float) -> int:
    """Return the index in ``LABELS`` of an opinion's score, between -2 and 2 and not 0."""
    return (score > -1.5) + (score > 0) + (score > 1.5)


def generate_opinion(rng: random.Random) -> tuple[str, float]:
    """Return a sentence and its score."""
    text, score = generate_clause(rng)
    form = rng.random()
    if form < 0.2:
        other, weight = generate_clause(rng)
        text, score = f"{text} but {other}", weight
    elif form < 0.35:
        other, weight = generate_clause(rng)
        while score * weight < 0:  # only `but` joins praise and blame
            other, weight = generate_clause(rng)
        text, score = f"{text} and {other}", max(score, weight, key=abs)
    if rng.random() < 0.2:
        aside = f"my {rng.choice(PEOPLE)} {rng.choice(VERBS)} {generate_clause(rng)[0]}"
        text = f"{aside} , yet {text}" if rng.random() < 0.5 else f"{text} , though {aside}"
    return f"{rng.choice(OPENINGS)}{text} .", score


def generate_clause(rng: random.Random) -> tuple[str, float]:
    """Return a clause and its score: ``the soup was really tasty`` scores 2, not really tasty -1."""
    score = rng.choice(list(POLARITY))
    words = [rng.choice(POLARITY[score])]
    if rng.random() < 0.5:
        intensity = rng.choice(list(INTENSITY))
        words.insert(0, rng.choice(INTENSITY[intensity]))
        score = max(-2.0, min(2.0, score * intensity))
    if rng.random() < 0.3:
        words.insert(0, rng.choice(NEGATIONS))
        score = -1.0 if score > 0 else 1.0
    return f"the {rng.choice(THINGS)} was {' '.join(words)}", score
