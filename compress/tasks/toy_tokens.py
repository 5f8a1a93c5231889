"""Generate sentences with named entities of one to three words, whose type their sentence decides.

A person, a place or a company may be called ``jordan``: the words around a name say what it is. Names alone decide less
than half of the tags; a small transformer learns the rest in about a minute.
"""

from __future__ import annotations

import random
from typing import Any

TYPES = ("company", "person", "place", "product")
SIZES = {"train": 6_000, "validation": 500, "test": 1_000}

FORENAMES = "anna boris clara david elena felix grace hugo ines jonas karla leon mira nils olga paul".split()
CITIES = "paris lagos kyoto quito oslo cairo lima delhi perth turin".split()
FIRMS = "intertek nordbank petrolux solarix vodalink maxidata cargolux".split()
GOODS = "phone laptop camera scooter lamp drone watch printer".split()
SHARED = "jordan austin chelsea sydney florence hamilton lincoln orlando savannah victoria washington madison".split()
"""Names of persons, places, companies and products alike."""
SIGNS = "one two plus mini max pro".split()
SENTENCES = """{person} lives in {place} .
{person} works for {company} .
{person} met {person} near {place} .
{person} bought a {product} yesterday .
{person} sold the {product} to {person} .
{company} hired {person} .
{company} opened a shop in {place} .
{company} sells the {product} in {place} .
the {product} by {company} broke again .
the flight from {place} to {place} was late .
shares of {company} fell , said {person} .
nobody in {place} likes the new {product} .
it rained in {place} all day .
she wrote to {person} about the {product} .
we drove to {place} with {person} .
the lawyers of {company} sued {company} .
what a lovely evening !
nothing happened at the weekend .""".split("\n")


def generate_splits() -> dict[str, dict[str, list[Any]]]:
    """Return the columns ``words`` and ``tags`` of every split: always the same, and no sentence in two splits."""
    rng = random.Random(0)
    sentences: dict[tuple[str, ...], tuple[str, ...]] = {}
    while len(sentences) < sum(SIZES.values()):
        words, tags = generate_sentence(rng)
        sentences[words] = tags
    rows = list(sentences.items())
    tables: dict[str, dict[str, list[Any]]] = {}
    for split, size in SIZES.items():
        taken, rows = rows[:size], rows[size:]
        tables[split] = {"words": [list(words) for words, _ in taken], "tags": [list(tags) for _, tags in taken]}
    return tables


def generate_sentence(rng: random.Random) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the words of a sentence and their tags."""
    words, tags = [], []
    for part in rng.choice(SENTENCES).split():
        if not part.startswith("{"):
            words.append(part)
            tags.append("O")
            continue
        kind = part.strip("{}")
        name = generate_name(rng, kind)
        words += name
        tags += [f"B-{kind}", *[f"I-{kind}"] * (len(name) - 1)]
    return tuple(words), tuple(tags)


def generate_name(rng: random.Random, kind: str) -> list[str]:
    """Return the words of a name: ``new jordan`` for a place, ``jordan mini`` for a product."""
    own = {"person": FORENAMES, "place": CITIES, "company": FIRMS, "product": GOODS}[kind]
    first = rng.choice(own if rng.random() < 0.4 else SHARED)
    forms = {
        "person": [[first], [first, rng.choice(SHARED)]],
        "place": [[first], ["new", first], [first, "upon", rng.choice(SHARED)]],
        "company": [[first], [first, "and", rng.choice(SHARED)]],
        "product": [[first], [first, rng.choice(SIGNS)]],
    }
    return rng.choice(forms[kind])
