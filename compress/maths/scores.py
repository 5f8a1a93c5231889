"""Scores of answers as plain functions of arrays, an example a row, fast enough for thousands of resamples."""

from __future__ import annotations

import numpy as np


def class_columns(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the predicted and the true classes as 0/1 columns."""
    classes = np.arange(logits.shape[1])
    return logits.argmax(1)[:, None] == classes, labels[:, None] == classes


def label_columns(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the predicted labels, of a probability above one half, and the true ones as 0/1 columns."""
    return logits > 0, labels > 0


def class_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of the examples whose class is predicted."""
    return float((logits.argmax(1) == labels).mean())


def subset_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of the examples of which all labels are predicted and no other."""
    predicted, there = label_columns(logits, labels)
    return float((predicted == there).all(1).mean())


def f1_macro(predicted: np.ndarray, there: np.ndarray) -> float:
    """Return the mean F1 of the 0/1 columns, without those that are neither predicted nor there."""
    hits, either = (predicted & there).sum(0), predicted.sum(0) + there.sum(0)
    return float((2 * hits[either > 0] / either[either > 0]).mean()) if (either > 0).any() else 0.0


def f1_micro(predicted: np.ndarray, there: np.ndarray) -> float:
    """Return the F1 of all 0/1 columns taken together."""
    return float(2 * (predicted & there).sum() / max(1, predicted.sum() + there.sum()))


def matthews(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return Gorodkin's correlation of several classes (2004)."""
    predicted, there = (columns.astype(float) for columns in class_columns(logits, labels))
    p, t = predicted - predicted.mean(0), there - there.mean(0)
    scale = np.sqrt((p * p).sum() * (t * t).sum())
    return float((p * t).sum() / scale) if scale else 0.0


def roc_auc(scores: np.ndarray, there: np.ndarray) -> float:
    """Return the mean area over the 0/1 columns that have both values (Mann and Whitney, 1947); NaN if none has."""
    from scipy.stats import rankdata

    both = there.any(0) & ~there.all(0)
    if not both.any():
        return float("nan")
    ranks, there = rankdata(scores[:, both], axis=0), there[:, both]
    yes = there.sum(0)
    return float((((ranks * there).sum(0) - yes * (yes + 1) / 2) / (yes * (len(there) - yes))).mean())


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of the classes."""
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def pearson(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the linear correlation; NaN where either is constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(outputs.ravel(), labels.ravel())[0, 1])


def spearman(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the correlation of the ranks; NaN where either is constant."""
    from scipy.stats import rankdata

    return pearson(rankdata(outputs.ravel()), rankdata(labels.ravel()))


def perplexity(outputs: np.ndarray, tokens: np.ndarray) -> float:
    """Return the exponential of the mean loss of a token; the first column holds the sum of every block's losses."""
    with np.errstate(over="ignore"):
        return float(np.exp(outputs[:, 0].sum(dtype=float) / tokens.sum()))


def token_accuracy(outputs: np.ndarray, tokens: np.ndarray) -> float:
    """Return the share of the tokens that are predicted; the second column holds how many of every block are."""
    return float(outputs[:, 1].sum(dtype=float) / tokens.sum())
