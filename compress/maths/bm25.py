"""Find documents by the words that they share with a query: a first stage for rerankers, and a source of hard
negatives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

WORD = re.compile(r"\w+")


def rank_by_words(
    queries: Sequence[str], documents: Sequence[str], count: int, k1: float = 1.2, b: float = 0.75
) -> np.ndarray:
    """Return for every query the places of the ``count`` documents with the highest BM25, best first (Robertson and
    Zaragoza, "The Probabilistic Relevance Framework", 2009).

    Args:
        queries: texts to find documents for.
        documents: texts to find.
        count: documents for each query; all if there are fewer.
        k1: how soon repetitions of a word stop to count.
        b: how much a document's length counts.

    >>> rank_by_words(["red apples"], ["green pears", "red apples"], 1).tolist()
    [[1]]
    """
    from scipy.sparse import csr_matrix

    words: dict[str, int] = {}
    counts = [Counter(split_words(text)) for text in documents]
    for found in counts:
        for word in found:
            words.setdefault(word, len(words))
    rows = np.repeat(np.arange(len(documents)), [len(found) for found in counts])
    columns = np.array([words[word] for found in counts for word in found], dtype=int)
    times = np.array([number for found in counts for number in found.values()], dtype=float)
    lengths = np.array([sum(found.values()) for found in counts], dtype=float)
    holding = np.bincount(columns, minlength=len(words))
    rarity = np.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
    damping = k1 * (1 - b + b * lengths / max(lengths.mean(), 1))
    weights = rarity[columns] * times * (k1 + 1) / (times + damping[rows])
    index = csr_matrix((weights, (rows, columns)), shape=(len(documents), len(words)))
    ranked = []
    for query in queries:
        known = [words[word] for word in split_words(query) if word in words]
        asked = csr_matrix((np.ones(len(known)), (np.zeros(len(known), dtype=int), known)), shape=(1, len(words)))
        scores = (index @ asked.T).toarray().ravel()
        ranked.append(np.argsort(-scores, kind="stable")[:count])
    return np.array(ranked, dtype=int).reshape(len(queries), -1)


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return WORD.findall(text.lower())
