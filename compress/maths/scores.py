"""Score answers with every example counted some number of times, for many such countings at once.

``answers`` and ``labels`` have an example a row. ``weights`` is ``[examples, resamples]``, the number of times that an
example counts in a resample, and every function returns a score for each resample. The score of a split is that of a
single column of ones; a bootstrap sample and a swap of two models' answers are other weights.
"""

from __future__ import annotations

import numpy as np

ROUNDING = 1e-12
"""The share of a sum of squares below which a variance is a rounding error: the variable is constant."""


def choose_class(logits: np.ndarray) -> np.ndarray:
    """Return the class with the highest logit."""
    return logits.argmax(-1)


def choose_labels(logits: np.ndarray) -> np.ndarray:
    """Return the labels with a probability above one half as 0/1 columns."""
    return logits > 0


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of the classes."""
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def split_columns(classes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays of classes as 0/1 columns; 0/1 columns are returned as they are."""
    if classes.ndim > 1:
        return classes > 0, others > 0
    columns = np.arange(max(classes.max(), others.max()) + 1)
    return classes[:, None] == columns, others[:, None] == columns


def sum_weighted(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the sum of ``values`` in every resample, ``[resamples]`` or ``[columns, resamples]``."""
    return values.T.astype(float) @ weights


def accuracy(predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the share of the examples for which exactly the true labels are predicted."""
    same = predicted == labels
    return sum_weighted(same.reshape(len(same), -1).all(1), weights) / weights.sum(0)


def count_hits(
    predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the numbers of correct predictions, predictions and true labels, each ``[labels, resamples]``."""
    chosen, true = split_columns(predicted, labels)
    return sum_weighted(chosen & true, weights), sum_weighted(chosen, weights), sum_weighted(true, weights)


def f1_macro(predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean F1 of the labels, without labels that are neither predicted nor true; 0 without any."""
    hits, chosen, true = count_hits(predicted, labels, weights)
    either = chosen + true
    return (2 * hits / np.maximum(either, 1)).sum(0) / np.maximum((either > 0).sum(0), 1)


def f1_micro(predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the F1 of all labels taken together; 0 if none is predicted or true."""
    hits, chosen, true = (counts.sum(0) for counts in count_hits(predicted, labels, weights))
    return 2 * hits / np.maximum(chosen + true, 1)


def matthews(predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return Gorodkin's correlation of several classes (2004); 0 if a single class is predicted or true."""
    hits, chosen, true = count_hits(predicted, labels, weights)
    count = weights.sum(0)
    covariance = hits.sum(0) * count - (chosen * true).sum(0)
    scale = np.sqrt((count**2 - (chosen**2).sum(0)) * (count**2 - (true**2).sum(0)))
    return np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0)


def count_below(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return for every example how many have a lower value; those with the same value count half."""
    _, level, sizes = np.unique(values, return_inverse=True, return_counts=True)
    counts = weights[values.argsort()]
    if len(sizes) < len(values):
        counts = np.add.reduceat(counts, sizes.cumsum() - sizes, axis=0)
    return (counts.cumsum(axis=0) - counts / 2)[level]


def roc_auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean area over the labels that some examples have and some lack (Mann and Whitney, 1947).

    ``scores`` has a column for each label; ``labels`` are 0/1 columns or classes. NaN if there is no such label.
    """
    true = labels > 0 if labels.ndim > 1 else labels[:, None] == np.arange(scores.shape[1])
    total, present = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    for column, positive in zip(scores.T, true.T):
        negatives = weights * ~positive[:, None]
        pairs = weights[positive].sum(0) * negatives.sum(0)
        if not pairs.any():
            continue
        below = np.einsum("er,er->r", count_below(column, negatives)[positive], weights[positive])
        total += np.divide(below, pairs, out=np.zeros_like(pairs), where=pairs > 0)
        present += pairs > 0
    return np.divide(total, present, out=np.full_like(total, np.nan), where=present > 0)


def correlate(
    count: np.ndarray, x: np.ndarray, y: np.ndarray, xx: np.ndarray, yy: np.ndarray, xy: np.ndarray
) -> np.ndarray:
    """Return the linear correlation from the sums of x, y and their products; NaN if either is constant."""
    x_variance, y_variance = xx - x * x / count, yy - y * y / count
    varies = (x_variance > ROUNDING * xx) & (y_variance > ROUNDING * yy)
    scale = np.sqrt(np.where(varies, x_variance * y_variance, 1.0))
    return np.where(varies, (xy - x * y / count) / scale, np.nan)


def pearson(outputs: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the linear correlation; NaN if outputs or labels are constant."""
    x, y = (values.ravel().astype(float) for values in (outputs, labels))
    x, y = x - x.mean(), y - y.mean()
    return correlate(weights.sum(0), *sum_weighted(np.stack([x, y, x * x, y * y, x * y], axis=1), weights))


def spearman(outputs: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the correlation of the ranks; NaN if outputs or labels are constant."""
    x, y = count_below(outputs.ravel(), weights), count_below(labels.ravel(), weights)
    weighted_x, weighted_y = weights * x, weights * y
    products = ((weighted_x, x), (weighted_y, y), (weighted_x, y))
    sums = (np.einsum("er,er->r", *pair) for pair in products)
    return correlate(weights.sum(0), weighted_x.sum(0), weighted_y.sum(0), *sums)


def perplexity(outputs: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the exponential of the mean loss of a token; the first column of ``outputs`` sums a block's losses."""
    with np.errstate(over="ignore"):
        return np.exp(sum_weighted(outputs[:, 0], weights) / sum_weighted(tokens, weights))


def word_perplexity(outputs: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the exponential of the loss of a word, which models with different tokenizers can be compared by; the
    third column of ``outputs`` counts a block's words."""
    with np.errstate(over="ignore"):
        return np.exp(sum_weighted(outputs[:, 0], weights) / sum_weighted(outputs[:, 2], weights))


def token_accuracy(outputs: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the share of correct tokens; the second column of ``outputs`` counts a block's correct tokens."""
    return sum_weighted(outputs[:, 1], weights) / sum_weighted(tokens, weights)


def average_precision(outputs: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean precision at each example with a label above 0, from the highest output down; NaN without one.

    Examples with the same output are taken together, as scikit-learn does.
    """
    order = np.argsort(-outputs.ravel(), kind="stable")
    values, counts = outputs.ravel()[order], weights[order]
    hits = (counts * (labels.ravel()[order] > 0)[:, None]).cumsum(0)
    last = np.append(values[1:] != values[:-1], True)  # of the examples with one output
    found, seen = hits[last], counts.cumsum(0)[last]
    total = found[-1]
    steps = np.diff(found, axis=0, prepend=0) * found / np.maximum(seen, 1e-12)
    return np.divide(steps.sum(0), total, out=np.full_like(total, np.nan, dtype=float), where=total > 0)


def mean_value(outputs: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean of a number that each example has already, such as the nDCG of a query."""
    return sum_weighted(outputs.ravel(), weights) / weights.sum(0)
