"""A data set made on the spot: opinions whose verdict must be composed from their words.

A clause has a polarity (``good`` is one, ``superb`` two) that intensifiers weigh and negations turn around; of two
clauses, ``but`` lets the second decide and ``and`` takes both; what somebody else is said to think does not count. Bags
of words and dictionaries fail on it, a small transformer learns it in a minute on two CPU cores, and pruning it hurts.
"""

from __future__ import annotations

import random

LABELS = ("awful", "bad", "good", "great")
SIZES = {"train": 8000, "validation": 500, "test": 2000}

THINGS = """film book play song novel concert album show series documentary hotel room bed breakfast restaurant soup
salad pizza curry coffee tea bread cake service waiter cook garden beach museum tour guide train bus flight seat ticket
phone camera screen battery keyboard laptop lamp chair table sofa jacket shirt shoe watch toy game puzzle ending plot
cast dialogue music view pool menu price lecture""".split()
PEOPLE = """critic neighbour brother sister friend colleague teacher uncle aunt mother father guest stranger reviewer
boss cousin""".split()
VERBS = "thinks says claims believes insists writes reckons swears".split()
POLARITY = {
    2: "superb brilliant wonderful excellent perfect amazing fantastic outstanding magnificent delightful".split(),
    1: "nice pleasant decent fine likeable charming enjoyable tasty comfortable useful pretty friendly".split(),
    -1: "dull poor weak bland boring clumsy noisy slow stale shabby plain awkward".split(),
    -2: "terrible horrible dreadful disgusting atrocious appalling hideous abysmal ghastly vile".split(),
}
INTENSITY = {2.0: "very truly really extremely".split(), 0.5: "slightly somewhat rather fairly".split()}
NEGATIONS = "not hardly never scarcely".split()
OPENINGS = ["", "", "", "honestly , ", "in the end ", "last week ", "to my mind "]


def splits() -> dict[str, dict[str, list]]:
    """Columns ``text`` and ``label`` of every split; always the same, and no sentence stands in two of them."""
    rng = random.Random(0)
    labels: dict[str, int] = {}
    while len(labels) < sum(SIZES.values()):
        text, score = opinion(rng)
        labels[text] = verdict(score)
    rows = iter(labels.items())
    return {
        split: dict(zip(("text", "label"), map(list, zip(*(next(rows) for _ in range(size))))))
        for split, size in SIZES.items()
    }


def verdict(score: float) -> int:
    """The index in ``LABELS`` of an opinion's score."""
    return (score > 0) + (score >= 1.5) + (score > -1.5)


def opinion(rng: random.Random) -> tuple[str, float]:
    """A sentence and its score, which is never 0."""
    text, score = clause(rng)
    form = rng.random()
    if form < 0.2:
        other, weight = clause(rng)
        text, score = f"{text} but {other}", weight  # the second clause decides
    elif form < 0.35:
        other, weight = clause(rng)
        if score + weight == 0:
            return opinion(rng)
        text, score = f"{text} and {other}", (score + weight) / 2
    if rng.random() < 0.2:
        theirs = f"my {rng.choice(PEOPLE)} {rng.choice(VERBS)} {clause(rng)[0]}"
        text = f"{theirs} , yet {text}" if rng.random() < 0.5 else f"{text} , though {theirs}"
    return f"{rng.choice(OPENINGS)}{text} .", score


def clause(rng: random.Random) -> tuple[str, float]:
    """``the soup was not very tasty``, and -2 for it."""
    polarity = rng.choice(list(POLARITY))
    words, score = [rng.choice(POLARITY[polarity])], float(polarity)
    if rng.random() < 0.5:
        intensity = rng.choice(list(INTENSITY))
        words, score = [rng.choice(INTENSITY[intensity]), *words], score * intensity
    if rng.random() < 0.25:
        words, score = [rng.choice(NEGATIONS), *words], -score
    return f"the {rng.choice(THINGS)} was {' '.join(words)}", score
