"""List the answers of a variant that differ from its baseline's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from compress.measuring.predictions import Predictions, are_paired

MOST = 12
"""The number of examples that are shown."""
LONGEST = 300
"""Characters of a text that is quoted."""


@dataclass(frozen=True)
class ChangedAnswer:
    """An example whose answer changed: its ``number`` in the split, counted from 1, its label and both answers."""

    number: int
    tokens: int
    truth: str
    before: str
    after: str


@dataclass(frozen=True)
class ChangedAnswers:
    """How many answers of the ``examples`` changed, how many of these were right before or are now, and the first."""

    examples: int
    changed: int
    lost: int
    gained: int
    shown: tuple[ChangedAnswer, ...]


def list_changed_answers(baseline: Predictions, variant: Predictions) -> ChangedAnswers | None:
    """Return the answers that changed, those that were right before first. Return None without labels with names.

    >>> list_changed_answers(baseline, variant).shown[0].after  # doctest: +SKIP
    'bad'
    """
    before, after = baseline.predicted_labels, variant.predicted_labels
    named = variant.kind in ("multiclass", "multilabel") and variant.names and are_paired(baseline, variant)
    if not named or before is None or after is None or baseline.correct_examples is None:
        return None
    was, now = np.asarray(baseline.correct_examples), np.asarray(variant.correct_examples)
    differs = (before != after).reshape(len(after), -1).any(1)
    order = sorted(np.flatnonzero(differs), key=lambda i: (not was[i], now[i]))
    return ChangedAnswers(
        examples=len(after),
        changed=int(differs.sum()),
        lost=int((was & ~now).sum()),
        gained=int((now & ~was).sum()),
        shown=tuple(
            ChangedAnswer(
                number=int(i) + 1,
                tokens=int(variant.tokens[i]),
                **{
                    key: name_label(answers[i], variant.names)
                    for key, answers in (("truth", variant.labels), ("before", before), ("after", after))
                },
            )
            for i in order[:MOST]
        ),
    )


def quote_changed_texts(baseline: Predictions, variants: Iterable[Predictions], texts: Sequence[str]) -> dict[int, str]:
    """Return the beginnings of the ``texts`` of the split whose changed answers are shown, by their numbers."""
    changes = [list_changed_answers(baseline, variant) for variant in variants] if texts else []
    numbers = sorted({answer.number for each in changes if each for answer in each.shown})
    quoted = ((number, texts[number - 1]) for number in numbers)
    return {number: text if len(text) <= LONGEST else text[: LONGEST - 1] + "…" for number, text in quoted}


def name_label(label: np.ndarray, names: tuple[str, ...]) -> str:
    """Return the name of a label, or the names of several labels; a label may be one that the task does not name.

    >>> name_label(np.array([1, 0, 1]), ("joy", "anger", "fear"))
    'joy, fear'
    """
    if np.ndim(label):
        return ", ".join(name for name, chosen in zip(names, label) if chosen) or "none"
    return names[int(label)] if 0 <= int(label) < len(names) else str(int(label))
