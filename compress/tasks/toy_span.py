"""Generate questions about short reports, whose answer is a part of the report or missing from it.

A report has one or two facts: who did what, where and when. A question names the act and the thing of a fact and asks
for the rest; some ask for what no fact says. A small transformer learns them in about a minute.
"""

from __future__ import annotations

import random
from typing import Any

SIZES = {"train": 10_000, "validation": 500, "test": 1_000}

PEOPLE = """anna boris clara david elena felix grace hugo ines jonas karla leon mira nils olga paul""".split()
THINGS = """lamp boat piano house painting camera horse car garden bicycle tent clock""".split()
ACTS = ("bought", "sold", "lost", "found")
PLACES = "paris lagos kyoto quito oslo cairo lima delhi perth turin".split()
TIMES = (*"monday tuesday friday sunday easter christmas".split(), "new year's day", "a rainy day", "the first of may")
SURNAMES = "berg silva okafor tanaka moreau novak".split()


def generate_splits() -> dict[str, dict[str, list[Any]]]:
    """Return the columns ``question``, ``context`` and ``answers`` of every split: always the same, and no report in
    two splits."""
    rng = random.Random(0)
    rows: dict[tuple[str, str], list[str]] = {}
    while len(rows) < sum(SIZES.values()):
        question, context, answers = generate_question(rng)
        rows[question, context] = answers
    left = [(question, context, answers) for (question, context), answers in rows.items()]
    tables: dict[str, dict[str, list[Any]]] = {}
    for split, size in SIZES.items():
        taken, left = left[:size], left[size:]
        questions, contexts, answers = (list(column) for column in zip(*taken))
        tables[split] = {"question": questions, "context": contexts, "answers": answers}
    return tables


def generate_question(rng: random.Random) -> tuple[str, str, list[str]]:
    """Return a question, its report, and its answer in a list, which is empty if there is no answer."""
    # 1) Draw facts on different things
    facts = []
    for thing in rng.sample(THINGS, rng.choice((1, 2))):
        person = rng.choice(PEOPLE) + (f" {rng.choice(SURNAMES)}" if rng.random() < 0.4 else "")
        facts.append((person, rng.choice(ACTS), thing, rng.choice(PLACES), rng.choice(TIMES)))
    # 2) Write them, and ask for a part of one that the report may leave out
    person, act, thing, place, time = rng.choice(facts)
    asked = rng.choice(("who", "where", "when"))
    missing = asked if rng.random() < 0.2 else ""
    report = [write_fact(*fact, missing if fact[2] == thing else "") for fact in facts]
    questions = {
        "who": f"who {act} the {thing} ?",
        "where": f"where was the {thing} {act} ?",
        "when": f"when was the {thing} {act} ?",
    }
    answer = {"who": person, "where": place, "when": time}[asked]
    return questions[asked], " ".join(report), [] if missing else [answer]


def write_fact(person: str, act: str, thing: str, place: str, time: str, missing: str) -> str:
    """Return the sentence of a fact without the ``missing`` part: who, where or when."""
    words = ["somebody" if missing == "who" else person, act, "the", thing]
    words += [] if missing == "where" else ["in", place]
    words += [] if missing == "when" else ["on", time]
    return " ".join([*words, "."])
