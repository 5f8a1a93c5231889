"""Losses that train a model whose answer to a text is a vector.

Vectors are ``[texts, width]``. ``labels`` ``[texts, 3]`` say which texts of a batch belong together: the number of a
text's example, its place in the example, and a value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ITSELF = -1
"""The place of a text that is compared with itself alone."""
TEMPERATURE = 0.05
"""The divisor of cosines before a softmax: 20 is the usual factor (Henderson et al., 2017, arXiv:1705.00652)."""


def pool_tokens(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Return a vector for each text from its last hidden states ``[texts, tokens, width]``.

    Args:
        states: hidden states of the last layer.
        mask: ``[texts, tokens]``, nonzero where a token is not padding.
        pooling: ``mean`` of the tokens, ``cls`` (the first token) or ``last`` (the last token that is not padding).
    """
    if pooling == "mean":
        real = mask.unsqueeze(-1).to(states.dtype)
        return (states * real).sum(1) / real.sum(1).clamp(min=1)
    places = torch.arange(states.shape[1], device=states.device)
    # The first token is not at 0 where texts are padded on the left.
    chosen = (places * mask.long() if pooling == "last" else mask.long()).argmax(1)
    return states.gather(1, chosen[:, None, None].expand(-1, 1, states.shape[-1])).squeeze(1)


def cosine_loss(vectors: Tensor, labels: Tensor) -> Tensor | None:
    """Return the squared error of the cosines of pairs against their values; None without a whole pair.

    A pair is a text at place 0 and a text at place 1 of one example (Reimers and Gurevych, "Sentence-BERT", 2019,
    arXiv:1908.10084).
    """
    if (labels[:, 1] == ITSELF).all():
        return self_loss(vectors)
    left, right = (labels[:, 1] == place for place in (0, 1))
    first, second = (labels[left, 0][:, None] == labels[right, 0]).nonzero(as_tuple=True)
    if not len(first):
        return None
    cosines = F.cosine_similarity(vectors[left][first].float(), vectors[right][second].float())
    return F.mse_loss(cosines, labels[left, 2][first].float())


def contrastive_loss(vectors: Tensor, labels: Tensor) -> Tensor | None:
    """Return the cross-entropy of choosing a query's document among all documents of the batch; None if no query's
    document is there.

    A query is at place 0 and its value is the number of its document; a document is at place 1 and its example is its
    number. Hard negatives are documents that no query names (Karpukhin et al., "Dense Passage Retrieval", 2020,
    arXiv:2004.04906). A document that occurs twice counts once.
    """
    if (labels[:, 1] == ITSELF).all():
        return self_loss(vectors)
    asked, answers = (labels[:, 1] == place for place in (0, 1))
    numbers, inverse = labels[answers, 0].unique(return_inverse=True)
    first = torch.full_like(numbers, len(inverse), dtype=torch.long)
    first = first.scatter_reduce(0, inverse, torch.arange(len(inverse), device=inverse.device), "amin")
    queries, targets = (labels[asked, 2][:, None] == numbers).nonzero(as_tuple=True)
    if not len(queries):
        return None
    documents = F.normalize(vectors[answers][first].float(), dim=-1)
    cosines = F.normalize(vectors[asked][queries].float(), dim=-1) @ documents.T
    return F.cross_entropy(cosines / TEMPERATURE, targets)


def self_loss(vectors: Tensor) -> Tensor:
    """Return the cross-entropy of choosing a text's own vector among all vectors of the batch.

    It needs no labels, and its gradient says which weights keep texts apart.
    """
    unit = F.normalize(vectors.float(), dim=-1)
    own = torch.arange(len(unit), device=unit.device)
    return F.cross_entropy(unit @ unit.detach().T / TEMPERATURE, own)


def vector_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return one minus the cosine of the student's vector and the teacher's, mean over the texts."""
    return 1 - F.cosine_similarity(student.float(), teacher.detach().float()).mean()


def similarity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared error of the cosines between all texts of the batch, for any widths of the two models (Tung
    and Mori, "Similarity-Preserving Knowledge Distillation", 2019, arXiv:1907.09682)."""
    ours, theirs = (F.normalize(vectors.float(), dim=-1) for vectors in (student, teacher.detach()))
    return F.mse_loss(ours @ ours.T, theirs @ theirs.T)


VECTORS = {"vectors": vector_distance, "similarities": similarity_distance}
"""Losses between a student's vectors and its teacher's, by the name of the setting."""
