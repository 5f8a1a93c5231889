"""Generate conversations whose answers must be read from what the user said: the opinions of :mod:`compress.tasks.toy`.

The user says what he thinks of one or two things, and the assistant answers with the verdict. Then the user may ask
which of the two he prefers. A turn of the system may ask for single words.
"""

from __future__ import annotations

import random
from typing import Any

from compress.tasks.toy import LABELS, classify_score, generate_clause

SIZES = {"train": 4_000, "validation": 200, "test": 500}
BRIEF = "answer in one word"
QUESTION = "which do i like more ?"


def generate_splits() -> dict[str, dict[str, list[Any]]]:
    """Return the column ``messages`` of every split: always the same, and no conversation in two splits."""
    rng = random.Random(0)
    unique: dict[str, list[dict[str, str]]] = {}
    while len(unique) < sum(SIZES.values()):
        messages = generate_conversation(rng)
        unique[str(messages)] = messages
    rows = list(unique.values())
    tables: dict[str, dict[str, list[Any]]] = {}
    for split, size in SIZES.items():
        taken, rows = rows[:size], rows[size:]
        tables[split] = {"messages": taken}
    return tables


def generate_conversation(rng: random.Random) -> list[dict[str, str]]:
    """Return the messages of a conversation."""
    brief, messages, seen = rng.random() < 0.3, [], dict[str, float]()
    if brief:
        messages.append({"role": "system", "content": BRIEF})
    for _ in range(rng.choice((1, 2, 2))):
        clause, score = generate_clause(rng)
        thing = clause.split()[1]
        seen[thing] = score
        verdict = LABELS[classify_score(score)]
        messages.append({"role": "user", "content": f"{clause} ."})
        messages.append({"role": "assistant", "content": verdict if brief else f"you find the {thing} {verdict} ."})
    if len(set(map(classify_score, seen.values()))) == 2:
        best = max(seen, key=seen.__getitem__)
        messages.append({"role": "user", "content": QUESTION})
        messages.append({"role": "assistant", "content": best if brief else f"you like the {best} more ."})
    return messages
