"""Compare texts by their vectors, in the forms in which an index stores them, and judge rankings.

An index costs more than the model that fills it: a million vectors of 384 floats take 1.5 GB. Every form is cheaper and
loses something, so each has metrics of its own. Vectors are compared by their cosine, which ignores their lengths.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

WIDTHS = (256, 128, 64, 32)
FORMS = ("float", *(f"dim{width}" for width in WIDTHS), "int8", "binary")
"""The forms of a vector: all floats, the first floats alone, integers of 8 bits, and signs."""
DEPTHS = (1, 10, 100)
"""The numbers of documents at the top of a ranking that recall counts in."""
DEPTH = 10
"""The number of documents at the top of a ranking that nDCG and MRR see."""


def store_vectors(vectors: np.ndarray, form: str) -> np.ndarray:
    """Return the ``vectors`` ``[texts, width]`` as an index in this form holds them, as floats.

    ``dim64`` keeps the first 64 numbers (Kusupati et al., "Matryoshka Representation Learning", 2022,
    arXiv:2205.13147); a narrower vector is kept whole. ``int8`` rounds to integers from -127 to 127 on a grid for every
    vector, whose scale its cosine does not need. ``binary`` keeps the signs.

    >>> store_vectors(np.array([[0.3, -0.6]]), "int8").tolist()
    [[64.0, -127.0]]
    """
    if form.startswith("dim"):
        return vectors[:, : int(form.removeprefix("dim"))]
    if form == "int8":
        largest = abs(vectors).max(1, keepdims=True)
        return np.round(127 * vectors / np.where(largest > 0, largest, 1))
    return np.where(vectors >= 0, 1.0, -1.0) if form == "binary" else vectors


def measure_bytes(width: int, form: str) -> int:
    """Return the bytes of a vector of this ``width`` in a form; floats take four."""
    if form.startswith("dim"):
        return 4 * min(width, int(form.removeprefix("dim")))
    return {"float": 4 * width, "int8": width, "binary": (width + 7) // 8}[form]


def scale_to_unit(vectors: np.ndarray) -> np.ndarray:
    """Return the vectors at length 1; those of length 0 stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def compare_pairs(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the cosines of pairs of vectors ``[pairs, width]``, a column for each of :data:`FORMS`."""
    stored = [[scale_to_unit(store_vectors(side, form)) for side in (left, right)] for form in FORMS]
    return np.stack([(a * b).sum(1) for a, b in stored], axis=1)


def rank_documents(queries: np.ndarray, documents: np.ndarray, form: str, count: int) -> np.ndarray:
    """Return for every query the places of the ``count`` documents with the highest cosines, best first.

    The ``documents`` ``[documents, width]`` are stored in the ``form``. The ``queries`` ``[queries, width]`` are stored
    nowhere, so they stay floats, of as many numbers.
    """
    index = scale_to_unit(store_vectors(documents, form)).astype(np.float32)
    queries = queries[:, : index.shape[1]].astype(np.float32)
    count = min(count, len(documents))
    ranked = []
    for part in np.array_split(queries, max(1, len(queries) * len(documents) // 20_000_000)):
        cosines = part @ index.T
        best = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(cosines, best, 1), axis=1, kind="stable")
        ranked.append(np.take_along_axis(best, order, 1))
    return np.concatenate(ranked)


def judge_ranking(gains: Sequence[float], relevant: Collection[float]) -> list[float]:
    """Return nDCG@10, MRR@10 and the recall at each of :data:`DEPTHS` of a query's ranking.

    nDCG is Järvelin and Kekäläinen's (2002) with linear gains, as in trec_eval and BEIR.

    Args:
        gains: grades of the documents of the ranking, best first; 0 for an irrelevant document.
        relevant: grades of all relevant documents of the query.

    >>> [round(value, 3) for value in judge_ranking([0, 1], [1])]
    [0.631, 0.5, 0.0, 1.0, 1.0]
    """
    ideal = discount(sorted(relevant, reverse=True))
    first = next((place for place, gain in enumerate(gains[:DEPTH], 1) if gain > 0), None)
    hits = [sum(gain > 0 for gain in gains[:depth]) / max(len(relevant), 1) for depth in DEPTHS]
    return [discount(gains) / ideal if ideal else 0.0, 1 / first if first else 0.0, *hits]


def discount(gains: Sequence[float]) -> float:
    """Return the discounted cumulative gain of the first :data:`DEPTH` documents."""
    return float(sum(gain / np.log2(place + 1) for place, gain in enumerate(gains[:DEPTH], 1)))


JUDGEMENTS = ("ndcg_10", "mrr_10", *(f"recall_{depth}" for depth in DEPTHS))
"""The names of the numbers of :func:`judge_ranking`."""
