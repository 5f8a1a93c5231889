"""Score answers by plain functions of arrays, one example a row, fast enough for thousands of resamples."""

from __future__ import annotations

import numpy as np


def class_columns(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the predicted and the true classes as 0/1 columns."""
    classes = np.arange(logits.shape[1])
    return logits.argmax(1)[:, None] == classes, labels[:, None] == classes


def label_columns(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the predicted labels, with a probability above one half, and the true labels as 0/1 columns."""
    return logits > 0, labels > 0


def class_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of the examples whose class is predicted correctly."""
    return float((logits.argmax(1) == labels).mean())


def subset_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of the examples with exactly their labels predicted."""
    predicted, true = label_columns(logits, labels)
    return float((predicted == true).all(1).mean())


def f1_macro(predicted: np.ndarray, true: np.ndarray) -> float:
    """Return the mean F1 of the 0/1 columns, without columns that are all 0 in both arrays."""
    hits, either = (predicted & true).sum(0), predicted.sum(0) + true.sum(0)
    return float((2 * hits[either > 0] / either[either > 0]).mean()) if (either > 0).any() else 0.0


def f1_micro(predicted: np.ndarray, true: np.ndarray) -> float:
    """Return the F1 of all 0/1 columns taken together."""
    return float(2 * (predicted & true).sum() / max(1, predicted.sum() + true.sum()))


def matthews(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return Gorodkin's correlation of several classes (2004)."""
    predicted, true = (columns.astype(float) for columns in class_columns(logits, labels))
    p, t = predicted - predicted.mean(0), true - true.mean(0)
    scale = np.sqrt((p * p).sum() * (t * t).sum())
    return float((p * t).sum() / scale) if scale else 0.0


def roc_auc(scores: np.ndarray, true: np.ndarray) -> float:
    """Return the mean area over the 0/1 columns with both values (Mann and Whitney, 1947); NaN if there is none."""
    from scipy.stats import rankdata

    both = true.any(0) & ~true.all(0)
    if not both.any():
        return float("nan")
    ranks, true = rankdata(scores[:, both], axis=0), true[:, both]
    positives = true.sum(0)
    area = ((ranks * true).sum(0) - positives * (positives + 1) / 2) / (positives * (len(true) - positives))
    return float(area.mean())


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of the classes."""
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def pearson(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the linear correlation; NaN if outputs or labels are constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(outputs.ravel(), labels.ravel())[0, 1])


def spearman(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the correlation of the ranks; NaN if outputs or labels are constant."""
    from scipy.stats import rankdata

    return pearson(rankdata(outputs.ravel()), rankdata(labels.ravel()))


def perplexity(outputs: np.ndarray, tokens: np.ndarray) -> float:
    """Return the exponential of the mean loss of a token; the first column of ``outputs`` sums a block's losses."""
    with np.errstate(over="ignore"):
        return float(np.exp(outputs[:, 0].sum(dtype=float) / tokens.sum()))


def token_accuracy(outputs: np.ndarray, tokens: np.ndarray) -> float:
    """Return the share of correct tokens; the second column of ``outputs`` counts a block's correct tokens."""
    return float(outputs[:, 1].sum(dtype=float) / tokens.sum())
