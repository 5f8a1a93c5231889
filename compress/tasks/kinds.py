"""Name the kinds of task and their metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


METRICS = {  # what each kind of task can be judged by
    "multiclass": ("accuracy", "f1_macro", "f1_micro", "matthews", "roc_auc"),
    "multilabel": ("subset_accuracy", "f1_macro", "f1_micro", "roc_auc"),
    "regression": ("pearson", "spearman"),
    "lm": ("perplexity", "accuracy"),
}


def higher_is_better(name: str) -> bool:
    """Of all our metrics only perplexity is better when it is lower, and so is a model's ``loss``."""
    return name not in ("perplexity", "loss")
