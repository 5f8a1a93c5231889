"""Score answers in words as SQuAD's own scripts do.

Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", 2016, arXiv:1606.05250, and "Know What
You Don't Know", 2018, arXiv:1806.03822, for questions without an answer.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Return the text in lower case, without punctuation and English articles, its words joined by one space."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split())


def score_answer(found: str, true: Sequence[str], may_be_empty: bool) -> tuple[float, float]:
    """Return whether an answer is exactly a true one, 1 or 0, and the largest F1 of its words against a true one's.

    Args:
        found: the answer; empty for none.
        true: the true answers; none if the question has no answer.
        may_be_empty: whether questions may have no answer, as in SQuAD 2.0: true answers without words are left out,
            and two answers without words are equal, while in SQuAD 1.1 they share no word.
    """
    ours = normalise_answer(found).split()
    wanted = [normalise_answer(answer).split() for answer in true]
    if may_be_empty:
        wanted = [words for words in wanted if words]
    exact = best = 0.0
    for theirs in wanted or [[]]:
        shared = sum((Counter(ours) & Counter(theirs)).values())
        same = float(ours == theirs)
        exact = max(exact, same)
        best = max(best, 2 * shared / (len(ours) + len(theirs)) if ours and theirs else same * may_be_empty)
    return exact, best
