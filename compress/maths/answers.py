"""Score answers in words as SQuAD's own scripts do.

Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", 2016, arXiv:1606.05250, and "Know What
You Don't Know", 2018, arXiv:1806.03822, for questions without an answer.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from compress.maths.scores import sum_weighted

PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Return the text in lower case, without punctuation and English articles, its words joined by one space."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split())


def match_exactly(found: str, true: Sequence[str]) -> float:
    """Return 1 if the answer is one of the true ones, else 0; an empty text is the answer to a question without one."""
    return float(any(normalise_answer(found) == normalise_answer(answer) for answer in true or ("",)))


def overlap_words(found: str, true: Sequence[str], empty_matches: bool) -> float:
    """Return the largest F1 of the answer's words against those of a true answer.

    Args:
        found: the answer; empty for none.
        true: the true answers; none if the question has no answer.
        empty_matches: whether two answers without words are equal, as in SQuAD 2.0; in SQuAD 1.1 they share no word.
    """
    best = 0.0
    for answer in true or ("",):
        ours, theirs = normalise_answer(found).split(), normalise_answer(answer).split()
        shared = sum((Counter(ours) & Counter(theirs)).values())
        best = max(best, 2 * shared / (len(ours) + len(theirs)) if shared else float(empty_matches and ours == theirs))
    return best


def weigh_mean(values: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean of the examples' own values in every resample."""
    return sum_weighted(values, weights) / weights.sum(0)
