"""Find the entities that the tags of words mark, and score them, as seqeval and CoNLL's ``conlleval`` do.

Tags are ``O`` outside of entities, and a prefix with a type: ``B-person`` begins an entity and ``I-person`` is inside
it; ``E-`` (or ``L-``) ends it and ``S-`` (or ``U-``) is an entity of a single word. A tag that cannot continue the
entity before it begins one: an ``I-`` without a ``B-`` is no error.

Ramshaw and Marcus, "Text Chunking using Transformation-Based Learning", 1995, arXiv:cmp-lg/9505040.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from compress.maths.scores import sum_weighted

OUTSIDE, BEGIN, INSIDE, END, SINGLE = range(5)
PREFIXES = {"O": OUTSIDE, "B": BEGIN, "I": INSIDE, "E": END, "L": END, "S": SINGLE, "U": SINGLE}
TAG = re.compile(r"O|[BIELSU](-.*)?", re.DOTALL)
TAGS, TYPES, LENGTHS = range(3)
"""The last axis of :func:`mark_entities`."""


class Entity(NamedTuple):
    """The words from ``first`` to ``last`` of a sentence are an entity of this type."""

    type: str
    first: int
    last: int


def marks_entities(names: Sequence[str]) -> bool:
    """Return whether tags mark entities: all have a prefix, and one of them begins entities."""
    return all(map(TAG.fullmatch, names)) and any(name[0] in "BSU" or name.startswith("I-") for name in names)


def split_tag(name: str) -> tuple[int, str]:
    """Return the prefix of a tag and its type; ``_`` is the type of a tag without one."""
    prefix, _, kind = name.partition("-")
    return PREFIXES[prefix], kind or "_"


def name_types(names: Sequence[str]) -> list[str]:
    """Return the types of entities in order; an empty list if the tags mark none."""
    return sorted({split_tag(name)[1] for name in names if name != "O"}) if marks_entities(names) else []


def mark_entities(tags: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return tags with the entities that begin at each word.

    Args:
        tags: indices in ``names``, ``[sentences, words]``; negative after a sentence's end, and where there is no
            answer, which is outside of entities.
        names: names of all tags.

    Returns:
        ``[sentences, words, 3]``: the tag, the index in :func:`name_types` of the entity that begins at this word, or
        -1 if none does, and the number of its words.
    """
    marked = np.stack([tags, np.full_like(tags, -1), np.zeros_like(tags)], axis=-1)
    types = name_types(names)
    if not types:
        return marked
    # 1) Look up the prefixes and the types, with a word outside before and after every sentence
    prefixes, kinds = zip(*(split_tag(name) for name in names), (OUTSIDE, "_"))  # index -1 is outside
    padded = np.pad(np.where(tags < 0, -1, tags), ((0, 0), (1, 1)), constant_values=-1)
    prefix = np.array(prefixes)[padded]
    kind = np.array([types.index(name) if at != OUTSIDE else -1 for at, name in zip(prefixes, kinds)])[padded]
    # 2) Compare every word with the word before it
    before, after = prefix[:, :-1], prefix[:, 1:]
    inside = (before == BEGIN) | (before == INSIDE)
    goes_on = (after == INSIDE) | (after == END)
    continued = inside & goes_on & (kind[:, :-1] == kind[:, 1:])
    begins = (after != OUTSIDE) & ~continued
    ends = (before != OUTSIDE) & ~continued
    # 3) Pair beginnings with ends, which take turns
    (rows, first), (_, stop) = np.nonzero(begins), np.nonzero(ends)
    marked[rows, first, TYPES] = kind[rows, first + 1]
    marked[rows, first, LENGTHS] = stop - first
    return marked


def list_entities(marked: np.ndarray, names: Sequence[str]) -> list[list[Entity]]:
    """Return the entities of every sentence in order, from the arrays of :func:`mark_entities`."""
    types = name_types(names)
    sentences: list[list[Entity]] = [[] for _ in marked]
    for row, word in zip(*np.nonzero(marked[..., TYPES] >= 0)):
        kind, length = map(int, marked[row, word, TYPES:])
        sentences[row].append(Entity(types[kind], int(word), int(word) + length - 1))
    return sentences


def count_orphans(tags: Sequence[str]) -> int:
    """Return how many entities of a sentence begin with ``I-``."""
    pairs = zip(("O", *tags), tags)
    return sum(tag[:2] == "I-" and (last[0] not in "BI" or last[1:] != tag[1:]) for last, tag in pairs)


# Scores: of arrays as of mark_entities, with a sentence a row


def count_entities(found: np.ndarray, true: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the numbers of correctly found, found and true entities, each ``[types, resamples]``."""
    width = int(max(found[..., TYPES].max(initial=-1), true[..., TYPES].max(initial=-1))) + 1
    types = np.arange(width)
    same = (found[..., TYPES:] == true[..., TYPES:]).all(-1)
    hits = np.where(same, true[..., TYPES], -1)
    each = (hits, found[..., TYPES], true[..., TYPES])
    return tuple(sum_weighted((kinds[..., None] == types).sum(1), weights) for kinds in each)


def divide(numbers: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Return the quotients, 0 where the divisor is."""
    return np.divide(numbers, by, out=np.zeros(np.shape(numbers)), where=by > 0)


def entity_f1(found: np.ndarray, true: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the F1 of all entities: an entity is right if its type, its first and its last word are."""
    hits, chosen, wanted = (counts.sum(0) for counts in count_entities(found, true, weights))
    return divide(2 * hits, chosen + wanted)


def entity_precision(found: np.ndarray, true: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the share of the found entities that are right."""
    hits, chosen, _ = (counts.sum(0) for counts in count_entities(found, true, weights))
    return divide(hits, chosen)


def entity_recall(found: np.ndarray, true: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the share of the true entities that are found."""
    hits, _, wanted = (counts.sum(0) for counts in count_entities(found, true, weights))
    return divide(hits, wanted)


def entity_f1_macro(found: np.ndarray, true: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean F1 of the types, without types that are neither found nor true; 0 without any."""
    hits, chosen, wanted = count_entities(found, true, weights)
    either = chosen + wanted
    return divide(divide(2 * hits, either).sum(0), (either > 0).sum(0))


def word_accuracy(found: np.ndarray, true: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the share of the words whose tag is right."""
    words = true[..., TAGS] >= 0
    right = words & (found[..., TAGS] == true[..., TAGS])
    return sum_weighted(right.sum(1), weights) / sum_weighted(words.sum(1), weights)
