"""The metrics agree with scikit-learn, scipy and sums worked by hand."""

import math

import pytest
import torch

from compress.tasks.kinds import KINDS, higher_is_better
from compress.tasks.metrics import TaskMetrics
from compress.tasks.task import Task

sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed: pip install -e '.[dev]'")


def task(kind, names=None, labels=("a", "b", "c", "d")):
    names = names or tuple(KINDS[kind].metrics)
    return Task(name="t", kind=kind, metrics=names, primary=names[0], labels=labels)


def scores(judged, logits, labels, batches=3):
    collection = TaskMetrics(judged)
    for part, answers in zip(logits.chunk(batches), labels.chunk(batches)):
        collection.update(part, answers)
    return {name: float(value) for name, value in collection.compute().items()}


def test_multiclass():
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 4), torch.randint(0, 4, (200,))
    logits[torch.arange(200), labels] += 1
    guess = logits.argmax(-1)
    assert scores(task("multiclass"), logits, labels) == pytest.approx(
        {
            "accuracy": sklearn.accuracy_score(labels, guess),
            "f1_macro": sklearn.f1_score(labels, guess, average="macro"),
            "f1_micro": sklearn.f1_score(labels, guess, average="micro"),
            "matthews": sklearn.matthews_corrcoef(labels, guess),
            "roc_auc": sklearn.roc_auc_score(labels, logits.softmax(-1), multi_class="ovr"),
        },
        abs=1e-5,
    )


def test_multilabel_says_yes_from_a_probability_of_one_half():
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (200, 4)).float()
    logits = torch.randn(200, 4) + labels
    guess = logits > 0
    assert scores(task("multilabel"), logits, labels) == pytest.approx(
        {
            "subset_accuracy": sklearn.accuracy_score(labels, guess),
            "f1_macro": sklearn.f1_score(labels, guess, average="macro"),
            "f1_micro": sklearn.f1_score(labels, guess, average="micro"),
            "roc_auc": sklearn.roc_auc_score(labels, logits.sigmoid(), average="macro"),
        },
        abs=1e-5,
    )


def test_logits_between_0_and_1_are_not_taken_for_probabilities():
    two_labels = task("multilabel", ("subset_accuracy",), ("a", "b"))
    assert scores(two_labels, torch.tensor([[0.2, 0.3]]), torch.tensor([[1.0, 1.0]]), 1) == {"subset_accuracy": 1.0}


def test_regression():
    from scipy import stats

    torch.manual_seed(0)
    labels = torch.rand(100) * 5
    logits = labels[:, None] + torch.randn(100, 1)
    assert scores(task("regression", labels=()), logits, labels) == pytest.approx(
        {
            "pearson": stats.pearsonr(logits[:, 0], labels).statistic,
            "spearman": stats.spearmanr(logits[:, 0], labels).statistic,
        },
        abs=1e-5,
    )


def test_lm_leaves_out_what_is_not_to_be_predicted():
    logits = torch.zeros(2, 4, 5)
    logits[0, 0, 1] = 100
    # One token is certain and right; of two others all five tokens are equally likely, and they are wrong.
    labels = torch.tensor([[0, 1, 2, -100], [0, 3, -100, -100]])
    result = scores(task("lm", labels=()), logits, labels, batches=1)
    value = math.exp(2 * math.log(5) / 3)
    assert result == pytest.approx({"perplexity": value, "word_perplexity": value, "accuracy": 1 / 3})


def test_perplexity_of_an_impossible_token_is_finite_and_half_precision_is_as_good():
    text = task("lm", ("perplexity",), ())
    logits = torch.tensor([[[60.0, -60.0]] * 11])
    labels = torch.tensor([[0, 1] + [0] * 9])
    assert scores(text, logits, labels, 1)["perplexity"] == pytest.approx(math.exp(12), rel=1e-3)
    half = scores(text, torch.zeros(2, 3, 7).bfloat16(), torch.ones(2, 3, dtype=int), 1)
    assert half["perplexity"] == pytest.approx(7)


def test_only_perplexity_is_better_when_lower():
    lower = {name for kind in KINDS.values() for name in kind.metrics if not higher_is_better(name)}
    assert lower == {"perplexity", "word_perplexity"}


def test_a_label_that_no_text_has_is_left_out_of_roc_auc():
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])  # no text has the third
    logits = torch.where(labels == 1, 2.0, -2.0)
    three_labels = task("multilabel", ("roc_auc",), ("a", "b", "c"))
    assert scores(three_labels, logits, labels, batches=1)["roc_auc"] == 1.0


def expected_by_torchmetrics(kind, logits, labels):
    from torchmetrics.functional import classification as c
    from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
    from torchmetrics.functional.text import perplexity

    if kind == "multiclass":
        return {
            "accuracy": c.multiclass_accuracy(logits, labels, 5, average="micro"),
            "f1_macro": c.multiclass_f1_score(logits, labels, 5, average="macro"),
            "f1_micro": c.multiclass_f1_score(logits, labels, 5, average="micro"),
            "matthews": c.multiclass_matthews_corrcoef(logits, labels, 5),
            "roc_auc": c.multiclass_auroc(logits, labels, 5, average=None)[:4].mean(),  # without the unused class
        }
    if kind == "multilabel":
        return {
            "subset_accuracy": c.multilabel_exact_match(logits, labels, 5),
            "f1_macro": c.multilabel_f1_score(logits, labels, 5, average="macro"),
            "f1_micro": c.multilabel_f1_score(logits, labels, 5, average="micro"),
            "roc_auc": c.multilabel_auroc(logits, labels.long(), 5, average="macro"),
        }
    if kind == "regression":
        return {"pearson": pearson_corrcoef(logits[:, 0], labels), "spearman": spearman_corrcoef(logits[:, 0], labels)}
    logits, labels = logits[:, :-1], labels[:, 1:]
    value = perplexity(logits, labels, ignore_index=-100)
    return {
        "perplexity": value,
        "word_perplexity": value,  # without the texts a token counts as a word
        "accuracy": (logits.argmax(-1) == labels)[labels != -100].float().mean(),
    }


@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "regression", "lm"])  # the others have own oracles
def test_every_metric_is_torchmetrics(kind):
    torch.manual_seed(0)
    kind = {"chat": "lm"}.get(kind, kind)  # the same numbers of fewer tokens
    shape = {"regression": (200, 1), "lm": (20, 7, 5)}.get(kind, (200, 5))
    logits = torch.randn(shape)
    labels = {
        "multiclass": torch.randint(0, 4, (200,)),  # the fifth class is unused
        "multilabel": torch.randint(0, 2, (200, 5)).float(),
        "regression": logits.flatten()[:200] + torch.randn(200),
        "lm": torch.randint(0, 5, (20, 7)).masked_fill(torch.arange(7) > torch.randint(2, 7, (20, 1)), -100),
    }[kind]
    values = scores(task(kind, labels=("a", "b", "c", "d", "e")), logits, labels)
    expected = {name: float(value) for name, value in expected_by_torchmetrics(kind, logits, labels).items()}
    assert values == pytest.approx(expected, abs=1e-5)
