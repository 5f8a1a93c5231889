"""The kinds of task.

A new kind is a subclass of :class:`compress.tasks.kinds.base.Kind` in ``KINDS``. Reading a task's config must stay
cheap, so only the methods that need torch import it.
"""

from compress.tasks.kinds.base import Answers, Kind, Metric, Probabilities
from compress.tasks.kinds.chat import Chat
from compress.tasks.kinds.classes import Multiclass, Multilabel, Regression
from compress.tasks.kinds.embedding import EmbeddingPairs
from compress.tasks.kinds.harness import Harness
from compress.tasks.kinds.language import LanguageModel
from compress.tasks.kinds.rerank import Rerank
from compress.tasks.kinds.retrieval import Retrieval
from compress.tasks.kinds.span import Span
from compress.tasks.kinds.tokens import Tokens

__all__ = ["KINDS", "Answers", "Kind", "Metric", "Probabilities", "higher_is_better"]

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Multiclass(),
        Multilabel(),
        Regression(),
        LanguageModel(),
        Harness(),
        EmbeddingPairs(),
        Retrieval(),
        Rerank(),
        Tokens(),
        Span(),
        Chat(),
    )
}


def higher_is_better(metric: str) -> bool:
    """Return whether a higher value of ``metric``, a metric's name or ``loss``, is better."""
    entries = (kind.metrics[metric] for kind in KINDS.values() if metric in kind.metrics)
    return metric != "loss" and all(entry.higher_is_better for entry in entries)
