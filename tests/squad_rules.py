"""The rules of SQuAD's two official scripts, evaluate-v1.1.py and evaluate-v2.0.py, written without our code."""

import collections
import re
import string


def normalize_answer(s):
    def remove_articles(text):
        return re.sub(r"\b(a|an|the)\b", " ", text)

    def white_space_fix(text):
        return " ".join(text.split())

    def remove_punc(text):
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return white_space_fix(remove_articles(remove_punc(s.lower())))


def f1_of_1(prediction, truth):
    prediction_tokens, truth_tokens = normalize_answer(prediction).split(), normalize_answer(truth).split()
    num_same = sum((collections.Counter(prediction_tokens) & collections.Counter(truth_tokens)).values())
    if num_same == 0:
        return 0
    precision, recall = num_same / len(prediction_tokens), num_same / len(truth_tokens)
    return (2 * precision * recall) / (precision + recall)


def f1_of_2(prediction, truth):
    prediction_tokens, truth_tokens = normalize_answer(prediction).split(), normalize_answer(truth).split()
    if len(truth_tokens) == 0 or len(prediction_tokens) == 0:
        return int(truth_tokens == prediction_tokens)
    return f1_of_1(prediction, truth)


def evaluate(predictions, golds, version):
    """Return exact match and F1 as fractions, of answers and lists of true answers."""
    exact = f1 = 0
    for prediction, truths in zip(predictions, golds, strict=True):
        if version == 2:
            truths = [truth for truth in truths if normalize_answer(truth)] or [""]
        exact += max(normalize_answer(prediction) == normalize_answer(truth) for truth in truths)
        f1 += max((f1_of_1 if version == 1 else f1_of_2)(prediction, truth) for truth in truths)
    return exact / len(golds), f1 / len(golds)
